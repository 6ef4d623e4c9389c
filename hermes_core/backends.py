"""Who computes what: the backends of attention and of the loss, and why one cannot run here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch

from hermes_kernels.launch import (
    GLUON_SINCE,
    TABLE,
    TRITON_VERSION,
    Kernel,
    architecture,
    padded_size,
)

Operation = Literal["attention", "loss"]

BACKENDS: dict[str, tuple[str, ...]] = {
    "attention": ("triton", "gluon", "flash", "torch", "cpu", "reference"),
    "loss": ("triton", "torch", "reference"),
}
OWNERS = {
    "triton": "Triton", "gluon": "Gluon", "flash": "flash-attn", "torch": "torch's varlen_attn"
}  # fmt: skip
GLUON: dict[int, Kernel] = {90: "forward_sm90", 100: "pairs"}  # its forward, by architecture
# Asked for here, once: torch.compile before torch 2.12 cannot trace the question.
HAS_TRITON = find_spec("triton") is not None
HALF = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.float64, *HALF)


@dataclass(frozen=True, slots=True)
class Choice:
    """What `auto` takes on a device, best first: the first that can run; and why in this order."""

    backends: tuple[str, ...]
    source: str


# By device ("sm_80" stands for every GPU that is not named), operation and head size (0: any).
AUTO: dict[tuple[str, Operation, int], Choice] = {
    ("sm_100", "attention", 0): Choice(
        ("flash", "triton", "torch", "reference"),
        "FlashAttention-4 is measured on B200 (arXiv 2603.05451), our kernels have not run there; "
        "gluon, predicted to be faster than triton, waits for its first run",
    ),
    ("sm_90", "attention", 0): Choice(
        ("gluon", "triton", "flash", "torch", "reference"),
        "measured on an H100, heads of 128, triton 3.6 (docs/numbers.md): 1.5 to 2.5 times as fast "
        "as FlashAttention-2's kernels, and deterministic",
    ),
    ("sm_80", "attention", 0): Choice(
        ("triton", "torch", "flash", "reference"),
        "deterministic, no host synchronisation; not run on a GPU by us",
    ),
    ("cpu", "attention", 0): Choice(("cpu", "reference"), "by `python -m bench attention`"),
    ("sm_80", "loss", 0): Choice(
        ("triton", "torch", "reference"),
        "one pass over a chunk of logits; measured on an H100 (docs/numbers.md)",
    ),
    ("cpu", "loss", 0): Choice(("torch", "reference"), "by `python -m bench loss`"),
}


class BackendError(RuntimeError):
    """The backend asked for cannot run here; the message says why and what can."""


def obstacle(
    operation: Operation, backend: str, device: torch.device, dtype: torch.dtype, size: int = 128
) -> str:
    """Why ``backend`` cannot run ``operation`` on this device, dtype, head size; "" if it can."""
    if dtype not in FLOATS:
        return f"dtype {dtype} is not a float32, float64, bfloat16 or float16"
    if operation == "loss":
        return _obstacle_of_loss(device, dtype) if backend == "triton" else ""
    if backend == "reference":
        return ""
    if backend == "cpu":
        return "" if device.type == "cpu" else f"the tensors are on {device}"
    owner = OWNERS[backend]
    if misplaced := _needs_cuda(owner, device):
        return misplaced
    if dtype not in HALF:
        return f"{owner} takes bfloat16 or float16, not {dtype}"
    if not padded_size(size):
        return f"{owner} takes head sizes to 256, not {size}"
    if backend in ("triton", "gluon"):
        return _obstacle_of_kernels(backend, device, padded_size(size))
    from hermes_core import attention_peers

    if backend == "flash":
        return "" if attention_peers.FLASH else "no flash-attn is installed"
    return "" if attention_peers.VARLEN else "torch's varlen_attn takes a scale from torch 2.11 on"


def _obstacle_of_kernels(backend: str, device: torch.device, size: int) -> str:
    """Why our kernels cannot run on this GPU, where they take the dtype; "" if they can."""
    if not HAS_TRITON:
        return "triton is not installed"
    target = architecture(device)
    kernel = "forward" if backend == "triton" else GLUON.get(target)
    if kernel is None:
        return "Gluon's kernels are made for sm_90 and sm_100, which this GPU is not"
    if backend == "gluon" and TRITON_VERSION < GLUON_SINCE:
        return "Gluon's kernels need triton 3.6 or newer"
    if backend == "gluon" and os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton interprets in this process, which Gluon's kernels do not know"
    if (target, kernel, size) in TABLE:
        return ""
    return f"no tiles for head size {size} on this GPU"


def _obstacle_of_loss(device: torch.device, dtype: torch.dtype) -> str:
    """Why Triton's kernels of the loss cannot run; "" if they can."""
    if not HAS_TRITON:
        return "triton is not installed"
    if misplaced := _needs_cuda("Triton", device):
        return misplaced
    return "the kernels sum in float32" if dtype == torch.float64 else ""


def _needs_cuda(owner: str, device: torch.device) -> str:
    """Why these tensors are in the wrong place for ``owner``; "" if they are not."""
    interpreted = owner == "Triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cuda" or interpreted:
        return ""
    return f"{owner} needs CUDA tensors, these are on {device}"


def choose(
    operation: Operation, backend: str, device: torch.device, dtype: torch.dtype, *, size: int = 128
) -> str:
    """The backend to run: ``backend`` itself, or what `AUTO` says where it is "auto".

    Raises:
        ValueError: no such backend.
        BackendError: it cannot run on this device, dtype and head size.
    """
    known = BACKENDS[operation]
    if backend != "auto" and backend not in known:
        raise ValueError(
            f"backend {backend!r} is not one of {operation}'s: auto, {', '.join(known)}"
        )
    order = choice(operation, device, size).backends
    if torch.are_deterministic_algorithms_enabled():
        order = tuple(name for name in order if name not in ("flash", "torch")) + order
    wanted = order if backend == "auto" else (backend,)
    for name in wanted:
        if not obstacle(operation, name, device, dtype, size):
            return name
    reason = obstacle(operation, wanted[-1], device, dtype, size)
    if backend == "auto":
        raise BackendError(f"no backend can run {operation} here: {reason}")
    able = [name for name in order if not obstacle(operation, name, device, dtype, size)]
    way_out = f"; use backend={able[0]!r}" if able else ""
    raise BackendError(f"backend {backend!r} cannot run here: {reason}{way_out}")


def choice(operation: Operation, device: torch.device, size: int) -> Choice:
    """The line of `AUTO` for a device and a head size."""
    name = f"sm_{architecture(device)}" if device.type == "cuda" else "cpu"
    keys = [(name, padded_size(size)), (name, 0), ("sm_80", 0)]
    return next(AUTO[at, operation, h] for at, h in keys if (at, operation, h) in AUTO)


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
        why = choice(operation, device, 128).source  # type: ignore[arg-type]
        lines.append(f"{operation:9} auto      {first}: {why}")
    return lines
