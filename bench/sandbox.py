"""Isolated runs of a trivial program: warm boxes, cold bubblewrap, and no isolation at all."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator

from bench.harness import Result
from hermes_pipeline.services.sandbox import Case, Sandbox
from hermes_pipeline.services.sandbox.programs import find_bwrap, find_python

SOURCE = "n = int(input())\nprint(sum(range(n)))"
STDIN, STDOUT = b"12\n", "66\n"
FUNCTION = "def total(n): return sum(range(n))"
LOOK_OUTSIDE = "import os\nprint(os.path.exists('/etc/passwd'))"
WORKERS = 2
RUNS = 100  # of the program, in one round
ROUNDS = 20
NOBODY = 65534

Run = Callable[[str], Awaitable[str]]  # a program's output


def run() -> Iterator[Result | str]:
    """Runs a second of wall time; every output is checked."""
    with asyncio.Runner() as runner:
        warm = Sandbox(workers=WORKERS)
        ways = {"cold bubblewrap": cold(isolated()), "python, no isolation": cold([])}
        try:
            runner.run(gate(in_sandbox(warm), ways))
            yield f"gate passed: {STDOUT.strip()} every way, and neither box shows /etc/passwd"
            yield f"{RUNS} runs in each round, runs a second of wall time\n"
            results = {f"sandbox, {n} at a time": (in_sandbox(warm), n) for n in (WORKERS, 1)}
            results |= {
                f"{name}, {WORKERS} at a time": (way, WORKERS) for name, way in ways.items()
            }
            told = {}
            for name, (way, at_once) in results.items():
                told[name] = result(
                    name, [runner.run(round_of(way, at_once)) for _ in range(ROUNDS)]
                )
                yield told[name]
            yield result(
                "sandbox, cases of a function", [runner.run(cases(warm)) for _ in range(ROUNDS)]
            )
            ours, peer = (
                told[f"{name}, {WORKERS} at a time"] for name in ("sandbox", "cold bubblewrap")
            )
            yield f"\nsandbox: {ours.value / peer.value:.1f} x cold bubblewrap"
        finally:
            runner.run(warm.__aexit__(None, None, None))


def in_sandbox(sandbox: Sandbox) -> Run:
    """With everything that the sandbox limits and watches."""

    async def run_one(source: str) -> str:
        return (await sandbox.run(source, stdin=STDIN)).stdout

    return run_one


def cold(before: list[str]) -> Run:
    """A fresh Python for each run, behind the words of ``before``; no filter, no limits."""
    command = [*before, find_python(), "-I", "-S", "-c"]
    user = NOBODY if os.geteuid() == 0 else None

    async def run_one(source: str) -> str:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command, source, stdin=pipe, stdout=pipe, cwd="/", user=user, group=user
        )
        out, _ = await process.communicate(STDIN)
        return out.decode()

    return run_one


def isolated() -> list[str]:
    """What a user would give to bubblewrap."""
    words = [find_bwrap(), "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"]
    words += ["--cap-drop", "ALL", "--ro-bind", "/usr", "/usr", "--proc", "/proc", "--dev", "/dev"]
    for name in ("bin", "lib", "lib64"):
        words += ["--symlink", f"usr/{name}", f"/{name}"]
    return [*words, "--tmpfs", "/tmp", "--chdir", "/tmp", "--"]


async def round_of(way: Run, at_once: int) -> float:
    """Runs a second; stop at a wrong output."""
    left = iter(range(RUNS))

    async def work() -> None:
        for _ in left:
            if await way(SOURCE) != STDOUT:
                raise SystemExit("a run gives a wrong output")

    begun = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(at_once)))
    return RUNS / (time.perf_counter() - begun)


async def cases(sandbox: Sandbox) -> float:
    """Cases a second of one function."""
    begun = time.perf_counter()
    results = await sandbox.run_cases(FUNCTION, "total", [Case([n]) for n in range(RUNS)])
    seconds = time.perf_counter() - begun
    if [x.value for x in results] != [sum(range(n)) for n in range(RUNS)]:
        raise SystemExit("a case gives a wrong value")
    return RUNS / seconds


async def gate(ours: Run, ways: dict[str, Run]) -> None:
    """Stop unless every way runs the program, and those that isolate do."""
    for way in (ours, *ways.values()):
        await round_of(way, 1)
    for way in (ours, ways["cold bubblewrap"]):
        if await way(LOOK_OUTSIDE) != "False\n":
            raise SystemExit("a box shows /etc/passwd")


def result(name: str, rates: list[float]) -> Result:
    return Result(
        op="sandbox",
        shape="a trivial program",
        dtype="Python",
        backend=name,
        unit="runs/s",
        value=statistics.median(rates),
        spread=(min(rates), max(rates)),
        runs=len(rates),
        notes=f"{1e3 / statistics.median(rates):.1f} ms a run",
    )
