"""Start, watch and stop another program, so that nothing of it is left behind.

Such a program may be several processes, and a `kill -9` of the first leaves the others. So a
guard, a small process of its own, starts them as one process group and ends the whole group when
the program is stopped, when its first process dies, and when we die ourselves, however we die. The
guard gives the program a temporary folder and removes it, with sockets that were never closed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

from hermes_pipeline.errors import UserError

LOOPBACK = "127.0.0.1"
WILDCARDS = {"0.0.0.0": LOOPBACK, "::": "::1"}  # and by which address we reach ourselves there
GRACE_S = 15.0  # between SIGTERM and SIGKILL
_SAYS_WHY = re.compile(r"^(?!.*\b(?:INFO|WARNING)\b).*\b\w*(?:Error|Exception|error)\b: ")
_SHOWN_LINES, _SHOWN_CHARACTERS = 8, 300  # of the log, and of each line
_PR_SET_PDEATHSIG = 1


class Guarded:
    """A program that listens on a port of this machine, for the time of a `with` block.

    Args:
        command: the program and its arguments.
        called: what errors call it, such as "the server of MODEL".
        log: where its output goes; kept afterwards.
        ready_s: seconds until it must have answered.
        environment: all of it.

    Raises:
        UserError: it died or was late.

    Ending the block stops every process, also when the first one is dead already.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        called: str,
        log: Path,
        ready_s: float,
        environment: Mapping[str, str],
    ) -> None:
        self.called, self.log = called, log
        self._command, self._environment, self._ready_s = list(command), environment, ready_s
        self._guard: subprocess.Popen[bytes] | None = None

    def is_ready(self) -> bool:
        """Has it answered?"""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the processes, without waiting for them."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        code = f"from {__name__} import guard; guard()"
        with self.log.open("wb") as log:
            self._guard = subprocess.Popen(
                [sys.executable, "-P", "-c", code, *self._command],
                stdin=subprocess.PIPE,  # its end, when we die, is the guard's signal to finish
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )

    def wait_ready(self, waiting: Callable[[], None] = lambda: None) -> None:
        """Return when it is ready; ``waiting`` is called a few times a second.

        Raises:
            UserError: with the program's own last words, when it died or was late.
        """
        deadline = time.monotonic() + self._ready_s
        while time.monotonic() < deadline:
            self.check()
            waiting()
            if self.is_ready():
                return
            time.sleep(0.2)
        raise UserError(
            f"{self.called} gave no answer in {self._ready_s:.0f} s; {self.last_words()}"
        )

    def check(self) -> None:
        """Raise `UserError`, with the program's last words, if it has ended by itself."""
        if self._guard is None or self._guard.poll() is not None:
            raise UserError(f"{self.called} has ended; {self.last_words()}")

    def stop(self) -> None:
        """End every process of the program; may be called twice."""
        guard, self._guard = self._guard, None
        if guard is None:
            return
        assert guard.stdin is not None
        guard.stdin.close()
        try:
            guard.wait(GRACE_S + 10)
        except subprocess.TimeoutExpired:
            guard.kill()
            guard.wait()

    def last_words(self) -> str:
        """The end of the log, what looks like reasons first, and where the rest is."""
        try:
            text = self.log.read_text(errors="replace")
        except OSError:
            text = ""
        kept = [line.rstrip()[:_SHOWN_CHARACTERS] for line in text.splitlines() if line.strip()]
        # A reason may go on in the next line, as pydantic's do.
        reasons = [
            line
            for before, line in pairwise(["", *kept])
            if _SAYS_WHY.search(line) or _SAYS_WHY.search(before)
        ]
        shown = "\n  ".join(list(dict.fromkeys(reasons or kept))[-_SHOWN_LINES:])
        return f"its log {self.log} ends:\n  {shown}" if shown else f"its log {self.log} is empty"


def guard() -> None:
    """The guard's whole life: run the command of `sys.argv`, then leave nothing of it behind.

    It ends when its standard input does, or when the command has.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # A short name, as the path of a socket has 107 characters at most.
    with tempfile.TemporaryDirectory(prefix="h4-", ignore_cleanup_errors=True) as temporary:
        code = _run(sys.argv[1:], os.environ | {"TMPDIR": temporary})
    sys.exit(code and 1)


def _run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """The command's exit status, once nothing of it is left."""
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
        preexec_fn=_end_with_parent,  # safe: the guard has one thread
    )
    os.set_blocking(0, False)
    while child.poll() is None:
        try:
            if os.read(0, 1) == b"":
                break
        except BlockingIOError:
            time.sleep(0.1)
    if child.poll() is None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # what it has started is in the same group
    return child.wait()


def reserve_port(host: str, port: int) -> int:
    """The port, if it is free now on this address of ours; any free one for 0.

    Raises:
        UserError: the port is taken, or the address is not this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(f"host {host!r} is no address of this machine: {error}") from None
    except (OSError, OverflowError) as error:
        raise UserError(
            f"port {port} of {host} cannot be used ({error}); choose another, or 0 for any free one"
        ) from None


def url_of(host: str, port: int) -> str:
    """The address of what listens there."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _end_with_parent() -> None:
    """Between fork and exec: a guard that was killed takes the program with it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
