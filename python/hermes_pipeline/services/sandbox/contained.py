"""The first process of a container: it runs one job, tells how it ended, and ends.

A container is made for one job, and its namespaces and mounts are the engine's. This process has
the user of the program, but no program can look into it or signal it: it is the first of its
namespace. When its input ends, whoever started the container is gone, and it ends with all below.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import resource
import select
import signal
import sys
import time
from typing import Any, BinaryIO

from hermes_pipeline.services.sandbox.inside import (
    FOLDER,
    POLL_S,
    Filter,
    be_program,
    exit_code,
    hide,
    place,
    prepare_python,
    used,
    write_all,
)

INPUT, OUTPUT = 0, 1
MACHINE = "x86_64"  # whose numbers the filter of system calls has
CHUNK = 1 << 16


class Stream:
    """A pipe from the program, kept up to a limit."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self.file, self.theirs = os.pipe()
        os.set_blocking(self.file, False)
        self.text = bytearray()

    @property
    def is_over(self) -> bool:
        """Was more written than is kept?"""
        return len(self.text) > self._most_bytes

    def take(self) -> bool:
        """Read what is there; false where that is nothing."""
        try:
            text = os.read(self.file, CHUNK)
        except BlockingIOError:
            return False
        self.text += text
        return bool(text)


class Run:
    """One job: the program's process, its streams and its limits."""

    def __init__(self, limits: dict[str, Any], count: int) -> None:
        self._limits = limits
        self._begun = time.monotonic()
        self._code: int | None = None
        self.streams = [Stream(limits["output_bytes"]) for _ in range(count)]

    def start(self, given: list[int], filter_: Filter) -> None:
        """Fork the program's process.

        Args:
            given: the files of the job and of its standard input, which are closed here.
        """
        files = [*given, *(each.theirs for each in self.streams)]
        self._reports, report = os.pipe()
        self._program = os.fork()
        if self._program == 0:
            file, report = place(files, report)
            be_program(self._limits, file, report, filter_, ours=1)
        for each in (*files, report):
            os.close(each)

    def finish(self) -> dict[str, Any]:
        """Wait for the end, or end it at a limit; return exit code, broken limit and seconds."""
        broken = self._watch()
        with contextlib.suppress(ProcessLookupError):  # there is none
            os.kill(-1, signal.SIGKILL)  # all but this process
        while self._reap(0):
            pass
        for stream in self.streams:
            while stream.take() and not stream.is_over:
                pass
        said = os.read(self._reports, CHUNK)
        failed = json.loads(said.partition(b"\n")[0]) if said else {}
        wall_s = time.monotonic() - self._begun
        end = {"code": self._code, "broken": broken, "cpu_s": _reaped_s(), "wall_s": wall_s}
        return {**end, **failed}

    def _watch(self) -> str:
        """Read the streams until the program has ended; say which limit was broken, or ""."""
        end = os.pidfd_open(self._program)
        poll = select.poll()
        for each in (end, INPUT, *(stream.file for stream in self.streams)):
            poll.register(each, select.POLLIN)
        looked_s = self._begun
        while True:
            left_s = self._begun + self._limits["wall_s"] - time.monotonic()
            ready = {each for each, _ in poll.poll(max(0, min(POLL_S, left_s)) * 1000)}
            if INPUT in ready:  # nobody is there any more
                os._exit(0)
            while self._code is None and self._reap(os.WNOHANG):
                pass
            if self._code is not None:
                return ""
            for stream in self.streams:
                if stream.file in ready and not stream.take():
                    poll.unregister(stream.file)
                if stream.is_over:
                    return "output"
            if left_s <= 0:
                return "wall_s"
            # Not at each of a million small writes.
            if time.monotonic() - looked_s >= POLL_S:
                looked_s = time.monotonic()
                if broken := self._spent():
                    return broken

    def _spent(self) -> str:
        """Which limit of processor time, memory or files is passed?"""
        pids = [pid for pid in os.listdir("/proc") if pid.isdigit() and pid != "1"]
        cpu_s, used_bytes = used(pids, self._limits["memory_bytes"])
        if cpu_s + _reaped_s() > self._limits["cpu_s"]:
            return "cpu_s"
        if used_bytes > self._limits["memory_bytes"]:
            return "memory_bytes"
        room = os.statvfs(FOLDER)  # where the engine cannot limit how many there are
        return "files" if room.f_files - room.f_ffree > self._limits["files"] else ""

    def _reap(self, how: int) -> bool:
        """Take note of one process that has ended; false where there is none."""
        try:
            pid, status = os.waitpid(-1, how)
        except ChildProcessError:
            return False
        if pid == self._program:
            self._code = exit_code(status)
        return pid != 0


def _reaped_s() -> float:
    """Processor seconds of all processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _kept(source: BinaryIO, size: int) -> int:
    """The next bytes, as a file in memory that nobody can change."""
    file = os.memfd_create("kept", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    while size:
        content = source.read(min(size, CHUNK))
        if not content:
            os._exit(0)  # nobody is there any more
        write_all(file, content)
        size -= len(content)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    os.lseek(file, 0, os.SEEK_SET)
    return file


def _check() -> None:
    """Is this a place for a program?"""
    if platform.machine() != MACHINE:
        sys.exit(f"the image is for {platform.machine()}; one for {MACHINE} is needed")
    if os.getpid() != 1:
        sys.exit("this is not the first process of the container")
    if not os.path.ismount(FOLDER) or os.listdir(FOLDER) or not os.access(FOLDER, os.W_OK):
        sys.exit(f"the image's {FOLDER} must be empty, and everybody's to write")


def main() -> None:
    """Say hello on the standard output, read a job from the standard input, answer, end."""
    _check()
    hide()
    prepare_python()
    os.chdir(FOLDER)
    filter_ = Filter(bytes.fromhex(sys.argv[1]))
    hello = {"python": ".".join(map(str, sys.version_info[:3]))}
    write_all(OUTPUT, json.dumps(hello).encode() + b"\n")
    with open(INPUT, "rb", closefd=False) as source:  # nothing but its end follows the job
        line = source.readline()
        if not line:
            return
        job = json.loads(line)
        given = [_kept(source, size) for size in job["sizes"]]
    run = Run(job["limits"], job["streams"])
    run.start(given, filter_)
    answer = run.finish()
    texts = [bytes(stream.text) for stream in run.streams]
    answer["sizes"] = list(map(len, texts))
    write_all(OUTPUT, b"".join([json.dumps(answer).encode(), b"\n", *texts]))
