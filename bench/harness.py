"""What every benchmark shares: timing, the machine it ran on, and how a result is told."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from bench.lengths import ROW_LENGTH
from hermes_core import _C, __version__  # noqa: TID251 - only to say which ISA ran

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of several runs, by the wall and of the CPU, which other work disturbs least."""

    each_cpu_s: tuple[float, ...]
    each_wall_s: tuple[float, ...]

    @property
    def cpu_s(self) -> float:
        return statistics.median(self.each_cpu_s)

    @property
    def wall_s(self) -> float:
        return statistics.median(self.each_wall_s)

    @property
    def fastest_s(self) -> float:
        return min(self.each_cpu_s)

    @property
    def slowest_s(self) -> float:
        return max(self.each_cpu_s)

    @property
    def runs(self) -> int:
        return len(self.each_cpu_s)

    def times(self, other: Timing) -> float:
        """How many times as long as another took: the median over rounds in which both went.

        Of the medians where one of them ran once.
        """
        if 1 in (self.runs, other.runs):
            return self.cpu_s / other.cpu_s
        pairs = zip(self.each_cpu_s, other.each_cpu_s, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


@dataclass(frozen=True, slots=True)
class Result:
    """One measured figure; ``value`` and ``spread`` (of the runs) are in ``unit``."""

    op: str
    shape: str
    dtype: str
    backend: str
    unit: str
    value: float
    spread: tuple[float, float]
    runs: int
    notes: str = ""


def chosen(shapes: list[T], only: str) -> list[T]:
    """Those that have this in their name."""
    found = [shape for shape in shapes if only in str(shape)]
    if not found:
        raise SystemExit(f"no shape has {only!r} in its name: {'; '.join(map(str, shapes))}")
    return found


def measure(call: Callable[[], object], *, runs: int = 20) -> Timing:
    """So many runs of a call, after one that is not counted."""
    call()
    return _timing([_timed(call) for _ in range(runs)])


def by_turns(calls: Sequence[Callable[[], object]], *, runs: int) -> list[Timing]:
    """So many rounds over all calls, so that a slow minute of the machine meets all of them.

    Each is called twice in a round and timed the second time: it finds caches, and memory that a
    virtual machine's host would have to find anew, as it leaves them itself.
    """
    rounds = []
    for _ in range(runs):
        of_round = []
        for call in calls:
            call()
            of_round.append(_timed(call))
        rounds.append(of_round)
    return [_timing(of_call) for of_call in zip(*rounds, strict=True)]


def _timed(call: Callable[[], object]) -> tuple[float, float]:
    """CPU and wall seconds of a call; what it gives is dropped after the clock has stopped."""
    started, clock = time.process_time(), time.perf_counter()
    result = call()
    seconds = time.process_time() - started, time.perf_counter() - clock
    del result
    return seconds


def _timing(runs: Sequence[tuple[float, float]]) -> Timing:
    cpu, wall = zip(*runs, strict=True)
    return Timing(cpu, wall)


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Memory that a call takes at its peak, its result included; None if the kernel tells not.

    In a process of its own, which holds nothing from before; so ``call`` must be picklable.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as other:
        return other.submit(_peak, call).result()


def _peak(call: Callable[[], object]) -> int | None:
    try:
        before = memory_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what it is now
        kept = call()
        peak = memory_bytes("VmHWM") - before
    except OSError:
        return None
    del kept
    return peak


def row_result(backend: str, rows: int, timing: Timing, tokens: int, notes: str = "") -> Result:
    """Tokens of batches of so many rows, for each second of CPU time."""
    return Result(
        op="rows",
        shape=f"{rows} x {ROW_LENGTH}",
        dtype="uint32 ids in",
        backend=backend,
        unit="M tokens/CPU-s",
        value=tokens / timing.cpu_s / 1e6,
        spread=(tokens / timing.slowest_s / 1e6, tokens / timing.fastest_s / 1e6),
        runs=timing.runs,
        notes=f"{notes}; wall {tokens / timing.wall_s / 1e6:,.0f}".removeprefix("; "),
    )


def machine() -> dict[str, Any]:
    """Where and with what the figures of this run were measured."""
    packages = {"hermes4-core": __version__, "python": platform.python_version()}
    peers = ("seqpacker", "lightbinpack", "binpacking", "trl", "transformers", "grain")
    clients = ("aiohttp", "orjson", "openai", "httpx")
    flash = ("flash-attn-4", "flash-attn-3", "fa3-fwd", "flash-attn", "nvidia-cudnn-cu13")
    for name in ("numpy", "torch", "triton", *peers, *clients, *flash):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "device": _cpu_model(),
        **_gpu(),
        "cores": len(os.sched_getaffinity(0)),
        "isa": _C.active_isa(),
        "versions": packages,
        "commit": _commit(),
    }


def tell(results: Iterator[Result | str], *, as_json: bool) -> None:
    """Print each result when it is there: for a person, or as a line of JSON."""
    about = machine()
    if not as_json:
        packages = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
        gpu = f"{about['gpu']}; " if "gpu" in about else ""
        print(f"{gpu}{about['device']}, {about['cores']} cores, {about['isa']}; {packages}")
        clock = "on the GPU, of its time; else " if gpu else ""
        print(f"commit {about['commit']}; medians (fastest to slowest run), {clock}of CPU time")
    for result in results:
        if isinstance(result, str):
            print(result, file=sys.stderr if as_json else sys.stdout, flush=True)
        elif as_json:
            print(json.dumps(asdict(result) | about), flush=True)
        else:
            low, high = result.spread
            print(
                f"{result.backend:34} {result.value:10,.2f} {result.unit} "
                f"({low:,.2f} to {high:,.2f}; {result.runs} runs)  {result.notes}",
                flush=True,
            )


def _gpu() -> dict[str, str]:
    """The GPU's name, where a benchmark has imported torch and there is one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    return {"gpu": torch.cuda.get_device_name()}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def memory_bytes(name: str) -> int:
    """Memory of this process, by its name in the kernel's words: VmRSS, VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
