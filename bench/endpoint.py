"""Calls of a client against a server that answers at once: what the client itself costs."""

from __future__ import annotations

import asyncio
import importlib
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection

from bench.endpoint_clients import OURS, PEERS, Call, Client
from bench.endpoint_server import TEXT, ask_counts, serving
from bench.harness import Result, memory_bytes

FEW, MANY = 256, 4096  # requests in flight
RUNS = 5


class WrongAnswer(Exception):
    """A client that gives one gets no time."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Several runs of so many calls each, in a process of their own."""

    calls: int
    wall_s: list[float]
    cpu_s: list[float]
    peak_bytes: int  # of the whole process

    @property
    def rate(self) -> float:
        return self.calls / statistics.median(self.wall_s)

    @property
    def cpu_us(self) -> float:
        return 1e6 * statistics.median(self.cpu_s) / self.calls


def run() -> Iterator[Result | str]:
    """Calls a second and CPU time of each, for every client that imports."""
    with serving() as (url, line):
        ours = measured(OURS, url, line, FEW)
        yield f"gate passed: {RUNS} x {ours.calls:,} calls, each sent once and answered in full\n"
        yield result(OURS, ours, FEW)
        theirs = {}
        for peer in PEERS:
            if (missing := lacks(peer)) is not None:
                yield f"{peer.name}: skipped, not importable ({missing})"
                continue
            theirs[peer.name] = measured(peer, url, line, FEW)
            yield result(peer, theirs[peer.name], FEW)
        yield ""
        for name, their in theirs.items():
            yield (
                f"Endpoint: {ours.rate / their.rate:.2f} x the calls a second of {name}, "
                f"{ours.cpu_us / their.cpu_us:.3f} of its CPU time a call"
            )
        many = measured(OURS, url, line, MANY)
        yield result(OURS, many, MANY)
        yield f"with {MANY:,} in flight {many.cpu_us / ours.cpu_us:.2f} x the CPU time of {FEW}"


def measured(client: Client, url: str, line: Connection, in_flight: int) -> Measured:
    """The client in a process of its own; stops when a call was lost or sent twice."""
    ask_counts(line)
    with ProcessPoolExecutor(1, get_context("spawn")) as other:
        try:
            figures = other.submit(_measure, client.name, url, in_flight).result()
        except* WrongAnswer:
            raise SystemExit(f"{client.name} gives a wrong answer: no time for it") from None
    sent, connections = ask_counts(line)
    wanted = figures.calls * (RUNS + 1)
    if sent != wanted or connections < in_flight:
        raise SystemExit(
            f"{client.name}: {sent} calls over {connections} connections reached the server, "
            f"where {wanted} over {in_flight} were wanted"
        )
    return figures


def lacks(client: Client) -> str | None:
    try:
        for module in client.modules:
            importlib.import_module(module)
    except ImportError as error:
        return str(error)
    return None


def result(client: Client, measured: Measured, in_flight: int) -> Result:
    rates = [measured.calls / wall for wall in measured.wall_s]
    return Result(
        op="endpoint",
        shape=f"{in_flight} in flight, 1 kB prompt, 2 kB answer",
        dtype="JSON",
        backend=f"{client.name}, {in_flight:,}",
        unit="calls/s",
        value=measured.rate,
        spread=(min(rates), max(rates)),
        runs=RUNS,
        notes=f"{measured.cpu_us:,.0f} µs CPU a call; {measured.peak_bytes / 1e6:,.0f} MB",
    )


def _measure(name: str, url: str, in_flight: int) -> Measured:
    client = next(each for each in (OURS, *PEERS) if each.name == name)
    return asyncio.run(_calls(client, url, in_flight))


async def _calls(client: Client, url: str, in_flight: int) -> Measured:
    wall, cpu = [], []
    calls = max(client.calls, 4 * in_flight)
    async with client.open(url, in_flight) as call:
        await _run(call, calls, in_flight)  # connections are open then
        for _ in range(RUNS):
            started, clock = time.process_time(), time.perf_counter()
            await _run(call, calls, in_flight)
            cpu.append(time.process_time() - started)
            wall.append(time.perf_counter() - clock)
    return Measured(calls, wall, cpu, memory_bytes("VmHWM"))


async def _run(call: Call, calls: int, in_flight: int) -> None:
    """So many calls, and never more than that in flight."""
    left = iter(range(calls))

    async def work() -> None:
        for _ in left:
            if await call() != TEXT:
                raise WrongAnswer

    async with asyncio.TaskGroup() as tasks:
        for _ in range(in_flight):
            tasks.create_task(work())
