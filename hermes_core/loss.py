"""Cross-entropy from hidden states that computes no logit nobody asked for.

Shapes: T packed tokens, M kept tokens, D model size, V vocabulary (this rank's share of it where
it is sharded).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hermes_core.backends import choose
from hermes_core.loss_chunks import linear_op
from hermes_core.loss_tokens import masked_op, tokens_op
from hermes_core.samples import IGNORE_INDEX
from hermes_kernels import reference

Backend = Literal["auto", "triton", "torch", "reference"]


class Loss(NamedTuple):
    """Scalars, float32 (float64 for float64); ``total`` alone carries a gradient."""

    total: Tensor  # (nll_sum + z_sum) / denominator
    nll_sum: Tensor  # of weight x -log p, over kept tokens
    z_sum: Tensor  # of weight x z_loss x log-sum-exp squared
    tokens: Tensor  # kept tokens' weights added up: their number where no weights are given


class TokenStatistics(NamedTuple):
    """[T], float32 (float64 for float64), 0 where a token is not kept; both carry gradients."""

    nll_T: Tensor
    entropy_T: Tensor


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    *,
    token_weights_T: Tensor | None = None,
    denominator: Tensor | float | None = None,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    kept: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_bytes: int = 2**30,
    backend: Backend = "auto",
) -> Loss:
    """Cross-entropy over kept tokens, divided by ``denominator``.

    Positions that are not kept are left out before the matrix product, forward and backward;
    their gradient is exactly zero. The gradients are made in the forward pass, chunk by chunk, so
    that the logits of one chunk are all that exist, and only one backward pass is possible. With no
    kept token the total is 0 and still connected.

    Args:
        hidden_TD, weight_VD: one floating dtype and device. Statistics and the weight's gradient
            are summed in fp32 at least.
        labels_T: int64, the next token where it is kept, else ``ignore_index``.
        token_weights_T: a factor for each token's loss; float.
        denominator: kept tokens, or their weights added up, over all ranks and accumulation
            steps: the result is then the same for any split. None: the total is the sum.
        z_loss: adds z_loss x log-sum-exp squared to each token's loss.
        softcap: logits become softcap x tanh(logits / softcap); 0 leaves them.
        kept: [M] int64, the kept positions, rising, as `build_rows` gives them; found from
            ``labels_T`` if None, which waits for the device on CUDA.
        group: processes that share the vocabulary, weight_VD being this rank's part of it in
            rank order. Every rank gets the full loss, the gradient of its part of the weight, and
            its *partial* gradient of hidden: summing that over the group is the caller's affair.
        vocab_size: the whole vocabulary, all shards together. Give it wherever the weight may be
            sharded: without it a softmax over one rank's share would pass in silence.
        chunk_bytes: room for the logits of one chunk; a CPU takes no more than 128 MiB of it, in
            half precision 256 MiB. In half precision "triton" takes, beyond the gradients, no
            more than this and a sum of the weight's gradient in fp32: all logits are one chunk
            where that is room for them, else a chunk has the place of the gradient, too, which
            is made after the last.
        backend: "triton", "torch", "reference" (every logit, one process) or "auto".

    Raises:
        ValueError: shapes, dtypes or devices disagree; the shards do not add up to
            ``vocab_size``; a label outside the vocabulary, on a CPU or where HERMES_CORE_DEBUG
            is 1 (elsewhere the loss is then NaN).
        BackendError: ``backend`` cannot run here.
    """
    _check_hidden(hidden_TD, weight_VD, labels_T)
    _check_options(hidden_TD, labels_T, token_weights_T, kept, denominator, chunk_bytes)
    shard = _shard_of(weight_VD.shape[0], weight_VD.device, group, vocab_size)
    chosen = choose("loss", backend, hidden_TD.device, hidden_TD.dtype)
    divisor = _divisor(denominator, hidden_TD)
    if chosen == "reference":
        _refuse_group(group)
        return _plain_loss(
            hidden_TD @ weight_VD.T, labels_T, token_weights_T, divisor, z_loss, softcap,
            kept, ignore_index,
        )  # fmt: skip
    total, sums, *_ = linear_op(
        hidden_TD, weight_VD, labels_T, kept, token_weights_T, divisor, z_loss, softcap,
        ignore_index, chunk_bytes, chosen, shard, _name(group),
        _wants(hidden_TD), _wants(weight_VD),
    )  # fmt: skip
    return Loss(total, *sums.unbind())


def masked_cross_entropy(
    logits_TV: Tensor,
    labels_T: Tensor,
    *,
    token_weights_T: Tensor | None = None,
    denominator: Tensor | float | None = None,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    kept: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_bytes: int = 2**30,
    backend: Backend = "auto",
) -> Loss:
    """The loss of `linear_cross_entropy` for those who have logits; the same arguments and errors.

    The gradient of the logits is made in the forward pass, 0 at positions that are not kept.
    """
    if logits_TV.ndim != 2 or labels_T.shape != logits_TV.shape[:1]:
        raise ValueError(
            f"logits must be [tokens, vocabulary] and labels [tokens], got "
            f"{tuple(logits_TV.shape)} and {tuple(labels_T.shape)}"
        )
    _check_labels(labels_T, logits_TV, "logits")
    _check_options(logits_TV, labels_T, token_weights_T, kept, denominator, chunk_bytes)
    shard = _shard_of(logits_TV.shape[1], logits_TV.device, group, vocab_size)
    chosen = choose("loss", backend, logits_TV.device, logits_TV.dtype)
    divisor = _divisor(denominator, logits_TV)
    if chosen == "reference":
        _refuse_group(group)
        return _plain_loss(
            logits_TV, labels_T, token_weights_T, divisor, z_loss, softcap, kept, ignore_index
        )
    total, sums, _ = masked_op(
        logits_TV, labels_T, kept, token_weights_T, divisor, z_loss, softcap, ignore_index,
        chunk_bytes, chosen, shard, _name(group), _wants(logits_TV),
    )  # fmt: skip
    return Loss(total, *sums.unbind())


def token_nll(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    *,
    softcap: float = 0.0,
    kept: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_bytes: int = 2**30,
    backend: Backend = "auto",
) -> TokenStatistics:
    """Each kept token's -log p and the entropy of what was predicted there.

    Backward computes the logits of each chunk once more, so that nothing of the vocabulary's width
    is kept between the passes. Arguments and errors are those of `linear_cross_entropy`.
    """
    _check_hidden(hidden_TD, weight_VD, labels_T)
    _check_options(hidden_TD, labels_T, None, kept, None, chunk_bytes)
    shard = _shard_of(weight_VD.shape[0], weight_VD.device, group, vocab_size)
    chosen = choose("loss", backend, hidden_TD.device, hidden_TD.dtype)
    if chosen == "reference":
        _refuse_group(group)
        kept_T = _mask(labels_T, kept, ignore_index)
        logits_TV = hidden_TD @ weight_VD.T
        nll_T, entropy_T, _ = reference.token_statistics(logits_TV, labels_T, kept_T, softcap)
        return TokenStatistics(nll_T, entropy_T)
    nll_T, entropy_T, _ = tokens_op(
        hidden_TD, weight_VD, labels_T, kept, softcap, ignore_index, chunk_bytes, chosen, shard,
        _name(group),
    )  # fmt: skip
    return TokenStatistics(nll_T, entropy_T)


def _plain_loss(
    logits_TV: Tensor, labels_T: Tensor, token_weights_T: Tensor | None, divisor: Tensor | None,
    z_loss: float, softcap: float, kept: Tensor | None, ignore_index: int,
) -> Loss:  # fmt: skip
    kept_T = _mask(labels_T, kept, ignore_index)
    nll_T, _, lse_T = reference.token_statistics(logits_TV, labels_T, kept_T, softcap)
    weights_T = kept_T.to(nll_T.dtype)
    if token_weights_T is not None:
        weights_T = weights_T * token_weights_T
    nll_sum, z_sum = (weights_T * nll_T).sum(), z_loss * (weights_T * lse_T**2).sum()
    total = nll_sum + z_sum
    total = total if divisor is None else total / divisor
    return Loss(total, nll_sum.detach(), z_sum.detach(), weights_T.sum())


def _mask(labels_T: Tensor, kept: Tensor | None, ignore_index: int) -> Tensor:
    if kept is None:
        return labels_T != ignore_index
    return torch.zeros_like(labels_T, dtype=torch.bool).index_fill(0, kept, True)


def _refuse_group(group: dist.ProcessGroup | None) -> None:
    if group is not None:
        raise ValueError("backend 'reference' takes no group: give it the whole vocabulary")


def _wants(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _name(group: dist.ProcessGroup | None) -> str:
    return "" if group is None or dist.get_world_size(group) == 1 else group.group_name


def _divisor(denominator: Tensor | float | None, like: Tensor) -> Tensor | None:
    if denominator is None or isinstance(denominator, Tensor):
        return denominator
    wide = torch.promote_types(like.dtype, torch.float32)
    return torch.full((), denominator, dtype=wide, device=like.device)


def _shard_of(
    size: int, device: torch.device, group: dist.ProcessGroup | None, vocab_size: int | None
) -> list[int]:
    """This rank's part of the vocabulary: its first id, the whole size, the largest part."""
    if group is None or dist.get_world_size(group) == 1:
        first, total, largest = 0, size, size
    else:
        sizes = _sizes_in(group, size, device.type)
        first, total, largest = sum(sizes[: dist.get_rank(group)]), sum(sizes), max(sizes)
    if vocab_size is not None and total != vocab_size:
        raise ValueError(
            f"weight has {size} rows here and {total} over the group, but vocab_size is "
            f"{vocab_size}; pass the group over which the vocabulary is sharded"
        )
    if size == 0:
        raise ValueError("weight has 0 rows here; give every rank of the group a share")
    return [first, total, largest]


