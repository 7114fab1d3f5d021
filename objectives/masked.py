"""Masked tokens: which word is hidden here? (BERT: arXiv:1810.04805)

    x          the  cat  sat  on   the  mat
    shown      the  ?    sat  on   a    mat        15% of the tokens are asked for
    targets    -    cat  -    on   the  -          loss = - sum ln p(target | all that is shown)

With no future to hide, every position may see all others (mask="full"): what is learned is to
understand a text that is there. Of the tokens asked for, 80% are hidden: a vector that means
nothing stands for them. 10% are replaced by a random token and 10% stay, so that at a token that is
shown the network cannot know whether it is right, and has to think about every one. All is drawn
anew each time (arXiv:1907.11692), and as in BERT the head is best the embedding: --tied=true.

    python -m objectives.masked out/masked --fill="def add(a, b): return <mask> + b"
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dataset import IGNORE
from engine import settings
from engine.settings import Fraction, Positive
from objectives import Base

MASK = "<mask>"  # how it is written in --fill
HIDDEN, RANDOM = 0.8, 0.1  # of what is asked for; the rest stays as it is


@dataclass
class Settings:
    mask_fraction: Fraction = 0.15  # of the tokens are asked for


class Objective(Base):
    terms = {"loss": 1.0, "accuracy": 0.0}
    masks = ("full",)
    generates = False
    instead = 'python -m objectives.masked RUN --fill="..."'

    def heads(self, gpt):
        """The vector that stands where a token is hidden: at first as random as that of a token."""
        other = torch.Generator().manual_seed(2**32 + self.s.seed)  # than that of the tokens
        drawn = torch.randn(gpt.config.n_embd, generator=other)
        return {"mask": nn.ParameterList([drawn * gpt.wte.weight.detach().std()])}

    def prepare(self, batch, learner):
        """Tokens as shown, targets, hidden (B, T) bool; positions and mask."""
        real = there(batch)
        askable = real & ~np.isin(batch.tokens, [*self.tokenizer.special.values()])
        how = self.own.mask_fraction, self.tokenizer.vocab_size
        shown, asked, hidden = corrupt(batch.tokens, askable, *how, batch.keys)
        targets = np.where(asked, batch.tokens, IGNORE)
        inputs = (shown, targets, hidden, batch.positions, whole(batch, real))
        return inputs, [int(asked.sum())] * 2

    def shown(self, inputs, i):
        decode, row = self.tokenizer.decode, zip(inputs[0][i].tolist(), inputs[2][i], strict=True)
        return "".join(MASK if hidden else decode([token]) for token, hidden in row)

    def loss(self, gpt, heads, shown, targets, hidden, positions, mask):
        x = states(gpt, heads["mask"][0], shown, hidden, positions, mask)
        at = targets != IGNORE
        logits = gpt.logits(x[at])  # (N, V): of what is asked for, and of nothing else
        right = (logits.argmax(dim=-1) == targets[at]).sum()
        return [F.cross_entropy(logits, targets[at], reduction="sum"), right]


def corrupt(tokens, askable, fraction: float, vocab_size: int, keys):
    """Some of the askable tokens (B, T): as they are shown, which are asked for, which are hidden.

    In each row a `fraction` of them, and one at least if there is any.
    """
    shown, asked, hidden = tokens.copy(), np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
    for i, key in enumerate(keys):
        rng = np.random.default_rng(key)
        at = rng.permutation(np.flatnonzero(askable[i]))
        at = at[: max(1, round(fraction * len(at)))]
        what = rng.random(len(at))
        asked[i, at] = True
        hidden[i, at[what < HIDDEN]] = True
        replaced = at[(what >= HIDDEN) & (what < HIDDEN + RANDOM)]
        shown[i, replaced] = rng.integers(vocab_size, size=len(replaced))
    return shown, asked, hidden


def there(batch):
    """Which positions (B, T) hold a token, and are not filled up."""
    if batch.mask is not None:  # rows: what fills up is a row of its own; a window of 0s is nothing
        return np.broadcast_to(batch.tokens.any(axis=1, keepdims=True), batch.tokens.shape)
    known = batch.targets != IGNORE  # every token but the first is the target of the one before
    return np.concatenate([known[:, :1], known[:, :-1]], axis=1)


def whole(batch, real):
    """The mask by which all see all that is there: None if that is everything."""
    if batch.mask is not None or real.all():
        return batch.mask
    return real[:, None, None, :] | np.eye(real.shape[1], dtype=bool)


def states(gpt, vector, shown, hidden, positions, mask, trunk=None):
    """The last hidden states (B, T, C), with `vector` instead of the embedding where `hidden`; of
    another `trunk`, if one is given, that reads the embeddings of `gpt`."""
    x = gpt.wte(shown)
    x = torch.where(hidden[..., None], vector.to(x.dtype), x)
    if mask is None:
        T = shown.size(1)
        mask = torch.ones(1, 1, T, T, dtype=torch.bool, device=shown.device)
    return (trunk or gpt.trunk)(shown, mask, positions, embedded=x)


# --- the command


@dataclass
class Command:
    run: str = "out/masked"  # folder of a run, or one checkpoint of it
    fill: str = ""  # a text with one or more <mask>, each of which stands for one token
    top: Positive = 5  # tokens to show for each


def main(argv: list[str]) -> None:
    s = settings.load(Command, argv, "Fill in what is hidden.", "run")
    settings.require(MASK in s.fill, s, "fill", f"a text with {MASK} in it")
    from engine.learner import opened

    learner, tokenizer = opened(s.run, "masked")
    parts = [tokenizer.encode(part) for part in s.fill.split(MASK)]
    ids = [i for part in parts for i in (*part, 0)][:-1]
    at = np.cumsum([len(part) + 1 for part in parts])[:-1] - 1
    room = f"a text of at most {learner.gpt.config.block_size} tokens, not {len(ids)}"
    settings.require(len(ids) <= learner.gpt.config.block_size, s, "fill", room)
    hidden = torch.isin(torch.arange(len(ids)), torch.from_numpy(at))[None]
    with torch.no_grad():
        x = states(learner.gpt, learner.heads["mask"][0], torch.tensor([ids]), hidden, None, None)
        p = learner.gpt.logits(x[0, at]).softmax(dim=-1)  # (masks, V)
        best = p.topk(min(s.top, p.size(1)))
    for number, some in enumerate(zip(*best, strict=True), start=1):
        guesses = (f"{tokenizer.decode([int(i)])!r} {q:.1%}" for q, i in zip(*some, strict=True))
        print(f"{MASK} {number}: {', '.join(guesses)}")
    filled = np.array(ids)
    filled[at] = best.indices[:, 0]
    print(tokenizer.decode(filled.tolist()))


if __name__ == "__main__":
    settings.run(main)
