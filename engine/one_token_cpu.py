"""The pass of one token through a model on a CPU, a block in one call, compiled by numba.

What a token costs beside the reading of its weights are hundreds of small operations: each is
called by Python, on one core, while the threads of the next product fall asleep. Here they stand
in the loops that read the matrices, or between two of them with nothing to call; so the threads
of one loop are still awake when the next begins. The weights are read where they are: in the
layouts of engine/linear.py, of float32, bfloat16 or eight bits. docs/speed.md has the figures.

numba compiles these functions when they are called first, some seconds for each of the three kinds
of weights, and keeps what it made beside this file, or in a folder of the user's.
"""

import os
import sys
from collections.abc import Callable
from threading import Lock, Timer
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit, prange, set_num_threads, types
from numba.core.config import NUMBA_NUM_THREADS
from numba.extending import overload
from torch import Tensor, nn

from cache import KVCache
from engine.blas import NumpyLinear
from engine.linear import OneOrSeveralLinear, PlainLinear, StreamedLinear
from engine.threads import AllOrOne
from model import GPT, gelu, relu2, rotary

f32, u32 = np.float32, np.uint32
# sums in whatever order; but what is not finite stays so
MATH = {"reassoc", "nsz", "arcp", "contract", "afn"}
WITH = dict(nogil=True, cache=True, fastmath=MATH, error_model="numpy")
# what becomes of a product; numpy's numbers, since for each of Python's numba compiles anew
PLAIN, ADDED, TIMES, GELU, RELU2, SILU, CAPPED = np.arange(7)
ACTIVATIONS = {gelu: GELU, relu2: RELU2, F.silu: SILU}
NONE, RMS, LAYER = np.arange(3)  # norms


def number(w):
    """A weight as float32; of bfloat16 numpy knows the bits alone."""


@overload(number, inline="always")
def number_of(w):
    if w == types.uint16:
        return lambda w: u32(u32(w) << u32(16)).view(f32)
    return lambda w: f32(w)


def multiply(W, scales, part, x, z):
    """The outputs of one part of W x, as many as z has."""


@overload(multiply, jit_options=dict(fastmath=MATH, error_model="numpy"))
def multiply_by(W, scales, part, x, z):
    def rows(W, scales, part, x, z):  # (O, I)
        first = part * len(z)
        for o in range(first, min(first + len(z), len(W))):
            s = f32(0)
            for i in range(len(x)):
                s += W[o, i] * x[i]
            z[o - first] = s

    def columns(W, scales, part, x, z):  # (parts, I, width)
        z[:] = f32(0)
        for i in range(len(x)):
            for j in range(len(z)):
                z[j] += x[i] * number(W[part, i, j])

    def eight_bits(W, scales, part, x, z):  # (parts, width, I)
        scaled, offset = np.empty(len(x), f32), f32(0)
        for i in range(len(x)):
            scaled[i] = x[i] * scales[0, part, i]
            offset += x[i] * scales[1, part, i]
        for j in range(len(z)):
            s = f32(0)
            for i in range(len(x)):
                s += f32(W[part, j, i]) * scaled[i]
            z[j] = s + offset

    return rows if W.ndim == 2 else eight_bits if W.dtype == types.uint8 else columns


@njit(inline="always")
def finished(z, y, how, cap):
    """What stands in the place of y once its product z is known."""
    if how == ADDED:
        return y + z
    if how == TIMES:
        return y * z
    if how == GELU:
        return z / (f32(1) + np.exp(f32(-1.5957691216057308) * (z + f32(0.044715) * z * z * z)))
    if how == RELU2:
        return max(z, f32(0)) * z
    if how == SILU:
        return z / (f32(1) + np.exp(-z))
    if how == CAPPED:
        return cap * np.tanh(z / cap)
    return z


@njit(**WITH)
def some(layer, part, x, how, cap, z, y):
    """One part of `product`."""
    W, b, scales = layer
    first = part * len(z)
    multiply(W, scales, part, x, z)
    for o in range(first, min(first + len(z), len(y))):
        y[o] = finished(z[o - first] + b[o], y[o], how, cap)


