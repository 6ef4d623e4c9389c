"""What a training step hands out."""

from __future__ import annotations

import json
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepReport:
    """The figures of one step, over all ranks."""

    step: int
    loss: float  # mean over the step's kept tokens; 0 where there is none
    grad_norm: float  # before clipping
    learning_rate: float
    kept: int  # kept tokens
    tokens: int  # tokens of samples; padding left out
    seconds: float
    stop: bool = False  # was some rank asked to stop?

    def line(self) -> str:
        """One line of metrics.jsonl."""
        return json.dumps(
            {
                "step": self.step,
                "loss": self.loss,
                "grad_norm": self.grad_norm,
                "lr": self.learning_rate,
                "kept_tokens": self.kept,
                "tokens": self.tokens,
                "seconds": round(self.seconds, 6),
            }
        )


class NonFiniteStep(Exception):
    """The gradient of a step is not finite: the step was not applied and nothing was saved."""

    def __init__(
        self, step: int, loss: float, grad_norm: float, rows: list[int], samples: list[list[int]]
    ) -> None:
        shown = ", ".join(
            f"row {row} (samples {', '.join(map(str, ids[:8]))}{', ...' if len(ids) > 8 else ''})"
            for row, ids in zip(rows, samples, strict=False)
        )
        more = f" and {len(rows) - len(samples)} more rows" if len(rows) > len(samples) else ""
        super().__init__(
            f"step {step}: loss {loss}, gradient norm {grad_norm}; the step is not applied and "
            f"nothing is saved. Its rows: {shown}{more}"
        )
        self.step, self.rows, self.samples = step, rows, samples
