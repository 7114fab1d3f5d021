"""Canon layers: each position takes, in every channel, a learned share of the few before it.

    y[t] = x[t] + w1 x[t-1] + w2 x[t-2] + w3 x[t-3]        a voice that follows: a canon

To find what stood behind a word when it comes again, a position has to know which words are before
it. Attention learns that, too, one layer looking back so that the next can find it, but neither
pays without the other: for long nothing is learned, then all at once (arXiv:2209.11895). Given this
short convolution, it is learned soon: docs/tasks.md. Source: arXiv:2512.17351.

With --canon=4 a block has one before attention and one before the MLP. GPT-2 and Llama have none.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cache import KVCache
from model import Block
from shape import GPTConfig


class CanonBlock(Block):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__(config, layer)
        self.attn_canon = Canon(config, 2 * layer)
        self.mlp_canon = Canon(config, 2 * layer + 1)

    def forward(self, x, rope, mask, cache) -> Tensor:
        y = self.attn_canon(self.attn_norm(x), mask, cache)
        x = x + self.drop(self.attn(y, rope, mask, cache))
        y = self.mlp_canon(self.mlp_norm(x), mask, cache)
        x = x + self.drop(self.mlp(y))
        return x


class Canon(nn.Module):
    def __init__(self, config: GPTConfig, site: int):
        super().__init__()
        self.site = site  # its place in a KV cache
        self.weight = nn.Parameter(torch.zeros(config.canon - 1, config.n_embd))
        self.std = 0.3  # shares that begin at 0 are learned much later: docs/tasks.md

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        """x (B, T, C) to (B, T, C). Nothing is taken from a position at which the `mask` of
        `Attention` does not let it look, such as one of another text in the same row; and where a
        mask lets it look ahead, too (prefix, full), still only from what stands before."""
        T, reach = x.size(1), len(self.weight)
        # (B, reach + T, C): zeros stand before a text
        past = F.pad(x, (0, 0, reach, 0)) if cache is None else cache.behind(self.site, x)
        y = x
        for i, share in enumerate(self.weight.to(x.dtype), start=1):
            before = past[:, reach - i : reach - i + T]  # (B, T, C), of i places before
            if mask is not None and cache is None:  # a cache has each text in a row of its own
                sees = mask.reshape(-1, T, T).diagonal(-i, 1, 2)  # (B, T - i)
                sees = F.pad(sees, (min(i, T), 0))  # (B, T): nothing is before the first i
                before = before * sees[..., None]
            y = y + share * before
        return y
