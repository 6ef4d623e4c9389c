"""The loss as operators that PyTorch knows: kept rows gathered, a chunk of logits at a time.

Each operator is opaque to the compiler and makes its gradients in its forward pass, or, for
`token_nll`, computes the logits once more in its backward pass.

Shapes: T packed tokens, M kept tokens, C kept tokens of one chunk, D model size, V vocabulary
(this rank's share of it where it is sharded).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group

from hermes_core import loss_rows
from hermes_core.loss_weight import product, room, weight_gradient

# On a CPU a larger chunk gains nothing in fp32. In bf16 it does: tokens before the last chunk may
# be computed again for the weight's gradient.
CPU_CHUNK_BYTES = {2: 2**28, 4: 2**27, 8: 2**27}  # by the size of an element
# Logits. On a GPU each row starts at a whole vector: products and kernels are slow on others.
VECTOR = 16
ROWS = 64  # of a product of halves by oneDNN, which is up to a sixth slower where some are left


class RowFunctions(Protocol):
    """What `loss_rows` and `hermes_kernels.cross_entropy` both offer."""

    def statistics(self, logits_CV: Tensor, column_C: Tensor, softcap: float) -> Tensor: ...

    def loss_and_gradient_(
        self, logits_CV: Tensor, column_C: Tensor, weight_C: Tensor, z_loss: float, softcap: float
    ) -> Tensor: ...

    def gradient_(
        self, logits_CV: Tensor, column_C: Tensor, lse_C: Tensor, scale_C: Tensor,
        tilt_C: Tensor | None, target_C: Tensor, softcap: float,
    ) -> None: ...  # fmt: skip


def rows_of(backend: str) -> RowFunctions:
    """The module whose functions work on a chunk of logits."""
    if backend == "triton":
        from hermes_kernels import cross_entropy

        return cross_entropy
    return loss_rows


class Plan:
    """Which rows are kept, their targets and weights, and how they are cut into chunks."""

    def __init__(
        self, labels_T: Tensor, kept: Tensor | None, ignore_index: int, chunk_bytes: int,
        shard: list[int], group: str, like: Tensor,
    ) -> None:  # fmt: skip
        self.first, self.total, self.largest = shard
        # An operator takes no group; torch's own collectives look it up by its name, too.
        self.group = _resolve_process_group(c10d.GroupName(group)) if group else None
        self.kept_M, self.labels_M = kept_labels(labels_T, kept, ignore_index, self.total)
        self.on_cpu = labels_T.device.type == "cpu"
        if self.on_cpu:
            chunk_bytes = min(chunk_bytes, CPU_CHUNK_BYTES[like.element_size()])
        self.one_product = self.on_cpu and like.dtype == torch.bfloat16
        self.most = max(1, chunk_bytes // (like.element_size() * max(1, self.largest)))
        if self.one_product and self.most > ROWS:
            self.most -= self.most % ROWS

    def use_room(self, size: int, dtype: torch.dtype, *, late: bool) -> None:
        """Fewer chunks on a GPU, where the gradient of a weight [V, ``size``] leaves room for them.

        Summed in fp32 it takes twice the memory beside what it has at the end, and one chunk needs
        no such sum, unless it is divided ``late``: its rows may have that room too. Where chunks
        are added up, the gradient itself is made when their logits are gone: they may have its.
        A row is its logits, its hidden state and the gradient of that. As the largest share counts,
        all ranks of a group have the same chunks.
        """
        wide = torch.promote_types(dtype, torch.float32)
        if self.on_cpu or wide == dtype:  # on a CPU small chunks stay best
            return
        room, gradient = self.most * self.largest, self.largest * size  # in elements
        summed = gradient * wide.itemsize // dtype.itemsize
        row = self.largest + 2 * size
        kept = len(self.kept_M)
        one = not late and kept * row <= room + summed
        self.most = max(self.most, kept if one else (room + gradient) // row)

    def chunks(self) -> list[slice]:
        """Even ones; where the weight's gradient is one product, a rest and then full ones."""
        kept = len(self.kept_M)
        if kept == 0:
            return []
        count = -(-kept // self.most)
        rows = self.most if self.one_product else -(-kept // count)
        first = kept - (count - 1) * rows if self.one_product else rows
        return [slice(*ends) for ends in pairwise([0, *range(first, kept, rows), kept])]

    def logits(self, hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Each chunk's place, hidden states and logits; these in one memory where `product` can."""
        chunks = self.chunks()
        if chunks:
            rows, columns = max(at.stop - at.start for at in chunks), len(weight)
            width = columns if self.on_cpu else -(-columns // VECTOR) * VECTOR
            buffer = room(rows, width, hidden)[:, :columns]
        for at in chunks:
            hidden_CD = hidden.index_select(0, self.kept_M[at])
            yield at, hidden_CD, product(hidden_CD, weight.T, buffer[: len(hidden_CD)])

    def columns(self, at: slice, columns: int, first: int = 0) -> Tensor:
        """Where the targets of these rows lie in some columns of this share; -1: in none of them.

        Counted from ``first``, the first of these columns.
        """
        column_C = self.labels_M[at] - self.first - first
        return column_C.masked_fill((column_C < 0) | (column_C >= columns), -1)

    def over_group(self, statistics_3C: Tensor) -> Tensor:
        """The statistics of the whole vocabulary out of those of every rank's share.

        One collective a chunk; every rank adds the parts in the same order.
        """
        if self.group is None:
            return statistics_3C
        parts = [torch.empty_like(statistics_3C) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, statistics_3C.contiguous(), group=self.group)
        lse_RC, target_RC, expected_RC = torch.stack(parts, 1)
        lse_C = lse_RC.logsumexp(0)
        share_RC = (lse_RC - lse_C).exp()
        return torch.stack([lse_C, target_RC.sum(0), (share_RC * expected_RC).sum(0)])

    def nll(self, at: slice, lse_C: Tensor, target_C: Tensor) -> Tensor:
        """-log p; not a number where a label is outside the vocabulary: wrong, never silent."""
        labels_C = self.labels_M[at]
        outside_C = (labels_C < 0) | (labels_C >= self.total)
        return (lse_C - target_C).masked_fill(outside_C, float("nan"))


def kept_labels(
    labels_T: Tensor, kept: Tensor | None, ignore_index: int, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """The kept positions and their labels; checked where that makes no device wait for it."""
    checks = labels_T.device.type == "cpu" or os.environ.get("HERMES_CORE_DEBUG") == "1"
    if kept is None:
        kept_M = (labels_T != ignore_index).nonzero().squeeze(1)
    else:
        kept_M = kept
        if checks:
            _check_kept(kept_M, labels_T, ignore_index)
    labels_M = labels_T.index_select(0, kept_M)
    outside_M = (labels_M < 0) | (labels_M >= vocab_size)
    if checks and (at := _first(outside_M)) is not None:
        raise ValueError(
            f"labels[{int(kept_M[at])}] is {int(labels_M[at])}, outside [0, {vocab_size})"
        )
    return kept_M, labels_M


def _check_kept(kept_M: Tensor, labels_T: Tensor, ignore_index: int) -> None:
    outside_M = (kept_M < 0) | (kept_M >= len(labels_T))
    if (at := _first(outside_M)) is not None:
        raise ValueError(f"kept[{at}] is {int(kept_M[at])}, outside [0, {len(labels_T)})")
    if (at := _first(kept_M.diff() <= 0)) is not None:
        raise ValueError(
            f"kept[{at + 1}] is {int(kept_M[at + 1])} after {int(kept_M[at])}; kept must rise: "
            "sort it and name each position once"
        )
    if (at := _first(labels_T.index_select(0, kept_M) == ignore_index)) is not None:
        raise ValueError(
            f"kept[{at}] is {int(kept_M[at])}, whose label is ignore_index {ignore_index}; "
            "leave it out of kept"
        )


def _first(wrong_M: Tensor) -> int | None:
    """Where the first one is; waits for the device."""
    return int(wrong_M.nonzero()[0]) if bool(wrong_M.any()) else None


def divides_late(like: Tensor, denominator: Tensor | None) -> bool:
    """Whether gradients are divided in backward: fp16 has no room for both a small probability
    over a large denominator and the large factor that comes then."""
    return like.dtype == torch.float16 and denominator is not None


class Weights:
    """Each kept token's factor on its loss, and on its gradient."""

    def __init__(
        self, plan: Plan, token_weights: Tensor | None, denominator: Tensor | None, like: Tensor
    ) -> None:
        wide = torch.promote_types(like.dtype, torch.float32)
        one = torch.ones((), dtype=wide, device=like.device)
        kept = len(plan.kept_M)
        self.plain_M = (
            one.expand(kept)
            if token_weights is None
            else token_weights.index_select(0, plan.kept_M).to(wide)
        )
        self.inverse = one
        if denominator is not None and kept > 0:
            self.inverse = denominator.to(wide).reciprocal()
            if token_weights is not None:  # none at all may be a count of 0, as no kept token is
                self.inverse = torch.where(self.plain_M.any(), self.inverse, one)
        self.late = divides_late(like, denominator)
        self.folded_M, self.rest = self.plain_M, one  # what gradients have, and have not
        if not self.late:
            self.folded_M = self.plain_M * self.inverse
        elif token_weights is None or kept == 0:
            self.rest = self.inverse
        else:
            largest = self.plain_M.abs().amax()
            largest = torch.where(largest == 0, one, largest)
            self.folded_M, self.rest = self.plain_M / largest, largest * self.inverse

    def factors(self, *shrinks: Tensor | None) -> Tensor:
        """What each gradient is still to be multiplied by, which may be shrunk; empty: nothing."""
        if not self.late:
            return self.rest.new_empty(0)
        return torch.stack([self.rest if x is None else self.rest * x for x in shrinks])

    def scale(self, at: slice, lse_C: Tensor, z_loss: float) -> Tensor:
        """The factor on each token's probabilities in the gradient of its logits."""
        return self.folded_M[at] * (1 + 2 * z_loss * lse_C)


def chunk_loss_(
    logits_CV: Tensor, plan: Plan, weights: Weights, at: slice, z_loss: float, softcap: float,
    rows: RowFunctions, wants_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[nll_sum, z_sum] of a chunk, and each token's log-sum-exp.

    Logits become their gradient if that is wanted.
    """
    column_C = plan.columns(at, logits_CV.shape[1])
    folded_C = weights.folded_M[at]
    if wants_gradient and plan.group is None:
        lse_C, target_C = rows.loss_and_gradient_(logits_CV, column_C, folded_C, z_loss, softcap)
    else:
        packed_3C = plan.over_group(rows.statistics(logits_CV, column_C, softcap))
        lse_C, target_C, _ = packed_3C
        if wants_gradient:
            scale_C = weights.scale(at, lse_C, z_loss)
            rows.gradient_(logits_CV, column_C, lse_C, scale_C, None, folded_C, softcap)
    plain_C = weights.plain_M[at]
    nll_C = plan.nll(at, lse_C, target_C)
    z_sum = z_loss * (plain_C * lse_C.square()).sum()
    return torch.stack([(plain_C * nll_C).sum(), z_sum]), lse_C


def totals(sums_2: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """The total, and [nll_sum, z_sum, tokens]."""
    total = sums_2.sum() * weights.inverse
    return total, torch.cat([sums_2, weights.plain_M.sum()[None]])


_SHARED = (
    "Tensor labels, Tensor? kept, Tensor? token_weights, Tensor? denominator, float z_loss, "
    "float softcap, int ignore_index, int chunk_bytes, str backend, int[] shard, str group"
)


@torch.library.custom_op(
    "hermes::linear_cross_entropy",
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, {_SHARED}, bool wants_hidden, bool wants_weight) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_op(
    hidden: Tensor, weight: Tensor, labels: Tensor, kept: Tensor | None,
    token_weights: Tensor | None, denominator: Tensor | None, z_loss: float, softcap: float,
    ignore_index: int, chunk_bytes: int, backend: str, shard: list[int], group: str,
    wants_hidden: bool, wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Total, sums, factors, and the total's gradients of hidden and weight (empty: not wanted)."""
    plan = Plan(labels, kept, ignore_index, chunk_bytes, shard, group, hidden)
    weights = Weights(plan, token_weights, denominator, hidden)
    if wants_weight and backend == "triton":
        plan.use_room(weight.shape[1], weight.dtype, late=weights.late)
    rows = rows_of(backend)
    sums_2 = torch.zeros(2, dtype=weights.plain_M.dtype, device=hidden.device)
    lse_M = torch.empty_like(weights.folded_M)

    def again_(logits_CV: Tensor, first: int) -> None:
        at = slice(len(logits_CV))
        rows.gradient_(
            logits_CV, plan.columns(at, logits_CV.shape[1], first), lse_M[at],
            weights.scale(at, lse_M[at], z_loss), None, weights.folded_M[at], softcap,
        )  # fmt: skip

    d_hidden = torch.zeros_like(hidden) if wants_hidden else hidden.new_empty(0)
    d_weight = None
    if wants_weight:
        again = again_ if plan.one_product else None
        d_weight = weight_gradient(weight, plan.chunks(), again, centred=weights.late)
    logits_CV: Tensor | None = None
    for at, hidden_CD, logits_CV in plan.logits(hidden, weight):
        chunk_sums_2, lse_M[at] = chunk_loss_(
            logits_CV, plan, weights, at, z_loss, softcap, rows, wants_hidden or wants_weight
        )
        sums_2 += chunk_sums_2
        if wants_hidden:
            d_hidden.index_copy_(0, plan.kept_M[at], product(logits_CV, weight))
        if d_weight is not None:
            d_weight.add(at, logits_CV, hidden_CD)
    del logits_CV  # frees their memory before the weight's gradient is rounded
    d_weight_VD, shrink = (weight.new_empty(0), None) if d_weight is None else d_weight.value()
    factors = weights.factors(None, shrink)
    return *totals(sums_2, weights), factors, d_hidden, d_weight_VD


@linear_op.register_fake
def _linear_fake(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    denominator, (wants_hidden, wants_weight) = rest[3], rest[-2:]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(3, dtype=wide),
        hidden.new_empty(2 * divides_late(hidden, denominator), dtype=wide),
        torch.empty_like(hidden) if wants_hidden else hidden.new_empty(0),
        # A product's rows lie one after another, however the weight's lie.
        weight.new_empty(weight.shape if wants_weight else 0),
    )


def keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Set up the backward pass of an operator.

    Its last arguments are the backend, the shard, the group, and a `wants` for each gradient. It
    gives the total, sums, factors that gradients still want (none, or one each), and gradients.
    """
    factors, *gradients = output[2:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    wants = inputs[-len(gradients) :]
    ctx.gradients = [x.detach() if w else None for x, w in zip(gradients, wants, strict=True)]
    ctx.factors = factors.detach().unbind()
    ctx.inputs, ctx.backend = len(inputs), inputs[-len(gradients) - 3]


def scale_gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """The gradients made in the forward pass, times that of the total."""
    if torch.is_grad_enabled():  # what is scaled here would count as constants
        raise RuntimeError(
            "the loss has no gradient of its gradient: call backward without create_graph, or "
            'take backend="reference"'
        )
    if ctx.gradients is None:
        raise RuntimeError("the loss makes one backward pass only; run forward again")
    gradients: list[Tensor | None] = ctx.gradients
    ctx.gradients = None
    factors = [grad * x for x in ctx.factors] if ctx.factors else [grad] * len(gradients)
    scaled = [
        None if x is None else _scaled(x, factor, ctx.backend)
        for x, factor in zip(gradients, factors, strict=True)
    ]
    return *scaled, *[None] * (ctx.inputs - len(scaled))


def _scaled(gradient: Tensor, factor: Tensor, backend: str) -> Tensor:
    """Their product, reckoned in the factor's fp32: a scale of fp16 is often beyond fp16."""
    if type(gradient) is not Tensor:  # traced: the compiler decides what is done in place
        return (gradient * factor[None]).to(gradient.dtype)
    if factor.device.type == "cpu" and float(factor) == 1:
        return gradient
    if backend == "triton" and gradient.is_cuda and gradient.is_contiguous():
        from hermes_kernels import cross_entropy

        cross_entropy.scale_(gradient, factor)  # costs nothing where the factor is 1
        return gradient
    if not gradient.is_cuda:  # nobody else holds it; a CPU takes a scalar's value as it is
        return gradient.mul_(factor)
    return torch.mul(gradient, factor[None], out=gradient)  # a GPU rounds a scalar, not a vector


linear_op.register_autograd(scale_gradients, setup_context=keep_gradients)
