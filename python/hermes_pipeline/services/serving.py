"""Where a model answers: at a given address, or behind a server that we start and watch."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hermes_pipeline.services.guarded import Guarded
from hermes_pipeline.services.progress import waiting
from hermes_pipeline.services.server import Server

WATCH_S = 0.5


class Address(NamedTuple):
    base_url: str
    model: str  # the name it is known by there
    check: Callable[[], None]  # raises UserError when a server of ours has died


@contextmanager
def at_address(
    model: str, base_url: str | None, *, max_model_len: int | None, log: Path
) -> Iterator[Address]:
    """The address of a model, for the time of a block.

    Args:
        model: its name at ``base_url``; a folder that we serve where there is none.
        max_model_len, log: of our server.
    """
    if base_url is not None:
        yield Address(base_url, model, lambda: None)
        return
    server = Server(model, max_model_len=max_model_len, log=log)
    with running(server):
        yield Address(server.base_url, server.name, server.check)


@contextmanager
def running(program: Guarded) -> Iterator[None]:
    """The program, from its start to its end, with something to look at until it is ready."""
    try:
        with waiting(f"start {program.called} (log: {program.log})") as tick:
            program.start()
            program.wait_ready(tick)
        yield
    finally:
        program.stop()


async def watched(work: Coroutine[Any, Any, None], check: Callable[[], None]) -> None:
    """Have ``work`` done; end it at once by what ``check`` raises, now and then."""

    async def watch() -> None:
        while True:
            check()
            await asyncio.sleep(WATCH_S)

    watching = asyncio.create_task(watch())
    working = asyncio.create_task(work)
    try:
        await asyncio.wait({watching, working}, return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            watching.result()
        await working
    finally:
        for task in (watching, working):
            task.cancel()
        await asyncio.gather(watching, working, return_exceptions=True)


def first_of(group: BaseExceptionGroup[Any]) -> BaseException:
    """The first of the errors that several tasks have ended with."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def fingerprint(model: Path) -> str:
    """The model folder with what tells one state of its files from another."""
    files = sorted(p for p in model.iterdir() if p.is_file())
    stamp = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return f"{model.resolve()} {hashlib.sha256(repr(stamp).encode()).hexdigest()[:16]}"
