"""The pass of one token through a model on a CPU, a block in one call, compiled by numba.

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
from numba import get_num_threads, njit, prange, set_num_threads, types
from numba.core.config import NUMBA_NUM_THREADS
from numba.extending import overload
from torch import Tensor, nn

from cache import KVCache
from engine.blas import NumpyLinear
from engine.linear import HalfLinear, OneOrSeveralLinear, PlainLinear, StreamedLinear
from engine.replay import Aside, RecordedCache
from engine.threads import AllOrOne
from model import GPT, Norm, gelu, relu2, rotary

f32, u32 = np.float32, np.uint32
# sums in whatever order; but what is not finite stays so
MATH = {"reassoc", "nsz", "arcp", "contract", "afn"}
OPTIONS = dict(nogil=True, cache=True, fastmath=MATH, error_model="numpy")
# what becomes of a product; numpy's numbers, since for each of Python's numba compiles anew
PLAIN, ADDED, TIMES, GELU, RELU2, SILU, CAPPED = np.arange(7)
ACTIVATIONS = {gelu: GELU, relu2: RELU2, F.silu: SILU}
NONE, RMS, LAYER = np.arange(3)  # norms


def as_float32(w):
    """A weight; of bfloat16 numpy knows the bits alone."""


@overload(as_float32, inline="always")
def as_float32_by(w):
    if w == types.uint16:
        return lambda w: u32(u32(w) << u32(16)).view(f32)
    return lambda w: f32(w)


STREAMS = 8  # rows of a matrix that are read side by side


@njit(inline="always")
def sums(W, x, z):
    """W x into z, by eight rows at once that stand far from each other: a processor asks memory for
    more of each that it sees read in order, and of one alone it does not ask for enough."""
    n = len(z) // STREAMS
    for o in range(n):
        z0 = z1 = z2 = z3 = z4 = z5 = z6 = z7 = f32(0)
        for i in range(len(x)):
            z0 += as_float32(W[o, i]) * x[i]
            z1 += as_float32(W[o + n, i]) * x[i]
            z2 += as_float32(W[o + 2 * n, i]) * x[i]
            z3 += as_float32(W[o + 3 * n, i]) * x[i]
            z4 += as_float32(W[o + 4 * n, i]) * x[i]
            z5 += as_float32(W[o + 5 * n, i]) * x[i]
            z6 += as_float32(W[o + 6 * n, i]) * x[i]
            z7 += as_float32(W[o + 7 * n, i]) * x[i]
        z[o], z[o + n], z[o + 2 * n], z[o + 3 * n] = z0, z1, z2, z3
        z[o + 4 * n], z[o + 5 * n], z[o + 6 * n], z[o + 7 * n] = z4, z5, z6, z7
    for o in range(STREAMS * n, len(z)):
        s = f32(0)
        for i in range(len(x)):
            s += as_float32(W[o, i]) * x[i]
        z[o] = s


def multiply(W, scales, part, x, z):
    """The outputs of one part of W x, as many as z has."""


@overload(multiply, jit_options=dict(fastmath=MATH, error_model="numpy"))
def multiply_by(W, scales, part, x, z):
    def rows(W, scales, part, x, z):  # (O, I)
        some = W[part * len(z) : (part + 1) * len(z)]  # of the last part maybe fewer
        sums(some, x, z[: len(some)])

    def eight_bits(W, scales, part, x, z):  # (parts, width, I)
        scaled, offset = np.empty(len(x), f32), f32(0)
        for i in range(len(x)):
            scaled[i] = x[i] * scales[0, part, i]
            offset += x[i] * scales[1, part, i]
        sums(W[part], scaled, z)
        for j in range(len(z)):
            z[j] += offset

    return rows if W.ndim == 2 else eight_bits


@njit(inline="always")
def finished(z, y, how, cap):
    """What stands in the place of y once its product z is known."""
    if how == ADDED:
        return y + z
    if how == TIMES:
        return y * z
    if how == GELU:  # (1 + tanh(a)) / 2 = 1 / (1 + e^(-2 a))
        return z / (f32(1) + np.exp(f32(-1.5957691216057308) * (z + f32(0.044715) * z * z * z)))
    if how == RELU2:
        return max(z, f32(0)) * max(z, f32(0))
    if how == SILU:
        return z / (f32(1) + np.exp(-z))
    if how == CAPPED:
        return cap * np.tanh(z / cap)
    return z


@njit(**OPTIONS)
def part_of_product(layer, part, x, how, cap, z, y):
    W, b, scales = layer
    first = part * len(z)
    multiply(W, scales, part, x, z)
    for o in range(first, min(first + len(z), len(y))):
        y[o] = finished(z[o - first] + b[o], y[o], how, cap)


@njit(parallel=True, **OPTIONS)
def product(layer, x, how, cap, parts, y):
    """W x + b into y (O), as `how` says, in parts of as many outputs as a row of `parts` has."""
    width = parts.shape[1]
    for part in prange((len(y) + width - 1) // width):
        part_of_product(layer, part, x, how, cap, parts[part], y)


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
        p = np.exp(score[t] - top)
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
def block(x, place, attention, mlp, cos, sin, memory, buffers):
    """A block of model.py, in place of its x (C)."""
    attn_norm, wqkv, q_norm, k_norm, wo = attention
    mlp_norm, gate, up, down, activation = mlp
    keys, values = memory
    h, qkv, y, wide, scores, parts = buffers
    normed(x, attn_norm, h)
    product(wqkv, h, PLAIN, f32(0), parts, qkv)
    attend(qkv, place, q_norm, k_norm, cos, sin, keys, values, scores, y)
    product(wo, y, ADDED, f32(0), parts, x)
    normed(x, mlp_norm, h)
    if activation == SILU:
        product(gate, h, SILU, f32(0), parts, wide)
        product(up, h, TIMES, f32(0), parts, wide)
    else:
        product(up, h, activation, f32(0), parts, wide)
    product(down, wide, ADDED, f32(0), parts, x)


@njit(**OPTIONS)
def head(x, norm, layer, cap, buffers, logits):
    h, _, _, _, _, parts = buffers
    normed(x, norm, h)
    product(layer, h, CAPPED if cap > 0 else PLAIN, cap, parts, logits)


LOCK = Lock()  # numba's own threads, which it uses where there is no OpenMP, serve one at a time
ROWS = 64  # outputs of a part where a matrix has no blocks: with fewer a twentieth slower
OURS = {"model", "engine.fast", "engine.inference", "engine.linear", "engine.blas"}  # modules
PLACES = 1024  # of a cache in which a model and its compiled pass are compared, at most
ROUNDING = 5e-5  # how far they may be apart, as a share: 6e-6 was found, GELU by erf is 1e-4 off
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
        self.wte, self.embed_norm = model.wte, model.embed_norm
        self.wpe = model.wpe if c.position == "learned" else None
        self.blocks = [of_block(block, c) for block in model.blocks]
        top = layer_of(model.head.layer, c.vocab_size, c.n_embd)
        self.head = norm_of(model.norm, c.n_embd), top, f32(c.logit_cap)
        layers = [top, *(layer for block in self.blocks for layer in matrices(*block))]
        parts = {part_of(W) for W, _, _ in layers}
        if len(parts) > 1:
            raise ValueError("layers of several kinds, or with blocks of several widths")
        self.width = parts.pop()[1]


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
        self.memory = [(k.numpy()[0], v.numpy()[0]) for k, v in zip(cache.k, cache.v, strict=True)]
        self.angles = [np.zeros((size, 0), f32)] * 2
        if c.position == "rotary":
            self.angles = [z.numpy() for z in rotary(torch.arange(size), c)]
        joined = (c.n_head + 2 * c.n_kv_head) * c.head_dim
        parts = -(-max(c.vocab_size, c.mlp_dim, joined, c.n_embd) // weights.width)
        shapes = c.n_embd, joined, c.n_head * c.head_dim, c.mlp_dim, (c.n_head, size)
        self.buffers = tuple(np.zeros(n, f32) for n in (*shapes, (parts, weights.width)))
        self.logits = torch.empty(1, 1, c.vocab_size)

    def __call__(self) -> None:
        weights, place = self.weights, int(self.place)
        x = weights.wte(self.tokens)
        if weights.wpe is not None:
            x = x + weights.wpe(self.place)
        x = weights.embed_norm(x).view(-1).float().numpy().copy()
        logits = self.logits.view(-1).numpy()
        cos, sin = (z[place] for z in self.angles)
        together, before = self.choice.together(), get_num_threads()
        with LOCK:
            start = perf_counter()
            set_num_threads(min(self.threads, NUMBA_NUM_THREADS) if together else 1)
            try:
                for layers, memory in zip(weights.blocks, self.memory, strict=True):
                    block(x, place, *layers, cos, sin, memory, self.buffers)
                head(x, *weights.head, self.buffers, logits)
            finally:
                set_num_threads(before)
            self.choice.took(together, perf_counter() - start)


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
    return step if near(step.logits, cache.logits) else None


def usable(model: GPT, forward: Callable, cache: RecordedCache) -> Weights | None:
    """What loops read of a model, if they agree with it and are faster."""
    try:
        weights = Weights(model)
    except (ValueError, KeyError, AttributeError):  # a model of another kind
        return None
    step = OneToken(weights, cache, cache.tokens, cache.place)
    good = agrees(weights, model, forward, cache.k.size(3)) and faster(step, cache.replay)
    return weights if good else None


def near(found: Tensor, true: Tensor) -> bool:
    """But for rounding the same. Zeros, which hide everything, are not."""
    return bool((found - true).norm() < ROUNDING * true.norm())


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
        if not near(step.logits, true):
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
    norms = norms or [(NONE, np.ones(D, f32), np.zeros(D, f32), f32(0))] * 2
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


def part_of(W: np.ndarray) -> tuple[np.dtype, int]:
    """What W is made of, and how many outputs a part of it has."""
    return W.dtype, ROWS if W.ndim == 2 else W.shape[1]


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
    """What `product` reads: weight, bias, and of eight bits scales and offsets (2, parts, I), of
    others none. ValueError if nobody can read the weight, or it has another shape."""
    if type(layer) is OneOrSeveralLinear:
        layer = layer.one
    scales = np.zeros((2, 0, 0), f32)
    if type(layer) is StreamedLinear and layer.eight_bits:
        shape = layer.outputs, layer.inputs
        weight = layer.rows.view(layer.blocks, layer.inputs, -1)
        # a row ends with its scale and its offset
        scales = array(weight.view(torch.float32)[..., -2:].permute(2, 0, 1).contiguous())
        # a copy: the sums of a bag are over rows of this, which takes a quarter longer
        weight = weight[..., :-8].mT.contiguous()
    elif type(layer) in KINDS and layer.matrix is not None and layer.matrix.dtype in TYPES:
        shape, weight = (*layer.matrix.shape,), layer.matrix.contiguous()
    else:
        raise ValueError(f"the weights of {type(layer)} have a layout of somebody else's")
    if shape != (outputs, inputs):
        raise ValueError(f"a matrix of {shape} should be one of {outputs} x {inputs}")
    return array(weight), vector(layer.bias, outputs, 0.0), scales


def norm_of(norm: nn.Module, width: int) -> tuple:
    """As `normed` wants it."""
    if not isinstance(norm, Norm):
        raise ValueError(f"{type(norm)} is no norm")
    weight, bias = vector(norm.weight, width, 1.0), vector(norm.bias, width, 0.0)
    return LAYER if norm.centre else RMS, weight, bias, f32(norm.eps)
