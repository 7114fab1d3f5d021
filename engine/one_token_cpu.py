"""The pass of one token, or of a few, through a model on a CPU, in one call, compiled by numba.

What a token costs beside the reading of its weights are hundreds of small operations: each is
called by Python, on one core, while the threads of the next product fall asleep. In engine/loops.py
they stand in the loops that read the matrices, or between two of them with nothing to call; so the
threads of one loop are still awake when the next begins. Weights of float32 and bfloat16 are read
as the model has them, those of eight bits from a copy, which does not see what is changed in them
later. docs/speed.md has the figures.

numba compiles those functions when they are called first, some seconds for each of the three kinds
of weights, and keeps what it made beside their file, or in a folder of the user's.
"""

import math
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from threading import Lock, Timer
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from numba import get_num_threads, set_num_threads
from numba.core.config import NUMBA_NUM_THREADS
from torch import Tensor, nn

from cache import KVCache
from engine import loops
from engine.blas import NumpyLinear
from engine.linear import EightBitLinear, HalfLinear, OneOrSeveralLinear, PlainLinear
from engine.loops import f32
from engine.replay import SEVERAL, Aside, RecordedCache
from engine.threads import AllOrOne
from model import GPT, Norm, gelu, relu2, rotary

ACTIVATIONS = {gelu: loops.GELU, relu2: loops.RELU2, F.silu: loops.SILU}
LOCK = Lock()  # numba's own threads, which it uses where there is no OpenMP, serve one at a time
OURS = {"model", "engine.fast", "engine.inference", "engine.linear", "engine.blas"}  # modules
PLACES = 1024  # of a cache in which a model and its compiled pass are compared, at most
ROUNDING = 5e-5  # how far they may be apart, as a share: 2e-6 was found, GELU by erf is 1e-4 off
OF_EIGHT_BITS = 1e-3  # the same where activations are rounded to sixteen bits: 9e-5 was found
KINDS, TYPES = (NumpyLinear, PlainLinear, HalfLinear), (torch.float32, torch.bfloat16)
TRIES = 3  # of each, to find which is faster


class Weights:
    """What the compiled pass reads of a model. Raises ValueError for one of another kind."""

    def __init__(self, model: GPT):
        c, files = model.config, {type(m).__module__ for m in model.modules()}
        ours = all(name in OURS or name.startswith("torch.nn.") for name in files)
        if not ours or any("forward" in vars(m) for m in model.modules()):
            raise ValueError(f"a model with parts of {files}, or one that was changed")
        self.config = c
        no_positions = model.wte.weight[:0]
        positions = array(no_positions)
        if c.position == "learned":
            positions = table_of(model.wpe, c.block_size, c.n_embd)
        norm = norm_of(model.embed_norm, c.n_embd) if c.embed_norm else no_norm(c.n_embd)
        self.embedding = table_of(model.wte, c.vocab_size, c.n_embd), positions, norm
        self.threads = min(torch.get_num_threads(), NUMBA_NUM_THREADS)
        streams = Streams(model, self.threads)
        blocks = [of_block(block, c, streams) for block in model.blocks]
        top = layer_of(model.head.layer, c.vocab_size, c.n_embd, streams)
        self.head = norm_of(model.norm, c.n_embd), top, f32(c.logit_cap)
        layers = [top, *(layer for block in blocks for layer in matrices(*block))]
        kinds = {layer[0].dtype for layer in layers}
        if len(kinds) > 1:
            raise ValueError(f"layers of {kinds}")
        self.blocks = loops.list_of(blocks[0])
        for block in blocks[1:]:
            loops.append(self.blocks, block)
        eight_bits = np.dtype(np.int8) in kinds
        # tokens at once for which nothing else is faster: see docs/speed.md
        self.several = SEVERAL if eight_bits else 6
        self.rounding = OF_EIGHT_BITS if eight_bits else ROUNDING

    def near(self, found: Tensor, true: Tensor) -> bool:
        """But for rounding the same. Zeros, which hide everything, are not."""
        return bool((found - true).norm() < self.rounding * true.norm())


