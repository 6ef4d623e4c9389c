"""The loader: the batches of build_rows in their order, from any place, and no thread left."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hermes_core import (
    _C,
    Packing,
    RowLoader,
    Rows,
    Samples,
    StoreWriter,
    build_rows,
    open_store,
    pack,
)

LENGTH = 300
BATCH = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of several shards."""
    made = tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(3)
    with StoreWriter(made, meta={}, vocab_size=60_000, shard_tokens=3_000) as writer:
        for length in rng.integers(1, LENGTH + 1, size=150):
            writer.append(rng.integers(0, 60_000, length), [[length // 3, length]])
        writer.finish()
    return made


@pytest.fixture
def samples(folder: Path) -> Samples:
    return open_store(folder)


@pytest.fixture(scope="module")
def packing(folder: Path) -> Packing:
    plan = pack(open_store(folder).lengths, row_length=LENGTH)
    assert plan.rows % BATCH  # so the last batch is a short one
    return plan


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def batches(samples: Samples, packing: Packing, rows: Any, first: int = 0) -> list[list[Any]]:
    """What build_rows gives, batch by batch."""
    return [
        arrays(build_rows(samples, packing, rows[at : at + BATCH]))
        for at in range(first, len(rows), BATCH)
    ]


def arrays(rows: Rows) -> list[Any]:
    parts = (rows.input_ids, rows.labels, rows.positions, rows.cu_seqlens)
    return [*(part.tolist() for part in parts), rows.kept_count]


@pytest.mark.parametrize("depth", [1, 2, 50])
def test_batches_are_those_of_build_rows_in_their_order(
    samples: Samples, packing: Packing, depth: int
) -> None:
    expected = batches(samples, packing, range(packing.rows))
    with RowLoader(samples, packing, batch_rows=BATCH, depth=depth) as loader:
        assert [arrays(rows) for rows in loader] == expected


@pytest.mark.parametrize(
    "rows", [range(9, 1, -1), [3, 3, 0, 5, 2, 1, 7], np.arange(11, dtype=np.uint8)[::2], []]
)
def test_rows_come_as_they_are_numbered(samples: Samples, packing: Packing, rows: Any) -> None:
    with RowLoader(samples, packing, rows=rows, batch_rows=BATCH) as loader:
        assert [arrays(batch) for batch in loader] == batches(samples, packing, rows)


def test_options_reach_build_rows(samples: Samples, packing: Packing) -> None:
    options: dict[str, Any] = {"pad_id": 9, "dtype": np.int32}
    with RowLoader(samples, packing, batch_rows=packing.rows, **options) as loader:
        (rows,) = loader
    assert rows.input_ids.dtype == np.int32
    assert arrays(rows) == arrays(build_rows(samples, packing, range(packing.rows), **options))


def test_batches_that_are_kept_do_not_change(samples: Samples, packing: Packing) -> None:
    with RowLoader(samples, packing, batch_rows=BATCH, depth=3) as loader:
        kept = list(loader)
    assert [arrays(rows) for rows in kept] == batches(samples, packing, range(packing.rows))


@pytest.mark.parametrize("taken", [0, 1, 5, 10_000])
def test_loader_goes_on_where_its_state_was_saved(
    samples: Samples, packing: Packing, taken: int
) -> None:
    with RowLoader(samples, packing, batch_rows=BATCH) as loader:
        for _, _ in zip(range(taken), loader, strict=False):
            pass
        state = loader.state_dict()
    first = min(taken * BATCH, packing.rows)
    assert state["rows"] == first
    expected = batches(samples, packing, range(packing.rows), first)
    with RowLoader(samples, packing, batch_rows=BATCH) as fresh:
        fresh.load_state_dict(state)
        assert [arrays(rows) for rows in fresh] == expected
    with RowLoader(samples, packing, batch_rows=BATCH, start=state["rows"]) as fresh:
        assert [arrays(rows) for rows in fresh] == expected


def test_state_may_be_loaded_between_batches(samples: Samples, packing: Packing) -> None:
    expected = batches(samples, packing, range(packing.rows))
    with RowLoader(samples, packing, batch_rows=BATCH, depth=3) as loader:
        next(loader), next(loader)
        loader.load_state_dict({"rows": 0})
        assert [arrays(rows) for rows in loader] == expected
        loader.load_state_dict({"rows": BATCH})  # behind the end as well
        assert arrays(next(loader)) == expected[1]


def test_closed_loader_goes_on_behind_the_last_batch_taken(
    samples: Samples, packing: Packing
) -> None:
    loader = RowLoader(samples, packing, batch_rows=BATCH)
    before = set(threading.enumerate())
    next(loader)
    assert set(threading.enumerate()) > before
    loader.close()
    assert set(threading.enumerate()) == before
    loader.close()
    expected = batches(samples, packing, range(packing.rows))
    assert arrays(next(loader)) == expected[1]
    loader.close()


def test_forgotten_loader_leaves_no_thread(samples: Samples, packing: Packing) -> None:
    loader = RowLoader(samples, packing, batch_rows=BATCH)
    thread = set(threading.enumerate())
    next(loader)
    (thread,) = set(threading.enumerate()) - thread
    del loader
    thread.join(timeout=30)  # type: ignore[attr-defined]
    assert not thread.is_alive()  # type: ignore[attr-defined]


def damaged(samples: Samples, row: int, packing: Packing) -> tuple[Samples, Any, int]:
    """The same samples in memory, one of this row with a wrong end; and what that was."""
    copies = Samples.from_lists(
        [samples[i][0] for i in range(len(samples))], [samples[i][1] for i in range(len(samples))]
    )
    offsets, sample = copies.shards[0].offsets, int(packing.samples[packing.row_offsets[row]])
    good = int(offsets[sample + 1])
    offsets[sample + 1] = -1
    return copies, offsets[sample + 1 : sample + 2], good


def test_error_is_raised_where_its_batch_would_come(samples: Samples, packing: Packing) -> None:
    copies, end, good = damaged(samples, 2 * BATCH + 1, packing)
    expected = batches(samples, packing, range(packing.rows))
    with RowLoader(copies, packing, batch_rows=BATCH, depth=5) as loader:
        assert [arrays(next(loader)) for _ in range(2)] == expected[:2]
        for _ in range(2):
            with pytest.raises(ValueError, match="the store is corrupt"):
                next(loader)
            assert loader.state_dict()["rows"] == 2 * BATCH
        end[:] = good
        assert [arrays(rows) for rows in loader] == expected[2:]


def test_missing_shard_is_told_as_the_store_tells_it(
    folder: Path, packing: Packing, tmp_path: Path
) -> None:
    store = open_store(folder)
    store.folder = tmp_path  # where no shard is
    with (
        RowLoader(store, packing, batch_rows=BATCH) as loader,
        pytest.raises(ValueError, match=r"shard-\d+.bin is missing"),
    ):
        next(loader)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"batch_rows": 0}, ValueError, r"batch_rows is 0, outside \[1, "),
        ({"batch_rows": 1.5}, TypeError, "batch_rows is 1.5, want an integer"),
        ({"depth": 0}, ValueError, r"depth is 0, outside \[1, "),
        ({"start": -1}, ValueError, r"start is -1, outside \[0, "),
        ({"start": 10_000}, ValueError, r"start is 10000, outside \[0, "),
        ({"rows": [0, 10_000]}, ValueError, r"rows\[1\] is 10000, outside \[0, "),
        ({"rows": range(5, -2, -1)}, ValueError, r"rows\[6\] is -1, outside \[0, "),
        ({"rows": [0.5]}, TypeError, "rows is float64, want integers"),
        ({"pad_id": -1}, ValueError, r"pad_id is -1, outside \[0, "),
        ({"pad_id": 1 << 31, "dtype": np.int32}, ValueError, r"pad_id is 2147483648, outside "),
        ({"dtype": np.int16}, TypeError, "dtype is int16, want int64 or int32"),
        ({"threads": 0}, ValueError, r"threads is 0, outside \[1, "),
    ],
)
def test_wrong_arguments_are_refused_at_once(
    samples: Samples, packing: Packing, change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        RowLoader(samples, packing, **{"batch_rows": BATCH, **change})


@pytest.mark.parametrize("rows", [-1, 10_000])
def test_state_of_more_rows_is_refused(samples: Samples, packing: Packing, rows: int) -> None:
    loader = RowLoader(samples, packing, batch_rows=BATCH)
    with pytest.raises(ValueError, match=rf"rows is {rows}, outside \[0, {packing.rows}\]"):
        loader.load_state_dict({"rows": rows})


def test_state_of_other_rows_is_refused(samples: Samples, packing: Packing) -> None:
    state = RowLoader(samples, packing, batch_rows=BATCH).state_dict()
    again, other = (pack(samples.lengths, row_length=LENGTH, seed=seed) for seed in (0, 1))
    RowLoader(samples, again, batch_rows=2).load_state_dict(state)  # batches may be others
    for plan, rows in ((other, None), (packing, range(packing.rows)[::-1])):
        loader = RowLoader(samples, plan, batch_rows=BATCH, rows=rows)
        with pytest.raises(ValueError, match="the state is of other rows than these"):
            loader.load_state_dict(state)
        assert loader.state_dict()["rows"] == 0


def test_what_is_no_state_is_refused(samples: Samples, packing: Packing) -> None:
    with pytest.raises(ValueError, match=r"the state is \{\}, want what"):
        RowLoader(samples, packing, batch_rows=BATCH).load_state_dict({})


def test_more_tokens_may_be_asked_for_than_a_batch_can_hold() -> None:
    three = Samples.from_lists([[1]] * 3, [[True]] * 3)
    plan = pack([1] * 3, row_length=1 << 30, max_samples=1)
    rows = np.arange(plan.rows)
    _C.read_ahead(three._in_use, three.shard, plan.samples, plan.row_offsets, rows, plan.row_length)


def in_memory(shard: Path, start: int, end: int) -> bool:
    """Does the kernel hold all these bytes of the file?"""
    mapped = np.memmap(shard, np.uint8, "r")
    pages = np.zeros(-(-mapped.size // mmap.PAGESIZE), np.uint8)
    address, size = ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(mapped.size)
    assert ctypes.CDLL(None).mincore(address, size, ctypes.c_void_p(pages.ctypes.data)) == 0
    return bool((pages[start // mmap.PAGESIZE : -(-end // mmap.PAGESIZE)] & 1).all())


def test_tokens_of_later_batches_are_read_and_no_others(tmp_path: Path) -> None:
    lengths = [5_000_000, 5_000_000, 20_000, 5_000_000]
    with StoreWriter(tmp_path, meta={}, vocab_size=1 << 17) as writer:
        for length in lengths:
            writer.append(np.ones(length, np.int64), [])
        writer.finish()
    packing = pack(lengths, row_length=5_000_000, seed=None)
    assert packing.samples.tolist() == [0, 1, 3, 2]
    (shard,) = tmp_path.glob("*.bin")
    with shard.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if any(in_memory(shard, at, at + 1) for at in (0, 36_000_000, 40_000_256)):
        pytest.skip(f"the file system of {tmp_path} keeps the pages that it is told to drop")
    rows, deadline = [0, 0, 3], time.monotonic() + 30
    with RowLoader(open_store(tmp_path), packing, rows=rows, batch_rows=1, depth=1) as loader:
        next(loader)  # the last batch is not built before the second is taken
        while not in_memory(shard, 40_000_256, 40_080_000):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert not in_memory(shard, 36_000_000, 36_000_001)


class Interrupt(Exception):
    pass


def test_interrupted_wait_loses_no_batch(
    samples: Samples, packing: Packing, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, go_on, load = threading.Event(), threading.Event(), samples._load
    monkeypatch.setattr(
        samples, "_load", lambda index: (waits.set(), go_on.wait(60), load(index))[2]
    )

    def interrupt(*_: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    main = threading.get_ident()

    def kill() -> None:  # once the loader's thread waits, for which the main one does
        assert waits.wait(60)
        time.sleep(0.2)
        signal.pthread_kill(main, signal.SIGUSR1)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with RowLoader(samples, packing, batch_rows=BATCH) as loader:
            with pytest.raises(Interrupt):
                next(loader)
            go_on.set()
            assert [arrays(rows) for rows in loader] == batches(
                samples, packing, range(packing.rows)
            )
    finally:
        go_on.set()
        killer.join()
        signal.signal(signal.SIGUSR1, before)


FORK = """
import os, sys
from hermes_core import RowLoader, build_rows, open_store, pack

samples = open_store(sys.argv[1])
packing = pack(samples.lengths, row_length=300)
loader = RowLoader(samples, packing, batch_rows=4, depth=3)
first = next(loader)
child = os.fork()
for at in range(4, packing.rows, 4):
    expected = build_rows(samples, packing, range(at, min(at + 4, packing.rows)))
    if next(loader).labels.tolist() != expected.labels.tolist():
        os._exit(1)
loader.close()
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("the same in both")
"""


def test_forked_process_goes_on_with_a_thread_of_its_own(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", FORK, str(folder)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "the same in both\n", done.stderr


SLOW = """
import json, sys, threading
from hermes_core import RowLoader, open_store, pack

class Slow(type(open_store(sys.argv[1]))):
    waits = float(sys.argv[2])

    def _map(self, index):
        print("waiting", flush=True)
        threading.Event().wait(self.waits)
        self.waits = 0
        return super()._map(index)

plain = open_store(sys.argv[1])
packing = pack(plain.lengths, row_length=300)
store = Slow(plain.folder, json.loads((plain.folder / "store.json").read_text()))
{loop}
"""
WITH = """
with RowLoader(store, packing, batch_rows=4) as loader:
    for rows in loader:
        pass
"""
WITHOUT = "list(RowLoader(store, packing, batch_rows=4))"
ABANDONED = "loader = RowLoader(store, packing, batch_rows=4, depth=9); next(loader)"


@pytest.mark.parametrize("loop", [WITH, WITHOUT], ids=["with", "without"])
def test_interrupt_while_a_batch_is_waited_for_ends_the_program(folder: Path, loop: str) -> None:
    program = subprocess.Popen(
        [sys.executable, "-P", "-c", SLOW.format(loop=loop), str(folder), "5"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert program.stdout is not None
    assert program.stdout.readline() == "waiting\n"
    os.kill(program.pid, signal.SIGINT)
    _, errors = program.communicate(timeout=60)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert program.returncode == -signal.SIGINT


def test_program_ends_with_a_loader_in_the_middle(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", SLOW.format(loop=ABANDONED), str(folder), "1"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
