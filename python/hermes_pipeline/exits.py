"""How the command `hermes4` ends: exit codes, signals, streams that nobody reads."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator

MISTAKEN, STOPPED, INTERRUPTED, UNREAD = 2, 75, 130, 141
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_S = 3.0  # what comes so soon after a Ctrl-C is the same one
# Typer keeps lines apart that have an empty one between them.
EXIT_CODES = """Exit codes:

0: done, or served until stopped

1: a defect, with its traceback

2: bad usage or input, or a file or disk that failed; one line says what is wrong and how to fix
it

3: `train` met a gradient that is not finite; nothing of that step is saved

75: stopped by SIGTERM, or because its terminal closed, before it was done; finished work is safe,
and the same command resumes it

128 + n: ended by signal n: 130 for Ctrl-C, 141 when nothing reads the output"""


def say(line: str) -> None:
    """Tell it on standard error."""
    with contextlib.suppress(OSError):  # where standard error cannot be written, the code says it
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def tell(line: str) -> None:
    """Print it on standard output at once; what its encoding lacks is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    sys.stdout.flush()


def unread() -> int:
    """End in silence: the reader has seen enough, as `head` has."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())  # what is still in a buffer is written at the end
    return UNREAD


def open_closed_streams() -> None:
    """Lead streams that the caller has closed nowhere, before a file takes their number."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115 - for as long as we run
            os.dup2(stream.fileno(), number)
            setattr(sys, name, stream)


def stopping_signals() -> list[signal.Signals]:
    """Those that ask a command to stop: not a hang-up where nohup has it ignored."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in STOPPING if not (ignored and number == signal.SIGHUP)]


@contextlib.contextmanager
def hearing_signals() -> Iterator[Callable[[], bool]]:
    """Let SIGTERM, which schedulers send, end a command as Ctrl-C does; tells if it has come.

    So does SIGHUP, of a terminal that closes.

    Another Ctrl-C in the midst of cleaning up would leave a mess, or a worker that waits for ever.
    """
    told: list[int] = []
    last = -math.inf

    def on_sigint(number: int, frame: types.FrameType | None) -> None:
        nonlocal last
        if time.monotonic() - last > SAME_S:
            last = time.monotonic()
            raise KeyboardInterrupt

    def on_sigterm(number: int, frame: types.FrameType | None) -> None:
        told.append(number)
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a script's background
            signal.signal(signal.SIGINT, on_sigint)
        signal.raise_signal(signal.SIGINT)

    before = {number: signal.getsignal(number) for number in stopping_signals()}
    for number in before.keys() - {signal.SIGINT}:
        signal.signal(number, on_sigterm)
    if before[signal.SIGINT] != signal.SIG_IGN:
        signal.signal(signal.SIGINT, on_sigint)
    try:
        yield lambda: bool(told)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
