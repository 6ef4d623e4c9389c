"""`python -m bench kills`: `hermes4 complete` killed at random moments, then what it lost and paid.

A trial, no benchmark. The real command runs against a server that counts; it is killed by SIGKILL
and started again, folder after folder, until enough kills are made and every folder is done. Then

- export, counts, set-aside draws and quarantine equal an undisturbed run's to the byte, and no
  other file is left;
- of the calls that one kill made worthless, no more were paid for again than it met in flight,
  and no kill met more of them in flight than `--concurrency` allows.

A call is paid for when the server has heard it, even if nobody is there to take the answer; it is
in flight until its answer is in the store, which is read when the process is dead.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from bench.counting_server import CountingServer
from bench.harness import machine
from hermes_pipeline.services.store import draw_seed
from hermes_pipeline.stages.export import export

RECORDS, CONCURRENCY = 90, 16
REFUSED = ("refuse 7", "refuse 31", "refuse 55")  # prompts that the server never answers
BROKEN = ("{", '{"text": 1}')  # records that are no conversation
DELAY_S = 0.03  # from a call to its answer
AT_ONCE = 2  # folders
KILLS_A_FOLDER = 12  # on average
FAULTS = {"answer": 70, 500: 12, 503: 5, 429: 3, "cut": 5, "hang": 5}  # in 100 calls
FAULT_OPTIONS = ("--n", "3", "--timeout-s", "3")
LONGEST_RUN_S = 120.0

_ROWS = """
SELECT inputs.id, draw, attempt, error IS NULL FROM results
JOIN inputs ON inputs.number = results.input
"""

Row = tuple[str, int, int, bool]  # input, draw, attempt; kept, or else set aside


class Ended(NamedTuple):
    """One start of the command, and what it had done when it was dead."""

    phase: str  # where the kill met it; empty when it ended by itself
    paid: Counter[int]  # seeds of the calls that the server counts
    in_flight: frozenset[int]  # seeds of the draws asked for and not in the store


@dataclass(slots=True)
class Found:
    """What the trial has come to."""

    phases: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    folders: int = 0
    paid: int = 0  # calls
    repeated: int = 0  # of them, for a draw that was paid for before
    in_flight: int = 0  # calls that the kills met
    most_in_flight: int = 0  # at one kill
    broken: list[str] = field(default_factory=list)  # what does not hold

    def add(self, other: Found) -> None:
        self.phases += other.phases
        self.starts += other.starts
        self.folders += other.folders
        self.paid += other.paid
        self.repeated += other.repeated
        self.in_flight += other.in_flight
        self.most_in_flight = max(self.most_in_flight, other.most_in_flight)
        self.broken += other.broken


class World:
    """A server, data, and the command's words; what an undisturbed run makes of them."""

    def __init__(self, server: CountingServer, folder: Path, options: Sequence[str]) -> None:
        self.server, self.folder, self._options = server, folder, options
        self.paid: Counter[int] = Counter()  # by seed
        self._shares: Mapping[str | int, int] = {"answer": 1}
        self._rng = random.Random(0)
        self.data = folder / "data.jsonl"
        prompts = [f"{i}?" for i in range(RECORDS - len(REFUSED))] + list(REFUSED)
        random.Random(0).shuffle(prompts)
        lines = (*(json.dumps({"prompt": prompt}) for prompt in prompts), *BROKEN)
        self.data.write_text("".join(f"{line}\n" for line in lines))
        server.decide = self._decide
        calm = folder / "calm"
        run = Run(self, calm, frozenset())
        if (code := run.process.wait(LONGEST_RUN_S)) != 0:
            raise SystemExit(f"the undisturbed run ended with {code}: {run.said()}")
        self.draws, self.answered = len(run.asked()), len(self.paid)
        self.calm = _made(calm)

    def turn_faults_on(self) -> None:
        self._shares = FAULTS

    def words(self, out: Path) -> list[str]:
        fixed = ["-m", "hermes_pipeline", "complete", "--data", self.data, "--out", out]
        where = ["--endpoint", self.server.url, "--model", "tiny", "--concurrency", CONCURRENCY]
        return [str(word) for word in (sys.executable, *fixed, *where, *self._options)]

    def _decide(self, body: dict[str, Any], _: int) -> str | int:
        if body["messages"][0]["content"] in REFUSED:
            return 400
        what = self._rng.choices(list(self._shares), list(self._shares.values()))[0]
        if what == "answer":
            self.paid[body["seed"]] += 1
        return what


