"""Every attack is contained, leaves nothing, and does not touch the next run in the same box."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from attacks.attack import LEAK, Attack
from attacks.programs import ATTACKS
from attacks.world import LIMITS, PATIENT, Wait, World, attack, run_outside
from hermes_pipeline.services.sandbox import Case, Result, Sandbox
from hermes_pipeline.services.sandbox.programs import PACKAGE, find_python

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(60)]

NOBODY = 65534


@pytest.mark.parametrize("one", ATTACKS, ids=lambda one: one.name)
def test_an_attack_is_contained(one: Attack, world: World, sandbox: Sandbox, wait: Wait) -> None:
    assert attack(one, world, sandbox, wait) == []


@pytest.mark.parametrize(
    "one", [one for one in ATTACKS if one.leaks_outside], ids=lambda one: one.name
)
def test_without_a_box_it_finds_what_it_looks_for(one: Attack, world: World) -> None:
    assert LEAK in run_outside(one, world)


@pytest.mark.skipif(os.geteuid() != 0, reason="the tests above have run as a user")
def test_attacks_are_contained_where_a_user_runs_the_sandbox(repository: Path) -> None:
    python = find_python()
    if subprocess.run([python, "-c", "import asyncio; asyncio.Runner"], check=False).returncode:
        pytest.skip(f"{python} is the only one that a user can run, and older than 3.11")
    with tempfile.TemporaryDirectory(prefix="sandbox-user-") as folder:
        copy_for_everybody(repository, Path(folder))
        ran = subprocess.run(
            [python, "-B", "-m", "attacks.world"],
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": folder},
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            capture_output=True,
            text=True,
            check=False,
        )
    assert (ran.stdout, ran.stderr) == (f"{len(ATTACKS)} attacks by user {NOBODY}\n", "")


def copy_for_everybody(repository: Path, folder: Path) -> None:
    """The sandbox, the attacks and bubblewrap, where any user can read them."""
    folder.chmod(0o755)
    pipeline = repository / "python" / "hermes_pipeline"
    for name in ("__init__.py", "errors.py", "services/__init__.py"):
        copied = folder / "hermes_pipeline" / name
        copied.parent.mkdir(exist_ok=True)
        shutil.copy(pipeline / name, copied)
    shutil.copytree(pipeline / "services/sandbox", folder / "hermes_pipeline/services/sandbox")
    shutil.copytree(repository / "tests/attacks", folder / "attacks")
    for file in importlib.metadata.files(PACKAGE) or []:
        copied = folder / file
        if ".." not in file.parts:
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(file.locate()), copied)


# Of calls: the value is written by the program's own process, its end is not.

WRITES = "import os\ndef f():\n    os.write(3, b'[42]')\n    "
FAKES = {
    "leave before the value": ("import os\ndef f(): os._exit(0)", "error"),
    "leave on import": ("import sys\nsys.exit(0)", "error"),
    "write a value and fail": (WRITES + "1 / 0", "error"),
    "write a value before another": (WRITES + "return 42", "error"),
    "write a value and go on": (WRITES + "while True: pass", "timeout"),
    "write a value and die": (WRITES + "os.abort()", "killed"),
    "write what is deep": (
        "import os\ndef f():\n    os.write(3, b'[' * 50_000)\n    os._exit(0)",
        "error",
    ),
    "return what is no JSON": ("def f(): return {1, 2}", "error"),
    "return too much": ("def f(): return 'x' * 10**6", "output"),
    "no such function": ("def g(): return 42", "error"),
}


def test_an_honest_call_has_its_value(sandbox: Sandbox, wait: Wait) -> None:
    result: Result = wait(sandbox.run_cases("def f(): return 42", "f", [Case()]))[0]
    assert (result.ended, result.value) == ("ok", 42)


@pytest.mark.parametrize("name", FAKES)
def test_a_call_has_a_value_only_if_it_ended_well(name: str, sandbox: Sandbox, wait: Wait) -> None:
    source, ended = FAKES[name]
    limits = LIMITS if ended == "timeout" else PATIENT
    result: Result = wait(sandbox.run_cases(source, "f", [Case(limits=limits)]))[0]
    assert (result.ended, result.value) == (ended, None), result


def test_an_attack_changes_no_verdict_beside_it(wait: Wait) -> None:
    source = """
def f(n):
    import os, time
    if n % 2:
        while True:
            try: os.fork()
            except OSError: time.sleep(0.01)
    return n
"""

    async def both() -> list[Result]:
        cases = [Case([n], LIMITS if n % 2 else PATIENT) for n in range(8)]
        async with Sandbox(workers=2) as sandbox:
            return await sandbox.run_cases(source, "f", cases)

    results = wait(both())
    assert [result.value for result in results] == [0, None, 2, None, 4, None, 6, None]
    assert {result.ended for result in results[1::2]} <= {"timeout", "memory"}
