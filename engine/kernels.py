"""The loss behind the head on a GPU, in two kernels written in Triton (a language of kernels that
the compiler of torch speaks, too). Each reads the logits once, as the product has left them.

The vocabulary V is padded to Vp, a multiple of 64, as tensor cores want it, and is never sliced:
what is read in blocks of 16 bytes takes half the time of what begins anywhere. So a load is bounded
by Vp, and what lies behind V is left out afterwards.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model import IGNORE

BLOCK = 4096  # columns at once; no other size was tried on a GPU
A_WARP = 512  # columns of its 32 threads: 16 each, so 8 warps
NONE = tl.constexpr(IGNORE)  # a target that does not count


@triton.jit
def softcap(z, cap, CAPPED: tl.constexpr):
    """cap * tanh(z / cap), if there is a cap."""
    if CAPPED:
        z = 2 * cap * tl.sigmoid(z * (2 / cap)) - cap
    return z


@triton.jit
def loss_kernel(
    Z, Y, NATS, LSE, V, cap, smoothing,
    Vp: tl.constexpr, CAPPED: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row: each lane keeps the largest logit that it has seen, and its sum of e^(z - largest).
    Of z and the largest before, one is the new largest: a single e^x serves both cases."""
    row = tl.program_id(0).to(tl.int64)  # row * Vp may exceed 2^31
    Z += row * Vp
    largest = tl.full((BLOCK,), -3e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    logit_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, Vp, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = softcap(tl.load(Z + at, mask=at < Vp, other=0.0).to(tl.float32), cap, CAPPED)
        if SMOOTH:
            logit_sum += tl.where(at < V, z, 0.0)
        z = tl.where(at < V, z, float("-inf"))
        e = tl.exp(-tl.abs(z - largest))
        total = tl.where(z > largest, total * e + 1, total + e)
        largest = tl.maximum(largest, z)
    top = tl.max(largest, 0)
    lse = top + tl.log(tl.sum(total * tl.exp(largest - top), 0))
    y = tl.load(Y + row)
    known = (y >= 0) & (y < V)
    at_target = softcap(tl.load(Z + y, mask=known, other=0.0).to(tl.float32), cap, CAPPED)
    nats = lse - (1 - smoothing) * tl.where(known, at_target, float("nan"))  # nan: no such token
    if SMOOTH:
        nats -= smoothing * tl.sum(logit_sum, 0) / V
    tl.store(NATS + row, tl.where(y == NONE, 0.0, nats))
    tl.store(LSE + row, lse)


@triton.jit
def gradient_kernel(
    Z, Y, LSE, G, D, V, cap, smoothing,
    Vp: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of g (softmax - target), times the slope of the cap: 1 - tanh^2. D may be Z."""
    row = tl.program_id(0).to(tl.int64)
    Z += row * Vp
    D += row * Vp
    y, lse, g = tl.load(Y + row), tl.load(LSE + row), tl.load(G + row)
    target = y.to(tl.int32)
    for start in range(0, Vp, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = softcap(tl.load(Z + at, mask=at < Vp, other=0.0).to(tl.float32), cap, CAPPED)
        d = tl.exp(z - lse) - smoothing / V
        d = g * tl.where(at == target, d - (1 - smoothing), d)
        if CAPPED:
            d *= 1 - (z * (1 / cap)) * (z * (1 / cap))
        d = tl.where((at < V) & (y != NONE), d, 0.0)
        tl.store(D + at, d.to(D.dtype.element_ty), mask=at < Vp)


def launch(kernel, z: Tensor, *more, **flags) -> None:
    """One program for each row of z (N, Vp). RuntimeError where Triton makes none: as the other
    kernels of torch, for `agreeing`."""
    block = min(BLOCK, triton.next_power_of_2(z.size(1)))
    size = dict(Vp=z.size(1), BLOCK=block, num_warps=max(1, block // A_WARP))
    try:
        with torch.cuda.device_of(z):
            kernel[(z.size(0),)](z, *more, **flags, **size)
    except RuntimeError:
        raise
    except Exception as error:  # of Triton, ptxas, the C compiler
        raise RuntimeError(f"no kernel by Triton: {error}") from error


# to torch.compile each is one operation, whose inside is none of its business
@torch.library.custom_op("nutshell::token_losses", mutates_args=())
def token_losses(
    z: Tensor, targets: Tensor, V: int, cap: float, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Of logits (N, Vp), before the cap, and targets (N): -ln p(target), and ln sum e^z."""
    nats, lse = (z.new_empty(z.size(0), dtype=torch.float32) for _ in range(2))
    flags = dict(CAPPED=cap > 0, SMOOTH=smoothing > 0)
    shape = V, float(cap), float(smoothing)
    launch(loss_kernel, z.contiguous(), targets.contiguous(), nats, lse, *shape, **flags)
    return nats, lse


def fill(d: Tensor, z: Tensor, targets: Tensor, lse, g: Tensor, V: int, cap, smoothing) -> Tensor:
    """The gradient of logits z (N, Vp), written to d, which may be z; g (N) is that of losses."""
    more = targets.contiguous(), lse, g.contiguous(), d, V, float(cap), float(smoothing)
    launch(gradient_kernel, z, *more, CAPPED=cap > 0)
    return d


@torch.library.custom_op("nutshell::logit_gradients", mutates_args=())
def logit_gradients(
    z: Tensor, targets: Tensor, lse: Tensor, g: Tensor, V: int, cap: float, smoothing: float
) -> Tensor:
    z = z.contiguous()
    return fill(torch.empty_like(z), z, targets, lse, g, V, cap, smoothing)


@token_losses.register_fake
def _(z, targets, V, cap, smoothing):
    return tuple(z.new_empty(z.size(0), dtype=torch.float32) for _ in range(2))


@logit_gradients.register_fake
def _(z, targets, lse, g, V, cap, smoothing):
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def keep(ctx, inputs: tuple, output: tuple) -> None:
    z, targets, *ctx.options = inputs
    ctx.save_for_backward(z, targets, output[1])


def backward(ctx, g: Tensor, _) -> tuple:
    return logit_gradients(*ctx.saved_tensors, g, *ctx.options), None, None, None, None


token_losses.register_autograd(backward, setup_context=keep)


def add_loss(
    loss: Tensor, z: Tensor, targets: Tensor, V: int, cap: float, smoothing: float, learn: bool
) -> None:
    """`add_loss` of gradients.py for logits (N, Vp) of the type of products."""
    nats, lse = token_losses(z, targets, V, cap, smoothing)
    loss += nats.sum()
    if learn:
        fill(z, z, targets, lse, torch.ones_like(lse), V, cap, smoothing)
