"""A box of containers, by docker or podman: a fresh one for each job, the next one started ahead.

The program inside is `contained.py`. Its standard input is a life line: when we end, however we
do, it closes, the container ends, and the engine removes it. No file of the machine is in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hermes_pipeline.errors import UserError
from hermes_pipeline.services.sandbox.jobs import BoxDied, Job, Limits, Result
from hermes_pipeline.services.sandbox.programs import text_of
from hermes_pipeline.services.sandbox.seccomp import build_filter
from hermes_pipeline.services.sandbox.wire import (
    ENVIRONMENT,
    FIRST_USER,
    GRACE_S,
    READY_S,
    pack_job,
    read_end,
)

ENGINES = ("podman", "docker")
IMAGE = "docker.io/library/python:3.11-slim"
LABEL = "hermes4.sandbox"  # its value is the id of the process that started the container
ROOM_BYTES = 256 << 20  # for the first process and what it keeps of a job
LEAST_PIDS = 16  # threads of the engine's own, as it starts a container
SHARED_BYTES = 8 << 20  # in /dev/shm, which the standard library needs for semaphores
_VERSIONS = {"podman": "{{.Client.Version}}", "docker": "{{.Server.Version}}"}
_REFUSED = "the sandbox cannot start, and nothing is run without it: "


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine that runs containers, and an image of it."""

    program: str  # its path
    name: str  # docker or podman
    version: str
    is_rootless: bool
    image: str  # as it was asked for
    image_id: str

    @property
    def title(self) -> str:
        """Names and versions, and the digest of the image's configuration."""
        return f"{self.name} {self.version}, image {self.image} ({self.image_id})"


async def find_engine(name: str, image: str) -> Engine:
    """Ask an engine for its version and the image.

    Args:
        name: docker or podman.

    Raises:
        UserError: it is not installed, does not answer, or does not have the image.
    """
    program = shutil.which(name)
    if program is None:
        raise UserError(f"{_REFUSED}there is no {name}; install it, or choose another box")
    code, version = await _ask(program, "version", "--format", _VERSIONS[name])
    if code != 0:
        raise UserError(f"{_REFUSED}{name} does not answer: {version}")
    code, found = await _ask(program, "image", "inspect", "--format", "{{.Id}}", image)
    if code != 0:
        raise UserError(f"{_REFUSED}{name} has no image {image}; get it: {name} pull {image}")
    rootless = "false"
    if name == "podman":
        _, rootless = await _ask(program, "info", "--format", "{{.Host.Security.Rootless}}")
    image_id = found if found.startswith("sha256:") else f"sha256:{found}"
    return Engine(program, name, version, rootless == "true", image, image_id)


@dataclass(eq=False)
class _Started:
    """A container that waits for its job, or has it."""

    name: str
    limits: Limits
    process: asyncio.subprocess.Process
    python: str = ""

    @property
    def stdin(self) -> asyncio.StreamWriter:
        assert self.process.stdin is not None
        return self.process.stdin

    @property
    def stdout(self) -> asyncio.StreamReader:
        assert self.process.stdout is not None
        return self.process.stdout