@lru_cache(maxsize=16)
def _sizes_in(group: dist.ProcessGroup, size: int, device: str) -> list[int]:
    """Every rank's share of the vocabulary; asked once, since shards do not change."""
    mine = torch.tensor([size], device=device)
    sizes = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, mine, group=group)
    return [int(s) for s in sizes]


def _check_hidden(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> None:
    if hidden_TD.ndim != 2 or weight_VD.ndim != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden must be [tokens, D] and weight [vocabulary, D], got "
            f"{tuple(hidden_TD.shape)} and {tuple(weight_VD.shape)}"
        )
    if labels_T.shape != hidden_TD.shape[:1]:
        raise ValueError(
            f"labels is {tuple(labels_T.shape)} but hidden has {len(hidden_TD)} tokens"
        )
    if hidden_TD.dtype != weight_VD.dtype:
        raise ValueError(f"hidden is {hidden_TD.dtype} but weight is {weight_VD.dtype}")
    if hidden_TD.device != weight_VD.device:
        raise ValueError(f"hidden is on {hidden_TD.device} but weight is on {weight_VD.device}")
    _check_labels(labels_T, hidden_TD, "hidden")


def _check_labels(labels_T: Tensor, other: Tensor, name: str) -> None:
    if labels_T.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels_T.dtype}")
    if labels_T.device != other.device:
        raise ValueError(f"labels is on {labels_T.device} but {name} is on {other.device}")


