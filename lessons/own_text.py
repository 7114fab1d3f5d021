"""Chapter 9: from a file of one's own to a model: tokens, epochs, memory, time."""

from collections import Counter

import regex
import torch

import dataset
import train
from bpe import bpe_tokenizer
from engine import settings
from lessons import require
from model import GPT
from optim import make_optimizers
from shape import GPTConfig
from tokenizer import SPLIT, bytes_tokenizer

BOOK = "dataset"
LINE = "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。\n"  # a poem of 696, by Wang Zhihuan
TEXT = "".join(f"{i}. {LINE}" for i in range(400))


def learned(vocab_size: int):
    """A vocabulary of this size from TEXT, as `prepare.py` learns it; bytes alone for 257."""
    if vocab_size == 257:
        return bytes_tokenizer()
    return bpe_tokenizer(Counter(regex.findall(SPLIT, TEXT)), vocab_size)


def shorter() -> int:
    for size in (257, 270, 290):
        tokenizer = learned(size)
        ids = tokenizer.encode(LINE)
        require(tokenizer.decode(ids) == LINE, "no round trip")
        rows = 2 * tokenizer.vocab_size * 128
        print(f"V = {tokenizer.vocab_size}: {len(ids):2} tokens, embedding and head {rows:,}")
    return len(ids)


def epochs() -> float:
    """How often config/small.py would read a novel of a million Chinese characters."""
    values = settings.read_file("config/small.py", settings.settings_of(train.Settings))
    seen = values["steps"] * values["batch_tokens"]
    tokens = 1_000_000 * 3 / 2.5  # UTF-8 bytes, by about 2.5 bytes a token
    print(f"{values['steps']:,} steps of {values['batch_tokens']:,} tokens: {seen:,}")
    print(f"windows in an epoch: {dataset.windows_per_epoch(int(tokens), values['block_size']):,}")
    return seen / tokens


def memory() -> float:
    """Megabytes of weights, gradients and optimizer state of the default shape, after one step."""
    net = GPT(GPTConfig(vocab_size=2048))
    net.init_weights(seed=1)
    s = train.Settings()
    optimizers = make_optimizers(net, s, torch.float32)
    net(torch.arange(8)[None], torch.arange(1, 9)[None]).backward()
    parts = dict(weights=sum(p.nbytes for p in net.parameters()))
    parts["gradients"] = sum(p.grad.nbytes for p in net.parameters())
    for optimizer in optimizers:
        optimizer.step()
        states = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
        parts[type(optimizer).__name__] = sum(t.nbytes for t in states)
    for name, size in parts.items():
        print(f"{name:10} {size / 1e6:6.2f} MB")
    return sum(parts.values()) / 1e6


QUESTIONS = (shorter, epochs, memory)


# --- checks


def hours(function):
    """Exercise 9.a: hours(tokens, epochs, tokens_per_second)."""
    for values, wanted in (((1_200_000, 10, 20_000), 0.1667), ((3_600_000, 1, 1000), 1.0)):
        found = function(*values)
        require(abs(found - wanted) < 1e-3, f"hours{values} is {found:.4f}, and should be {wanted}")


def training_bytes(function):
    """Exercise 9.b: training_bytes(V, C, L): four bytes each for weights, gradients and what the
    optimizers keep: two numbers for embedding and head (AdamW), one for the matrices (Muon)."""
    for V, C, L in ((2048, 128, 4), (4096, 256, 6)):
        tables, matrices = 2 * V * C, 12 * L * C * C
        wanted = 4 * (4 * tables + 3 * matrices)
        found = function(V, C, L)
        require(found == wanted, f"training_bytes({V}, {C}, {L}) is {found:,}, not {wanted:,}")


CHECKS = (hours, training_bytes)
