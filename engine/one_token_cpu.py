"""The pass of one token through a model on a CPU, in one call, compiled by numba.

What a token costs beside the reading of its weights are hundreds of small operations: each is
called by Python, on one core, while the threads of the next product fall asleep. Here they stand
in the loops that read the matrices, or between two of them with nothing to call; so the threads
of one loop are still awake when the next begins. Weights of float32 and bfloat16 are read as the
model has them, those of eight bits from a copy, which does not see what is changed in them later.
docs/speed.md has the figures.

numba compiles these functions when they are called first, some seconds for each of the three kinds
of weights, and keeps what it made beside this file, or in a folder of the user's.
"""

import sys
from collections.abc import Callable
from contextlib import contextmanager
from threading import Lock, Timer
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from numba import get_num_threads, njit, prange, set_num_threads
from numba.core.config import NUMBA_NUM_THREADS
from numba.typed import List
from torch import Tensor, nn

from cache import KVCache
from engine.blas import NumpyLinear
from engine.linear import HalfLinear, OneOrSeveralLinear, PlainLinear, StreamedLinear
from engine.replay import Aside, RecordedCache
from engine.rows import MATH, STREAMS, as_float32, rounded, sums
from engine.threads import AllOrOne
from model import GPT, Norm, gelu, relu2, rotary

f32, i32 = np.float32, np.int32
LOG2, LOWEST, HIGHEST = f32(np.log(2)), f32(-87), f32(88)  # beyond these e^x is no usual float32
OPTIONS = dict(nogil=True, cache=True, **MATH)
# what becomes of a product; numpy's numbers, since for each of Python's numba compiles anew
PLAIN, ADDED, TIMES, GELU, RELU2, SILU, CAPPED = np.arange(7)
ACTIVATIONS = {gelu: GELU, relu2: RELU2, F.silu: SILU}
NONE, RMS, LAYER = np.arange(3)  # norms


@njit(inline="always")
def exp(x):
    """e^x to six digits, in operations that a processor does for several numbers at once: as
    2^n e^r, the first by its bits, the second by Taylor's series."""
    x = LOWEST if x < LOWEST else HIGHEST if x > HIGHEST else x  # nan stays
    n = np.rint(x / LOG2)
    r = x - n * LOG2
    series = f32(1) + r / f32(4) * (f32(1) + r / f32(5) * (f32(1) + r / f32(6)))
    series = f32(1) + r * (f32(1) + r / f32(2) * (f32(1) + r / f32(3) * series))
    return series * i32((i32(n) + i32(127)) << i32(23)).view(f32)


@njit(inline="always")
def finished(z, y, how, cap):
    """What stands in the place of y once its product z is known."""
    if how == ADDED:
        return y + z
    if how == TIMES:
        return y * z
    if how == GELU:  # (1 + tanh(a)) / 2 = 1 / (1 + e^(-2 a))
        return z / (f32(1) + exp(f32(-1.5957691216057308) * (z + f32(0.044715) * z * z * z)))
    if how == RELU2:
        return max(z, f32(0)) * max(z, f32(0))
    if how == SILU:
        return z / (f32(1) + exp(-z))
    if how == CAPPED:
        return cap * np.tanh(z / cap)
    return z


@njit(**OPTIONS)
def part_of_product(layer, first, last, x, unit, how, cap, z, y):
    W, b, scales = layer
    sums(W[first:last], x, z[first:last])
    for o in range(first, last):
        y[o] = finished(z[o] * (unit * scales[o]) + b[o], y[o], how, cap)


@njit(parallel=True, **OPTIONS)
def product(layer, x, how, cap, room, y):
    """W x + b into y (O), as `how` says: each thread reads so many rows behind one another."""
    sixteen_bits, z, threads = room
    numbers, unit = rounded(layer[0], x, sixteen_bits)
    groups = (len(y) + STREAMS - 1) // STREAMS
    for part in prange(threads):
        first, last = groups * part // threads, groups * (part + 1) // threads
        rows = first * STREAMS, min(last * STREAMS, len(y))
        part_of_product(layer, *rows, numbers, unit, how, cap, z, y)


