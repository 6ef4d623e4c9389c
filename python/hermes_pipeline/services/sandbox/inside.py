"""The warm process of a box: it waits for jobs, and forks each into namespaces of its own.

It runs inside bubblewrap, as root of a user namespace that is nobody outside, and knows the
standard library alone, of any Python from 3.9. Three processes have a part in a job:

- the zygote, which lives on: it starts the job, watches its limits and tells how it ended;
- the first process of the job's namespaces, out of the program's reach: it mounts, reaps, and
  reports the program's exit code; when it ends, the kernel ends all that is left;
- the program, without capabilities, under resource limits and the filter of system calls.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import gc
import importlib
import json
import os
import resource
import select
import signal
import site
import socket
import struct
import sys
import threading
import time
import traceback
import types
from typing import Any, NoReturn

POLL_S = 0.02
FOLDER = "/tmp"  # the program's only writable place
MAIN = f"{FOLDER}/main.py"
MODULES = """bisect collections copy dataclasses datetime decimal fractions functools heapq io
itertools json math operator random re statistics string traceback typing"""  # often imported
OURS = 3  # bubblewrap, the zygote and the first process of a job
LINK = 3  # the zygote's socket
VALUE = 3  # the program's stream for what a called function returned
ASIDE = 200  # above every file of the zygote's
KILL_FIRST = "1000"  # oom_score_adj: when the machine is out of memory
KILL = b"kill"  # in place of a job: end the one that runs

_NEW_MOUNTS, _NEW_IPC, _NEW_PIDS = 0x20000, 0x08000000, 0x20000000
_NO_SUID, _NO_DEVICES, _NO_EXEC, _READ_ONLY = 2, 4, 8, 1
_SET_DUMPABLE, _SET_SECCOMP, _DROP_BOUND, _SET_SECUREBITS, _SET_NO_NEW_PRIVS = 4, 22, 24, 28, 38
_SECCOMP_FILTER = 2
_ROOT_IS_NOBODY = 0x2F  # no capabilities by being uid 0 or by changing uid, for good
_CAPSET, _CAPABILITY_VERSION = 126, 0x20080522
_PAGE = resource.getpagesize()
_TICKS = os.sysconf("SC_CLK_TCK")

_libc = ctypes.CDLL(None, use_errno=True)


class _Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]


class Zygote:
    """Runs jobs one after another, until the other end of its socket closes."""

    def __init__(self, link: socket.socket, code: bytes) -> None:
        self._link = link
        self._code = ctypes.create_string_buffer(code, len(code))
        self._filter = _Filter(len(code) // 8, ctypes.addressof(self._code))
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
        _check("unshare", _libc.unshare(_NEW_PIDS))
        try:
            return os.fork()
        finally:
            # Where the next fork belongs; in the child, which must not, this fails.
            _libc.setns(self._own_pids, _NEW_PIDS)

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
                cpu_s, used_bytes = self._used(limits["memory_bytes"])
                if cpu_s > limits["cpu_s"]:
                    broken = "cpu_s"
                elif used_bytes > limits["memory_bytes"]:
                    broken = "memory_bytes"
        if broken:
            os.kill(first, signal.SIGKILL)
        os.close(end)
        return broken, cpu_s

    def _used(self, allowed_bytes: int) -> tuple[float, int]:
        """Processor seconds and bytes of memory of the job's processes; exact when not allowed."""
        pids = [p for p in os.listdir("/proc") if p.isdigit() and p not in self._not_of_job]
        ticks = pages = 0
        for pid in pids:
            values = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
            if values:  # else it has just ended
                ticks += sum(map(int, values[11:15]))  # its own and its dead children's
                pages += int(values[21])
        used_bytes = pages * _PAGE
        # What processes share, as after a fork, was counted in each.
        if used_bytes > allowed_bytes:
            used_bytes = _proportional_bytes(pids)
        return ticks / _TICKS, used_bytes

    def _be_first(self, limits: dict[str, Any], files: list[int], report: int) -> NoReturn:
        """The whole life of the job's first process."""
        try:
            os.setsid()
            program_file, report = _place(files, report)
            _write("/proc/self/oom_score_adj", KILL_FIRST.encode())
            _libc.prctl(_SET_DUMPABLE, 0, 0, 0, 0)  # the program cannot look into it
            _check("unshare", _libc.unshare(_NEW_MOUNTS | _NEW_IPC))
            room = f"size={limits['file_bytes']},nr_inodes={limits['files']},mode=0777"
            _mount("tmpfs", FOLDER, _NO_SUID | _NO_DEVICES, room)
            _mount("proc", "/proc", _NO_SUID | _NO_DEVICES | _NO_EXEC | _READ_ONLY, "")
            os.chdir(FOLDER)
            program = os.fork()
            if program == 0:
                self._be_program(limits, program_file, report)
            os.closerange(0, report)
            while True:
                pid, status = os.wait()
                if pid == program:
                    _say(report, {"code": _exit_code(status)})
                    os._exit(0)
        except BaseException as error:
            _fail(report, error)

    def _be_program(self, limits: dict[str, Any], file: int, report: int) -> NoReturn:
        """The whole life of the program's process."""
        try:
            os.setsid()
            job = json.loads(_read_all(file))
            os.close(file)
            for path, text in job["files"].items():
                _write_given(path, text.encode("latin-1"))
            _set_limits(limits)
            _libc.prctl(_SET_DUMPABLE, 1, 0, 0, 0)
            nothing = struct.pack("Ii", _CAPABILITY_VERSION, 0), bytes(24)
            _check("capset", _libc.syscall(_CAPSET, *nothing))
            filtering = _libc.prctl(_SET_SECCOMP, _SECCOMP_FILTER, ctypes.byref(self._filter), 0, 0)
            _check("seccomp", filtering)
        except BaseException as error:
            _fail(report, error)
        try:
            os.close(report)
            if job["command"]:
                _execute(job["command"])
            _finish(_run_python(job))
        finally:
            os._exit(1)  # where even telling of an error failed, as without memory


