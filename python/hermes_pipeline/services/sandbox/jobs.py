"""What goes into a box and what comes out of it, whatever the box is made of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import PurePosixPath
from typing import Any, Literal, Protocol

_NO_NAME = re.compile("[\0\ud800-\udfff]")

Ended = Literal["ok", "error", "timeout", "memory", "output", "killed", "box_error"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run may use; all its processes together, where nothing else is said.

    A limit of time or memory is met within about 0.02 s of its being passed. Processor time of
    children that nobody waits for, and that live shorter than that, is bounded by ``wall_s`` alone.
    """

    wall_s: float = 10.0  # from the start of the run, not of the wait for a free box
    cpu_s: float = 5.0
    memory_bytes: int = 512 << 20
    processes: int = 64  # and threads
    output_bytes: int = 1 << 20  # of each stream
    file_bytes: int = 64 << 20  # of all files, which live in memory of their own
    files: int = 4096

    def __post_init__(self) -> None:
        for each in fields(self):
            if getattr(self, each.name) <= 0:
                raise ValueError(f"{each.name} is {getattr(self, each.name)}; it must be above 0")


@dataclass(frozen=True, slots=True)
class Job:
    """One run: a Python program, one call of a function in it, or a command.

    Raises:
        ValueError: a file above the working folder, or a name or word that none can be.
    """

    limits: Limits
    stdin: bytes = b""
    source: str = ""
    function: str = ""  # of `source`; "Class.method" is called on a fresh Class()
    arguments: Sequence[Any] = ()  # JSON
    command: Sequence[str] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)  # by path under the working folder

    def __post_init__(self) -> None:
        for path in map(PurePosixPath, self.files):
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"file {str(path)!r} is not below the working folder")
        for word in (*self.files, *self.command):
            if _NO_NAME.search(word):
                raise ValueError(f"{word!r:.80} holds NUL or half a surrogate pair: no name can")


@dataclass(frozen=True, slots=True)
class Case:
    """One call of a function."""

    arguments: Sequence[Any] = ()  # JSON: a tuple arrives as a list
    limits: Limits | None = None  # the sandbox's own if None


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended, and what it said.

    ``ended`` is "ok" for exit code 0 and, of a call, a value; "error" for any other end of its
    own; "timeout", "memory" and "output" for a limit; "killed" for a signal; "box_error" when
    the box failed, which says nothing about the program.
    """

    ended: Ended
    exit_code: int | None  # minus the signal's number; None where a limit or the box ended it
    stdout: str
    stderr: str
    cpu_s: float
    wall_s: float
    box: str  # name and version, with those of the Python inside
    reason: str = ""  # in words, unless "ok"
    value: Any = None  # what a called function returned, through JSON


class BoxDied(Exception):
    """The box ended or failed under a job; the message says how."""


class Box(Protocol):
    """One place that runs one job at a time.

    It keeps what a job does inside: nothing outlives the run, nothing is seen by the next one.
    """

    @property
    def name(self) -> str:
        """Its name and version, and the version of the Python inside."""

    @property
    def is_ready(self) -> bool:
        """Has it started, and not failed since?"""

    async def start(self) -> None:
        """Make it ready.

        Raises:
            UserError: no isolation here; the message says why and the way out.
        """

    async def run(self, job: Job) -> Result:
        """Run a job.

        Raises:
            BoxDied: the job has no result.
        """

    async def close(self) -> None:
        """End it and all that runs in it; may be called twice."""
