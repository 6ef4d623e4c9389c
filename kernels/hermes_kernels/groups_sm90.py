"""What the kernels for Hopper (sm_90) share: how warps are divided, barriers, operands, masks and
boxes.

A program takes one tile, or some, one after another (`launch.programs_of`). It has three parts:
two groups of four warps that multiply, half of each tile each, and a warp that loads, and so looks
up where the next tile lies while the groups are at this one. A group is given most of the registers
that the loading warp has no use for. Blocks are counted from each segment's start, and a tile meets
them in rising order (`walk.part`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LOG2E = gl.constexpr(1.4426950408889634)
# Of the first group, and registers of a thread: all have these at the start, and give or take when
# the parts begin.
WARPS = 4
ROWS = 64  # tokens of a box that a group multiplies or stores
REGISTERS = 168
GROUP_REGISTERS = gl.constexpr(240)
LOAD_REGISTERS = gl.constexpr(24)
NOTES = gl.constexpr(8)  # numbers of a tile that a group is told, no more
TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}

# The compiler may make late what a wait does not need; what might be stored must be there before.
# No number that is rounded to 16 bits becomes this NaN.
MADE = gl.constexpr(
    """{
    .reg .pred never;
    .reg .b32 nowhere;
    mov.b32 nowhere, 0;
    setp.eq.b32 never, $4, 0xFFC1FFC1;
    @never st.shared.v4.b32 [nowhere], {$4, $5, $6, $7};
    mov.b32 $0, $4;
    mov.b32 $1, $5;
    mov.b32 $2, $6;
    mov.b32 $3, $7;
}"""
)


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """So many barriers, each of so many arrivals a phase."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def tile_of(nth, tiles, stay):
    """Which of all tiles, in falling length, a program takes as its nth.

    The first ``stay`` programs take them forth and back: who has the longest of one round has the
    shortest of the next. Each of the others has one of the last tiles (`launch.programs_of`). A
    tile's bits are the same, whoever takes it.
    """
    programs, me = gl.num_programs(0), gl.program_id(0)
    place = gl.where(nth % 2 == 0, me, stay - 1 - me)
    return gl.where(me < stay, nth * stay + place, tiles - programs + me)


@gluon.jit
def tiles_of(tiles, stay):
    """How many of all tiles a program takes."""
    programs, me = gl.num_programs(0), gl.program_id(0)
    return gl.where(me < stay, (tiles - programs) // stay + 1, 1)


@gluon.jit
def notes(COUNT: gl.constexpr):
    """Room for what the loading warp tells the groups, so many times."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return gl.allocate_shared_memory(gl.int32, [COUNT, NOTES], layout)


@gluon.jit
def note(place, numbers):
    """By the loading warp, before it arrives where the group waits."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for i in gl.static_range(len(numbers)):
        place.slice(i, 1).store(gl.full([1], numbers[i], gl.int32, one))


@gluon.jit
def noted(place, i: gl.constexpr):
    """The i-th number, by a group."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.sum(place.slice(i, 1).load(one), 0)


@gluon.jit
def all_noted(place):
    """What a group is told of a query tile: its first token and head, and `walk.back`'s."""
    return (
        noted(place, 0), noted(place, 1), noted(place, 2), noted(place, 3), noted(place, 4),
        noted(place, 5), noted(place, 6),
    )  # fmt: skip


@gluon.jit
def fetch(desc, at, ring, ready, free, i):
    """The i-th block into its place in a ring."""
    STAGES: gl.constexpr = ring.shape[0]
    slot, lap = i % STAGES, i // STAGES & 1
    mbarrier.wait(free.index(slot), lap ^ 1)
    mbarrier.expect(ready.index(slot), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, at, ready.index(slot), ring.index(slot))


@gluon.jit
def next_of(slot, lap, STAGES: gl.constexpr):
    """The place in a ring after this one, and its lap's parity."""
    last = slot == STAGES - 1
    return gl.where(last, 0, slot + 1), gl.where(last, lap ^ 1, lap)


@gluon.jit
def made(x, LAYOUT: gl.constexpr, dtype: gl.constexpr):
    """x as an operand in 16 bits, made before what waits after it."""
    x = gl.convert_layout(x, LAYOUT).to(dtype)
    return gl.inline_asm_elementwise(
        MADE, "=r,=r,=r,=r,r,r,r,r", [x], dtype=x.dtype, is_pure=False, pack=8
    )


@gluon.jit
def masked(x, low, high):
    """x, and -inf outside of each row's columns from ``low`` to before ``high``.

    Of every eight columns a thread has two at one place, which is taken from the bounds: so columns
    are constants, for which no register is kept.
    """
    columns: gl.constexpr = gl.SliceLayout(0, x.type.layout)
    c = gl.arange(0, x.shape[1], columns)
    past = (c & -8)[None, :] - (low[:, None] - (c & 7)[None, :])
    count = gl.maximum(high - low, 0)[:, None]
    seen = past.to(gl.uint32, bitcast=True) < count.to(gl.uint32, bitcast=True)
    return gl.where(seen, x, float("-inf"))


def boxes(x_TNH: Tensor, rows: int) -> TensorDescriptor:
    """A contiguous [T, N, H] in boxes of so many tokens of one head."""
    block = [rows, x_TNH.shape[2]]
    layout = gl.NVMMASharedLayout.get_default_for(block, TYPES[x_TNH.dtype])
    return TensorDescriptor.from_tensor(x_TNH.flatten(1), block, layout)


def vectors(x_NSU: Tensor) -> TensorDescriptor:
    """Contiguous statistics in boxes of the tokens that a group multiplies, or of a block's."""
    layout = gl.NVMMASharedLayout.get_default_for([ROWS], TYPES[x_NSU.dtype])
    return TensorDescriptor.from_tensor(x_NSU.view(-1), [ROWS], layout)