class Run:
    """One start of the command, watched from outside."""

    def __init__(self, world: World, out: Path, before: frozenset[Row]) -> None:
        self._world, self._out, self._before = world, out, before
        self._heard, self._paid = len(world.server.bodies), world.paid.copy()
        self._log = out.with_suffix(".log")
        self._began_ns = time.time_ns()
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(world.words(out), stdout=log, stderr=log)

    def asked(self) -> set[int]:
        """Seeds of the draws that the server has heard of."""
        return {body["seed"] for body in self._world.server.bodies[self._heard :]}

    def left(self) -> int:
        """Draws there were to ask for when it started."""
        return self._world.draws - len({(key, draw) for key, draw, _, kept in self._before if kept})

    def holds_the_folder(self) -> bool:
        try:
            return f"process {self.process.pid} " in (self._out / ".lock").read_text()
        except OSError:
            return False

    def is_writing(self, name: str) -> bool:
        return (self._out / f".{name}.{self.process.pid}.unfinished").exists()

    def has_written(self, name: str) -> bool:
        try:
            return (self._out / name).stat().st_mtime_ns >= self._began_ns
        except OSError:
            return False

    def said(self) -> str:
        """Its last line."""
        return (self._log.read_text().splitlines() or ["nothing"])[-1]

    def end(self, phase: str | None) -> Ended:
        """What it had done, once it is dead and the server has heard the last of it."""
        self.process.wait()
        while self._world.server.connections:
            time.sleep(0.001)
        new = rows(self._out) - self._before
        asked = self.asked()
        safe = {draw_seed(0, key, draw) for key, draw, *_ in new}
        in_flight = frozenset(asked - safe)
        if phase is None:
            phase = self._phase(len(asked), len(new), bool(in_flight))
        return Ended(phase, self._world.paid - self._paid, in_flight)

    def _phase(self, asked: int, new: int, is_asking: bool) -> str:
        """Where a kill has met it, by what it left."""
        for name in ("stage.json", "counts.json", "set_aside.jsonl"):
            if self.is_writing(name):
                return f"writing {name}"
        if not self.holds_the_folder():
            return "starting"
        if not asked:
            return "reading"
        if not new:
            return "before the first commit"
        if asked < self.left():
            return "in the middle"
        if is_asking:
            return "last answers"
        if not self.has_written("counts.json"):
            return "all committed"
        return "ending"


class Moment(NamedTuple):
    """When a kill comes: at random, so many seconds after what is waited for."""

    comes: Callable[[Run, int], bool]
    span_s: float


START = Moment(lambda run, _: True, 0.7)
READING = Moment(lambda run, _: run.holds_the_folder(), 0.05)
FIRST = Moment(lambda run, _: len(run.asked()) > 0, 0.08)
MIDDLE = Moment(lambda run, some: len(run.asked()) >= some, 0.05)
LAST = Moment(lambda run, _: len(run.asked()) >= run.left(), 0.1)
COUNTS = Moment(lambda run, _: run.is_writing("counts.json"), 0.0005)
COUNTED = Moment(lambda run, _: run.has_written("counts.json"), 0.005)
SET_ASIDE = Moment(lambda run, _: run.is_writing("set_aside.jsonl"), 0.0005)
# The first kills of a folder leave something to do; the last ones let it come near its end.
EARLY = (START, START, READING, READING, FIRST, FIRST, MIDDLE, MIDDLE, MIDDLE, MIDDLE)
LATE = (LAST, LAST, LAST, COUNTS, COUNTED, SET_ASIDE)
LATE_SHARE = 0.3  # of the kills


def kill_in_turn(world: World, out: Path, rng: random.Random, kills: int) -> Found:
    """Kill the runs of one folder, so often at most, and then let it come to its end."""
    found, runs = Found(folders=1), list[Ended]()
    while True:
        run = Run(world, out, rows(out))
        found.starts += 1
        done = found.phases.total()
        wanted = done < kills
        moments = EARLY if done < (1 - LATE_SHARE) * kills else LATE
        killed = wanted and _kill(run, rng.choice(moments), rng)
        ended = run.end(None if killed else "")
        runs.append(ended)
        if killed:
            found.phases[ended.phase] += 1
        elif run.process.returncode != 0:
            found.broken.append(f"{out.name}: ended with {run.process.returncode}: {run.said()}")
            break
        elif not (wanted or _could_be_answered(world, out)):
            break
    settle(found, runs, out.name)
    made = _made(out)
    for name in made.keys() | world.calm.keys():
        if made.get(name) != world.calm.get(name):
            found.broken.append(f"{out.name}: {name} is not an undisturbed run's")
    return found


