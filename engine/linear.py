"""Linear layers that a CPU computes faster: other layouts of the same weights, and which is best.

For one row, x W^T is a reading of W, and how fast it is read depends on the layout, on the
processor, and on the type. So the candidates are tried (`Fastest`). docs/speed.md has figures.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import blas
from engine.blas import NumpyLinear, openblas
from engine.machine import fast_bfloat16

EXPECTED = 8  # rows that oneDNN chooses a layout for: it is the best for 1, 2 and 4 rows, too
FEW = 16  # rows up to which eight-bit weights are used as they are; for more, unpacking pays
WIDENED = 8  # rows up to which FBGEMM's product is no slower than one of bfloat16, if that is fast
WORTH_IT = 1 << 19  # weights of a layer for which a choice pays
TRIES = 5  # with all threads, and with one
ENOUGH = 1 << 22  # weights of a large layer that are tried
PAUSE = 1e-4  # seconds from one large product to the next, about, in which threads fall asleep
CACHE = 1 << 26  # bytes that drive the weights out of the caches of a processor


class Fastest:
    """Makes of a matrix and a bias a layer for one row. All large ones have one form, `chosen`:
    that in which `weights`, of a block and of the head, are read fastest one after another.

    Mixed, each would find its threads asleep; so they are tried in a chain, too. Where numba's
    loops are to be had, they are faster than any form: there only what they can read is tried, and
    weights of bfloat16 take memory twice.
    """

    def __init__(self, dtype: torch.dtype, weights: list[Tensor]):
        self.for_loops = have_loops(dtype)
        self.forms = forms(dtype, self.for_loops)
        self.chosen = next(iter(self.forms))
        weights = [w[: ENOUGH // w.size(1) + 1] for w in weights if w.numel() >= WORTH_IT]
        if weights and len(self.forms) > 1:
            self.chosen = self.fastest(weights)

    def __call__(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        name = self.chosen if weight.numel() >= WORTH_IT else next(iter(self.forms))
        return self.forms[name](weight, bias)

    def fastest(self, weights: list[Tensor]) -> str:
        """The form whose layers read their weights from memory in the shortest time, with all
        threads or, which is faster beside a busy process, with one. In turn, since a machine that
        is slow for a moment should be slow for all."""
        inputs = [w.new_ones(1, 1, w.size(1)) for w in weights]
        layers = {name: [form(w, None) for w in weights] for name, form in self.forms.items()}
        other = torch.ones(CACHE // 8, dtype=torch.int64)
        times = dict.fromkeys(layers, math.inf)
        for number in {torch.get_num_threads(), 1}:
            with blas.using(number):
                for _ in range(TRIES):
                    for name, chain in layers.items():
                        times[name] = min(times[name], self.once(chain, inputs, other))
        return min(times, key=times.get)

    def once(self, chain: list[nn.Module], inputs: list[Tensor], other: Tensor) -> float:
        """Seconds in which these layers, one after another, work on their inputs, once `other` has
        driven their weights out of the caches."""
        other.sum()
        seconds = 0.0
        for layer, x in zip(chain, inputs, strict=True):
            start = time.perf_counter()
            layer(x)
            end = time.perf_counter()
            seconds += end - start
            while time.perf_counter() < end + PAUSE:  # one thread norms or attends
                pass
        return seconds


class OneOrSeveral(Fastest):
    """As `Fastest`, with a second form beside the first where several rows are read faster so: then
    the weights take memory twice. A form of float16 serves both."""

    def __call__(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        one = super().__call__(weight, bias)
        dtype = fast_product(weight.dtype) if packable(weight.dtype) else torch.float32
        if (
            isinstance(one, PackedLinear | HalfLinear)
            or weight.numel() < WORTH_IT
            or not packable(dtype)
        ):
            return one
        bias = None if bias is None else bias.to(dtype)
        return OneOrSeveralLinear(one, PackedLinear(weight.to(dtype), bias), dtype)


def forms(dtype: torch.dtype, for_loops: bool = False) -> dict[str, Callable]:
    """The candidates by name, that for small layers first; `for_loops` such as keep their weights
    in a layout that engine/one_token_cpu.py reads."""
    half = {"half": partial(half_or_not, for_loops=for_loops)} if have_fbgemm() else {}
    if for_loops and dtype == torch.bfloat16:
        return half
    streamed = {f"blocks of {n}": partial(StreamedLinear, width=n) for n in widths()}
    if dtype != torch.float32 and not (dtype == torch.bfloat16 and fast_bfloat16()):
        return streamed | half if dtype == torch.bfloat16 else streamed  # products are emulated
    found = {"plain": PlainLinear}
    if not for_loops:
        found |= ({"packed": PackedLinear} if packable(dtype) else {}) | streamed
    return found | ({"numpy": NumpyLinear} if dtype == torch.float32 and openblas() else {})


def widths() -> tuple[int, ...]:
    """Columns of a bag's blocks; the last is that for eight bits. As many sums as a processor's
    registers hold: with AVX2 those are 12 of 8 numbers, and a wider row is read twice."""
    return (96,) if avx2_alone() else (256, 128)


def have_loops(dtype: torch.dtype) -> bool:
    """Whether engine/one_token_cpu.py can be had, is fast, and reads a form of weights of that
    type."""
    able = torch.cpu.get_capabilities()
    readable = dtype == torch.float32 or (dtype == torch.bfloat16 and have_fbgemm())
    return bool(able.get("avx2")) and readable and find_spec("numba") is not None


def have_fbgemm() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines


def avx2_alone() -> bool:
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx2") and not able.get("avx512_f"))


def fast_product(dtype: torch.dtype) -> torch.dtype:
    """In which type weights of that type are multiplied with many rows: emulated, bfloat16 would
    take minutes."""
    return torch.float32 if dtype == torch.bfloat16 and not fast_bfloat16() else dtype


def packable(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there, and this processor has what it needs for the type."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_fp16_supported()


class PlainLinear(nn.Module):
    """x W^T + b, as torch computes it."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.matrix = weight.detach()
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix, self.bias)


