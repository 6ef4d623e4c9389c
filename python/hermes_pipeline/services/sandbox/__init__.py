"""Run a model's code under hard limits, cut off from the machine.

Nothing is ever run without isolation: where a box cannot start, `UserError` says why.
"""

from __future__ import annotations

from hermes_pipeline.services.sandbox.bubblewrap import Bubblewrap
from hermes_pipeline.services.sandbox.jobs import (
    Box,
    BoxDied,
    Case,
    Ended,
    Job,
    Limits,
    Result,
)
from hermes_pipeline.services.sandbox.pool import Sandbox, SandboxBroken

__all__ = [
    "Box",
    "BoxDied",
    "Bubblewrap",
    "Case",
    "Ended",
    "Job",
    "Limits",
    "Result",
    "Sandbox",
    "SandboxBroken",
]
