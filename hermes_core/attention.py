"""Causal attention inside each segment: no token sees another sample of its row.

Shapes: T packed tokens, N query heads, K key and value heads, H head size, U room for T rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.functional import pad

from hermes_core import attention_cpu, attention_peers
from hermes_core.backends import choose
from hermes_core.segments import Segments
from hermes_kernels import reference
from hermes_kernels.launch import TILE, architecture, padded_size
from hermes_kernels.places import Places

Backend = Literal["auto", "triton", "gluon", "flash", "torch", "cpu", "reference"]


@overload
def varlen_attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, segments: Segments, *,
    scale: float | None = None, return_lse: Literal[False] = False, backend: Backend = "auto",
) -> Tensor: ...  # fmt: skip


@overload
def varlen_attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, segments: Segments, *,
    scale: float | None = None, return_lse: Literal[True], backend: Backend = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def varlen_attention(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    segments: Segments,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention inside each segment; no token sees another segment.

    Equal inputs give equal bits with "triton", "gluon", "cpu" and "reference". Neither what stands
    beside a segment nor where it stands changes any of its bits.

    DTensors whose heads are sharded (tensor parallelism) give such a DTensor: every rank attends
    with its own heads, and nothing is sent.

    Args:
        q_TNH, k_TKH, v_TKH: one floating dtype and device; N a multiple of K (grouped queries).
        segments: made once per batch by `segments(cu_seqlens)`; covers all T tokens.
        scale: positive factor on q @ k; 1 / sqrt(H) if None.
        return_lse: give the log-sum-exp of each query's scaled scores too; it has no gradient.
        backend: "gluon" (ours for Hopper, run before their walks changed; those for Blackwell have
            never run, and "auto" never takes them), "triton" (ours for any GPU), "flash" (the
            flash-attn that is installed), "torch" (PyTorch's varlen_attn), "cpu" (ours in C++,
            float64 too), "reference" (plain, any device, float64 too), or "auto", the table in
            `backends`.

    Returns:
        [T, N, H] in q's dtype; with ``return_lse`` also [N, T], natural logarithm, at least fp32.

    Raises:
        ValueError: shapes, dtypes or devices disagree; unknown backend; scale not positive.
        BackendError: ``backend`` cannot run here; the message says why.

    Source: Hermes 4 report (arXiv 2508.18255), section 3.
    """
    if any(type(x).__name__ == "DTensor" for x in (q_TNH, k_TKH, v_TKH)):
        options: dict[str, Any] = {"scale": scale, "return_lse": return_lse, "backend": backend}
        return _attend_with_own_heads((q_TNH, k_TKH, v_TKH), segments, options)
    _check(q_TNH, k_TKH, v_TKH, segments)
    size = q_TNH.shape[-1]
    scale = size**-0.5 if scale is None else scale
    if not torch.finfo(torch.float32).tiny <= scale < math.inf:
        raise ValueError(f"scale must be positive and finite in float32, got {scale}")
    name = choose("attention", backend, q_TNH.device, q_TNH.dtype, size=size)
    if name in ("triton", "gluon", "cpu"):
        out, lse = _run_op(name, q_TNH, k_TKH, v_TKH, segments, scale)
    elif name == "reference":
        lengths = segments.lengths.tolist()
        out = reference.varlen_attention(q_TNH, k_TKH, v_TKH, lengths, scale)
        if return_lse:
            lse = reference.varlen_lse(q_TNH, k_TKH, lengths, scale)
    else:
        run = getattr(attention_peers, f"{name}_varlen")
        out, lse = run(q_TNH, k_TKH, v_TKH, segments, scale)
    return (out, lse[:, : segments.tokens].detach()) if return_lse else out


def _attend_with_own_heads(
    given: tuple[Any, Any, Any], segments: Segments, options: dict[str, Any]
) -> Tensor | tuple[Tensor, Tensor]:
    """Each rank's attention of DTensors, as DTensors."""
    from torch.distributed.tensor import DTensor, Shard

    names = ("q", "k", "v")
    for name, x in zip(names, given, strict=True):
        if not isinstance(x, DTensor):
            raise ValueError(f"{name} is a plain tensor, others of q, k and v are DTensors")
        if (x.device_mesh, x.placements) != (given[0].device_mesh, given[0].placements):
            raise ValueError(
                f"q is {given[0].placements} over {given[0].device_mesh} but {name} is "
                f"{x.placements} over {x.device_mesh}"
            )
    mesh, placements = given[0].device_mesh, given[0].placements
    ranks = 1
    for place, size in zip(placements, mesh.shape, strict=True):
        if not (place.is_replicate() or place.is_shard(1)):
            raise ValueError(
                f"q, k and v may be sharded over heads (dimension 1), got {placements}"
            )
        ranks *= size if place.is_shard(1) else 1
    for name, x in zip(names, given, strict=True):
        if x.shape[1] % ranks:
            raise ValueError(f"{name} has {x.shape[1]} heads, not a multiple of {ranks} ranks")
    attend: Any = varlen_attention
    found = attend(*(x.to_local() for x in given), segments, **options)
    if isinstance(found, Tensor):
        return DTensor.from_local(found, mesh, placements, run_check=False)
    out, lse = found
    rows = [Shard(0) if place.is_shard() else place for place in placements]
    return (
        DTensor.from_local(out, mesh, placements, run_check=False),
        DTensor.from_local(lse, mesh, rows, run_check=False),
    )


