"""How good a model is: its loss over a whole split, beside general compressors on the same text."""

import gzip
import lzma
import math

import torch

from dataset import Dataset, Split
from engine import machine
from engine.checkpoint import find, load_weights
from engine.machine import Machine
from model import GPT
from tokenizer import Tokenizer

EVAL_TOKENS = 16384  # in one forward pass
COMPARABLE_BYTES = 20_000_000  # xz takes too long for a larger text


def evaluate(
    model: GPT, split: Split, here: Machine, stop=None, device_batch: int = 0, eval_tokens: int = 0
) -> tuple | None:
    """Loss over the whole split: nats a token, and bits a byte of text where its size is known.

    Every token but the first is predicted once, in consecutive windows of the model's block_size;
    each process takes its share of them. None if meanwhile a `stop` was asked of any process.
    """
    rows = max(1, EVAL_TOKENS // model.config.block_size)
    rows = min(rows, device_batch or rows)
    total, asked, was_training = 0.0, False, model.training
    model.eval()
    with torch.no_grad(), here.autocast():
        for x, y in split.in_order(rows, model.config.block_size, here.rank, here.world):
            loss = model(here.put(x), here.put(y), reduction="sum").item()
            part, asked = here.sum([loss, bool(stop and stop.asked)])
            total += part
            if asked:
                break
    model.train(was_training)
    if asked:
        return None
    bits_per_byte = total / math.log(2) / split.text_bytes if split.text_bytes else None
    return total / (split.tokens - 1), bits_per_byte


def evaluate_run(s) -> int:
    """Prints the loss of the best checkpoint of the run `s.out` on `s.split` of `s.data`."""
    here = machine.pick(s.device, s.dtype, "false")
    machine.start(here, s.deterministic)
    path = find(s.out)
    model, tokenizer, _ = load_weights(path)
    data = Dataset(s.data, s.tokenizer)
    if data.tokenizer.digest() != tokenizer.digest():
        raise ValueError(
            f"{path} reads {tokenizer.name} ({tokenizer.vocab_size} tokens), but {s.data} is"
            f" written in {data.tokenizer.name} ({data.tokenizer.vocab_size} tokens)"
        )
    loss, bpb = evaluate(model.to(here.device), data.split(s.split), here)
    if here.rank == 0:
        bits = f", {bpb:.4f} bits per byte" if bpb else ""
        print(f"{path} on the {s.split} split of {s.data}: {loss:.4f} nats a token{bits}")
    return 0


def compressors(split: Split, tokenizer: Tokenizer) -> str:
    """Bits per byte that gzip and xz need for the text of a split; empty if it is very large."""
    if (split.text_bytes or math.inf) > COMPARABLE_BYTES:
        return ""
    tokens = split.read(0, split.tokens)
    text = tokenizer.decode_bytes(tokens[tokens != tokenizer.end_of_text].tolist())
    gz = len(gzip.compress(text, 9)) * 8 / len(text)
    xz = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) * 8 / len(text)
    return f"gzip -9 {gz:.3f}, xz -9e {xz:.3f}"
