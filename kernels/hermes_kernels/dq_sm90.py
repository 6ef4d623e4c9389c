"""dq of `varlen_attention` for Hopper (sm_90), in Gluon: a program walks over the keys of one query
tile after another.

A group of warps asks for a block's scores S = q @ k' and for R = dout @ v', then adds the block
before to dq while it makes dS = P * (R - delta). Masked are only the blocks that not all queries of
the tile see whole, the last ones. Tiles follow one another as in `forward_sm90`.

Shapes: T packed tokens, N query heads, K key heads, G = N / K, H head size, U = T rounded up to
TILE, M queries of half a tile and J keys of a block.
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
    made,
    masked,
    next_of,
    note,
    notes,
    tile_of,
    tiles_of,
    vectors,
)
from hermes_kernels.launch import launch_of, multiprocessors, on, programs_of
from hermes_kernels.places import Places
from hermes_kernels.walk import SHIFTS, back, part


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, dout_desc, exponents_desc, deltas_desc, q, dout, exponents, deltas,
    told, k, v, q_ready, q_free, k_ready, k_free, v_ready, v_free, starts, ends, block_of, blocks,
    order, mine, tiles, stay, T, U, N, G: gl.constexpr,
):  # fmt: skip
    """Of each tile its first keys, its notes, q, dout and their statistics, and its other blocks,
    in turn."""
    HALF: gl.constexpr = q_desc.block_shape[0]
    J: gl.constexpr = k_desc.block_shape[0]
    H: gl.constexpr = k_desc.block_shape[1]
    bytes: gl.constexpr = q_desc.block_type.nbytes + deltas_desc.block_type.nbytes
    done = 0  # blocks of the tiles before
    for nth in range(mine):
        tile = tile_of(nth, tiles, stay)
        row, head = gl.load(order + tile // N) * (2 * HALF), tile % N
        first, after, rest, count, inner = back(row, starts, ends, block_of, blocks, T, 2 * HALF, J)
        at = [first, head // G * H]
        fetch(k_desc, at, k, k_ready, k_free, done)
        for x in gl.static_range(2):
            ready, t = q_ready.index(x), row + x * HALF
            mbarrier.wait(q_free.index(x), nth & 1 ^ 1)
            note(told.index(x), (row, head, first, after, rest, count, inner))
            mbarrier.expect(ready, 2 * bytes)
            tma.async_copy_global_to_shared(q_desc, [t, head * H], ready, q.index(x))
            tma.async_copy_global_to_shared(dout_desc, [t, head * H], ready, dout.index(x))
            place = [head * SHIFTS * U + t]
            tma.async_copy_global_to_shared(exponents_desc, place, ready, exponents.index(x))
            tma.async_copy_global_to_shared(deltas_desc, place, ready, deltas.index(x))
        fetch(v_desc, at, v, v_ready, v_free, done)
        for i in range(1, count):
            n, _ = part(i, first, after, rest, blocks, J)
            at = [n, head // G * H]
            fetch(k_desc, at, k, k_ready, k_free, done + i)
            fetch(v_desc, at, v, v_ready, v_free, done + i)
        done += count


@gluon.jit
def _step(
    before, slot, lap, border: gl.constexpr, last, dq, ds, q, dout, k, v, q_free, k_ready, k_free,
    v_ready, v_free, t, start, n, end, scale, exponent, delta, zeros, LAYOUT: gl.constexpr,
):  # fmt: skip
    """The scores of the block in a slot, and the block before added to dq meanwhile. The ``last``
    one of a tile is at a border."""
    mbarrier.wait(k_ready.index(slot), lap)
    s = warpgroup_mma(q, k.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(slot), lap)
    r = warpgroup_mma(dout, v.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    dq = warpgroup_mma(ds, k.index(before), dq, is_async=True)
    s = warpgroup_mma_wait(2, [s])
    x = s * scale + exponent[:, None]
    if border:
        x = masked(x, start - n, gl.minimum(t + 1, end) - n)
    p = gl.exp2(x)
    r = warpgroup_mma_wait(1, [r])
    mbarrier.arrive(v_free.index(slot))
    if border:
        mbarrier.arrive(q_free, pred=last)
    ds = made(p * (r - delta[:, None]), LAYOUT, q.dtype)
    dq, ds = warpgroup_mma_wait(0, [dq, ds])
    mbarrier.arrive(k_free.index(before))
    return dq, ds


@gluon.jit
def _dq(
    x: gl.constexpr, dq_desc, q, dout, exponents, deltas, out, told, k, v, q_ready, q_free, k_ready,
    k_free, v_ready, v_free, starts, blocks, scale, mine, T,
):  # fmt: skip
    """Half x of each tile."""
    STAGES: gl.constexpr = k.shape[0]
    M: gl.constexpr = q.shape[1]
    H: gl.constexpr = q.shape[2]
    J: gl.constexpr = k.shape[1]
    in_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, J, 16])
    in_dq: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, H, 16])
    in_ds: gl.constexpr = gl.DotOperandLayout(0, in_dq, 2)
    rows: gl.constexpr = gl.SliceLayout(1, in_s)
    zeros = gl.full([M, J], 0.0, gl.float32, in_s)
    factor = scale * LOG2E
    slot, lap = 0, 0
    for nth in range(mine):
        mbarrier.wait(q_ready.index(x), nth & 1)
        place = told.index(x)
        row, head, first, after, rest, count, inner = all_noted(place)
        begin = row + x * M
        t = begin + gl.arange(0, M, rows)
        start = gl.load(starts + gl.minimum(t, T - 1))
        exponent, delta = exponents.index(x).load(rows), deltas.index(x).load(rows)
        mbarrier.wait(k_ready.index(slot), lap)
        s = warpgroup_mma(
            q.index(x), k.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        mbarrier.wait(v_ready.index(slot), lap)
        r = warpgroup_mma(
            dout.index(x), v.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        s, r = warpgroup_mma_wait(0, [s, r])
        mbarrier.arrive(v_free.index(slot))
        mbarrier.arrive(q_free.index(x), pred=count == 1)
        weight = s * factor + exponent[:, None]
        if inner == 0:
            weight = masked(weight, start - first, gl.minimum(t + 1, after) - first)
        ds = gl.convert_layout(gl.exp2(weight) * (r - delta[:, None]), in_ds).to(q.dtype)
        dq = gl.full([M, H], 0.0, gl.float32, in_dq)
        before = slot
        slot, lap = next_of(slot, lap, STAGES)
        for _ in range(1, inner):
            dq, ds = _step(
                before, slot, lap, False, False, dq, ds, q.index(x), dout.index(x), k, v,
                q_free.index(x), k_ready, k_free, v_ready, v_free, t, start, first, after, factor,
                exponent, delta, zeros, in_ds,
            )  # fmt: skip
            before = slot
            slot, lap = next_of(slot, lap, STAGES)
        for i in range(gl.maximum(inner, 1), count):
            n, end = part(i, first, after, rest, blocks, J)
            dq, ds = _step(
                before, slot, lap, True, i == count - 1, dq, ds, q.index(x), dout.index(x), k, v,
                q_free.index(x), k_ready, k_free, v_ready, v_free, t, start, n, end, factor,
                exponent, delta, zeros, in_ds,
            )  # fmt: skip
            before = slot
            slot, lap = next_of(slot, lap, STAGES)
        dq = warpgroup_mma(ds, k.index(before), dq, is_async=True)
        dq = warpgroup_mma_wait(0, [dq]) * scale
        mbarrier.arrive(k_free.index(before))
        tma.store_wait(0)
        out.index(x).store(dq.to(q.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(dq_desc, [begin, head * H], out.index(x))
    tma.store_wait(0)


@gluon.jit
def dq_kernel(
    q_desc, k_desc, v_desc, dout_desc, exponents_desc, deltas_desc, dq_desc, starts, ends, block_of,
    blocks, order, scale, T, U, N, stay, G: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dq of all query tiles of all heads, by any number of programs."""
    HALF: gl.constexpr = q_desc.block_shape[0]
    J: gl.constexpr = k_desc.block_shape[0]
    H: gl.constexpr = q_desc.block_shape[1]
    dtype: gl.constexpr = q_desc.dtype
    q = gl.allocate_shared_memory(dtype, [2, HALF, H], q_desc.layout)
    dout = gl.allocate_shared_memory(dtype, [2, HALF, H], dout_desc.layout)
    out = gl.allocate_shared_memory(dtype, [2, HALF, H], dq_desc.layout)
    k = gl.allocate_shared_memory(dtype, [STAGES, J, H], k_desc.layout)
    v = gl.allocate_shared_memory(dtype, [STAGES, J, H], v_desc.layout)
    exponents = gl.allocate_shared_memory(gl.float32, [2, HALF], exponents_desc.layout)
    deltas = gl.allocate_shared_memory(gl.float32, [2, HALF], deltas_desc.layout)
    q_ready, k_ready, v_ready = barriers(2, 1), barriers(STAGES, 1), barriers(STAGES, 1)
    q_free, k_free, v_free = barriers(2, 1), barriers(STAGES, 2), barriers(STAGES, 2)
    told, tiles = notes(2), U // (2 * HALF) * N
    mine = tiles_of(tiles, stay)
    gl.warp_specialize(
        [
            (_dq, (
                0, dq_desc, q, dout, exponents, deltas, out, told, k, v, q_ready, q_free, k_ready,
                k_free, v_ready, v_free, starts, blocks, scale, mine, T,
            )),
            (_dq, (
                1, dq_desc, q, dout, exponents, deltas, out, told, k, v, q_ready, q_free, k_ready,
                k_free, v_ready, v_free, starts, blocks, scale, mine, T,
            )),
            (_load, (
                q_desc, k_desc, v_desc, dout_desc, exponents_desc, deltas_desc, q, dout, exponents,
                deltas, told, k, v, q_ready, q_free, k_ready, k_free, v_ready, v_free, starts, ends,
                block_of, blocks, order, mine, tiles, stay, T, U, N, G,
            )),
        ],
        [4, 1],
        [GROUP_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip


def dq_of(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, dout_TNH: Tensor, exponents_NSU: Tensor,
    deltas_NSU: Tensor, places: Places, scale: float,
) -> Tensor:  # fmt: skip
    """As `varlen_attention.dq_of`, for head sizes of 64 and 128, on a GPU of sm_90."""
    tokens, heads, size = q_TNH.shape
    dq = torch.empty_like(q_TNH)
    given = (boxes(x, ROWS) for x in (q_TNH, k_TKH, v_TKH, dout_TNH))
    stages = launch_of(90, "dq_sm90", size).stages
    tiles = heads * places.query_order.numel()
    programs, stay = programs_of(tiles, multiprocessors(q_TNH.device))
    with on(q_TNH):
        dq_kernel[(programs,)](
            *given, vectors(exponents_NSU), vectors(deltas_NSU), boxes(dq, ROWS), *places[:4],
            places.query_order, scale, tokens, exponents_NSU.shape[2], heads, stay,
            heads // k_TKH.shape[1], stages, num_warps=WARPS, maxnreg=REGISTERS,
        )  # fmt: skip
    return dq
