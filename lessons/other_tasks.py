"""Chapter 10: rows and what counts in them, masks, hidden tokens, preferences, rewards, codes."""

import math

import numpy as np
import torch

import dataset
from dataset import IGNORE
from lessons import require
from objectives import masked, reward
from tokenizer import bytes_tokenizer

BOOK = "dataset"
TALK = [dict(role="user", content="2+3="), dict(role="assistant", content="5")]
NAMES = dict(user="<u>", assistant="<a>", system="<s>", end="<e>", end_of_text=".")


def row() -> tuple:
    tokenizer = bytes_tokenizer().extended([])
    ids = np.array([tokenizer.encode_row(TALK)])
    signs = {getattr(tokenizer.markers, name): sign for name, sign in NAMES.items()}
    return ids, tokenizer.markers, [signs.get(i) or chr(i) for i in ids[0].tolist()]


def counted() -> int:
    ids, markers, names = row()
    counts = dataset.counted(ids, markers, "answers")[0]
    print("token  ", " ".join(f"{n:>3}" for n in names))
    print("counts ", " ".join(f"{int(c):3}" for c in counts))
    return int(counts.sum())


def prefix() -> int:
    ids, markers, names = row()
    seen = {}
    for policy in ("causal", "prefix", "full"):
        _, mask = dataset.layout(ids, markers, policy)
        seen[policy] = int(mask[0, 0, 0].sum())
        print(policy)
        for name, line in zip(names, mask[0, 0].astype(int).tolist(), strict=True):
            print(f"   {name:>3}  {' '.join(map(str, line))}")
    return seen["prefix"]


def hidden() -> int:
    tokens = np.frombuffer(b"the cat sat on the mat, as cats do here.", np.uint8)[None].astype(int)
    askable = np.ones(tokens.shape, bool)
    for key in range(3):
        shown, asked, gone = masked.corrupt(tokens, askable, 0.15, 257, [(1, key)])
        signs = [
            "_" if g else chr(c) if 32 < c < 127 else "~" if c > 126 else " "
            for c, g in zip(shown[0], gone[0], strict=True)
        ]
        print("shown ", "".join(signs), "  asked for", int(asked.sum()))
    return int(asked.sum())


def preferred() -> float:
    for margin in (0.0, 1.0, 3.0, -3.0):
        loss = -torch.nn.functional.logsigmoid(torch.tensor(margin)).item()
        print(f"reward(chosen) - reward(rejected) = {margin:4.1f}   loss {loss:.3f}")
    return math.log(2)


def rewarded() -> float:
    for group in ([1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]):
        found = reward.advantages(np.array([group], np.float32))[0]
        print(group, "->", [round(x, 2) for x in found.tolist()])
    return reward.advantages(np.array([[1, 0, 0, 0]], np.float32))[0, 0].item()


def exchanged() -> float:
    """Two sentences through two codes, by a decoder that reads the code and by one that does not:
    what it costs to take the other sentence's code."""
    sure, unsure = torch.eye(2), torch.full((2, 2), 0.5)  # q(z|x) of an encoder: a row each x
    more = {}
    for name, q, p in (("A", sure, 0.6 * sure + 0.2), ("B", unsure, unsure)):
        nats = -(q @ p.log()).diagonal().mean().item()  # p(x|z) has a row for each z
        kl = torch.xlogy(q, q / 0.5).sum(dim=1).mean().item()  # both codes are equally likely
        more[name] = -(q.flip(0) @ p.log()).diagonal().mean().item() - nats
        print(f"{name}   -ln p(x|z) {nats:.3f}   KL {kl:.3f}   -ELBO {nats + kl:.3f}")
        print(f"    z exchanged: {more[name]:+.3f}")
    return more["A"]


QUESTIONS = (counted, prefix, hidden, preferred, rewarded, exchanged)


# --- checks


def no_row_sees_another():
    """In a window of two rows none looks into the other, and positions begin anew."""
    ids, markers, _ = row()
    positions, mask = dataset.layout(np.concatenate([ids, ids], axis=1), markers, "causal")
    n = ids.shape[1]
    require(not mask[0, 0, n:, :n].any(), "the second row sees the first")
    require(positions[0, n] == 0, f"the second row begins at position {positions[0, n]}")


def answers(function):
    """Exercise 10.a: answers(ids, assistant, end): targets, IGNORE where nothing is asked."""
    ids, markers, _ = row()
    tokens = ids[0].tolist()
    found = list(function(tokens, markers.assistant, markers.end))
    counts = dataset.counted(ids, markers, "answers")[0]
    wanted = [t if c else IGNORE for t, c in zip(tokens[1:], counts[1:], strict=True)]
    require(found == wanted, f"the targets are {found}, and should be {wanted}")


def advantages(function):
    """Exercise 10.b: advantages(rewards): of a list of rewards to one question."""
    for rewards, wanted in (([1, 0, 0, 0], [1.732, -0.577, -0.577, -0.577]), ([1, 1], [0, 0])):
        found = [float(x) for x in function(rewards)]
        off = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
        require(off < 1e-3, f"advantages({rewards}) is {found}, and should be {wanted}")


CHECKS = (no_row_sees_another, answers, advantages)
