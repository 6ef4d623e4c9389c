"""`hermes4 complete` when the world around it breaks: server, clock, disk, data, signals."""

from __future__ import annotations

import gzip
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.counting_server import CountingServer
from completing import await_answers, exported, lines, records, refused, start, words, write
from hermes_pipeline.services import limits
from running import Ended, Hermes4, comes_true

pytestmark = pytest.mark.timeout(100)

RECORDS = 30


@pytest.fixture
def server() -> Iterator[CountingServer]:
    with CountingServer() as server:
        yield server


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "data.jsonl", *({"prompt": f"{i}?"} for i in range(RECORDS)))


def without_tracebacks(said: str) -> str:
    """What it said on standard error; the last line."""
    for word in ("Traceback", "Exception ignored", "was destroyed"):
        assert word not in said
    return said.splitlines()[-1]


# The server, the clock.


def test_a_server_that_vanishes_and_returns_loses_nothing(
    data: Path, tmp_path: Path, hermes4: Hermes4, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Six tries take under 0.4 s, and it is gone for 2: as a minute is to the pauses by custom.
    monkeypatch.setattr(limits, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(limits, "LONGEST_PAUSE_S", 0.1)
    with CountingServer(delay_s=0.01) as server:

        def go_away() -> None:
            await_answers(server, 40)
            server.vanish()
            time.sleep(2)
            server.appear()

        leaving = threading.Thread(target=go_away)
        leaving.start()
        ended = hermes4(*words(server, data, tmp_path / "out", "--concurrency", 8))
        leaving.join()
        assert ended.out.startswith("30 read = 30 done + 0 set aside + 0 quarantined\n120 answers")
        assert server.answered.total() - 4 * RECORDS <= 8
        hermes4(*words(server, data, tmp_path / "calm"))
    assert exported(tmp_path / "out") == exported(tmp_path / "calm")


def test_a_clock_that_jumps_changes_nothing(
    server: CountingServer,
    data: Path,
    tmp_path: Path,
    hermes4: Hermes4,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "FIRST_PAUSE_S", 0.01)
    rng, clock = random.Random(0), time.time
    monkeypatch.setattr(time, "time", lambda: clock() + rng.uniform(-1e8, 1e8))
    server.decide = lambda *_: rng.choices(["answer", 429, 500], [80, 10, 10])[0]
    began = time.monotonic()
    ended = hermes4(*words(server, data, tmp_path / "out"))
    assert time.monotonic() - began < 60
    assert ended.out.startswith("30 read = 30 done + 0 set aside + 0 quarantined\n120 answers")
    assert set(server.answered.values()) == {1}


# The disk.


def in_a_namespace(script: str, *command: str) -> Ended:
    """A shell script, with the command as "$@", where it may mount what it likes."""
    shell = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*shell, "true"], capture_output=True).stderr:
        pytest.skip("no namespaces here")
    done = subprocess.run(
        [*shell, script, "sh", *command], capture_output=True, text=True, timeout=60
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def command(server: CountingServer, data: Path, out: Path, *options: object) -> list[str]:
    return [sys.executable, "-m", "hermes_pipeline", *words(server, data, out, *options)]


READ_ONLY = 'mount --bind {0} {0} && mount -o remount,bind,ro {0} && exec "$@"'


@pytest.mark.parametrize("begun", [False, True])
def test_a_read_only_folder_is_one_line_and_costs_nothing(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4, begun: bool
) -> None:
    out = tmp_path / "runs" / "out"
    out.parent.mkdir()
    if begun:
        hermes4(*words(server, data, out, "--n", 1))
    paid = len(server.bodies)
    ended = in_a_namespace(READ_ONLY.format(out.parent), *command(server, data, out))
    said = f"hermes4: error: --out {out} cannot be written: Read-only file system; "
    said += "choose another --out, or give the right to write\n"
    assert ended == Ended(2, "", said)
    assert len(server.bodies) == paid
    if begun:
        export = [sys.executable, "-m", "hermes_pipeline", "export", str(out), "--out"]
        to = tmp_path / "elsewhere.jsonl"
        assert in_a_namespace(READ_ONLY.format(out.parent), *export, str(to)).code == 0
        assert to.read_bytes() == exported(out)


# How much of 512 KiB is free at first: nothing, then too little for each of the first files.
@pytest.mark.parametrize("free_kib", [0, 16, 128])
def test_a_disk_that_is_full_at_first_is_one_line_and_the_run_goes_on_when_there_is_room(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4, free_kib: int
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f"""
        mount -t tmpfs -o size=512k none {disk} || exit
        head -c {512 - free_kib}K /dev/zero > {disk}/others
        "$@"; echo "code $?" >&2
        rm {disk}/others
        "$@" && cp -r {disk}/out {tmp_path}/saved
    """
    options = ("--concurrency", 8, "--n", 1)
    ended = in_a_namespace(script, *command(server, data, disk / "out", *options))
    first, _, second = ended.err.partition("code 2\n")
    said = [line for line in first.splitlines() if not line.startswith("complete: ")]
    assert len(said) == 1
    assert said[0].startswith("hermes4: error: ")
    assert str(disk / "out") in said[0]
    assert ended.code == 0, second
    assert server.answered.total() - RECORDS <= 8
    hermes4(*words(server, data, tmp_path / "calm", *options))
    assert exported(tmp_path / "saved") == exported(tmp_path / "calm")


def test_what_a_killed_writer_had_not_finished_is_removed(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4
) -> None:
    out = tmp_path / "out"
    hermes4(*words(server, data, out, "--n", 1))
    (out / ".counts.json.1.unfinished").write_text("{")
    hermes4(*words(server, data, out, "--n", 1))
    names = sorted(path.name for path in out.iterdir())
    assert names == [".lock", "counts.json", "records.sqlite", "stage.json"]


# The data.


def test_data_that_has_changed_is_refused_and_what_is_kept_stays(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4
) -> None:
    out = tmp_path / "out"
    hermes4(*words(server, data, out, "--n", 1))
    before, paid = exported(out), len(server.bodies)
    write(data, *({"prompt": f"{i}!"} for i in range(RECORDS)))
    said = refused(hermes4(*words(server, data, out)))
    assert "record 1 of the data is not what it was when " in said
    assert (exported(out), len(server.bodies)) == (before, paid)


def test_data_that_has_moved_or_grown_goes_on(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4
) -> None:
    out = tmp_path / "out"
    hermes4(*words(server, data, out, "--n", 1))
    moved = write(tmp_path / "moved.jsonl", *({"prompt": f"{i}?"} for i in range(RECORDS + 5)))
    data.unlink()
    assert hermes4(*words(server, moved, out, "--n", 1)).code == 0
    assert server.answered.total() == len(server.answered) == RECORDS + 5


def test_what_stands_in_quarantine_is_lost_to_no_other_data_and_no_shorter_pass(
    server: CountingServer, tmp_path: Path, hermes4: Hermes4
) -> None:
    good = [{"prompt": f"{i}?"} for i in range(4)]
    data = write(tmp_path / "data.jsonl", *good[:2], "{broken", *good[2:], "{broken", "{broken")
    other = write(tmp_path / "other.jsonl", {"prompt": "Who?"}, "{bad")
    out = tmp_path / "out"

    def quarantined() -> list[int]:
        return [entry["line"] for entry in lines(out / "quarantine.jsonl")]

    assert hermes4(*words(server, data, out, "--n", 3)).out.endswith(
        f"12 answers: hermes4 export {out}\n"
    )
    before = (out / "quarantine.jsonl").read_bytes()
    assert "record 1 of the data is not what it was" in refused(
        hermes4(*words(server, other, out, "--n", 3))
    )
    assert (out / "quarantine.jsonl").read_bytes() == before
    ended = hermes4(*words(server, data, out, "--n", 3, "--limit", 4))
    assert ended.out == (
        "4 read = 3 done + 0 set aside + 1 quarantined\n"
        f"9 answers of 12 in the folder: hermes4 export {out}\n"
    )
    assert (out / "quarantine.jsonl").read_bytes() == before
    with (out / "quarantine.jsonl").open("a") as file:
        file.write('{"number": 9')  # as kill -9 may leave a line
    write(data, *good[:2], {"prompt": "mended"}, *good[2:], "{broken", "{broken")
    hermes4(*words(server, data, out, "--n", 3, "--limit", 4))
    assert quarantined() == [6, 7]


def test_a_record_that_is_cut_off_goes_to_quarantine(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4
) -> None:
    data.write_bytes(data.read_bytes()[:-5])
    out = tmp_path / "out"
    ended = hermes4(*words(server, data, out, "--n", 1))
    assert ended.out.startswith("30 read = 29 done + 0 set aside + 1 quarantined\n29 answers")
    assert [entry["line"] for entry in lines(out / "quarantine.jsonl")] == [RECORDS]


def test_a_compressed_file_that_is_cut_off_is_one_line_and_costs_nothing(
    server: CountingServer, tmp_path: Path, hermes4: Hermes4
) -> None:
    prompts = "".join(f'{{"prompt": "{random.Random(i).random()}"}}\n' for i in range(20_000))
    data = tmp_path / "data.jsonl.gz"
    data.write_bytes(gzip.compress(prompts.encode())[:2_000])
    assert f"{data} is damaged" in refused(hermes4(*words(server, data, tmp_path / "out")))
    assert server.bodies == []


# Signals, and streams that nobody reads.


def interrupted(process: Any, number: int, times: int) -> str:
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.03)
    return str(process.communicate(timeout=30)[1])


@pytest.mark.parametrize(
    ("number", "times", "code"),
    [(signal.SIGTERM, 3, 75), (signal.SIGINT, 9, 130)],
)
def test_signals_say_what_is_safe_and_how_to_go_on(
    data: Path, tmp_path: Path, number: int, times: int, code: int
) -> None:
    out = tmp_path / "out"
    with CountingServer(delay_s=0.2) as server:
        with start(server, data, out, "--concurrency", 8) as process:
            await_answers(server, 20)
            said = without_tracebacks(interrupted(process, number, times))
        safe = sum(len(record["answers"]) for record in records(out))
        assert process.returncode == code
        assert said == (
            f"hermes4: interrupted; {safe} answers are safe in {out}: run the same command again "
            f"to go on"
        )
        with start(server, data, out) as process:
            assert process.wait(30) == 0
        assert server.answered.total() - 4 * RECORDS <= 8


def test_sigterm_stops_also_where_ctrl_c_is_ignored(data: Path, tmp_path: Path) -> None:
    with CountingServer(delay_s=0.2) as server:
        words_ = command(server, data, tmp_path / "out", "--concurrency", 8)
        ignoring = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *words_]
        with subprocess.Popen(ignoring, stderr=subprocess.PIPE, text=True) as process:
            await_answers(server, 20)
            process.send_signal(signal.SIGINT)
            await_answers(server, 20)
            said = without_tracebacks(interrupted(process, signal.SIGTERM, 1))
    assert process.returncode == 75
    assert said.startswith("hermes4: interrupted; ")