def _check(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, segments: Segments) -> None:
    for name, x in (("q", q_TNH), ("k", k_TKH), ("v", v_TKH)):
        if x.ndim != 3:
            raise ValueError(f"{name} must be [tokens, heads, head size], got {tuple(x.shape)}")
        if (x.dtype, x.device) != (q_TNH.dtype, q_TNH.device):
            raise ValueError(
                f"{name} is {x.dtype} on {x.device} but q is {q_TNH.dtype} on {q_TNH.device}"
            )
    tokens, heads, size = q_TNH.shape
    if size == 0:
        raise ValueError(f"q is {tuple(q_TNH.shape)}: the head size is 0, want 1 or more")
    if k_TKH.shape != v_TKH.shape:
        raise ValueError(f"k is {tuple(k_TKH.shape)} but v is {tuple(v_TKH.shape)}")
    if (k_TKH.shape[0], k_TKH.shape[2]) != (tokens, size):
        raise ValueError(f"k is {tuple(k_TKH.shape)} but q is {tuple(q_TNH.shape)}")
    if k_TKH.shape[1] == 0 or heads % k_TKH.shape[1]:
        raise ValueError(f"q has {heads} heads, not a multiple of the {k_TKH.shape[1]} of k and v")
    if segments.tokens != tokens:
        raise ValueError(f"cu_seqlens ends at {segments.tokens} but q has {tokens} tokens")
    if segments.places.starts.device != q_TNH.device:
        raise ValueError(
            f"segments are on {segments.places.starts.device} but q is on {q_TNH.device}; "
            "make them with device=q.device"
        )


def _run_op(
    name: str, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float
) -> tuple[Tensor, Tensor]:
    size = q.shape[-1]
    if name in ("triton", "gluon") and (room := padded_size(size) - size):
        q, k, v = (pad(x, (0, room)) for x in (q, k, v))
    out, lse = _op(q.contiguous(), k.contiguous(), v.contiguous(), *segments.places, scale, name)
    return out[..., :size], lse


@torch.library.custom_op("hermes::varlen_attention", mutates_args=())
def _op(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor, block_of: Tensor,
    blocks: Tensor, query_order: Tensor, key_order: Tensor, scale: float, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Opaque to torch.compile, which so sees shapes that follow from T alone."""
    if q.numel() == 0:
        return torch.empty_like(q), _room_for_lse(q, query_order)
    if backend == "cpu":
        lse = _room_for_lse(q, query_order)
        return attention_cpu.forward(q, k, v, starts, lse, scale), lse
    forward = _kernels(backend, "forward", q.device)
    places = Places(starts, ends, block_of, blocks, query_order, key_order)
    return forward(q, k, v, places, scale)  # type: ignore[no-any-return]


def _kernels(backend: str, direction: str, device: torch.device) -> Callable[..., Any]:
    """Our kernels' forward or backward: in Triton, or in Gluon for this architecture."""
    name = "varlen_attention"
    if backend == "gluon":
        name = f"{direction}_sm{architecture(device)}"
    function: Callable[..., Any] = getattr(import_module(f"hermes_kernels.{name}"), direction)
    return function


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor, block_of: Tensor,
      blocks: Tensor, query_order: Tensor, key_order: Tensor, scale: float, backend: str,
      ) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(q), _room_for_lse(q, query_order)


def _room_for_lse(q: Tensor, query_order: Tensor) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape[1], query_order.shape[0] * TILE, dtype=wide)


@torch.library.custom_op("hermes::varlen_attention_backward", mutates_args=())
def _backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor,
    ends: Tensor, block_of: Tensor, blocks: Tensor, query_order: Tensor, key_order: Tensor,
    scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if q.numel() == 0:
        return torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if backend == "cpu":
        return attention_cpu.backward(grad, q, k, v, out, lse, starts, scale)
    backward = _kernels(backend, "backward", q.device)
    places = Places(starts, ends, block_of, blocks, query_order, key_order)
    return backward(grad, q, k, v, out, lse, places, scale)  # type: ignore[no-any-return]


@_backward_op.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor,
      ends: Tensor, block_of: Tensor, blocks: Tensor, query_order: Tensor, key_order: Tensor,
      scale: float, backend: str,
      ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, *places, out, lse = ctx.saved_tensors
    grads = _backward_op(grad.contiguous(), q, k, v, out, lse, *places, ctx.scale, ctx.backend)
    return *grads, *(None for _ in (*places, ctx.scale, ctx.backend))


_op.register_autograd(_differentiate, setup_context=_save)