@njit(**OPTIONS)
def normed(x, norm, out):
    """A norm of model.py, of x into `out`, which may be x."""
    kind, weight, bias, eps = norm
    mean, square = f32(0), f32(0)
    if kind == LAYER:
        for i in range(len(x)):
            mean += x[i]
        mean /= f32(len(x))
    for i in range(len(x)):
        square += (x[i] - mean) * (x[i] - mean)
    scale = f32(1) / np.sqrt(square / f32(len(x)) + eps)
    for i in range(len(x)):
        out[i] = (x[i] - mean) * scale * weight[i] + bias[i]


@njit(**OPTIONS)
def ready_head(x, norm, cos, sin):
    """A head's query or key, normed and turned by its position's angles, in place."""
    if norm[0] != NONE:
        normed(x, norm, x)
    half = len(cos)  # 0 where positions are learned
    for i in range(half):
        a, b = x[i], x[i + half]
        x[i], x[i + half] = a * cos[i] - b * sin[i], b * cos[i] + a * sin[i]


@njit(**OPTIONS)
def look(q, keys, values, place, score, y):
    """Attention of one head, of q (D) to `keys` and `values` (S, D) up to `place`, into y (D)."""
    top, whole, scale = f32(-np.inf), f32(0), f32(1) / np.sqrt(f32(len(q)))
    for t in range(place + 1):
        z = f32(0)
        for d in range(len(q)):
            z += q[d] * keys[t, d]
        score[t] = z * scale
        top = max(top, score[t])
    for d in range(len(q)):
        y[d] = f32(0)
    for t in range(place + 1):
        p = exp(score[t] - top)
        whole += p
        for d in range(len(q)):
            y[d] += p * values[t, d]
    for d in range(len(q)):
        y[d] /= whole


@njit(**OPTIONS)
def remember(qkv, place, k_norm, cos, sin, keys, values):
    """The token's key and value join `keys` and `values` (K, S, D)."""
    K, _, D = keys.shape
    new = qkv[len(qkv) - 2 * K * D :]
    for g in range(K):
        ready_head(new[g * D : (g + 1) * D], k_norm, cos, sin)
        for d in range(D):
            keys[g, place, d] = new[g * D + d]
            values[g, place, d] = new[(K + g) * D + d]


@njit(**OPTIONS)
def one_head(h, qkv, place, q_norm, cos, sin, keys, values, scores, y):
    (K, _, D), H = keys.shape, len(scores)
    q, g = qkv[h * D : (h + 1) * D], h * K // H
    ready_head(q, q_norm, cos, sin)
    look(q, keys[g], values[g], place, scores[h], y[h * D : (h + 1) * D])


@njit(parallel=True, **OPTIONS)
def attend(qkv, place, q_norm, k_norm, cos, sin, keys, values, scores, y):
    """Attention of the token at `place` into y (H D): its key and value join `keys` and `values`
    (K, S, D)."""
    remember(qkv, place, k_norm, cos, sin, keys, values)
    for h in prange(len(scores)):
        one_head(h, qkv, place, q_norm, cos, sin, keys, values, scores, y)


@njit(**OPTIONS)
def block(x, place, attention, mlp, cos, sin, keys, values, buffers):
    """A block of model.py, in place of its x (C)."""
    attn_norm, wqkv, q_norm, k_norm, wo = attention
    mlp_norm, gate, up, down, activation = mlp
    _, h, qkv, y, wide, scores, room = buffers
    normed(x, attn_norm, h)
    product(wqkv, h, PLAIN, f32(0), room, qkv)
    attend(qkv, place, q_norm, k_norm, cos, sin, keys, values, scores, y)
    product(wo, y, ADDED, f32(0), room, x)
    normed(x, mlp_norm, h)
    if activation == SILU:
        product(gate, h, SILU, f32(0), room, wide)
        product(up, h, TIMES, f32(0), room, wide)
    else:
        product(up, h, activation, f32(0), room, wide)
    product(down, wide, ADDED, f32(0), room, x)


@njit(**OPTIONS)
def embed(token, place, embedding, x):
    """What model.py's blocks are given of a token, into x (C)."""
    table, positions, norm = embedding  # positions (0, C) where they are not learned
    for i in range(len(x)):
        x[i] = as_float32(table[token, i])
    if len(positions):
        for i in range(len(x)):
            x[i] += as_float32(positions[place, i])
    if norm[0] != NONE:
        normed(x, norm, x)


