"""torchtitan's Trainer with a loop of our own around its parts.

Shapes: B rows, L row length, D model size.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan.components.optimizer.utils import init_optim_state
from torchtitan.distributed import utils as titan_distributed
from torchtitan.distributed.spmd_types import annotate_input_spmd_types
from torchtitan.trainer import Trainer

from hermes_core.segments import segments
from hermes_pipeline.errors import UserError
from hermes_pipeline.training.report import NonFiniteStep, StepReport
from hermes_pipeline.training.titan.data import MicroBatch

logger = logging.getLogger(__name__)


class SegmentTrainer(Trainer):
    """Trains on packed rows; hands each step's figures to ``observe``.

    Against the parent: segments come from the packer, so nothing is looked up on the device; the
    loss is told which positions are kept; a step whose gradient is not finite is never applied,
    nor is one without kept tokens, which divides by nothing; all ranks agree at which step to stop.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        pass

    def train(
        self,
        *,
        begin: Callable[[int], None],
        observe: Callable[[StepReport], None],
        asked_to_stop: Callable[[], bool],
    ) -> bool:
        """Train to the last step, or to the end of the step in which some rank is asked to stop.

        Args:
            begin: told the step that training goes on from, 0 for a new run.
            observe: called after every step, on every rank, before it may be saved.

        Returns:
            Is the run complete?

        Raises:
            NonFiniteStep: a gradient was not finite; nothing of its step was applied or saved.
            UserError: rows cannot be read, on some rank.
        """
        self.checkpointer.load(step=self.config.checkpoint.load_step)
        self._use_scheduled_rate()
        begin(self.step)
        batches = iter(self.dataloader)
        while self.step < self.config.training.steps:
            self.step += 1
            self.gc_handler.run(self.step)
            try:
                report = self.train_step(batches, stop=asked_to_stop())
            except (NonFiniteStep, UserError):
                self._finish_saving()
                raise
            observe(report)
            last = report.stop or self.step == self.config.training.steps
            self.checkpointer.save(self.step, last_step=last)
            if last:
                break
        self.checkpointer.maybe_wait_for_saving()
        return bool(self.step >= self.config.training.steps)

    def _finish_saving(self) -> None:
        """Wait for a save in the background, which would end with the process.

        Its failure is logged alone, so that it hides no other error.
        """
        try:
            self.checkpointer.maybe_wait_for_saving()
        except Exception:
            logger.exception("The save in the background failed.")

    def train_step(self, batches: Iterator[MicroBatch], *, stop: bool = False) -> StepReport:
        """One step of the optimizer, over all ranks and accumulation steps."""
        start, position = time.perf_counter(), self.dataloader.order.position
        self.optimizers.zero_grad(set_to_none=True)
        rate = self.lr_schedulers.schedulers[0].get_last_lr()[0]
        group, refused = self._next_group(batches)
        kept, tokens, stopping, failed = self._over_all_ranks(
            sum(len(batch.kept) for batch in group),
            sum(batch.tokens for batch in group),
            int(stop),
            int(bool(refused)),
        )
        if failed:
            raise self._refused(refused)
        losses = torch.stack([self._forward_backward(batch, kept) for batch in group])
        grad_norm = titan_distributed.clip_grad_norm_(
            [p for model in self.model_parts for p in model.parameters()],
            self.config.training.max_norm,
            foreach=True,
        ).item()
        loss = self._loss_over_ranks(losses.sum())
        if not (math.isfinite(grad_norm) and math.isfinite(loss)):
            self.dataloader.order.position = position  # from which its rows can be looked up
            raise self._non_finite(group, losses, loss, grad_norm)
        self.checkpointer.maybe_wait_for_staging()
        self._step_optimizers(kept)
        self.lr_schedulers.step()
        self.ntokens_seen += tokens
        seconds = time.perf_counter() - start
        return StepReport(
            self.step, loss, grad_norm, rate, kept, tokens, seconds, stop=stopping > 0
        )

    def _step_optimizers(self, kept: int) -> None:
        """Learn from the step's gradient; where nothing was kept, leave weights and moments alone.

        A step of the optimizer would let the weights decay.
        """
        if kept:
            self.optimizers.step()
            return
        self.optimizers.zero_grad(set_to_none=True)
        for optimizer in self.optimizers:
            init_optim_state(optimizer)  # whether it is saved now or not: a later step counts it

    def _next_group(self, batches: Iterator[MicroBatch]) -> tuple[list[MicroBatch], str]:
        """This rank's micro-batches of a step, or why there are none."""
        try:
            return [next(batches) for _ in range(self.gradient_accumulation_steps)], ""
        except UserError as error:
            return [], str(error)

    def _refused(self, reason: str) -> UserError:
        """The error on all ranks alike, since the first one speaks for all."""
        every = [""] * dist.get_world_size()
        dist.all_gather_object(every, reason)
        return UserError(next(filter(None, every)))

    def _forward_backward(self, batch: MicroBatch, kept_of_step: int) -> Tensor:
        """Loss of one micro-batch over the step's kept tokens, its gradient added up."""
        inputs, positions, labels, kept = (
            tensor.to(self.device, non_blocking=True)
            for tensor in (batch.input_ids, batch.positions, batch.labels, batch.kept)
        )
        extra: dict[str, Any] = {
            "positions": positions,
            "attention_masks": segments(batch.cu_seqlens, device=self.device),
        }
        if self.config.parallelism.spmd_backend == "spmd_types":
            inputs, labels, extra = annotate_input_spmd_types(
                self.parallel_dims, inputs, labels, extra
            )
        divisor = torch.tensor(kept_of_step, device=self.device)
        with self.train_context():
            hidden_BLD = self.model_parts[0](inputs, **extra)
            loss, _ = self.loss_fn(hidden_BLD, labels, divisor, kept=kept)
            loss.backward()
        return loss.detach()

    def _over_all_ranks(
        self, kept: int, tokens: int, stop: int, failed: int
    ) -> tuple[int, int, int, int]:
        """Sums over data-parallel ranks; of ``stop`` and ``failed`` over all: it may be any."""
        tensor_mesh = self.parallel_dims.get_optional_mesh("tp")
        first = tensor_mesh is None or tensor_mesh.get_local_rank() == 0
        numbers = torch.tensor([kept * first, tokens * first, stop, failed], device=self.device)
        if dist.get_world_size() > 1:
            dist.all_reduce(numbers)
        kept, tokens, stop, failed = numbers.tolist()
        return kept, tokens, stop, failed

    def _loss_over_ranks(self, loss: Tensor) -> float:
        if not self.parallel_dims.dp_cp_enabled:
            return float(loss.item())
        return float(titan_distributed.dist_sum(loss, self.parallel_dims.get_mesh("loss")))

    def _use_scheduled_rate(self) -> None:
        """The rate of the next step by this run's schedule, which a resumed run may lengthen."""
        for scheduler in self.lr_schedulers:
            rates = scheduler.get_last_lr()
            for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def _non_finite(
        self, group: list[MicroBatch], losses: Tensor, loss: float, grad_norm: float
    ) -> NonFiniteStep:
        """The error of this step: the rows whose loss is not finite, or else all of its rows."""
        bad = [
            row
            for batch, value in zip(group, losses.tolist(), strict=True)
            if not math.isfinite(value)
            for row in batch.rows
        ]
        every: list[list[int]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(every, bad)
        found = sorted({row for part in every for row in part})
        if not found:
            last = self.step * self.config.training.global_batch_size
            found = list(range(last - self.config.training.global_batch_size, last))
        samples = self.dataloader.order.sample_ids(found[:4])
        return NonFiniteStep(self.step, loss, grad_norm, found, samples)