STOPPED = """
import asyncio, os, signal
from hermes_pipeline.exits import hearing_signals
from hermes_pipeline.services.serving import watched

async def draw():
    os.kill(os.getpid(), signal.SIGTERM)
    sum(range(10**6))  # not where the loop waits
    await asyncio.sleep(60)

async def draws():
    async with asyncio.TaskGroup() as working:
        working.create_task(draw())

with hearing_signals():
    try:
        asyncio.run(watched(draws(), lambda: None))
    except KeyboardInterrupt:
        print("interrupted")
"""


@pytest.mark.parametrize("ctrl_c", ["trap - INT", 'trap "" INT'])
def test_a_signal_amid_a_task_is_no_error_of_that_task(ctrl_c: str) -> None:
    words = ["sh", "-c", f'{ctrl_c}; exec "$@"', "sh", sys.executable, "-c", STOPPED]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")


OFTEN = "from hermes_pipeline.services import progress; progress.LINE_EVERY_S = 0.0; "
MAIN = "from hermes_pipeline.cli import main; main()"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_where_nobody_reads_its_progress_it_ends_in_silence(
    data: Path, tmp_path: Path, stream: str
) -> None:
    options = ("--json",) if stream == "stdout" else ()
    with CountingServer(delay_s=0.2) as server:
        chosen = words(server, data, tmp_path / "out", "--concurrency", 1, *options)
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen([sys.executable, "-c", OFTEN + MAIN, *chosen], **pipes) as process:
            read, other = process.stdout, process.stderr
            if stream == "stderr":
                read, other = other, read
            assert read is not None and other is not None  # noqa: PT018
            assert read.readline()
            read.close()
            assert other.read() == b""
            assert process.wait(30) == 141
        safe = sum(len(record["answers"]) for record in records(tmp_path / "out"))
        assert 0 < server.answered.total() - safe + 1 <= 2


def test_a_summary_that_nobody_reads_comes_after_all_is_kept(
    server: CountingServer, data: Path, tmp_path: Path
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        command(server, data, tmp_path / "out"), stdout=writing, stderr=subprocess.PIPE, timeout=60
    )
    os.close(writing)
    assert done.returncode == 141
    assert len(done.stderr.splitlines()) == 1
    assert sum(len(record["answers"]) for record in records(tmp_path / "out")) == 4 * RECORDS


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_mistake(
    server: CountingServer, data: Path, tmp_path: Path, closed: str
) -> None:
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh"]
    words_ = command(server, data, tmp_path / "out", "--n", 1)
    assert subprocess.run([*shell, *words_], timeout=60).returncode == 0
    assert len(records(tmp_path / "out")) == RECORDS


def test_a_full_disk_of_the_log_leaves_the_exit_code(
    server: CountingServer, data: Path, tmp_path: Path
) -> None:
    with open("/dev/full", "wb") as full:
        words_ = command(server, data, tmp_path / "out", "--n", 1)
        assert subprocess.run(words_, stderr=full, timeout=60).returncode == 2
    assert comes_true(lambda: server.connections == 0, 10)
