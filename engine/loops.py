"""The pass of one token, or of a few, on a CPU, compiled by numba: what engine/one_token_cpu.py
calls. Shapes: T tokens, C width, I numbers that a product is given and O that it gives, K heads of
keys and H of queries, D of their channels, S places of a cache.

Weights of float32 and bfloat16 are multiplied in float32. Those of eight bits are multiplied with
numbers of sixteen, by an instruction that adds two of their products to a sum (AVX2's `vpmaddwd`):
x then is rounded to a 32,767th of its largest number (or, where many are large, to a 2^24th of
their sum, so that no sum outgrows 32 bits), as a weight to a 127th of its row's. What is here stays
in one file: numba keeps what it compiled until the file changes in which it stands.
docs/speed.md has the figures.
"""

from functools import partial

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic, overload
from numba.np.arrayobj import make_array
from numba.typed import List

f32, u32, i32, i16 = np.float32, np.uint32, np.int32, np.int16
# sums in whatever order; but what is not finite stays so
MATH = dict(fastmath={"reassoc", "nsz", "arcp", "contract", "afn"}, error_model="numpy")
OPTIONS = dict(nogil=True, cache=True, **MATH)
# what becomes of a product; numpy's numbers, since for each of Python's numba compiles anew
PLAIN, ADDED, TIMES, GELU, RELU2, SILU, CAPPED = np.arange(7)
NONE, RMS, LAYER = np.arange(3)  # norms
LOG2, LOWEST, HIGHEST = f32(np.log(2)), f32(-87), f32(88)  # beyond these e^x is no usual float32
STREAMS, GROUPS = 8, 2  # rows that are read side by side; how many such a thread reads in turn
LANES = 16  # products of one instruction
LARGEST = (1 << 15) - 1  # of sixteen bits
SIZE = i32(0x7FFFFFFF)  # a float32 without its sign; larger numbers have larger bits
SAFE = 1 << 24  # what numbers of sixteen bits may sum up to: 127 times that fits into 32 bits
TINY = f32(1e-30)  # a unit below which all is zero, since 1 / unit could be infinite

# --- sums over the rows of a matrix


def as_float32(w):
    """A weight; of bfloat16 numpy knows the bits alone."""


@overload(as_float32, inline="always")
def as_float32_by(w):
    if w == types.uint16:
        return lambda w: u32(u32(w) << u32(16)).view(f32)
    return lambda w: f32(w)


@njit(inline="always")
def sum_from(first, row, x):
    """Of a row and x, without what stands before the `first` column."""
    s = f32(0)
    for i in range(first, len(x)):
        s += as_float32(row[i]) * f32(x[i])
    return s


def by_sixteen_bits(W) -> bool:
    """Whether W has eight bits and the processor that numba compiles for has that instruction: at
    one that is unknown there LLVM would end the process."""
    return W.dtype == types.int8 and "+avx2" in cpu_target.target_context.codegen().magic_tuple()[2]


@njit(**OPTIONS)
def round_to_sixteen_bits(x, some):
    """x (I) as multiples of a unit, into `some`: the unit. If not all is finite, that is not."""
    whole, most, bits = f32(0), i32(0), x.view(i32)
    for i in range(len(x)):
        whole += abs(x[i])
        most = max(most, bits[i] & SIZE)  # as whole numbers several are compared at once
    largest = i32(most).view(f32)
    unit = whole / f32(SAFE)
    if largest / f32(LARGEST) > unit:
        unit = largest / f32(LARGEST)
    if TINY < unit < np.inf:
        for i in range(len(x)):
            some[i] = i16(np.rint(x[i] / unit))
    else:
        some[:] = 0
    return unit


def rounded(W, x, room):
    """x (T, I) as `sums` wants it, as it is or rounded, and a unit for each of its rows."""


@overload(rounded, jit_options=MATH)
def rounded_by(W, x, room):
    def as_it_is(W, x, room):
        units = room[1][: len(x)]
        units[:] = 1
        return x, units

    def to_sixteen_bits(W, x, room):
        some, units = room[0][: x.size].reshape(x.shape), room[1][: len(x)]
        for t in range(len(x)):
            units[t] = round_to_sixteen_bits(x[t], some[t])
        return some, units

    return to_sixteen_bits if by_sixteen_bits(W) else as_it_is


