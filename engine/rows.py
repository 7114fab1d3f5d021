"""Sums over the rows of a matrix, compiled by numba: W x for engine/one_token_cpu.py.

Weights of float32 and bfloat16 are multiplied in float32. Those of eight bits are multiplied with
numbers of sixteen, by an instruction that adds two of their products to a sum (AVX2's `vpmaddwd`):
x then is rounded to a 32,767th of its largest number, 127 times finer than weights of eight bits.
docs/speed.md has the figures.
"""

from functools import partial

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.errors import NumbaError
from numba.core.registry import cpu_target
from numba.extending import intrinsic, overload
from numba.np.arrayobj import make_array

f32, u32, i32, i16 = np.float32, np.uint32, np.int32, np.int16
# sums in whatever order; but what is not finite stays so
MATH = dict(fastmath={"reassoc", "nsz", "arcp", "contract", "afn"}, error_model="numpy")
STREAMS = 8  # rows of a matrix that are read side by side
LANES = 16  # products of one instruction
LARGEST = (1 << 15) - 1  # of sixteen bits
SIZE = i32(0x7FFFFFFF)  # a float32 without its sign; larger numbers have larger bits
SAFE = 1 << 24  # what numbers of sixteen bits may sum up to: 127 times that fits into 32 bits
TINY = f32(1e-30)  # a unit below which all is zero, since 1 / unit could be infinite


def as_float32(w):
    """A weight; of bfloat16 numpy knows the bits alone."""


@overload(as_float32, inline="always")
def as_float32_by(w):
    if w == types.uint16:
        return lambda w: u32(u32(w) << u32(16)).view(f32)
    return lambda w: f32(w)


@njit(inline="always")
def sum_from(first, row, x):
    s = f32(0)
    for i in range(first, len(x)):
        s += as_float32(row[i]) * f32(x[i])
    return s


def rounded(W, x, buffer):
    """(x, unit) as `sums` wants x (I): as it is, or for W of eight bits as multiples of a unit, in
    `buffer`. If not all is finite, the unit is not."""


@overload(rounded, jit_options=MATH)
def rounded_by(W, x, buffer):
    def as_it_is(W, x, buffer):
        return x, f32(1)

    def to_sixteen_bits(W, x, buffer):
        whole, most, bits = f32(0), i32(0), x.view(i32)
        for i in range(len(x)):
            whole += abs(x[i])
            most = max(most, bits[i] & SIZE)  # as whole numbers several are compared at once
        largest = i32(most).view(f32)
        unit = whole / f32(SAFE)
        if largest / f32(LARGEST) > unit:
            unit = largest / f32(LARGEST)
        some = buffer[: len(x)]
        if TINY < unit < np.inf:
            for i in range(len(x)):
                some[i] = i16(np.rint(x[i] / unit))
        else:
            some[:] = 0
        return some, unit

    return to_sixteen_bits if W.dtype == types.int8 else as_it_is


@intrinsic
def eight_sums(_, W, first, step, x):
    """Of eight rows of W (O, I), int8, from the `first` on each `step` apart: their sums with
    x (I), int16, over as many columns as a multiple of LANES has."""
    if "+avx2" not in cpu_target.target_context.codegen().magic_tuple()[2]:
        raise NumbaError("numba was told to do without AVX2")  # LLVM would end the process
    number, several = ir.IntType(32), ir.VectorType(ir.IntType(32), LANES // 2)
    wide, narrow = (ir.VectorType(ir.IntType(bits), LANES) for bits in (16, 8))

    def instructions(context, builder, signature, values):
        def function(name, result, *given):
            kind = ir.FunctionType(result, given)
            return cgutils.get_or_insert_function(builder.module, kind, name)

        def read(pointer, i, kind):
            place = builder.bitcast(builder.gep(pointer, [i]), kind.as_pointer())
            return builder.load(place, align=1)

        multiply = function("llvm.x86.avx2.pmadd.wd", several, wide, wide)
        add_up = function("llvm.vector.reduce.add.v8i32", number, several)
        W, first, step, x = values
        W, x = (make_array(signature.args[k])(context, builder, values[k]) for k in (0, 3))
        columns = builder.extract_value(x.shape, 0)
        length, index = columns.type, partial(ir.Constant, columns.type)
        starts = [builder.add(first, builder.mul(step, index(k))) for k in range(STREAMS)]
        rows = [builder.gep(W.data, [builder.mul(start, columns)]) for start in starts]
        totals = [cgutils.alloca_once(builder, several) for _ in rows]
        for total in totals:
            builder.store(ir.Constant(several, None), total)
        ends = builder.and_(columns, index(-LANES))
        with cgutils.for_range_slice(builder, index(0), ends, index(LANES), length) as (i, _):
            numbers = read(x.data, i, wide)
            for row, total in zip(rows, totals, strict=True):
                weights = builder.sext(read(row, i, narrow), wide)
                products = builder.call(multiply, [weights, numbers])
                builder.store(builder.add(builder.load(total), products), total)
        sums = [builder.call(add_up, [builder.load(total)]) for total in totals]
        return context.make_tuple(builder, signature.return_type, sums)

    return types.UniTuple(types.int32, STREAMS)(W, first, step, x), instructions


def sums(W, x, z):
    """W x into z, by eight rows at once that stand far from each other: a processor asks memory for
    more of each that it sees read in order, and of one alone it does not ask for enough."""


@overload(sums, jit_options=MATH)
def sums_by(W, x, z):
    def in_float32(W, x, z):
        n = len(z) // STREAMS
        for o in range(n):
            z0 = z1 = z2 = z3 = z4 = z5 = z6 = z7 = f32(0)
            for i in range(len(x)):
                z0 += as_float32(W[o, i]) * x[i]
                z1 += as_float32(W[o + n, i]) * x[i]
                z2 += as_float32(W[o + 2 * n, i]) * x[i]
                z3 += as_float32(W[o + 3 * n, i]) * x[i]
                z4 += as_float32(W[o + 4 * n, i]) * x[i]
                z5 += as_float32(W[o + 5 * n, i]) * x[i]
                z6 += as_float32(W[o + 6 * n, i]) * x[i]
                z7 += as_float32(W[o + 7 * n, i]) * x[i]
            z[o], z[o + n], z[o + 2 * n], z[o + 3 * n] = z0, z1, z2, z3
            z[o + 4 * n], z[o + 5 * n], z[o + 6 * n], z[o + 7 * n] = z4, z5, z6, z7
        for o in range(STREAMS * n, len(z)):
            z[o] = sum_from(0, W[o], x)

    def by_sixteen_bits(W, x, z):
        n, first = len(z) // STREAMS, len(x) - len(x) % LANES
        for o in range(n):
            found = eight_sums(W, o, n, x)
            for k in range(STREAMS):
                z[o + k * n] = f32(found[k]) + sum_from(first, W[o + k * n], x)
        for o in range(STREAMS * n, len(z)):
            z[o] = sum_from(0, W[o], x)

    return by_sixteen_bits if W.dtype == types.int8 else in_float32
