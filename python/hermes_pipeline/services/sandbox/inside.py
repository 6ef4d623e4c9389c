"""What runs a program inside a box, whatever the box is made of.

The standard library alone, of any Python from 3.9. A first process, out of the program's reach,
forks the program's, watches it and tells how it ended: `zygote.py` in bubblewrap, `contained.py`
in a container. The program has no capabilities, resource limits and a filter of system calls.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import ctypes
import fcntl
import gc
import glob
import importlib.machinery
import json
import os
import resource
import signal
import site
import socket
import struct
import sys
import threading
import types
import weakref
from collections.abc import Iterable
from typing import Any, NoReturn

POLL_S = 0.02
FOLDER = "/tmp"  # the program's only writable place
MAIN = f"{FOLDER}/main.py"
VALUE = 3  # the program's stream for what a called function returned
ASIDE = 200  # above every file of the first process's

_SET_DUMPABLE, _SET_SECCOMP, _SET_NO_NEW_PRIVS = 4, 22, 38
_SECCOMP_FILTER = 2
_CAPSET, _CAPABILITY_VERSION = 126, 0x20080522
_PAGE = resource.getpagesize()
_TICKS = os.sysconf("SC_CLK_TCK")

libc = ctypes.CDLL(None, use_errno=True)


class Filter(ctypes.Structure):
    """A filter of system calls, as the kernel takes it."""

    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

    def __init__(self, code: bytes) -> None:
        self._kept = ctypes.create_string_buffer(code, len(code))
        super().__init__(len(code) // 8, ctypes.addressof(self._kept))


def prepare_python() -> None:
    """What every program finds: `exit()`, signals that end it, no rights by running a file."""
    site.setquit()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # which the first process of a namespace ignores
    check("no_new_privs", libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def hide() -> None:
    """Let nobody without capabilities look into this process."""
    libc.prctl(_SET_DUMPABLE, 0, 0, 0, 0)


def used(pids: Iterable[str], allowed_bytes: int) -> tuple[float, int]:
    """Processor seconds and bytes of memory of processes; exact when not allowed.

    All that the sockets of this network can hold is theirs, too.
    """
    ticks, pages = 0, {}
    for pid in pids:
        values = _stat(f"/proc/{pid}")
        if values:  # else it has just ended
            ticks += sum(map(int, values[11:15]))  # its own and its dead children's
            path, count = _memory_of(f"/proc/{pid}", int(values[21]))
            pages[path] = count
    used_bytes, held_bytes = sum(pages.values()) * _PAGE, _most_unread_bytes()
    # What processes share, as after a fork, was counted in each.
    if used_bytes + held_bytes > allowed_bytes:
        used_bytes = sum(_proportional_bytes(path, pages[path] * _PAGE) for path in pages)
    return ticks / _TICKS, used_bytes + held_bytes


def _most_unread_bytes() -> int:
    """What the sockets of this network can hold: the kernel does not tell what they do."""
    count = read("/proc/net/unix").count(b"\n") - 1  # without the heading
    if count <= 0:
        return 0
    with socket.socket(socket.AF_UNIX) as another:
        return count * another.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)


def _stat(path: str) -> list[bytes]:
    """What is told of a process or thread, from its state on; nothing where it has ended."""
    return read(f"{path}/stat").rpartition(b")")[2].split()


def _memory_of(process: str, pages: int) -> tuple[str, int]:
    """Where a process shows its memory, and pages of it: its first thread may end before others."""
    if pages:
        return process, pages
    threads = glob.glob(f"{process}/task/*")
    shown = ((int(values[21]), path) for path in threads if (values := _stat(path)))
    pages, path = max(shown, default=(0, process))
    return path, pages


def _proportional_bytes(path: str, resident_bytes: int) -> int:
    """Memory of a process, what n of them share counted as 1/n; all of it where it hides that."""
    try:
        with open(f"{path}/smaps_rollup", "rb", buffering=0) as file:
            lines = file.read().splitlines()
    except PermissionError:
        return resident_bytes
    except OSError:  # it has just ended
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(b"Pss:"))


def be_program(
    limits: dict[str, Any], file: int, report: int, filter_: Filter, *, ours: int
) -> NoReturn:
    """The whole life of the program's process.

    Args:
        ours: processes of its user that are none of its own.
    """
    try:
        os.setsid()
        job = json.loads(read_all(file))
        os.close(file)
        for path, text in job["files"].items():
            _write_given(path, text.encode("latin-1"))
        _set_limits(limits, ours)
        libc.prctl(_SET_DUMPABLE, 1, 0, 0, 0)
        nothing = struct.pack("Ii", _CAPABILITY_VERSION, 0), bytes(24)
        check("capset", libc.syscall(_CAPSET, *nothing))
        filtering = libc.prctl(_SET_SECCOMP, _SECCOMP_FILTER, ctypes.byref(filter_), 0, 0)
        check("seccomp", filtering)
    except BaseException as error:
        fail(report, error)
    try:
        os.close(report)
        if job["command"]:
            _execute(job["command"])
        _finish(*_run_python(job))
    finally:
        os._exit(1)  # where even telling of an error failed, as without memory


def place(files: list[int], report: int) -> tuple[int, int]:
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


def _run_python(job: dict[str, Any]) -> tuple[int, weakref.ref[Any]]:
    """Run the source as `__main__`, then the call if there is one.

    Returns:
        The exit code, and what lives as long as the names of `__main__` do.
    """
    module = types.ModuleType("__main__")
    loader = importlib.machinery.SourceFileLoader("__main__", MAIN)
    module.__dict__.update(__file__=MAIN, __builtins__=builtins, __loader__=loader)
    sys.modules["__main__"] = module
    names = weakref.ref(loader)
    sys.argv, sys.path = [MAIN], [FOLDER, *(path for path in sys.path if path)]
    _open_streams()
    try:
        exec(compile(read(MAIN), MAIN, "exec", dont_inherit=True), module.__dict__)
        if job["function"]:
            owner, _, name = job["function"].rpartition(".")
            holder = module.__dict__[owner]() if owner else module
            value = getattr(holder, name)(*job["arguments"])
            write_all(VALUE, json.dumps(value).encode())
    except SystemExit as end:
        return _code_of(end.code), names
    except BaseException as error:
        # Without the frames of this file.
        error.__traceback__ = error.__traceback__.tb_next if error.__traceback__ else None
        told = type(error), error, error.__traceback__
        try:
            sys.excepthook(*told)
        except BaseException:
            sys.__excepthook__(*told)
        return 1, names
    return 0, names


def _open_streams() -> None:
    """Standard output and error on what they are now; the zygote's still know of its own files."""
    for fd, name, errors in ((1, "stdout", "strict"), (2, "stderr", "backslashreplace")):
        buffering = 1 if name == "stderr" else -1
        stream = open(fd, "w", buffering, "utf-8", errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _code_of(code: object) -> int:
    if code is None or isinstance(code, int):
        return (code or 0) & 255
    with contextlib.suppress(BaseException):  # a closed stream, an object that has no text
        print(code, file=getattr(sys, "stderr", None) or sys.__stderr__)
    return 1


def _finish(code: int, names: weakref.ref[Any]) -> NoReturn:
    """End as Python would, but for taking itself apart: the program's own objects alone go."""
    for wait in (getattr(threading, "_shutdown"), atexit._run_exitfuncs):  # noqa: B009
        with contextlib.suppress(BaseException):
            wait()
    flushed = [_flush(getattr(sys, name, None)) for name in ("stdout", "stderr")]
    _let_go(names)
    for name in ("__stdout__", "__stderr__"):
        _flush(getattr(sys, name, None))  # Python's code says nothing of these
    os._exit(code if all(flushed) else code or 120)


def _flush(stream: Any) -> bool:
    """Write out what a stream holds; false where that fails."""
    try:
        if stream is not None and not getattr(stream, "closed", False):
            stream.flush()
    except BaseException:
        return False
    return True


def _let_go(names: weakref.ref[Any]) -> None:
    """Drop what the program made, so that its files are written out and its `__del__` run."""
    is_alone = threading.active_count() == 1  # else a thread may still use all of this
    if is_alone:
        sys.stdout, sys.stderr = (getattr(sys, f"__{n}__", None) for n in ("stdout", "stderr"))
    gc.collect()  # puts a file before its buffer, so that it is the first to be closed
    sys.modules.pop("__main__", None)
    gc.collect()
    loader = names()
    if loader is not None and is_alone:  # something else, as a signal's handler, holds a function
        for each in gc.get_referrers(loader):
            if type(each) is dict and each.get("__loader__") is loader:
                each.clear()
        gc.collect()


def _execute(command: list[str]) -> NoReturn:
    try:
        os.execvp(command[0], command)
    except OSError as error:
        write_all(2, f"{command[0]}: {error.strerror}\n".encode())
        os._exit(127)


def _set_limits(limits: dict[str, Any], ours: int) -> None:
    memory = int(limits["memory_bytes"])
    seconds = int(limits["cpu_s"]) + 1  # the watch is finer; this holds if it should not look
    for kind, most in (
        # Of data, not of addresses: an arena of a thread reserves 64 MiB and uses little of it.
        (resource.RLIMIT_DATA, memory),
        (resource.RLIMIT_AS, 8 * memory + (1 << 30)),  # page tables are not counted as memory
        (resource.RLIMIT_STACK, 64 << 20),  # deep recursion is common in answers
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, int(limits["file_bytes"])),
        (resource.RLIMIT_NPROC, int(limits["processes"]) + ours),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_MEMLOCK, 1 << 16),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def exit_code(status: int) -> int:
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def fail(report: int, error: BaseException) -> NoReturn:
    say(report, {"code": None, "failed": repr(error)})
    os._exit(1)


def say(report: int, what: dict[str, Any]) -> None:
    os.write(report, json.dumps(what).encode() + b"\n")


def check(what: str, outcome: int) -> None:
    if outcome != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def read(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError:  # a process that has just ended
        return b""


def read_all(file: int) -> bytes:
    return os.pread(file, os.fstat(file).st_size, 0)


def write(path: str, content: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb", buffering=0) as file:
        write_all(file.fileno(), content)


def _write_given(path: str, content: bytes) -> None:
    """Write a file of the job's; where that fails, the job does, not the box."""
    try:
        write(os.path.join(FOLDER, path), content)
    except OSError as error:
        write_all(2, f"{path}: {error.strerror}\n".encode())
        os._exit(1)


def write_all(file: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(file, left) :]
