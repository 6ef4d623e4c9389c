"""A recipe as torchtitan's configuration, and the run of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.config import TrainingConfig
from torchtitan.config.configs import CommConfig, DebugConfig
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.tools import utils as titan_utils

from hermes_pipeline.errors import UserError
from hermes_pipeline.training.recipes import Checkpoint, Recipe, Training
from hermes_pipeline.training.report import StepReport
from hermes_pipeline.training.shape import Shape
from hermes_pipeline.training.titan.checkpoints import Checkpoints
from hermes_pipeline.training.titan.data import NoTokenizer, PackedRows
from hermes_pipeline.training.titan.loss import KeptTokenLoss
from hermes_pipeline.training.titan.model import model_spec
from hermes_pipeline.training.titan.optim import optimizers, schedule
from hermes_pipeline.training.titan.parallel import parallelism, portable
from hermes_pipeline.training.titan.trainer import SegmentTrainer

RECOMPUTE = {"none": None, "selective": SelectiveAC.Config, "full": FullAC.Config}


def trainer_config(
    recipe: Recipe,
    shape: Shape,
    *,
    local_rows: int,
    store: Path,
    model: Path | None,
    out: Path,
    step: int = 0,
) -> SegmentTrainer.Config:
    """torchtitan's configuration of a run.

    Args:
        local_rows: of one forward pass on one data-parallel rank.
        model: folder of the start weights, for a run folder without checkpoints.
        step: of the checkpoint to go on from; 0 for none.
    """
    recompute = RECOMPUTE[recipe.training.recompute]
    return SegmentTrainer.Config(
        model_spec=portable(model_spec(shape)),
        hf_assets_path="",
        dump_folder=str(out),
        loss=KeptTokenLoss.Config(vocab_size=shape.vocab_size),
        tokenizer=NoTokenizer.Config(),
        dataloader=PackedRows.Config(
            store=str(store),
            rows=recipe.data.rows,
            packing=recipe.data.packing,
            too_long=recipe.data.too_long,
            seed=recipe.data.seed,
        ),
        optimizer=optimizers(recipe.optimizer),
        lr_scheduler=schedule(
            recipe.optimizer, recipe.training.schedule_steps or recipe.training.steps
        ),
        training=_training(recipe, local_rows),
        parallelism=parallelism(recipe.parallel),
        checkpoint=_checkpoint(recipe.checkpoint, model, step),
        activation_checkpoint=recompute() if recompute else None,
        comm=CommConfig(
            init_timeout_seconds=recipe.parallel.timeout_s,
            trace_buf_size=0 if titan_utils.device_type == "cpu" else 20_000,
        ),
        metrics=MetricsProcessor.Config(disable_color_printing=True),
        debug=_debug(recipe.training),
    )


def _training(recipe: Recipe, local_rows: int) -> TrainingConfig:
    return TrainingConfig(
        local_batch_size=local_rows,
        global_batch_size=recipe.data.rows,
        seq_len=recipe.data.row_length,
        max_norm=recipe.optimizer.max_grad_norm,
        steps=recipe.training.steps,
        mixed_precision_param=recipe.training.precision,
        # The length of each segment is known to the host alone, and differs from batch to batch.
        disable_cuda_graphs=True,
    )


def _debug(training: Training) -> DebugConfig:
    return DebugConfig(
        seed=training.seed,
        deterministic=training.deterministic,
        enable_structured_logging=False,
    )


def _checkpoint(checkpoint: Checkpoint, model: Path | None, step: int) -> Checkpoints.Config:
    return Checkpoints.Config(
        enable=True,
        interval=checkpoint.every,
        keep_latest_k=checkpoint.keep,
        async_mode="async" if checkpoint.background else "disabled",
        load_step=step or -1,
        initial_load_path=None if model is None else str(model.resolve()),
        initial_load_in_hf=model is not None,
        last_save_model_only=False,
    )


def run(
    config: SegmentTrainer.Config,
    *,
    facts: Mapping[str, Any],
    begin: Callable[[int], None],
    observe: Callable[[StepReport], None],
    asked_to_stop: Callable[[], bool],
) -> bool:
    """Train; is the run complete?

    Args:
        facts: what decides the steps, by name; the same on every rank.
    """
    trainer = config.build()
    try:
        with closing(trainer):
            _compare_ranks(facts)
            complete = trainer.train(begin=begin, observe=observe, asked_to_stop=asked_to_stop)
        # The first rank may have had a checkpoint to delete; launchers end all soon after one.
        dist.barrier()
        return bool(complete)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _compare_ranks(facts: Mapping[str, Any]) -> None:
    """Refuse on every rank what some rank would do by itself: its numbers would join the others'.

    Raises:
        UserError: they differ; the message names where.
    """
    every: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, dict(facts))
    for rank, theirs in enumerate(every):
        differing = [key for key in facts if theirs[key] != every[0][key]]
        if differing:
            listed = "; ".join(
                f"{key} is {theirs[key]!r}, not {every[0][key]!r}" for key in differing
            )
            raise UserError(
                f"rank {rank} would do other work than rank 0: {listed}. Give every rank the same "
                f"command, files and run folder"
            )
