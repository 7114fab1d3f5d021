"""Functions whose gradients are written out, since autograd would keep more, or take longer.

Of a batch of 4 x 256 tokens in GPT-2's smallest shape, autograd keeps 12 MB in each layer for the
activation beside its input, and 206 MB of logits, their softmax and their gradient for the loss.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.machine import no_triton
from model import IGNORE, gelu

PIECE = 2**20  # numbers that are worked on between products: 4 MB, which stay in the cache
ROWS = 512  # of logits in a product: with fewer, adding up the head's gradient takes longest
GPU_PIECE = 2**28  # a GPU wants large products: 1 GB
TRITON = not no_triton()


def working_type(x: Tensor) -> torch.dtype:
    """The type of matrix products: that of autocast, where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class RMSNormalise(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) over the last dimension, with the gradient written out.

    On a CPU, F.rms_norm is a chain of small kernels, and so is its gradient: twice the time.
    """

    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:
        scale = scale_of(x, eps).to(x.dtype)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        y, scale = ctx.saved_tensors
        along = (g * y).mean(dim=-1, keepdim=True)  # moving x along itself changes nothing
        return torch.addcmul(g, y, along, value=-1).mul_(scale), None


def scale_of(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of x (..., D): (..., 1), float32."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return length.square_().div_(x.size(-1)).add_(eps).rsqrt_()


class ShortAttention(torch.autograd.Function):
    """`Attention` of model.py between its products, for short texts read whole: norm and rotation
    of queries and keys, weights, and the sum of values.

    Autograd would keep ten tensors of the size of q, and go through each several times; this keeps
    the weights of all heads (H B, T, T) and three. A complex number turns a pair of channels, i and
    i + D/2 in model.py, in one pass: here they have to stand side by side.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, turn: Tensor, mask: Tensor | None, H: int, K: int, eps: float):
        """qkv (B, T, (H + 2 K) D) to (B, T, H D). `turn` (T, 1, D/2) or (B, T, 1, D/2) are e^(i a)
        for angles a; `mask` (T, T) or (B, 1, T, T) is as in model.py, `eps` that of the norm."""
        (B, T, _), D, dtype = qkv.shape, qkv.size(-1) // (H + 2 * K), qkv.dtype
        qkv = qkv.view(B, T, -1, D)
        scale = scale_of(qkv[:, :, :-K], eps)
        x = qkv.new_empty(H + 2 * K, B, T, D)  # a head at a time, as products want them
        rows = x.permute(1, 2, 0, 3)
        turned(qkv[:, :, :-K], turn, scale, rows[:, :, :-K])
        rows[:, :, -K:] = qkv[:, :, -K:]
        q, k, v = of_heads(x, H, K)
        if mask is None:  # causal
            hidden = torch.full((T, T), -torch.inf, dtype=dtype).triu(1)
        else:
            hidden = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)
        p = qkv.new_empty(H, B, T, T).copy_(hidden.expand(B, 1, T, T).transpose(0, 1))
        p = p.flatten(0, 1).baddbmm_(q, k.mT, alpha=D**-0.5)
        y = torch.bmm(torch.softmax(p, dim=-1, out=p), v)
        ctx.save_for_backward(x, p, turn, scale)
        ctx.heads = H, K
        return y.view(H, B, T, D).permute(1, 2, 0, 3).flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, p, turn, scale = ctx.saved_tensors
        (H, K), (_, B, T, D) = ctx.heads, x.shape
        q, k, v = of_heads(x, H, K)
        g = g.view(B, T, H, D).permute(2, 0, 1, 3).flatten(0, 1)  # (H B, T, D)
        ds = torch.bmm(g, v.mT)
        torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)
        d = torch.empty_like(x)
        for some, a, b in ((d[:H], ds, k), (d[H:-K], ds.mT, q), (d[-K:], p.mT, g)):
            if len(some) == H:
                torch.bmm(a, b, out=some.flatten(0, 1))
            else:  # a sum over the queries that share keys
                some.copy_(torch.bmm(a, b).view(K, -1, B, T, D).sum(dim=1))
        # the norm's gradient, as in RMSNormalise, before it is turned back: turning keeps lengths
        along = (d[:-K] * x[:-K]).mean(dim=-1, keepdim=True)
        d[:-K].addcmul_(x[:-K], along, value=-1)
        dx, rows = g.new_empty(B, T, H + 2 * K, D), d.permute(1, 2, 0, 3)
        turned(rows[:, :, :-K], turn.conj(), D**-0.5 * scale, dx[:, :, :-K])
        dx[:, :, -K:] = rows[:, :, -K:]
        return dx.flatten(2), None, None, None, None, None