class Container:
    """One container at a time, for one job; the next one starts while it runs.

    Args:
        slot: tells it from others of this machine's user: each has two user ids of its own, one
            for the container that runs and one for the next.
        engine: docker or podman.
        image: one with Python 3.9 or newer and `env`, for x86-64, which the engine has already.
    """

    def __init__(self, slot: int, *, engine: str, image: str = IMAGE) -> None:
        self._first_user = FIRST_USER + 2 * slot
        self._engine_name, self._image = engine, image
        self._engine: Engine | None = None
        self._next: asyncio.Task[_Started] | None = None
        self._next_limits = Limits()
        self._ending: set[asyncio.Task[None]] = set()
        self._started = 0
        self._name = engine

    @property
    def name(self) -> str:
        """Engine, image and digest, and the version of the Python inside."""
        return self._name

    @property
    def is_ready(self) -> bool:
        """Has it started, and not failed since?"""
        return self._next is not None

    async def start(self) -> None:
        """Find engine and image, start a first container and wait until it says hello.

        Raises:
            UserError: one of them failed, in its own words, with the way out.
        """
        await self.close()
        if self._engine is None:
            self._engine = await find_engine(self._engine_name, self._image)
        self._next = asyncio.create_task(self._start(self._next_limits))
        try:
            first = await asyncio.shield(self._next)
        except BaseException as error:
            await self.close()
            if isinstance(error, BoxDied):
                raise UserError(f"{_REFUSED}{error}") from None
            raise
        self._name = f"{self._engine.title}, Python {first.python}"

    async def run(self, job: Job) -> Result:
        """Run a job; when this is cancelled, the container ends with it.

        Raises:
            BoxDied: the container did not start, ended, failed inside, or did not keep its limits.
        """
        ours = await self._take(job.limits)
        self._next_limits = job.limits
        self._next = asyncio.create_task(self._start(job.limits))
        try:
            async with asyncio.timeout(job.limits.wall_s + GRACE_S):
                end, streams = await _exchange(ours, job)
        except TimeoutError:
            raise BoxDied("it kept on running past its limits") from None
        except (OSError, asyncio.IncompleteReadError, ValueError):
            said = await _said(ours.process)
            raise BoxDied(said or "its container ended without an answer") from None
        finally:
            self._let_end(ours)
        if "failed" in end:
            raise BoxDied(end["failed"])
        return read_end(job, end, streams, self._name)

    async def close(self) -> None:
        """End what is left of every container."""
        waiting = self._next
        if waiting is not None:
            # Not cancelled: an engine that is killed at the wrong moment leaves a container.
            await asyncio.wait({waiting})
            self._next = None
            with contextlib.suppress(BoxDied):
                self._let_end(waiting.result())
        while self._ending:
            await asyncio.wait(self._ending)

    async def _take(self, limits: Limits) -> _Started:
        """The container that waits, or a new one where its limits are others."""
        while True:
            waiting = self._next
            assert waiting is not None
            await asyncio.wait({waiting})
            self._next = None
            ours = waiting.result()
            if _fixed(ours.limits) == _fixed(limits):
                return ours
            self._let_end(ours)
            self._next = asyncio.create_task(self._start(limits))

    async def _start(self, limits: Limits) -> _Started:
        assert self._engine is not None
        self._started += 1
        user = self._first_user + self._started % 2
        name = f"hermes4-sandbox-{os.getpid()}-{id(self)}-{self._started}"
        try:
            process = await asyncio.create_subprocess_exec(
                self._engine.program,
                *run_words(self._engine, limits, name=name, user=user),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                cwd="/",
                start_new_session=True,  # Ctrl-C is for us, who then end it
            )
        except OSError as error:
            raise BoxDied(f"{self._engine.name}: {error.strerror}") from None
        started = _Started(name, limits, process)
        try:
            async with asyncio.timeout(READY_S):
                hello = await started.stdout.readline()
            if not hello:
                said = await _said(process)
                raise BoxDied(said or f"{self._engine.name} ended and says nothing")
            started.python = json.loads(hello)["python"]
        except BaseException as error:
            self._let_end(started)
            if isinstance(error, TimeoutError):
                raise BoxDied(f"a container was not there after {READY_S:g} s") from None
            raise
        return started

    def _let_end(self, started: _Started) -> None:
        """Cut its life line, and see to its end beside what else goes on."""
        started.stdin.close()
        task = asyncio.create_task(self._end(started))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _end(self, started: _Started) -> None:
        assert self._engine is not None
        try:
            async with asyncio.timeout(GRACE_S):
                await _drain(started.stdout)
                await started.process.wait()
        except TimeoutError:
            await _ask(self._engine.program, "rm", "--force", "--volumes", started.name)
            with contextlib.suppress(ProcessLookupError):
                started.process.kill()
            await started.process.wait()


