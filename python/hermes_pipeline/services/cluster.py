"""The same work on other machines: workers on a Ray cluster, lost ones replaced.

A worker is an actor that opens, on its node, what the caller would have opened here: an async
context manager that gives an async function. Items go to the worker with the fewest in flight. When
a node dies, what its workers had in flight goes to others, and new workers take their place where
there is room; none of this is left to Ray's own retries, which wait for ever where there is none.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Generic, TypeVar

from hermes_pipeline.config import Range
from hermes_pipeline.errors import UserError

Item = TypeVar("Item")
Made = TypeVar("Made")
Work = Callable[[Item], Awaitable[Made]]
# Opens the work on a node; told how many workers there are, so that they can share a rate.
Open = Callable[[int], AbstractAsyncContextManager[Work[Item, Made]]]

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0  # before a worker is started in a lost one's place
PATIENCE_S = 180.0  # without any worker, and without one that is getting ready
PROBE_S = 60.0  # for a first connection
CLOSE_S, CONNECT_S = 20.0, 10.0
MOST_LOST = 5  # workers under one item, the last with nothing beside it: then it is the item
SHOWN = 1000  # characters of what went wrong
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
MOST_IN_FLIGHT = 100_000  # of one worker: who gives it items keeps the bound


@dataclass(frozen=True, slots=True)
class Cluster:
    """[ray]: other machines to work on."""

    address: str | None = None  # "auto", host:port, or ray://host:port; None for this process alone
    workers: Annotated[int, Range(low=1)] | None = None  # one for each GPU asked for, or node
    cpus: Annotated[float, Range(low=0)] = 0.1  # of each worker; leave room for replacements
    gpus: Annotated[float, Range(low=0)] | None = None  # one for a served model, if there are any

    def __post_init__(self) -> None:
        given = [each.name for each in fields(self) if getattr(self, each.name) != each.default]
        if given and self.address is None:
            raise ValueError(f"{given[0]} wants address: give it, too, or leave {given[0]} out")


class WorkerBroken(Exception):
    """A worker can do nothing any more; others may."""


class ItemLost(Exception):
    """Worker after worker was lost under an item; the message says how the last one was."""


class _Worker:
    """What runs on a node."""

    def __init__(self, opening: Open[Any, Any], workers: int) -> None:
        self._opening, self._workers = opening, workers
        self._stack = AsyncExitStack()

    async def be_there(self) -> None:
        """Nothing: who waits for it learns that the worker has found room."""

    async def open(self, environment: Mapping[str, str]) -> BaseException | None:
        """Get ready; what stands against it as a value."""
        os.environ.update(environment)
        try:
            self._work = await self._stack.enter_async_context(self._opening(self._workers))
        except Exception as error:
            return error
        return None

    async def run(self, item: Any) -> tuple[Any, BaseException | None]:
        """What came of an item; errors as values, so that they arrive as what they are."""
        try:
            return await self._work(item), None
        except Exception as error:
            return None, error

    async def close(self) -> None:
        await self._stack.aclose()


@asynccontextmanager
async def on_ray(
    opening: Open[Item, Made],
    cluster: Cluster,
    *,
    gpus: float = 0.0,
    deadline_s: float,
    environment: Mapping[str, str],
    tell: Callable[[str], object],
) -> AsyncIterator[Work[Item, Made]]:
    """Does what ``opening`` would open here on the workers of a Ray cluster.

    Args:
        opening: pickled, and called once by each worker, with the number of workers.
        gpus: of each worker where the cluster has any; ``cluster.gpus`` stands over it.
        deadline_s: of one item; a worker that is silent for longer is given up, the item is not.
        environment: variables that workers want, such as keys; Ray keeps and shows none of them.
        tell: takes what happens to workers, in a line.

    Raises:
        UserError: no Ray, no cluster there, no room in it, or no worker for `PATIENCE_S`.
    """
    ray = await _connect(cluster.address or "auto")
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        there = sum(node.get("GPU", 0) for node in nodes)
        gpus = min(gpus, there) if cluster.gpus is None else cluster.gpus
        count = cluster.workers or max(1, int(there // gpus) if gpus else len(nodes))
        remote = ray.remote(_Worker).options(
            num_cpus=cluster.cpus,
            num_gpus=gpus,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=MOST_IN_FLIGHT,
            scheduling_strategy="SPREAD",
        )
        start = functools.partial(remote.remote, opening, count)
        pool: _Pool[Item, Made] = _Pool(ray, start, count, deadline_s, environment, tell)
        try:
            yield pool.work
        finally:
            await pool.close()
    finally:
        ray.shutdown()


@dataclass(slots=True, eq=False)
class _Live:
    """A worker that takes items."""

    actor: Any
    lost: asyncio.Event
    in_flight: int = 0
    suspects: list[int] = field(default_factory=list)  # the most in flight that each may be among

    def has_room(self, company: int) -> bool:
        return self.in_flight < min([company, *self.suspects])


class _Pool(Generic[Item, Made]):
    """The workers of one run: each place is filled again when its worker is lost."""

    def __init__(
        self,
        ray: Any,
        start: Callable[[], Any],
        count: int,
        deadline_s: float,
        environment: Mapping[str, str],
        tell: Callable[[str], object],
    ) -> None:
        self._ray, self._start, self._deadline_s = ray, start, deadline_s
        self._environment, self._tell = environment, tell
        self._live: list[_Live] = []
        self._changed = asyncio.Event()
        self._suspects = 0  # items that wait for a worker with little in flight
        self._getting_ready = 0  # workers that have found room
        self._failed = 0  # workers that could not get ready
        self._has_worked = False  # has any got ready?
        self._problem: BaseException | str = "none has found room"
        self._lost: tuple[type[Exception], ...] = (
            ray.exceptions.RayError,
            TimeoutError,
            WorkerBroken,
        )
        self._places = [asyncio.create_task(self._fill()) for _ in range(count)]

    async def work(self, item: Item) -> Made:
        """What a worker makes of an item, however many workers are lost on the way.

        All that was in flight on a lost worker is suspect. With each loss a suspect may be among
        fewer, at last alone: one item that breaks workers takes no other along.

        Raises:
            UserError: there is no worker, and has been none for long.
            ItemLost: `MOST_LOST` workers were lost under it.
        """
        for left in reversed(range(MOST_LOST)):
            suspect = left < MOST_LOST - 1
            company = 4**left if suspect else MOST_IN_FLIGHT
            worker = await self._choose(company)
            worker.in_flight += 1
            if suspect:
                worker.suspects.append(company)
            try:
                async with asyncio.timeout(self._deadline_s):
                    made, error = await worker.actor.run.remote(item)
                if isinstance(error, WorkerBroken):
                    raise error
            except self._lost as lost:
                self._give_up(worker, lost)
                continue
            finally:
                worker.in_flight -= 1
                if suspect:
                    worker.suspects.remove(company)
                self._changed.set()
            if error is not None:
                raise error
            return made  # type: ignore[no-any-return]
        raise ItemLost(f"{MOST_LOST} workers were lost under it, the last: {_line(self._problem)}")

    async def close(self) -> None:
        for place in self._places:
            place.cancel()
        await asyncio.gather(*self._places, return_exceptions=True)
        await asyncio.gather(*(self._close(worker.actor) for worker in self._live))

    async def _close(self, actor: Any) -> None:
        with contextlib.suppress(*self._lost):
            async with asyncio.timeout(CLOSE_S):
                await actor.close.remote()
        self._end(actor)

    async def _choose(self, company: int) -> _Live:
        """The worker with the fewest items, at most ``company`` with this one; suspects first."""
        suspect = company < MOST_IN_FLIGHT
        self._suspects += suspect
        try:
            while True:
                await self._be_live()
                roomy = [worker for worker in self._live if worker.has_room(company)]
                if roomy and (suspect or not self._suspects):
                    return min(roomy, key=lambda worker: worker.in_flight)
                self._changed.clear()
                await self._changed.wait()
        finally:
            if suspect:
                self._suspects -= 1
                self._changed.set()

    async def _be_live(self) -> None:
        """Wait for a worker."""
        while not self._live:
            hopeless = not self._has_worked and not self._getting_ready
            if hopeless and self._failed >= len(self._places):
                raise UserError(f"no Ray worker became ready: {_line(self._problem)}")
            self._changed.clear()
            try:
                async with asyncio.timeout(None if self._getting_ready else PATIENCE_S):
                    await self._changed.wait()
            except TimeoutError:
                free = self._ray.available_resources()
                raise UserError(
                    f"no worker on Ray for {PATIENCE_S:.0f} s: {_line(self._problem)}; free there: "
                    f"{free.get('CPU', 0):g} CPUs, {free.get('GPU', 0):g} GPUs"
                ) from None

    async def _fill(self) -> None:
        """Keep one place filled."""
        pause_s = FIRST_PAUSE_S
        while True:
            worker: _Live | None = None
            try:
                worker = _Live(self._start(), asyncio.Event())
                problem = await self._open(worker.actor)
            except Exception as error:  # one that cannot be pickled, too
                problem = error
            except BaseException:
                if worker is not None:
                    self._end(worker.actor)
                raise
            if problem is None and worker is not None:
                self._has_worked, pause_s = True, FIRST_PAUSE_S
                self._live.append(worker)
                self._changed.set()
                self._tell(f"{len(self._live)} of {len(self._places)} workers on Ray are ready")
                await worker.lost.wait()
            else:
                if worker is not None:
                    self._end(worker.actor)
                self._failed, self._problem = self._failed + 1, problem or self._problem
                self._changed.set()
            await asyncio.sleep(pause_s)
            pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)

    async def _open(self, actor: Any) -> BaseException | None:
        """Get a worker ready; what stands against it."""
        await actor.be_there.remote()
        self._getting_ready += 1
        self._changed.set()
        try:
            problem: BaseException | None = await actor.open.remote(self._environment)
        finally:
            self._getting_ready -= 1
            self._changed.set()
        return problem

    def _give_up(self, worker: _Live, lost: Exception) -> None:
        """Ask this worker nothing more."""
        if worker in self._live:
            self._problem = lost
            self._live.remove(worker)
            self._end(worker.actor)
            worker.lost.set()
            self._tell(
                f"a worker on Ray was lost, and {len(self._live)} are left: {_line(lost)}; its "
                f"work goes to others"
            )

    def _end(self, actor: Any) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(actor)


async def _connect(address: str) -> Any:
    """Ray, connected to a cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Pages on a node that has died; what it means to this run is said by `tell`.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    if importlib.util.find_spec("ray") is None:
        raise UserError(
            "--ray wants Ray, which is not installed: pip install 'hermes4-core[ray]', on every "
            "node of the cluster"
        )
    try:
        _knock(address)
        await _probe(address)
        import ray

        ours = signal.getsignal(signal.SIGTERM)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        signal.signal(signal.SIGTERM, ours)  # Ray's would end us where we stand
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"no Ray cluster at {address}: {_line(error)}") from None
    return ray


def _knock(address: str) -> None:
    """Raise `OSError` if nobody listens there."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()


async def _probe(address: str) -> None:
    """Connect in another process first: where there is no Ray, it tries for an hour, deaf to all.

    Raises:
        ConnectionError: it could not, in `PROBE_S`.
    """
    words = [sys.executable, "-P", "-c", _PROBE, address]
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(
        *words, stdin=quiet, stdout=quiet, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(PROBE_S):
            _, said = await process.communicate()
    except TimeoutError:
        raise ConnectionError(f"what is there is no Ray that answers in {PROBE_S:.0f} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise ConnectionError(said.decode(errors="replace").strip().rpartition("\n")[2])


_PROBE = """
import logging, sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
ray.shutdown()
"""


def _line(problem: BaseException | str) -> str:
    """A problem in one line; of a remote traceback its last one."""
    if isinstance(problem, TimeoutError):
        return "a worker was silent for too long"
    text = _COLOURS.sub("", str(problem)).strip()
    last = text.rpartition("\n")[2]
    if "Traceback" in text or re.match(r"[\w.]+Error: ", last):
        text = last
    return " ".join(text.split())[:SHOWN]
