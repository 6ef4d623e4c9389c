"""Cross-entropy from hidden states that computes no logit nobody asked for.

Shapes: T packed tokens, M kept tokens, C kept tokens of one chunk, D model size, V vocabulary
(this rank's share of it where it is sharded).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from hermes_core.backends import choose
from hermes_core.samples import IGNORE_INDEX
from hermes_kernels import reference

Backend = Literal["auto", "torch", "reference"]


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    *,
    kept: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    chunk_bytes: int = 2**28,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Sum of the cross-entropy over kept tokens; divide it by the number of them in the step.

    Positions that are not kept are left out before the matrix product, forward and backward;
    their gradient is exactly zero. The gradients are made in the forward pass, chunk by chunk:
    no [M, V] tensor ever exists, and only one backward pass is possible.

    Args:
        hidden_TD, weight_VD: one floating dtype and device. Statistics and the weight's gradient
            are summed in fp32 at least.
        labels_T: int64, the next token where it is kept, else ``ignore_index``.
        kept: [M] int64, the kept positions, rising, as `build_rows` gives them; found from
            ``labels_T`` if None, which waits for the device on CUDA.
        chunk_bytes: room for the logits of one chunk.
        group: processes that share the vocabulary, weight_VD being this rank's part of it in
            rank order. Every rank gets the full sum, the gradient of its part of the weight, and
            its *partial* gradient of hidden: summing that over the group is the caller's affair.
        vocab_size: the whole vocabulary, all shards together. Give it wherever the weight may be
            sharded: without it a softmax over one rank's share would pass in silence.
        backend: "torch", "reference" (every logit, one process) or "auto".

    Returns:
        A scalar, float32 (float64 for float64); 0, connected, if no token is kept.

    Raises:
        ValueError: shapes, dtypes or devices disagree; labels outside the vocabulary (on a CPU);
            the shards do not add up to ``vocab_size``.
    """
    _check(hidden_TD, weight_VD, labels_T)
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be at least 1, got {chunk_bytes}")
    shard = _shard_of(weight_VD, group, vocab_size)
    if choose("loss", backend, hidden_TD.device, hidden_TD.dtype) == "reference":
        if group is not None:
            raise ValueError("backend 'reference' takes no group: give it the whole vocabulary")
        return reference.linear_cross_entropy(hidden_TD, weight_VD, labels_T, ignore_index)
    if kept is None:
        kept = (labels_T != ignore_index).nonzero().squeeze(1)
    targets_M = labels_T.index_select(0, kept)
    if targets_M.device.type == "cpu" and len(targets_M):
        _check_targets(targets_M, kept, shard.total)
    rows = max(1, chunk_bytes // (4 * shard.largest))
    total: Tensor = _LinearCrossEntropy.apply(
        hidden_TD, weight_VD, kept, targets_M, shard, rows, torch.is_grad_enabled()
    )
    return total


@dataclass(frozen=True)
class _Shard:
    """This rank's part of the vocabulary: its first id, the whole size, the largest part."""

    first: int
    total: int
    largest: int
    group: dist.ProcessGroup | None


def _shard_of(weight_VD: Tensor, group: dist.ProcessGroup | None, vocab_size: int | None) -> _Shard:
    size = weight_VD.shape[0]
    if group is None or dist.get_world_size(group) == 1:
        shard = _Shard(0, size, size, None)
    else:
        sizes = _sizes_in(group, size, weight_VD.device.type)
        first = sum(sizes[: dist.get_rank(group)])
        shard = _Shard(first, sum(sizes), max(sizes), group)
    if vocab_size is not None and shard.total != vocab_size:
        raise ValueError(
            f"weight has {size} rows here and {shard.total} over the group, but vocab_size is "
            f"{vocab_size}; pass the group over which the vocabulary is sharded"
        )
    return shard


@lru_cache(maxsize=16)
def _sizes_in(group: dist.ProcessGroup, size: int, device: str) -> list[int]:
    """Every rank's share of the vocabulary; asked once, since shards do not change."""
    mine = torch.tensor([size], device=device)
    sizes = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, mine, group=group)
    return [int(s) for s in sizes]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        kept_M: Tensor,
        targets_M: Tensor,
        shard: _Shard,
        rows: int,
        wants_gradient: bool,
    ) -> Tensor:
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden_TD.device)
        wants_hidden = wants_gradient and ctx.needs_input_grad[0]
        wants_weight = wants_gradient and ctx.needs_input_grad[1]
        d_hidden = torch.zeros_like(hidden_TD) if wants_hidden else None
        d_weight = torch.zeros_like(weight_VD, dtype=wide) if wants_weight else None
        for kept_C, targets_C in zip(kept_M.split(rows), targets_M.split(rows), strict=True):
            hidden_CD = hidden_TD.index_select(0, kept_C)
            logits_CV = (hidden_CD @ weight_VD.T).to(wide)
            lse_C, target_logit_C, local_C, mine_C = _statistics(logits_CV, targets_C, shard)
            total += (lse_C - target_logit_C).sum()
            if d_hidden is None and d_weight is None:
                continue
            # In place: the chunk of logits becomes its own gradient, softmax minus one-hot.
            probability_CV = logits_CV.sub_(lse_C[:, None]).exp_()
            probability_CV.scatter_add_(1, local_C, -mine_C[:, None].to(wide))
            gradient_CV = probability_CV.to(hidden_TD.dtype)
            if d_hidden is not None:
                d_hidden.index_copy_(0, kept_C, gradient_CV @ weight_VD)
            if d_weight is not None:
                d_weight.addmm_(gradient_CV.T.to(wide), hidden_CD.to(wide))
        ctx.gradients = d_hidden, None if d_weight is None else d_weight.to(weight_VD.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: one backward pass only; run forward again")
        d_hidden, d_weight = ctx.gradients
        ctx.gradients = None  # scaled in place, since nobody else holds them
        for gradient in (d_hidden, d_weight):
            if gradient is not None:
                gradient.mul_(grad.to(gradient.dtype))
        return d_hidden, d_weight, None, None, None, None, None


def _statistics(
    logits_CV: Tensor, targets_C: Tensor, shard: _Shard
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-sum-exp and target logit over the whole vocabulary, and where the targets lie here.

    Returns:
        lse_C, target_logit_C; local_C1 int64, the target's column in this shard (0 where it is
        elsewhere); mine_C bool, is the target in this shard.
    """
    local_C = targets_C - shard.first
    mine_C = (local_C >= 0) & (local_C < logits_CV.shape[1])
    local_C1 = torch.where(mine_C, local_C, 0)[:, None]
    target_C = logits_CV.gather(1, local_C1).squeeze(1).masked_fill(~mine_C, 0.0)
    lse_C = logits_CV.logsumexp(1)
    if shard.group is None:
        return lse_C, target_C, local_C1, mine_C
    # One collective a chunk; every rank adds the parts in the same order.
    packed = torch.stack([lse_C, target_C])
    parts = [torch.empty_like(packed) for _ in range(dist.get_world_size(shard.group))]
    dist.all_gather(parts, packed, group=shard.group)
    gathered = torch.stack(parts)  # [ranks, 2, C]
    return gathered[:, 0].logsumexp(0), gathered[:, 1].sum(0), local_C1, mine_C


def _check(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> None:
    if hidden_TD.ndim != 2 or weight_VD.ndim != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden must be [tokens, D] and weight [vocabulary, D], got "
            f"{tuple(hidden_TD.shape)} and {tuple(weight_VD.shape)}"
        )
    if labels_T.shape != hidden_TD.shape[:1]:
        raise ValueError(
            f"labels is {tuple(labels_T.shape)} but hidden has {len(hidden_TD)} tokens"
        )
    if labels_T.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels_T.dtype}")
    if hidden_TD.dtype != weight_VD.dtype:
        raise ValueError(f"hidden is {hidden_TD.dtype} but weight is {weight_VD.dtype}")
    if not hidden_TD.device == weight_VD.device == labels_T.device:
        raise ValueError(
            f"hidden is on {hidden_TD.device}, weight on {weight_VD.device}, "
            f"labels on {labels_T.device}"
        )


def _check_targets(targets_M: Tensor, kept_M: Tensor, vocab_size: int) -> None:
    outside = (targets_M < 0) | (targets_M >= vocab_size)
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise ValueError(
            f"labels[{int(kept_M[at])}] is {int(targets_M[at])}, outside [0, {vocab_size})"
        )
