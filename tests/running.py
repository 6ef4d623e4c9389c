"""What tests of running programs share: how a command ended, who still runs, what it left."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Ended(NamedTuple):
    """A command: its exit code, and what it wrote."""

    code: object
    out: str
    err: str


Hermes4 = Callable[..., Ended]


def processes_of(words: str) -> dict[int, str]:
    """Command lines, by id, of other processes with ``words`` in command line or environment."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line, environment = ((path / name).read_bytes() for name in ("cmdline", "environ"))
        except OSError:
            continue
        if words.encode() in line + environment and int(path.name) != os.getpid():
            found[int(path.name)] = line.replace(b"\0", b" ").decode(errors="replace")
    return found


def comes_true(test: Callable[[], bool], timeout_s: float) -> bool:
    """Is it so, or will it be in that time?"""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if test():
            return True
        time.sleep(0.02)
    return test()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
