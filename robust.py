"""Few rows: what keeps a model from learning them by heart, and makes it bear small changes.

`augment` changes prompts a little, differently each time: tokens hidden, exchanged, replaced (Wei
and Zou 2019, arXiv:1901.11196). `adversarial` looks for the small change that hurts most, and asks
to be right there, too (Miyato et al. 2017, arXiv:1605.07725). Both are off unless asked for; what
they brought, and where they did not, is in docs/tasks.md.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dataset import IGNORE, Batch


def augment(batch: Batch, special: list[int], rate: float, keys: list[tuple]) -> Batch:
    """`batch` with about `rate` of the tokens of its prompts changed; targets stay as they are.

    A third of them changes places with the next token, a third becomes another token of the
    window, a third is hidden: no other position sees it. Answers are left alone, and so are the ids
    `special`, the markers above all. Window i draws from keys[i], whichever process has it. Running
    text comes back as it was: it has no prompts.
    """
    if batch.mask is None:
        return batch
    tokens, mask = batch.tokens.copy(), batch.mask.copy()
    answered = np.zeros(tokens.shape, bool)
    answered[:, 1:] = batch.targets[:, :-1] != IGNORE
    changeable = ~answered & ~np.isin(tokens, special)
    for i, (row, key) in enumerate(zip(tokens, keys, strict=True)):
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


def adversarial(loss: Callable[[Tensor], Tensor], x: Tensor, size: float) -> Tensor:
    """The mean of two losses of embeddings x (B, T, C): as they are, and moved uphill.

    The gradient g of the loss by x tells in which direction it rises most; each window moves by
    `size` * g / |g|, a small step in that direction. Twice the time, and more.
    """
    x = x if x.requires_grad else x.detach().requires_grad_()  # frozen by lora.py
    plain = loss(x)
    (g,) = torch.autograd.grad(plain, x, retain_graph=True)
    g = g.float()  # its square may be nothing in float16
    uphill = size * g / g.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)  # (B, T, C)
    return (plain + loss(x + uphill.to(x.dtype))) / 2
