"""The weights of attention in `forward_sm100`: one group of four warps, one tile of M queries.

A thread has one row: its scores come from tensor memory in strips, its weights go back there, and
nothing is exchanged with other threads but the sum's reciprocal and how much the output shrinks.

Shapes: T packed tokens, U = T rounded up to M, M queries of a tile and J keys of a block.
"""

from __future__ import annotations

from triton import language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.blackwell import (
    TensorMemoryLayout,
    float2,
    get_tmem_reg_layout,
    mbarrier,
)

from hermes_kernels.walk import part

LN2 = gl.constexpr(0.6931471805599453)
# A first maximum that is finite, so that a block masked whole adds exp2(-inf) = 0 and no NaN.
LEAST = gl.constexpr(-1e30)
# By how much, as a power of two, weights may pass 1 before the maximum is taken over.
SLACK = gl.constexpr(8.0)

# Scores are loaded, and weights stored, in strips of columns: as many as fit into registers. The
# first two are half of a block, with which its products may begin. Three wide ones in a row would
# leave gaps between registers, and what other roles need would be spilled.
STRIPS = gl.constexpr(5)
# -inf instead of the scores whose bit is not set. By hand, as LLVM packs the conditions of a
# `gl.where` anew: 223 instructions more a block.
MASK = gl.constexpr(
    """{
    .reg .pred seen;
    .reg .b32 bit;
    and.b32 bit, $2, $3;
    setp.ne.b32 seen, bit, 0;
    selp.b32 $0, $1, 0xFF800000, seen;
}"""
)
# 2^x on [-1/2, 1/2] as 1 + C1 x + ... + C4 x^4, off by at most 2.9e-6 of its value.
C1, C2 = gl.constexpr(0.6931241750717163), gl.constexpr(0.24024099111557007)
C3, C4 = gl.constexpr(0.05590646341443062), gl.constexpr(0.009582862257957458)
# Added to a float32, it leaves the nearest integer in the lowest bits.
ROUND = gl.constexpr(12582912.0)
LOWEST = gl.constexpr(-127.0)  # 2^-127 has the bits of 0


@gluon.constexpr_function
def row_a_thread(rows, columns):
    """How four warps hold a part of tensor memory: each thread one row."""
    part = TensorMemoryLayout((rows, columns), col_stride=1)
    return get_tmem_reg_layout(gl.float32, (rows, columns), part, 4)


@gluon.constexpr_function
def left(strip):
    """First column of a strip; the last is half a strip, whose powers are polynomials."""
    return (0, 32, 64, 80, 112)[strip]


@gluon.constexpr_function
def width(strip):
    """Its columns."""
    return (32, 32, 16, 32, 16)[strip]


@gluon.jit
def weights_in(s, dtype: gl.constexpr):
    """P: [M, J] of ``dtype`` in the first columns of S."""
    M: gl.constexpr = s.shape[0]
    J: gl.constexpr = s.shape[1]
    whole: gl.constexpr = TensorMemoryLayout((M, J), col_stride=1)
    return s._reinterpret(dtype, [M, 2 * J], whole).slice(0, J)


@gluon.jit
def pairs(x, COLUMNS: gl.constexpr):
    """[M] as [M, COLUMNS], two columns to a register pair."""
    layout: gl.constexpr = row_a_thread(x.shape[0], COLUMNS)
    x = gl.convert_layout(x, gl.SliceLayout(1, layout))
    return float2.pack(x[:, None].broadcast_to(x.shape[0], COLUMNS), 1)


