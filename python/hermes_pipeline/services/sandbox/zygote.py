"""The warm process of a box of bubblewrap: it waits for jobs, and forks each into new namespaces.

It runs inside bubblewrap, as root of a user namespace that is nobody outside. Three processes have
a part in a job:

- the zygote, which lives on: it starts the job, watches its limits and tells how it ended;
- the first process of the job's namespaces, out of the program's reach: it mounts, reaps, and
  reports the program's exit code; when it ends, the kernel ends all that is left;
- the program.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any, NoReturn

from hermes_pipeline.services.sandbox.inside import (
    FOLDER,
    POLL_S,
    Filter,
    be_program,
    check,
    exit_code,
    fail,
    hide,
    libc,
    place,
    prepare_python,
    say,
    used,
    write,
)

MODULES = """bisect collections copy dataclasses datetime decimal fractions functools heapq io
itertools json math operator random re statistics string traceback typing"""  # often imported
OURS = 3  # bubblewrap, the zygote and the first process of a job
LINK = 3  # the zygote's socket
KILL_FIRST = "1000"  # oom_score_adj: when the machine is out of memory
KILL = b"kill"  # in place of a job: end the one that runs

_NEW_MOUNTS, _NEW_IPC, _NEW_PIDS = 0x20000, 0x08000000, 0x20000000
_NO_SUID, _NO_DEVICES, _NO_EXEC, _READ_ONLY = 2, 4, 8, 1
_DROP_BOUND, _SET_SECUREBITS = 24, 28
_ROOT_IS_NOBODY = 0x2F  # no capabilities by being uid 0 or by changing uid, for good


class Zygote:
    """Runs jobs one after another, until the other end of its socket closes."""

    def __init__(self, link: socket.socket, code: bytes) -> None:
        self._link = link
        self._filter = Filter(code)
        self._own_pids = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self._not_of_job = {"1", str(os.getpid())}  # processes in the box

    def serve(self) -> None:
        """Answer each message, a job's limits and its files, with how it ended."""
        while True:
            message, files, _, _ = socket.recv_fds(self._link, 1 << 16, 8)
            if not message:
                return
            if message == KILL:  # of a job that had ended just before
                continue
            answer = self.run(json.loads(message), files)
            self._link.send(json.dumps(answer).encode())

    def run(self, limits: dict[str, Any], files: list[int]) -> dict[str, Any]:
        """Run one job; return its end: exit code, broken limit, seconds, or what failed here."""
        begun = time.monotonic()
        reports, report = os.pipe()
        try:
            first = self._fork_into_new_pids()
            if first == 0:
                os.close(reports)
                self._be_first(limits, files, report)
        finally:
            for each in (*files, report):
                os.close(each)
        broken, seen_s = self._watch(first, limits, begun)
        # Returns when the kernel has ended every process of the job.
        _, _, usage = os.wait4(first, 0)
        said = os.read(reports, 1 << 16)
        os.close(reports)
        # Nothing is said where it was killed; a failure comes before the code that follows from it.
        answer = json.loads(said.partition(b"\n")[0]) if said else {"code": None}
        # What was killed with the first process does not count in its usage.
        cpu_s = max(seen_s, usage.ru_utime + usage.ru_stime)
        seconds = {"cpu_s": cpu_s, "wall_s": time.monotonic() - begun}
        return {**answer, "broken": broken, **seconds}

    def _fork_into_new_pids(self) -> int:
        check("unshare", libc.unshare(_NEW_PIDS))
        try:
            return os.fork()
        finally:
            # Where the next fork belongs; in the child, which must not, this fails.
            libc.setns(self._own_pids, _NEW_PIDS)

    def _watch(self, first: int, limits: dict[str, Any], begun: float) -> tuple[str, float]:
        """Wait for the job's end, or end it at a limit.

        Returns:
            Which limit, or "" if none; processor seconds, as far as they were seen.
        """
        end = os.pidfd_open(first)
        poll = select.poll()
        poll.register(end, select.POLLIN)
        poll.register(self._link, select.POLLIN)
        broken, cpu_s = "", 0.0
        while not broken:
            left = begun + limits["wall_s"] - time.monotonic()
            ready = {each for each, _ in poll.poll(max(0, min(POLL_S, left)) * 1000)}
            if end in ready:
                break
            if self._link.fileno() in ready:
                if self._link.recv(16) != KILL:  # nobody is there any more
                    os._exit(0)
                broken = "output"
            elif left <= 0:
                broken = "wall_s"
            else:
                pids = [p for p in os.listdir("/proc") if p.isdigit() and p not in self._not_of_job]
                cpu_s, used_bytes = used(pids, limits["memory_bytes"])
                if cpu_s > limits["cpu_s"]:
                    broken = "cpu_s"
                elif used_bytes > limits["memory_bytes"]:
                    broken = "memory_bytes"
        if broken:
            os.kill(first, signal.SIGKILL)
        os.close(end)
        return broken, cpu_s

    def _be_first(self, limits: dict[str, Any], files: list[int], report: int) -> NoReturn:
        """The whole life of the job's first process."""
        try:
            os.setsid()
            program_file, report = place(files, report)
            write("/proc/self/oom_score_adj", KILL_FIRST.encode())
            hide()
            check("unshare", libc.unshare(_NEW_MOUNTS | _NEW_IPC))
            room = f"size={limits['file_bytes']},nr_inodes={limits['files']},mode=0777"
            _mount("tmpfs", FOLDER, _NO_SUID | _NO_DEVICES, room)
            _mount("proc", "/proc", _NO_SUID | _NO_DEVICES | _NO_EXEC | _READ_ONLY, "")
            os.chdir(FOLDER)
            program = os.fork()
            if program == 0:
                be_program(limits, program_file, report, self._filter, ours=OURS)
            os.closerange(0, report)
            while True:
                pid, status = os.wait()
                if pid == program:
                    say(report, {"code": exit_code(status)})
                    os._exit(0)
        except BaseException as error:
            fail(report, error)


def _mount(kind: str, at: str, flags: int, options: str) -> None:
    name = kind.encode()
    check(f"mount {at}", libc.mount(name, at.encode(), name, flags, options.encode() or None))


def prepare() -> None:
    """What no job need do again."""
    for name in MODULES.split():
        importlib.import_module(name)
    prepare_python()
    for capability in range(64):
        libc.prctl(_DROP_BOUND, capability, 0, 0, 0)
    check("securebits", libc.prctl(_SET_SECUREBITS, _ROOT_IS_NOBODY, 0, 0, 0))
    gc.collect()
    gc.freeze()


def main() -> None:
    """Serve on the socket whose number is the first argument."""
    os.dup2(int(sys.argv[1]), LINK, inheritable=False)
    os.closerange(LINK + 1, 1 << 16)
    link = socket.socket(fileno=LINK)
    zygote = Zygote(link, bytes.fromhex(sys.argv[2]))
    prepare()
    link.send(json.dumps({"python": ".".join(map(str, sys.version_info[:3]))}).encode())
    zygote.serve()
