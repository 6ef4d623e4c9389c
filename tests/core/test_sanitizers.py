"""The tests of the compiled core, run again with the address and UB sanitizers compiled in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy

TESTED = ("test_packing.py", "test_rows.py", "test_samples.py", "test_bindings.py")


def runtime(name: str) -> str:
    """Where the compiler keeps this library; skips the test where it has none."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++, whose sanitizers this test preloads")
    done = subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    path = done.stdout.strip()
    if not os.path.isabs(path):  # the compiler answers with the bare name
        pytest.skip(f"g++ has no {name}: install its sanitizer runtime")
    return path


@pytest.fixture(scope="module")
def sanitized(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the core, built with the sanitizers."""
    runtime("libasan.so")
    copy = tmp_path_factory.mktemp("sanitized")
    for name in ("setup.py", "csrc", "hermes_core"):
        source = repository / name
        if source.is_dir():
            shutil.copytree(
                source, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
            )
        else:
            shutil.copy(source, copy)
    build = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=copy,
        env={**os.environ, "HERMES_CORE_DEBUG": "1", "CC": "gcc", "CXX": "g++"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert build.returncode == 0, build.stderr
    return copy


def run(
    copy: Path, *arguments: str | Path, preload: bool = True
) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(copy), "ASAN_OPTIONS": "detect_leaks=0"}
    if preload:
        env["LD_PRELOAD"] = f"{runtime('libasan.so')} {runtime('libstdc++.so')}"
    return subprocess.run(
        [sys.executable, "-P", *arguments],
        cwd=copy,
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_the_sanitized_copy_is_the_one_imported(sanitized: Path) -> None:
    done = run(sanitized, "-c", "from hermes_core import _C; print(_C.__file__)")
    assert Path(done.stdout.strip()).parent == sanitized / "hermes_core", done.stderr
    refused = run(sanitized, "-c", "import hermes_core", preload=False)
    assert "ASan runtime does not come first" in refused.stderr


def test_core_tests_pass_under_sanitizers(sanitized: Path, repository: Path) -> None:
    done = run(
        sanitized,
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", repository / "pyproject.toml"),
        *(repository / "tests" / "core" / name for name in TESTED),
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