def _place(files: list[int], report: int) -> tuple[int, int]:
    """Put the program's streams at 0, 1, 2 (and 3) and close all else but its file and the report.

    Returns:
        The numbers of those two.
    """
    program, *streams = files
    kept = [fcntl.fcntl(each, fcntl.F_DUPFD, ASIDE) for each in (program, report, *streams)]
    for at, stream in enumerate(kept[2:]):
        os.dup2(stream, at)
        os.close(stream)
    os.closerange(len(streams), ASIDE)
    return kept[0], kept[1]


def _run_python(job: dict[str, Any]) -> int:
    """Run the source as `__main__`, then the call if there is one; return the exit code."""
    module = types.ModuleType("__main__")
    module.__dict__.update(__file__=MAIN, __builtins__=__builtins__)
    sys.modules["__main__"] = module
    sys.argv, sys.path = [MAIN], [FOLDER, *(path for path in sys.path if path)]
    try:
        exec(compile(_read(MAIN), MAIN, "exec"), module.__dict__)
        if job["function"]:
            owner, _, name = job["function"].rpartition(".")
            holder = module.__dict__[owner]() if owner else module
            value = getattr(holder, name)(*job["arguments"])
            _write_all(VALUE, json.dumps(value).encode())
    except SystemExit as end:
        return _code_of(end.code)
    except BaseException as error:
        # Without the frames of this file.
        below = error.__traceback__.tb_next if error.__traceback__ else None
        traceback.print_exception(type(error), error, below)
        return 1
    return 0


def _code_of(code: object) -> int:
    if code is None or isinstance(code, int):
        return (code or 0) & 255
    print(code, file=sys.stderr)  # noqa: T201 - as Python does
    return 1


def _finish(code: int) -> NoReturn:
    """End as Python would, but for taking itself apart."""
    try:
        getattr(threading, "_shutdown")()  # noqa: B009 - waits for threads that are no daemons
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        code = code or 120  # what Python says when its output cannot be flushed
    os._exit(code)


def _execute(command: list[str]) -> NoReturn:
    try:
        os.execvp(command[0], command)
    except OSError as error:
        _write_all(2, f"{command[0]}: {error.strerror}\n".encode())
        os._exit(127)


def _set_limits(limits: dict[str, Any]) -> None:
    memory = int(limits["memory_bytes"])
    seconds = int(limits["cpu_s"]) + 1  # the watch is finer; this holds if it should not look
    for kind, most in (
        # Of data, not of addresses: an arena of a thread reserves 64 MiB and uses little of it.
        (resource.RLIMIT_DATA, memory),
        (resource.RLIMIT_AS, 8 * memory + (1 << 30)),  # page tables are not counted as memory
        (resource.RLIMIT_STACK, 64 << 20),  # deep recursion is common in answers
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, int(limits["file_bytes"])),
        (resource.RLIMIT_NPROC, int(limits["processes"]) + OURS),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_MEMLOCK, 1 << 16),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def _proportional_bytes(pids: list[str]) -> int:
    """Memory of processes, what n of them share counted as 1/n in each."""
    total = 0
    for pid in pids:
        for line in _read(f"/proc/{pid}/smaps_rollup").splitlines():
            if line.startswith(b"Pss:"):
                total += int(line.split()[1]) << 10
    return total


def _exit_code(status: int) -> int:
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def _fail(report: int, error: BaseException) -> NoReturn:
    _say(report, {"code": None, "failed": repr(error)})
    os._exit(1)


def _say(report: int, what: dict[str, Any]) -> None:
    os.write(report, json.dumps(what).encode() + b"\n")


def _check(what: str, outcome: int) -> None:
    if outcome != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(kind: str, at: str, flags: int, options: str) -> None:
    name = kind.encode()
    _check(f"mount {at}", _libc.mount(name, at.encode(), name, flags, options.encode() or None))


def _read(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError:  # a process that has just ended
        return b""


def _read_all(file: int) -> bytes:
    return os.pread(file, os.fstat(file).st_size, 0)


def _write(path: str, content: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb", buffering=0) as file:
        _write_all(file.fileno(), content)


def _write_given(path: str, content: bytes) -> None:
    """Write a file of the job's; where that fails, the job does, not the box."""
    try:
        _write(os.path.join(FOLDER, path), content)
    except OSError as error:
        _write_all(2, f"{path}: {error.strerror}\n".encode())
        os._exit(1)


def _write_all(file: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(file, left) :]


def prepare() -> None:
    """What no job need do again: modules loaded, nothing to gain from running a file."""
    for name in MODULES.split():
        importlib.import_module(name)
    site.setquit()  # programs like to end with exit()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # which the first process of a namespace ignores
    _check("no_new_privs", _libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    for capability in range(64):
        _libc.prctl(_DROP_BOUND, capability, 0, 0, 0)
    _check("securebits", _libc.prctl(_SET_SECUREBITS, _ROOT_IS_NOBODY, 0, 0, 0))
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


if __name__ == "__main__":
    main()