@njit(**OPTIONS)
def whole_pass(token, place, embedding, blocks, head, angles, memory, buffers, logits):
    """A pass of model.py, of one token at `place`."""
    (cos, sin), (keys, values) = angles, memory
    (norm, layer, cap), (x, h, _, _, _, _, room) = head, buffers
    embed(token, place, embedding, x)
    for n in range(len(blocks)):
        attention, mlp = blocks[n]
        block(x, place, attention, mlp, cos[place], sin[place], keys[n], values[n], buffers)
    normed(x, norm, h)
    product(layer, h, CAPPED if cap > 0 else PLAIN, cap, room, logits)


@njit(**OPTIONS)
def list_of(block):
    """What one call is given of any number of blocks. A `typed.List` of Python's would be compiled
    in each process anew."""
    blocks = List()
    blocks.append(block)
    return blocks


@njit(**OPTIONS)
def append(blocks, block):
    blocks.append(block)


LOCK = Lock()  # numba's own threads, which it uses where there is no OpenMP, serve one at a time
OURS = {"model", "engine.fast", "engine.inference", "engine.linear", "engine.blas"}  # modules
PLACES = 1024  # of a cache in which a model and its compiled pass are compared, at most
ROUNDING = 5e-5  # how far they may be apart, as a share: 2e-6 was found, GELU by erf is 1e-4 off
OF_EIGHT_BITS = 1e-3  # the same where activations are rounded to sixteen: 9e-5 was found
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
        positions = table_of(model.wpe) if c.position == "learned" else array(no_positions)
        norm = norm_of(model.embed_norm, c.n_embd) if c.embed_norm else no_norm(c.n_embd)
        self.embedding = table_of(model.wte), positions, norm
        blocks = [of_block(block, c) for block in model.blocks]
        top = layer_of(model.head.layer, c.vocab_size, c.n_embd)
        self.head = norm_of(model.norm, c.n_embd), top, f32(c.logit_cap)
        layers = [top, *(layer for block in blocks for layer in matrices(*block))]
        kinds = {W.dtype for W, _, _ in layers}
        if len(kinds) > 1:
            raise ValueError(f"layers of {kinds}")
        self.blocks = list_of(blocks[0])
        for block in blocks[1:]:
            append(self.blocks, block)
        self.rounding = OF_EIGHT_BITS if np.dtype(np.int8) in kinds else ROUNDING

    def near(self, found: Tensor, true: Tensor) -> bool:
        """But for rounding the same. Zeros, which hide everything, are not."""
        return bool((found - true).norm() < self.rounding * true.norm())


class OneToken:
    """Computes `logits` (1, 1, V) of what a cache of one text, `tokens` (1, 1) and `place` (1, 1)
    hold when it is called, as `GPT.forward` does, but that it does not count the token. Raises
    ValueError for a cache of another kind."""

    def __init__(self, weights: Weights, cache: KVCache, tokens: Tensor, place: Tensor):
        c, size = weights.config, cache.k.size(3)
        if cache.k.size(1) != 1 or cache.k.dtype != torch.float32:
            raise ValueError(f"a cache of {cache.k.dtype}, or for several texts")
        self.weights, self.tokens, self.place = weights, tokens, place
        self.threads, self.choice = torch.get_num_threads(), AllOrOne()
        self.memory = cache.k[:, 0].numpy(), cache.v[:, 0].numpy()  # (L, K, S, D) both
        self.angles = (np.zeros((size, 0), f32),) * 2
        if c.position == "rotary":
            self.angles = tuple(z.numpy() for z in rotary(torch.arange(size), c))
        joined = (c.n_head + 2 * c.n_kv_head) * c.head_dim
        inputs = c.n_embd, c.n_embd, joined, c.n_head * c.head_dim, c.mlp_dim
        self.room = np.zeros(max(inputs), np.int16), np.zeros(max(c.vocab_size, *inputs), f32)
        self.buffers = [np.zeros(n, f32) for n in (*inputs, (c.n_head, size))]
        self.logits = torch.empty(1, 1, c.vocab_size)

    def __call__(self) -> None:
        self.logits.copy_(self.logits_of(int(self.tokens), int(self.place)))

    def logits_of(self, token: int, place: int) -> Tensor:
        """In memory of their own (1, 1, V)."""
        w, logits = self.weights, np.empty(self.logits.numel(), f32)
        if not 0 <= token < len(logits):
            raise IndexError(f"{token} is no token")
        model, text = (w.embedding, w.blocks, w.head), (self.angles, self.memory)
        together, before = self.choice.together(), get_num_threads()
        threads = min(self.threads, NUMBA_NUM_THREADS) if together else 1
        buffers = *self.buffers, (*self.room, threads)
        with LOCK:
            start = perf_counter()
            set_num_threads(threads)
            try:
                whole_pass(token, place, *model, *text, buffers, logits)
            finally:
                set_num_threads(before)
            self.choice.took(together, perf_counter() - start)
        return torch.from_numpy(logits).view(1, 1, -1)


