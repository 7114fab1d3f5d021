"""A model made ready to generate: faster linear layers, eight-bit weights, recorded steps.

One token at a time, a model is a chain of matrix-vector products, and each reads all of its weights
from memory to use them once. GPT-2's smallest has 124M weights, 248 MB in bfloat16: read at 30 GB/s
they take 8 ms, and the 248 million multiplications and additions, at 400 GFLOP/s, less than one. So
what counts is how fast the weights are read, and how many bytes they have; and several texts at
once, or a prompt of many tokens, cost little more than one token, since all share one reading.
docs/speed.md has the figures.
"""

import math

import torch
from torch import Tensor, nn

from canon import Canon
from engine import fast, replay
from engine.linear import (
    EightBitLinear,
    Fastest,
    OneOrSeveral,
    PackedLinear,
    PlainLinear,
    StreamedLinear,
    packable,
)
from engine.machine import fast_bfloat16
from engine.replay import LONGER, Last, RecordedCache
from engine.threads import AllOrOne
from model import GPT, Head, KVCache


@torch.no_grad()
def ready(
    model: GPT, quantize: str = "", rows: int = 1, parts: bool = True, several: bool = False
) -> GPT:
    """Makes `model`, in place, one that generates `rows` texts at once, faster; with `several`, one
    text of which often several tokens are read in a pass.

    With `quantize="int8"` its linear layers get weights of eight bits. It can then generate and be
    evaluated, but neither learn nor be saved nor moved. `parts=False` leaves the book's own form
    of everything but eight bits. int8 raises ValueError on other devices than a CPU.
    """
    like = model.wte.weight
    on_cpu = like.device.type == "cpu"
    if quantize and not on_cpu:
        raise ValueError(f"quantize={quantize!r} works with device=cpu only")
    if parts:
        names = fast.agreeing(model.config, like.device, like.dtype, training=False)
        fast.install(model, names)
        model.__class__ = FastGPT
    if quantize:
        kind = EightBitLinear
        model.all_more = math.inf  # see speculate.py: each position costs the same
    elif on_cpu and rows == 1 and parts:
        kind = (OneOrSeveral if several else Fastest)(like.dtype, matrices(model))
    elif on_cpu and rows > 1 and packable(like.dtype):
        kind = PackedLinear
    else:
        kind = PlainLinear
    if quantize or parts:
        for module in list(model.modules()):
            replace_linears(module, kind, model.wte.weight)
        model.form = getattr(kind, "chosen", "")
        model.choice = AllOrOne()
    narrow = bool(quantize) or not fast_bfloat16() or getattr(kind, "for_loops", False)
    if on_cpu and rows == 1 and like.dtype == torch.bfloat16 and narrow:
        widen(model)
    return model


def matrices(model: GPT) -> list[Tensor]:
    """Weights that a token is multiplied with: those of a block, and of the head."""
    block, head = list(model.blocks[0].modules()), model.head
    ours = [m for m in block if type(m) is fast.FastAttention]
    found = [fast.joined(m)[0] for m in ours]
    taken = {layer for m in ours for layer in (m.wq, m.wk, m.wv)}
    found += [layer.weight for layer in block if type(layer) is nn.Linear and layer not in taken]
    if type(head) is fast.FastHead:
        found.append(model.wte.weight if head.weight is None else head.weight)
    return found


def widen(model: GPT) -> None:
    """Activations in float32, where to compute with bfloat16 costs more than to read it saves, or
    where layers compute in float32: embeddings, and the matrices of layers that were replaced, stay
    as they are."""
    own = [(m, p) for m in model.modules() for p in m.parameters(recurse=False)]
    own = [(m, p) for m, p in own if type(m) is not fast.FastEmbedding]
    wide = all(p.dim() == 1 or isinstance(m, Canon) for m, p in own)  # no other matrix is left
    wide &= type(model.head) is ReadyHead  # the book's may read the embedding
    if not wide or not isinstance(model.blocks[0].attn, fast.FastAttention):
        return
    for _, p in own:
        p.data = p.data.float()
    for module in model.modules():
        if type(module) is fast.FastEmbedding:
            module.__class__ = WideEmbedding
        elif isinstance(module, StreamedLinear) and module.bias is not None:
            module.bias = module.bias.float()