@njit(parallel=True, **WITH)
def product(layer, x, how, cap, parts, y):
    """W x + b into y (O), as `how` says, in parts of as many outputs as a row of `parts` has."""
    width = parts.shape[1]
    for part in prange((len(y) + width - 1) // width):
        some(layer, part, x, how, cap, parts[part], y)


@njit(**WITH)
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


@njit(**WITH)
def ready_head(x, norm, cos, sin):
    """A head's query or key, normed and turned by its position's angles, in place."""
    if norm[0] != NONE:
        normed(x, norm, x)
    half = len(cos)  # 0 where positions are learned
    for i in range(half):
        a, b = x[i], x[i + half]
        x[i], x[i + half] = a * cos[i] - b * sin[i], b * cos[i] + a * sin[i]


@njit(**WITH)
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


@njit(**WITH)
def remember(qkv, place, k_norm, cos, sin, keys, values):
    """The token's key and value join `keys` and `values` (K, S, D)."""
    K, _, D = keys.shape
    new = qkv[len(qkv) - 2 * K * D :]
    for g in range(K):
        ready_head(new[g * D : (g + 1) * D], k_norm, cos, sin)
        for d in range(D):
            keys[g, place, d] = new[g * D + d]
            values[g, place, d] = new[(K + g) * D + d]


@njit(**WITH)
def one_head(h, qkv, place, q_norm, cos, sin, keys, values, scores, y):
    (K, _, D), H = keys.shape, len(scores)
    q, g = qkv[h * D : (h + 1) * D], h * K // H
    ready_head(q, q_norm, cos, sin)
    look(q, keys[g], values[g], place, scores[h], y[h * D : (h + 1) * D])


@njit(parallel=True, **WITH)
def attend(qkv, place, q_norm, k_norm, cos, sin, keys, values, scores, y):
    """Attention of the token at `place` into y (H D): its key and value join `keys` and `values`
    (K, S, D)."""
    remember(qkv, place, k_norm, cos, sin, keys, values)
    for h in prange(len(scores)):
        one_head(h, qkv, place, q_norm, cos, sin, keys, values, scores, y)


@njit(**WITH)
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


@njit(**WITH)
def head(x, norm, layer, cap, buffers, logits):
    h, _, _, _, _, parts = buffers
    normed(x, norm, h)
    product(layer, h, CAPPED if cap > 0 else PLAIN, cap, parts, logits)


LOCK = Lock()  # numba's own threads, which it uses where there is no OpenMP, serve one at a time
PROCESS = os.getpid()  # GNU's OpenMP ends a forked one that uses it
ROWS = 64  # outputs of a part where a matrix has no blocks: with fewer a twentieth slower
OURS = {"model", "engine.fast", "engine.inference", "engine.linear", "engine.blas"}
PLACES = 1024  # of a cache in which a model and its compiled pass are compared, at most
TRIES = 3  # of each, to find which is faster


class OneToken:
    """Computes `logits` (1, 1, V) for the token and the place that it is bound to, as `GPT.forward`
    does, but that it does not count the token. Raises ValueError for another kind of model."""

    def __init__(self, model: GPT):
        c, kinds = model.config, {type(m).__module__ for m in model.modules()}
        ours = all(name in OURS or name.startswith("torch.nn.") for name in kinds)
        if not ours or any("forward" in vars(m) for m in model.modules()):
            raise ValueError(f"a model of {kinds}, or one that was changed")
        if os.getpid() != PROCESS:
            raise ValueError("a forked process")
        self.model, self.choice = model, AllOrOne()
        # what layers round in the type of their weights is not rounded here
        self.rounding = 1e-3 if model.wte.weight.dtype == torch.float32 else 0.03
        self.blocks = [of_block(block, c) for block in model.blocks]
        top = layer_of(model.head.layer)
        self.head = norm_of(model.norm, c.n_embd), top, f32(c.logit_cap)
        layers = [top, *(layer for block in self.blocks for layer in matrices(*block))]
        parts = {part_of(W) for W, _, _ in layers}
        if len(parts) > 1:
            raise ValueError("layers of several kinds, or with blocks of several widths")
        self.width = parts.pop()[1]
        self.logits = torch.empty(1, 1, c.vocab_size)

    def bind(self, cache: KVCache, tokens: Tensor, place: Tensor) -> None:
        """To what a cache of one text, `tokens` (1, 1) and `place` (1, 1) hold when it is called.
        Raises ValueError for a cache of another kind."""
        c, size = self.model.config, cache.k.size(3)
        if cache.k.size(1) != 1 or cache.k.dtype != torch.float32:
            raise ValueError(f"a cache of {cache.k.dtype}, or for several texts")
        self.tokens, self.place, self.threads = tokens, place, torch.get_num_threads()
        self.memory = [(k.numpy()[0], v.numpy()[0]) for k, v in zip(cache.k, cache.v, strict=True)]
        self.angles = [np.zeros((size, 0), f32)] * 2
        if c.position == "rotary":
            self.angles = [z.numpy() for z in rotary(torch.arange(size), c)]
        joined = (c.n_head + 2 * c.n_kv_head) * c.head_dim
        parts = -(-max(c.vocab_size, c.mlp_dim, joined, c.n_embd) // self.width)
        shapes = c.n_embd, joined, c.n_head * c.head_dim, c.mlp_dim, (c.n_head, size)
        self.buffers = tuple(np.zeros(n, f32) for n in (*shapes, (parts, self.width)))

    def __call__(self) -> None:
        model, place = self.model, int(self.place)
        x = model.wte(self.tokens)
        if model.config.position == "learned":
            x = x + model.wpe(self.place)
        x = model.embed_norm(x).view(-1).float().numpy().copy()
        cos, sin = (z[place] for z in self.angles)
        together = self.choice.together()
        start = perf_counter()
        with LOCK:
            set_num_threads(min(self.threads, NUMBA_NUM_THREADS) if together else 1)
            for layers, memory in zip(self.blocks, self.memory, strict=True):
                block(x, place, *layers, cos, sin, memory, self.buffers)
            head(x, *self.head, self.buffers, self.logits.view(-1).numpy())
        self.choice.took(together, perf_counter() - start)


def agrees(step: OneToken, forward: Callable, size: int) -> bool:
    """Whether it computes what `forward`, that of its model, does, at an early and at the last
    place of a cache for `size` tokens. Where numba compiles for long, it says so."""
    cache, c = KVCache(step.model.config, 1, size=min(size, PLACES)), step.model.config
    g, size = torch.Generator().manual_seed(0), cache.k.size(3)
    for z in (cache.k, cache.v):
        z.normal_(generator=g)
    patience = Timer(
        2.0, print, ["\nnumba compiles for this processor, once"], {"file": sys.stderr}
    )
    patience.daemon = True
    patience.start()
    try:
        for place in (min(2, size - 1), size - 1):
            cache.lengths.fill_(place)
            tokens = torch.randint(c.vocab_size, (1, 1), generator=g)
            true = forward(tokens, cache=cache)
            step.bind(cache, tokens, torch.tensor([[place]]))
            step()
            if not (step.logits - true).norm() <= step.rounding * true.norm():
                return False
    finally:
        patience.cancel()
    return True


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
    attn, mlp = block.attn, block.mlp
    norms = norm_of(attn.q_norm, c.head_dim), norm_of(attn.k_norm, c.head_dim)
    up, activation = layer_of(mlp.up), ACTIVATIONS[mlp.activation]
    gate = up if mlp.gate is None else layer_of(mlp.gate)
    return (
        (norm_of(block.attn_norm, c.n_embd), layer_of(attn.wqkv), *norms, layer_of(attn.wo)),
        (norm_of(block.mlp_norm, c.n_embd), gate, up, layer_of(mlp.down), activation),
    )


def matrices(attention: tuple, mlp: tuple) -> list[tuple]:
    """The layers of a block."""
    return [attention[1], attention[4], *mlp[1:4]]


def part_of(W: np.ndarray) -> tuple[np.dtype, int]:
    """What W is made of, and how many outputs a part of it has."""
    return W.dtype, ROWS if W.ndim == 2 else W.shape[1 if W.dtype == np.uint8 else 2]


def array(t: Tensor) -> np.ndarray:
    t = t.detach()
    return (t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).numpy()


def layer_of(layer: nn.Module) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `product` reads: weight, bias, and of eight bits scales and offsets (2, parts, I), of
    others none. ValueError if nobody can read the weight."""
    if type(layer) is OneOrSeveralLinear:
        layer = layer.one
    scales = np.zeros((2, 0, 0), f32)
    if type(layer) is StreamedLinear:
        weight, outputs = layer.rows.view(layer.blocks, layer.inputs, -1), layer.outputs
        if layer.eight_bits:  # a row ends with its scale and its offset
            scales = array(weight.view(torch.float32)[..., -2:].permute(2, 0, 1).contiguous())
            # a copy: the sums of a bag are over rows of this, which takes a quarter longer
            weight = weight[..., :-8].mT.contiguous()
    elif type(layer) in (NumpyLinear, PlainLinear) and layer.matrix.dtype == torch.float32:
        weight, outputs = layer.matrix.contiguous(), len(layer.matrix)
    else:
        raise ValueError(f"the weights of {type(layer)} have a layout of somebody else's")
    bias = np.zeros(outputs, f32) if layer.bias is None else array(layer.bias.float())
    return array(weight), bias, scales


def norm_of(norm: nn.Module, width: int) -> tuple:
    """As `normed` wants it."""
    ones, zeros = np.ones(width, f32), np.zeros(width, f32)
    if type(norm) is nn.Identity:
        return NONE, ones, zeros, f32(0)
    weight = ones if norm.weight is None else array(norm.weight.float())
    bias = zeros if norm.bias is None else array(norm.bias.float())
    return LAYER if norm.centre else RMS, weight, bias, f32(norm.eps)