@intrinsic
def eight_sums(_, streams, group, at, x):
    """Of the rows that begin at the place `at` of each of streams[group] (STREAMS, L), int8: their
    sums with x (I), int16, over as many columns as a multiple of LANES has."""
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
        _, group, at, _ = values
        W, x = (make_array(signature.args[k])(context, builder, values[k]) for k in (0, 3))
        columns, long = builder.extract_value(x.shape, 0), builder.extract_value(W.shape, 2)
        length, index = columns.type, partial(ir.Constant, columns.type)
        first = builder.mul(group, index(STREAMS))
        places = [builder.mul(builder.add(first, index(k)), long) for k in range(STREAMS)]
        rows = [builder.gep(W.data, [builder.add(place, at)]) for place in places]
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

    return types.UniTuple(types.int32, STREAMS)(streams, group, at, x), instructions


def sums(streams, part, at, x, z):
    """Of the rows that stand from `at` on in the streams of a part: their products with x (T, I)
    into z (T, O), by one row of each stream, for all T. A processor asks memory for more of each
    stream that it sees read in order, and of one alone it does not ask for enough."""


@overload(sums, jit_options=MATH)
def sums_by(streams, part, at, x, z):
    def in_float32(streams, part, at, x, z):
        n, long = z.shape[1] // (GROUPS * STREAMS), x.shape[1]
        for step in range(GROUPS * n):
            g, o = step % GROUPS, step // GROUPS
            W, row = streams[part * GROUPS + g], slice(at + o * long, at + (o + 1) * long)
            w0, w1, w2, w3 = W[0, row], W[1, row], W[2, row], W[3, row]
            w4, w5, w6, w7 = W[4, row], W[5, row], W[6, row], W[7, row]
            for t in range(len(x)):
                u, y = x[t], z[t, g * STREAMS * n :]
                z0 = z1 = z2 = z3 = z4 = z5 = z6 = z7 = f32(0)
                for i in range(long):
                    z0 += as_float32(w0[i]) * u[i]
                    z1 += as_float32(w1[i]) * u[i]
                    z2 += as_float32(w2[i]) * u[i]
                    z3 += as_float32(w3[i]) * u[i]
                    z4 += as_float32(w4[i]) * u[i]
                    z5 += as_float32(w5[i]) * u[i]
                    z6 += as_float32(w6[i]) * u[i]
                    z7 += as_float32(w7[i]) * u[i]
                y[o], y[o + n], y[o + 2 * n], y[o + 3 * n] = z0, z1, z2, z3
                y[o + 4 * n], y[o + 5 * n], y[o + 6 * n], y[o + 7 * n] = z4, z5, z6, z7

    def in_whole_numbers(streams, part, at, x, z):
        n, long = z.shape[1] // (GROUPS * STREAMS), x.shape[1]
        whole = long - long % LANES
        for step in range(GROUPS * n):
            g, o = step % GROUPS, step // GROUPS
            W, begin = streams[part * GROUPS + g], at + o * long
            for t in range(len(x)):
                found = eight_sums(streams, part * GROUPS + g, begin, x[t])
                for k in range(STREAMS):
                    rest = sum_from(whole, W[k, begin : begin + long], x[t])
                    z[t, (g * STREAMS + k) * n + o] = f32(found[k]) + rest

    return in_whole_numbers if by_sixteen_bits(streams) else in_float32


# --- what stands between and behind them


@njit(inline="always")
def exp(x):
    """e^x to six digits, in operations that a processor does for several numbers at once: as
    2^n e^r, the first by its bits, the second by Taylor's series."""
    x = LOWEST if x < LOWEST else HIGHEST if x > HIGHEST else x  # nan stays
    n = np.rint(x / LOG2)
    r = x - n * LOG2
    series = f32(1) + r / f32(4) * (f32(1) + r / f32(5) * (f32(1) + r / f32(6)))
    series = f32(1) + r * (f32(1) + r / f32(2) * (f32(1) + r / f32(3) * series))
    return series * i32((i32(n) + i32(127)) << i32(23)).view(f32)


