"""Batches from a store that is not in memory: how long the loop that wants them waits."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from bench.harness import Result
from bench.lengths import ROW_LENGTH
from hermes_core import (
    Packing,
    RowLoader,
    Rows,
    Samples,
    Store,
    StoreWriter,
    build_rows,
    open_store,
)

BATCHES = 64
STEP_S = 0.005  # of a trainer that uses a batch, here asleep
DEPTH = 2
RUNS = 7


def from_a_cold_store(samples: Samples, packing: Packing, batch: int) -> Iterator[Result | str]:
    """Milliseconds that a batch is waited for, with and without a loader, cold and warm."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(samples, folder)
        starts = range(0, BATCHES * batch, batch)

        def plain(store: Store) -> Iterator[Rows]:
            return (build_rows(store, packing, range(at, at + batch)) for at in starts)

        def ahead(store: Store) -> Iterator[Rows]:
            rows = range(BATCHES * batch)
            with RowLoader(store, packing, rows=rows, batch_rows=batch, depth=DEPTH) as loader:
                yield from loader

        if drop(folder) > 0.01:
            yield "cold store: skipped, its file system keeps what it is told to drop"
            return
        for label, make, cold in (
            ("build_rows, warm store", plain, False),
            ("build_rows, cold store", plain, True),
            (f"RowLoader depth {DEPTH}, cold store", ahead, True),
        ):
            runs = [waits(folder, make, cold=cold) for _ in range(RUNS)]
            yield told(label, runs, batch, cached(folder))


def waits(folder: Path, make: Callable[[Store], Iterator[Rows]], *, cold: bool) -> list[float]:
    """Seconds that each batch was waited for, a step after each."""
    if cold:
        drop(folder)
    waited, start = [], time.perf_counter()
    for rows in make(open_store(folder)):
        waited.append(time.perf_counter() - start)
        del rows
        time.sleep(STEP_S)
        start = time.perf_counter()
    return waited


def told(backend: str, runs: list[list[float]], batch: int, share: float) -> Result:
    means = sorted(1e3 * sum(run) / len(run) for run in runs)
    worst = 1e3 * float(np.median([max(run) for run in runs]))
    return Result(
        op="rows from a store",
        shape=f"{BATCHES} batches of {batch} x {ROW_LENGTH}",
        dtype="uint32 ids in, int64 out",
        backend=backend,
        unit="ms waited/batch",
        value=float(np.median(means)),
        spread=(means[0], means[-1]),
        runs=len(runs),
        notes=f"longest {worst:.1f} ms; step {1e3 * STEP_S:.0f} ms; {share:.0%} of the store read",
    )


def write(samples: Samples, folder: Path) -> None:
    with StoreWriter(folder, meta={}, vocab_size=1 << 32) as writer:
        for ids, mask in samples:
            writer.append(ids, [[int(np.argmax(mask)), len(ids)]])
        writer.finish()
    os.sync()


def drop(folder: Path) -> float:
    """Tell the kernel to forget the store's pages; the share that it has kept."""
    gc.collect()  # stores of earlier runs, whose maps would keep the pages
    for path in folder.glob("*.bin"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return cached(folder)


def cached(folder: Path) -> float:
    """The share of the store's pages that the kernel has in memory."""
    libc, there = ctypes.CDLL(None), []
    for path in folder.glob("*.bin"):
        mapped = np.memmap(path, np.uint8, "r")
        pages = np.zeros(-(-mapped.size // mmap.PAGESIZE), np.uint8)
        address, size = ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(mapped.size)
        libc.mincore(address, size, ctypes.c_void_p(pages.ctypes.data))
        there.append(pages & 1)
    return float(np.concatenate(there).mean())
