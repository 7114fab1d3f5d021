"""Fast parts: what computes the same as a module of the book, model.py or canon.py, in less time.

A part is a subclass that computes in another way and holds nothing more; `install` gives it to the
modules of a model by setting their class, so parameters, names and hooks stay. The book is the
reference: a part is used only if it agrees with it when a run starts (engine/agreement.py), so
whoever edits the book is obeyed on every device. docs/speed.md has the figures.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from canon import Canon
from engine.agreement import SHORT, largest_error, same_in_all_layers
from engine.gradients import (
    ActivatedLinear,
    PiecewiseCrossEntropy,
    RMSNormalise,
    ShortAttention,
    ShortConvolution,
    has_kernels,
    padded,
    working_type,
)
from engine.machine import Machine
from model import IGNORE, MLP, Attention, Head, Norm, gelu, relu2
from shape import GPTConfig


class FastEmbedding(nn.Embedding):
    """Vectors in the type of the products, so that the residual stream needs no casts."""

    def forward(self, ids: Tensor) -> Tensor:
        x = super().forward(ids)
        return x.to(working_type(x))


class FastNorm(Norm):
    """The fused kernels, and the gradient of engine/gradients.py on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if self.centre:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        if x.device.type != "cpu":
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        # a weight in float32 would widen all that follows: a step 1.5 times as long in bfloat16
        weight = None if self.weight is None else self.weight.to(x.dtype)
        if not torch.is_grad_enabled():
            return F.rms_norm(x, x.shape[-1:], weight, self.eps)
        x = RMSNormalise.apply(x, self.eps)
        return x if weight is None else x * weight


class FastCanon(Canon):
    """In place, where a text is read whole."""

    def forward(self, x: Tensor, mask: Tensor | None, cache) -> Tensor:
        if cache is not None or torch.compiler.is_compiling():
            return super().forward(x, mask, cache)
        return ShortConvolution.apply(x, mask, self.weight)


def hooked(module: nn.Module) -> bool:
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def untouched(layer: nn.Module) -> bool:
    """Whether it is no layer of somebody's own, and has no hook."""
    return type(layer) is nn.Linear and not hooked(layer)