def turned(x: Tensor, turn: Tensor, scale: Tensor, out: Tensor) -> None:
    """Queries and keys x (B, T, heads, D), turned and then scaled, into `out`."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    torch.mul(torch.view_as_real(pairs * turn).flatten(-2), scale, out=out)


def of_heads(x: Tensor, H: int, K: int) -> Iterator[Tensor]:
    """Queries, keys and values of x (H + 2 K, B, T, D), for each head of queries: (H B, T, D)."""
    for z in x.split([H, K, K]):
        yield z[:, None].expand(-1, H // len(z), -1, -1, -1).flatten(0, 2)


class ShortConvolution(torch.autograd.Function):
    """`Canon` of canon.py for texts read whole: in place, and nothing kept but its input."""

    @staticmethod
    def forward(ctx, x: Tensor, mask: Tensor | None, weight: Tensor) -> Tensor:
        """x (B, T, C), mask (T, T) or (B, 1, T, T), and weight (reach, C): of 1, 2, ... before."""
        ctx.save_for_backward(x, mask, weight)
        y = x.clone()
        for i, share in enumerate(weight.to(x.dtype)[: x.size(1) - 1], start=1):
            y[:, i:].addcmul_(seen(x[:, :-i], mask, i), share)
        return y

    @staticmethod
    def backward(ctx, g: Tensor):
        x, mask, weight = ctx.saved_tensors
        dx, dw = g.clone(), torch.zeros_like(weight)
        for i, share in enumerate(weight.to(x.dtype)[: x.size(1) - 1], start=1):
            later = seen(g[:, i:], mask, i)
            dx[:, :-i].addcmul_(later, share)
            dw[i - 1] = (later * x[:, :-i]).sum(dim=(0, 1), dtype=torch.float32)
        return dx, None, dw


def seen(x: Tensor, mask: Tensor | None, i: int) -> Tensor:
    """x (B, T - i, C), and 0 where a position may not look at that of i places before."""
    if mask is None:
        return x
    return x * mask.reshape(-1, *mask.shape[-2:]).diagonal(-i, 1, 2)[..., None]


class ActivatedLinear(torch.autograd.Function):
    """linear(activation(x)), for GELU or ReLU^2. What the activation gives is made again in the
    backward pass, which is cheaper than to keep it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, activation) -> Tensor:
        """x (..., inputs) to (..., outputs)."""
        ctx.activation = activation
        if activation is not gelu:
            x = x.relu()
        ctx.save_for_backward(x, weight)
        return F.linear(gelu(x) if activation is gelu else x * x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, weight = ctx.saved_tensors
        _, wants_weight, wants_bias, _ = ctx.needs_input_grad
        rows, flat = g.flatten(0, -2), x.flatten(0, -2)  # (N, outputs), (N, inputs)
        dw = None
        if ctx.activation is gelu:
            da = rows @ weight.to(g.dtype)
            dx = torch.ops.aten.gelu_backward(da, flat, approximate="tanh")
        else:  # relu(x)^2, whose derivative is 2 relu(x)
            dx = (rows @ (2 * weight).to(g.dtype)).mul_(flat)
        if wants_weight:
            a = gelu(flat) if ctx.activation is gelu else flat * flat
            dw = (rows.mT @ a).to(weight.dtype)
        db = rows.sum(dim=0).to(weight.dtype) if wants_bias else None
        return dx.view(x.shape), dw, db, None


class PiecewiseCrossEntropy(torch.autograd.Function):
    """The sum over targets; `cap` is that of `Head`, `smoothing` that of F.cross_entropy.

    The gradient of the loss with respect to logits is known as soon as they are: softmax(logits)
    less the target. So a piece of them can be made, used for all three products (logits, the
    gradients of the states and of the weight) and forgotten; the logits of a large batch never
    stand in memory. Liger Kernel (arXiv:2410.10989) does so on GPUs.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, cap: float, smoothing: float):
        """States (N, C), weight (V, C), targets (N) to one number."""
        ctx.save_for_backward(x, weight, targets)
        ctx.options = cap, smoothing
        loss, *ctx.gradients = in_pieces(x, weight, targets, cap, smoothing, ctx.needs_input_grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        if ctx.gradients is None:  # a second time through a graph that was retained
            wanted = ctx.needs_input_grad
            _, *ctx.gradients = in_pieces(*ctx.saved_tensors, *ctx.options, wanted)
        found, ctx.gradients = ctx.gradients, None  # given away: torch need not copy them
        return *(z if z is None else z.mul_(g) for z in found), None, None, None


def has_kernels(x: Tensor) -> bool:
    """Whether engine/kernels.py, which is imported only then, has the loss behind states x."""
    return x.is_cuda and TRITON and working_type(x) in (torch.bfloat16, torch.float32)


def padded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight (V, C) for tensor cores, which want a multiple of 64 rows: with rows of zeros."""
    return F.pad(weight.to(dtype), (0, 0, 0, -weight.size(0) % 64))


def in_pieces(x, weight, targets, cap: float, smoothing: float, wanted) -> tuple:
    """The loss, and the gradients of x and weight if `wanted`: like these, or None."""
    (N, C), V = x.shape, weight.size(0)
    dtype = working_type(x)
    if own := has_kernels(x):
        from engine import kernels
    add = kernels.add_loss if own else add_loss
    w = padded(weight, dtype) if own else weight.to(dtype)
    loss = torch.zeros((), device=x.device)
    dx = torch.empty_like(x) if wanted[0] else None
    dw = torch.zeros_like(w, dtype=weight.dtype) if wanted[1] else None
    if own or x.is_cuda:
        rows = few = max(64, GPU_PIECE // V)
        part = len(w)
    else:
        few, part = max(torch.get_num_threads(), PIECE // V), max(64, PIECE // C)
        rows = max(few, min(ROWS, C))  # of C rows the logits are as large as the weight
    rows = -(-N // -(-N // rows)) if N else 1  # the last are about as many
    with torch.autocast(x.device.type, enabled=False):
        for i in range(0, N, rows):
            h, y = x[i : i + rows].to(dtype), targets[i : i + rows]
            g = F.linear(h, w)  # the logits, and then in their place the gradient
            for logits, t in zip(g.split(few), y.split(few), strict=True):
                add(loss, logits, t, V, cap, smoothing, any(wanted[:2]))
            if dx is not None:
                dx[i : i + rows] = g @ w
            if dw is not None and dw.dtype == dtype:
                dw.addmm_(g.mT, h)
            elif dw is not None:  # a product of 16 bits has to be widened first
                for some, of_some in zip(dw.split(part), g.split(part, dim=1), strict=True):
                    some += of_some.mT @ h
    return loss, dx, dw if dw is None else dw[:V]


def add_loss(
    loss: Tensor, logits: Tensor, y: Tensor, V: int, cap: float, smoothing: float, learn: bool
) -> None:
    """Adds to `loss` that of `logits` (n, V), before the cap, and targets y (n). The gradient takes
    their place, if it should `learn`; they are lost."""
    z = logits.float()
    if cap:  # cap * tanh(z / cap) = 2 cap s - cap; what is subtracted changes no probability
        s = z.mul_(2 / cap).sigmoid_()
        z = s * (2 * cap)
    at_target, known = y[:, None].clamp(min=0), (y != IGNORE)[:, None]  # (n, 1) both
    wanted = (1 - smoothing) * z.gather(-1, at_target)
    if smoothing:
        wanted += smoothing * z.mean(dim=-1, keepdim=True)
    if not 0 < cap <= 30:  # or e^z could overflow
        top = z.amax(dim=-1, keepdim=True)
        wanted -= top
        z.sub_(top)
    e = z.exp_()  # softmax in steps: ln p then comes from its sum, and not from p, which may be 0
    whole = e.sum(dim=-1, keepdim=True)
    ln_p = wanted - whole.log()
    loss -= ln_p.masked_fill(~known, 0).sum()
    if not learn:
        return
    g = e.mul_(1 / whole)  # the gradient of the logits: softmax less the target
    g.scatter_add_(1, at_target, torch.full_like(ln_p, smoothing - 1))
    if smoothing:
        g -= smoothing / V
    if cap:
        g *= 4 * known  # by the chain rule: 2 cap, times s (1 - s), below, times 2 / cap
        g = torch.ops.aten.sigmoid_backward.grad_input(g, s, grad_input=s)  # often `logits` itself
    elif not known.all():
        g *= known
    logits.copy_(g)
