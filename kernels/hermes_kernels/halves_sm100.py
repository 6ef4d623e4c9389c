"""What `dq_sm100` and `dkdv_sm100` share: scores in tensor memory, halves of them, products.

Each half belongs to a group of four warps, of which a thread has half a row. It takes scores to
registers in strips of columns, two to a register pair, and puts what it makes of them, in the
16-bit type of products, into the first columns of its half. The ring has two blocks for a turn:
what S is made from, and what R is.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.blackwell import (
    TensorMemoryLayout,
    float2,
    mbarrier,
    tcgen05_mma,
)

from hermes_kernels.softmax_sm100 import _masked_strip, row_a_thread

# Of the first role, and registers of a thread: all have these at the start, and give or take when
# the roles begin.
WARPS = 4
REGISTERS = 168
WEIGH_REGISTERS = gl.constexpr(232)
OTHER_REGISTERS = gl.constexpr(40)
STRIP = gl.constexpr(32)  # columns that a thread has in registers at once


@gluon.jit
def half(scores, x: gl.constexpr, dtype: gl.constexpr):
    """What becomes of half x of [rows, columns] scores: [rows, columns / 2] of ``dtype``."""
    ROWS: gl.constexpr = scores.shape[0]
    COLUMNS: gl.constexpr = scores.shape[1]
    whole: gl.constexpr = TensorMemoryLayout((ROWS, COLUMNS), col_stride=1)
    wide = scores._reinterpret(dtype, [ROWS, 2 * COLUMNS], whole)
    return wide.slice(x * COLUMNS, COLUMNS // 2)


@gluon.jit
def strips_of(scores, x: gl.constexpr):
    """Half x of scores, in pairs."""
    HALF: gl.constexpr = scores.shape[1] // 2
    strips = ()
    for c in gl.static_range(HALF // STRIP):
        part = scores.slice(x * HALF, HALF).slice(c * STRIP, STRIP)
        loaded = part.load(row_a_thread(scores.shape[0], STRIP))
        strips = strips + (float2.pack(loaded, 1),)  # type: ignore[assignment]
    return strips


@gluon.jit
def masked(strips, low, high):
    """Columns from ``low`` to ``high``, which are [rows]; the others are -inf."""
    kept = ()
    for c in gl.static_range(len(strips)):
        strip = _masked_strip(strips[c], low - c * STRIP, high - c * STRIP)
        kept = kept + (strip,)  # type: ignore[assignment]
    return kept


@gluon.jit
def score(rows, ring, into, ready, j, told):
    """``rows`` with the j-th block of the ring, turned."""
    STAGES: gl.constexpr = ring.shape[0]
    mbarrier.wait(ready.index(j % STAGES), j // STAGES & 1)
    block = ring.index(j % STAGES).permute((1, 0))
    tcgen05_mma(rows, block, into, use_acc=False, mbarriers=told)


@gluon.jit
def add_differences(r, ring, sums, z_ready, i, told):
    """sums += Z @ the first block of the i-th turn."""
    HALF: gl.constexpr = r.shape[1] // 2
    block = ring.index(2 * i % ring.shape[0])
    mbarrier.wait(z_ready.index(0), i & 1)
    tcgen05_mma(half(r, 0, ring.dtype), block.slice(0, HALF), sums, use_acc=i > 0)
    mbarrier.wait(z_ready.index(1), i & 1)
    z = half(r, 1, ring.dtype)
    tcgen05_mma(z, block.slice(HALF, HALF), sums, use_acc=True, mbarriers=[told])