class OneToken:
    """Computes `logits` (1, 1, V) of what a cache of one text, `tokens` (1, 1) and `place` (1, 1)
    hold when it is called, as `GPT.forward` does, but that it does not count the token; or those
    of several that follow each other. Raises ValueError for a cache of another kind."""

    def __init__(self, weights: Weights, cache: KVCache, tokens: Tensor, place: Tensor):
        c, size = weights.config, cache.k.size(3)
        if cache.k.size(1) != 1 or cache.k.dtype != torch.float32:
            raise ValueError(f"a cache of {cache.k.dtype}, or for several texts")
        if c.position == "learned" and size > c.block_size:
            raise ValueError(f"a cache for {size} tokens, of which {c.block_size} have a position")
        self.weights, self.tokens, self.place = weights, tokens, place
        self.choices, self.several = defaultdict(AllOrOne), weights.several
        self.memory = cache.k[:, 0].numpy(), cache.v[:, 0].numpy()  # (L, K, S, D) both
        self.angles = (np.zeros((size, 0), f32),) * 2
        if c.position == "rotary":
            self.angles = tuple(z.numpy() for z in rotary(torch.arange(size), c))
        joined = (c.n_head + 2 * c.n_kv_head) * c.head_dim
        inputs = c.n_embd, c.n_embd, joined, c.n_head * c.head_dim, c.mlp_dim
        # what a pass has for each token, the scores of attention, and room for a product
        widths = *inputs, max(c.vocab_size, *inputs)
        *self.rows, sums = (np.zeros((SEVERAL, width), f32) for width in widths)
        self.scores = np.zeros((c.n_head, size), f32)
        self.room = np.zeros(SEVERAL * max(inputs), np.int16), np.zeros(SEVERAL, f32), sums
        self.logits = torch.empty(1, 1, c.vocab_size)

    def __call__(self) -> None:
        self.logits.copy_(self.logits_of(self.tokens, int(self.place)))

    def logits_of(self, tokens: Tensor, place: int) -> Tensor:
        """Of `tokens` (1, T) from `place` on, T up to SEVERAL: (1, T, V), in their own memory."""
        # as what numba has compiled; another type or layout it would compile anew
        ids, w = np.ascontiguousarray(tokens[0].numpy(), np.int64), self.weights
        logits = np.empty((*tokens.shape, w.config.vocab_size), f32)
        for token in ids:
            if not 0 <= token < w.config.vocab_size:
                raise IndexError(f"{token} is no token")
        buffers = *(z[: len(ids)] for z in self.rows), self.scores, self.room
        model, text = (w.embedding, w.blocks, w.head), (self.angles, self.memory)
        choice = self.choices[len(ids)]  # how long it takes depends on their number
        together, before = choice.together(), get_num_threads()
        threads = w.threads if together else 1
        with LOCK:
            start = perf_counter()
            if threads != before:  # each call costs 0.02 ms, its code no longer in the caches
                set_num_threads(threads)
            try:
                loops.whole_pass(ids, place, *model, *text, buffers, logits[0])
            finally:
                if threads != before:
                    set_num_threads(before)
            choice.took(together, perf_counter() - start)
        return torch.from_numpy(logits)


class Known(Aside):
    """Of a model: its structure and threads then, and its weights, if they serve it better than
    what is recorded."""

    def __init__(self, state: tuple, weights: Weights | None):
        self.state, self.weights = state, weights


def step_of(model: GPT, forward: Callable, cache: RecordedCache) -> OneToken | None:
    """The pass of one token of `model` for what a cache knows, if it computes what `forward` does,
    and in less time than what is recorded: both are tried once for a model as it is, and for each
    cache whether its token is given the logits that were recorded."""
    known, state = model.loops, (cache.structure, cache.how[0])
    if known is None or known.state != state:
        known = model.loops = Known(state, usable(model, forward, cache))
    if not known.weights:
        return None
    step = OneToken(known.weights, cache, cache.tokens, cache.place)
    step()
    return step if known.weights.near(step.logits, cache.logits) else None


