"""The store: what went in comes out, whatever stopped the writing; damage names its file."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hermes_core import Store, StoreError, StoreWriter, open_store
from hermes_core import store as store_module
from running import contents

META = {"tokenizer": "abc", "eos_token_ids": [1, 2]}


def records(vocab_size: int, count: int) -> Iterator[tuple[list[int], list[list[int]]]]:
    rng = random.Random(count)
    for _ in range(count):
        length = rng.randint(1, 60)
        ids = [rng.randrange(vocab_size) for _ in range(length)]
        cuts = sorted(rng.sample(range(length + 1), 2 * rng.randint(0, min(2, (length + 1) // 2))))
        yield ids, [cuts[i : i + 2] for i in range(0, len(cuts), 2)]


def write(folder: Path, *, vocab_size: int = 1000, count: int = 40, shard: int = 300) -> Store:
    with StoreWriter(folder, meta=META, vocab_size=vocab_size, shard_tokens=shard) as writer:
        for ids, spans in records(vocab_size, count):
            writer.append(ids, spans)
        writer.finish()
    return open_store(folder)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32), (1 << 32, np.uint32)]
)
def test_records_come_back_from_several_shards(tmp_path: Path, vocab_size: int, dtype: Any) -> None:
    store = write(tmp_path, vocab_size=vocab_size)
    want = list(records(vocab_size, 40))
    assert len(store.entries) > 3
    assert len(store) == store.stored == 40
    for (ids, mask), (want_ids, spans) in zip(store, want, strict=True):
        kept = [any(start <= t < end for start, end in spans) for t in range(len(want_ids))]
        assert ids.dtype == dtype
        assert (ids.tolist(), mask.tolist()) == (want_ids, kept)
    assert store.lengths.tolist() == [len(ids) for ids, _ in want]
    assert store.token_count == sum(len(ids) for ids, _ in want)
    assert store.kept_count == sum(end - start for _, spans in want for start, end in spans)
    store.verify()


def test_sample_longer_than_a_shard_has_its_own(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, meta=META, vocab_size=9, shard_tokens=5) as writer:
        for length in (2, 3, 12, 1):
            writer.append([8] * length, [])
        writer.finish()
    assert [entry.tokens for entry in open_store(tmp_path).entries] == [5, 12, 1]


def test_read_is_stored_plus_quarantined(tmp_path: Path) -> None:
    entries = [{"source": "a.jsonl", "line": n, "reason": "no turn"} for n in (3, 8, 9)]
    with StoreWriter(tmp_path, meta=META, vocab_size=9) as writer:
        writer.append([1], [[0, 1]])
        for entry in entries:
            writer.quarantine(entry)
        writer.append([2], [])
        writer.finish()
    store = open_store(tmp_path)
    assert (store.read, store.stored, store.quarantined) == (5, 2, 3)
    lines = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == entries


def test_finished_store_takes_no_more_and_same_meta_finds_it_finished(tmp_path: Path) -> None:
    write(tmp_path)
    before = contents(tmp_path)
    with StoreWriter(tmp_path, meta=META, vocab_size=1000, shard_tokens=300) as writer:
        assert writer.finished
        assert writer.records_done == 40
        with pytest.raises(StoreError, match="is finished: its records never change"):
            writer.append([1], [])
        with pytest.raises(StoreError, match="is finished"):
            writer.quarantine({})
    assert contents(tmp_path) == before


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("meta['tokenizer']", {"meta": {**META, "tokenizer": "xyz"}}),
        ("meta['more']", {"meta": {**META, "more": 1}}),
        ("vocab_size", {"vocab_size": 999}),
        ("shard_tokens", {"shard_tokens": 301}),
    ],
)
def test_store_of_other_options_is_refused_by_name(
    tmp_path: Path, name: str, changed: dict[str, Any], finished: bool
) -> None:
    options: dict[str, Any] = {"meta": META, "vocab_size": 1000, "shard_tokens": 300}
    with StoreWriter(tmp_path, **options) as writer:
        writer.append([1], [])
        if finished:
            writer.finish()
    with pytest.raises(StoreError) as caught:
        StoreWriter(tmp_path, **{**options, **changed})
    assert f" has {name} = " in str(caught.value)


def test_second_writer_is_refused_until_the_first_closes(tmp_path: Path) -> None:
    other = (
        "import sys; from hermes_core import StoreWriter\n"
        "StoreWriter(sys.argv[1], meta={}, vocab_size=9).close()"
    )
    command = [sys.executable, "-P", "-c", other, str(tmp_path)]
    with StoreWriter(tmp_path, meta={}, vocab_size=9):
        with pytest.raises(StoreError, match="another writer is at work in"):
            StoreWriter(tmp_path, meta={}, vocab_size=9)
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert "another writer is at work in" in done.stderr
    assert subprocess.run(command, timeout=60).returncode == 0


def test_a_writer_that_is_dropped_lets_the_next_one_in(tmp_path: Path) -> None:
    StoreWriter(tmp_path, meta={}, vocab_size=9).append([1, 2], [[0, 1]])
    with StoreWriter(tmp_path, meta={}, vocab_size=9) as writer:
        assert writer.records_done == 0


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-64])


def overwrite(path: Path) -> None:
    path.write_bytes(b"NOTSTORE" + path.read_bytes()[8:])


def make_newer(path: Path) -> None:
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("shard-00001.bin", shorten, "bytes long, want"),
        ("shard-00001.bin", Path.unlink, "is missing, want"),
        ("shard-00001.bin", overwrite, "is not a shard of a token store"),
        ("store.json", lambda path: path.write_text("{"), "does not describe a token store"),
        ("store.json", lambda path: path.write_text("[1]"), "does not describe a token store"),
        ("store.json", make_newer, "newer than 1: update hermes4-core"),
        ("store.json", Path.unlink, "has no store.json"),
    ],
)
def test_damaged_store_is_refused_by_file(
    tmp_path: Path, name: str, damage: Any, message: str
) -> None:
    write(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(StoreError, match=message) as caught:
        list(open_store(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert name in str(caught.value)


def test_store_json_without_its_keys_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    about = json.loads((tmp_path / "store.json").read_text())
    del about["shards"]
    (tmp_path / "store.json").write_text(json.dumps(about))
    with pytest.raises(StoreError, match=r"store\.json is damaged: KeyError\('shards'\)"):
        open_store(tmp_path)


def test_one_flipped_bit_fails_verification(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "shard-00002.bin"
    data = bytearray(path.read_bytes())
    data[store_module.HEADER.size + 30] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"shard-00002\.bin is damaged"):
        open_store(tmp_path).verify()


def test_another_vocabulary_than_the_shards_were_written_for_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "store.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"vocab_size": about["vocab_size"] // 10}))
    with pytest.raises(StoreError, match=r"store\.json is damaged: .*fingerprint differs"):
        open_store(tmp_path)


@pytest.mark.parametrize(
    "at", [12, 48, 56, 64, 72], ids=["width", *(f"section {i}" for i in range(4))]
)
def test_a_header_that_differs_from_its_counts_is_refused(tmp_path: Path, at: int) -> None:
    write(tmp_path)
    path = tmp_path / "shard-00000.bin"
    data = bytearray(path.read_bytes())
    data[at] ^= 8
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"shard-00000\.bin"):
        open_store(tmp_path).shard(0)


def test_offsets_that_are_damaged_name_their_file(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "shard-00000.bin"
    start = store_module.read_header(path)[2][1]
    data = bytearray(path.read_bytes())
    data[start] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"shard-00000\.bin is damaged: offsets runs from 1"):
        open_store(tmp_path).shard(0)


def test_a_folder_whose_name_is_no_text_holds_a_store(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    store = write(folder)
    store.verify()
    assert [ids.tolist() for ids, *_ in store] == [ids for ids, _ in records(1000, 40)]


def test_missing_and_unfinished_folders_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"nowhere is not a token store"):
        open_store(tmp_path / "nowhere")
    with StoreWriter(tmp_path, meta={}, vocab_size=9) as writer:
        writer.append([1], [])
    with pytest.raises(StoreError, match="is unfinished: run the same command again"):
        open_store(tmp_path)


@pytest.mark.parametrize(
    ("token_ids", "spans", "message"),
    [
        ([1, 9], [], r"token_ids\[1\] is 9, outside \[0, 9\)"),
        ([1, -1], [], r"token_ids\[1\] is -1, outside"),
        ([1, 1 << 62], [], r"token_ids\[1\] is 4611686018427387904"),
        ([1.0], [], r"token_ids is float64"),
        ([], [], "at least one token"),
        ([[1]], [], r"token_ids has shape \[1, 1\]"),
        ([1, 2], [[0, 3]], r"kept_spans\[0\] is \[0, 3\]"),
        ([1, 2], [[-1, 1]], r"kept_spans\[0\] is \[-1, 1\]"),
        ([1, 2], [[1, 1]], r"kept_spans\[0\] is \[1, 1\]"),
        ([1, 2], [[1, 2], [0, 1]], r"kept_spans\[1\] is \[0, 1\]"),
        ([1, 2], [0, 1], r"kept_spans has shape \[2\]"),
        ([1, 2], [[0.0, 1.0]], "kept_spans is float64"),
    ],
)
def test_bad_record_is_refused_and_not_counted(
    tmp_path: Path, token_ids: Any, spans: Any, message: str
) -> None:
    with StoreWriter(tmp_path, meta={}, vocab_size=9) as writer:
        writer.append([3], [[0, 1]])
        with pytest.raises((TypeError, ValueError), match=message):
            writer.append(token_ids, spans)
        writer.append([4], [])
        writer.finish()
    store = open_store(tmp_path)
    assert (store.read, store.lengths.tolist(), store[1][0].tolist()) == (2, [1, 1], [4])


def test_entry_that_is_no_json_is_refused_and_not_counted(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, meta={}, vocab_size=9) as writer:
        with pytest.raises(TypeError, match="entry is not JSON"):
            writer.quarantine({"line": object()})
        writer.append([4], [])
        writer.finish()
    assert open_store(tmp_path).read == 1


def test_store_of_many_shards_opens_without_reading_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # two thousand of them take seconds
    with StoreWriter(tmp_path, meta={}, vocab_size=9, shard_tokens=2) as writer:
        for _ in range(570):
            writer.append([1, 2], [[0, 2]])
        writer.finish()
    for path in tmp_path.glob("shard-*.bin"):  # opening needs nothing of them but their size
        size = path.stat().st_size
        path.write_bytes(b"")
        with path.open("r+b") as file:
            file.truncate(size)
    store = open_store(tmp_path)
    assert (len(store), len(store.entries), store.token_count) == (570, 570, 1140)
    with pytest.raises(StoreError, match=r"shard-00000\.bin is not a shard"):
        store.shard(0)


# Feeds the records that no commit covers yet, a line for each fifty, then finishes.
SCRIPT = """
import random, sys, time
from hermes_core import StoreWriter, store_writer
store_writer.COMMIT_SECONDS = 0.002
with StoreWriter(sys.argv[1], meta={"of": "kill"}, vocab_size=70000, shard_tokens=2500) as writer:
    print(writer.records_done, flush=True)
    for count, number in enumerate(range(writer.records_done, 2500)):
        rng = random.Random(number)
        length = rng.randint(1, 90)
        if number % 13 == 5:
            writer.quarantine({"line": number})
        else:
            writer.append([rng.randrange(70000) for _ in range(length)], [[0, length]])
        if count % 50 == 0:
            print(flush=True)
            time.sleep(0.01)  # a fast machine would be through before it is killed
    writer.finish()
