"""Run a model's code under hard limits, cut off from the machine.

Nothing is ever run without isolation: where a box cannot start, `UserError` says why. There are
three kinds, all for x86-64, chosen by `open_sandbox`:

- bubblewrap's, on Linux: a warm process that forks each job into namespaces of its own, in
  milliseconds. What runs in it can read `/usr`, and the folder of this Python where that lies
  elsewhere.
- docker's or podman's: a fresh container for each job, in tenths of a second. What runs in it can
  read its image. A podman without root cannot bound how many files there are: a program that makes
  too many is ended; and memory and processes have our own watch and limits alone where the engine
  has no control groups, and the watch does not see what is mapped of its `/dev/zero`.
- another machine's, which runs `hermes4 sandbox`, over any of these.

What processes share lies in files, as multiprocessing's does: `mmap.mmap(-1, n)`, whose memory
nothing counts, is refused where its flags are not `MAP_PRIVATE | MAP_ANONYMOUS`.

A defect of the kernel can let a program out of the first two, and memory that the kernel takes for
it, as for locks and maps, is bounded but not counted.
"""

from __future__ import annotations

from hermes_pipeline.services.sandbox.boxes import choose_box, open_sandbox
from hermes_pipeline.services.sandbox.bubblewrap import Bubblewrap
from hermes_pipeline.services.sandbox.container import Container
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
    "Container",
    "Ended",
    "Job",
    "Limits",
    "Result",
    "Sandbox",
    "SandboxBroken",
    "choose_box",
    "open_sandbox",
]