@gluon.jit
def softmax(
    x: gl.constexpr, s, shrinks, s_ready, p_ready, a_ready, a_free, lse_ptr, starts, blocks, scale,
    row, down, first, after, rest, count, T, U, dtype: gl.constexpr,
):  # fmt: skip
    """The weights of tile x, which begins at token row + x * down, and its log-sum-exp."""
    M: gl.constexpr = s.shape[0]
    J: gl.constexpr = s.shape[1]
    rows: gl.constexpr = gl.SliceLayout(1, row_a_thread(M, 32))
    begin = row + x * down
    t = begin + gl.arange(0, M, rows)  # [M]
    start = gl.load(starts + gl.minimum(t, T - 1))
    last_start = gl.load(starts + gl.minimum(begin + M, T) - 1)
    # The last tile of an odd group may begin past T, where there is nothing more to wait for.
    inner = gl.where(last_start == first, gl.minimum((begin + 1 - first) // J, count), 0)
    top = gl.full([M], LEAST, gl.float32, rows)
    total = gl.full([M], 0.0, gl.float32, rows)
    for i in range(inner):
        mbarrier.wait(s_ready, i & 1)
        strips = _scores(s)
        top, total = _weigh(
            x, strips, s, shrinks, p_ready, a_ready, a_free, top, total, i, scale, dtype
        )
    for i in range(inner, count):
        n, end = part(i, first, after, rest, blocks, J)
        mbarrier.wait(s_ready, i & 1)
        strips = _masked(_scores(s), start - n, gl.minimum(t, end - 1) - n)
        top, total = _weigh(
            x, strips, s, shrinks, p_ready, a_ready, a_free, top, total, i, scale, dtype
        )
    mbarrier.wait(a_free, (count & 1) ^ 1)
    shrinks.store(1 / total)
    mbarrier.arrive(a_ready)
    gl.store(lse_ptr + t, (top + gl.log2(total)) * LN2, mask=t < U)


@gluon.jit
def _weigh(
    x: gl.constexpr, strips, s, shrinks, p_ready, a_ready, a_free, top, total, i, scale,
    dtype: gl.constexpr,
):  # fmt: skip
    """P of one block from its scores, and the new maximum and sum of each row."""
    rows: gl.constexpr = gl.SliceLayout(1, row_a_thread(s.shape[0], 32))
    new_top = top
    for c in gl.static_range(STRIPS):
        highest = gl.convert_layout(gl.max(strips[c], 1), rows)
        new_top = gl.maximum(new_top, highest * scale)
    new_top = gl.where(new_top - top > SLACK, new_top, top)
    shrink = gl.exp2(top - new_top)
    mbarrier.wait(a_free, (i & 1) ^ 1)
    shrinks.store(shrink)
    mbarrier.arrive(a_ready)
    total = total * shrink
    p = weights_in(s, dtype)
    for c in gl.static_range(STRIPS):
        y = float2.pack(strips[c], 1)
        y = float2.fma(y, float2.full_like(y, scale), pairs(-new_top, width(c)))
        weights = _power(y) if c == STRIPS - 1 else gl.exp2(float2.unpack(y, 1))
        p.slice(left(c), width(c)).store(weights.to(dtype))
        even, odd = float2.unpack2(float2.pack(weights, 1).sum(1))
        total = total + gl.convert_layout(even + odd, rows)
        if c == 1:
            mbarrier.arrive(p_ready.index(2 * x))
    mbarrier.arrive(p_ready.index(2 * x + 1))
    return new_top, total


@gluon.jit
def _scores(s):
    """S in strips."""
    strips = ()
    for c in gl.static_range(STRIPS):
        strip = s.slice(left(c), width(c)).load(row_a_thread(s.shape[0], width(c)))
        strips = strips + (strip,)  # type: ignore[assignment]
    return strips


@gluon.jit
def _masked(strips, low, high):
    """Scores in columns from ``low`` to ``high``, which are [M]; the others are -inf."""
    kept = ()
    for c in gl.static_range(STRIPS):
        strip = _masked_strip(strips[c], low - left(c), high - left(c))
        kept = kept + (strip,)  # type: ignore[assignment]
    return kept


@gluon.jit
def _masked_strip(strip, low, high):
    """The same of one strip of at most 32 columns."""
    M: gl.constexpr = strip.shape[0]
    COLUMNS: gl.constexpr = strip.shape[1]
    layout: gl.constexpr = row_a_thread(M, COLUMNS)
    # A bit for each column that is seen; shifts that go too far are those of rows that see none.
    bits = ((2 << gl.minimum(high, 31)) - 1) & (-1 << gl.maximum(low, 0))
    bits = gl.where((high >= 0) & (low <= 31), bits, 0)
    seen = gl.convert_layout(bits, gl.SliceLayout(1, layout))[:, None]
    bit = (1 << gl.arange(0, COLUMNS, gl.SliceLayout(0, layout)))[None, :]
    return gl.inline_asm_elementwise(
        MASK, "=r,r,r,r", [strip, seen, bit], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _power(x):
    """2^x by a polynomial: what float units do while the one that knows exponentials is busy."""
    # NaN stays NaN or becomes infinite; it must not become a weight of 0.
    x = gl.maximum(float2.unpack(x, 1), LOWEST, propagate_nan=tl.PropagateNan.ALL)
    x = float2.pack(x, 1)
    round = float2.full_like(x, gl.to_tensor(ROUND))
    shifted = x + round
    rest = x - (shifted - round)
    power = float2.full_like(x, gl.to_tensor(C4))
    power = float2.fma(power, rest, float2.full_like(x, gl.to_tensor(C3)))
    power = float2.fma(power, rest, float2.full_like(x, gl.to_tensor(C2)))
    power = float2.fma(power, rest, float2.full_like(x, gl.to_tensor(C1)))
    power = float2.fma(power, rest, float2.full_like(x, gl.to_tensor(1.0)))
    exponent = float2.unpack(shifted, 1).to(gl.int32, bitcast=True) << 23
    bits = float2.unpack(power, 1).to(gl.int32, bitcast=True) + exponent
    return bits.to(gl.float32, bitcast=True)