def usable(model: GPT, forward: Callable, cache: RecordedCache) -> Weights | None:
    """What loops read of a model, if they agree with it and are faster."""
    try:
        weights = Weights(model)
    except (ValueError, KeyError, AttributeError):  # a model of another kind
        return None
    step = OneToken(weights, cache, cache.tokens, cache.place)
    good = agrees(weights, model, forward, cache.k.size(3)) and faster(step, cache.replay)
    return weights if good else None


def agrees(weights: Weights, model: GPT, forward: Callable, size: int) -> bool:
    """Whether both compute the same of three tokens at an early place of a cache for `size` tokens,
    and of one at the last. When it is called first, numba compiles."""
    cache = KVCache(model.config, 1, size=min(size, PLACES))
    g, size = torch.Generator().manual_seed(0), cache.k.size(3)
    for z in (cache.k, cache.v):
        z.normal_(generator=g)
    for place in (min(2, size - 1), size - 1):
        cache.lengths.fill_(place)
        T = min(3, size - place)
        tokens = torch.randint(model.config.vocab_size, (1, T), generator=g)
        true = forward(tokens, cache=cache)
        step = OneToken(weights, cache, tokens, torch.tensor([[place]]))
        with said("numba compiles for this processor, once"):
            found = step.logits_of(tokens, place)
        if not weights.near(found, true):
            return False
    return True


@contextmanager
def said(what: str):
    """To stderr, if it takes more than two seconds."""
    timer = Timer(2.0, lambda: print(f"\n{what}", file=sys.stderr))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def faster(one: Callable, other: Callable) -> bool:
    """Whether `one` takes less time than `other`, both in turn."""
    times: dict[Callable, list[float]] = {one: [], other: []}
    for _ in range(TRIES):
        for function in times:
            start = perf_counter()
            function()
            times[function].append(perf_counter() - start)
    return min(times[one]) < min(times[other])


# --- what a model holds, as those functions want it


