"""Causal attention inside segments of packed rows, forward and backward, in Triton.

Shapes: T packed tokens, N query heads, K key heads, G = N / K, H head size, U = T rounded up to
TILE, M queries and J keys of a tile.

Tiles are aligned to the flat batch, not to segments: query tile i holds tokens i*M to (i+1)*M,
whatever segments cross it. So the grid follows from shapes alone, and loads and stores are whole
boxes (TMA). What a tile walks over is cut into blocks from each segment's own start
(`places.Places`), in rising order: the keys from the first token that its first query sees to its
own last, a part of J at a time, or the queries from the part that holds its first key to the end of
its last key's segment. Sums are so added in one order wherever a segment stands. What a packing
costs beyond its own area is a few masked corners, and a block for each segment but single tokens:
thousands of short ones cost at most what one as long as all of them does. With s = scale * q @ k:

    forward    p = exp(s - lse)                          out = p @ v
    statistics delta = rowsum(out * dout)
    dq         ds = p * (dout @ v' - delta)              dq = scale * ds @ k
    dkdv       dv = p' @ dout                            dk = scale * ds' @ q

Each output has one writer: the G query heads of a key head are summed by the program of that key
head, in order. Where key heads are few, S programs have a part of the query heads each; their sums,
rounded as FlashAttention rounds those of single heads, are added afterwards. No atomics, so equal
inputs give equal bits. A masked weight is exactly 0, so neither what stands beside a segment nor
where it stands changes any of its bits.

Every kernel is one loop over descriptor loads, all by the host's descriptors, which take no memory
on the device. No warps have roles of their own: those that Triton 3.6.0 made of these kernels
(`warp_specialize=True`) computed something else on an H100. Where roles matter the kernels are in
Gluon. A head size that is no power of two is padded with zeros by the caller.

Sources: FlashAttention-2 (arXiv 2307.08691); the tiling and its cost are counted in
docs/numbers.md. Twin: `reference.varlen_attention`. `forward_sm90` and `backward_sm90` are others,
for Hopper, `forward_sm100` and `backward_sm100` for Blackwell.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hermes_kernels import walk
from hermes_kernels.launch import (
    SHIFTED,
    architecture,
    launch_of,
    on,
    parts_of,
    room_for,
    sum_of_parts,
)
from hermes_kernels.places import Places
from hermes_kernels.walk import BLOCK, SHIFTS

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MASKED = tl.constexpr(float("-inf"))
# A first maximum that is finite, so that a block masked whole adds exp2(-inf) = 0 and no NaN.
LEAST = tl.constexpr(-1e30)


@triton.jit
def _tile(order, SIZE: tl.constexpr):
    """First token of this program's tile: the longest tiles of TILE tokens start first."""
    parts: tl.constexpr = BLOCK // SIZE
    i = tl.program_id(1)
    return (tl.load(order + i // parts) * parts + i % parts) * SIZE


@triton.jit
def forward_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, starts, ends, block_of, blocks, order, scale, T, U,
    G: tl.constexpr, H: tl.constexpr, M: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """out and lse (natural logarithm) of one query tile of one head. Grid (N, U / M)."""
    row, head = _tile(order, M), tl.program_id(0)
    t, c = row + tl.arange(0, M), tl.arange(0, J)
    start = tl.load(starts + tl.minimum(t, T - 1))  # [M]
    first, after, rest, count, _ = walk.back(
        tl.minimum(row, T - 1), starts, ends, block_of, blocks, T, M, J
    )
    q = q_desc.load([row, head * H])
    acc = tl.zeros((M, H), tl.float32)
    total = tl.zeros((M,), tl.float32)
    top = tl.zeros((M,), tl.float32) + LEAST
    for i in range(count):
        n, end = walk.part(i, first, after, rest, blocks, J)
        k = k_desc.load([n, head // G * H])
        s = tl.dot(q, k.T)  # [M, J]
        low, high = start - n, tl.minimum(t, end - 1) - n
        seen = (c[None, :] <= high[:, None]) & (c[None, :] >= low[:, None])
        s = tl.where(seen, s, MASKED)
        new_top = tl.maximum(top, tl.max(s, 1) * (scale * LOG2E))
        p = tl.math.exp2(s * (scale * LOG2E) - new_top[:, None])
        shrink = tl.math.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v = v_desc.load([n, head // G * H])
        acc = tl.dot(p.to(v.dtype), v, acc)
        top = new_top
    out_desc.store([row, head * H], (acc / total[:, None]).to(q.dtype))
    tl.store(lse_ptr + head.to(tl.int64) * U + t, (top + tl.math.log2(total)) * LN2)


@triton.jit
def statistics_kernel(
    out_ptr, dout_ptr, lse_ptr, exponents_ptr, deltas_ptr, T, U, N: tl.constexpr, H: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    """-log2(e) * lse and rowsum(out * dout) of one tile of one head. Grid (N, U / M).

    Outputs are [N, SHIFTED, U], the c-th of a head from token c on, with zeros after the last.
    """
    head, row = tl.program_id(0).to(tl.int64), tl.program_id(1) * M
    t, h = row + tl.arange(0, M), tl.arange(0, H)
    at = (t.to(tl.int64) * (N * H) + head * H)[:, None] + h[None, :]  # [M, H]
    inside = (t < T)[:, None]
    out = tl.load(out_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + at, mask=inside, other=0.0).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    exponent = tl.load(lse_ptr + head * U + t) * -LOG2E
    for c in tl.static_range(SHIFTS):
        place = (head * SHIFTS + c) * U + tl.where(t < c, U - 1 - t, t - c)
        tl.store(exponents_ptr + place, tl.where(t < c, 0.0, exponent))
        tl.store(deltas_ptr + place, tl.where(t < c, 0.0, delta))


@triton.jit
def dq_kernel(
    q_desc, k_desc, v_desc, dout_desc, dq_desc, exponents_ptr, deltas_ptr, starts, ends,
    block_of, blocks, order, scale, T, U,
    G: tl.constexpr, H: tl.constexpr, M: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """dq of one query tile of one head. Grid (N, U / M)."""
    row, head = _tile(order, M), tl.program_id(0)
    t, c = row + tl.arange(0, M), tl.arange(0, J)
    start = tl.load(starts + tl.minimum(t, T - 1))  # [M]
    first, after, rest, count, _ = walk.back(
        tl.minimum(row, T - 1), starts, ends, block_of, blocks, T, M, J
    )
    place = head.to(tl.int64) * SHIFTS * U + t
    exponent, delta = tl.load(exponents_ptr + place), tl.load(deltas_ptr + place)  # [M]
    q, dout = q_desc.load([row, head * H]), dout_desc.load([row, head * H])
    dq = tl.zeros((M, H), tl.float32)
    for i in range(count):
        n, end = walk.part(i, first, after, rest, blocks, J)
        k, v = k_desc.load([n, head // G * H]), v_desc.load([n, head // G * H])
        s = tl.dot(q, k.T) * (scale * LOG2E) + exponent[:, None]  # [M, J]
        low, high = start - n, tl.minimum(t, end - 1) - n
        seen = (c[None, :] <= high[:, None]) & (c[None, :] >= low[:, None])
        p = tl.math.exp2(tl.where(seen, s, MASKED))
        ds = p * (tl.dot(dout, v.T) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)
    dq_desc.store([row, head * H], (dq * scale).to(q.dtype))


@triton.jit
def dkdv_kernel(
    q_desc, k_desc, v_desc, dout_desc, dk_desc, dv_desc, exponents_desc, deltas_desc, starts,
    ends, block_of, blocks, order, scale, T, U,
    G: tl.constexpr, S: tl.constexpr, H: tl.constexpr, M: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """dk and dv of one key tile and key head, over one of S parts of its G query heads.

    Outputs are [T, K * S, H]. Grid (K * S, U / J).
    """
    row, part = _tile(order, J), tl.program_id(0)
    head = part // S
    j, c = row + tl.arange(0, J), tl.arange(0, M)
    end = tl.load(ends + tl.minimum(j, T - 1))  # [J]
    first, after, rest, count, _, _ = walk.on(
        tl.minimum(row, T - 1), starts, ends, block_of, blocks, T, J, M
    )
    k, v = k_desc.load([row, head * H]), v_desc.load([row, head * H])
    dk = tl.zeros((J, H), tl.float32)
    dv = tl.zeros((J, H), tl.float32)
    query_head, i = part * (G // S), 0
    for _ in range(G // S * count):
        n, stop = walk.part(i, first, after, rest, blocks, M)
        q, dout = q_desc.load([n, query_head * H]), dout_desc.load([n, query_head * H])
        place = walk.statistics_of(n, query_head, U)
        exponent, delta = exponents_desc.load([place]), deltas_desc.load([place])  # [M]
        low, high = j - n, tl.minimum(end, stop) - n
        seen = (c[None, :] >= low[:, None]) & (c[None, :] < high[:, None])
        s = tl.dot(k, q.T) * (scale * LOG2E) + exponent[None, :]  # [J, M]
        p = tl.math.exp2(tl.where(seen, s, MASKED))
        dv = tl.dot(p.to(dout.dtype), dout, dv)
        ds = p * (tl.dot(v, dout.T) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk)
        i += 1
        query_head = tl.where(i < count, query_head, query_head + 1)
        i = tl.where(i < count, i, 0)
    dv_desc.store([row, part * H], dv.to(v.dtype))
    dk_desc.store([row, part * H], (dk * scale).to(k.dtype))


def forward(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, places: Places, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [T, N, H] and log-sum-exp of the scaled scores [N, U], fp32, natural logarithm.

    Args:
        q_TNH, k_TKH, v_TKH: contiguous, bf16 or fp16; H a power of two of at least 16.
        places: where the segments lie; on the same device.
    """
    tokens, heads, size = q_TNH.shape
    room = room_for(heads, tokens, places.query_order.numel())
    out, lse = torch.empty_like(q_TNH), q_TNH.new_empty(heads, room, dtype=torch.float32)
    how = launch_of(architecture(q_TNH.device), "forward", size)
    q_box, out_box = (_boxes(x, how.queries) for x in (q_TNH, out))
    boxes = (_boxes(x, how.keys) for x in (k_TKH, v_TKH))
    with on(q_TNH):
        forward_kernel[heads, room // how.queries](
            q_box, *boxes, out_box, lse, *places[:4], places.query_order, scale, tokens, room,
            heads // k_TKH.shape[1], size, how.queries, how.keys,
            num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip
    return out, lse


def backward(
    dout_TNH: Tensor, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, out_TNH: Tensor, lse_NU: Tensor,
    places: Places, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv; arguments as in `forward`, which gave ``out_TNH`` and ``lse_NU``."""
    rest = (dout_TNH, *statistics_of(out_TNH, dout_TNH, lse_NU), places, scale)
    return dq_of(q_TNH, k_TKH, v_TKH, *rest), *dkdv_of(q_TNH, k_TKH, v_TKH, *rest)


def statistics_of(out_TNH: Tensor, dout_TNH: Tensor, lse_NU: Tensor) -> tuple[Tensor, Tensor]:
    """-log2(e) * lse and rowsum(out * dout), each [N, `SHIFTED`, U]."""
    tokens, heads, size = out_TNH.shape
    room = lse_NU.shape[1]
    exponents, deltas = (lse_NU.new_empty(heads, SHIFTED, room) for _ in range(2))
    how = launch_of(architecture(out_TNH.device), "statistics", size)
    with on(out_TNH):
        statistics_kernel[heads, room // how.queries](
            out_TNH, dout_TNH, lse_NU, exponents, deltas, tokens, room, heads, size, how.queries,
            num_warps=how.warps,
        )  # fmt: skip
    return exponents, deltas


def dq_of(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, dout_TNH: Tensor, exponents_NSU: Tensor,
    deltas_NSU: Tensor, places: Places, scale: float,
) -> Tensor:  # fmt: skip
    """The gradient of q; arguments as in `backward`."""
    (tokens, heads, size), room = q_TNH.shape, exponents_NSU.shape[2]
    dq_TNH = torch.empty_like(q_TNH)
    how = launch_of(architecture(q_TNH.device), "dq", size)
    q_box, dout_box, dq_box = (_boxes(x, how.queries) for x in (q_TNH, dout_TNH, dq_TNH))
    boxes = (_boxes(x, how.keys) for x in (k_TKH, v_TKH))
    with on(q_TNH):
        dq_kernel[heads, room // how.queries](
            q_box, *boxes, dout_box, dq_box, exponents_NSU, deltas_NSU, *places[:4],
            places.query_order, scale, tokens, room, heads // k_TKH.shape[1], size,
            how.queries, how.keys,
            num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip
    return dq_TNH


def dkdv_of(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, dout_TNH: Tensor, exponents_NSU: Tensor,
    deltas_NSU: Tensor, places: Places, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of k and v; arguments as in `backward`."""
    (tokens, heads, size), room = q_TNH.shape, exponents_NSU.shape[2]
    kv_heads = k_TKH.shape[1]
    group = heads // kv_heads
    parts = parts_of(kv_heads, group)
    dk, dv = (x.new_empty(tokens, kv_heads * parts, size) for x in (k_TKH, v_TKH))
    how = launch_of(architecture(q_TNH.device), "dkdv", size)
    q_box, dout_box = (_boxes(x, how.queries) for x in (q_TNH, dout_TNH))
    boxes = [_boxes(x, how.keys) for x in (k_TKH, v_TKH, dk, dv)]
    vectors = (
        TensorDescriptor.from_tensor(x.view(-1), [how.queries]) for x in (exponents_NSU, deltas_NSU)
    )
    with on(q_TNH):
        dkdv_kernel[kv_heads * parts, room // how.keys](
            q_box, *boxes[:2], dout_box, *boxes[2:], *vectors, *places[:4], places.key_order,
            scale, tokens, room, group, parts, size, how.queries, how.keys,
            num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip
    return sum_of_parts(dk, parts), sum_of_parts(dv, parts)


def _boxes(x_TNH: Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x_TNH.flatten(1), [rows, x_TNH.shape[2]])
