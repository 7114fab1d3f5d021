"""The pass of one token through a model on a GPU, in five kernels a block, written in Triton.

For one token a product is a reading of its matrix, a few MB in a few microseconds, and what stands
around it takes a kernel or several of about as long each; so what counts is how many there are, and
that each begins to read at once. Each of these does also what stands around its product:

    1. norm, queries, keys and values
    2. norms and rotation of queries and keys, the cache, scores, softmax, values
    3. what the programs of 2 have found, put together; wo; + x
    4. norm, up, and the gate; the activation
    5. down; + x

Each of the many programs of a kernel computes the norm of the whole vector for itself, since that
is small and near. The kernels of a step are replayed as one CUDA graph (`RecordedCache` in
engine/replay.py). docs/speed.md has the figures.
"""

import re
from dataclasses import replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from cache import KVCache
from engine.agreement import rms
from engine.fast import joined
from engine.linear import PlainLinear
from model import GPT, Attention, gelu, relu2, rotary
from shape import GPTConfig

OURS = {"model", "engine.fast", "engine.inference", "engine.linear"}
ROWS = 8  # texts at once up to which these kernels are used; more have tensor cores to fill
ACTIVATIONS = {gelu: "gelu", relu2: "relu2", F.silu: "silu"}
WIDEST = 1 << 14  # numbers in a row of a matrix
TILE = 4096  # numbers of a matrix that a program reads, all at once; of a vocabulary's twice
MANY = 1 << 14  # rows, as only a vocabulary has
SPLIT = 128  # positions that a program of attention looks at, at least


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":  # tanh(a) = 2 sigmoid(2 a) - 1
        z = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    if ACTIVATION == "relu2":
        z = tl.maximum(z, 0.0)
        z = z * z
    if ACTIVATION == "silu":
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def values(X, LEFT, M, L, PLACE, row, c, C, D: tl.constexpr, SPLITS, SPAN: tl.constexpr):
    """Columns c of a row: of X (rows, C), or of what the programs of attention have left, which
    each know their own largest score."""
    if LEFT is None:
        x = tl.load(X + row * C + c, mask=c < C, other=0.0).to(tl.float32)
    else:
        at = (row * (C // D) + c // D) * SPLITS  # of a head, and its first program
        top = tl.load(M + at, mask=c < C, other=0.0)
        whole = tl.load(L + at, mask=c < C, other=1.0)
        x = tl.load(LEFT + at * D + c % D, mask=c < C, other=0.0)
        last = tl.load(PLACE + row).to(tl.int32) // SPAN
        s = 1
        while s <= last:  # not a range, which Triton's interpreter wants to be constant
            m = tl.load(M + at + s, mask=c < C, other=0.0)
            new = tl.maximum(top, m)
            old, mine = tl.exp(top - new), tl.exp(m - new)
            x = x * old + tl.load(LEFT + (at + s) * D + c % D, mask=c < C, other=0.0) * mine
            whole = whole * old + tl.load(L + at + s, mask=c < C, other=0.0) * mine
            top = new
            s += 1
        x = x / whole
    return x


@triton.jit
def product_kernel(
    X, LEFT, M, L, PLACE, SCALE, SHIFT, W, BIAS, GATE, GATE_BIAS, REST, Y,
    rows, N, eps, cap, SPLITS, C: tl.constexpr, D: tl.constexpr, SPAN: tl.constexpr,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """BN columns of Y (rows, N): of z = norm(X) W^T + BIAS the activation, or, where there is a
    gate, z times the activation of the gate's own product; + REST."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    c = tl.arange(0, BC)
    there = (n < N)[:, None] & (c < C)[None, :]
    at = n.to(tl.int64)[:, None] * C + c[None, :]
    w = tl.load(W + at, mask=there, other=0.0)  # before anything is waited for
    if GATE is not None:
        g = tl.load(GATE + at, mask=there, other=0.0)
    row = 0
    while row < rows:
        x = values(X, LEFT, M, L, PLACE, row, c, C, D, SPLITS, SPAN)
        if NORM == "layer":
            x = tl.where(c < C, x - tl.sum(x, 0) / C, 0.0)
        if NORM != "":
            x *= tl.rsqrt(tl.sum(x * x, 0) / C + eps)
        if SCALE is not None:
            x *= tl.load(SCALE + c, mask=c < C, other=0.0).to(tl.float32)
        if SHIFT is not None:
            x += tl.load(SHIFT + c, mask=c < C, other=0.0).to(tl.float32)
        x = x.to(W.dtype.element_ty).to(tl.float32)[None, :]  # rounded as the book's
        z = tl.sum(w.to(tl.float32) * x, 1)
        if BIAS is not None:
            z += tl.load(BIAS + n, mask=n < N, other=0.0).to(tl.float32)
        if GATE is None:
            z = activated(z, ACTIVATION)
        else:
            b = tl.sum(g.to(tl.float32) * x, 1)
            if GATE_BIAS is not None:
                b += tl.load(GATE_BIAS + n, mask=n < N, other=0.0).to(tl.float32)
            z *= activated(b, ACTIVATION)
        if cap is not None:
            z = 2 * cap * tl.sigmoid(z * (2 / cap)) - cap
        if REST is not None:
            z = z.to(W.dtype.element_ty).to(tl.float32)
            z += tl.load(REST + row * N + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(Y + row * N + n, z.to(Y.dtype.element_ty), mask=n < N)
        row += 1


@triton.jit
def ready_head(
    QKV, COS, SIN, place, SCALE, SHIFT, eps, i, D: tl.constexpr, NORM: tl.constexpr
):  # fmt: skip
    """The two halves of a head's query or key, normed and turned by its position's angles."""
    here = i < D // 2
    a = tl.load(QKV + i, mask=here, other=0.0).to(tl.float32)
    b = tl.load(QKV + D // 2 + i, mask=here, other=0.0).to(tl.float32)
    if NORM != "":
        if NORM == "layer":
            mean = (tl.sum(a, 0) + tl.sum(b, 0)) / D
            a, b = tl.where(here, a - mean, 0.0), tl.where(here, b - mean, 0.0)
        scale = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / D + eps)
        a, b = a * scale, b * scale
        if SCALE is not None:
            a *= tl.load(SCALE + i, mask=here, other=0.0).to(tl.float32)
            b *= tl.load(SCALE + D // 2 + i, mask=here, other=0.0).to(tl.float32)
        if SHIFT is not None:
            a += tl.load(SHIFT + i, mask=here, other=0.0).to(tl.float32)
            b += tl.load(SHIFT + D // 2 + i, mask=here, other=0.0).to(tl.float32)
        kind = QKV.dtype.element_ty
        a, b = a.to(kind).to(tl.float32), b.to(kind).to(tl.float32)
    if COS is not None:
        cos = tl.load(COS + place * (D // 2) + i, mask=here, other=0.0)
        sin = tl.load(SIN + place * (D // 2) + i, mask=here, other=0.0)
        a, b = a * cos - b * sin, b * cos + a * sin
    return a, b


@triton.jit
def attention_kernel(
    QKV, COS, SIN, KEYS, VALUES, PLACE, LEFT, M, L, QS, QB, KS, KB, eps, scale, row_step, head_step,
    SPLITS, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    NORM: tl.constexpr, SPAN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The H / K heads of a row that share keys, over SPAN positions: LEFT (rows, H, SPLITS, D), the
    values weighted by e^(score - M), and the sum L of these weights. The new key and value are
    stored by the program whose positions hold their place."""
    row, kv, split = tl.program_id(0) // K, tl.program_id(0) % K, tl.program_id(1)
    place = tl.load(PLACE + row).to(tl.int32)
    first = split * SPAN
    if first > place:
        return
    i = tl.arange(0, HALF)
    here = i < D // 2
    QKV += row * (H + 2 * K) * D
    kind = KEYS.dtype.element_ty
    begin = row.to(tl.int64) * row_step + kv.to(tl.int64) * head_step
    KEYS += begin
    VALUES += begin
    ka, kb = ready_head(QKV + (H + kv) * D, COS, SIN, place, KS, KB, eps, i, D, NORM)
    ka, kb = ka.to(kind), kb.to(kind)
    va = tl.load(QKV + (H + K + kv) * D + i, mask=here, other=0.0).to(kind)
    vb = tl.load(QKV + (H + K + kv) * D + D // 2 + i, mask=here, other=0.0).to(kind)
    if place < first + SPAN:
        tl.store(KEYS + place * D + i, ka, mask=here)
        tl.store(KEYS + place * D + D // 2 + i, kb, mask=here)
        tl.store(VALUES + place * D + i, va, mask=here)
        tl.store(VALUES + place * D + D // 2 + i, vb, mask=here)
    for g in range(H // K):  # not unrolled: to compile 32 copies takes minutes
        head = kv * (H // K) + g
        qa, qb = ready_head(QKV + head * D, COS, SIN, place, QS, QB, eps, i, D, NORM)
        qa, qb = qa.to(kind).to(tl.float32) * scale, qb.to(kind).to(tl.float32) * scale
        top = tl.full((), float("-inf"), tl.float32)
        whole = tl.full((), 0.0, tl.float32)
        ya = tl.zeros((HALF,), tl.float32)
        yb = tl.zeros((HALF,), tl.float32)
        start = first
        while start < tl.minimum(first + SPAN, place + 1):
            s = start + tl.arange(0, STEP)
            old = (s < place)[:, None] & here[None, :]
            new = (s == place)[:, None]
            tile = s[:, None] * D + i[None, :]
            a = tl.where(new, ka[None, :], tl.load(KEYS + tile, mask=old, other=0.0))
            b = tl.where(new, kb[None, :], tl.load(KEYS + D // 2 + tile, mask=old, other=0.0))
            z = tl.sum(a.to(tl.float32) * qa[None, :] + b.to(tl.float32) * qb[None, :], 1)
            z = tl.where(s <= place, z, float("-inf"))
            larger = tl.maximum(top, tl.max(z, 0))
            p = tl.exp(z - larger)
            less = tl.exp(top - larger)
            a = tl.where(new, va[None, :], tl.load(VALUES + tile, mask=old, other=0.0))
            b = tl.where(new, vb[None, :], tl.load(VALUES + D // 2 + tile, mask=old, other=0.0))
            ya = ya * less + tl.sum(a.to(tl.float32) * p[:, None], 0)
            yb = yb * less + tl.sum(b.to(tl.float32) * p[:, None], 0)
            whole = whole * less + tl.sum(p, 0)
            top = larger
            start += STEP
        at = (row * H + head) * SPLITS + split
        tl.store(M + at, top)
        tl.store(L + at, whole)
        tl.store(LEFT + at * D + i, ya, mask=here)
        tl.store(LEFT + at * D + D // 2 + i, yb, mask=here)


class OneToken:
    """Logits (rows, 1, V) for one new token in each row of a cache: as `GPT.forward`, but that it
    does not count the tokens. Raises ValueError if the model is of another kind."""

    def __init__(self, model: GPT, cache):
        c = model.config
        kinds = {type(m).__module__ for m in model.modules()}
        ours = all(name in OURS or name.startswith("torch.nn.") for name in kinds)
        if not ours or any("forward" in vars(m) for m in model.modules()):
            raise ValueError(f"a model of {kinds}, or one that was changed")
        widest = max(c.n_embd, c.mlp_dim, c.n_head * c.head_dim)
        if len(cache.lengths) > ROWS or c.head_dim % 2 or widest > WIDEST:
            raise ValueError("no kernels for that shape")
        self.model, self.config, self.place = model, c, None
        device, dtype, size = cache.k.device, cache.k.dtype, cache.k.size(3)
        self.span = span(size)
        splits = triton.cdiv(size, self.span)
        shape = len(cache.lengths), c.n_head, splits
        self.values = torch.empty(*shape, c.head_dim, device=device)
        self.top, self.whole = torch.empty(shape, device=device), torch.empty(shape, device=device)
        self.cos = self.sin = None
        if c.position == "rotary":
            angles = rotary(torch.arange(size, device=device), c)
            self.cos, self.sin = (z.to(dtype).float() for z in angles)  # (size, D/2)
        self.joined = [qkv(block.attn) for block in model.blocks]

    def __call__(self, tokens: Tensor, cache) -> Tensor:
        model, self.place = self.model, cache.place
        x = model.wte(tokens)  # (rows, 1, C)
        if self.cos is None:
            x = x + model.wpe(cache.place)
        x = model.embed_norm(x)[:, 0]
        for block, wqkv in zip(model.blocks, self.joined, strict=True):
            attn, mlp = block.attn, block.mlp
            self.attend(attn, product(x, wqkv, norm_of(block.attn_norm)), cache)
            x = product(self, attn.wo, rest=x)
            y = product(x, mlp.up, norm_of(block.mlp_norm), ACTIVATIONS[mlp.activation], mlp.gate)
            x = product(y, mlp.down, rest=x)
        cap = model.head.cap or None
        return product(x, head(model), norm_of(model.norm), cap=cap, out=torch.float32)[:, None]

    def attend(self, attn: Attention, new: Tensor, cache) -> None:
        """Queries, keys and values `new` (rows, (H + 2 K) D): self.values, top and whole."""
        c, k, v = self.config, cache.k[attn.layer], cache.v[attn.layer]
        kind, q_scale, q_shift, eps = norm_of(attn.q_norm)
        _, k_scale, k_shift, _ = norm_of(attn.k_norm)
        grid = len(k) * c.n_kv_head, self.top.size(2)
        attention_kernel[grid](
            new, self.cos, self.sin, k, v, self.place, self.values, self.top, self.whole,
            q_scale, q_shift, k_scale, k_shift, eps, c.head_dim**-0.5, k.stride(0), k.stride(1),
            self.top.size(2), H=c.n_head, K=c.n_kv_head, D=c.head_dim,
            HALF=triton.next_power_of_2(c.head_dim // 2), NORM=kind, SPAN=self.span,
            STEP=min(64, self.span),
        )  # fmt: skip


def product(
    x, layer: nn.Module, norm: tuple = ("", None, None, 0.0), activation: str = "", gate=None,
    rest: Tensor | None = None, cap: float | None = None, out: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """The activation of norm(x) W^T + b, + rest: (rows, N). Of OneToken as `x` (else rows, C) it
    takes what `attend` left."""
    weight, bias = matrix(layer)
    (N, C), (kind, scale, shift, eps) = weight.shape, norm
    left, D, splits, look = (None,) * 4, 1, 1, 1
    if isinstance(x, Tensor):
        rows = len(x)
    else:
        left = x.values, x.top, x.whole, x.place
        rows, _, splits, D = x.values.shape
        x, look = None, x.span
    y = torch.empty(rows, N, device=weight.device, dtype=out or weight.dtype)
    across = triton.next_power_of_2(C)
    down, warps = tiles(N, across)
    second = (None, None) if gate is None else matrix(gate)
    product_kernel[(triton.cdiv(N, down),)](
        x, *left, scale, shift, weight, bias, *second, rest, y,
        rows, N, eps, cap, splits, C=C, D=D, SPAN=look,
        NORM=kind, ACTIVATION=activation, BN=down, BC=across,
        num_warps=warps,
    )  # fmt: skip
    return y


def tiles(N: int, across: int) -> tuple[int, int]:
    """How many rows of a matrix of N a program reads, and with how many warps (of 32 threads)."""
    return max(1, (2 * TILE if N >= MANY else TILE) // across), 8


def span(size: int) -> int:
    """How many positions a program of attention looks at, of a cache of `size`."""
    return max(SPLIT, triton.next_power_of_2(size) // 64)


def matrix(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear layer of model.py, or of one that is ready (engine/linear.py)."""
    return layer.weight if type(layer) is nn.Linear else layer.matrix, layer.bias


def qkv(attn: Attention) -> PlainLinear:
    """One layer for queries, keys and values."""
    if hasattr(attn, "wqkv"):
        return attn.wqkv
    return PlainLinear(*joined(attn))


def head(model: GPT) -> PlainLinear:
    if hasattr(model.head, "layer"):
        return model.head.layer
    own = model.wte.weight if model.head.weight is None else model.head.weight
    return PlainLinear(own, None)


def norm_of(norm: nn.Module) -> tuple:
    """Kind, weight, bias and epsilon of a norm; of none, a kind of no name."""
    if type(norm) is nn.Identity:
        return "", None, None, 0.0
    return "layer" if norm.centre else "rms", norm.weight, norm.bias, norm.eps


KNOWN: dict[str, bool] = {}  # what `agrees` has found


def agrees(config: GPTConfig, cache) -> bool:
    """Whether the kernels compute what the book does for a model of this shape and a cache like
    this one. As the parts of engine/fast.py, they may be twice as far from float32 as the book is
    in the type of the model."""
    device, dtype, rows = cache.k.device, cache.k.dtype, len(cache.lengths)
    look = span(cache.k.size(3))
    key = f"{config} {device} {dtype} {rows} {look}"
    if key not in KNOWN:
        KNOWN[key] = False  # also if it fails
        with torch.inference_mode():
            KNOWN[key] = error(config, device, dtype, rows, look) <= 1
    return KNOWN[key]


def error(
    config: GPTConfig, device: torch.device, dtype: torch.dtype, rows: int, look: int
) -> float:
    """How far the logits are from those of float32, in units of what is allowed.

    All layers, with the weights of one, read two tokens: at the beginning, and where a second
    program of attention has to look. The second token sees what the first has left in the cache.
    """
    c = replace(config, vocab_size=min(config.vocab_size, 509), dropout=0.0)
    g = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        book = GPT(c).eval()
    alike = {name: re.sub(r"^blocks\.\d+", "blocks.0", name) for name in book.state_dict()}
    weights = {}
    for name, p in book.state_dict().items():
        if alike[name] == name:
            mean, std = (0.0, 2 * p.size(-1) ** -0.5) if p.ndim > 1 else (1.0, 0.3)
            weights[name] = torch.empty(p.shape, device=device).normal_(mean, std, generator=g)
    size = min(c.block_size, look + 10)
    places = torch.tensor([(size - 2, min(3, size - 2))[row % 2] for row in range(rows)])
    tokens = torch.arange(rows, device=device)[:, None] * 7 % c.vocab_size  # (rows, 1)
    found = []
    for kind, quick in ((torch.float32, False), (dtype, False), (dtype, True)):
        cast = {name: p.to(kind) for name, p in weights.items()}
        book.load_state_dict({name: cast[one] for name, one in alike.items()}, assign=True)
        cache = KVCache(c, rows, device, kind, size)
        for z in (cache.k, cache.v):
            z.copy_(torch.empty(z.shape, device=device).normal_(generator=g.manual_seed(1)))
        step = OneToken(book, cache) if quick else book
        for at in (places, places + 1):
            cache.lengths.copy_(at)
            cache.place = at[:, None].to(device)
            logits = step(tokens, cache=cache).float()
        found.append(logits)
    true, slow, quick = found
    rounding = max(1e-4, 2 * torch.finfo(dtype).eps) * rms(true)
    return rms(quick - true) / (2 * rms(slow - true) + rounding)
