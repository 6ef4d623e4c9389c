"""The run store: what is answered is on the disk, once, whole, and in order."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from hermes_pipeline.errors import UserError
from hermes_pipeline.services import store as module
from hermes_pipeline.services.store import Input, Last, RecordRefused, RunStore
from hermes_pipeline.services.store_reader import Recorded, count, read_errors, read_results

pytestmark = pytest.mark.timeout(60)


def opened(folder: Path, *, seed: int = 0, **settings: Any) -> RunStore:
    return RunStore(folder, stage="test", settings={"model": "tiny", **settings}, seed=seed)


def numbered(number: int) -> Input:
    return Input.of(number, f"question {number}", {"source": f"data:{number}"})


def written(
    folder: Path, work: Callable[[RunStore], Coroutine[Any, Any, Any]], **settings: Any
) -> Any:
    async def timed(store: RunStore) -> Any:
        return await asyncio.wait_for(work(store), 30)

    with opened(folder, **settings) as store:
        return asyncio.run(timed(store))


def texts(folder: Path) -> list[tuple[str, int, str]]:
    return [
        (of.about["source"], result.draw, result.record["text"])
        for of in read_results(folder)
        for result in of.results
        if result.record is not None
    ]


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[sqlite3.Connection]:
    """Every connection that is opened, the writer's first."""
    made: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def spying(*words: Any, **options: Any) -> sqlite3.Connection:
        made.append(connect(*words, **options))
        return made[-1]

    monkeypatch.setattr(module.sqlite3, "connect", spying)
    return made


def test_a_commit_waits_for_the_disk(tmp_path: Path, connections: list[sqlite3.Connection]) -> None:
    with opened(tmp_path):
        writer = connections[0]
        assert writer.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        assert writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_who_keeps_a_record_is_answered_when_others_can_read_it(tmp_path: Path) -> None:
    async def work(store: RunStore) -> None:
        await store.keep(numbered(1), 0, 0, {"text": "one"})
        assert texts(tmp_path) == [("data:1", 0, "one")]

    written(tmp_path, work)


def test_many_records_share_a_commit(tmp_path: Path, connections: list[sqlite3.Connection]) -> None:
    said: list[str] = []

    async def work(store: RunStore) -> None:
        connections[0].set_trace_callback(said.append)
        keeping = (store.keep(numbered(i), 0, 0, {"text": ""}) for i in range(1, 1025))
        await asyncio.gather(*keeping)

    written(tmp_path, work)
    assert count(tmp_path).records == 1024
    assert said.count("COMMIT") == 2  # 512 rows each


def test_one_of_a_kind_costs_the_others_nothing(tmp_path: Path) -> None:
    async def work(store: RunStore) -> list[Any]:
        keys = [(1, 0), (1, 0), (1, 1)]
        keeping = (store.keep(numbered(n), draw, 0, {"text": "x"}) for n, draw in keys)
        return await asyncio.gather(*keeping, return_exceptions=True)

    first, again, other = written(tmp_path, work)
    assert (first, other) == (None, None)
    assert isinstance(again, RecordRefused)
    assert texts(tmp_path) == [("data:1", 0, "x"), ("data:1", 1, "x")]


def test_a_record_that_is_no_json_is_refused_and_can_be_set_aside(tmp_path: Path) -> None:
    async def work(store: RunStore) -> None:
        with pytest.raises(RecordRefused, match="cannot be written as JSON"):
            await store.keep(numbered(1), 0, 0, {"text": "\ud800"})
        await store.set_aside(numbered(1), 0, 0, "half a character: \ud800")

    written(tmp_path, work)
    (entry,) = read_errors(tmp_path)
    assert entry == {"id": numbered(1).id, "source": "data:1", "draw": 0, "error": entry["error"]}
    assert entry["error"].startswith("half a character: ?")


