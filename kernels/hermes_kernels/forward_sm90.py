"""The forward of `varlen_attention` for Hopper (sm_90), in Gluon: two groups of warps multiply, one
warp loads.

A program takes one query tile of M = 128 of one head after another, half of each for each group. A
group asks for the scores of the next block before it asks for the output of this one, so that its
exponentials are made while the tensor cores work. Blocks are counted from each segment's start and
come in rising order; masked are only those that not all queries of the tile see whole, the last
ones. The next tile's q is there before this one ends, and its first blocks come as room for them is
free: its first scores are made while this one's output is stored, from a place of its own.

As in FlashAttention-3 (arXiv 2407.08608), but equal inputs give equal bits.

Shapes: T packed tokens, N query heads, K key heads, G = N / K, H head size, U = T rounded up to
M, M queries of a tile and J keys of a block (`walk.part`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hermes_kernels.groups_sm90 import (
    GROUP_REGISTERS,
    LOAD_REGISTERS,
    LOG2E,
    REGISTERS,
    ROWS,
    WARPS,
    all_noted,
    barriers,
    boxes,
    fetch,
    masked,
    note,
    notes,
    tile_of,
    tiles_of,
)
from hermes_kernels.launch import TILE, launch_of, multiprocessors, on, programs_of, room_for
from hermes_kernels.places import Places
from hermes_kernels.walk import back, part

LN2 = gl.constexpr(0.6931471805599453)
# A first maximum that is finite, so that a block masked whole adds exp2(-inf) = 0 and no NaN.
LEAST = gl.constexpr(-1e30)

# The compiler may make late what a wait does not need; what might be stored must be there before.
# A sum of weights is never negative.
MADE = gl.constexpr(
    """{
    .reg .pred never;
    .reg .b32 nowhere;
    mov.b32 nowhere, 0;
    setp.lt.f32 never, $1, 0f00000000;
    @never st.shared.f32 [nowhere], $1;
    mov.f32 $0, $1;
}"""
)


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, q, told, k, v, q_ready, q_free, k_ready, k_free, v_ready, v_free,
    starts, ends, block_of, blocks, order, mine, tiles, stay, T, N, G: gl.constexpr,
):  # fmt: skip
    """Of each tile its notes and q, then each block of keys and of values, in turn."""
    HALF: gl.constexpr = q_desc.block_shape[0]
    J: gl.constexpr = k_desc.block_shape[0]
    H: gl.constexpr = k_desc.block_shape[1]
    done = 0  # blocks of the tiles before
    for nth in range(mine):
        tile = tile_of(nth, tiles, stay)
        row, head = gl.load(order + tile // N) * (2 * HALF), tile % N
        first, after, rest, count, inner = back(row, starts, ends, block_of, blocks, T, 2 * HALF, J)
        for x in gl.static_range(2):
            place = 2 * (nth & 1) + x
            mbarrier.wait(q_free.index(place), nth >> 1 & 1 ^ 1)
            note(told.index(place), (row, head, first, after, rest, count, inner))
            mbarrier.expect(q_ready.index(place), q_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                q_desc, [row + x * HALF, head * H], q_ready.index(place), q.index(place)
            )
        for i in range(count):
            n, _ = part(i, first, after, rest, blocks, J)
            at = [n, head // G * H]
            fetch(k_desc, at, k, k_ready, k_free, done + i)
            fetch(v_desc, at, v, v_ready, v_free, done + i)
        done += count


@gluon.jit
def _weigh(s, top, scale, LAYOUT: gl.constexpr, dtype: gl.constexpr):
    """Weights of a block, as an operand of the next product; the new maximum; the sum; and what
    everything before is to shrink by."""
    new_top = gl.maximum(top, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - new_top[:, None])
    shrink = gl.exp2(top - new_top)
    total = gl.sum(p, 1)
    return gl.convert_layout(p, LAYOUT).to(dtype), new_top, total, shrink


@gluon.jit
def _step(
    i, border: gl.constexpr, p, acc, top, total, q, k, v, k_ready, k_free, v_ready, v_free,
    t, start, n, end, scale, zeros, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Asks for the scores of block i, and for the output of the block before, during which the
    weights of block i are made."""
    STAGES: gl.constexpr = k.shape[0]
    slot, before = i % STAGES, (i - 1) % STAGES
    mbarrier.wait(k_ready.index(slot), i // STAGES & 1)
    s = warpgroup_mma(q, k.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(before), (i - 1) // STAGES & 1)
    acc = warpgroup_mma(p, v.index(before), acc, is_async=True)
    s = warpgroup_mma_wait(1, [s])
    mbarrier.arrive(k_free.index(slot))
    if border:
        s = masked(s, start - n, gl.minimum(t + 1, end) - n)
    p, top, more, shrink = _weigh(s, top, scale, LAYOUT, v.dtype)
    more = gl.inline_asm_elementwise(MADE, "=f,f", [more], dtype=gl.float32, is_pure=False, pack=1)
    acc, p = warpgroup_mma_wait(0, [acc, p])
    mbarrier.arrive(v_free.index(before))
    return p, _shrunk(acc, shrink), top, total * shrink + more


@gluon.jit
def _shrunk(acc, shrink):
    """Each row of the output times its factor."""
    return acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]


@gluon.jit
def _begin(s, scale, t, start, first, after, inner, LAYOUT: gl.constexpr, dtype: gl.constexpr):
    """Weights of a tile's first block, their maximum and sum."""
    if inner == 0:
        s = masked(s, start - first, gl.minimum(t + 1, after) - first)
    top = gl.full([s.shape[0]], LEAST, gl.float32, t.type.layout)
    p, top, total, _ = _weigh(s, top, scale, LAYOUT, dtype)
    return p, top, total


@gluon.jit
def _attend(
    x: gl.constexpr, out_desc, q, out, told, k, v, q_ready, q_free, k_ready, k_free, v_ready,
    v_free, lse_ptr, starts, blocks, scale, mine, T, U,
):  # fmt: skip
    """Half x of each tile."""
    STAGES: gl.constexpr = k.shape[0]
    M: gl.constexpr = q.shape[1]
    H: gl.constexpr = q.shape[2]
    J: gl.constexpr = k.shape[1]
    in_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, J, 16])
    in_o: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, H, 16])
    in_p: gl.constexpr = gl.DotOperandLayout(0, in_o, 2)
    rows: gl.constexpr = gl.SliceLayout(1, in_s)
    zeros = gl.full([M, J], 0.0, gl.float32, in_s)
    mbarrier.wait(q_ready.index(x), 0)
    row, head, first, after, rest, count, inner = all_noted(told.index(x))
    t = row + x * M + gl.arange(0, M, rows)
    start = gl.load(starts + gl.minimum(t, T - 1))
    mbarrier.wait(k_ready.index(0), 0)
    s = warpgroup_mma(q.index(x), k.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, [s])
    mbarrier.arrive(k_free.index(0))
    p, top, total = _begin(s, scale, t, start, first, after, inner, in_p, v.dtype)
    done = 0  # blocks of the tiles before
    for nth in range(mine):
        place = 2 * (nth & 1) + x
        acc = gl.full([M, H], 0.0, gl.float32, in_o)
        for i in range(1, inner):
            p, acc, top, total = _step(
                done + i, False, p, acc, top, total, q.index(place), k, v, k_ready, k_free, v_ready,
                v_free, t, start, first, after, scale, zeros, in_p,
            )  # fmt: skip
        for i in range(gl.maximum(inner, 1), count):
            n, end = part(i, first, after, rest, blocks, J)
            p, acc, top, total = _step(
                done + i, True, p, acc, top, total, q.index(place), k, v, k_ready, k_free, v_ready,
                v_free, t, start, n, end, scale, zeros, in_p,
            )  # fmt: skip
        done += count
        # After the last tile this one's last scores once more, for nobody.
        more = nth + 1 < mine
        then, ahead = gl.where(more, done, done - 1), gl.where(more, nth + 1, nth)
        place_then = 2 * (ahead & 1) + x
        slot, before = then % STAGES, (done - 1) % STAGES
        mbarrier.wait(v_ready.index(before), (done - 1) // STAGES & 1)
        acc = warpgroup_mma(p, v.index(before), acc, is_async=True)
        mbarrier.wait(q_ready.index(place_then), ahead >> 1 & 1, pred=more)
        mbarrier.wait(k_ready.index(slot), then // STAGES & 1, pred=more)
        s = warpgroup_mma(
            q.index(place_then), k.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        acc = warpgroup_mma_wait(1, [acc])
        mbarrier.arrive(v_free.index(before))
        acc = _shrunk(acc, 1 / total)
        tma.store_wait(0)
        out.index(x).store(acc.to(q.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [row + x * M, head * H], out.index(x))
        gl.store(lse_ptr + head.to(gl.int64) * U + t, (top + gl.log2(total)) * LN2)
        row, head, first, after, rest, count, inner = all_noted(told.index(place_then))
        t = row + x * M + gl.arange(0, M, rows)
        start = gl.load(starts + gl.minimum(t, T - 1))
        s = warpgroup_mma_wait(0, [s])
        mbarrier.arrive(q_free.index(place))
        mbarrier.arrive(k_free.index(slot), pred=more)
        p, top, total = _begin(s, scale, t, start, first, after, inner, in_p, v.dtype)
    tma.store_wait(0)


@gluon.jit
def forward_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, starts, ends, block_of, blocks, order, scale, T, U,
    N, stay, G: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out and lse of all query tiles of all heads, by any number of programs."""
    HALF: gl.constexpr = q_desc.block_shape[0]
    J: gl.constexpr = k_desc.block_shape[0]
    H: gl.constexpr = q_desc.block_shape[1]
    dtype: gl.constexpr = q_desc.dtype
    q = gl.allocate_shared_memory(dtype, [4, HALF, H], q_desc.layout)
    out = gl.allocate_shared_memory(dtype, [2, HALF, H], out_desc.layout)
    k = gl.allocate_shared_memory(dtype, [STAGES, J, H], k_desc.layout)
    v = gl.allocate_shared_memory(dtype, [STAGES, J, H], v_desc.layout)
    q_ready, k_ready, v_ready = barriers(4, 1), barriers(STAGES, 1), barriers(STAGES, 1)
    q_free, k_free, v_free = barriers(4, 1), barriers(STAGES, 2), barriers(STAGES, 2)
    told, tiles = notes(4), U // (2 * HALF) * N
    mine = tiles_of(tiles, stay)
    scale *= LOG2E
    gl.warp_specialize(
        [
            (_attend, (
                0, out_desc, q, out, told, k, v, q_ready, q_free, k_ready, k_free, v_ready, v_free,
                lse_ptr, starts, blocks, scale, mine, T, U,
            )),
            (_attend, (
                1, out_desc, q, out, told, k, v, q_ready, q_free, k_ready, k_free, v_ready, v_free,
                lse_ptr, starts, blocks, scale, mine, T, U,
            )),
            (_load, (
                q_desc, k_desc, v_desc, q, told, k, v, q_ready, q_free, k_ready, k_free, v_ready,
                v_free, starts, ends, block_of, blocks, order, mine, tiles, stay, T, N, G,
            )),
        ],
        [4, 1],
        [GROUP_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip


def forward(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, places: Places, scale: float
) -> tuple[Tensor, Tensor]:
    """As `varlen_attention.forward`, for head sizes of 64 and 128, on a GPU of sm_90."""
    tokens, heads, size = q_TNH.shape
    kv_heads = k_TKH.shape[1]
    out = torch.empty_like(q_TNH)
    lse = q_TNH.new_empty(
        heads, room_for(heads, tokens, places.query_order.numel()), dtype=torch.float32
    )
    q_boxes, k_boxes, v_boxes, out_boxes = (
        boxes(x, rows) for x, rows in ((q_TNH, ROWS), (k_TKH, TILE), (v_TKH, TILE), (out, ROWS))
    )
    stages = launch_of(90, "forward_sm90", size).stages
    tiles = heads * places.query_order.numel()
    programs, stay = programs_of(tiles, multiprocessors(q_TNH.device))
    with on(q_TNH):
        forward_kernel[(programs,)](
            q_boxes, k_boxes, v_boxes, out_boxes, lse, *places[:4], places.query_order, scale,
            tokens, lse.shape[1], heads, stay, heads // kv_heads, stages, num_warps=WARPS,
            maxnreg=REGISTERS,
        )  # fmt: skip
    return out, lse