@njit(**OPTIONS)
def finish(rows, layer, unit, how, cap, z, y):
    """Of those rows, from their sums z to y. Each way has a loop of its own: one that had to ask in
    each of its rounds would not be done for several numbers at once."""
    b, scales, z, y = layer[3][rows], layer[4][rows], z[rows], y[rows]
    for o in range(len(z)):
        z[o] = z[o] * (unit * scales[o]) + b[o]
    if how == PLAIN:
        for o in range(len(z)):
            y[o] = z[o]
    elif how == ADDED:
        for o in range(len(z)):
            y[o] += z[o]
    elif how == TIMES:
        for o in range(len(z)):
            y[o] *= z[o]
    elif how == GELU:  # (1 + tanh(a)) / 2 = 1 / (1 + e^(-2 a))
        for o in range(len(z)):
            a = f32(0.7978845608028654) * (z[o] + f32(0.044715) * z[o] * z[o] * z[o])
            y[o] = z[o] / (f32(1) + exp(f32(-2) * a))
    elif how == RELU2:
        for o in range(len(z)):
            y[o] = max(z[o], f32(0)) * max(z[o], f32(0))
    elif how == SILU:
        for o in range(len(z)):
            y[o] = z[o] / (f32(1) + exp(-z[o]))
    elif how == CAPPED:
        for o in range(len(z)):
            y[o] = cap * (f32(2) / (f32(1) + exp(f32(-2) * z[o] / cap)) - f32(1))  # tanh(z / cap)