class Streams:
    """How the rows of each matrix are dealt out, to `parts`, one for each thread that a step has,
    and there to streams that are read side by side: see `loops.product`.

    Matrices of eight bits are copied, in the order in which a pass reads them, one behind the other
    into the same streams: so what a processor reads ahead at the end of one is the beginning of the
    next. Their memory is one array, since for a large one numpy asks for huge pages. The others
    stay where the model has them.
    """

    def __init__(self, model: GPT, parts: int):
        layers = [m for m in model.modules() if type(m) is EightBitLinear]
        self.shape, self.used, self.dealt = (parts * loops.GROUPS, loops.STREAMS), 0, {}
        length = sum(m.outputs // math.prod(self.shape) * m.inputs for m in layers)
        self.memory = np.empty((*self.shape, length), np.int8)

    def deal(self, layer: nn.Module, weight: Tensor) -> tuple[np.ndarray, int, np.ndarray]:
        """Of a layer's weight (O, I): streams (groups, STREAMS, L), where its rows begin in each,
        and those (R, I) that are too few for one more in each."""
        if layer in self.dealt:  # it stands in several places
            return self.dealt[layer]
        count = math.prod(self.shape)
        each = len(weight) // count  # rows
        rows, rest = weight[: each * count], weight[each * count :]
        rows = rows.reshape(*self.shape, each * weight.size(1))
        if weight.dtype == torch.int8:
            begin, self.used = self.used, self.used + rows.size(2)
            self.memory[:, :, begin : self.used] = rows
            found = self.memory, begin, array(rest.clone())  # a view would keep all of the weight
        else:
            found = array(rows), 0, array(rest)
        self.dealt[layer] = found
        return found


def of_block(block: nn.Module, c, streams: Streams) -> tuple[tuple, tuple]:
    attn, mlp, C, D, wide = block.attn, block.mlp, c.n_embd, c.head_dim, c.mlp_dim
    norms = [norm_of(norm, D) for norm in (attn.q_norm, attn.k_norm) if c.qk_norm]
    norms = norms or [no_norm(D)] * 2
    # in the order in which loops read them
    wqkv = layer_of(attn.wqkv, (c.n_head + 2 * c.n_kv_head) * D, C, streams)
    wo = layer_of(attn.wo, C, c.n_head * D, streams)
    gate = None if mlp.gate is None else layer_of(mlp.gate, wide, C, streams)
    up = layer_of(mlp.up, wide, C, streams)
    down = layer_of(mlp.down, C, wide, streams)
    return (
        (norm_of(block.attn_norm, C), wqkv, *norms, wo),
        (norm_of(block.mlp_norm, C), gate or up, up, down, bend_of(mlp.activation)),
    )


def matrices(attention: tuple, mlp: tuple) -> list[tuple]:
    """The layers of a block."""
    return [attention[1], attention[4], *mlp[1:4]]


def array(t: Tensor) -> np.ndarray:
    t = t.detach()
    return (t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).numpy()


def vector(t: Tensor | None, length: int, missing: float) -> np.ndarray:
    """As float32; `missing` numbers where there is none. ValueError if it has another length."""
    found = np.full(length, missing, f32) if t is None else array(t.float())
    if found.shape != (length,):
        raise ValueError(f"{found.shape} numbers should be {length}")
    return found


def layer_of(layer: nn.Module, outputs: int, inputs: int, streams: Streams) -> tuple:
    """What `loops.product` reads: streams, where the weight begins in them, its rest, bias, and a
    scale for each row. ValueError if nobody can read the weight, or it has another shape."""
    if type(layer) is OneOrSeveralLinear:
        layer = layer.one
    scales = None
    if type(layer) is EightBitLinear:
        weight, scales = layer.whole_numbers(), layer.scales
    elif type(layer) in KINDS and layer.matrix is not None and layer.matrix.dtype in TYPES:
        weight = layer.matrix.contiguous()
    else:
        raise ValueError(f"the weights of {type(layer)} have a layout of somebody else's")
    if weight.shape != (outputs, inputs):
        raise ValueError(f"a matrix of {weight.shape} should be one of {outputs} x {inputs}")
    bias, scales = vector(layer.bias, outputs, 0.0), vector(scales, outputs, 1.0)
    return *streams.deal(layer, weight), bias, scales


def table_of(embedding: nn.Module, rows: int, width: int) -> np.ndarray:
    """ValueError if it is of another type or size: loops ask for no bounds."""
    weight = embedding.weight
    if weight.dtype not in TYPES or weight.shape != (rows, width):
        raise ValueError(f"an embedding of {weight.dtype}, {weight.shape}")
    return array(weight.contiguous())


def bend_of(activation: Callable) -> np.int64:
    """Its number. ValueError if its name is known but what it computes is not: with eight bits the
    logits would not tell."""
    kind, x = ACTIVATIONS[activation], torch.linspace(-4, 4, 65)
    known = {loops.GELU: F.gelu(x, approximate="tanh"), loops.RELU2: F.relu(x) ** 2}
    if not torch.allclose(activation(x), known.get(kind, F.silu(x)), atol=1e-6):
        raise ValueError("an activation that was edited")
    return kind


def no_norm(width: int) -> tuple:
    return loops.NONE, np.ones(width, f32), np.zeros(width, f32), f32(0)


def norm_of(norm: nn.Module, width: int) -> tuple:
    """As `loops.normed` wants it."""
    if not isinstance(norm, Norm):
        raise ValueError(f"{type(norm)} is no norm")
    weight, bias = vector(norm.weight, width, 1.0), vector(norm.bias, width, 0.0)
    return loops.LAYER if norm.centre else loops.RMS, weight, bias, f32(norm.eps)
