"""Fast parts: what computes the same as a module of model.py, in less time.

A part is a subclass that overrides `forward` and nothing else; `install` gives it to the modules of
a model by setting their class, so parameters, names and hooks stay. model.py is the reference: a
part is used only if it agrees with it when a run starts (`agreeing`), so whoever edits model.py is
obeyed on every device. docs/speed.md has the figures.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.machine import Machine
from model import Attention, Head, KVCache, Norm, rotary
from shape import GPTConfig

SHORT = 512  # longest context for which plain products beat the fused kernel on a CPU


class FastEmbedding(nn.Embedding):
    """Vectors in the type of the products, so that the residual stream needs no casts."""

    def forward(self, ids: Tensor) -> Tensor:
        x = super().forward(ids)
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        return x


class RMSNormalise(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) over the last dimension, with the gradient written out.

    On a CPU, F.rms_norm is a chain of small kernels, and so is its gradient: twice the time.
    """

    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (length.square() / x.size(-1) + eps).rsqrt().to(x.dtype)  # (..., 1)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, g: Tensor):
        y, scale = ctx.saved_tensors
        along = (g * y).mean(dim=-1, keepdim=True)  # moving x along itself changes nothing
        return torch.addcmul(g, y, along, value=-1) * scale, None


class FastNorm(Norm):
    """The fused kernels, and the gradient above on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if self.centre:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        if x.device.type != "cpu":
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        x = RMSNormalise.apply(x, self.eps)
        return x if self.weight is None else x * self.weight


class FastAttention(Attention):
    """One product for queries, keys and values; the fused kernel, or a faster one on a CPU."""

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values of x (B, T, C), side by side: (B, T, (H + 2 K) D)."""
        layers = (self.wq, self.wk, self.wv)
        if any(type(w) is not nn.Linear or w._forward_hooks for w in layers):
            return torch.cat([w(x) for w in layers], dim=-1)  # somebody's own layers, or a hook
        bias = None if self.wq.bias is None else torch.cat([w.bias for w in layers])
        return F.linear(x, torch.cat([w.weight for w in layers]), bias)

    def forward(self, x, rope, mask, cache) -> Tensor:
        if self.training and self.drop.p:  # where dropout falls is the book's to say
            return super().forward(x, rope, mask, cache)
        B, T, _ = x.shape
        H, K, D = self.config.n_head, self.config.n_kv_head, self.config.head_dim
        q, k, v = self.project(x).view(B, T, -1, D).split([H, K, K], dim=2)
        q = self.q_norm(q)  # (B, T, H, D)
        k = self.k_norm(k)  # (B, T, K, D)
        if rope is not None:
            cos, sin = (z.unsqueeze(-2).to(x.dtype) for z in rope)  # (T, 1, D/2)
            both = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
            q = turn(q, *both)
            k = turn(k, *both)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # (B, H, T, D), (B, K, T, D) twice
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, K, S, D)
        y = attend(q.to(k.dtype), k, v, mask)
        return self.wo(y.transpose(1, 2).reshape(B, T, -1).to(x.dtype))  # (B, T, C)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` of model.py with fewer and larger steps: roll swaps the two halves."""
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for q (B, H, T, D) and k, v (B, K, S, D): (B, H, T, D)."""
    (B, H, T, D), K, S = q.shape, k.size(1), k.size(2)
    if q.device.type == "cpu" and mask is None and 1 < T == S <= SHORT:
        # the fused kernel's bfloat16 gradient takes 2 to 7 times as long
        k = k.repeat_interleave(H // K, dim=1)
        v = v.repeat_interleave(H // K, dim=1)
        q, k, v = (z.reshape(B * H, T, D) for z in (q, k, v))
        future = torch.full((T, T), -torch.inf, dtype=q.dtype).triu(1)
        score = torch.baddbmm(future, q, k.mT, alpha=D**-0.5)  # (B*H, T, T)
        return (score.softmax(dim=-1) @ v).view(B, H, T, D)
    if mask is None and 1 < T < S:  # several new positions behind stored ones
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if T == 1:  # the heads that share keys become the rows of one product
        q = q.reshape(B, K, H // K, D)
    y = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None and T > 1,  # a single new position may look at all before it
        enable_gqa=q.size(1) != K,
    )
    return y.reshape(B, H, T, D)


class FastHead(Head):
    """A vocabulary padded for tensor cores, and a cap without tanh."""

    def product(self, x: Tensor, embedding: Tensor) -> Tensor:
        weight = embedding if self.weight is None else self.weight  # (V, C)
        if x.is_cuda and x.size(-2) > 1:  # tensor cores want a multiple of 64
            weight = F.pad(weight, (0, 0, 0, -weight.size(0) % 64))  # zeros: never stored
        return F.linear(x, weight)[..., : embedding.size(0)].float()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        logits, cap = self.product(x, embedding), self.cap
        # the same as cap * tanh(logits / cap); tanh is several times slower on a CPU
        return 2 * cap * torch.sigmoid(logits * (2 / cap)) - cap if cap else logits


PARTS = {  # name: the module of model.py, what may take its place
    "embedding": (nn.Embedding, FastEmbedding),
    "norm": (Norm, FastNorm),
    "attention": (Attention, FastAttention),
    "head": (Head, FastHead),
}


def install(model: nn.Module, names: list[str]) -> None:
    """Puts the parts `names` in the place of the modules that they stand for."""
    for module in model.modules():
        for name in names:
            reference, part = PARTS[name]
            if type(module) is reference:  # not somebody's own subclass
                module.__class__ = part


def installed(model: nn.Module) -> list[str]:
    kinds = {type(module) for module in model.modules()}
    return [name for name, (_, part) in PARTS.items() if part in kinds]


def use(model: nn.Module, here: Machine, wanted: bool, before: dict | None = None) -> None:
    """Installs the parts that agree, as the first process finds for all, and names the others.

    `before` are `Run.circumstances` of a run that is resumed: no more parts than it had, so that
    the bits stay.
    """
    if not wanted:
        here.say("fast=false: model.py computes everything itself")
        return
    names = agreeing(model.config, here.device, here.dtype) if here.rank == 0 else []
    chosen = sum(1 << i for i, name in enumerate(PARTS) if name in names)
    chosen = int(here.from_first(chosen))
    names = [name for i, name in enumerate(PARTS) if chosen >> i & 1]
    for name in [name for name in PARTS if name not in names]:
        here.say(f"{name} was changed, or has no fast form here: model.py computes it itself")
    had = (before or {}).get("fast") or names  # none: it was begun with fast=false
    install(model, [name for name in names if name in had])


# --- does a part agree with the book?


def agreeing(
    config: GPTConfig, device: torch.device, dtype: torch.dtype, training: bool = True
) -> list[str]:
    """The parts that agree with the reference for this shape, on this device, in this type.

    While `training`, `dtype` is that of autocast, and gradients are compared too; else weights have
    it. A part may be twice as far from the reference in float32 as the reference in that type is.
    """
    names = []
    for name in PARTS:
        try:
            agrees = largest_error(name, config, device, dtype, training) <= 1
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, AttributeError, ValueError):
            agrees = False  # changed beyond comparison, or there is no such kernel here
        if agrees:
            names.append(name)
    return names


def largest_error(
    name: str, config: GPTConfig, device: torch.device, dtype: torch.dtype, training: bool
) -> float:
    """Of a part's outputs and gradients, in units of what is allowed."""
    g = torch.Generator().manual_seed(0)
    # one layer and few tokens, to be quick; all else is as in the model
    c = replace(config, n_layer=1, vocab_size=min(config.vocab_size, 509), dropout=0.0)
    new = {
        "embedding": lambda: nn.Embedding(c.vocab_size, c.n_embd),
        "norm": lambda: Norm(c.head_dim, c),
        "attention": lambda: Attention(c, 0),
        "head": lambda: Head(c),
    }
    module = new[name]()
    with torch.no_grad():
        for p in module.parameters():  # none is zero, or two wrong forms would agree on nothing
            mean, std = (0.0, 2 * p.size(-1) ** -0.5) if p.ndim > 1 else (1.0, 0.3)
            p.copy_(torch.empty(p.shape).normal_(mean, std, generator=g))
    module.to(device)
    reference, part = PARTS[name]
    worst = 0.0
    for call, x, with_gradients in trials(name, c, device, g, training):
        learn = training and with_gradients
        kind = torch.float32 if training and not with_gradients else dtype
        true = results(call, x, module, torch.float32, learn)
        slow = results(call, x, module, kind, learn)
        module.__class__ = part
        fast = results(call, x, module, kind, learn)
        module.__class__ = reference
        usual = max(map(rms, true))
        for t, s, f in zip(true, slow, fast, strict=True):
            size = max(rms(t), 0.1 * usual)  # a gradient that is zero has no digits to compare
            rounding = max(1e-4, 2 * torch.finfo(kind).eps) * size
            worst = max(worst, rms(f - t) / (2 * rms(s - t) + rounding))
    return worst


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def results(call: Callable, x: Tensor, module, dtype: torch.dtype, learn: bool) -> list[Tensor]:
    """What `call(module, x)` gives in `dtype`, and if asked for, all gradients; as float32."""
    if not learn:
        with torch.no_grad():
            y = call(copy.deepcopy(module).to(dtype), x if x.dtype == torch.long else x.to(dtype))
        return [y.float()]
    wanted = list(module.parameters())  # they stay float32
    if x.is_floating_point():
        x = x.to(dtype).detach().requires_grad_()
        wanted.append(x)
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        y = call(module, x).float()
    direction = torch.arange(y.numel(), device=y.device).cos().view(y.shape)
    gradients = torch.autograd.grad((y * direction).sum(), wanted, allow_unused=True)
    return [y.detach(), *(g.float() for g in gradients if g is not None)]


