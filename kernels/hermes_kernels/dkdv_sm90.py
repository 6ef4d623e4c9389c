"""dk and dv of `varlen_attention` for Hopper (sm_90), in Gluon: a program walks over the queries of
one key tile after another, of all its query heads.

A group of warps has half of the tile. Of a block of queries it asks for the scores S = k @ q' and
for R = v @ dout'; it adds P @ dout to dv while R is made, and dS @ q to dk, with
dS = P * (R - delta). Sums are added head after head, and block after block in each. Masked are only
the blocks of which some query does not see the whole tile: a head's last and the next head's first
share a loop. Tiles follow one another as in `forward_sm90`.

Shapes: T packed tokens, N query heads, K key heads, G = N / K, H head size, U = T rounded up to
TILE, M queries of a block and J keys of half a tile.
"""

from __future__ import annotations

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
    barriers,
    boxes,
    masked,
    next_of,
    note,
    noted,
    notes,
    tile_of,
    tiles_of,
    vectors,
)
from hermes_kernels.launch import (
    launch_of,
    multiprocessors,
    on,
    parts_of,
    programs_of,
    sum_of_parts,
)
from hermes_kernels.places import Places
from hermes_kernels.walk import on as walk_on
from hermes_kernels.walk import part, statistics_of


@gluon.jit
def _fetch(
    q_desc, dout_desc, exponents_desc, deltas_desc, q, dout, exponents, deltas, q_ready, q_free,
    dout_ready, dout_free, slot, lap, n, head, U,
):  # fmt: skip
    """The block of queries from n on into a slot; returns the slot after it."""
    STAGES: gl.constexpr = q.shape[0]
    H: gl.constexpr = q_desc.block_shape[1]
    bytes: gl.constexpr = q_desc.block_type.nbytes + deltas_desc.block_type.nbytes
    at, place = [n, head * H], [statistics_of(n, head, U)]
    ready = q_ready.index(slot)
    mbarrier.wait(q_free.index(slot), lap ^ 1)
    mbarrier.expect(ready, bytes)
    tma.async_copy_global_to_shared(q_desc, at, ready, q.index(slot))
    tma.async_copy_global_to_shared(exponents_desc, place, ready, exponents.index(slot))
    ready = dout_ready.index(slot)
    mbarrier.wait(dout_free.index(slot), lap ^ 1)
    mbarrier.expect(ready, bytes)
    tma.async_copy_global_to_shared(dout_desc, at, ready, dout.index(slot))
    tma.async_copy_global_to_shared(deltas_desc, place, ready, deltas.index(slot))
    return next_of(slot, lap, STAGES)


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, dout_desc, exponents_desc, deltas_desc, k, v, told, q, dout, exponents,
    deltas, kv_ready, kv_free, q_ready, q_free, dout_ready, dout_free, starts, ends, block_of,
    blocks, order, mine, tiles, stay, shares, heads, T, U, S: gl.constexpr,
):  # fmt: skip
    """Of each tile the first block of queries, its notes, k and v, and its other blocks, of each
    query head in turn."""
    M: gl.constexpr = q_desc.block_shape[0]
    HALF: gl.constexpr = k_desc.block_shape[0]
    H: gl.constexpr = q_desc.block_shape[1]
    slot, lap = 0, 0
    for nth in range(mine):
        tile = tile_of(nth, tiles, stay)
        row, share = gl.load(order + tile // shares) * (2 * HALF), tile % shares
        first, after, rest, count, before, inner = walk_on(
            row, starts, ends, block_of, blocks, T, 2 * HALF, M
        )
        slot, lap = _fetch(
            q_desc, dout_desc, exponents_desc, deltas_desc, q, dout, exponents, deltas, q_ready,
            q_free, dout_ready, dout_free, slot, lap, first, share * heads, U,
        )  # fmt: skip
        for x in gl.static_range(2):
            at = [row + x * HALF, share // S * H]
            mbarrier.wait(kv_free.index(x), nth & 1 ^ 1)
            place = told.index(2 * (nth & 1) + x)
            note(place, (row, share, first, after, rest, count, before, inner))
            mbarrier.expect(kv_ready.index(x), 2 * k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(k_desc, at, kv_ready.index(x), k.index(x))
            tma.async_copy_global_to_shared(v_desc, at, kv_ready.index(x), v.index(x))
        for h in range(heads):
            for i in range(gl.where(h > 0, 0, 1), count):
                n, _ = part(i, first, after, rest, blocks, M)
                slot, lap = _fetch(
                    q_desc, dout_desc, exponents_desc, deltas_desc, q, dout, exponents, deltas,
                    q_ready, q_free, dout_ready, dout_free, slot, lap, n, share * heads + h, U,
                )  # fmt: skip


@gluon.jit
def _step(
    slot, lap, border: gl.constexpr, last, dk, dv, k, v, q, dout, exponents, deltas, kv_free,
    q_ready, q_free, dout_ready, dout_free, low, high, scale, zeros, LAYOUT: gl.constexpr,
):  # fmt: skip
    """dv and dk with what a block of queries adds to them; a key is seen by those from ``low`` to
    before ``high``, at a border, as the ``last`` one of a tile may be."""
    columns: gl.constexpr = gl.SliceLayout(0, zeros.type.layout)
    mbarrier.wait(q_ready.index(slot), lap)
    s = warpgroup_mma(k, q.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(dout_ready.index(slot), lap)
    r = warpgroup_mma(v, dout.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    exponent = exponents.index(slot).load(columns)
    s = warpgroup_mma_wait(1, [s])
    x = s * (scale * LOG2E) + exponent[None, :]
    if border:
        x = masked(x, low, high)
    p = gl.exp2(x)
    dv = warpgroup_mma(
        gl.convert_layout(p, LAYOUT).to(q.dtype), dout.index(slot), dv, is_async=True
    )
    r = warpgroup_mma_wait(1, [r])
    if border:
        mbarrier.arrive(kv_free, pred=last)
    ds = p * (r - deltas.index(slot).load(columns)[None, :])
    dk = warpgroup_mma(gl.convert_layout(ds, LAYOUT).to(q.dtype), q.index(slot), dk, is_async=True)
    dv = warpgroup_mma_wait(1, [dv])
    mbarrier.arrive(dout_free.index(slot))
    dk = warpgroup_mma_wait(0, [dk])
    mbarrier.arrive(q_free.index(slot))
    return dk, dv


@gluon.jit
def _dkdv(
    x: gl.constexpr, dk_desc, dv_desc, k, v, made_dk, made_dv, told, q, dout, exponents, deltas,
    kv_ready, kv_free, q_ready, q_free, dout_ready, dout_free, ends, blocks, scale, mine, heads, T,
):  # fmt: skip
    """Half x of each tile."""
    STAGES: gl.constexpr = q.shape[0]
    M: gl.constexpr = q.shape[1]
    HALF: gl.constexpr = k.shape[1]
    H: gl.constexpr = k.shape[2]
    in_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    in_dk: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, H, 16])
    in_p: gl.constexpr = gl.DotOperandLayout(0, in_dk, 2)
    zeros = gl.full([HALF, M], 0.0, gl.float32, in_s)
    slot, lap = 0, 0
    for nth in range(mine):
        mbarrier.wait(kv_ready.index(x), nth & 1)
        # Read again where they are wanted: beside the sums no register is left for all of them.
        place = told.index(2 * (nth & 1) + x)
        j = noted(place, 0) + x * HALF + gl.arange(0, HALF, gl.SliceLayout(1, in_s))
        end = gl.load(ends + gl.minimum(j, T - 1))
        dk = gl.full([HALF, H], 0.0, gl.float32, in_dk)
        dv = gl.full([HALF, H], 0.0, gl.float32, in_dk)
        for h in range(heads + 1):
            count, before, inner = noted(place, 5), noted(place, 6), noted(place, 7)
            behind = count - before - inner
            for at in range(gl.where(h > 0, -behind, 0), gl.where(h < heads, before, 0)):
                i = gl.where(at < 0, at + count, at)
                n, stop = part(i, noted(place, 2), noted(place, 3), noted(place, 4), blocks, M)
                dk, dv = _step(
                    slot, lap, True, (h == heads) & (at == -1), dk, dv, k.index(x), v.index(x), q,
                    dout, exponents, deltas, kv_free.index(x), q_ready, q_free, dout_ready,
                    dout_free, j - n, gl.minimum(end, stop) - n, scale, zeros, in_p,
                )  # fmt: skip
                slot, lap = next_of(slot, lap, STAGES)
            for _ in range(gl.where(h < heads, inner, 0)):
                dk, dv = _step(
                    slot, lap, False, False, dk, dv, k.index(x), v.index(x), q, dout, exponents,
                    deltas, kv_free.index(x), q_ready, q_free, dout_ready, dout_free, j, end, scale,
                    zeros, in_p,
                )  # fmt: skip
                slot, lap = next_of(slot, lap, STAGES)
        count, before, inner = noted(place, 5), noted(place, 6), noted(place, 7)
        mbarrier.arrive(kv_free.index(x), pred=count == before + inner)
        tma.store_wait(0)
        made_dk.index(x).store((dk * scale).to(k.dtype))
        made_dv.index(x).store(dv.to(v.dtype))
        fence_async_shared()
        begin, share = noted(place, 0) + x * HALF, noted(place, 1)
        # Rows of their own, if equal: what stores share would be kept in a register and spilled.
        tma.async_copy_shared_to_global(dk_desc, [begin, share * H], made_dk.index(x))
        tma.async_copy_shared_to_global(
            dv_desc, [gl.minimum(begin, T), share * H], made_dv.index(x)
        )
    tma.store_wait(0)


@gluon.jit
def dkdv_kernel(
    q_desc, k_desc, v_desc, dout_desc, exponents_desc, deltas_desc, dk_desc, dv_desc, starts, ends,
    block_of, blocks, order, scale, T, U, N, stay, G: gl.constexpr, S: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """dk and dv of all key tiles and key heads, each over one of S shares of its G query heads, by
    any number of programs. Outputs are [T, K * S, H].
    """
    M: gl.constexpr = q_desc.block_shape[0]
    HALF: gl.constexpr = k_desc.block_shape[0]
    H: gl.constexpr = k_desc.block_shape[1]
    dtype: gl.constexpr = q_desc.dtype
    k = gl.allocate_shared_memory(dtype, [2, HALF, H], k_desc.layout)
    v = gl.allocate_shared_memory(dtype, [2, HALF, H], v_desc.layout)
    made_dk = gl.allocate_shared_memory(dtype, [2, HALF, H], dk_desc.layout)
    made_dv = gl.allocate_shared_memory(dtype, [2, HALF, H], dv_desc.layout)
    q = gl.allocate_shared_memory(dtype, [STAGES, M, H], q_desc.layout)
    dout = gl.allocate_shared_memory(dtype, [STAGES, M, H], dout_desc.layout)
    exponents = gl.allocate_shared_memory(gl.float32, [STAGES, M], exponents_desc.layout)
    deltas = gl.allocate_shared_memory(gl.float32, [STAGES, M], deltas_desc.layout)
    kv_ready, kv_free = barriers(2, 1), barriers(2, 1)
    q_ready, dout_ready = barriers(STAGES, 1), barriers(STAGES, 1)
    q_free, dout_free = barriers(STAGES, 2), barriers(STAGES, 2)
    shares = N // G * S
    told, tiles = notes(4), U // (2 * HALF) * shares
    mine = tiles_of(tiles, stay)
    gl.warp_specialize(
        [
            (_dkdv, (
                0, dk_desc, dv_desc, k, v, made_dk, made_dv, told, q, dout, exponents, deltas,
                kv_ready, kv_free, q_ready, q_free, dout_ready, dout_free, ends, blocks, scale,
                mine, G // S, T,
            )),
            (_dkdv, (
                1, dk_desc, dv_desc, k, v, made_dk, made_dv, told, q, dout, exponents, deltas,
                kv_ready, kv_free, q_ready, q_free, dout_ready, dout_free, ends, blocks, scale,
                mine, G // S, T,
            )),
            (_load, (
                q_desc, k_desc, v_desc, dout_desc, exponents_desc, deltas_desc, k, v, told, q, dout,
                exponents, deltas, kv_ready, kv_free, q_ready, q_free, dout_ready, dout_free,
                starts, ends, block_of, blocks, order, mine, tiles, stay, shares, G // S, T, U, S,
            )),
        ],
        [4, 1],
        [GROUP_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip


def dkdv_of(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, dout_TNH: Tensor, exponents_NSU: Tensor,
    deltas_NSU: Tensor, places: Places, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `varlen_attention.dkdv_of`, for head sizes of 64 and 128, on a GPU of sm_90."""
    tokens, heads, size = q_TNH.shape
    kv_heads = k_TKH.shape[1]
    group = heads // kv_heads
    parts = parts_of(kv_heads, group)
    dk, dv = (x.new_empty(tokens, kv_heads * parts, size) for x in (k_TKH, v_TKH))
    given = (boxes(x, ROWS) for x in (q_TNH, k_TKH, v_TKH, dout_TNH))
    tiles = kv_heads * parts * places.key_order.numel()
    programs, stay = programs_of(tiles, multiprocessors(q_TNH.device))
    with on(q_TNH):
        dkdv_kernel[(programs,)](
            *given, vectors(exponents_NSU), vectors(deltas_NSU), boxes(dk, ROWS),
            boxes(dv, ROWS), *places[:4], places.key_order, scale, tokens,
            exponents_NSU.shape[2], heads, stay, group, parts,
            launch_of(90, "dkdv_sm90", size).stages, num_warps=WARPS, maxnreg=REGISTERS,
        )  # fmt: skip
    return sum_of_parts(dk, parts), sum_of_parts(dv, parts)
