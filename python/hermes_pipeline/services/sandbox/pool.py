"""The sandbox: some boxes, and the jobs that wait for one."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from hermes_pipeline.services.sandbox.bubblewrap import Bubblewrap
from hermes_pipeline.services.sandbox.jobs import Box, BoxDied, Case, Job, Limits, Result

MAX_DEATHS = 3  # of boxes, in a row


class SandboxBroken(Exception):
    """Boxes died one after another; the message says how the last one did."""


class Sandbox:
    """Runs a model's code under hard limits, cut off from the machine.

    For the time of an `async with` block; each box starts at the first job that needs it.

    Args:
        workers: jobs at a time, each in a warm box of its own; one for each core if None.
        limits: of a run that brings none.
        make_box: makes the box of a slot, a number from 0.

    Raises:
        UserError: there is no isolation here; the message says why and the way out.
    """

    def __init__(
        self,
        *,
        workers: int | None = None,
        limits: Limits | None = None,
        make_box: Callable[[int], Box] = Bubblewrap,
    ) -> None:
        count = len(os.sched_getaffinity(0)) if workers is None else workers
        if count < 1:
            raise ValueError(f"workers is {count}; it must be at least 1")
        self._limits = Limits() if limits is None else limits
        self._boxes = [make_box(slot) for slot in range(count)]
        # The last one used is the next one: cold boxes start only when all warm ones are busy.
        self._idle: asyncio.LifoQueue[Box] = asyncio.LifoQueue()
        for box in self._boxes:
            self._idle.put_nowait(box)
        self._running: set[asyncio.Future[Any]] = set()
        self._deaths = 0

    async def __aenter__(self) -> Sandbox:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await _cancel(self._running)
        await asyncio.gather(*(box.close() for box in self._boxes))

    async def run(
        self, source: str, *, stdin: str | bytes = b"", limits: Limits | None = None
    ) -> Result:
        """Run a Python program with nothing but the standard library."""
        return await self.run_job(Job(limits or self._limits, _bytes(stdin), source))

    async def run_cases(self, source: str, function: str, cases: Sequence[Case]) -> list[Result]:
        """Call a function of a program once for each case; results in the order of the cases.

        Each case is a run of its own: it has its own limits and cannot change another's result.

        Args:
            function: its name, or "Class.method" for a method of a fresh object.
        """
        jobs = [
            Job(
                case.limits or self._limits,
                source=source,
                function=function,
                arguments=case.arguments,
            )
            for case in cases
        ]
        running = [asyncio.ensure_future(self.run_job(job)) for job in jobs]
        try:
            return await asyncio.gather(*running)
        finally:
            await _cancel(running)

    async def run_command(
        self,
        command: Sequence[str],
        *,
        files: Mapping[str, bytes] | None = None,
        stdin: str | bytes = b"",
        limits: Limits | None = None,
    ) -> Result:
        """Run a command of the system.

        Args:
            files: by path under the working folder, which is empty otherwise.
        """
        job = Job(limits or self._limits, _bytes(stdin), command=command, files=files or {})
        return await self.run_job(job)

    async def run_job(self, job: Job) -> Result:
        """Run a job, once more on a fresh box if its box died.

        Raises:
            SandboxBroken: boxes died again and again, whatever the job.
        """
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            return await self._try_twice(job)
        finally:
            self._running.discard(task)

    async def _try_twice(self, job: Job) -> Result:
        name = reason = ""
        for _ in range(2):
            box = await self._idle.get()
            try:
                if not box.is_ready:
                    await box.start()
                result = await box.run(job)
                self._deaths = 0
                return result
            except BoxDied as died:
                name, reason = box.name, str(died)
                self._deaths += 1
                await box.close()
                if self._deaths >= MAX_DEATHS:
                    raise SandboxBroken(
                        f"{self._deaths} boxes in a row died, the last because {reason}"
                    ) from died
            finally:
                self._idle.put_nowait(box)
        return Result("box_error", None, "", "", 0.0, 0.0, name, reason)


async def _cancel(running: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel what still runs, and wait until it has ended."""
    left = [each for each in running if not each.done()]
    for each in left:
        each.cancel()
    await asyncio.gather(*left, return_exceptions=True)


def _bytes(text: str | bytes) -> bytes:
    return text.encode(errors="replace") if isinstance(text, str) else text