def _kill(run: Run, moment: Moment, rng: random.Random) -> bool:
    """Kill it at that moment; False when it has ended before."""
    some = rng.randint(1, 1 + run.left() // 5)
    while not moment.comes(run, some):
        if run.process.poll() is not None:
            return False
        time.sleep(0.0002)
    time.sleep(rng.uniform(0, moment.span_s))
    run.process.kill()
    return run.process.wait() < 0


def settle(found: Found, runs: Sequence[Ended], name: str) -> None:
    """Lay each call that was paid for again to the run that had paid for it before."""
    last: dict[int, int] = {}
    repeated = [0] * len(runs)
    for i, run in enumerate(runs):
        for seed, calls in run.paid.items():
            if seed in last:
                repeated[last[seed]] += 1
            repeated[i] += calls - 1
            last[seed] = i
    for i, run in enumerate(runs):
        met = len(run.in_flight & run.paid.keys())
        if repeated[i] > met:
            found.broken.append(f"{name}: {repeated[i]} calls repeated, {met} were in flight")
        if len(run.in_flight) > CONCURRENCY:
            found.broken.append(f"{name}: {len(run.in_flight)} in flight, want {CONCURRENCY}")
        found.in_flight += met
        found.most_in_flight = max(found.most_in_flight, met)
    found.paid += sum(run.paid.total() for run in runs)
    found.repeated += sum(repeated)


def _could_be_answered(world: World, out: Path) -> bool:
    """Was a draw set aside that the server would answer another time?"""
    return len({(key, draw) for key, draw, _, kept in rows(out) if kept}) < world.answered


def rows(out: Path) -> frozenset[Row]:
    """What is committed; read from a copy: the next run finds the files as they were left."""
    with tempfile.TemporaryDirectory() as name:
        for path in out.glob("records.sqlite*"):
            shutil.copy(path, name)
        with closing(sqlite3.connect(Path(name) / "records.sqlite")) as connection:
            tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
            return frozenset(connection.execute(_ROWS)) if tables else frozenset()


def _made(out: Path) -> dict[str, bytes]:
    """Every file by its name, those of the database as what an export makes of them."""
    exported = out.with_suffix(".jsonl")
    export(out, exported)
    kept = {"export": exported.read_bytes()}
    for path in out.iterdir():
        if not path.name.startswith(("records.sqlite", ".lock")):
            # The folder's own name stands in the recipe that it was begun with.
            kept[path.name] = path.read_bytes().replace(str(out).encode(), b"OUT")
    return kept


def trial(kills: int, seed: int, *, faults: bool) -> Found:
    """Make so many kills, `AT_ONCE` folders at a time."""
    found = Found()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(AT_ONCE) as pool:
        shares = [kills // AT_ONCE + (i < kills % AT_ONCE) for i in range(AT_ONCE)]
        tasks = [
            pool.submit(_share, Path(name) / str(i), share, f"{seed} {i}", faults)
            for i, share in enumerate(shares)
        ]
        for task in tasks:
            found.add(task.result())
    return found


def _share(folder: Path, kills: int, seed: str, faults: bool) -> Found:
    folder.mkdir()
    found, rng = Found(), random.Random(seed)
    with CountingServer(delay_s=DELAY_S) as server:
        world = World(server, folder, FAULT_OPTIONS if faults else ())
        if faults:
            world.turn_faults_on()
        while (left := kills - found.phases.total()) > 0 and not found.broken:
            some = min(left, rng.randint(1, 2 * KILLS_A_FOLDER))
            found.add(kill_in_turn(world, folder / f"out{found.folders}", rng, some))
            print(f"{found.phases.total():,} of {kills:,} kills", file=sys.stderr, flush=True)
    return found


def main(words: Sequence[str]) -> int:
    """Print what the trial has come to, as a line of JSON; 1 when something does not hold."""
    parser = argparse.ArgumentParser(prog="python -m bench kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", action="store_true", help="the server errs, cuts and hangs")
    options = parser.parse_args(words)
    began = time.monotonic()
    found = trial(options.kills, options.seed, faults=options.faults)
    about = {
        "op": "kills",
        **vars(options),
        "verdict": "broken" if found.broken else "holds",
        "concurrency": CONCURRENCY,
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    told = {each.name: getattr(found, each.name) for each in fields(found)}
    print(json.dumps(about | told | machine()))
    return 1 if found.broken else 0
