"""Causal attention inside each segment: no token sees another sample of its row.

Shapes: T packed tokens, N query heads, K key and value heads, H head size; P slots (segments.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hermes_core.backends import HALF, choose
from hermes_core.segments import BucketPlan, Segments
from hermes_kernels import reference

Backend = Literal["auto", "torch", "cpu", "reference"]


def varlen_attention(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    segments: Segments,
    *,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Causal attention inside each segment; no token sees another segment.

    Args:
        q_TNH, k_TKH, v_TKH: one floating dtype and device; N a multiple of K (grouped queries).
        segments: made once per batch by `segments(cu_seqlens)`; covers all T tokens.
        scale: factor on q @ k; 1 / sqrt(H) if None.
        backend: "torch" (varlen_attn, CUDA, half precision), "cpu" (segments of like length
            batched into fused calls), "reference" (plain, any device, float64 too), or "auto".

    Returns:
        [T, N, H] in q's dtype.

    Raises:
        ValueError: shapes, dtypes or devices disagree; unknown backend.
        BackendError: ``backend`` cannot run here; the message says why.

    Source: Hermes 4 report (arXiv 2508.18255), section 3.
    """
    _check(q_TNH, k_TKH, v_TKH, segments)
    scale = q_TNH.shape[-1] ** -0.5 if scale is None else scale
    name = choose("attention", backend, q_TNH.device, q_TNH.dtype)
    if name == "cpu":
        out: Tensor = _Bucketed.apply(q_TNH, k_TKH, v_TKH, segments.bucket_plan, scale)
        return out
    if name == "torch":
        return _torch_varlen(q_TNH, k_TKH, v_TKH, segments, scale)
    return reference.varlen_attention(q_TNH, k_TKH, v_TKH, segments.lengths.tolist(), scale)


def _check(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, segments: Segments) -> None:
    for name, x in (("q", q_TNH), ("k", k_TKH), ("v", v_TKH)):
        if x.ndim != 3:
            raise ValueError(f"{name} must be [tokens, heads, head size], got {tuple(x.shape)}")
        if (x.dtype, x.device) != (q_TNH.dtype, q_TNH.device):
            raise ValueError(
                f"{name} is {x.dtype} on {x.device} but q is {q_TNH.dtype} on {q_TNH.device}"
            )
    tokens, heads, size = q_TNH.shape
    if k_TKH.shape != v_TKH.shape:
        raise ValueError(f"k is {tuple(k_TKH.shape)} but v is {tuple(v_TKH.shape)}")
    if (k_TKH.shape[0], k_TKH.shape[2]) != (tokens, size):
        raise ValueError(f"k is {tuple(k_TKH.shape)} but q is {tuple(q_TNH.shape)}")
    if k_TKH.shape[1] == 0 or heads % k_TKH.shape[1]:
        raise ValueError(f"q has {heads} heads, not a multiple of the {k_TKH.shape[1]} of k and v")
    if segments.tokens != tokens:
        raise ValueError(f"cu_seqlens ends at {segments.tokens} but q has {tokens} tokens")


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    """PyTorch's own variable-length attention, for CUDA; not run on a GPU by us yet."""
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = segments.cu_seqlens, segments.max_length
    out = varlen_attn(
        q, k, v, bounds, bounds, longest, longest,
        scale=scale, window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Bucketed(torch.autograd.Function):
    """One fused call for each bucket of like segments, on a padded copy of q, k and v.

    A call for each segment would cost more than the arithmetic of short ones, and slicing one
    output in a loop makes its backward quadratic in the number of segments.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: BucketPlan, scale: float
    ) -> Tensor:
        q_P, k_P, v_P = (_to_slots(x, plan) for x in (q, k, v))
        out_P = torch.empty_like(q_P)
        statistics = []
        for q_b, k_b, v_b, out_b in _lines(plan, q_P, k_P, v_P, out_P):
            out, lse = _forward(q_b, k_b, v_b, 0.0, True, scale=scale)
            out_b.copy_(out)
            statistics.append(lse)
        ctx.save_for_backward(q_P, k_P, v_P, out_P, *statistics)
        ctx.plan, ctx.scale = plan, scale
        return out_P if plan.slot_of_token is None else out_P.index_select(0, plan.slot_of_token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        plan: BucketPlan = ctx.plan
        q_P, k_P, v_P, out_P, *statistics = ctx.saved_tensors
        grad_P = _to_slots(grad, plan)
        if plan.real_slots is not None:
            grad_P.mul_(plan.real_slots)  # a copy of ours: _to_slots gathered it
        dq_P, dk_P, dv_P = (torch.empty_like(x) for x in (q_P, k_P, v_P))
        tensors = (grad_P, q_P, k_P, v_P, out_P, dq_P, dk_P, dv_P)
        for lse, (g, q, k, v, out, dq, dk, dv) in zip(
            statistics, _lines(plan, *tensors), strict=True
        ):
            grads = _gradients(g, q, k, v, out, lse, ctx.scale)
            for target, value in zip((dq, dk, dv), grads, strict=True):
                target.copy_(value)
        if plan.slot_of_token is None:
            return dq_P, dk_P, dv_P, None, None
        dq, dk, dv = (x.index_select(0, plan.slot_of_token) for x in (dq_P, dk_P, dv_P))
        return dq, dk, dv, None, None


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of one bucket, all [lines, heads, width, H].

    Torch's kernel sums the heads that share a key in the inputs' dtype; in half precision that
    costs a bit of k's and v's gradient, so there each head gets its own and we sum in fp32.
    """
    group = q.shape[1] // k.shape[1]
    if group == 1 or q.dtype not in HALF:
        return _backward(grad, q, k, v, out, lse, 0.0, True, scale=scale)  # type: ignore[no-any-return]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    dq, dk, dv = _backward(grad, q, k, v, out, lse, 0.0, True, scale=scale)
    dk, dv = (x.unflatten(1, (-1, group)).sum(2, dtype=torch.float32) for x in (dk, dv))
    return dq, dk, dv


def _to_slots(x_TNH: Tensor, plan: BucketPlan) -> Tensor:
    """[T, N, H] to the padded layout [P, N, H], contiguous."""
    if plan.token_of_slot is None:
        return x_TNH.contiguous()
    return x_TNH.index_select(0, plan.token_of_slot)


def _lines(plan: BucketPlan, *tensors: Tensor) -> Iterator[list[Tensor]]:
    """For each bucket, the view [lines, heads, width, H] of every tensor [P, heads, H]."""
    for bucket in plan.buckets:
        slots = slice(bucket.start, bucket.start + bucket.count * bucket.width)
        shape = (bucket.count, bucket.width)
        yield [x[slots].unflatten(0, shape).transpose(1, 2) for x in tensors]
