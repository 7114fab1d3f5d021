"""Few rows: what keeps a model from learning them by heart, and makes it bear small changes.

`augment` changes prompts a little, differently each time: tokens hidden, exchanged, replaced (Wei
and Zou 2019, arXiv:1901.11196). `Adversarial` looks for the small change that hurts most, and asks
to be right there, too (Miyato et al. 2017, arXiv:1605.07725). Both are off unless asked for; what
they brought, and where they did not, is in docs/tasks.md.
"""

import numpy as np
import torch
from torch import Tensor, nn

from dataset import IGNORE, Batch
from tokenizer import Markers


def augment(batch: Batch, markers: Markers, rate: float, seed: int, first: int) -> Batch:
    """`batch` with about `rate` of the tokens of its prompts changed; targets stay as they are.

    A third of them changes places with the next token, a third becomes another token of the
    window, a third is hidden: no other position sees it. Markers and answers are left alone. Window
    i of a global batch, which has the number `first` + i, draws from (seed, number): the same on
    every rank. Running text has no prompts, and comes back as it was.
    """
    if batch.mask is None:
        return batch
    tokens, mask = batch.tokens.copy(), batch.mask.copy()
    answered = np.zeros(tokens.shape, bool)
    answered[:, 1:] = batch.targets[:, :-1] != IGNORE
    changeable = ~answered & ~np.isin(tokens, markers) & (tokens < min(markers))
    for i, row in enumerate(tokens):
        rng = np.random.default_rng((seed, first + i))
        chosen = np.flatnonzero(changeable[i] & (rng.random(len(row)) < rate))
        swapped, replaced, hidden = np.array_split(rng.permutation(chosen), 3)
        for at in swapped:
            if at + 1 < len(row) and changeable[i, at + 1]:
                row[[at, at + 1]] = row[[at + 1, at]]
        row[replaced] = rng.choice(row[changeable[i]], len(replaced)) if len(replaced) else 0
        mask[i, :, :, hidden] = False
        mask[i, :, hidden, hidden] = True  # a position that sees nothing has no softmax
    return batch._replace(tokens=tokens, mask=mask)


class Adversarial(nn.Module):
    """A model whose loss is the mean of two: as it is, and with embeddings moved uphill.

    The gradient g of the loss by the embeddings (B, T, C) tells in which direction it rises most;
    each window moves by `size` * g / |g|, a small step in that direction. Twice the time, and more.
    """

    def __init__(self, model: nn.Module, size: float):
        super().__init__()
        self.model, self.size = model, size

    def forward(self, *arguments, **options) -> Tensor:
        embedded: list[Tensor] = []
        with self.model.wte.register_forward_hook(lambda module, ids, x: embedded.append(x)):
            plain = self.model(*arguments, **options)
        (g,) = torch.autograd.grad(plain, embedded, retain_graph=True)
        uphill = self.size * g / g.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)  # (B, T, C)
        with self.model.wte.register_forward_hook(lambda module, ids, x: x + uphill):
            moved = self.model(*arguments, **options)
        return (plain + moved) / 2
