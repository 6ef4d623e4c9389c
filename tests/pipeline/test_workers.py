"""Work in other processes: its order, and that they end with the command that started them."""

from __future__ import annotations

import gc
import json
import math
import operator
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest

from hermes_pipeline.services.hub import DataSource
from hermes_pipeline.services.workers import map_in_order
from hermes_pipeline.stages import tokenize
from running import Ended, comes_true, contents, processes_of

pytestmark = pytest.mark.timeout(400)

PATIENCE_S = 60.0
RECORDS = 900  # more batches of `hermes4 tokenize` than are under way at once

Make = Callable[[Path], Path]


def negatives(works: Iterator[int], *, workers: int) -> Any:
    """Each number with its negative."""
    return map_in_order(operator.neg, works, setup=gc.freeze, given=(), workers=workers)


@pytest.mark.parametrize("workers", [1, 2])
def test_endless_work_comes_back_in_order(workers: int) -> None:
    with closing(negatives(count(), workers=workers)) as pairs:
        assert list(islice(pairs, 200)) == [(n, -n) for n in range(200)]


def test_few_works_are_under_way() -> None:
    works = count()
    with closing(negatives(works, workers=2)) as pairs:
        next(pairs)
        assert next(works) <= 5


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_the_work_comes_out(workers: int) -> None:
    pairs = map_in_order(math.sqrt, [4, -1], setup=gc.freeze, given=(), workers=workers)
    assert next(pairs) == (4, 2.0)
    with pytest.raises(ValueError, match="math domain error"):
        next(pairs)


# Of the whole command.


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = []
    for n in range(RECORDS):
        answer = {"role": "assistant", "content": f"It is {n}. " * (n % 11 + 1)}
        turns = [{"role": "user", "content": f"{n}?"}, answer]
        lines.append("{broken" if n % 7 == 3 else json.dumps({"messages": turns}))
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def make(data: Path, tokenizer_folder: Path) -> Make:
    """Makes a store of ``data`` in this process, or finishes it."""

    def made(out: Path) -> Path:
        source = DataSource(str(data))
        tokenize.run(source, str(tokenizer_folder), out, template="hermes_chatml", workers=1)
        return out

    return made