@njit(**OPTIONS)
def part_of_product(layer, part, x, units, how, cap, z, y):
    streams, at, rest = layer[:3]
    parts, whole = len(streams) // GROUPS, y.shape[1] - len(rest)
    rows = slice(whole // parts * part, whole // parts * (part + 1))
    first, last = len(rest) * part // parts, len(rest) * (part + 1) // parts
    sums(streams, part, at, x, z[:, rows])
    for t in range(len(x)):
        finish(rows, layer, units[t], how, cap, z[t], y[t])
        for i in range(first, last):
            z[t, whole + i] = sum_from(0, rest[i], x[t])
        finish(slice(whole + first, whole + last), layer, units[t], how, cap, z[t], y[t])


@njit(parallel=True, **OPTIONS)
def product(layer, x, how, cap, room, y):
    """x W^T + b of x (T, I) into y (T, O), as `how` says. The rows of W (O, I) are dealt out evenly
    to `streams` (parts * GROUPS, STREAMS, L), in order, GROUPS for a part, and a part for a thread;
    in each they begin at the place `at`. The last rows, fewer than there are streams, are the
    `rest`."""
    streams, z = layer[0], room[2]
    numbers, units = rounded(streams, x, room)
    for part in prange(len(streams) // GROUPS):
        part_of_product(layer, part, numbers, units, how, cap, z, y)


@njit(**OPTIONS)
def normed(x, norm, out):
    """A norm of model.py, of x into `out`, which may be x."""
    kind, weight, bias, eps = norm
    mean, square = f32(0), f32(0)
    if kind == LAYER:
        for i in range(len(x)):
            mean += x[i]
        mean /= f32(len(x))
    for i in range(len(x)):
        square += (x[i] - mean) * (x[i] - mean)
    scale = f32(1) / np.sqrt(square / f32(len(x)) + eps)
    for i in range(len(x)):
        out[i] = (x[i] - mean) * scale * weight[i] + bias[i]


@njit(**OPTIONS)
def ready_head(x, norm, cos, sin):
    """A head's query or key, normed and turned by its position's angles, in place."""
    if norm[0] != NONE:
        normed(x, norm, x)
    half = len(cos)  # 0 where positions are learned
    for i in range(half):
        a, b = x[i], x[i + half]
        x[i], x[i + half] = a * cos[i] - b * sin[i], b * cos[i] + a * sin[i]


@njit(**OPTIONS)
def look(q, keys, values, place, score, y):
    """Attention of one head, of q (D) to `keys` and `values` (S, D) up to `place`, into y (D), at
    four places at once that stand far from each other."""
    n, count, scale = (place + 1) // 4, place + 1, f32(1) / np.sqrt(f32(len(q)))
    for t in range(n):
        k0, k1, k2, k3 = keys[t], keys[t + n], keys[t + 2 * n], keys[t + 3 * n]
        z0 = z1 = z2 = z3 = f32(0)
        for d in range(len(q)):
            z0 += q[d] * k0[d]
            z1 += q[d] * k1[d]
            z2 += q[d] * k2[d]
            z3 += q[d] * k3[d]
        score[t], score[t + n], score[t + 2 * n], score[t + 3 * n] = z0, z1, z2, z3
    for t in range(4 * n, count):
        score[t] = sum_from(0, keys[t], q)

    top, whole = f32(-np.inf), f32(0)
    for t in range(count):
        top = max(top, score[t])
    for t in range(count):
        score[t] = exp((score[t] - top) * scale)
        whole += score[t]

    for d in range(len(q)):
        y[d] = f32(0)
    for t in range(n):
        p0, p1, p2, p3 = score[t], score[t + n], score[t + 2 * n], score[t + 3 * n]
        v0, v1, v2, v3 = values[t], values[t + n], values[t + 2 * n], values[t + 3 * n]
        for d in range(len(q)):
            y[d] += p0 * v0[d] + p1 * v1[d] + p2 * v2[d] + p3 * v3[d]
    for t in range(4 * n, count):
        for d in range(len(q)):
            y[d] += score[t] * values[t, d]
    for d in range(len(q)):
        y[d] /= whole


@njit(**OPTIONS)
def remember(qkv, place, k_norm, cos, sin, keys, values):
    """The token's key and value join `keys` and `values` (K, S, D)."""
    K, _, D = keys.shape
    new = qkv[len(qkv) - 2 * K * D :]
    for g in range(K):
        ready_head(new[g * D : (g + 1) * D], k_norm, cos, sin)
        for d in range(D):
            keys[g, place, d] = new[g * D + d]
            values[g, place, d] = new[(K + g) * D + d]


@njit(**OPTIONS)
def one_head(h, qkv, place, q_norm, cos, sin, keys, values, scores, y):
    (K, _, D), H = keys.shape, len(scores)
    g = h * K // H
    for t in range(len(qkv)):
        q = qkv[t, h * D : (h + 1) * D]
        ready_head(q, q_norm, cos[place + t], sin[place + t])
        look(q, keys[g], values[g], place + t, scores[h], y[t, h * D : (h + 1) * D])


@njit(parallel=True, **OPTIONS)
def attend(qkv, place, q_norm, k_norm, cos, sin, keys, values, scores, y):
    """Attention of the tokens from `place` on into y (T, H D): their keys and values join `keys`
    and `values` (K, S, D), and none sees those behind it."""
    for t in range(len(qkv)):
        at = place + t
        remember(qkv[t], at, k_norm, cos[at], sin[at], keys, values)
    for h in prange(len(scores)):
        one_head(h, qkv, place, q_norm, cos, sin, keys, values, scores, y)


@njit(**OPTIONS)
def block(x, place, attention, mlp, cos, sin, keys, values, buffers):
    """A block of model.py, in place of its x (T, C)."""
    attn_norm, wqkv, q_norm, k_norm, wo = attention
    mlp_norm, gate, up, down, activation = mlp
    _, h, qkv, y, wide, scores, room = buffers
    for t in range(len(x)):
        normed(x[t], attn_norm, h[t])
    product(wqkv, h, PLAIN, f32(0), room, qkv)
    attend(qkv, place, q_norm, k_norm, cos, sin, keys, values, scores, y)
    product(wo, y, ADDED, f32(0), room, x)
    for t in range(len(x)):
        normed(x[t], mlp_norm, h[t])
    if activation == SILU:
        product(gate, h, SILU, f32(0), room, wide)
        product(up, h, TIMES, f32(0), room, wide)
    else:
        product(up, h, activation, f32(0), room, wide)
    product(down, wide, ADDED, f32(0), room, x)


@njit(**OPTIONS)
def embed(token, place, embedding, x):
    """What model.py's blocks are given of a token, into x (C)."""
    table, positions, norm = embedding  # positions (0, C) where they are not learned
    for i in range(len(x)):
        x[i] = as_float32(table[token, i])
    if len(positions):
        for i in range(len(x)):
            x[i] += as_float32(positions[place, i])
    if norm[0] != NONE:
        normed(x, norm, x)


@njit(**OPTIONS)
def whole_pass(tokens, place, embedding, blocks, head, angles, memory, buffers, logits):
    """A pass of model.py, of `tokens` (T) from `place` on, into `logits` (T, V)."""
    (cos, sin), (keys, values) = angles, memory
    (norm, layer, cap), (x, h, _, _, _, _, room) = head, buffers
    for t in range(len(tokens)):
        embed(tokens[t], place + t, embedding, x[t])
    for n in range(len(blocks)):
        attention, mlp = blocks[n]
        block(x, place, attention, mlp, cos, sin, keys[n], values[n], buffers)
    for t in range(len(tokens)):
        normed(x[t], norm, h[t])
    product(layer, h, CAPPED if cap > 0 else PLAIN, cap, room, logits)


@njit(**OPTIONS)
def list_of(block):
    """What one call is given of any number of blocks. A `typed.List` of Python's would be compiled
    in each process anew."""
    blocks = List()
    blocks.append(block)
    return blocks


@njit(**OPTIONS)
def append(blocks, block):
    blocks.append(block)