def trials(
    name: str, c: GPTConfig, device: torch.device, g: torch.Generator, training: bool
) -> Iterator[tuple]:
    """What a part is tried with: a call of (module, x), an x, and whether gradients count."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device)

    if name == "embedding":
        yield lambda m, x: m(x), torch.randint(c.vocab_size, (2, 7), generator=g).to(device), True
    elif name == "norm":
        for size in (1.0, 1e-3):  # in the second the small constant below the root counts, too
            yield lambda m, x: m(x), size * normal(2, 7, c.head_dim), True
    elif name == "head":
        table = normal(c.vocab_size, c.n_embd)
        for T in (1, 7):
            yield lambda m, x: m(x, table.to(x.dtype)), normal(2, T, c.n_embd), True
    else:
        yield from attention_trials(c, device, g, normal, training)


def attention_trials(
    c: GPTConfig, device: torch.device, g: torch.Generator, normal: Callable, training: bool
) -> Iterator[tuple]:
    if training and c.block_size > SHORT:  # there the long form has its turn
        T = SHORT + 1
        rope = rotary(torch.arange(T, device=device), c) if c.position == "rotary" else None
        yield lambda m, x: m(x, rope, None, None), normal(1, T, c.n_embd), True
    for T in (min(7, c.block_size), min(33, c.block_size)):
        where = torch.arange(T, device=device)
        seen = (torch.rand(2, 1, T, T, generator=g) < 0.5).to(device)
        seen |= torch.eye(T, dtype=torch.bool, device=device)
        # causal; who sees whom, for all rows and for each; positions of each row
        for at, mask in ((where, None), (where, seen[0, 0]), (where.flip(0).expand(2, T), seen)):
            rope = rotary(at, c) if c.position == "rotary" else None
            yield lambda m, x, r=rope, k=mask: m(x, r, k, None), normal(2, T, c.n_embd), True

        def in_pieces(module, x: Tensor) -> Tensor:
            """With a KV cache: a prompt, one token, and several more at once."""
            stored = torch.float32 if isinstance(module, FastAttention) else x.dtype
            cache = KVCache(c, x.size(0), device, stored, size=x.size(1) + 2)
            if x.size(1) > 7:
                cache.lengths[1:] = 2  # behind a text that is longer
            parts = []
            for piece in x.split([x.size(1) - 4, 1, 3], dim=1):
                at, mask = cache.begin(piece.size(1))
                rope = rotary(at, c) if c.position == "rotary" else None
                parts.append(module(piece, rope, mask, cache))
                cache.lengths += piece.size(1)
            return torch.cat(parts, dim=1)

        if T > 4:
            yield in_pieces, normal(2, T, c.n_embd), False
