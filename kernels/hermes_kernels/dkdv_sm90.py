"""dk and dv of `varlen_attention` for Hopper (sm_90), in Gluon: each program walks over the queries
of a key tile, of all its query heads.

A group of warps has half of the tile. Of a block of queries it asks for the scores S = k @ q' and
for R = v @ dout'; it adds P @ dout to dv while R is made, and dS @ q to dk, with
dS = P * (R - delta). Blocks are masked only at a border.

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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hermes_kernels.groups_sm90 import (
    GROUP_REGISTERS,
    LOAD_REGISTERS,
    LOG2E,
    REGISTERS,
    ROWS,
    TYPES,
    WARPS,
    barriers,
    boxes,
    next_of,
)
from hermes_kernels.launch import launch_of, on, parts_of, sum_of_parts
from hermes_kernels.places import Places


@gluon.jit
def _turn(i, heads, diagonal: gl.constexpr, borders, inner, M: gl.constexpr):
    """The i-th turn: which query head, and how many tokens after the tile its block begins.

    Of each head ``borders`` blocks are masked: those of the diagonal and the last ones.
    """
    outside = i < heads * borders
    j = gl.where(outside, i, i - heads * borders)
    count = gl.where(outside, borders, inner)
    at = j % count
    block = gl.where(outside, gl.where(at < diagonal, at, at + inner), at + diagonal)
    return j // count, block * M


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc, k, v, q, dout, lse, delta, kv_ready,
    q_ready, q_free, dout_ready, dout_free, row, part, heads, diagonal: gl.constexpr, borders,
    inner, U, S: gl.constexpr,
):  # fmt: skip
    """k and v, then q, dout, lse and delta of each turn."""
    STAGES: gl.constexpr = q.shape[0]
    M: gl.constexpr = q_desc.block_shape[0]
    HALF: gl.constexpr = k_desc.block_shape[0]
    H: gl.constexpr = q_desc.block_shape[1]
    for x in gl.static_range(2):
        at = [row + x * HALF, part // S * H]
        mbarrier.expect(kv_ready.index(x), 2 * k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, at, kv_ready.index(x), k.index(x))
        tma.async_copy_global_to_shared(v_desc, at, kv_ready.index(x), v.index(x))
    for i in range(heads * (borders + inner)):
        slot, lap = i % STAGES, i // STAGES & 1
        head, down = _turn(i, heads, diagonal, borders, inner, M)
        head += part * heads
        at, place = [row + down, head * H], [head * U + row + down]
        bytes: gl.constexpr = q_desc.block_type.nbytes + lse_desc.block_type.nbytes
        mbarrier.wait(q_free.index(slot), lap ^ 1)
        mbarrier.expect(q_ready.index(slot), bytes)
        tma.async_copy_global_to_shared(q_desc, at, q_ready.index(slot), q.index(slot))
        tma.async_copy_global_to_shared(lse_desc, place, q_ready.index(slot), lse.index(slot))
        mbarrier.wait(dout_free.index(slot), lap ^ 1)
        mbarrier.expect(dout_ready.index(slot), bytes)
        tma.async_copy_global_to_shared(dout_desc, at, dout_ready.index(slot), dout.index(slot))
        tma.async_copy_global_to_shared(
            delta_desc, place, dout_ready.index(slot), delta.index(slot)
        )


@gluon.jit
def _step(
    slot, lap, masked: gl.constexpr, dk, dv, k, v, q, dout, lse, delta, q_ready, q_free, dout_ready,
    dout_free, j, end, n, scale, zeros, LAYOUT: gl.constexpr,
):  # fmt: skip
    """dv and dk with what a block of queries adds to them."""
    M: gl.constexpr = q.shape[1]
    columns: gl.constexpr = gl.SliceLayout(0, zeros.type.layout)
    mbarrier.wait(q_ready.index(slot), lap)
    s = warpgroup_mma(k, q.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(dout_ready.index(slot), lap)
    r = warpgroup_mma(v, dout.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    top = lse.index(slot).load(columns) * LOG2E
    s = warpgroup_mma_wait(1, [s])
    x = s * (scale * LOG2E) - top[None, :]
    if masked:
        c = n + gl.arange(0, M, columns)
        seen = (c[None, :] >= j[:, None]) & (c[None, :] < end[:, None])
        x = gl.where(seen, x, float("-inf"))
    p = gl.exp2(x)
    dv = warpgroup_mma(
        gl.convert_layout(p, LAYOUT).to(q.dtype), dout.index(slot), dv, is_async=True
    )
    r = warpgroup_mma_wait(1, [r])
    ds = p * (r - delta.index(slot).load(columns)[None, :])
    dk = warpgroup_mma(gl.convert_layout(ds, LAYOUT).to(q.dtype), q.index(slot), dk, is_async=True)
    dv = warpgroup_mma_wait(1, [dv])
    mbarrier.arrive(dout_free.index(slot))
    dk = warpgroup_mma_wait(0, [dk])
    mbarrier.arrive(q_free.index(slot))
    return dk, dv


@gluon.jit
def _dkdv(
    x: gl.constexpr, dk_desc, dv_desc, k, v, q, dout, lse, delta, kv_ready, q_ready, q_free,
    dout_ready, dout_free, ends, scale, row, part, heads, diagonal: gl.constexpr, borders, inner,
    T,
):  # fmt: skip
    """Half x of the tile. Keys are counted from its beginning: row is not kept beside the sums."""
    STAGES: gl.constexpr = q.shape[0]
    M: gl.constexpr = q.shape[1]
    HALF: gl.constexpr = k.shape[1]
    H: gl.constexpr = k.shape[2]
    in_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    in_dk: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, H, 16])
    in_p: gl.constexpr = gl.DotOperandLayout(0, in_dk, 2)
    begin = row + x * HALF
    j = x * HALF + gl.arange(0, HALF, gl.SliceLayout(1, in_s))
    end = gl.load(ends + gl.minimum(row + j, T - 1)) - row
    zeros = gl.full([HALF, M], 0.0, gl.float32, in_s)
    dk = gl.full([HALF, H], 0.0, gl.float32, in_dk)
    dv = gl.full([HALF, H], 0.0, gl.float32, in_dk)
    mbarrier.wait(kv_ready.index(x), 0)
    slot, lap, at = 0, 0, 0
    for _ in range(heads * borders):
        down = gl.where(at < diagonal, at, at + inner) * M
        at = gl.where(at + 1 < borders, at + 1, 0)
        dk, dv = _step(
            slot, lap, True, dk, dv, k.index(x), v.index(x), q, dout, lse, delta, q_ready, q_free,
            dout_ready, dout_free, j, end, down, scale, zeros, in_p,
        )  # fmt: skip
        slot, lap = next_of(slot, lap, STAGES)
    for _ in range(heads * inner):
        dk, dv = _step(
            slot, lap, False, dk, dv, k.index(x), v.index(x), q, dout, lse, delta, q_ready, q_free,
            dout_ready, dout_free, j, end, 0, scale, zeros, in_p,
        )  # fmt: skip
        slot, lap = next_of(slot, lap, STAGES)
    k.index(x).store((dk * scale).to(k.dtype))
    v.index(x).store(dv.to(v.dtype))
    fence_async_shared()
    # Rows of their own, if equal: what the stores share would be kept in a register and spilled.
    tma.async_copy_shared_to_global(dk_desc, [begin, part * H], k.index(x))
    tma.async_copy_shared_to_global(dv_desc, [gl.minimum(begin, T), part * H], v.index(x))
    tma.store_wait(0)


@gluon.jit
def dkdv_kernel(
    q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc, dk_desc, dv_desc, ends, order, scale,
    T, U, G: gl.constexpr, S: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dk and dv of one key tile and key head, over one of S parts of its G query heads.

    Outputs are [T, K * S, H]. Grid (K * S, U / 128).
    """
    M: gl.constexpr = q_desc.block_shape[0]
    HALF: gl.constexpr = k_desc.block_shape[0]
    H: gl.constexpr = k_desc.block_shape[1]
    DIAGONAL: gl.constexpr = 2 * HALF // M
    dtype: gl.constexpr = q_desc.dtype
    part = gl.program_id(0)
    row = gl.load(order + gl.program_id(1)) * (2 * HALF)
    # One past the last query that sees the tile; that sees all of it.
    last = gl.load(ends + gl.minimum(row + 2 * HALF, T) - 1)
    whole = gl.load(ends + row)
    blocks = gl.cdiv(last - row, M)
    inner = gl.maximum((whole - row) // M, DIAGONAL) - DIAGONAL
    borders = blocks - inner
    k = gl.allocate_shared_memory(dtype, [2, HALF, H], k_desc.layout)
    v = gl.allocate_shared_memory(dtype, [2, HALF, H], v_desc.layout)
    q = gl.allocate_shared_memory(dtype, [STAGES, M, H], q_desc.layout)
    dout = gl.allocate_shared_memory(dtype, [STAGES, M, H], dout_desc.layout)
    lse = gl.allocate_shared_memory(gl.float32, [STAGES, M], lse_desc.layout)
    delta = gl.allocate_shared_memory(gl.float32, [STAGES, M], delta_desc.layout)
    kv_ready = barriers(2, 1)
    q_ready, dout_ready = barriers(STAGES, 1), barriers(STAGES, 1)
    q_free, dout_free = barriers(STAGES, 2), barriers(STAGES, 2)
    gl.warp_specialize(
        [
            (_dkdv, (
                0, dk_desc, dv_desc, k, v, q, dout, lse, delta, kv_ready, q_ready, q_free,
                dout_ready, dout_free, ends, scale, row, part, G // S, DIAGONAL, borders, inner, T,
            )),
            (_dkdv, (
                1, dk_desc, dv_desc, k, v, q, dout, lse, delta, kv_ready, q_ready, q_free,
                dout_ready, dout_free, ends, scale, row, part, G // S, DIAGONAL, borders, inner, T,
            )),
            (_load, (
                q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc, k, v, q, dout, lse, delta,
                kv_ready, q_ready, q_free, dout_ready, dout_free, row, part, G // S, DIAGONAL,
                borders, inner, U, S,
            )),
        ],
        [4, 1],
        [GROUP_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip


def dkdv_of(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, dout_TNH: Tensor, lse_NU: Tensor,
    delta_NU: Tensor, places: Places, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `varlen_attention.dkdv_of`, for head sizes of 64 and 128, on a GPU of sm_90."""
    tokens, heads, size = q_TNH.shape
    kv_heads = k_TKH.shape[1]
    group = heads // kv_heads
    parts = parts_of(kv_heads, group)
    dk, dv = (x.new_empty(tokens, kv_heads * parts, size) for x in (k_TKH, v_TKH))
    given = (boxes(x, ROWS) for x in (q_TNH, k_TKH, v_TKH, dout_TNH))
    with on(q_TNH):
        dkdv_kernel[kv_heads * parts, places.key_order.numel()](
            *given, _vectors(lse_NU), _vectors(delta_NU), boxes(dk, ROWS), boxes(dv, ROWS),
            places.ends, places.key_order, scale, tokens, lse_NU.shape[1], group, parts,
            launch_of(90, "dkdv_sm90", size).stages, num_warps=WARPS, maxnreg=REGISTERS,
        )  # fmt: skip
    return sum_of_parts(dk, parts), sum_of_parts(dv, parts)


def _vectors(x_NU: Tensor) -> TensorDescriptor:
    """A contiguous [N, U] in boxes of one block's tokens."""
    layout = gl.NVMMASharedLayout.get_default_for([ROWS], TYPES[x_NU.dtype])
    return TensorDescriptor.from_tensor(x_NU.view(-1), [ROWS], layout)
