"""One token's products and attention by numpy and its OpenBLAS, as operations that torch knows.

They read float32 as fast as memory gives it: on two idle cores with AVX2 all matrices of GPT-2 in
24 ms, where torch's own products take 28 and more. And attention reads no positions but those that
are filled. docs/speed.md has the figures.
"""

import ctypes
import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LIBRARY = torch.library.Library("nutshell", "DEF")
LIBRARY.define("gemv(Tensor x, Tensor matrix, Tensor? bias) -> Tensor")
LIBRARY.define(
    "attend_one(Tensor q, Tensor k, Tensor v, Tensor place, Tensor(a!) keys, Tensor(b!) values)"
    " -> (Tensor, Tensor(a!), Tensor(b!))"
)
LONG = 1 << 21  # numbers of keys for which attention is worth all threads of torch
THREADED = 2_304 * 4  # numbers of a matrix from which on an OpenBLAS may wake threads
quiet = np.errstate(all="ignore")  # torch does not warn of what is infinite, either


def product(x: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor) -> Callable[[], None]:
    """What computes W x + b from what these tensors hold when it is called, into `out`."""
    x, y, matrix = x.view(-1).numpy(), out.view(-1).numpy(), matrix.numpy()
    bias = None if bias is None else bias.numpy()

    def compute() -> None:
        np.dot(matrix, x, out=y)
        if bias is not None:
            np.add(y, bias, out=y)

    return compute


@quiet
def gemv(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """W x + b: for x (..., I), of one row in all, and a matrix W (O, I), (..., O)."""
    y = x.new_empty(*x.shape[:-1], matrix.size(0))
    product(x.contiguous(), matrix, bias, y)()
    return y


def attention(q, k, v, place, keys, values, out: Tensor, *_) -> Callable[[], None]:
    """What computes `attend_one` from what these tensors hold when it is called, into `out`: for a
    long text with the threads that torch has now, else with one."""
    K, _, D = keys.shape[1:]  # (1, K, S, D)
    q, out = q.view(1, K, -1, D), out.view(1, K, -1, D)  # (1, K, G, D): G heads share keys
    k, v, place = k.view(K, D).numpy(), v.view(K, D).numpy(), place.view(-1).numpy()
    query, y, stored_k, stored_v = (z.numpy()[0] for z in (q, out, keys, values))
    scale, threads = np.float32(D**-0.5), torch.get_num_threads()

    def compute() -> None:
        n = int(place[0]) + 1
        stored_k[:, n - 1], stored_v[:, n - 1] = k, v
        if n * K * D >= LONG:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            out.copy_(F.scaled_dot_product_attention(q, keys[:, :, :n], values[:, :, :n]))
            torch.set_num_threads(before)
            return
        with one_thread(n * query[0].size >= THREADED):
            score = np.matmul(query, stored_k[:, :n].transpose(0, 2, 1))  # (K, G, n)
            score *= scale
            score -= np.maximum.reduce(score, axis=-1, keepdims=True)
            np.exp(score, out=score)
            np.matmul(score, stored_v[:, :n], out=y)
        np.divide(y, np.add.reduce(score, axis=-1, keepdims=True), out=y)

    return compute


@quiet
def attend_one(q: Tensor, k: Tensor, v: Tensor, place: Tensor, keys: Tensor, values: Tensor):
    """Attention of one token, q (1, H, 1, D), k and v (1, K, 1, D), which stands at `place` (1, 1):
    stores k and v there, in keys and values (1, K, S, D), and looks back from there: as q."""
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    attention(q, k, v, place, keys, values, y)()
    return y, keys, values


LIBRARY.impl("gemv", gemv, "CPU")
LIBRARY.impl("attend_one", attend_one, "CPU")
# what does the same again without torch, made of the arguments and the results
GEMV = torch.ops.nutshell.gemv.default
AGAIN = {GEMV: product, torch.ops.nutshell.attend_one.default: attention}


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


def keeps_to_one_thread() -> bool:
    """Whether small products have one thread: numpy's wheels can be told so, and on a Mac, where
    numpy has Accelerate, they have it anyway. Others may wake all cores for each head."""
    return openblas() is not None or sys.platform == "darwin"


def threads() -> int:
    """How many numpy's products have, 0 where that is unknown."""
    return openblas().scipy_openblas_get_num_threads64_() if openblas() else 0


def use_threads(number: int) -> None:
    """As many for numpy's products as for torch's."""
    global asked
    asked = number
    set_threads(number)


def set_threads(number: int) -> None:
    if openblas():
        openblas().scipy_openblas_set_num_threads64_(ctypes.c_int(number))


asked = 0  # the number that numpy's products have but for moments


@contextmanager
def one_thread(wanted: bool = True):
    """Only one for numpy's products in this block, if that is `wanted`: 15 microseconds, 140 where
    there are 64 threads."""
    before = threads() if wanted else 0
    if before > 1:
        set_threads(1)
    try:
        yield
    finally:
        if before > 1:
            set_threads(asked or before)


@contextmanager
def using(number: int):
    """Within, torch and numpy have so many threads; behind, as many as they had."""
    before, of_numpy = torch.get_num_threads(), asked or threads()
    torch.set_num_threads(number)
    use_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        use_threads(of_numpy)
