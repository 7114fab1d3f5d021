"""Chapter 12: twelve mistakes, each of them made, and what they look like in numbers.

Here are those in judging and showing; lessons/mislearned.py has those in learning.
"""

import math
import random

import numpy as np
import tiktoken
import torch
from torch.nn.functional import cross_entropy

import generate
from engine.index import draw
from engine.spool import digest_of
from lessons import ablations, require, specimen
from lessons.mislearned import (
    SEEDS,
    go_on,
    made,
    not_divided,
    not_zeroed,
    one_seed,
    resumed,
    shown,
    windows,
)
from tokenizer import END_OF_TEXT, SPLIT, Tokenizer, bytes_tokenizer

BOOK = "generate"
VERSE = "白日依山尽，黄河入海流。"


def not_eval() -> str:
    """The specimen, after some steps with dropout: its loss, three times over, in each mode."""
    net, _ = specimen.load()
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(net.train().parameters(), lr=0.003)
    go_on(net, optimizer, range(40))
    losses = {}
    for mode in ("train", "eval"):
        net.train(mode == "train")
        with torch.no_grad():
            losses[mode] = [net(*windows(1000)).item() for _ in range(3)]
        print(f"net.{mode}(): {shown(losses[mode], 4)}")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.nbytes) or t, lambda t: t
    ):
        net(*windows(1000))
    print(f"kept for a backward pass without no_grad(): {sum(kept) / 1e6:.1f} MB; with it: 0")
    worse = min(losses["train"]) > max(losses["eval"])
    again = [len({*losses[mode]}) == 1 for mode in ("train", "eval")]
    return "b" if worse and again == [False, True] else "a"


@torch.no_grad()
def other_tokenizer() -> float:
    """The specimen reads what a vocabulary of as many tokens wrote, in another order."""
    net, ours = specimen.load()
    ranks = {bytes([byte]): (byte + 100) % 256 for byte in range(256)}
    special = {END_OF_TEXT: 256}
    encoding = tiktoken.Encoding(
        "other", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special
    )
    theirs = Tokenizer("bpe", encoding, None)
    losses = []
    for tokenizer in (ours, theirs):
        tokens = specimen.read(tokenizer, "nutshell|nutshell")
        losses.append(specimen.surprise(net, tokens).mean().item())
        said = tokenizer.decode(net(tokens)[0].argmax(-1).tolist())
        print(f"V = {tokenizer.vocab_size}   loss {losses[-1]:5.2f}   says {said!r}")
    print(f"ln V = {math.log(257):.2f}   digests {ours.digest()[:8]} {theirs.digest()[:8]}")
    print("theirs extends ours:", theirs.extends(ours))
    return losses[1]


@torch.no_grad()
def removed() -> float:
    """The prompt has no loss; what if it is taken out of the input as well?"""
    net, tokenizer = specimen.load()
    found = []
    for text in ("nutshell|nutshell", "|nutshell"):
        nats = specimen.surprise(net, specimen.read(tokenizer, text))[-8:]
        found.append(nats.mean().item())
        print(f"{text:18} nats a letter behind the bar {found[-1]:.2f}   {shown(nats.tolist())}")
    return found[1]


def duplicates() -> float:
    """Of 3,000 lines, each there once, twice or three times, a tenth is held back."""
    rng = random.Random(0)
    texts = [f"passage {i}" for i in range(1500) for _ in range(rng.randint(1, 3))]
    rng.shuffle(texts)
    cut = len(texts) // 10
    ways = {
        "lines shuffled, then cut": [i < cut for i in range(len(texts))],
        "by a digest of the text": [draw(digest_of(text), 1) < 0.1 for text in texts],
    }
    shares = []
    for way, held in ways.items():
        train = {text for text, back in zip(texts, held, strict=True) if not back}
        val = [text for text, back in zip(texts, held, strict=True) if back]
        shares.append(100 * sum(text in train for text in val) / len(val))
        print(f"{way:25} {shares[-1]:5.1f}% of {len(val)} lines of val are in train, too")
    return shares[0]


