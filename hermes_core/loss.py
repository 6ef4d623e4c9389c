"""Cross-entropy from hidden states that computes no logit nobody asked for.

Shapes: T packed tokens, M kept tokens, D model size, V vocabulary (this rank's share of it where
it is sharded).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from hermes_core.backends import choose
from hermes_core.loss_chunks import kept_labels, linear_op
from hermes_core.loss_shares import shard_of
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
    that the logits of one chunk are all that exist, and only one backward pass is possible, without
    a gradient of the gradient. With no kept token the total is 0, whatever the denominator, and
    still connected.

    Args:
        hidden_TD, weight_VD: one floating dtype and device. Statistics and the weight's gradient
            are summed in fp32 at least.
        labels_T: int64, the next token where it is kept, else ``ignore_index``.
        token_weights_T: a factor for each token's loss; float, without a gradient.
        denominator: kept tokens, or their weights added up, over all ranks and accumulation
            steps: the result is then the same for any split. A number above 0, or a tensor of one
            element without a gradient. None: the total is the sum.
        z_loss: adds z_loss x log-sum-exp squared to each token's loss.
        softcap: logits become softcap x tanh(logits / softcap); 0 leaves them.
        kept: [M] int64, the kept positions, rising, as `build_rows` gives them; found from
            ``labels_T`` if None, which waits for the device on CUDA. Checked as labels are.
        group: processes that share the vocabulary, weight_VD being this rank's part of it in
            rank order. Every rank gets the full loss, the gradient of its part of the weight, and
            its *partial* gradient of hidden: summing that over the group is the caller's affair.
        vocab_size: the whole vocabulary, all shards together. Give it wherever the weight may be
            sharded: without it a softmax over one rank's share would pass in silence, and a group
            is asked for its shares at each call, which breaks a compiler's graph.
        chunk_bytes: room for the logits of one chunk; a CPU takes no more than 128 MiB of it, in
            half precision 256 MiB. In half precision "triton" takes, beyond the gradients, no
            more than this and a sum of the weight's gradient in fp32: all logits are one chunk
            where that is room for them, else a chunk has the place of the gradient, too, which
            is made after the last.
        backend: "triton", "torch", "reference" (every logit, one process) or "auto".

    Raises:
        ValueError: shapes, dtypes or devices disagree; an option is outside its range; the
            shards do not add up to ``vocab_size`` or have changed; a label outside the vocabulary
            or ``kept`` that does not rise inside the tokens, on a CPU or where HERMES_CORE_DEBUG is
            1 (elsewhere the loss is NaN with such a label).
        TypeError: labels or kept are not int64, token_weights or chunk_bytes no numbers of theirs.
        BackendError: ``backend`` cannot run here.
        RuntimeError: in backward: a second one, or one with ``create_graph``; under forward mode.
    """
    _check_hidden(hidden_TD, weight_VD, labels_T)
    _check_options(hidden_TD, labels_T, token_weights_T, kept, denominator)
    _check_numbers(z_loss, softcap, chunk_bytes)
    shard = shard_of(weight_VD.shape[0], weight_VD.device, group, vocab_size)
    chosen = choose("loss", backend, hidden_TD.device, hidden_TD.dtype)
    divisor = _divisor(denominator, hidden_TD)
    if chosen == "reference":
        _refuse_group(group)
        return _plain_loss(
            hidden_TD, weight_VD, labels_T, token_weights_T, divisor, z_loss, softcap, kept,
            ignore_index,
        )  # fmt: skip
    _refuse_tangents(hidden_TD, weight_VD)
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
    _check_options(logits_TV, labels_T, token_weights_T, kept, denominator)
    _check_numbers(z_loss, softcap, chunk_bytes)
    shard = shard_of(logits_TV.shape[1], logits_TV.device, group, vocab_size)
    chosen = choose("loss", backend, logits_TV.device, logits_TV.dtype)
    divisor = _divisor(denominator, logits_TV)
    if chosen == "reference":
        _refuse_group(group)
        return _plain_loss(
            logits_TV, None, labels_T, token_weights_T, divisor, z_loss, softcap, kept,
            ignore_index,
        )  # fmt: skip
    _refuse_tangents(logits_TV)
    total, sums, *_ = masked_op(
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
    _check_options(hidden_TD, labels_T, None, kept, None)
    _check_numbers(0.0, softcap, chunk_bytes)
    shard = shard_of(weight_VD.shape[0], weight_VD.device, group, vocab_size)
    chosen = choose("loss", backend, hidden_TD.device, hidden_TD.dtype)
    if chosen == "reference":
        _refuse_group(group)
        _, nll_T, entropy_T, _ = _plain_statistics(
            hidden_TD, weight_VD, labels_T, kept, ignore_index, softcap
        )
        return TokenStatistics(nll_T, entropy_T)
    _refuse_tangents(hidden_TD, weight_VD)
    nll_T, entropy_T, _ = tokens_op(
        hidden_TD, weight_VD, labels_T, kept, softcap, ignore_index, chunk_bytes, chosen, shard,
        _name(group),
    )  # fmt: skip
    return TokenStatistics(nll_T, entropy_T)


def _plain_loss(
    x_TX: Tensor, weight_VD: Tensor | None, labels_T: Tensor, token_weights_T: Tensor | None,
    divisor: Tensor | None, z_loss: float, softcap: float, kept: Tensor | None, ignore_index: int,
) -> Loss:  # fmt: skip
    kept_T, nll_T, _, lse_T = _plain_statistics(
        x_TX, weight_VD, labels_T, kept, ignore_index, softcap
    )
    weights_T = kept_T.to(nll_T.dtype)
    if token_weights_T is not None:
        weights_T = torch.where(kept_T, token_weights_T, weights_T)
    nll_sum, z_sum = (weights_T * nll_T).sum(), z_loss * (weights_T * lse_T**2).sum()
    total = nll_sum + z_sum
    if divisor is not None:  # which may be 0 where there is nothing to count
        total = total / torch.where(weights_T.any(), divisor, 1)
    return Loss(total, nll_sum.detach(), z_sum.detach(), weights_T.sum())


def _plain_statistics(
    x_TX: Tensor, weight_VD: Tensor | None, labels_T: Tensor, kept: Tensor | None,
    ignore_index: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Which tokens are kept, and their statistics; from logits where there is no weight."""
    size = x_TX.shape[1] if weight_VD is None else len(weight_VD)
    if not torch.compiler.is_compiling():  # nothing can be refused inside a graph
        kept_labels(labels_T, kept, ignore_index, size)
    kept_T = labels_T != ignore_index
    if kept is not None:
        kept_T = torch.zeros_like(kept_T).index_fill(0, kept, True)
    x_TX = x_TX.masked_fill(~kept_T[:, None], 0.0)  # 0 x NaN would be in the gradient
    logits_TV = x_TX if weight_VD is None else x_TX @ weight_VD.T
    inside_T = labels_T.clamp(0, size - 1)
    nll_T, entropy_T, lse_T = reference.token_statistics(logits_TV, inside_T, kept_T, softcap)
    nll_T = nll_T.masked_fill(kept_T & (labels_T != inside_T), math.nan)
    return kept_T, nll_T, entropy_T, lse_T


def _refuse_tangents(*tensors: Tensor) -> None:
    """In forward mode, where an operator without a rule would give a tangent of 0."""
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(x).tangent is not None for x in tensors
    ):
        raise RuntimeError(
            'the loss has no forward-mode derivative: use backward, or take backend="reference"'
        )


def _refuse_group(group: dist.ProcessGroup | None) -> None:
    if group is not None:
        raise ValueError("backend 'reference' takes no group: give it the whole vocabulary")


def _wants(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _name(group: dist.ProcessGroup | None) -> str:
    return "" if group is None or dist.get_world_size(group) == 1 else group.group_name


def _divisor(denominator: Tensor | float | None, like: Tensor) -> Tensor | None:
    if denominator is None:
        return None
    if isinstance(denominator, Tensor):
        return denominator.reshape(())
    wide = torch.promote_types(like.dtype, torch.float32)
    return torch.full((), denominator, dtype=wide, device=like.device)


def _check_hidden(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> None:
    if hidden_TD.ndim != 2 or weight_VD.ndim != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden must be [tokens, D] and weight [vocabulary, D], got "
            f"{tuple(hidden_TD.shape)} and {tuple(weight_VD.shape)}"
        )
    if hidden_TD.shape[1] == 0:
        raise ValueError("hidden and weight have D 0; want at least 1")
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
    denominator: Tensor | float | None,
) -> None:  # fmt: skip
    if token_weights_T is not None:
        if token_weights_T.shape != labels_T.shape:
            raise ValueError(
                f"token_weights is {tuple(token_weights_T.shape)} but labels is "
                f"{tuple(labels_T.shape)}"
            )
        if token_weights_T.requires_grad:
            raise ValueError("token_weights requires a gradient, which is not computed; detach it")
        if token_weights_T.is_complex():
            raise TypeError(f"token_weights must be real, got {token_weights_T.dtype}")
    if kept is not None and (kept.ndim != 1 or kept.dtype != torch.int64):
        raise TypeError(f"kept must be [M] int64, got {tuple(kept.shape)} {kept.dtype}")
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            raise ValueError(f"denominator must be one number, got {tuple(denominator.shape)}")
        if denominator.requires_grad:
            raise ValueError("denominator requires a gradient, which is not computed; detach it")
        if denominator.is_complex():
            raise TypeError(f"denominator must be real, got {denominator.dtype}")
    elif denominator is not None and not denominator >= 0:
        raise ValueError(f"denominator must not be negative, got {denominator}")
    for name, x in (
        ("token_weights", token_weights_T),
        ("kept", kept),
        ("denominator", denominator),
    ):
        if isinstance(x, Tensor) and x.device != like.device:
            raise ValueError(f"{name} is on {x.device} but labels is on {like.device}")


def _check_numbers(z_loss: float, softcap: float, chunk_bytes: int) -> None:
    if not isinstance(chunk_bytes, int):
        raise TypeError(f"chunk_bytes must be an int, got {chunk_bytes!r}")
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be at least 1, got {chunk_bytes}")
    if not -math.inf < z_loss < math.inf:  # the compiler cannot trace math.isfinite
        raise ValueError(f"z_loss must be finite, got {z_loss}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap must be finite and at least 0, got {softcap}; 0 is no cap")
