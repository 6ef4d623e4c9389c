"""The stub of the compiled core says what the compiled core is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import hermes_core


def test_stub_is_what_make_stubs_writes(tmp_path: Path, repository: Path) -> None:
    tools, made = Path(sys.executable).parent, tmp_path / "hermes_core" / "_C.pyi"
    config = ("--quiet", "--no-cache", "--config", repository / "pyproject.toml")
    for command in (
        [tools / "pybind11-stubgen", "hermes_core._C", "-o", tmp_path],
        [tools / "ruff", "check", *config, "--select", "I", "--fix", made],
        [tools / "ruff", "format", *config, made],
    ):
        subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    stub = Path(hermes_core.__file__).with_name("_C.pyi")
    assert made.read_text() == stub.read_text(), "run `make stubs` and look at the difference"
