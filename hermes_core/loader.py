"""Batches of rows, built ahead of the loop that takes them."""

from __future__ import annotations

import hashlib
import operator
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from functools import cached_property, partial
from queue import Empty, SimpleQueue
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike

from hermes_core import _C
from hermes_core.packing import Packing
from hermes_core.rows import (
    RowNumbers,
    Rows,
    build_rows,
    check_row_numbers,
    row_numbers,
)
from hermes_core.samples import Samples, check_integer

Tasks = SimpleQueue[tuple[Future[Rows], Callable[[], Rows]] | None]


class RowLoader(Iterator[Rows]):
    """The rows of a plan in batches, which a thread builds while the caller uses the last one.

    The thread also asks the kernel for the tokens of later batches, so that a store on a disk is
    read while nobody waits for it. A batch's memory is used again once its arrays are gone.

        with RowLoader(samples, packing, batch_rows=8) as batches:
            for rows in batches:
                ...

    One thread at a time may take batches. What the loader's own thread fails with is raised where
    its batch would have come, and again at each further attempt. `close`, the end of the ``with``
    block and the last batch end that thread.

    Args:
        batch_rows: rows in a batch; the last one may have fewer.
        rows: numbers of rows of the plan in the order in which they come, all if None; each rank of
            several takes its own.
        start: of ``rows``, how many were taken before.
        depth: batches that are built ahead; tokens are asked for as many batches further.
        pad_id, dtype, threads: as `build_rows` takes them.
    """

    def __init__(
        self,
        samples: Samples,
        packing: Packing,
        *,
        batch_rows: int,
        rows: RowNumbers | None = None,
        start: int = 0,
        depth: int = 2,
        pad_id: int = 0,
        dtype: DTypeLike = np.int64,
        threads: int = 1,
    ) -> None:
        self._samples, self._packing = samples, packing
        given = range(packing.rows) if rows is None else rows
        self._rows = row_numbers(given, packing.rows).copy()  # the thread reads it later
        check_row_numbers(self._rows, packing.rows)
        self._batch_rows = check_integer("batch_rows", batch_rows, 1, (1 << 31) - 1)
        self._depth = check_integer("depth", depth, 1, 1 << 16)
        options: dict[str, Any] = {"pad_id": pad_id, "dtype": dtype, "threads": threads}
        build_rows(samples, packing, range(0), **options)  # refuses here, not in the thread
        options |= {"pad_id": operator.index(pad_id), "threads": operator.index(threads)}
        self._options = options
        self._taken = check_integer("start", start, 0, len(self._rows))
        self._ahead: deque[tuple[int, Future[Rows]]] = deque()  # by first row
        self._asked = self._taken  # how far the kernel was asked; for the thread alone
        self._tasks: Tasks = SimpleQueue()
        self._thread: threading.Thread | None = None

    def __next__(self) -> Rows:
        if self._is_broken():
            self._forget()
        self._submit()
        if not self._ahead:
            self.close()
            raise StopIteration
        first, future = self._ahead[0]
        error = future.exception()  # waits; an interrupt here loses no batch
        if error is not None:
            self._forget()
            raise error
        rows = future.result()
        self._ahead.popleft()
        self._taken = first + len(rows.input_ids)
        self._submit()
        return rows

    def state_dict(self) -> dict[str, Any]:
        """How many rows the caller has taken, and a digest of which rows these are."""
        return {"rows": self._taken, "of": self._digest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind the rows that were taken when `state_dict` gave this.

        Raises:
            ValueError: not a state, of other rows than these, or there are not so many.
        """
        if not isinstance(state, Mapping) or "rows" not in state:
            raise ValueError(f"the state is {state!r}, want what state_dict gave")
        if state.get("of", self._digest) != self._digest:
            raise ValueError(
                "the state is of other rows than these: give the loader the same plan, such as a "
                "saved one, and the same rows; another seed, setting or version packs otherwise"
            )
        self._taken = check_integer("rows", state["rows"], 0, len(self._rows))
        self._forget()

    def close(self) -> None:
        """End the thread; batches that were not taken are built again when they are asked for."""
        self._forget()
        self._tasks.put(None)
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def _digest(self) -> str:
        """Of the samples in each row, in the order in which rows come."""
        digest = hashlib.blake2b(digest_size=16)
        for numbers in (self._packing.samples, self._packing.row_offsets, self._rows):
            digest.update(np.ascontiguousarray(numbers, np.int64).data)
        return digest.hexdigest()

    def _is_broken(self) -> bool:
        """Did an interrupt come between two lines of `__next__`, or is this a forked process?"""
        dead = self._thread is not None and not self._thread.is_alive()
        return dead or (bool(self._ahead) and self._ahead[0][0] != self._taken)

    def _submit(self) -> None:
        while len(self._ahead) < self._depth:
            first = self._ahead[-1][0] + self._batch_rows if self._ahead else self._taken
            if first >= len(self._rows):
                return
            if self._thread is None:
                self._start()
            future: Future[Rows] = Future()
            self._tasks.put((future, partial(self._build, first)))
            self._ahead.append((first, future))

    def _start(self) -> None:
        """Start the thread, which knows its tasks but not the loader, so that this can be gone."""
        self._tasks = SimpleQueue()
        weakref.finalize(self, self._tasks.put, None).atexit = False
        self._thread = threading.Thread(
            target=_work, args=(self._tasks,), name="hermes_core rows", daemon=False
        )
        try:
            self._thread.start()
        except RuntimeError:  # the system has no thread left
            self._thread = None
            raise

    def _build(self, first: int) -> Rows:
        """The batch that begins with row ``first``; the thread's work."""
        asked = max(self._asked, first)
        self._asked = first + (self._depth + 1) * self._batch_rows
        _C.read_ahead(
            self._samples._in_use,
            self._samples.shard,
            self._packing.samples,
            self._packing.row_offsets,
            self._rows[asked : self._asked],
            self._packing.row_length,
        )
        numbers = self._rows[first : first + self._batch_rows]
        return build_rows(self._samples, self._packing, numbers, **self._options)

    def _forget(self) -> None:
        """Drop what was built ahead and wait for the thread to stand still."""
        futures = [future for _, future in self._ahead]
        self._ahead.clear()  # first: an interrupt of the wait leaves no batch that was cancelled
        if self._thread is not None and self._thread.is_alive():
            for future in futures:
                future.cancel()
            wait(futures)
        else:  # in a forked process the thread may have died with a future's lock in its hand
            self._thread = None
        self._asked = self._taken


def _work(tasks: Tasks) -> None:
    """Do the tasks until there is None, or until the program ends."""
    while threading.main_thread().is_alive():
        try:
            task = tasks.get(timeout=0.2)
        except Empty:
            continue
        if task is None:
            return
        future, build = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(build())
            except BaseException as error:
                future.set_exception(error)
        del task, future, build  # the loader, which may be waited for by nobody else
