"""A B200, or H100, in Triton's place of one: kernels are bound and compiled for it, and not
launched.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

Launch = tuple[tuple[int, ...], Any]  # the grid, and what was compiled


class Launcher:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        return lambda *given, **options: self.launches.append(
            (grid, self.kernel.warmup(*given, grid=grid, **options).metadata)
        )


def compile_launches(module: ModuleType, *kernels: str, target: int = 100) -> list[Launch]:
    """From now on, what ``module`` launches of these; all but the driver is Triton's own."""
    properties = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 232_448})
    driver = SimpleNamespace(
        utils=properties, get_current_device=lambda: 0, get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", target, 32),
    )  # fmt: skip
    triton.runtime.driver.set_active(driver)
    launches: list[Launch] = []
    for name in kernels:
        setattr(module, name, Launcher(getattr(module, name), launches))
    return launches