@pytest.fixture(scope="module")
def calm(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of ``data``, made without a stop."""
    return make(tmp_path_factory.mktemp("calm") / "store")


# Strikes at the n-th operation on files of that name under the store.
COMMAND = """
import multiprocessing, os, signal, sys
from hermes_core import store_writer
from hermes_pipeline.cli import main

store_writer.COMMIT_SECONDS = 0.0
os.fsync = lambda descriptor: None  # the machine goes on
whom, out, name, left = *sys.argv[1:4], int(sys.argv[4])
del sys.argv[1:5]
blows = {
    "group": lambda: os.killpg(0, signal.SIGKILL),
    "parent": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "worker": lambda: multiprocessing.active_children()[0].kill(),
    "ctrl-c": lambda: os.killpg(0, signal.SIGINT),
}

def strike(event, args):
    global left
    if event in ("open", "os.rename") and out in str(args[0]) and name in str(args[0]):
        left -= 1
        if left == 0:
            blows[whom]()

sys.addaudithook(strike)
main()
"""


@dataclass(frozen=True)
class Started:
    """`hermes4 tokenize` with two workers, in a group of processes of its own."""

    process: subprocess.Popen[str]
    mark: str

    def end(self) -> Ended:
        """Waits until the command has ended and none of its processes is left."""
        said = self.process.communicate(timeout=PATIENCE_S)
        assert comes_true(lambda: not processes_of(self.mark), PATIENCE_S), processes_of(self.mark)
        return Ended(self.process.returncode, *said)

    def wait_for_worker(self) -> None:
        assert comes_true(
            lambda: any("spawn_main" in x for x in processes_of(self.mark).values()), PATIENCE_S
        )


Start = Callable[..., Started]


@pytest.fixture
def start(data: Path, tokenizer_folder: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts the command on ``data``, to be struck by itself at a moment of its writing."""
    mark, out = f"HERMES4_TEST_MARK={tmp_path}", tmp_path / "store"
    environment = os.environ | {"HERMES4_TEST_MARK": str(tmp_path)}
    options = ["tokenize", "--data", str(data), "--out", str(out), "--workers", "2"]
    options += ["--tokenizer", str(tokenizer_folder), "--template", "hermes_chatml"]
    started: list[subprocess.Popen[str]] = []

    def begin(whom: str = "nobody", name: str = "", number: int = 0) -> Started:
        words = [sys.executable, "-c", COMMAND, whom, str(out), name, str(number)]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(
            [*words, *options], env=environment, start_new_session=True, **pipes
        )
        started.append(process)
        return Started(process, mark)

    yield begin
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


MOMENTS = [
    ("group", ".lock", 1),
    ("parent", "tokenizer.new", 3),
    ("group", "progress.json", 101),  # the new file stands beside the old one
    ("parent", "progress.json", 101),
    ("group", "shard-00000.log", 200),
    ("parent", "shard-00000.log", 200),
    ("group", "shard-00000.bin", 2),
    ("parent", ".store.json", 2),
]


@pytest.mark.heavy
def test_kill_at_any_moment_costs_no_byte_and_leaves_no_process(
    start: Start, make: Make, calm: Path, tmp_path: Path
) -> None:
    done = [0]
    for whom, name, number in MOMENTS:
        ended = start(whom, name, number).end()
        assert ended.code == -signal.SIGKILL, (whom, name, ended)
        if done[-1]:
            assert f"going on after {done[-1]} records" in ended.out
        done.append(safe_records(tmp_path / "store"))
    assert 0 < done[3] < done[4] < done[5] < done[6] < done[7] == RECORDS
    assert not (tmp_path / "store" / "store.json").exists()
    assert contents(make(tmp_path / "store")) == contents(calm)


def safe_records(out: Path) -> int:
    path = out / "writing" / "progress.json"
    if not path.exists():
        return 0
    progress = json.loads(path.read_bytes())["progress"]
    return int(progress["stored"] + progress["quarantined"])


@pytest.mark.heavy
def test_workers_that_have_hardly_begun_end_with_the_command(start: Start) -> None:
    started = start()
    started.wait_for_worker()
    started.process.kill()
    assert started.end().code == -signal.SIGKILL


@pytest.mark.heavy
def test_a_killed_worker_is_explained_and_costs_no_byte(
    start: Start, make: Make, calm: Path, tmp_path: Path
) -> None:
    ended = start("worker", "progress.json", 9).end()
    assert ended.code == 2
    assert "Traceback" not in ended.err
    assert re.match(
        r"hermes4: error: a worker process died.*\d records are safe.*run the same command again",
        ended.err.splitlines()[-1],
    )
    assert 0 < safe_records(tmp_path / "store") < RECORDS
    assert contents(make(tmp_path / "store")) == contents(calm)


@pytest.mark.heavy
def test_ctrl_c_ends_the_command_and_its_workers_without_a_traceback(
    start: Start, make: Make, calm: Path, tmp_path: Path
) -> None:
    ended = start("ctrl-c", "progress.json", 101).end()
    assert ended.code == 130
    progress, last = ended.err.splitlines()
    assert progress.startswith("tokenize: ")
    assert last.startswith("hermes4: interrupted; ")
    assert 0 < safe_records(tmp_path / "store") < RECORDS
    assert contents(make(tmp_path / "store")) == contents(calm)


@pytest.mark.heavy
@pytest.mark.parametrize(("seconds", "times"), [(0, 1), (0.2, 1), (0.2, 4)])
def test_ctrl_c_while_workers_start_is_without_a_traceback(
    start: Start, seconds: float, times: int
) -> None:
    started = start()
    started.wait_for_worker()
    time.sleep(seconds)
    for _ in range(times):
        os.killpg(started.process.pid, signal.SIGINT)
        time.sleep(0.03)
    ended = started.end()
    assert ended.code == 130
    assert "Traceback" not in ended.err
    assert ended.err.splitlines()[-1].startswith("hermes4: interrupted; ")
