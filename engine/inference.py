"""A model made ready to generate: faster linear layers, eight-bit weights, recorded steps.

One token at a time, a model is a chain of matrix-vector products, and each reads all of its weights
from memory to use them once. GPT-2's smallest has 124M weights, 248 MB in bfloat16: read at 30 GB/s
they take 8 ms, and the 248 million multiplications and additions, at 400 GFLOP/s, less than one. So
what counts is how fast the weights are read, and how many bytes they have; and several texts at
once, or a prompt of many tokens, cost little more than one token, since all share one reading.
docs/speed.md has the figures.
"""

import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from canon import Canon
from engine import blas, fast, recording
from engine.linear import (
    Fastest,
    OneOrSeveral,
    PackedLinear,
    PlainLinear,
    StreamedLinear,
    packable,
)
from engine.machine import fast_bfloat16
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
        kind = partial(StreamedLinear, quantize=quantize)
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
    if on_cpu and rows == 1 and like.dtype == torch.bfloat16 and not fast_bfloat16():
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
    """Activations in float32, where to compute with bfloat16 costs more than to read it saves:
    embeddings, and the matrices of layers that were replaced, stay as they are."""
    own = [(m, p) for m in model.modules() for p in m.parameters(recurse=False)]
    own = [(m, p) for m, p in own if type(m) is not fast.FastEmbedding]
    wide = all(p.dim() == 1 or isinstance(m, Canon) for m, p in own)  # no other matrix is left
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
    last = None  # what the last text on a CPU had, for the next

    def new_cache(self, batch: int = 1, size: int = 0, whole: bool = False) -> KVCache:
        """As GPT's. For one text on a CPU it may have room for more, and the memory of an earlier
        cache that nobody has any more: who wants to keep its tensors keeps the cache, too."""
        like = self.wte.weight
        dtype, on_cpu = like.dtype, like.device.type == "cpu"
        if on_cpu and isinstance(self.blocks[0].attn, fast.FastAttention):
            dtype = torch.float32  # attention is several times faster, its memory traffic small
        ours = not on_cpu or all(type(block.attn) is JoinedAttention for block in self.blocks)
        kind = RecordedCache if ours and records(like.device, batch) else KVCache
        if kind is KVCache or not on_cpu or whole or batch > 1:
            return kind(self.config, batch, like.device, dtype, size, whole)
        last, size = vars(self).pop("last", None), size or self.config.block_size
        cache = last and last.again(size, dtype)
        if not cache:
            longer = min(self.config.block_size, -(-size // LONGER) * LONGER)
            cache = RecordedCache(self.config, 1, dtype=dtype, size=max(size, longer))
        self.last = Last(cache)
        return cache

    def forward(self, tokens: Tensor, *more, cache: KVCache | None = None, **options) -> Tensor:
        if isinstance(cache, RecordedCache) and tokens.size(1) == 1 and cache.ready():
            return cache.step(super().forward, tokens)
        return super().forward(tokens, *more, cache=cache, **options)


def records(device: torch.device, batch: int = 1) -> bool:
    """On a GPU, but for what a scatter does to be deterministic, which cannot be recorded. Several
    texts on a CPU have lengths of their own, and wait for products, not for Python."""
    if device.type == "cuda":
        return not torch.are_deterministic_algorithms_enabled()
    return device.type == "cpu" and batch == 1


LONGER = 256  # tokens: a cache has a multiple of them, so that a longer text finds room, too


class Last:
    """The memory of a text's cache and the step that was recorded there: for the next text, if
    nobody has that cache any more."""

    def __init__(self, cache: "RecordedCache"):
        self.cache, self.states = weakref.ref(cache), [vars(cache)]

    def __reduce__(self):
        return type(None), ()  # copies of a model have nothing

    def again(self, size: int, dtype: torch.dtype) -> "RecordedCache | None":
        """An empty cache of that memory, for `size` tokens; None if it does not fit."""
        state = self.states.pop() if self.states and self.cache() is None else None
        k = state and state["k"]
        if k is None or k.dtype != dtype or k.size(1) > 1 or k.size(3) < size:
            return None
        if k.is_inference() != torch.is_inference_mode_enabled():
            return None
        cache = RecordedCache.__new__(RecordedCache)
        vars(cache).update(state)
        cache.clear()
        return cache


def structure(model: GPT) -> list:
    """What somebody may have changed between two texts: settings, parts, hooks, methods, weights in
    another place. Of all else, functions and numbers in their place, the next token tells."""

    def mark(value):
        if isinstance(value, Tensor) and value.layout == torch.strided:
            return id(value), value.data_ptr(), value.shape
        if isinstance(value, dict):
            return [(key, mark(v)) for key, v in value.items() if not isinstance(v, Last)]
        return value if isinstance(value, (bool, int, float, str, nn.Module)) else id(value)

    parts = list(model.modules())
    kinds = {kind for part in parts for kind in type(part).__mro__ if kind is not object}
    found = [dict(vars(model.config)), *((kind, dict(vars(kind))) for kind in kinds)]
    return [*found, *map(dict, hooks(model)), *((type(part), mark(vars(part))) for part in parts)]


def hooks(model: GPT) -> list[dict]:
    """Of all modules, and of each, where a forward pass calls them."""
    everywhere = nn.modules.module
    found = [everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks]
    return found + [h for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]


WORTH_KERNELS = 512  # tokens of a process after which these pay: to find them takes 0.2 to 7 s
PATIENCE = 16  # tokens without, on a CPU: recording takes as long as it saves in some twenty


class RecordedCache(KVCache):
    """A KV cache whose next token can be recorded once and replayed: on a GPU as a CUDA graph,
    since to start hundreds of kernels one by one takes longer than to run them; on a CPU, for one
    text, as a list of operations (engine/recording.py).

    Shapes and addresses are fixed: attention spans the whole cache, unless it is one operation that
    knows better, and where each row stands is a tensor on the device, `place`. On a GPU a result is
    valid until the next call.
    """

    fixed = True
    recorded = None  # the buffers that the recording knows
    structure = None  # that of the model then, on a CPU
    inherited = False  # whether the recording is of another text, and was not compared yet
    running = False  # whether a step is computed, or recorded, at this moment
    waited = 0  # tokens since a recording became possible
    fit = True  # whether Python decides nothing in a step
    written = 0  # tokens on a GPU, by all caches of this process

    def ready(self) -> bool:
        """Whether the next token is worth, and can be, a recorded step."""
        if self.k.is_cuda:
            return True
        self.waited += 1
        few = records(self.k.device, len(self.lengths)) and torch.is_inference_mode_enabled()
        return few and self.fit and self.waited > PATIENCE

    def attends_one(self, mask: Tensor | None) -> bool:
        """Whether attention with that mask is one operation, that for one text on a CPU. Not if the
        mask is another than `begin` gave: it may hide more than what is not filled."""
        mine = self.running and mask is self.mask
        return mine and not mask.is_cuda and len(mask) == 1 and blas.keeps_to_one_thread()

    def begin(self, T: int) -> tuple[Tensor, Tensor | None]:
        if not self.running:
            return super().begin(T)
        self.end = self.k.size(3)
        self.at = self.place  # (B, 1)
        self.mask = (self.columns <= self.at[..., None])[:, None]  # (B, 1, 1, S)
        return self.at, self.mask

    def step(self, forward, tokens: Tensor) -> Tensor:
        """`forward` for one new token in each row of `tokens` (B, 1): logits (B, 1, V)."""
        longest, size = int(self.lengths.max()), self.k.size(3)
        if longest == size:
            raise ValueError(f"{longest + 1} positions do not fit in a KV cache of that size")
        how = torch.get_num_threads(), RecordedCache.written >= WORTH_KERNELS
        changed = self.inherited and self.structure != structure(forward.__self__)
        if self.recorded is not self.k or self.how != how or changed:  # or `take` had other rows
            self.how, self.inherited = how, False
            self.record(forward, tokens)
        self.tokens.copy_(tokens)
        self.place.copy_(self.lengths[:, None])
        if self.replay:
            self.replay()
        else:
            self.logits = self.run(forward)
        if self.inherited:
            self.inherited, true = False, self.run(forward)
            if (self.logits - true).norm() > 1e-3 * true.norm():  # more than rounding: was changed
                self.record(forward, tokens)
                self.logits = self.logits if self.replay else true
        self.lengths += 1
        RecordedCache.written += self.k.is_cuda
        return self.logits if self.k.is_cuda else self.logits.clone()

    def clear(self) -> None:
        """For another text. Attention may span what is not filled, and 0 times inf is nan."""
        for memory in (self.k, self.v, self.past):
            memory.zero_()
        self.lengths = torch.zeros(1, dtype=torch.long)
        self.inherited = self.recorded is self.k and self.fit
        if not self.inherited:  # that text was too short, or Python had a part in it
            self.recorded, self.fit = None, True

    def rows(self, begin: int, end: int) -> KVCache:
        part = super().rows(begin, end)
        part.source = self  # so that no other text gets this memory meanwhile
        return part

    def record(self, forward, tokens: Tensor) -> None:
        device = self.k.device
        self.recorded = self.replay = None  # if it is interrupted
        self.tokens = tokens.clone()
        self.place = self.lengths[:, None].to(device, copy=True)
        self.columns = torch.arange(self.k.size(3), device=device)
        hooked = any(hooks(forward.__self__))
        if device.type == "cpu" and hooked:  # which would not be called
            self.fit = False
        elif device.type == "cpu":
            self.structure = structure(forward.__self__)
            changing = [self.tokens, self.place, self.k, self.v, self.past]
            step, choice = partial(self.run, forward), forward.__self__.choice
            try:
                self.logits, self.replay = recording.record(step, changing, choice)
            except Exception:  # it cannot be recorded, or an operation is like no other
                self.fit = False
        if device.type != "cuda":
            self.recorded = self.k
            return
        with torch.cuda.device(device):
            if self.how[-1] and not hooked:
                forward = self.few_kernels(forward) or forward
            self.forward = forward  # holds the memory that the graph knows
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # libraries set themselves up, which must not be recorded
                    self.run(forward)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                self.logits = self.run(forward)
            self.recorded, self.replay = self.k, graph.replay

    def few_kernels(self, forward) -> Callable | None:
        """What computes a step in fewer kernels (engine/one_token.py), if it agrees with the book
        for this shape, and, roughly, with `forward` for this very token."""
        model = forward.__self__
        if not all(isinstance(block.attn, fast.FastAttention) for block in model.blocks):
            return None  # attention was changed
        try:
            from engine.one_token import OneToken, agrees

            step = OneToken(model, self)
            if agrees(model.config, self):
                true, found = self.run(forward), self.run(step)
                return step if (found - true).norm() <= 0.1 * true.norm() else None
        except Exception:  # no Triton, a model or a shape that has no such kernels, no memory
            return None

    def run(self, forward) -> Tensor:
        lengths, self.running = self.lengths.clone(), True
        try:
            return forward(self.tokens, cache=self)
        finally:
            self.lengths.copy_(lengths)
            self.running = False

    def take(self, rows: list[int]) -> None:
        """In place if there are as many: the graph knows the addresses."""
        if len(rows) != len(self.lengths):
            return super().take(rows)
        end = int(self.lengths.max())
        self.k[:, :, :, :end] = self.k[:, rows, :, :end]
        self.v[:, :, :, :end] = self.v[:, rows, :, :end]
        self.past[:, :, : self.reach + end] = self.past[:, rows, : self.reach + end]
        self.lengths = self.lengths[rows]
