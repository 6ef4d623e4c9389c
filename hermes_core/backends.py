"""Who computes what: the backends of attention and of the loss, and why one cannot run here.

Attention's Triton kernels are not here yet; a CUDA device goes through PyTorch.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

import torch

Operation = Literal["attention", "loss"]

# What each operation can be computed with, best first; `auto` takes the first that runs.
BACKENDS: dict[str, tuple[str, ...]] = {
    "attention": ("torch", "cpu", "reference"),
    "loss": ("triton", "torch", "reference"),
}
HALF = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.float64, *HALF)


class BackendError(RuntimeError):
    """The backend asked for cannot run here; the message says why and what can."""


def obstacle(operation: Operation, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why ``backend`` cannot run ``operation`` on this device and dtype; "" where it can."""
    if dtype not in FLOATS:
        return f"dtype {dtype} is not a float32, float64, bfloat16 or float16"
    if backend == "triton":
        return _obstacle_of_triton(device, dtype)
    if operation == "loss" or backend == "reference":
        return ""
    if backend == "cpu":
        return "" if device.type == "cpu" else f"the tensors are on {device}"
    if device.type != "cuda":
        return f"torch's varlen_attn needs CUDA tensors, these are on {device}"
    if dtype not in HALF:
        return f"torch's varlen_attn takes bfloat16 or float16, not {dtype}"
    return ""


def _obstacle_of_triton(device: torch.device, dtype: torch.dtype) -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton needs CUDA tensors, these are on {device}"
    return "the kernels sum in float32" if dtype == torch.float64 else ""


def choose(operation: Operation, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend to run: ``backend`` itself, or the best one that can where it is "auto".

    Raises:
        ValueError: no such backend.
        BackendError: it cannot run on this device and dtype.
    """
    known = BACKENDS[operation]
    reasons = {name: obstacle(operation, name, device, dtype) for name in known}
    able = [name for name in known if not reasons[name]]
    if device.type != "cuda":  # Triton's interpreter is slow: it runs where it is asked for
        able = [name for name in able if name != "triton"]
    if backend == "auto":
        if able:
            return able[0]
        raise BackendError(f"no backend can run {operation} here: {reasons[known[-1]]}")
    if backend not in known:
        raise ValueError(
            f"backend {backend!r} is not one of {operation}'s: auto, {', '.join(known)}"
        )
    if reasons[backend]:
        way_out = f"; use backend={able[0]!r}" if able else ""
        raise BackendError(f"backend {backend!r} cannot run here: {reasons[backend]}{way_out}")
    return backend


def explain() -> list[str]:
    """One line for each operation and backend: can it run on this machine, and if not, why."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lines = []
    for operation, names in BACKENDS.items():
        first = choose(operation, "auto", device, dtype)  # type: ignore[arg-type]
        for name in names:
            reason = obstacle(operation, name, device, dtype)  # type: ignore[arg-type]
            state = f"no: {reason}" if reason else "yes" + (" (auto)" if name == first else "")
            lines.append(f"{operation:9} {name:9} {state}")
    return lines