"""


def run_writer(folder: Path, *, kill_after: tuple[int, float] | None = None) -> tuple[int, int]:
    """records_done at the start, and the exit code; killed so many lines and seconds later."""
    command = [sys.executable, "-P", "-c", SCRIPT, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            done = int(process.stdout.readline())
            if kill_after is None:
                process.stdout.read()
                return done, process.wait(timeout=100)
            for _ in range(kill_after[0]):
                process.stdout.readline()
            time.sleep(kill_after[1])
        finally:
            process.kill()
        return done, process.wait(timeout=100)


def test_kill_at_any_moment_changes_no_byte(tmp_path: Path) -> None:
    rng = random.Random(0)
    assert run_writer(tmp_path / "calm") == (0, 0)
    begun = []
    for _ in range(12):
        moment = (rng.randint(0, 4), rng.uniform(0, 0.02))
        done, code = run_writer(tmp_path / "stormy", kill_after=moment)
        assert code == -signal.SIGKILL
        begun.append(done)
    done, code = run_writer(tmp_path / "stormy")
    assert code == 0
    begun.append(done)
    assert begun == sorted(begun)
    assert len(set(begun)) > 6  # a restart goes on, it does not begin again
    assert open_store(tmp_path / "stormy").quarantined == 192
    assert contents(tmp_path / "stormy") == contents(tmp_path / "calm")


def test_a_store_stays_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "store")
    monkeypatch.chdir(tmp_path)
    store = open_store("store")
    monkeypatch.chdir("/")
    assert len(store.lengths) == len(pickle.loads(pickle.dumps(store)).lengths) == 40
    store.verify()
    (tmp_path / "store" / "shard-00001.bin").unlink()
    with pytest.raises(StoreError, match=r"shard-00001\.bin cannot be read"):
        store.verify()


def test_a_sample_without_a_possible_length_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "shard-00000.bin"
    second = store_module.read_header(path)[2][1] + 8
    data = bytearray(path.read_bytes())
    data[second + 7] = 0x80
    path.write_bytes(data)
    store = open_store(tmp_path)
    for _ in range(2):
        with pytest.raises(StoreError, match=r"is damaged: its [\d,]+ tokens are in samples of -"):
            len(store.lengths)


def test_committed_shards_are_known_by_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        StoreWriter, "_shard_path", lambda writer, number: writer.folder / f"shard-{number}.bin"
    )
    options: Any = {"meta": META, "vocab_size": 9, "shard_tokens": 1}
    with StoreWriter(tmp_path, **options) as writer:
        for _ in range(13):  # 12 of them in shards
            writer.append([1], [])
    shutil.copy(tmp_path / "shard-0.bin", tmp_path / "shard-12.bin")  # not committed
    with StoreWriter(tmp_path, **options):
        left = {path.name for path in tmp_path.glob("shard-*.bin")}
    assert left == {f"shard-{number}.bin" for number in range(12)}
    (tmp_path / "shard-9.bin").unlink()
    with pytest.raises(StoreError, match=r"shard-9\.bin is missing: it was committed"):
        StoreWriter(tmp_path, **options)
