"""A box of bubblewrap: a warm process in namespaces of its own, and what talks to it.

The program inside is `zygote.py`. Jobs and streams go in as sealed memory and pipes, by a socket
that no program inside ever holds; how a job ended comes back on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import platform
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from hermes_pipeline.errors import UserError
from hermes_pipeline.services.sandbox.jobs import BoxDied, Job, Result
from hermes_pipeline.services.sandbox.programs import (
    find_bwrap,
    find_python,
    text_of,
    version_of,
)
from hermes_pipeline.services.sandbox.seccomp import build_filter
from hermes_pipeline.services.sandbox.wire import (
    ENVIRONMENT,
    FIRST_USER,
    GRACE_S,
    READY_S,
    pack_job,
    read_end,
)

_DEVICES = ("null", "full", "random", "urandom")
_KILL = b"kill"
_CHUNK = 1 << 16
_NAME = "bubblewrap"


class Bubblewrap:
    """One warm process in bubblewrap, for one job at a time.

    Args:
        slot: tells it from others of this machine's user: as root each has a user id of its own.

    Raises:
        UserError: not Linux on x86-64; no bwrap or Python that the user of the box could run.
    """

    def __init__(self, slot: int) -> None:
        if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
            raise UserError(
                f"the sandbox needs Linux on x86_64, not {platform.system()} on "
                f"{platform.machine()}; run model-written code on such a machine"
            )
        self._bwrap, self._python = find_bwrap(), find_python()
        self._user = FIRST_USER + slot if os.geteuid() == 0 else None
        self._process: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._name = _NAME

    @property
    def name(self) -> str:
        """Its name and version, and the version of the Python inside."""
        return self._name

    @property
    def is_ready(self) -> bool:
        """Has it started, and not failed since?"""
        return self._link is not None

    async def start(self) -> None:
        """Start bubblewrap and wait until the process inside is warm.

        Raises:
            UserError: it did not start, with its own words and the way out.
        """
        await self.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._link = ours
        with theirs, tempfile.TemporaryFile() as words:
            inside = [self._python, "-s", "-S", "-c", text_of("zygote")]
            given = [str(theirs.fileno()), build_filter().hex()]
            try:
                self._process = subprocess.Popen(
                    [*self._outside(), "--", *inside, *given],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=words,
                    pass_fds=(theirs.fileno(),),
                    cwd="/",
                    env={},
                    start_new_session=True,  # Ctrl-C is for us, who then end it
                    # Before bubblewrap: the kernel limits no processes of who is root outside.
                    user=self._user,
                    group=self._user,
                    extra_groups=None if self._user is None else [],
                )
            except (OSError, subprocess.SubprocessError) as error:
                self._forget()
                words.write(f"{getattr(error, 'strerror', None) or error}".encode())
                raise UserError(_cannot_start(words)) from None
            theirs.close()
            try:
                async with asyncio.timeout(READY_S):
                    hello = await asyncio.get_running_loop().sock_recv(ours, _CHUNK)
            except TimeoutError:
                hello = b""
            except BaseException:
                await self.close()
                raise
            if not hello:
                await self.close()
                raise UserError(_cannot_start(words))
        version = version_of(self._bwrap)
        self._name = f"{_NAME} {version}, Python {json.loads(hello)['python']}"

    async def run(self, job: Job) -> Result:
        """Run a job; when this is cancelled, the box ends with it.

        Raises:
            BoxDied: the box ended, failed inside, or did not keep its limits.
        """
        assert self._link is not None
        loop, packed = asyncio.get_running_loop(), pack_job(job)
        with contextlib.ExitStack() as stack:
            try:
                streams = [
                    stack.enter_context(_Stream(loop, job.limits.output_bytes, self._kill))
                    for _ in range(3 if job.function else 2)
                ]
                files = [stack.enter_context(_sealed(text)) for text in (packed, job.stdin)]
                message = json.dumps(asdict(job.limits)).encode()
                theirs = [stream.theirs for stream in streams]
                socket.send_fds(self._link, [message], [*files, *theirs])
                for stream in streams:
                    stream.begin()
                async with asyncio.timeout(job.limits.wall_s + GRACE_S):
                    answer = await loop.sock_recv(self._link, _CHUNK)
            except BaseException as error:
                self._forget()
                if isinstance(error, OSError):  # a time-out, which says nothing, is one
                    reason = str(error) or "it kept on running past its limits"
                    raise BoxDied(reason) from None
                raise
            for stream in streams:
                stream.drain()
        if not answer:
            self._forget()
            raise BoxDied("its warm process ended")
        end = json.loads(answer)
        if "failed" in end:
            self._forget()
            raise BoxDied(end["failed"])
        return read_end(job, end, [bytes(stream.text) for stream in streams], self._name)

    async def close(self) -> None:
        """End the warm process and all that runs under it."""
        self._forget()
        process, self._process = self._process, None
        if process is not None:
            await asyncio.to_thread(_wait, process)

    def _forget(self) -> None:
        """Close the socket, whose end makes the warm process end its job and itself."""
        link, self._link = self._link, None
        if link is not None:
            link.close()

    def _kill(self) -> None:
        if self._link is not None:
            with contextlib.suppress(OSError):
                self._link.send(_KILL)

    def _outside(self) -> list[str]:
        """The command line of bubblewrap: an empty root with /usr in it, read-only."""
        words = [self._bwrap, "--unshare-all", "--unshare-user", "--die-with-parent"]
        words += ["--new-session", "--clearenv", "--hostname", "box"]
        words += ["--uid", "0", "--gid", "0", "--cap-add", "ALL"]
        words += ["--ro-bind", "/usr", "/usr", "--ro-bind-try", *["/etc/ld.so.cache"] * 2]
        for name in ("bin", "lib", "lib64", "sbin"):
            path = Path("/", name)
            if path.is_symlink():
                words += ["--symlink", os.readlink(path), str(path)]
            elif path.exists():
                words += ["--ro-bind", str(path), str(path)]
        prefix = Path(self._python).parent.parent
        if not prefix.is_relative_to("/usr"):
            words += ["--ro-bind", str(prefix), str(prefix)]
        # Not bubblewrap's own /dev, which has terminals and a folder that jobs could share.
        words += ["--tmpfs", "/dev", "--symlink", "/tmp", "/dev/shm"]
        for name in _DEVICES:
            words += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
        # Reads as the real one does, of which a program could map memory that nothing counts.
        words += ["--dev-bind", "/dev/full", "/dev/zero"]
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            words += ["--symlink", f"/proc/self/fd/{number}", f"/dev/{name}"]
        words += ["--symlink", "/proc/self/fd", "/dev/fd", "--remount-ro", "/dev"]
        words += ["--proc", "/proc", "--dir", "/tmp", "--remount-ro", "/"]
        for key, value in ENVIRONMENT.items():
            words += ["--setenv", key, value]
        return words


class _Stream:
    """A pipe out of the box, read as it fills, until it is over a limit."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, most_bytes: int, over: Callable[[], None]
    ) -> None:
        self._loop, self._most_bytes, self._over = loop, most_bytes, over
        self._ours, self.theirs = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._ours, False)
        self.text = bytearray()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.remove_reader(self._ours)
        for end in (self._ours, self.theirs):
            with contextlib.suppress(OSError):
                os.close(end)

    def begin(self) -> None:
        """Read from now on; our copy of the other end is closed."""
        os.close(self.theirs)
        self.theirs = -1
        self._loop.add_reader(self._ours, self._read)

    def drain(self) -> None:
        """Read what is left, when nobody is left to write more."""
        while self._take() and not self.is_over:
            pass

    @property
    def is_over(self) -> bool:
        """Was more written than is kept?"""
        return len(self.text) > self._most_bytes

    def _read(self) -> None:
        if not self._take():
            self._loop.remove_reader(self._ours)
        elif self.is_over:
            self._loop.remove_reader(self._ours)
            self._over()

    def _take(self) -> bool:
        try:
            text = os.read(self._ours, _CHUNK)
        except BlockingIOError:
            return False
        self.text += text
        return bool(text)


@contextlib.contextmanager
def _sealed(content: bytes) -> Iterator[int]:
    """A file in memory that nobody can change."""
    file = os.memfd_create("sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(file, left) :]
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
        os.lseek(file, 0, os.SEEK_SET)
        yield file
    finally:
        os.close(file)


def _cannot_start(words: BinaryIO) -> str:
    words.seek(0)
    lines = words.read().decode(errors="replace").split("\n")
    said = next((line.strip() for line in reversed(lines) if line.strip()), "it does not answer")
    return (
        f"the sandbox cannot start, and nothing is run without it: {said}. "
        "It needs user namespaces: allow them (sysctl user.max_user_namespaces, "
        "kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns), give a "
        "container --security-opt seccomp=unconfined --security-opt systempaths=unconfined, or use "
        "a virtual machine"
    )


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
