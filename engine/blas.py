"""A matrix times one vector by numpy's OpenBLAS, as an operation that torch knows.

It reads a matrix of float32 as fast as memory gives it: on two idle cores with AVX2 all of GPT-2's
in 24 ms, where torch's own products take 28 and more (docs/speed.md). Its threads wait for each
other, so beside a busy process it is slow. The matrix stays as it is.
"""

import ctypes
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LIBRARY = torch.library.Library("nutshell", "DEF")
LIBRARY.define("gemv(Tensor x, Tensor matrix, Tensor? bias) -> Tensor")
LIBRARY.define("gemv.out(Tensor x, Tensor matrix, Tensor? bias, *, Tensor(a!) out) -> Tensor(a!)")


def gemv_out(x: Tensor, matrix: Tensor, bias: Tensor | None, *, out: Tensor) -> Tensor:
    y = out.numpy().reshape(-1)
    np.dot(matrix.numpy(), x.numpy().reshape(-1), out=y)
    if bias is not None:
        y += bias.numpy()
    return out


def gemv(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """W x + b: for x (..., I), of one row in all, and a matrix W (O, I), (..., O)."""
    return gemv_out(x, matrix, bias, out=x.new_empty(*x.shape[:-1], matrix.size(0)))


LIBRARY.impl("gemv", gemv, "CPU")
LIBRARY.impl("gemv.out", gemv_out, "CPU")


class NumpyLinear(nn.Module):
    """x W^T + b, for one row by numpy, for more by torch, with the same matrix."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.matrix = weight.detach().contiguous()
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() != x.size(-1):
            return F.linear(x, self.matrix, self.bias)
        return torch.ops.nutshell.gemv(x, self.matrix, self.bias)


@cache
def openblas() -> ctypes.CDLL | None:
    """The OpenBLAS of numpy's wheels for Linux and Windows, or None: elsewhere it is another one
    (Accelerate on a Mac), to which one cannot say how many threads it may use."""
    package = Path(np.__file__).parent
    for path in package.parent.glob("numpy.libs/*openblas*"):
        with suppress(OSError):
            library = ctypes.CDLL(str(path))  # it is loaded already
            if hasattr(library, "scipy_openblas_set_num_threads64_"):
                return library
    return None


def threads() -> int:
    """How many numpy's products have, 0 where that is unknown."""
    return openblas().scipy_openblas_get_num_threads64_() if openblas() else 0


def use_threads(number: int) -> None:
    """As many for numpy's products as for torch's."""
    if openblas():
        openblas().scipy_openblas_set_num_threads64_(ctypes.c_int(number))
