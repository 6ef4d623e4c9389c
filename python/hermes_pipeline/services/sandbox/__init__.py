"""Run a model's code under hard limits, cut off from the machine.

Nothing is ever run without isolation: where a box cannot start, `UserError` says why. The one box
is bubblewrap's, on Linux and x86-64. What runs in it can read `/usr`, and the folder of this Python
where that lies elsewhere. A defect of the kernel can let it out, and memory that the kernel takes
for it, as for locks and maps, is bounded but not counted.
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