def run_words(engine: Engine, limits: Limits, *, name: str, user: int) -> list[str]:
    """The command line of one container, after the engine's name."""
    words = ["run", "--rm", "--interactive", "--pull", "never", "--name", name]
    words += ["--label", f"{LABEL}={os.getpid()}", "--hostname", "box", "--network", "none"]
    words += ["--user", f"{user}:{user}", "--cap-drop", "all"]
    words += ["--security-opt", "no-new-privileges", "--read-only", "--ipc", "none"]
    memory = limits.memory_bytes + limits.file_bytes + SHARED_BYTES + ROOM_BYTES
    words += ["--memory", str(memory), "--memory-swap", str(memory)]  # with swap: none of it
    pids = max(limits.processes + 1, LEAST_PIDS)  # with the first one
    words += ["--pids-limit", str(pids), "--oom-score-adj", "1000"]
    # Else podman asks for more than it may give. The program's own are set inside.
    for ulimit in ("core=0:0", "nofile=1024:1024", "nproc=1024:1024"):
        words += ["--ulimit", ulimit]
    if engine.name == "podman":
        words += ["--read-only-tmpfs=false", "--http-proxy=false"]
    words += _memory_at("/tmp", limits.file_bytes, limits.files, engine)
    words += _memory_at("/dev/shm", SHARED_BYTES, limits.processes, engine)
    words += ["--entrypoint", "/usr/bin/env", engine.image_id, "-i"]
    words += [f"{key}={value}" for key, value in ENVIRONMENT.items()]
    return [*words, "python3", "-s", "-S", "-c", text_of("contained"), build_filter().hex()]


def _memory_at(path: str, size_bytes: int, files: int, engine: Engine) -> Sequence[str]:
    """Files in memory at a path; how many there may be, where the engine can limit that."""
    if engine.is_rootless:
        return ["--tmpfs", f"{path}:rw,nosuid,nodev,size={size_bytes},mode=1777"]
    # Not --tmpfs, by which podman takes no number of files. It goes with the container.
    room = f"size={size_bytes},nr_inodes={files},mode=1777,nosuid,nodev"
    options = ["type=tmpfs", "device=tmpfs", f"o={room}"]
    mount = f"type=volume,destination={path}"
    return ["--mount", ",".join([mount, *(f'"volume-opt={option}"' for option in options)])]


async def _exchange(started: _Started, job: Job) -> tuple[dict[str, Any], list[bytes]]:
    """Hand a job in; return how it ended and its streams."""
    given = [pack_job(job), job.stdin]
    head = {
        "limits": asdict(job.limits),
        "streams": 3 if job.function else 2,
        "sizes": list(map(len, given)),
    }
    started.stdin.writelines([json.dumps(head).encode(), b"\n", *given])
    await started.stdin.drain()
    end = json.loads(await started.stdout.readline())
    return end, [await started.stdout.readexactly(size) for size in end.pop("sizes")]


def _fixed(limits: Limits) -> tuple[int, ...]:
    """The limits that a container has from its start."""
    return limits.memory_bytes, limits.processes, limits.file_bytes, limits.files


async def _ask(program: str, *words: str) -> tuple[int, str]:
    """Exit code of a command, and the last line it wrote."""
    process = await asyncio.create_subprocess_exec(
        program,
        *words,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(READY_S):
            said, _ = await process.communicate()
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if isinstance(error, TimeoutError):
            return 1, f"nothing after {READY_S:g} s"
        raise
    assert process.returncode is not None
    return process.returncode, _last_line(said)


async def _said(process: asyncio.subprocess.Process) -> str:
    """What an engine that has ended wrote of an error."""
    assert process.stderr is not None
    try:
        async with asyncio.timeout(GRACE_S):
            return _last_line(await process.stderr.read())
    except TimeoutError:  # it has not ended
        return ""


async def _drain(stream: asyncio.StreamReader) -> None:
    while await stream.read(1 << 16):
        pass


def _last_line(said: bytes) -> str:
    """The last line that speaks of an error, else the last one."""
    lines = [line.strip() for line in said.decode(errors="replace").split("\n") if line.strip()]
    told = [line for line in lines if "error" in line.lower()]
    return (told or lines or [""])[-1]
