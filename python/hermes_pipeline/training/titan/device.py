"""A CPU as torchtitan's device, on a machine without an accelerator.

torchtitan 0.3.0 chooses its device once, in `torchtitan.tools.utils`, and answers "cuda" where
there is none; every other module copies the two globals. So they are set here, before any other
torchtitan module is imported. With an accelerator nothing happens.
"""

from __future__ import annotations

import os
import resource
import sys
import types
from typing import Any

import torch
import torchtitan.tools.utils as titan_utils

TITAN_MODULES_WITH_A_COPY = (
    "torchtitan.distributed.parallel_dims",
    "torchtitan.components.metrics",
)


class CpuDevice(types.ModuleType):
    """The part of ``torch.cuda``'s interface that torchtitan calls, for the CPU."""

    def __init__(self) -> None:
        super().__init__("cpu_device")

    set_device = staticmethod(torch.cpu.set_device)
    synchronize = staticmethod(torch.cpu.synchronize)

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def empty_cache() -> None: ...

    @staticmethod
    def reset_peak_memory_stats(device: Any = None) -> None: ...

    @staticmethod
    def get_device_name(device: Any = None) -> str:
        return "cpu"

    @staticmethod
    def get_device_properties(device: Any = None) -> types.SimpleNamespace:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return types.SimpleNamespace(total_memory=memory)

    @staticmethod
    def memory_stats(device: Any = None) -> dict[str, int]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"active_bytes.all.peak": peak, "reserved_bytes.all.peak": peak}


def choose() -> None:
    """Make torchtitan use the CPU where there is no accelerator."""
    if torch.accelerator.is_available() or titan_utils.device_type == "cpu":
        return
    late = [name for name in TITAN_MODULES_WITH_A_COPY if name in sys.modules]
    assert not late, f"{late[0]} was imported before hermes_pipeline.training.titan"
    titan_utils.device_type, titan_utils.device_module = "cpu", CpuDevice()


choose()
