"""What an attack is.

``$port``, ``$secret``, ``$marker`` and ``$pid`` stand for a server, a file, a folder and a process
outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from string import Template

LEAK = "TOPSECRET"
QUIETLY = "import contextlib, os\nwith contextlib.suppress(Exception):\n    "


@dataclass(frozen=True)
class Attack:
    """A program, how its run must end, and what it must have said."""

    name: str
    source: str
    ended: str = "ok"  # several, where the kernel and the watch race
    says: str = ""
    code: int | None = None
    stdin: bytes = b""
    leaks_outside: bool = False  # without a box it finds what it looks for: the control

    def aimed(self, at: dict[str, object]) -> str:
        """The program with the names of what is outside."""
        return Template(self.source).safe_substitute(at)
