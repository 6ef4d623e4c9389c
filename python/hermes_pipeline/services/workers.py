"""Work in other processes, with the results in the order of the work."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

Work = TypeVar("Work")
Result = TypeVar("Result")


class WorkerDied(Exception):
    """A worker process ended without a result, as when the system runs out of memory."""


def map_in_order(
    function: Callable[[Work], Result],
    works: Iterable[Work],
    *,
    setup: Callable[..., None],
    given: tuple[Any, ...],
    workers: int,
) -> Generator[tuple[Work, Result], None, None]:
    """Yield each work with its result, in the order of ``works``.

    At most a few works are under way, so ``works`` may be endless. Close it to end the processes.

    Args:
        setup: called with ``given`` once in each process before its first work.
        workers: processes; with one, everything is done here. More are started from the main
            thread alone, the only one that can put Ctrl-C off.

    Raises:
        WorkerDied: a process was killed.
    """
    if workers == 1:
        setup(*given)
        for work in works:
            yield work, function(work)
        return
    # Spawned, not forked: tokenizers and Arrow have threads.
    spawn = multiprocessing.get_context("spawn")
    with _no_interrupt():  # what keeps track of its semaphores is a process, too
        pool = ProcessPoolExecutor(workers, spawn, initializer=_start, initargs=(setup, given))
    pending: deque[tuple[Work, Future[Result]]] = deque()
    try:
        for work in works:
            with _no_interrupt():
                pending.append((work, pool.submit(function, work)))
            if len(pending) > 2 * workers:
                done, future = pending.popleft()
                yield done, future.result()
        while pending:
            done, future = pending.popleft()
            yield done, future.result()
    except BrokenProcessPool as error:
        raise WorkerDied(str(error)) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Put Ctrl-C off to the end; the processes started inside never hear of it, nor of a hang-up.

    It reaches every process of the terminal, and the first one alone decides.
    """
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    # A process begins with the mask of the thread that starts it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def _start(setup: Callable[..., None], given: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    setup(*given)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
