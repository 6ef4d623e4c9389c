"""Two more operators: the loss of given logits, and each token's statistics.

Shapes: T packed tokens, M kept tokens, C kept tokens of one chunk, D model size, V vocabulary
(this rank's share of it where it is sharded).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hermes_core.loss_chunks import (
    Plan,
    Weights,
    chunk_loss_,
    divides_late,
    keep_gradients,
    rows_of,
    scale_gradients,
    totals,
)
from hermes_core.loss_weight import product, weight_gradient


@torch.library.custom_op(
    "hermes::masked_cross_entropy",
    mutates_args=(),
    schema="(Tensor logits, Tensor labels, Tensor? kept, Tensor? token_weights, "
    "Tensor? denominator, float z_loss, float softcap, int ignore_index, int chunk_bytes, "
    "str backend, int[] shard, str group, bool wants_logits) -> (Tensor, Tensor, Tensor, Tensor)",
)
def masked_op(
    logits: Tensor, labels: Tensor, kept: Tensor | None, token_weights: Tensor | None,
    denominator: Tensor | None, z_loss: float, softcap: float, ignore_index: int, chunk_bytes: int,
    backend: str, shard: list[int], group: str, wants_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Total, sums, factors, and the total's gradient of the logits (empty where not wanted)."""
    plan = Plan(labels, kept, ignore_index, chunk_bytes, shard, group, logits)
    weights = Weights(plan, token_weights, denominator, logits)
    sums_2 = torch.zeros(2, dtype=weights.plain_M.dtype, device=logits.device)
    d_logits = torch.zeros_like(logits) if wants_logits else logits.new_empty(0)
    for at in plan.chunks():
        kept_C = plan.kept_M[at]
        logits_CV = logits.index_select(0, kept_C)
        chunk_sums_2, _ = chunk_loss_(
            logits_CV, plan, weights, at, z_loss, softcap, rows_of(backend), wants_logits
        )
        sums_2 += chunk_sums_2
        if wants_logits:
            d_logits.index_copy_(0, kept_C, logits_CV)
    return *totals(sums_2, weights), weights.factors(None), d_logits


@masked_op.register_fake
def _masked_fake(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    d_logits = torch.empty_like(logits) if rest[-1] else logits.new_empty(0)
    factors = int(divides_late(logits, rest[3]))
    return *(logits.new_empty(n, dtype=wide) for n in ((), 3, factors)), d_logits


masked_op.register_autograd(scale_gradients, setup_context=keep_gradients)

_TOKENS = (
    "Tensor hidden, Tensor weight, Tensor labels, Tensor? kept, float softcap, "
    "int ignore_index, int chunk_bytes, str backend, int[] shard, str group"
)


@torch.library.custom_op(
    "hermes::token_statistics", mutates_args=(), schema=f"({_TOKENS}) -> (Tensor, Tensor, Tensor)"
)
def tokens_op(
    hidden: Tensor, weight: Tensor, labels: Tensor, kept: Tensor | None, softcap: float,
    ignore_index: int, chunk_bytes: int, backend: str, shard: list[int], group: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Negative log-likelihood, entropy and log-sum-exp of each token; 0 where it is not kept."""
    plan = Plan(labels, kept, ignore_index, chunk_bytes, shard, group, hidden)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    out_3T = torch.zeros(3, len(hidden), dtype=wide, device=hidden.device)
    for at, _, logits_CV in plan.logits(hidden, weight):
        column_C = plan.columns(at, logits_CV.shape[1])
        packed_3C = rows_of(backend).statistics(logits_CV, column_C, softcap)
        lse_C, target_C, expected_C = plan.over_group(packed_3C)
        found_3C = torch.stack([plan.nll(at, lse_C, target_C), lse_C - expected_C, lse_C])
        out_3T.index_copy_(1, plan.kept_M[at], found_3C)
    nll_T, entropy_T, lse_T = (x.clone() for x in out_3T)
    return nll_T, entropy_T, lse_T


@tokens_op.register_fake
def _tokens_fake(hidden: Tensor, *_: Any) -> tuple[Tensor, ...]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return tuple(hidden.new_empty(len(hidden), dtype=wide) for _ in range(3))


@torch.library.custom_op(
    "hermes::token_statistics_backward",
    mutates_args=(),
    schema=f"({_TOKENS}, Tensor d_nll, Tensor d_entropy, Tensor entropy, Tensor lse) "
    "-> (Tensor, Tensor)",
)
def tokens_backward_op(
    hidden: Tensor, weight: Tensor, labels: Tensor, kept: Tensor | None, softcap: float,
    ignore_index: int, chunk_bytes: int, backend: str, shard: list[int], group: str,
    d_nll: Tensor, d_entropy: Tensor, entropy: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden and weight, out of logits that are computed once more."""
    plan = Plan(labels, kept, ignore_index, chunk_bytes, shard, group, hidden)
    if backend == "triton":
        plan.use_room(weight.shape[1], weight.dtype, late=False)
    d_hidden = torch.zeros_like(hidden)
    # d nll = p - [target]; d entropy = -p * (log p + entropy)
    scale = d_nll - d_entropy * entropy

    def gradient_(logits_CV: Tensor, at: slice, first: int) -> None:
        kept_C = plan.kept_M[at]
        rows_of(backend).gradient_(
            logits_CV, plan.columns(at, logits_CV.shape[1], first), lse[kept_C], scale[kept_C],
            -d_entropy[kept_C], d_nll[kept_C], softcap,
        )  # fmt: skip

    def again_(logits_CV: Tensor, first: int) -> None:
        gradient_(logits_CV, slice(len(logits_CV)), first)

    d_weight = weight_gradient(weight, plan.chunks(), again_ if plan.one_product else None)
    logits_CV: Tensor | None = None
    for at, hidden_CD, logits_CV in plan.logits(hidden, weight):
        gradient_(logits_CV, at, 0)
        d_hidden.index_copy_(0, plan.kept_M[at], product(logits_CV, weight))
        d_weight.add(at, logits_CV, hidden_CD)
    del logits_CV  # frees their memory before the weight's gradient is rounded
    return d_hidden, d_weight.value()[0]


@tokens_backward_op.register_fake
def _tokens_backward_fake(hidden: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden), weight.new_empty(weight.shape)


def _keep_statistics(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, labels, kept, *ctx.options = inputs
    _, entropy_T, lse_T = output
    ctx.mark_non_differentiable(lse_T)
    ctx.save_for_backward(hidden, weight, labels, kept, entropy_T, lse_T)


def _recompute(
    ctx: Any, d_nll: Tensor, d_entropy: Tensor, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    hidden, weight, labels, kept, entropy_T, lse_T = ctx.saved_tensors
    d_hidden, d_weight = tokens_backward_op(
        hidden, weight, labels, kept, *ctx.options, d_nll, d_entropy, entropy_T, lse_T
    )
    return d_hidden, d_weight, *(None,) * (2 + len(ctx.options))


tokens_op.register_autograd(_recompute, setup_context=_keep_statistics)
