"""Causal attention inside segments of packed rows, forward and backward, in Triton.

Shapes: T packed tokens, N query heads, K key heads, G = N / K, H head size, U = T rounded up to
TILE, M queries and J keys of a tile.

Tiles are aligned to the flat batch, not to segments: query tile i holds tokens i*M to (i+1)*M,
whatever segments cross it, and walks over the keys from the first token that its first query sees
to its own last. So the grid follows from shapes alone, loads and stores are whole boxes (TMA), and
what a packing costs beyond its own area is a few masked corners. With scores s = scale * q @ k:

    forward    p = exp(s - lse)                          out = p @ v
    delta      delta = rowsum(out * dout)
    dq         ds = p * (dout @ v' - delta)              dq = scale * ds @ k
    dkdv       dv = p' @ dout                            dk = scale * ds' @ q

Each output has one writer: the G query heads of a key head are summed by the program of that key
head, in order. Where key heads are few, S programs have a part of the query heads each; their sums,
rounded as FlashAttention rounds those of single heads, are added afterwards. No atomics, so equal
inputs give equal bits. A masked weight is exactly 0, so other segments change no bit either, as
long as a segment keeps its place modulo TILE.

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

from hermes_kernels.launch import (
    TILE,
    architecture,
    launch_of,
    on,
    parts_of,
    room_for,
    sum_of_parts,
)

ORDERED = tl.constexpr(TILE)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MASKED = tl.constexpr(float("-inf"))
# A first maximum that is finite, so that a block masked whole adds exp2(-inf) = 0 and no NaN.
LEAST = tl.constexpr(-1e30)


@triton.jit
def _tile(order, SIZE: tl.constexpr):
    """First token of this program's tile: the longest tiles of TILE tokens start first."""
    parts: tl.constexpr = ORDERED // SIZE
    i = tl.program_id(1)
    return (tl.load(order + i // parts) * parts + i % parts) * SIZE


@triton.jit
def forward_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, starts, order, scale, T, U,
    G: tl.constexpr, H: tl.constexpr, M: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """out and lse (natural logarithm) of one query tile of one head. Grid (N, U / M)."""
    row, head = _tile(order, M), tl.program_id(0)
    t = row + tl.arange(0, M)
    first = tl.load(starts + tl.minimum(row, T - 1)) // J * J
    start = tl.load(starts + tl.minimum(t, T - 1))  # [M]
    q = q_desc.load([row, head * H])
    acc = tl.zeros((M, H), tl.float32)
    total = tl.zeros((M,), tl.float32)
    top = tl.zeros((M,), tl.float32) + LEAST
    for n in range(first, row + M, J):
        k = k_desc.load([n, head // G * H])
        s = tl.dot(q, k.T)  # [M, J]
        j = n + tl.arange(0, J)
        seen = (j[None, :] <= t[:, None]) & (j[None, :] >= start[:, None])
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
def delta_kernel(
    out_ptr, dout_ptr, delta_ptr, T, U, N: tl.constexpr, H: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    """rowsum(out * dout) of one tile of one head. Grid (N, U / M)."""
    head, row = tl.program_id(0), tl.program_id(1) * M
    t, h = row + tl.arange(0, M), tl.arange(0, H)
    at = (t.to(tl.int64) * (N * H) + head * H)[:, None] + h[None, :]  # [M, H]
    inside = (t < T)[:, None]
    out = tl.load(out_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(delta_ptr + head.to(tl.int64) * U + t, tl.sum(out * dout, 1))


@triton.jit
def dq_kernel(
    q_desc, k_desc, v_desc, dout_desc, dq_desc, lse_ptr, delta_ptr, starts, order, scale, T, U,
    G: tl.constexpr, H: tl.constexpr, M: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """dq of one query tile of one head. Grid (N, U / M)."""
    row, head = _tile(order, M), tl.program_id(0)
    t = row + tl.arange(0, M)
    first = tl.load(starts + tl.minimum(row, T - 1)) // J * J
    start = tl.load(starts + tl.minimum(t, T - 1))  # [M]
    lse = tl.load(lse_ptr + head.to(tl.int64) * U + t) * LOG2E  # [M]
    delta = tl.load(delta_ptr + head.to(tl.int64) * U + t)  # [M]
    q, dout = q_desc.load([row, head * H]), dout_desc.load([row, head * H])
    dq = tl.zeros((M, H), tl.float32)
    for n in range(first, row + M, J):
        k, v = k_desc.load([n, head // G * H]), v_desc.load([n, head // G * H])
        s = tl.dot(q, k.T) * (scale * LOG2E) - lse[:, None]  # [M, J]
        j = n + tl.arange(0, J)
        seen = (j[None, :] <= t[:, None]) & (j[None, :] >= start[:, None])
        p = tl.math.exp2(tl.where(seen, s, MASKED))
        ds = p * (tl.dot(dout, v.T) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)
    dq_desc.store([row, head * H], (dq * scale).to(q.dtype))


@triton.jit
def dkdv_kernel(
    q_desc, k_desc, v_desc, dout_desc, dk_desc, dv_desc, lse_desc, delta_desc, ends, order,
    scale, T, U,
    G: tl.constexpr, S: tl.constexpr, H: tl.constexpr, M: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """dk and dv of one key tile and key head, over one of S parts of its G query heads.

    Outputs are [T, K * S, H]. Grid (K * S, U / J).
    """
    row, part = _tile(order, J), tl.program_id(0)
    head = part // S
    j = row + tl.arange(0, J)
    end = tl.load(ends + tl.minimum(j, T - 1))  # [J]
    last = tl.load(ends + tl.minimum(row + J, T) - 1)  # one past the last query that sees the tile
    blocks = tl.maximum(tl.cdiv(last - row, M), 0)
    k, v = k_desc.load([row, head * H]), v_desc.load([row, head * H])
    dk = tl.zeros((J, H), tl.float32)
    dv = tl.zeros((J, H), tl.float32)
    query_head, n = part * (G // S), row
    for _ in range(G // S * blocks):
        q, dout = q_desc.load([n, query_head * H]), dout_desc.load([n, query_head * H])
        lse = lse_desc.load([query_head * U + n]) * LOG2E  # [M]
        delta = delta_desc.load([query_head * U + n])
        t = n + tl.arange(0, M)
        seen = (j[:, None] <= t[None, :]) & (t[None, :] < end[:, None])
        s = tl.dot(k, q.T) * (scale * LOG2E) - lse[None, :]  # [J, M]
        p = tl.math.exp2(tl.where(seen, s, MASKED))
        dv = tl.dot(p.to(dout.dtype), dout, dv)
        ds = p * (tl.dot(v, dout.T) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk)
        n += M
        query_head = tl.where(n < last, query_head, query_head + 1)
        n = tl.where(n < last, n, row)
    dv_desc.store([row, part * H], dv.to(v.dtype))
    dk_desc.store([row, part * H], (dk * scale).to(k.dtype))


def forward(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, starts_T: Tensor, order: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [T, N, H] and log-sum-exp of the scaled scores [N, U], fp32, natural logarithm.

    Args:
        q_TNH, k_TKH, v_TKH: contiguous, bf16 or fp16; H a power of two of at least 16.
        starts_T: int32, the first token of each token's segment.
        order: [U / TILE] int32, the query tiles, the one that is to start first first.
    """
    tokens, heads, size = q_TNH.shape
    room = room_for(heads, tokens, order.numel())
    out, lse = torch.empty_like(q_TNH), q_TNH.new_empty(heads, room, dtype=torch.float32)
    how = launch_of(architecture(q_TNH.device), "forward", size)
    q_box, out_box = (_boxes(x, how.queries) for x in (q_TNH, out))
    boxes = (_boxes(x, how.keys) for x in (k_TKH, v_TKH))
    with on(q_TNH):
        forward_kernel[heads, room // how.queries](
            q_box, *boxes, out_box, lse, starts_T, order, scale, tokens, room,
            heads // k_TKH.shape[1], size, how.queries, how.keys,
            num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip
    return out, lse


def backward(
    dout_TNH: Tensor, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, out_TNH: Tensor, lse_NU: Tensor,
    starts_T: Tensor, ends_T: Tensor, query_order: Tensor, key_order: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv; arguments as in `forward`, which gave ``out_TNH`` and ``lse_NU``.

    Args:
        ends_T: int32, one past the last token of each token's segment.
        key_order: [U / TILE] int32, the key tiles, the one that is to start first first.
    """
    delta_NU = delta_of(out_TNH, dout_TNH, lse_NU)
    rest = (dout_TNH, lse_NU, delta_NU)
    dq_TNH = dq_of(q_TNH, k_TKH, v_TKH, *rest, starts_T, query_order, scale)
    return dq_TNH, *dkdv_of(q_TNH, k_TKH, v_TKH, *rest, ends_T, key_order, scale)


def delta_of(out_TNH: Tensor, dout_TNH: Tensor, lse_NU: Tensor) -> Tensor:
    """rowsum(out * dout) of each token and head, as ``lse_NU`` is laid out."""
    tokens, heads, size = out_TNH.shape
    delta_NU = torch.empty_like(lse_NU)
    how = launch_of(architecture(out_TNH.device), "delta", size)
    with on(out_TNH):
        delta_kernel[heads, lse_NU.shape[1] // how.queries](
            out_TNH, dout_TNH, delta_NU, tokens, lse_NU.shape[1], heads, size, how.queries,
            num_warps=how.warps,
        )  # fmt: skip
    return delta_NU


def dq_of(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, dout_TNH: Tensor, lse_NU: Tensor,
    delta_NU: Tensor, starts_T: Tensor, order: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """The gradient of q; arguments as in `backward`."""
    (tokens, heads, size), room = q_TNH.shape, lse_NU.shape[1]
    dq_TNH = torch.empty_like(q_TNH)
    how = launch_of(architecture(q_TNH.device), "dq", size)
    q_box, dout_box, dq_box = (_boxes(x, how.queries) for x in (q_TNH, dout_TNH, dq_TNH))
    boxes = (_boxes(x, how.keys) for x in (k_TKH, v_TKH))
    with on(q_TNH):
        dq_kernel[heads, room // how.queries](
            q_box, *boxes, dout_box, dq_box, lse_NU, delta_NU, starts_T, order, scale, tokens,
            room, heads // k_TKH.shape[1], size, how.queries, how.keys,
            num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip
    return dq_TNH


def dkdv_of(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, dout_TNH: Tensor, lse_NU: Tensor,
    delta_NU: Tensor, ends_T: Tensor, order: Tensor, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of k and v; arguments as in `backward`."""
    (tokens, heads, size), room = q_TNH.shape, lse_NU.shape[1]
    kv_heads = k_TKH.shape[1]
    group = heads // kv_heads
    parts = parts_of(kv_heads, group)
    dk, dv = (x.new_empty(tokens, kv_heads * parts, size) for x in (k_TKH, v_TKH))
    how = launch_of(architecture(q_TNH.device), "dkdv", size)
    q_box, dout_box = (_boxes(x, how.queries) for x in (q_TNH, dout_TNH))
    boxes = [_boxes(x, how.keys) for x in (k_TKH, v_TKH, dk, dv)]
    vectors = (TensorDescriptor.from_tensor(x.view(-1), [how.queries]) for x in (lse_NU, delta_NU))
    with on(q_TNH):
        dkdv_kernel[kv_heads * parts, room // how.keys](
            q_box, *boxes[:2], dout_box, *boxes[2:], *vectors, ends_T, order, scale, tokens, room,
            group, parts, size, how.queries, how.keys,
            num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip
    return sum_of_parts(dk, parts), sum_of_parts(dv, parts)


def _boxes(x_TNH: Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x_TNH.flatten(1), [rows, x_TNH.shape[2]])