def _check_options(
    like: Tensor, labels_T: Tensor, token_weights_T: Tensor | None, kept: Tensor | None,
    denominator: Tensor | float | None, chunk_bytes: int,
) -> None:  # fmt: skip
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be at least 1, got {chunk_bytes}")
    if token_weights_T is not None:
        if token_weights_T.shape != labels_T.shape:
            raise ValueError(
                f"token_weights is {tuple(token_weights_T.shape)} but labels is "
                f"{tuple(labels_T.shape)}"
            )
        if token_weights_T.requires_grad:
            raise ValueError("token_weights requires a gradient, which is not computed; detach it")
    if kept is not None and (kept.ndim != 1 or kept.dtype != torch.int64):
        raise TypeError(f"kept must be [M] int64, got {tuple(kept.shape)} {kept.dtype}")
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            raise ValueError(f"denominator must be one number, got {tuple(denominator.shape)}")
    elif denominator is not None and not denominator > 0:
        raise ValueError(f"denominator must be above 0, got {denominator}; count at least 1")
    for name, x in (
        ("token_weights", token_weights_T),
        ("kept", kept),
        ("denominator", denominator),
    ):
        if isinstance(x, Tensor) and x.device != like.device:
            raise ValueError(f"{name} is on {x.device} but labels is on {like.device}")
