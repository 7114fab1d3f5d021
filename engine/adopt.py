"""Weights of one run for another: fine-tuning, also with tokens that those weights do not know."""

from dataclasses import asdict

import torch
from torch import nn

import objectives
from dataset import Dataset
from engine.checkpoint import find, load_heads, load_weights, read_state
from model import GPT
from shape import GPTConfig


def adopt(path: str, shape: GPTConfig, data: Dataset, say) -> tuple[GPT, int]:
    """The model of another run or checkpoint, with the context, dropout and mask of `shape`; and
    how many rows were added for tokens of `data` that its own vocabulary lacks.

    Raises ValueError unless it reads the tokens of `data`, or all but those that came last.
    """
    model, theirs, _ = load_weights(find(path))
    ours = data.tokenizer
    data.require_tokenizer(theirs, path, grows=True)
    free = ("vocab_size", "block_size", "dropout", "mask", "zero_init")
    found = asdict(model.config)
    other = [f"{k}={v}" for k, v in found.items() if v != getattr(shape, k) and k not in free]
    if other:
        say(f"the shape is that of {path}, not of the settings: {', '.join(other)}")
    set_context(model, shape.block_size, shape.dropout)
    model.config.mask = shape.mask
    added = ours.vocab_size - theirs.vocab_size
    if added:
        grow(model, added)
        names = ", ".join(text for text, i in ours.special.items() if i >= theirs.vocab_size)
        rows = f"{added} row{'s' if added > 1 else ''}"
        say(f"{rows} added for {names}: each begins as the mean of all tokens")
    return model, added


def adopt_heads(path: str, learner, say) -> None:
    """Gives a new learner the heads of a checkpoint that has learned by the same objective, unless
    they belong to what that run keeps, such as its labels."""
    found = find(path)
    state, _ = read_state(found)
    learned = objectives.name_of(state)
    if learned == learner.objective.s.objective and not state.get("kept"):
        load_heads(found, learner)
    elif (found / "heads.safetensors").exists():
        say(f"the heads of {path}, which has learned by objective={learned}, are left behind")


def set_context(model: GPT, block_size: int, dropout: float) -> None:
    """Sets the longest context and the dropout rate, keeping the weights.

    Raises ValueError for more positions than were learned. Rotary ones go on without end, but to
    angles and distances that training has not seen: there predictions get worse, until the model
    has learned from windows of that length (or see rope_factor).
    """
    c = model.config
    if c.position == "learned":
        if block_size > c.block_size:
            raise ValueError(
                f"block_size={block_size} exceeds the {c.block_size} positions that the model has"
                f" learned: use --block_size={c.block_size} or less"
            )
        model.wpe.weight = nn.Parameter(model.wpe.weight[:block_size].clone())
    c.block_size = block_size
    c.dropout = dropout
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout


def grow(model: GPT, rows: int) -> None:
    """Adds rows to embedding and head (once, if they are one), each the mean of those there are.

    Then a new token is an average one, and takes the probability of an average one. A random row
    could have a logit above all others: a model that is sure of nothing but a token it never saw
    (nlp.stanford.edu/~johnhew/vocab-expansion.html).
    """
    for table in (model.wte, model.head):
        if table.weight is not None:
            old = table.weight.detach()
            mean = old.mean(dim=0, keepdim=True).expand(rows, -1)
            table.weight = nn.Parameter(torch.cat((old, mean)))
    model.wte.num_embeddings += rows
    model.config.vocab_size += rows
