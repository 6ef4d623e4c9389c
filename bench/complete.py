"""`hermes4 complete`: CPU time of a call, all in, and memory, where a server answers at once."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from bench.endpoint_server import serving
from bench.harness import Result
from hermes_pipeline.services.store_reader import read_results

DRAWS = 4
FEW, MANY = 250, 1_500  # conversations; between them start-up drops out
PROMPT_BYTES = 1_000
RUNS = 5
LIMIT_US = 250

# The same requests by the client alone: nothing is read, kept or shown.
CLIENT = """
import asyncio, json, sys
from hermes_pipeline.records import Message
from hermes_pipeline.services.endpoint import Endpoint, Sampling

async def main(url, path, draws, concurrency):
    texts = [json.loads(line)["prompt"] for line in open(path)]
    todo = enumerate((Message("user", text),) for text in texts for _ in range(draws))
    async def work():
        for seed, messages in todo:
            await endpoint.chat(messages, Sampling(), seed=seed)
    async with Endpoint(url, "tiny", concurrency=concurrency) as endpoint:
        await asyncio.gather(*(work() for _ in range(concurrency)))

asyncio.run(main(*sys.argv[1:3], *map(int, sys.argv[3:])))
"""


def run() -> Iterator[Result | str]:
    """CPU time of a call: `hermes4 complete` as a whole, and the client in it."""
    with tempfile.TemporaryDirectory() as name, serving() as (url, _):
        folder = Path(name)
        few, many = _prompts(folder / "few.jsonl", FEW), _prompts(folder / "many.jsonl", MANY)
        gate(url, few, folder)
        yield "gate passed: every draw is answered, and kept once"
        yield (
            f"{DRAWS * MANY:,} calls less {DRAWS * FEW:,}; prompts of {PROMPT_BYTES:,} bytes, "
            f"answers of about 2,000, n={DRAWS}\n"
        )
        for concurrency in (64, 256):

            def client(data: Path, out: Path, concurrency: int = concurrency) -> list[str]:
                return ["-c", CLIENT, url, str(data), str(DRAWS), str(concurrency)]

            def whole(data: Path, out: Path, concurrency: int = concurrency) -> list[str]:
                return _words(url, data, out, concurrency)

            yield _measured("the client alone", client, few, many, concurrency)
            all_in = _measured("hermes4 complete", whole, few, many, concurrency)
            yield all_in
            verdict = "within" if all_in.value <= LIMIT_US else "OVER"
            yield f"{concurrency} in flight: {verdict} the limit of {LIMIT_US} µs\n"


def gate(url: str, data: Path, folder: Path) -> None:
    """Refuse to measure a run that loses an answer."""
    out = folder / "gate"
    subprocess.run([sys.executable, *_words(url, data, out, 64)], check=True, capture_output=True)
    found = [r for of in read_results(out) for r in of.results if r.record and r.record["text"]]
    assert len(found) == DRAWS * FEW, f"{len(found)} answers, want {DRAWS * FEW}"


def _measured(
    backend: str,
    words: Callable[[Path, Path], list[str]],
    few: Path,
    many: Path,
    concurrency: int,
) -> Result:
    times, peaks = [], []
    for _ in range(RUNS):
        with tempfile.TemporaryDirectory() as name:
            short = _used(words(few, Path(name) / "few"))
            long = _used(words(many, Path(name) / "many"))
        times.append(1e6 * (long.cpu_s - short.cpu_s) / (DRAWS * (MANY - FEW)))
        peaks.append((short.peak_mb, long.peak_mb))
    before, after = (statistics.median(column) for column in zip(*peaks, strict=True))
    return Result(
        op="complete",
        shape=f"{concurrency} in flight",
        dtype="JSON",
        backend=f"{backend}, {concurrency} in flight",
        unit="µs CPU/call",
        value=statistics.median(times),
        spread=(min(times), max(times)),
        runs=RUNS,
        notes=f"peak {after:.1f} MB, of the fewer calls {before:.1f} MB",
    )


def _words(url: str, data: Path, out: Path, concurrency: int) -> list[str]:
    fixed = ["-m", "hermes_pipeline", "complete", "--data", data, "--out", out, "--n", DRAWS]
    return [
        str(word)
        for word in (*fixed, "--endpoint", url, "--model", "tiny", "--concurrency", concurrency)
    ]


class Used(NamedTuple):
    cpu_s: float
    peak_mb: float


def _used(words: list[str]) -> Used:
    """What one process has taken from its start to its end."""
    quiet = subprocess.DEVNULL
    child = subprocess.Popen([sys.executable, *words], stdout=quiet, stderr=quiet)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, f"{words[:3]} ended with {child.returncode}"
    return Used(usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def _prompts(path: Path, count: int) -> Path:
    lines = (json.dumps({"prompt": f"{i} ".ljust(PROMPT_BYTES, "x")}) for i in range(count))
    path.write_text("".join(f"{line}\n" for line in lines))
    return path