def joined(attn: Attention, arrange=lambda w: w) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of one layer for queries, keys and values, the first two `arrange`d."""
    q, k, v = attn.wq, attn.wk, attn.wv
    bias = None
    if q.bias is not None:
        bias = torch.cat((arrange(q.bias), arrange(k.bias), v.bias))
    return torch.cat((arrange(q.weight), arrange(k.weight), v.weight)), bias


def plain_rms_norm(norm: nn.Module) -> bool:
    """Whether a norm of queries or keys has no weight and no mean, and no hook."""
    plain = type(norm) is FastNorm and not norm.centre and norm.weight is None
    return plain and not hooked(norm)


class FastAttention(Attention):
    """One product for queries, keys and values; the fused kernel, or a faster one on a CPU."""

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values of x (B, T, C), side by side: (B, T, (H + 2 K) D)."""
        layers = (self.wq, self.wk, self.wv)
        if not all(map(untouched, layers)):
            return torch.cat([w(x) for w in layers], dim=-1)
        return F.linear(x, *joined(self))

    def forward(self, x, rope, mask, cache) -> Tensor:
        if self.training and self.drop.p:  # where dropout falls is the book's to say
            return super().forward(x, rope, mask, cache)
        if cache is None and rope is not None and self.has_short_form(x):
            return self.wo(self.short_form(x, rope, mask))
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
        y = self.attend(q, k, v, mask, cache)
        return self.wo(y.transpose(1, 2).reshape(B, T, -1).to(x.dtype))  # (B, T, C)

    def has_short_form(self, x: Tensor) -> bool:
        """Whether `ShortAttention` does the same for x (B, T, C), and is the faster."""
        if torch.compiler.is_compiling():
            return False
        longest = SHORT if working_type(x).itemsize == 2 else SHORT // 2
        return (
            type(self) is FastAttention
            and x.device.type == "cpu"
            and 1 < x.size(1) <= longest
            and all(map(untouched, (self.wq, self.wk, self.wv)))
            and all(map(plain_rms_norm, (self.q_norm, self.k_norm)))
            and self.q_norm.eps == self.k_norm.eps
        )

    def short_form(self, x: Tensor, rope, mask: Tensor | None) -> Tensor:
        """All between the products: (B, T, C) to (B, T, H D)."""
        c = self.config

        def arrange(w: Tensor) -> Tensor:
            """Rows i and i + D/2 of each head, which are turned together, side by side."""
            return w.unflatten(0, (-1, 2, c.head_dim // 2)).transpose(1, 2).flatten(0, 2)

        qkv = F.linear(x, *joined(self, arrange))
        angles = torch.complex(*rope).unsqueeze(-2)  # (T, 1, D/2), or (B, T, 1, D/2)
        return ShortAttention.apply(qkv, angles, mask, c.n_head, c.n_kv_head, self.q_norm.eps)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cache) -> Tensor:
        """Attention of q (B, H, T, D) to k and v (B, K, T, D) and what the cache has: as q."""
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, K, S, D)
        return attend(q.to(k.dtype), k, v, mask)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` of model.py with fewer and larger steps: roll swaps the two halves."""
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for q (B, H, T, D) and k, v (B, K, S, D): (B, H, T, D)."""
    (B, H, T, D), K, S = q.shape, k.size(1), k.size(2)
    if q.device.type == "cpu" and 1 < T == S <= SHORT and q.dtype != torch.float32:
        # the fused kernel's bfloat16 gradient takes 2 to 7 times as long
        k = k.repeat_interleave(H // K, dim=1)
        v = v.repeat_interleave(H // K, dim=1)
        q, k, v = (z.reshape(B * H, T, D) for z in (q, k, v))
        if mask is None:
            hidden = torch.full((T, T), -torch.inf, dtype=q.dtype).triu(1)
        else:
            hidden = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -torch.inf)
            hidden = hidden.expand(B, H, T, T).reshape(B * H, T, T)
        score = torch.baddbmm(hidden, q, k.mT, alpha=D**-0.5)  # (B*H, T, T)
        return (score.softmax(dim=-1) @ v).view(B, H, T, D)
    if mask is None and 1 < T < S:  # several new positions behind stored ones
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if T == 1:  # the heads that share keys become the rows of one product
        q = q.reshape(B, K, H // K, D)
        if mask is not None and q.device.type == "cpu":  # a recorded step does it once for all
            mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    causal = mask is None and T > 1  # a single new position may look at all before it
    kind = dict(is_causal=causal, enable_gqa=q.size(1) != K)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **kind)
    return y.reshape(B, H, T, D)


class FastMLP(MLP):
    """Of the wide layer in the middle, half of what autograd would keep."""

    def forward(self, x: Tensor) -> Tensor:
        if self.activation not in (gelu, relu2, F.silu):
            raise ValueError("no fast form of that activation")  # so `agreeing` leaves it out
        if (
            not (untouched(self.down) and self.gate is None and torch.is_grad_enabled())
            or torch.compiler.is_compiling()
        ):
            return super().forward(x)
        down = self.down
        return ActivatedLinear.apply(self.up(x), down.weight, down.bias, self.activation)


class FastHead(Head):
    """A vocabulary padded for tensor cores, a cap without tanh, the loss in pieces."""

    def product(self, x: Tensor, table: Tensor) -> Tensor:
        weight = table if self.weight is None else self.weight  # (V, C)
        if x.is_cuda and x.size(-2) > 1:  # tensor cores want a multiple of 64
            weight = padded(weight, weight.dtype)  # never stored
        return F.linear(x, weight)[..., : table.size(0)].float()

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        logits, cap = self.product(x, table), self.cap
        # the same as cap * tanh(logits / cap); tanh is several times slower on a CPU
        return 2 * cap * torch.sigmoid(logits * (2 / cap)) - cap if cap else logits

    def cross_entropy(self, x, targets, table, reduction, smoothing) -> Tensor:
        """In pieces, but for float16, whose small gradients need scaling first. Whole where kernels
        are compiled: on a GPU by our own, elsewhere by the compiler's, which join these steps."""
        weight = table if self.weight is None else self.weight
        whole = torch.compiler.is_compiling()
        book = (whole and not has_kernels(x)) or working_type(x) == torch.float16
        if reduction == "none" or book:
            return super().cross_entropy(x, targets, table, reduction, smoothing)
        x, targets = x.flatten(0, -2), targets.flatten()
        asked = targets != IGNORE
        if not (whole or x.is_cuda or asked.all()):  # of rows about half, and this product is large
            x, targets = x[asked], targets[asked]
        if whole:
            from engine.kernels import token_losses

            dtype = working_type(x)
            logits = F.linear(x.to(dtype), padded(weight, dtype))  # (N, Vp), and never sliced
            loss = token_losses(logits, targets, weight.size(0), self.cap, smoothing)[0].sum()
        else:
            if not torch.is_grad_enabled():
                x, weight = x.detach(), weight.detach()  # a Function would prepare for gradients
            loss = PiecewiseCrossEntropy.apply(x, weight, targets, self.cap, smoothing)
        return loss / (targets != IGNORE).sum() if reduction == "mean" else loss


PARTS = {  # name: the module of the book, what may take its place
    "embedding": (nn.Embedding, FastEmbedding),
    "norm": (Norm, FastNorm),
    "canon": (Canon, FastCanon),
    "attention": (Attention, FastAttention),
    "mlp": (MLP, FastMLP),
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
        here.say("fast=false: model.py and canon.py compute everything themselves")
        return
    names = agreeing(model.config, here.device, here.dtype) if here.rank == 0 else []
    chosen = sum(1 << i for i, name in enumerate(PARTS) if name in names)
    chosen = int(here.from_first(chosen))
    names = [name for i, name in enumerate(PARTS) if chosen >> i & 1]
    for name in [name for name in PARTS if name not in names]:
        book = "canon.py" if name == "canon" else "model.py"
        here.say(f"{name} was changed, or has no fast form here: {book} computes it itself")
    had = (before or {}).get("fast") or names  # none: it was begun with fast=false
    install(model, [name for name in names if name in had])


def agreeing(
    config: GPTConfig, device: torch.device, dtype: torch.dtype, training: bool = True
) -> list[str]:
    """The parts that agree with the reference for this shape, on this device, in this type.

    While `training`, `dtype` is that of autocast, and gradients are compared too; else weights have
    it. A part may be twice as far from the reference in float32 as the reference in that type is.
    """
    names, parts = [], {}
    for name, (reference, part) in PARTS.items():
        try:
            trials = [{reference: part}]
            if name == "attention":  # has norms in it, and a short form if they are fast ones
                trials.append(parts | trials[0])
            like = (config, device, dtype, training)
            agrees = all(largest_error(reference, some, *like) <= 1 for some in trials)
            agrees &= name != "attention" or same_in_all_layers(config)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception:
            agrees = False  # changed beyond comparison, or there is no such kernel here
        if agrees:
            names.append(name)
            parts[reference] = part
    return names
