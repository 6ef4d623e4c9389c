"""The tests of the compiled core, run again with the address and UB sanitizers compiled in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(3000)]

TESTED = (
    "test_packing.py", "test_packing_refused.py", "test_packing_saved.py", "test_guided.py",
    "test_windows.py", "test_rows.py", "test_rows_memory.py", "test_loader.py", "test_samples.py",
    "test_bindings.py", "test_attention_core.py",
)  # fmt: skip


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
        timeout=1500,  # a minute on a fast machine that does nothing else
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
        timeout=900,
    )


def run_tests(copy: Path, repository: Path, test: Path) -> subprocess.CompletedProcess[str]:
    """Not on the settings' own path, which leads to the repository's core."""
    return run(
        copy,
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", repository / "pyproject.toml"),
        *("-o", f"pythonpath={repository / 'tests'}", test),
        # Forks beside threads: the sanitizer's allocator does not survive them. The others are
        # large for the sake of the rows that they count, and take minutes here.
        *("-k", "not forked and not full_rows and not rows_of_few_samples"),
    )


def test_the_sanitized_copy_is_the_one_tested(
    sanitized: Path, repository: Path, tmp_path: Path
) -> None:
    test = tmp_path / "test_core.py"
    test.write_text(
        "from hermes_core import _C\n\n\n"
        f"def test_core():\n    assert _C.__file__.startswith({str(sanitized)!r}), _C.__file__\n"
    )
    done = run_tests(sanitized, repository, test)
    assert done.returncode == 0, done.stdout + done.stderr
    refused = run(sanitized, "-c", "import hermes_core", preload=False)
    assert "ASan runtime does not come first" in refused.stderr


@pytest.mark.parametrize("name", TESTED)
def test_core_tests_pass_under_sanitizers(sanitized: Path, repository: Path, name: str) -> None:
    done = run_tests(sanitized, repository, repository / "tests" / "core" / name)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
