"""Answers in ``\\boxed{...}``, compared as text or as mathematics.

Mathematics is the math-verify library's. It can loop or eat memory on junk, and its own time limit
works in the main thread alone; so it runs in one child process under limits of processor time and
memory. What meets a limit is a wrong answer; where nothing could be compared there is no verdict.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import threading
from typing import Any

from hermes_pipeline.errors import UserError
from hermes_pipeline.records import Trace, Verdict
from hermes_pipeline.verifiers.notation import readable

MAX_CHARS = 2_000  # a longer answer is compared as text alone
CPU_LIMIT_S = 5.0  # processor time for one comparison
WALL_LIMIT_S = 60.0  # the same on a machine that is busy with other things
START_LIMIT_S = 120.0  # for the child to load math-verify
MEMORY_LIMIT_BYTES = 2 << 30

NEEDS = "pip install 'hermes4-core[pipeline]'"

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BARE = re.compile(r"\\[A-Za-z]+|[^\s{}$]")


def verify_boxed(trace: Trace, target: str) -> Verdict:
    """Pass when the last ``\\boxed{...}`` of the answer equals ``target`` as mathematics.

    Raises:
        UserError: math-verify is not installed.
        VerifierError: the comparison broke, at no limit of ours.
    """
    answer = last_boxed(trace.answer)
    if answer is None:
        return Verdict.of(False, _no_box(trace))
    if same_text(answer, target):
        return Verdict.of(True, f"got {_short(answer)}")
    try:
        passed = _COMPARISON.equal(answer, target)
    except _LimitError as limit:
        return Verdict.of(False, f"got {_short(answer)}, which {limit}")
    return Verdict.of(passed, f"got {_short(answer)}, want {_short(target)}")


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
    """Are these equal as mathematics? False where that cannot be told within the limits.

    Raises as `verify_boxed` does.
    """
    try:
        return same_text(answer, target) or _COMPARISON.equal(answer, target)
    except _LimitError:
        return False


class VerifierError(Exception):
    """Nothing could be compared, so there is no verdict; the message says why."""


class _LimitError(Exception):
    """A comparison met one of our limits; the message ends "..., which"."""


class _Comparison:
    """The child process that compares; started at the first need, and again after it was ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def equal(self, answer: str, target: str) -> bool:
        """Equal or not; raises `_LimitError`, or as `verify_boxed` does."""
        if max(len(answer), len(target)) > MAX_CHARS:
            raise _LimitError("is too long to be compared")
        question = [text for text in map(readable, (answer, target)) if text is not None]
        if len(question) < 2:
            return False  # the texts differ, and nothing else can be told
        with self._lock:
            try:
                self._start()
                reply = self._ask(question)
            except BaseException:  # after Ctrl-C, too: the next question would get this reply
                self._end()
                raise
        if reply == "no memory":
            self._end()  # what it holds would count against the next answer
            raise _LimitError("cannot be compared in memory")
        return bool(reply)

    def _start(self) -> None:
        """Have a child that has loaded math-verify."""
        if self._owner != os.getpid():  # after a fork the child is still the parent's
            self._child, self._owner = None, os.getpid()
        if self._child is not None and self._child.poll() is None:
            return
        self._end()
        code = f"from {__name__} import compare_lines; compare_lines()"
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        line = self._read(START_LIMIT_S)
        if line is None:
            raise VerifierError(f"math-verify did not load in {START_LIMIT_S:g} s")
        if not line:
            raise VerifierError(f"math-verify did not load: its process {self._ending()}")
        if json.loads(line) != "ready":
            raise UserError(
                f"the verifier of boxed mathematics needs the package math-verify: {NEEDS} "
                f"({json.loads(line)})"
            )

    def _ask(self, question: list[str]) -> Any:
        """The child's reply."""
        assert self._child is not None
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then there is nothing to read, either
            self._child.stdin.write(json.dumps(question).encode() + b"\n")
            self._child.stdin.flush()
        line = self._read(WALL_LIMIT_S)
        if line is None:
            raise _LimitError("cannot be compared in time")
        if line:
            return json.loads(line)
        if self._child.wait() == -signal.SIGPROF:
            raise _LimitError("cannot be compared in time")
        answer, target = map(_short, question)
        raise VerifierError(
            f"comparing {answer} with {target} failed: its process {self._ending()}"
        )

    def _read(self, limit_s: float) -> bytes | None:
        """A line of the child's; empty when the child has ended, None when it takes too long."""
        assert self._child is not None
        assert self._child.stdout is not None
        readable, _, _ = select.select([self._child.stdout], [], [], limit_s)
        if not readable:
            return None
        line = self._child.stdout.readline()
        return line if line.endswith(b"\n") else b""

    def _ending(self) -> str:
        """How the child ended, in words."""
        assert self._child is not None
        code = self._child.wait()
        return f"was ended by signal {-code}" if code < 0 else f"ended with {code}"

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

    First it says "ready", or what it lacks.

    The kernel ends it when one pair takes `CPU_LIMIT_S`; it ends itself when its parent is gone.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        _reply(str(error))
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _reply("ready")
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
        try:
            answer, target = (
                parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in json.loads(line)
            )
            reply: object = bool(verify(target, answer, timeout_seconds=None))
        except MemoryError:
            reply = "no memory"
        signal.setitimer(signal.ITIMER_PROF, 0)
        _reply(reply)


def _reply(value: object) -> None:
    sys.stdout.write(f"{json.dumps(value)}\n")
    sys.stdout.flush()


def _no_box(trace: Trace) -> str:
    return "no \\boxed{...} in the answer" if trace.answer else "no answer after the thinking"


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
