"""A trained model in a larger shape, computing the same: to measure speed on text that has sense.

How fast a shape decodes does not depend on its weights, but what it writes does, and so does how
often a guess is right. Channels that hold 0, layers that add nothing and ids that are never picked
make a small model that has learned something as slow as a large one (after Net2Net,
arXiv:1511.05641).
"""

import math
from dataclasses import replace

import torch

from model import GPT

MODERN = dict(position="rotary", norm="rms", norm_weight=False, mlp="relu2", bias=False)
MODERN |= dict(embed_norm=True, qk_norm=True, tied=False, canon=0)


@torch.no_grad()
def wider(model: GPT, n_layer: int, n_embd: int, vocab_size: int) -> GPT:
    """`model` with so many layers, channels and ids; raises ValueError for all but train.py's
    default shape."""
    c, C = model.config, model.config.n_embd
    heads, inner = n_embd // c.head_dim, c.n_head * c.head_dim
    if any(getattr(c, name) != value for name, value in MODERN.items()) or c.n_kv_head != c.n_head:
        raise ValueError("only a run of the default shape can be made wider")
    if n_layer < c.n_layer or n_embd < C or n_embd % c.head_dim or vocab_size < c.vocab_size:
        raise ValueError(f"a run of {c.n_layer} layers and width {C} does not fit that shape")
    shape = dict(n_layer=n_layer, n_embd=n_embd, vocab_size=vocab_size, mlp_dim=4 * n_embd)
    large = GPT(replace(c, **shape, n_head=heads, n_kv_head=heads)).eval()
    for p in large.parameters():  # whatever; what it may not reach is set to 0 below
        p.normal_(0, 0.02)

    # a norm divides by the size of all channels, of which C are not 0: what it finds is larger by
    # 1 / s. So is the residual stream, and all that is added to it; products of it take that back
    s = math.sqrt(C / n_embd)
    large.wte.weight.zero_()[: c.vocab_size, :C] = model.wte.weight
    large.head.weight.zero_()[: c.vocab_size, :C] = s * model.head.weight
    for i, block in enumerate(large.blocks):
        block.attn.wo.weight.zero_()
        block.mlp.down.weight.zero_()
        if i < c.n_layer:
            small = model.blocks[i]
            for name in ("wq", "wk", "wv"):
                layer, wide = getattr(small.attn, name), getattr(block.attn, name)
                wide.weight[:inner, :C] = s * layer.weight
                if c.qkv_bias:  # added behind the product, which has its old size again
                    wide.bias[:inner] = layer.bias
            block.attn.wo.weight[:C, :inner] = small.attn.wo.weight / s
            block.mlp.up.weight[: c.mlp_dim, :C] = s * small.mlp.up.weight
            block.mlp.down.weight[:C, : c.mlp_dim] = small.mlp.down.weight / s
    return large
