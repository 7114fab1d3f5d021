"""LoRA: learning a few numbers beside weights that stay as they are (arXiv:2106.09685).

Fine-tuning changes all numbers of each matrix W (out, in), keeps a gradient and AdamW's two moments
beside each, four times the memory of the model, and every task has a checkpoint as large as it. But
what a task changes in W is nearly of low rank, it is found: a product of two thin matrices.
So W is frozen, and two such matrices beside it learn:

    h = W x + (alpha / r) B A x        A (r, in) reads r directions of x, B (out, r) writes r of h

For 768 x 768 and r = 8 that is r (in + out) = 12,288 numbers instead of 589,824, a 48th.

B begins at zero, so at first the model is the base, exactly, and nothing it knows is lost by adding
noise to it. A must not be zero, too: the gradient of B is made of A x, that of A of B, and where
both are zero nothing would ever move. B moves in the first step, A from the second.

alpha / r: AdamW moves each number by about its rate, whatever its gradient. Then B A x, a sum over
r terms, grows with r; divided by r it does not, and another rank needs no other rate.

Which matrices: the paper adapts queries and values, to show how little is enough. Later work finds
that all matrices with a smaller rank are the better use of as many numbers (arXiv:2305.14314).
Where the new text has other words than the base has read, its head has to change, too: all+head.

To merge is to add (alpha / r) B A to W, once: then the model is as it always was, and as fast.
"""

import math
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPT, Head

MATRICES = {
    "qv": ("wq", "wv"),
    "attention": ("wq", "wk", "wv", "wo"),
    "all": ("wq", "wk", "wv", "wo", "gate", "up", "down"),
    "all+head": ("wq", "wk", "wv", "wo", "gate", "up", "down", "head"),
}


class LoRALinear(nn.Linear):
    """A linear layer, which is frozen, and what is learned beside it."""

    def forward(self, x: Tensor) -> Tensor:
        # B (A x) and not (B A) x: r numbers in between, and no gradient as large as W is ever made
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.A), self.B)


class NewRows:
    """A table that is frozen but for its last rows: those of tokens that the base does not know,
    such as <|user|>. A change of low rank could not teach them: they begin as the mean of all
    tokens, and each has everything to learn."""

    @property
    def weight(self) -> Tensor:
        """(V, C), as embedding and head look it up; hides the parameter of this name."""
        table = self._parameters["weight"]
        return torch.cat((table[: len(table) - len(self.new)], self.new))


class EmbeddingWithNewRows(NewRows, nn.Embedding): ...


class HeadWithNewRows(NewRows, Head): ...


class LoRAHead(NewRows, Head):
    """The same, and B A beside it: made as a whole, since a head looks its weight up."""

    @property
    def weight(self) -> Tensor:
        return super().weight + self.scale * self.B @ self.A


PLAIN = {LoRALinear: nn.Linear, EmbeddingWithNewRows: nn.Embedding}
PLAIN |= {HeadWithNewRows: Head, LoRAHead: Head}


def add(model: GPT, rank: int, alpha: float, on: str, rows: int, seed: int) -> None:
    """Freezes `model`, and gives it what learns instead: A and B beside the matrices MATRICES[on]
    of every block, and the last `rows` rows of embedding and head.

    A is drawn uniformly, a function of `seed` alone. Modules get another class, as fast parts do,
    so all parameters keep their names. Raises ValueError for a rank that would save nothing.
    """
    most = min(model.config.n_embd, model.config.n_kv_head * model.config.head_dim)
    if rank >= most:
        raise ValueError(f"lora_rank={rank} should be below {most}, the width of the matrices")
    model.requires_grad_(False)
    g = torch.Generator().manual_seed(seed)
    for block in model.blocks:
        for name, layer in chain(block.attn.named_children(), block.mlp.named_children()):
            if name in MATRICES[on]:
                add_beside(layer, rank, alpha, g)
                layer.__class__ = LoRALinear
    head = LoRAHead if "head" in MATRICES[on] else HeadWithNewRows
    for table, kind in ((model.wte, EmbeddingWithNewRows), (model.head, head)):
        if table.weight is not None and (rows or kind is LoRAHead):  # a tied head has none
            table.new = nn.Parameter(table.weight[len(table.weight) - rows :].clone())
            if kind is LoRAHead:
                add_beside(table, rank, alpha, g)
            table.__class__ = kind
    model.lora = dict(rank=rank, alpha=alpha, on=on, rows=rows)


def add_beside(layer: nn.Module, rank: int, alpha: float, g: torch.Generator) -> None:
    """Gives a layer A and B, of the shape of its matrix W (out, in)."""
    rows, columns = layer.weight.shape
    bound = 1 / math.sqrt(columns)  # as torch draws any linear layer
    layer.A = nn.Parameter(torch.empty(rank, columns).uniform_(-bound, bound, generator=g))
    layer.B = nn.Parameter(torch.zeros(rows, rank))
    layer.scale = alpha / rank


def facts(model: GPT) -> dict | None:
    """What `add` was told, or None for a model that is not adapted."""
    return getattr(model, "lora", None)


def restore(model: GPT, facts: dict, adapter: dict[str, Tensor]) -> None:
    """Adds what an earlier `add` has added, as it had become."""
    add(model, facts["rank"], facts["alpha"], facts["on"], facts["rows"], seed=0)
    model.lora = facts
    there = learned(model)
    if adapter.keys() != there.keys():
        raise ValueError(f"it has not the names of rank {facts['rank']} on {facts['on']}")
    for name, values in adapter.items():
        there[name].copy_(values)


def learned(model: GPT) -> dict[str, Tensor]:
    """What an adapter file holds: all that is not frozen."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def frozen(model: GPT) -> dict[str, Tensor]:
    """The base, under the names that it had."""
    return {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}


@torch.no_grad()
def merge(model: GPT) -> None:
    """Adds what was learned to the base: an ordinary model, all of which can learn again."""
    for module in model.modules():
        kind = type(module)
        if kind is LoRALinear:
            module.weight += module.scale * module.B @ module.A
            del module.A, module.B
        elif kind in PLAIN:
            module._parameters["weight"].copy_(module.weight)
            del module.new
            if kind is LoRAHead:
                del module.A, module.B
        module.__class__ = PLAIN.get(kind, kind)
    model.requires_grad_(True)
    del model.lora


def describe(model: GPT) -> str:
    """How much learns, and what that saves beside the weights: a gradient and two moments each."""
    few, every = (sum(p.numel() for p in part.values()) for part in (learned(model), frozen(model)))
    megabytes = f"{12 * few / 1e6:,.1f} MB instead of {12 * every / 1e6:,.1f}"
    return f"LoRA: {few:,} weights learn beside {every:,} ({few / every:.2%}), in {megabytes}"
