"""[optimizer] of a recipe in torchtitan's words."""

from __future__ import annotations

from typing import Any

from torchtitan.components.optimizer import (
    LRSchedulersContainer,
    OptimizersContainer,
    ParamGroupConfig,
)
from torchtitan.tools import utils as titan_utils

from hermes_pipeline.training.recipes import Optimizer

NORMS = r"norm\.weight$"


def optimizers(optimizer: Optimizer) -> OptimizersContainer.Config:
    """AdamW; norms do not decay."""

    def group(pattern: str, weight_decay: float) -> ParamGroupConfig:
        options: dict[str, Any] = {
            "lr": optimizer.learning_rate,
            "betas": (optimizer.beta1, optimizer.beta2),
            "eps": optimizer.eps,
            "weight_decay": weight_decay,
        }
        return ParamGroupConfig(pattern=pattern, optimizer_name="AdamW", optimizer_kwargs=options)

    return OptimizersContainer.Config(
        param_groups=[group(NORMS, 0.0), group(".*", optimizer.weight_decay)],
        implementation="foreach" if titan_utils.device_type == "cpu" else "fused",
    )


def schedule(optimizer: Optimizer, steps: int) -> LRSchedulersContainer.Config:
    """Linear warm-up, then decay; the step after ``steps`` would have the final fraction."""
    return LRSchedulersContainer.Config(
        warmup_steps=optimizer.warmup_steps,
        total_steps=steps,
        decay_type=optimizer.decay,
        min_lr_factor=optimizer.final_fraction,
    )
