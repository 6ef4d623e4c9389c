"""Boxes: they start when needed, are replaced where they die, and end with who uses them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from attacks.world import PATIENT, Wait, family_of
from hermes_pipeline.services.sandbox import BoxDied, Job, Result, Sandbox, SandboxBroken
from running import comes_true

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(60)]


@pytest.fixture
def warm() -> Iterator[list[int]]:
    """Ids of the processes under this one, before the test; the same must be left after it."""
    before = set(family_of(os.getpid()))
    yield sorted(before)
    assert comes_true(lambda: set(family_of(os.getpid())) <= before, 20)


def new_processes(warm: list[int]) -> list[int]:
    return sorted(set(family_of(os.getpid())) - set(warm))


def test_boxes_start_when_needed_and_leave_nothing(warm: list[int], wait: Wait) -> None:
    async def use() -> list[int]:
        counts = []
        async with Sandbox(workers=2, limits=PATIENT) as sandbox:
            counts.append(len(new_processes(warm)))
            for _ in range(3):
                await sandbox.run("print(1)")
            counts.append(len(new_processes(warm)))
            await asyncio.gather(*(sandbox.run("print(1)") for _ in range(4)))
            counts.append(len(new_processes(warm)))
        return counts

    assert wait(use()) == [0, 3, 6]
    assert new_processes(warm) == []


@pytest.mark.parametrize("which", [0, -1])
def test_a_job_whose_box_dies_is_run_again(which: int, warm: list[int], wait: Wait) -> None:
    async def use() -> tuple[Result, Result]:
        async with Sandbox(workers=1, limits=PATIENT) as sandbox:
            await sandbox.run("")
            box = new_processes(warm)  # bubblewrap, its first process, the warm one
            running = asyncio.create_task(sandbox.run("import time\ntime.sleep(0.5)\nprint(42)"))
            await asyncio.sleep(0.2)
            os.kill(box[:3][which], signal.SIGKILL)
            return await running, await sandbox.run("print(43)")

    first, second = wait(use())
    assert (first.ended, first.stdout) == ("ok", "42\n")
    assert (second.ended, second.stdout) == ("ok", "43\n")


class Dying:
    """A box that dies under each job for which ``fails`` holds."""

    name = "dying 1.0"
    is_ready = True
    starts = 0

    def __init__(self, slot: int) -> None:
        self.slot = slot

    async def start(self) -> None:
        self.is_ready = True
        Dying.starts += 1

    async def run(self, job: Job) -> Result:
        if job.source == "die":
            raise BoxDied("it was told to")
        return Result("ok", 0, "", "", 0.0, 0.0, self.name)

    async def close(self) -> None:
        self.is_ready = False


def test_a_job_that_loses_two_boxes_is_a_box_error_and_no_verdict(wait: Wait) -> None:
    async def use() -> list[Result]:
        async with Sandbox(workers=1, make_box=Dying) as sandbox:
            return [await sandbox.run(source) for source in ("die", "go", "die", "go")]

    Dying.starts = 0
    results = wait(use())
    assert [result.ended for result in results] == ["box_error", "ok", "box_error", "ok"]
    assert (results[0].reason, results[0].exit_code) == ("it was told to", None)
    assert results[0].box == "dying 1.0"
    assert Dying.starts == 4


def test_three_boxes_that_die_in_a_row_stop_the_sandbox(wait: Wait) -> None:
    async def use() -> None:
        async with Sandbox(workers=1, make_box=Dying) as sandbox:
            assert (await sandbox.run("die")).ended == "box_error"
            await sandbox.run("die")

    with pytest.raises(SandboxBroken, match="3 boxes in a row died, the last because it was told"):
        wait(use())


def test_a_run_that_is_cancelled_leaves_nothing(warm: list[int], wait: Wait) -> None:
    async def use() -> Result:
        async with Sandbox(workers=1, limits=PATIENT) as sandbox:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await sandbox.run("import time\ntime.sleep(60)")
            return await sandbox.run("print(42)")

    assert wait(use()).stdout == "42\n"


def test_leaving_the_block_ends_what_still_runs(warm: list[int], wait: Wait) -> None:
    async def use() -> asyncio.Task[Result]:
        async with Sandbox(workers=1) as sandbox:
            running = asyncio.create_task(sandbox.run("import time\ntime.sleep(60)"))
            await asyncio.sleep(0.3)
        return running

    begun = time.monotonic()
    assert wait(use()).cancelled()
    assert time.monotonic() - begun < 30  # of the minute that it sleeps


ALONE = """
import asyncio, sys
from hermes_pipeline.services.sandbox import Sandbox
async def main():
    async with Sandbox(workers=2) as sandbox:
        sleep = sandbox.run("import time\\ntime.sleep(60)")
        print((await sandbox.run("print('warm')")).stdout, flush=True)
        await sleep
asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_boxes_end_with_the_process_that_uses_them(number: int, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", ALONE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "warm\n"
        boxes = set(family_of(process.pid))
        assert len(boxes) >= 3
        os.kill(process.pid, number)
        process.communicate(timeout=20)
    assert comes_true(lambda: not any(Path(f"/proc/{pid}").exists() for pid in boxes), 20)