class StreamedLinear(nn.Module):
    """x W^T + b for one row x, at the speed of memory.

    The product is a sum of the rows of W^T, weighted by x: what recommendation systems call an
    embedding bag, and torch has one that reads rows in sequence as fast as memory gives them. W^T
    is cut into blocks of columns, a bag for each, so that the cores share the work.
    """

    few = 1  # rows of x for which it is done so

    def __init__(self, weight: Tensor, bias: Tensor | None, width: int = 0):
        super().__init__()
        self.outputs, self.inputs = weight.shape
        self.width, self.dtype = width or widths()[-1], fast_product(weight.dtype)
        self.blocks = -(-self.outputs // self.width)
        self.rows = self.cut(weight.detach())
        index = torch.arange(len(self.rows), dtype=torch.int32)
        self.index = index.view(self.blocks, 1, self.inputs)
        self.begins = torch.arange(self.blocks * self.few, dtype=torch.int32) * self.inputs
        self.bias = None if bias is None else bias.detach()

    def cut(self, weight: Tensor) -> Tensor:
        """The blocks of W^T, one below the other (blocks * inputs, width)."""
        whole = F.pad(weight, (0, 0, 0, -self.outputs % self.width))
        return whole.view(self.blocks, self.width, self.inputs).mT.reshape(-1, self.width)

    def joined(self, rows: Tensor) -> Tensor:
        """Those blocks in the usual layout, (outputs, inputs)."""
        return rows.view(self.blocks, self.inputs, self.width).mT.flatten(0, 1)[: self.outputs]

    @property
    def weight(self) -> Tensor:
        return self.joined(self.rows)

    def forward(self, x: Tensor) -> Tensor:
        n = x.numel() // self.inputs
        if n > self.few:
            y = F.linear(x.to(self.dtype), self.weight.to(self.dtype))
        else:
            y = self.sums(x.reshape(n, self.inputs)).view(*x.shape[:-1], self.outputs)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def sums(self, x: Tensor) -> Tensor:
        """x W^T (n, outputs) for a few rows x (n, inputs)."""
        # a block for all rows of x before the next: it is in the cache from the second row on
        n = len(x)
        index = self.index.expand(-1, n, -1).reshape(-1)
        factors = x.expand(self.blocks, n, self.inputs).reshape(-1)
        y = self.bag(index, self.begins[: self.blocks * n], factors)  # (blocks * n, width)
        return y.view(self.blocks, n, self.width).transpose(0, 1).reshape(n, -1)[:, : self.outputs]

    def bag(self, index: Tensor, begins: Tensor, factors: Tensor) -> Tensor:
        factors = factors.to(self.rows.dtype)
        return torch.embedding_bag(self.rows, index, begins, False, 0, False, factors)[0]


ZERO = 128  # stands for 0 in a bag, whose numbers of eight bits have no sign
AS_THEY_ARE = torch.tensor([1.0, -ZERO]).view(torch.uint8)  # how it is to read them: scale, offset


class EightBitLinear(StreamedLinear):
    """The same with weights of eight bits: whole numbers from -127 to 127, with a scale for each
    output. torch has a bag for rows of such numbers, too."""

    few = FEW

    def cut(self, weight: Tensor) -> Tensor:
        numbers, self.scales = eight_bits(weight)
        rows = super().cut(numbers)
        ends = AS_THEY_ARE.expand(len(rows), -1)
        return torch.cat([rows.view(torch.uint8) ^ ZERO, ends], 1)

    @property
    def weight(self) -> Tensor:
        return self.whole_numbers() * self.scales[:, None]

    def whole_numbers(self) -> Tensor:
        """The weights without their scales."""
        return self.joined((self.rows[:, : self.width] ^ ZERO).view(torch.int8))

    def sums(self, x: Tensor) -> Tensor:
        return super().sums(x) * self.scales

    def bag(self, index: Tensor, begins: Tensor, factors: Tensor) -> Tensor:
        bag = torch.ops.quantized.embedding_bag_byte_rowwise_offsets
        return bag(self.rows, index, begins, per_sample_weights=factors.float())


def eight_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(whole numbers, scales) of a matrix (outputs, inputs): the largest of each output is 127."""
    scales = weight.float().abs().amax(1) / 127
    return (weight / scales.clamp(min=1e-30)[:, None]).round().to(torch.int8), scales


class HalfLinear(nn.Module):
    """x W^T + b with W in float16, which has more digits than bfloat16 has and fewer exponents, by
    FBGEMM: it widens them to float32 in an instruction that every processor with AVX2 has. Its
    layout is its own: `for_loops` the weights are kept as they are, too, and then many rows are
    multiplied with these where bfloat16 is fast."""

    def __init__(self, weight: Tensor, bias: Tensor | None, for_loops: bool = False):
        super().__init__()
        self.matrix = weight.detach() if for_loops else None
        self.fast = for_loops and fast_product(weight.dtype) == weight.dtype
        self.bias = None if bias is None else bias.detach().float()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.detach().float(), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.fast and x.numel() > self.matrix.size(1) * WIDENED:
            y = F.linear(x.to(self.matrix.dtype), self.matrix)
            return (y if self.bias is None else y + self.bias).to(x.dtype)
        return torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed).to(x.dtype)


def half_or_not(weight: Tensor, bias: Tensor | None, for_loops: bool = False) -> nn.Module:
    """A HalfLinear, if float16 reaches as far as these weights: what is below 6e-8 becomes 0."""
    if weight.abs().max() > torch.finfo(torch.float16).max:
        return StreamedLinear(weight, bias)
    return HalfLinear(weight, bias, for_loops)


class OneOrSeveralLinear(nn.Module):
    """x W^T + b by one form for one row, by another, maybe of another type, for more."""

    def __init__(self, one: nn.Module, several: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.one, self.several, self.dtype = one, several, dtype

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == x.size(-1):
            return self.one(x)
        return self.several(x.to(self.dtype)).to(x.dtype)


class PackedLinear(nn.Module):
    """x W^T + b for several rows, with W in the layout that oneDNN likes best, once and for all.

    torch's compiler uses the same two operations for constant weights on a CPU.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), EXPECTED)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