class Known(Aside):
    """Of a model: its structure and threads then, and its weights, if they serve it better than
    what is recorded."""

    def __init__(self, state: tuple, weights: Weights | None):
        self.state, self.weights = state, weights


def compiled(model: GPT, forward: Callable, cache: RecordedCache) -> OneToken | None:
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
    """Whether both compute the same at an early and at the last place of a cache for `size`
    tokens. When it is called first, numba compiles."""
    cache = KVCache(model.config, 1, size=min(size, PLACES))
    g, size = torch.Generator().manual_seed(0), cache.k.size(3)
    for z in (cache.k, cache.v):
        z.normal_(generator=g)
    for place in (min(2, size - 1), size - 1):
        cache.lengths.fill_(place)
        tokens = torch.randint(model.config.vocab_size, (1, 1), generator=g)
        true = forward(tokens, cache=cache)
        step = OneToken(weights, cache, tokens, torch.tensor([[place]]))
        with said("numba compiles for this processor, once"):
            step()
        if not weights.near(step.logits, true):
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


def of_block(block: nn.Module, c) -> tuple[tuple, tuple]:
    attn, mlp, C, D, wide = block.attn, block.mlp, c.n_embd, c.head_dim, c.mlp_dim
    norms = [norm_of(norm, D) for norm in (attn.q_norm, attn.k_norm) if c.qk_norm]
    norms = norms or [no_norm(D)] * 2
    up, activation = layer_of(mlp.up, wide, C), ACTIVATIONS[mlp.activation]
    gate = up if mlp.gate is None else layer_of(mlp.gate, wide, C)
    wqkv = layer_of(attn.wqkv, (c.n_head + 2 * c.n_kv_head) * D, C)
    wo = layer_of(attn.wo, C, c.n_head * D)
    return (
        (norm_of(block.attn_norm, C), wqkv, *norms, wo),
        (norm_of(block.mlp_norm, C), gate, up, layer_of(mlp.down, C, wide), activation),
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


def layer_of(layer: nn.Module, outputs: int, inputs: int) -> tuple[np.ndarray, ...]:
    """What `product` reads: weight, bias, and a scale for each row. ValueError if nobody can read
    the weight, or it has another shape."""
    if type(layer) is OneOrSeveralLinear:
        layer = layer.one
    scales = None
    if type(layer) is StreamedLinear and layer.scales is not None:
        # a copy: the sums of a bag are over rows of the transpose, which takes a quarter longer
        weight, scales = layer.whole_numbers().contiguous(), layer.scales
    elif type(layer) in KINDS and layer.matrix is not None and layer.matrix.dtype in TYPES:
        weight = layer.matrix.contiguous()
    else:
        raise ValueError(f"the weights of {type(layer)} have a layout of somebody else's")
    if weight.shape != (outputs, inputs):
        raise ValueError(f"a matrix of {weight.shape} should be one of {outputs} x {inputs}")
    return array(weight), vector(layer.bias, outputs, 0.0), vector(scales, outputs, 1.0)


def table_of(embedding: nn.Module) -> np.ndarray:
    """ValueError if it is of another type."""
    if embedding.weight.dtype not in TYPES:
        raise ValueError(f"an embedding of {embedding.weight.dtype}")
    return array(embedding.weight.contiguous())


def no_norm(width: int) -> tuple:
    return NONE, np.ones(width, f32), np.zeros(width, f32), f32(0)


def norm_of(norm: nn.Module, width: int) -> tuple:
    """As `normed` wants it."""
    if not isinstance(norm, Norm):
        raise ValueError(f"{type(norm)} is no norm")
    weight, bias = vector(norm.weight, width, 1.0), vector(norm.bias, width, 0.0)
    return LAYER if norm.centre else RMS, weight, bias, f32(norm.eps)
