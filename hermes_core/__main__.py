"""`python -m hermes_core`: versions, instruction set, device, and what can compute what here."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from hermes_core import _C, __version__


def main() -> None:
    """Print what a report of a fault should start with."""
    print(f"hermes4-core {__version__}")
    print(f"python       {platform.python_version()} on {platform.platform()}")
    for name in ("numpy", "torch", "triton"):
        print(f"{name:12} {_version_of(name)}")
    wanted = os.environ.get("HERMES_CORE_ISA")
    print(f"isa          {_C.active_isa()}" + (f" (HERMES_CORE_ISA={wanted})" if wanted else ""))
    try:
        import torch
    except ImportError as error:
        print(f"torch is not installed ({error}): packing, rows and the store alone work")
        return
    from hermes_core.backends import explain

    cuda = torch.cuda.is_available()
    print(f"device       {torch.cuda.get_device_name() if cuda else 'cpu, no CUDA device'}")
    print("\n".join(explain()))


def _version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
