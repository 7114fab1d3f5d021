"""Small operations of torch by numpy, for a recorded step.

On some hundred numbers an operation of torch takes 8 to 60 microseconds, whatever it computes, and
one of numpy 1 to 6. What is not known here, torch does. docs/speed.md has the figures.
"""

import numpy as np
import torch
from torch import Tensor

from engine import blas

aten = torch.ops.aten
ELEMENTWISE = {
    aten.add.Tensor: np.add,
    aten.sub.Tensor: np.subtract,
    aten.mul.Tensor: np.multiply,
    aten.neg.default: np.negative,
    aten.cos.default: np.cos,
    aten.sin.default: np.sin,
    aten.square.default: np.square,
}


def by_numpy(operation, args: tuple, kwargs: dict, out: Tensor) -> tuple | None:
    """(function, arguments, named ones) that computes the first result of an operation anew, into
    `out`, from what the arguments hold then; None if it is not known how, for such arguments."""
    make, function = MAKERS.get(operation), ELEMENTWISE.get(operation)
    if (make or function) is None or kwargs.keys() - {"memory_format"}:
        return None
    values = [v for value in args for v in (value if isinstance(value, list) else [value])]
    read = [v for v in values if isinstance(v, Tensor)]
    if operation is aten.embedding.default:
        read = read[:1]  # behind it stands whose rows
    if not all(map(suits, (*read, out))):
        return None
    if make is not None:
        return make(out, *args)
    arrays = [a.numpy() if isinstance(a, Tensor) else a for a in args]
    return function, arrays, {"out": out.numpy()}


def suits(t: Tensor) -> bool:
    kind = t.dtype == torch.float32 and t.device.type == "cpu" and t.layout == torch.strided
    return kind and t.numel() > 0 and t.dim() > 0 and not t.is_neg()


def power(out: Tensor, x: Tensor, exponent) -> tuple | None:
    return (np.square, (x.numpy(),), {"out": out.numpy()}) if exponent == 2 else None


def add_to(_, x: Tensor, number, times=1) -> tuple:
    return np.add, (x.numpy(), number * times), {"out": x.numpy()}


def relu(out: Tensor, x: Tensor) -> tuple:
    return np.maximum, (x.numpy(), np.float32(0)), {"out": out.numpy()}


def clone(out: Tensor, x: Tensor) -> tuple:
    return np.copyto, (out.numpy(), x.numpy()), {}


def cat(out: Tensor, parts: list[Tensor], dim: int = 0) -> tuple:
    return np.concatenate, ([part.numpy() for part in parts], dim, out.numpy()), {}


def roll(out: Tensor, x: Tensor, shifts: list[int], dims: list[int] = ()) -> tuple | None:
    if len(dims) != 1:
        return None
    shift = shifts[0] % x.size(dims[0])
    cut = x.size(dims[0]) - shift
    x, out = (z.movedim(dims[0], 0).numpy() for z in (x, out))
    front, back, first, last = out[:shift], out[shift:], x[:cut], x[cut:]

    def compute() -> None:
        back[...], front[...] = first, last

    return compute, (), {}


def rsqrt(out: Tensor, x: Tensor) -> tuple:
    x, y = x.numpy(), out.numpy()

    def compute() -> None:
        np.sqrt(x, out=y)
        np.reciprocal(y, out=y)

    return compute, (), {}


def mean(out: Tensor, x: Tensor, dims: list[int], keep: bool = False) -> tuple | None:
    if not dims:  # over all of them
        return None
    x, y, dims = x.numpy(), out.numpy(), tuple(dims)
    share = np.float32(out.numel() / x.size)

    def compute() -> None:
        np.add.reduce(x, axis=dims, keepdims=keep, out=y)
        np.multiply(y, share, out=y)

    return compute, (), {}


def layer_norm(out: Tensor, x: Tensor, shape, weight, bias, eps: float) -> tuple | None:
    if len(shape) != 1:
        return None
    x, y, share = x.numpy(), out.numpy(), np.float32(1 / shape[0])
    squares = np.empty_like(x)
    weight, bias = (None if t is None else t.numpy() for t in (weight, bias))

    def compute() -> None:
        np.subtract(x, np.add.reduce(x, axis=-1, keepdims=True) * share, out=y)
        np.square(y, out=squares)
        size = np.sqrt(np.add.reduce(squares, axis=-1, keepdims=True) * share + eps)
        np.divide(y, size, out=y)
        if weight is not None:
            np.multiply(y, weight, out=y)
        if bias is not None:
            np.add(y, bias, out=y)

    return compute, (), {}


def embedding(out: Tensor, table: Tensor, ids: Tensor, *_) -> tuple | None:
    """Of one token."""
    if ids.numel() != 1:
        return None
    rows, row, ids = table.numpy(), out.view(-1).numpy(), ids.view(-1).numpy()

    def compute() -> None:
        if ids[0] < 0:
            raise IndexError(f"{ids[0]} is no token")
        row[:] = rows[ids[0]]

    return compute, (), {}


def mm(out: Tensor, x: Tensor, matrix: Tensor) -> tuple | None:
    return addmm(out, None, x, matrix)


def addmm(out: Tensor, bias: Tensor | None, x: Tensor, matrix: Tensor) -> tuple | None:
    """Of one row."""
    if len(x) > 1 or not blas.keeps_to_one_thread() or (bias is not None and bias.dim() > 1):
        return None
    return blas.product(x, matrix.mT, bias, out), (), {}


MAKERS = {
    aten.pow.Tensor_Scalar: power,
    aten.add_.Scalar: add_to,
    aten.relu.default: relu,
    aten.clone.default: clone,
    aten.cat.default: cat,
    aten.roll.default: roll,
    aten.rsqrt.default: rsqrt,
    aten.mean.dim: mean,
    aten.native_layer_norm.default: layer_norm,
    aten.embedding.default: embedding,
    aten.mm.default: mm,
    aten.addmm.default: addmm,
}
