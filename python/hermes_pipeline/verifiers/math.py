"""Answers in ``\\boxed{...}``, compared as text or as mathematics.

Mathematics is the math-verify library's. It can loop or eat memory on junk, and its own time limit
works in the main thread alone; so it runs in one child process that the kernel ends at a limit of
processor time or memory.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import threading

from hermes_pipeline.records import Trace, Verdict

MAX_CHARS = 2_000  # a longer answer is compared as text alone
CPU_LIMIT_S = 5.0  # processor time for one comparison
WALL_LIMIT_S = 60.0  # the same on a machine that is busy with other things
MEMORY_LIMIT_BYTES = 2 << 30

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BARE = re.compile(r"\\[A-Za-z]+|[^\s{}$]")


def verify_boxed(trace: Trace, target: str) -> Verdict:
    """Pass when the last ``\\boxed{...}`` of the answer equals ``target`` as mathematics."""
    answer = last_boxed(trace.answer)
    if answer is None:
        return Verdict.of(False, _no_box(trace))
    if same_text(answer, target):
        return Verdict.of(True, f"got {_short(answer)}")
    equal = _COMPARISON.equal(answer, target)
    if equal is None:
        return Verdict.of(False, f"got {_short(answer)}, which cannot be compared in time")
    return Verdict.of(equal, f"got {_short(answer)}, want {_short(target)}")


def verify_boxed_text(trace: Trace, target: str) -> Verdict:
    """Pass when the last ``\\boxed{...}`` of the answer is ``target``, but for spaces."""
    answer = last_boxed(trace.answer)
    if answer is None:
        return Verdict.of(False, _no_box(trace))
    return Verdict.of(same_text(answer, target), f"got {_short(answer)}, want {_short(target)}")


def last_boxed(text: str) -> str | None:
    """What stands in the last ``\\boxed`` or ``\\fbox`` of a text; None if nothing or cut off.

    Braces nest, escaped ones do not count, and ``\\boxed 5`` without braces boxes one thing.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start = boxes[-1].end()
    if not text.startswith("{", start):
        bare = _BARE.match(text, start)
        return bare.group() if bare else None
    depth = 0
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[start + 1 : brace.start()].strip()
    return None


def same_text(answer: str, target: str) -> bool:
    """Are these the same characters, but for runs of spaces and dollar signs around them?"""
    a, b = (" ".join(text.strip().strip("$").split()) for text in (answer, target))
    return a == b


def equal(answer: str, target: str) -> bool:
    """Are these equal as mathematics? False where that cannot be told within the limits."""
    return same_text(answer, target) or bool(_COMPARISON.equal(answer, target))


class _Comparison:
    """The child process that compares; started at the first need, and again after it was ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def equal(self, answer: str, target: str) -> bool | None:
        """Equal or not; None when the comparison was too long or too slow."""
        if max(len(answer), len(target)) > MAX_CHARS:
            return None
        question = json.dumps([answer, target]).encode() + b"\n"
        with self._lock:
            child = self._ready_child()
            assert child.stdin is not None
            assert child.stdout is not None
            try:
                child.stdin.write(question)
                child.stdin.flush()
                readable, _, _ = select.select([child.stdout], [], [], WALL_LIMIT_S)
                reply = child.stdout.readline() if readable else b""
            except BrokenPipeError:
                reply = b""
            if not reply.endswith(b"\n"):
                self._end()
                return None
        return bool(json.loads(reply))

    def _ready_child(self) -> subprocess.Popen[bytes]:
        if self._owner != os.getpid():  # after a fork the child is still the parent's
            self._child, self._owner = None, os.getpid()
        if self._child is None or self._child.poll() is not None:
            code = f"from {__name__} import compare_lines; compare_lines()"
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self._child

    def _end(self) -> None:
        if self._child is not None and self._owner == os.getpid():
            self._child.kill()
            self._child.communicate()
        self._child = None

    def close(self) -> None:
        """End the child; the next question starts another."""
        with self._lock:
            self._end()


_COMPARISON = _Comparison()
atexit.register(_COMPARISON.close)


def compare_lines() -> None:
    """The child's whole life: pairs of texts in on standard input, true or false out.

    The kernel ends it when one pair takes `CPU_LIMIT_S`; it ends itself when its parent is gone.
    """
    from math_verify import parse, verify

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
        answer, target = (
            parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in json.loads(line)
        )
        passed = verify(target, answer, timeout_seconds=None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(f"{json.dumps(bool(passed))}\n")
        sys.stdout.flush()


def _no_box(trace: Trace) -> str:
    return "no \\boxed{...} in the answer" if trace.answer else "no answer after the thinking"


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