def test_a_later_attempt_takes_the_place_of_an_error(tmp_path: Path) -> None:
    async def fail(store: RunStore) -> None:
        await store.set_aside(numbered(1), 0, 0, "busy")
        await store.keep(numbered(1), 1, 0, {"text": "there"})

    async def go_on(store: RunStore) -> None:
        past = store.past(numbered(1))
        assert past == {0: Last(0, kept=False), 1: Last(0, kept=True)}
        await store.keep(numbered(1), 0, 1, {"text": "late"})
        assert store.past(numbered(1))[0] == Last(1, kept=True)

    written(tmp_path, fail)
    written(tmp_path, go_on)
    assert list(read_errors(tmp_path)) == []
    assert texts(tmp_path) == [("data:1", 0, "late"), ("data:1", 1, "there")]


def test_the_order_of_arrival_does_not_show(tmp_path: Path) -> None:
    keys = [(number, draw) for number in range(1, 40) for draw in range(3)]

    def filled(folder: Path, seed: int) -> list[Recorded]:
        async def work(store: RunStore) -> None:
            for number, draw in random.Random(seed).sample(keys, len(keys)):
                text = {"text": f"{number}.{draw}"}
                keeping.append(asyncio.create_task(store.keep(numbered(number), draw, 0, text)))
            await asyncio.gather(*keeping)

        keeping: list[asyncio.Task[None]] = []
        written(folder, work)
        return list(read_results(folder))

    assert filled(tmp_path / "a", 1) == filled(tmp_path / "b", 2)


def test_what_waits_for_a_commit_is_written_when_the_block_ends(tmp_path: Path) -> None:
    async def leave(store: RunStore) -> None:
        asyncio.create_task(store.keep(numbered(1), 0, 0, {"text": "last"}))  # noqa: RUF006
        await asyncio.sleep(0)

    written(tmp_path, leave)
    assert texts(tmp_path) == [("data:1", 0, "last")]


def test_data_that_has_changed_is_refused(tmp_path: Path) -> None:
    async def work(store: RunStore) -> None:
        await store.keep(numbered(1), 0, 0, {"text": "x"})
        with pytest.raises(UserError, match="record 1 of the data is not what it was"):
            store.past(Input.of(1, "another question", {}))

    written(tmp_path, work)


# Folders.


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    opened(tmp_path, temperature=0.6).__exit__(None, None, None)
    with pytest.raises(UserError, match=r"seed was 0 and is 1; temperature was 0\.6 and is 0\.7"):
        opened(tmp_path, temperature=0.7, seed=1)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds run\.json and no stage\.json"):
        opened(tmp_path)


HOLD = """
import sys
from pathlib import Path
from hermes_pipeline.services.store import RunStore
with RunStore(Path(sys.argv[1]), stage="test", settings={"model": "tiny"}, seed=0):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"is in use by process {holder.pid} on "):
            opened(tmp_path)
        holder.kill()
        holder.wait()
        opened(tmp_path).__exit__(None, None, None)


def look_at_all(folder: Path) -> None:
    with opened(folder) as store:
        store.past(numbered(1))
        list(read_results(folder))


@pytest.mark.parametrize("hurt", ["no database", "torn", "no tables", "of others"])
def test_a_damaged_database_is_one_line(tmp_path: Path, hurt: str) -> None:
    async def work(store: RunStore) -> None:
        record = {"text": "x" * 1000}
        await asyncio.gather(*(store.keep(numbered(n), 0, 0, record) for n in range(1, 200)))

    written(tmp_path, work)
    path = tmp_path / "records.sqlite"
    if hurt == "no database":
        path.write_bytes(b"this is no database, but long enough to look at" * 100)
    elif hurt == "torn":
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    elif hurt == "no tables":
        with sqlite3.connect(path) as connection:
            connection.execute("DROP TABLE inputs")
            connection.execute("CREATE TABLE inputs (x)")
        connection.close()
    else:
        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE about SET fingerprint = 'x'")
        connection.close()
    told = r"is damaged \(.*\); put back a copy" if hurt != "of others" else "belongs to other"
    with pytest.raises(UserError, match=told) as error:
        look_at_all(tmp_path)
    assert "\n" not in str(error.value)


def test_a_damaged_stage_file_is_one_line(tmp_path: Path) -> None:
    opened(tmp_path).__exit__(None, None, None)
    (tmp_path / "stage.json").write_text('{"format": 1')
    with pytest.raises(UserError, match=r"stage\.json is damaged"):
        opened(tmp_path)


# Processes that end in the middle, and disks that do.

# Keeps records for ever; says the number of each once it is told that the record is safe.
KEEP = """
import asyncio, resource, sys
from pathlib import Path
from hermes_pipeline.errors import UserError
from hermes_pipeline.services.store import Input, RunStore

