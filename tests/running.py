"""What tests of running programs share: how one ended, who still runs, what it says and leaves."""

from __future__ import annotations

import json
import os
import socket
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


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


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as reply:
        return json.load(reply)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
