"""Chapter 5: one pair turned, scores that know distances only, order without positions, halves."""

import math
from dataclasses import replace
from unittest import mock

import torch

import model
from lessons import require, specimen
from shape import GPTConfig

BOOK = "model"
ROTATE = model.rotate  # as the book has it, whatever the reader puts in its place


def config(**changes) -> GPTConfig:
    return GPTConfig(
        **dict(vocab_size=257, n_layer=2, n_head=4, n_embd=32, rope_base=100) | changes
    )


def at(*positions: int):
    return model.rotary(torch.tensor(positions), config())


def turned() -> float:
    x = torch.tensor([1.0, 0.0])
    rope = model.rotary(torch.arange(4), config(n_head=16))  # D = 2: one pair, a radian a position
    pairs = model.rotate(x.expand(4, 1, 2), rope)[:, 0]
    for position, (a, b) in enumerate(pairs.tolist()):
        print(f"position {position}   ({a:5.2f}, {b:5.2f})   length {math.hypot(a, b):.2f}")
    return pairs[1, 0].item()


def vectors() -> tuple:
    return torch.randn(2, 1, 1, 8, generator=torch.Generator().manual_seed(1))


def score(m: int, n: int) -> float:
    """Of a query at position m and a key at n."""
    q, k = vectors()
    return (model.rotate(q, at(m)) * model.rotate(k, at(n))).sum().item()


def moved() -> float:
    for m, n in ((5, 2), (12, 9), (55, 52), (5, 3), (5, 5)):
        print(f"query at {m:2}, key at {n:2}: score {score(m, n):7.4f}")
    return 100 * (score(12, 9) / score(5, 2) - 1)


def slowest() -> int:
    for i in range(4):
        frequency = 100 ** (-2 * i / 8)
        print(
            f"pair {i}: {frequency:.3f} radians a token, a turn in {2 * math.pi / frequency:6.1f}"
        )
    return round(2 * math.pi * 100 ** (6 / 8))


@torch.no_grad()
def shuffled() -> str:
    """How much the last logits change when the letters before the last are exchanged."""
    text, other = "abcdefgh", "gbadcfeh"
    found = {}
    for name, rotate in (("rotary", model.rotate), ("none", lambda x, rope: x)):
        for layers in (1, 2):
            net = model.GPT(config(n_layer=layers))
            for i, p in enumerate(net.parameters()):
                p.normal_(0, 0.2, generator=torch.Generator().manual_seed(i))
            one, two = (torch.tensor([list(t.encode())]) for t in (text, other))
            with mock.patch.object(model, "rotate", rotate):
                found[name, layers] = (net(one) - net(two))[0, -1].abs().max().item()
            print(f"positions {name:6}  layers {layers}   change {found[name, layers]:.4f}")
    same = [found["none", layers] < 1e-4 for layers in (1, 2)]
    return {(True, True): "a", (True, False): "b", (False, False): "c"}[tuple(same)]


@torch.no_grad()
def far(**squeezed) -> float:
    """How well the specimen copies beyond the distances it has learned from, its positions as they
    are or with other settings."""
    net, tokenizer = specimen.load()
    net.config = replace(net.config, **squeezed)
    generator = torch.Generator().manual_seed(0)
    for size in (4, 8, 12, 16, 20, 24):
        right = []
        for _ in range(100):
            letters = (97 + torch.randint(26, (size,), generator=generator)).tolist()
            text = bytes(letters).decode()
            tokens = specimen.read(tokenizer, f"{text}|{text}")
            likeliest = net(tokens[:, :-1])[0, size + 1 :].argmax(-1)
            right += (likeliest == tokens[0, size + 2 :]).tolist()
        share = 100 * sum(right) / len(right)
        print(f"{size:2} letters: {share:5.1f} percent right   {'#' * round(share / 2)}")
        if size == 24:
            return share
    raise AssertionError


QUESTIONS = (turned, moved, slowest, shuffled, far)


# --- checks


def only_distance_counts():
    """Both positions moved alike: the same score."""
    off = max(abs(score(5 + d, 2 + d) - score(5, 2)) for d in (1, 7, 40))
    require(off < 1e-4, f"a query and a key moved alike change their score by {off:.3f}")
    require(
        abs(score(5, 2) - score(5, 4)) > 1e-3, "the distance changes nothing: is x turned at all?"
    )


def rotate(function):
    """Exercise 5.a: rotate(x, rope), halves, as the book does."""
    x = torch.randn(2, 9, 4, 8, generator=torch.Generator().manual_seed(0))
    rope = at(*range(9))
    found, wanted = function(x, rope), ROTATE(x, rope)
    require(found.shape == wanted.shape, f"its shape is {tuple(found.shape)}, not (2, 9, 4, 8)")
    off = (found - wanted).abs().max().item()
    require(
        off < 1e-5, f"a channel is off by {off:.3f}: which channels are a pair, and which sign?"
    )


def to_neighbours(function):
    """Exercise 5.b: to_neighbours(w, D): rows of wq or wk, for a rotary that pairs neighbours."""

    def neighbours(x, rope):
        cos, sin = (z.unsqueeze(-2) for z in rope)
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)

    wq, wk = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0))
    x, rope = torch.randn(9, 32, generator=torch.Generator().manual_seed(1)), at(*range(9))

    def scores(wq, wk, turn):
        q, k = (turn((x @ w.T).view(9, 4, 8), rope) for w in (wq, wk))
        return torch.einsum("thd,shd->hts", q, k)

    found = scores(function(wq, 8), function(wk, 8), neighbours)
    off = (found - scores(wq, wk, ROTATE)).abs().max().item()
    require(
        off < 1e-3, f"the scores differ by {off:.3f}: row i of a head and row i + D/2 are a pair"
    )


CHECKS = (only_distance_counts, rotate, to_neighbours)
