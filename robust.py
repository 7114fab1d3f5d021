"""Few rows: what keeps a model from learning them by heart, and makes it bear small changes.

`augment` changes prompts a little, differently each time: tokens hidden, exchanged, replaced (Wei
and Zou 2019, arXiv:1901.11196). `mistyped` does it to characters, as fingers do (arXiv:1711.02173):
prepare.py adds such copies of rows, evaluate.py asks so. `adversarial` looks for the small change
that hurts most, and asks to be right there, too (Miyato et al. 2017, arXiv:1605.07725). All are off
unless asked for; what they brought, and where they did not, is in docs/tasks.md.
"""

import random
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from dataset import IGNORE, Batch

if TYPE_CHECKING:
    from torch import Tensor


def augment(batch: Batch, special: list[int], rate: float) -> Batch:
    """`batch` with about `rate` of the tokens of its prompts changed; targets stay as they are.

    A third of them changes places with the next token, a third becomes another token of the
    window, a third is hidden: no other position sees it. Answers are left alone, and so are the ids
    `special`, the markers above all. Window i draws from its key, whichever process has it. Running
    text comes back as it was: it has no prompts.
    """
    if batch.mask is None:
        return batch
    tokens, mask = batch.tokens.copy(), batch.mask.copy()
    answered = np.zeros(tokens.shape, bool)
    answered[:, 1:] = batch.targets[:, :-1] != IGNORE
    changeable = ~answered & ~np.isin(tokens, special)
    for i, (row, key) in enumerate(zip(tokens, batch.keys, strict=True)):
        rng = np.random.default_rng(key)
        chosen = np.flatnonzero(changeable[i] & (rng.random(len(row)) < rate))
        swapped, replaced, hidden = np.array_split(rng.permutation(chosen), 3)
        for at in swapped:
            if at + 1 < len(row) and changeable[i, at + 1]:
                row[[at, at + 1]] = row[[at + 1, at]]
        row[replaced] = rng.choice(row[changeable[i]], len(replaced)) if len(replaced) else 0
        mask[i, :, :, hidden] = False
        mask[i, :, hidden, hidden] = True  # a position that sees nothing has no softmax
    return batch._replace(tokens=tokens, mask=mask)


def mistyped(text: str, rate: float) -> str:
    """`text` with about `rate` of its letters typed wrongly, the same ones each time: left out,
    doubled, exchanged with the next, or another letter of the text. Digits are left alone, since
    with another one the answer would be another."""
    rng = random.Random(zlib.crc32(text.encode(errors="replace")))
    left, letters, typed = [*text], [c for c in text if c.isalpha()], []
    while left:
        c = left.pop(0)
        if not c.isalpha() or rng.random() >= rate:
            typed.append(c)
            continue
        how = rng.choice(("drop", "double", "swap", "replace"))
        if how == "double":
            typed += [c, c]
        elif how == "replace":
            typed.append(rng.choice(letters))
        elif how == "swap":
            typed += [left.pop(0), c] if left and left[0].isalpha() else [c]
    return "".join(typed)


def mistyped_prompt(messages: list[dict], rate: float) -> list[dict]:
    """The turns of a conversation, those of the user as they might have been typed."""
    return [
        turn | dict(content=mistyped(turn["content"], rate)) if turn["role"] == "user" else turn
        for turn in messages
    ]


def adversarial(loss: "Callable[[Tensor], Tensor]", x: "Tensor", size: float) -> "Tensor":
    """The mean of two losses of embeddings x (B, T, C): as they are, and moved uphill.

    The gradient g of the loss by x tells in which direction it rises most; each window moves by
    `size` * g / |g|, a small step in that direction. Twice the time, and more.
    """
    import torch

    x = x if x.requires_grad else x.detach().requires_grad_()  # frozen by lora.py
    plain = loss(x)
    (g,) = torch.autograd.grad(plain, x, retain_graph=True)
    g = g.float()  # its square may be nothing in float16
    uphill = size * g / g.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)  # (B, T, C)
    return (plain + loss(x + uphill.to(x.dtype))) / 2