class WideEmbedding(fast.FastEmbedding):
    """Vectors in float32, of a table that is not."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).float()


def replace_linears(module: nn.Module, kind, table: Tensor) -> None:
    """Gives one module of a model linear layers of another kind."""
    if type(module) is fast.FastAttention:
        module.wqkv = kind(*fast.joined(module))
        del module.wq, module.wk, module.wv
        module.__class__ = JoinedAttention
    elif type(module) is fast.FastHead:
        weight = table if module.weight is None else module.weight
        module.weight = None
        module.layer = kind(weight, None)
        module.__class__ = ReadyHead
    for name, layer in module.named_children():
        if type(layer) is nn.Linear:  # not somebody's own
            setattr(module, name, kind(layer.weight, layer.bias))
        elif type(layer) is nn.Dropout:  # which copies its input where it does nothing
            setattr(module, name, nn.Identity())


class JoinedAttention(fast.FastAttention):
    """Attention with one layer for queries, keys and values."""

    def project(self, x: Tensor) -> Tensor:
        return self.wqkv(x)

    def attend(self, q, k, v, mask, cache) -> Tensor:
        if not (isinstance(cache, RecordedCache) and cache.attends_one(mask)):
            return super().attend(q, k, v, mask, cache)
        keys, values = cache.k[self.layer], cache.v[self.layer]
        q, k, v = (z.to(keys.dtype) for z in (q, k, v))
        return torch.ops.nutshell.attend_one(q, k, v, cache.place, keys, values)[0]


class ReadyHead(fast.FastHead):
    """A head with a layer of another kind."""

    def product(self, x: Tensor, table: Tensor) -> Tensor:
        return self.layer(x).float()

    def cross_entropy(self, x, targets, table, reduction, smoothing) -> Tensor:
        """With the weights as they are read: of eight bits, if they have those."""
        weight = getattr(self.layer, "weight", None)
        if weight is None:  # packed, say: by the logits
            return Head.cross_entropy(self, x, targets, table, reduction, smoothing)
        return super().cross_entropy(x, targets, weight, reduction, smoothing)


class FastGPT(GPT):
    """A GPT that chooses the type of its KV cache, and records a step and replays it."""

    form = ""  # the name of that of its large layers, where some were tried
    choice = None  # what recorded steps know of threads
    last = None  # what the last text had, for the next
    loops = None  # what engine/one_token_cpu.py has found about it

    def new_cache(self, batch: int = 1, size: int = 0, whole: bool = False) -> KVCache:
        """As GPT's. For one text it may have room for more, and the memory of an earlier cache
        that nobody has any more: who wants to keep its tensors keeps the cache, too."""
        like = self.wte.weight
        dtype, on_cpu = like.dtype, like.device.type == "cpu"
        if on_cpu and isinstance(self.blocks[0].attn, fast.FastAttention):
            dtype = torch.float32  # attention is several times faster, its memory traffic small
        ours = not on_cpu or all(type(block.attn) is JoinedAttention for block in self.blocks)
        kind = RecordedCache if ours and replay.records(like.device, batch) else KVCache
        last = vars(self).pop("last", None)
        if kind is KVCache or whole or batch > 1:
            return kind(self.config, batch, like.device, dtype, size, whole)
        size = size or self.config.block_size
        cache = last and last.again(size, like, dtype)
        if not cache:
            longer = min(self.config.block_size, -(-size // LONGER) * LONGER)
            cache = RecordedCache(self.config, 1, like.device, dtype, max(size, longer))
        self.last = Last(cache)
        return cache

    def forward(self, tokens: Tensor, *more, cache: KVCache | None = None, **options) -> Tensor:
        plain = isinstance(cache, RecordedCache) and not more and not options
        if plain and cache.ready(tokens.size(1)):
            return cache.step(super().forward, tokens)
        return super().forward(tokens, *more, cache=cache, **options)
