"""Memory for time: what a pass has to remember, and how many windows at once fit."""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from model import Block


def checkpoint_blocks(learner: nn.Module) -> None:
    """Lets each block remember its input alone, and compute the rest once more in the backward
    pass: a third more time, for memory that grows with depth by (B, T, C) a block instead of by all
    that it computes (arXiv:1604.06174). The same bits: dropout falls as it did."""
    for block in learner.modules():
        if isinstance(block, Block):
            block.forward = partial(remember_little, block.forward)


def remember_little(forward, x, rope, mask, cache):
    if cache is not None or not torch.is_grad_enabled():
        return forward(x, rope, mask, cache)
    return checkpoint(forward, x, rope, mask, cache, use_reentrant=False)
