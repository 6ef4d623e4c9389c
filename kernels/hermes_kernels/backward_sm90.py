"""The backward of `varlen_attention` for Hopper (sm_90), in Gluon: two groups of warps multiply, one
warp loads.

Each output has one writer, so that equal inputs give equal bits: `dq_kernel` walks over the keys of
a query tile, `dkdv_kernel` over the queries of a key tile. Blocks are masked only at a border.

Shapes: T packed tokens, N query heads, K key heads, G = N / K, H head size, U = T rounded up to
TILE, M queries and J keys.
"""

from __future__ import annotations

from contextlib import nullcontext

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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hermes_kernels.forward_sm90 import LOG2E, REGISTERS, TYPES, WARPS, _barriers, _boxes
from hermes_kernels.launch import parts_of
from hermes_kernels.varlen_attention import delta_of

# The compiler may make late what a wait does not need; what might be stored must be there before.
# No number of 16 bits is ever rounded to this NaN.
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
def _load_dq(
    q_desc, k_desc, v_desc, dout_desc, q, dout, k, v, q_ready, k_ready, k_free, v_ready, v_free,
    row, head, first, diagonal, blocks, G: gl.constexpr,
):  # fmt: skip
    """q and dout, then each block of keys and of values, in turn."""
    STAGES: gl.constexpr = k.shape[0]
    HALF: gl.constexpr = q_desc.block_shape[0]
    J: gl.constexpr = k_desc.block_shape[0]
    H: gl.constexpr = k_desc.block_shape[1]
    for x in gl.static_range(2):
        at = [row + x * HALF, head * H]
        mbarrier.expect(q_ready.index(x), 2 * q_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(q_desc, at, q_ready.index(x), q.index(x))
        tma.async_copy_global_to_shared(dout_desc, at, q_ready.index(x), dout.index(x))
    for i in range(blocks):
        slot, lap = i % STAGES, i // STAGES & 1
        n = _key(i, row, first, diagonal, J)
        at = [n, head // G * H]
        mbarrier.wait(k_free.index(slot), lap ^ 1)
        mbarrier.expect(k_ready.index(slot), k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, at, k_ready.index(slot), k.index(slot))
        mbarrier.wait(v_free.index(slot), lap ^ 1)
        mbarrier.expect(v_ready.index(slot), v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(v_desc, at, v_ready.index(slot), v.index(slot))


@gluon.jit
def _key(i, row, first, diagonal: gl.constexpr, J: gl.constexpr):
    """First key of the i-th block: those of the diagonal, then from ``first`` on."""
    return gl.where(i < diagonal, row + i * J, first + (i - diagonal) * J)


@gluon.jit
def _made(x, LAYOUT: gl.constexpr, dtype: gl.constexpr):
    """x as an operand in 16 bits, made before what waits after it."""
    x = gl.convert_layout(x, LAYOUT).to(dtype)
    return gl.inline_asm_elementwise(
        MADE, "=r,=r,=r,=r,r,r,r,r", [x], dtype=x.dtype, is_pure=False, pack=8
    )


@gluon.jit
def _dq_step(
    i, masked: gl.constexpr, dq, ds, q, dout, k, v, k_ready, k_free, v_ready, v_free,
    t, start, n, scale, lse, delta, zeros, LAYOUT: gl.constexpr,
):  # fmt: skip
    """The scores of block i, and the block before added to dq meanwhile."""
    STAGES: gl.constexpr = k.shape[0]
    slot, before = i % STAGES, (i - 1) % STAGES
    mbarrier.wait(k_ready.index(slot), i // STAGES & 1)
    s = warpgroup_mma(q, k.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(slot), i // STAGES & 1)
    r = warpgroup_mma(dout, v.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    dq = warpgroup_mma(ds, k.index(before), dq, is_async=True)
    s = warpgroup_mma_wait(2, [s])
    p = _weights(s, masked, t, start, n, scale, lse)
    r = warpgroup_mma_wait(1, [r])
    mbarrier.arrive(v_free.index(slot))
    ds = _made(p * (r - delta[:, None]), LAYOUT, q.dtype)
    dq, ds = warpgroup_mma_wait(0, [dq, ds])
    mbarrier.arrive(k_free.index(before))
    return dq, ds


@gluon.jit
def _weights(s, masked: gl.constexpr, t, start, n, scale, lse):
    J: gl.constexpr = s.shape[1]
    x = s * scale - lse[:, None]
    if masked:
        c = gl.arange(0, J, gl.SliceLayout(0, s.type.layout))
        seen = (c[None, :] <= (t - n)[:, None]) & (c[None, :] >= (start - n)[:, None])
        x = gl.where(seen, x, float("-inf"))
    return gl.exp2(x)


@gluon.jit
def _dq(
    x: gl.constexpr, dq_desc, q, dout, k, v, q_ready, k_ready, k_free, v_ready, v_free, lse_ptr,
    delta_ptr, starts, scale, row, head, first, last_start, diagonal: gl.constexpr, blocks, T,
):  # fmt: skip
    """Half x of the tile."""
    STAGES: gl.constexpr = k.shape[0]
    M: gl.constexpr = q.shape[1]
    H: gl.constexpr = q.shape[2]
    J: gl.constexpr = k.shape[1]
    in_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, J, 16])
    in_dq: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, H, 16])
    in_ds: gl.constexpr = gl.DotOperandLayout(0, in_dq, 2)
    rows: gl.constexpr = gl.SliceLayout(1, in_s)
    begin = row + x * M
    t = begin + gl.arange(0, M, rows)
    start = gl.load(starts + gl.minimum(t, T - 1))
    lse = gl.load(lse_ptr + t) * LOG2E
    delta = gl.load(delta_ptr + t)
    zeros = gl.full([M, J], 0.0, gl.float32, in_s)
    dq = gl.full([M, H], 0.0, gl.float32, in_dq)
    borders = diagonal + gl.minimum(gl.cdiv(last_start - first, J), blocks - diagonal)
    factor = scale * LOG2E
    mbarrier.wait(q_ready.index(x), 0)
    mbarrier.wait(k_ready.index(0), 0)
    s = warpgroup_mma(q.index(x), k.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(0), 0)
    r = warpgroup_mma(
        dout.index(x), v.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True
    )
    s, r = warpgroup_mma_wait(0, [s, r])
    mbarrier.arrive(v_free.index(0))
    p = _weights(s, True, t, start, row, factor, lse)
    ds = gl.convert_layout(p * (r - delta[:, None]), in_ds).to(q.dtype)
    for i in range(1, borders):
        dq, ds = _dq_step(
            i, True, dq, ds, q.index(x), dout.index(x), k, v, k_ready, k_free, v_ready, v_free,
            t, start, _key(i, row, first, diagonal, J), factor, lse, delta, zeros, in_ds,
        )  # fmt: skip
    for i in range(borders, blocks):
        dq, ds = _dq_step(
            i, False, dq, ds, q.index(x), dout.index(x), k, v, k_ready, k_free, v_ready, v_free,
            t, start, first, factor, lse, delta, zeros, in_ds,
        )  # fmt: skip
    dq = warpgroup_mma(ds, k.index((blocks - 1) % STAGES), dq, is_async=True)
    dq = warpgroup_mma_wait(0, [dq]) * scale
    q.index(x).store(dq.to(q.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(dq_desc, [begin, head * H], q.index(x))
    tma.store_wait(0)


@gluon.jit
def dq_kernel(
    q_desc, k_desc, v_desc, dout_desc, dq_desc, lse_ptr, delta_ptr, starts, order, scale, T, U,
    G: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dq of one query tile of one head. Grid (N, U / 128)."""
    HALF: gl.constexpr = q_desc.block_shape[0]
    J: gl.constexpr = k_desc.block_shape[0]
    H: gl.constexpr = q_desc.block_shape[1]
    dtype: gl.constexpr = q_desc.dtype
    DIAGONAL: gl.constexpr = 2 * HALF // J
    head = gl.program_id(0)
    row = gl.load(order + gl.program_id(1)) * (2 * HALF)
    first = gl.load(starts + row) // J * J
    last_start = gl.load(starts + gl.minimum(row + 2 * HALF, T) - 1)
    blocks = DIAGONAL + (row - first) // J
    q = gl.allocate_shared_memory(dtype, [2, HALF, H], q_desc.layout)
    dout = gl.allocate_shared_memory(dtype, [2, HALF, H], q_desc.layout)
    k = gl.allocate_shared_memory(dtype, [STAGES, J, H], k_desc.layout)
    v = gl.allocate_shared_memory(dtype, [STAGES, J, H], v_desc.layout)
    q_ready, k_ready, v_ready = _barriers(2, 1), _barriers(STAGES, 1), _barriers(STAGES, 1)
    k_free, v_free = _barriers(STAGES, 2), _barriers(STAGES, 2)
    lse_ptr += head.to(gl.int64) * U
    delta_ptr += head.to(gl.int64) * U
    gl.warp_specialize(
        [
            (_dq, (
                0, dq_desc, q, dout, k, v, q_ready, k_ready, k_free, v_ready, v_free, lse_ptr,
                delta_ptr, starts, scale, row, head, first, last_start, DIAGONAL, blocks, T,
            )),
            (_dq, (
                1, dq_desc, q, dout, k, v, q_ready, k_ready, k_free, v_ready, v_free, lse_ptr,
                delta_ptr, starts, scale, row, head, first, last_start, DIAGONAL, blocks, T,
            )),
            (_load_dq, (
                q_desc, k_desc, v_desc, dout_desc, q, dout, k, v, q_ready, k_ready, k_free,
                v_ready, v_free, row, head, first, DIAGONAL, blocks, G,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


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
def _load_dkdv(
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
def _dkdv_step(
    i, masked: gl.constexpr, dk, dv, k, v, q, dout, lse, delta, q_ready, q_free, dout_ready,
    dout_free, j, end, n, scale, zeros, LAYOUT: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = q.shape[0]
    M: gl.constexpr = q.shape[1]
    columns: gl.constexpr = gl.SliceLayout(0, zeros.type.layout)
    slot, lap = i % STAGES, i // STAGES & 1
    mbarrier.wait(q_ready.index(slot), lap)
    s = warpgroup_mma(k, q.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(dout_ready.index(slot), lap)
    r = warpgroup_mma(v, dout.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    top = lse.index(slot).load(columns) * LOG2E
    s = warpgroup_mma_wait(1, [s])
    x = s * scale - top[None, :]
    if masked:
        c = gl.arange(0, M, columns)
        seen = (c[None, :] >= (j - n)[:, None]) & (c[None, :] < (end - n)[:, None])
        x = gl.where(seen, x, float("-inf"))
    p = gl.exp2(x)
    dv = warpgroup_mma(_made(p, LAYOUT, q.dtype), dout.index(slot), dv, is_async=True)
    r = warpgroup_mma_wait(1, [r])
    ds = p * (r - delta.index(slot).load(columns)[None, :])
    dk = warpgroup_mma(_made(ds, LAYOUT, q.dtype), q.index(slot), dk, is_async=True)
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
    """Half x of the tile."""
    M: gl.constexpr = q.shape[1]
    HALF: gl.constexpr = k.shape[1]
    H: gl.constexpr = k.shape[2]
    in_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    in_dk: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, H, 16])
    in_p: gl.constexpr = gl.DotOperandLayout(0, in_dk, 2)
    begin = row + x * HALF
    j = begin + gl.arange(0, HALF, gl.SliceLayout(1, in_s))
    end = gl.load(ends + gl.minimum(j, T - 1))
    zeros = gl.full([HALF, M], 0.0, gl.float32, in_s)
    dk = gl.full([HALF, H], 0.0, gl.float32, in_dk)
    dv = gl.full([HALF, H], 0.0, gl.float32, in_dk)
    factor = scale * LOG2E
    mbarrier.wait(kv_ready.index(x), 0)
    for i in range(heads * borders):
        _, down = _turn(i, heads, diagonal, borders, inner, M)
        dk, dv = _dkdv_step(
            i, True, dk, dv, k.index(x), v.index(x), q, dout, lse, delta, q_ready, q_free,
            dout_ready, dout_free, j, end, row + down, factor, zeros, in_p,
        )  # fmt: skip
    for i in range(heads * borders, heads * (borders + inner)):
        dk, dv = _dkdv_step(
            i, False, dk, dv, k.index(x), v.index(x), q, dout, lse, delta, q_ready, q_free,
            dout_ready, dout_free, j, end, row, factor, zeros, in_p,
        )  # fmt: skip
    k.index(x).store((dk * scale).to(k.dtype))
    v.index(x).store(dv.to(v.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(dk_desc, [begin, part * H], k.index(x))
    tma.async_copy_shared_to_global(dv_desc, [begin, part * H], v.index(x))
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
    kv_ready = _barriers(2, 1)
    q_ready, dout_ready = _barriers(STAGES, 1), _barriers(STAGES, 1)
    q_free, dout_free = _barriers(STAGES, 2), _barriers(STAGES, 2)
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
            (_load_dkdv, (
                q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc, k, v, q, dout, lse, delta,
                kv_ready, q_ready, q_free, dout_ready, dout_free, row, part, G // S, DIAGONAL,
                borders, inner, U, S,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def dq_of(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, dout_TNH: Tensor, lse_NU: Tensor,
    delta_NU: Tensor, starts_T: Tensor, order: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """The gradient of q; arguments as in `backward`."""
    tokens, heads, size = q_TNH.shape
    dq = torch.empty_like(q_TNH)
    given = ((q_TNH, 64), (k_TKH, 64), (v_TKH, 64), (dout_TNH, 64), (dq, 64))
    boxes = (_boxes(x, rows) for x, rows in given)
    with torch.cuda.device(q_TNH.device) if q_TNH.is_cuda else nullcontext():
        dq_kernel[heads, order.numel()](
            *boxes, lse_NU, delta_NU, starts_T, order, scale, tokens, lse_NU.shape[1],
            heads // k_TKH.shape[1], 3 if size == 128 else 4, num_warps=WARPS, maxnreg=REGISTERS,
        )  # fmt: skip
    return dq


def dkdv_of(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, dout_TNH: Tensor, lse_NU: Tensor,
    delta_NU: Tensor, ends_T: Tensor, order: Tensor, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of k and v; arguments as in `backward`."""
    tokens, heads, size = q_TNH.shape
    kv_heads = k_TKH.shape[1]
    group = heads // kv_heads
    parts = parts_of(kv_heads, group)
    dk, dv = (x.new_empty(tokens, kv_heads * parts, size) for x in (k_TKH, v_TKH))
    boxes = (_boxes(x, 64) for x in (q_TNH, k_TKH, v_TKH, dout_TNH))
    with torch.cuda.device(q_TNH.device) if q_TNH.is_cuda else nullcontext():
        dkdv_kernel[kv_heads * parts, order.numel()](
            *boxes, _vectors(lse_NU), _vectors(delta_NU), _boxes(dk, 64), _boxes(dv, 64), ends_T,
            order, scale, tokens, lse_NU.shape[1], group, parts, 3 if size == 128 else 4,
            num_warps=WARPS, maxnreg=REGISTERS,
        )  # fmt: skip
    if parts > 1:
        dk, dv = (x.unflatten(1, (kv_heads, parts)).sum(2) for x in (dk, dv))
    return dk, dv


def backward(
    dout_TNH: Tensor, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, out_TNH: Tensor, lse_NU: Tensor,
    starts_T: Tensor, ends_T: Tensor, query_order: Tensor, key_order: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `varlen_attention.backward`, for head sizes of 64 and 128, on a GPU of sm_90."""
    delta_NU = delta_of(out_TNH, dout_TNH, lse_NU)
    rest = (q_TNH, k_TKH, v_TKH, dout_TNH, lse_NU, delta_NU)
    dq_TNH = dq_of(*rest, starts_T, query_order, scale)
    return dq_TNH, *dkdv_of(*rest, ends_T, key_order, scale)


def _vectors(x_NU: Tensor) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for([64], gl.float32)
    return TensorDescriptor.from_tensor(x_NU.view(-1), [64], layout)