def eight_bits(w: torch.Tensor, by_row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers from -127 to 127, and the scale by which to multiply them."""
    largest = w.abs().amax(dim=1, keepdim=True) if by_row else w.abs().max()
    scale = largest / 127
    return (w / scale).round(), scale


@torch.no_grad()
def one_scale() -> float:
    """A matrix of the specimen, with one weight made 100 times as large as the largest."""
    net, _ = specimen.load()
    w = net.blocks[0].attn.wv.weight
    w[3, 5] = 100 * w.abs().max()
    zeros = []
    for by_row in (False, True):
        q, _ = eight_bits(w, by_row)
        zeros.append(100 * (q == 0).float().mean().item())
        rows = int((q == 0).all(dim=1).sum())
        name = "one for each row" if by_row else "one for the matrix"
        print(f"scale: {name:19} {zeros[-1]:5.1f}% of the weights are 0, {rows} rows of {len(w)}")
    cache = net.new_cache()
    print(f"weights in eight bits: {w.numel() + 4 * len(w):,} bytes instead of {w.nbytes:,}")
    print(f"the KV cache before and after: {cache.k.nbytes + cache.v.nbytes:,} bytes")
    return zeros[0]


def best_of_20() -> float:
    """Twenty models, equally good: each answers a row rightly with probability 0.8."""
    rng = np.random.default_rng(0)
    scores = rng.binomial(200, 0.8, size=(10_000, 20)) / 2  # percent of 200 rows
    for count in (1, 5, 20):
        best = scores[:, :count].max(axis=1).mean()
        print(f"best of {count:2}: {best:.1f}%, {best - 80:+.1f} points")
    print(f"one model, 95%: 80 ± {196 * math.sqrt(0.8 * 0.2 / 200):.1f} points")
    return scores.max(axis=1).mean() - 80


def alone() -> int:
    """Each token shown by itself, and as generate.py shows it."""
    tokenizer = bytes_tokenizer()
    ids = tokenizer.encode(VERSE)
    stream = generate.TextStream(tokenizer)
    by_itself = "".join(tokenizer.decode([i]) for i in ids)
    print(f"{len(ids)} tokens, each by itself: {by_itself}")
    print("held back until whole:   ", "".join(map(stream.feed, ids)))
    return by_itself.count("\ufffd")


def chains(count: int, seed: int) -> torch.Tensor:
    """Letters of which each is the next in the alphabet of eight, but for a quarter that are drawn;
    (count, 13)."""
    rng = torch.Generator().manual_seed(seed)
    letters = torch.randint(8, (count, 13), generator=rng)
    chance = torch.rand(count, 13, generator=rng)
    for i in range(1, 13):
        follow = chance[:, i] < 0.75
        letters[follow, i] = (letters[follow, i - 1] + 1) % 8
    return letters


def sure_and_wrong() -> str:
    """Sixteen texts, read again and again, three seeds; judged by 500 others."""
    found = dict(loss=[[], []], right=[[], []])
    for seed in SEEDS:
        few, others = chains(16, seed), chains(500, 0)
        net = made(seed, vocab_size=8)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        for step in range(1, 121):
            learned = net(few[:, :-1], few[:, 1:])
            learned.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step not in (30, 120):
                continue
            with torch.no_grad():
                logits, targets = net(others[:, :-1]).flatten(0, 1), others[:, 1:].flatten()
            loss = cross_entropy(logits, targets).item()
            right = 100 * (logits.argmax(-1) == targets).float().mean().item()
            found["loss"][step > 30].append(loss)
            found["right"][step > 30].append(right)
            print(f"step {step:3}   loss {learned:.2f}   val_loss {loss:.2f}   right {right:.1f}%")
    apart = {name: ablations.Found(*runs).apart() for name, runs in found.items()}
    print(", ".join(f"{name} {x:.1f}" for name, x in apart.items()), "deviations apart")
    return "b" if apart["loss"] > ablations.BEYOND > abs(apart["right"]) else "a"


QUESTIONS = (not_zeroed, not_divided, one_seed, resumed, not_eval, other_tokenizer, removed)
QUESTIONS += (duplicates, one_scale, best_of_20, alone, sure_and_wrong)


# --- checks


def bytes_become_text():
    """What the stream of generate.py shows is the text, and never half a character."""
    tokenizer = bytes_tokenizer()
    stream = generate.TextStream(tokenizer)
    pieces = [*map(stream.feed, tokenizer.encode(VERSE)), stream.end()]
    require("".join(pieces) == VERSE, f"of {VERSE!r} it makes {''.join(pieces)!r}")


def quantize(function):
    """Exercise 12.a: quantize(w): whole numbers from -127 to 127, and a scale for each row."""
    w = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    w[1, 2] = 500.0
    q, scale = function(w)
    require(q.dtype == torch.int8, f"the numbers are {q.dtype}, and should be torch.int8")
    off = ((q.float() * scale - w).abs() / w.abs().amax(dim=1, keepdim=True)).max().item()
    least = 1 / 254  # half a step of 127
    require(off < 1.01 * least, f"off by {off:.4f} of a row's largest weight: {least:.4f} will do")


def pieces(function):
    """Exercise 12.b: pieces(parts): the bytes of each token to the text to show after it."""
    parts = [bytes([byte]) for byte in "é天x".encode()]
    found = list(function(parts))
    wanted = ["", "é", "", "", "天", "x"]
    require(found == wanted, f"pieces is {found}, and should be {wanted}")


CHECKS = (bytes_become_text, quantize, pieces)