async def work(store):
    async def keep(first):
        for number in range(first, 10**9, 64):
            record = {"text": f"{number} " * 500}
            await store.keep(Input.of(number, number, {"source": f"data:{number}"}), 0, 0, record)
            print(number, flush=True)
    await asyncio.gather(*(keep(number) for number in range(1, 65)))

if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    with RunStore(Path(sys.argv[1]), stage="test", settings={"model": "tiny"}, seed=0) as store:
        asyncio.run(work(store))
except UserError as error:
    print(error, file=sys.stderr)
"""


def check_kept(folder: Path, told: list[str]) -> None:
    """What was said to be safe is there; everything there is there once, and whole."""
    found = texts(folder)
    numbers = [int(source.removeprefix("data:")) for source, *_ in found]
    assert len(set(numbers)) == len(numbers) == count(folder).records
    assert {int(number) for number in told} <= set(numbers)
    assert all(
        text == f"{number} " * 500 for number, (*_, text) in zip(numbers, found, strict=True)
    )


@pytest.mark.parametrize("after", [1, 100, 333, 1000, 1500])
def test_kill_9_loses_nothing_that_was_said_to_be_safe(tmp_path: Path, after: int) -> None:
    words = [sys.executable, "-c", KEEP, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as keeper:
        assert keeper.stdout is not None
        told = [keeper.stdout.readline() for _ in range(after)]
        keeper.send_signal(signal.SIGKILL)
        told += keeper.stdout.readlines()
    check_kept(tmp_path, [line for line in told if line.endswith("\n")])
    opened(tmp_path).__exit__(None, None, None)


def test_a_disk_that_is_full_is_one_line_and_costs_nothing(tmp_path: Path) -> None:
    """A small tmpfs, mounted where only the keeper sees it, and its content copied out."""
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    script = (
        f"mount -t tmpfs -o size=2m tmpfs {disk} || exit 77\n"
        "echo mounted\n"
        f'"$@" {disk}/run\n'
        f"cp -r {disk}/run {copy}\n"
        f"mount -o remount,ro {disk}\n"
        f'"$@" {disk}/run\n'
        f'"$@" {disk}/other\n'
    )
    words = ["unshare", "-rm", "sh", "-c", script, "sh", sys.executable, "-c", KEEP]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=50)
    except FileNotFoundError:
        pytest.skip("no unshare")
    if not done.stdout.startswith("mounted\n"):
        pytest.skip("no mount namespace may be made here")
    kept = done.stdout.splitlines()[1:]
    full, read_only, nothing = done.stderr.splitlines()
    assert "records.sqlite cannot be read or written: database or disk is full; " in full
    assert "what is committed is safe" in full
    way_out = "Read-only file system; choose another --out, or give the right to write"
    assert read_only == f"--out {disk}/run cannot be written: {way_out}"
    assert nothing == f"--out {disk}/other cannot be written: {way_out}"
    assert len(kept) > 64
    check_kept(copy, kept)


def test_a_file_that_may_not_grow_is_one_line_and_costs_nothing(tmp_path: Path) -> None:
    words = [sys.executable, "-c", KEEP, str(tmp_path), "2000000"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=50)
    (line,) = done.stderr.splitlines()
    assert "cannot be read or written: disk I/O error; what is committed is safe" in line
    check_kept(tmp_path, done.stdout.splitlines())


def test_counts_are_json(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.write_counts({"read": 3})
    assert json.loads((tmp_path / "counts.json").read_text()) == {"read": 3}
