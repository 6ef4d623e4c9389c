"""What a user installs: the sdist and the wheel, each into an environment of its own."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(600)]

LEFT_OUT = {".ci/run", ".gitignore"}  # of what git tracks: for a checkout alone
MADE = {"PKG-INFO", "setup.cfg"}  # by setuptools, beside its egg-info

BARE_SCRIPT = """
import importlib.util, sys
import numpy as np
import hermes_core
from hermes_core import Samples, build_rows, pack

samples = Samples.from_lists([[1, 2, 3], [4, 5]], [[False, True, True], [True, True]])
packing = pack(samples.lengths, row_length=8, seed=None)
rows = build_rows(samples, packing, range(1))
assert rows.input_ids.tolist() == [[1, 2, 3, 4, 5, 0, 0, 0]], rows.input_ids
assert rows.labels.tolist() == [[2, 3, -100, 5, -100, -100, -100, -100]], rows.labels
others = {"torch", "triton", "transformers", "rich", "typer"}
third = {name.split(".")[0] for name in sys.modules} & others
assert not third, third
assert importlib.util.find_spec("torch") is None
print(hermes_core.__file__)
"""


def tracked(repository: Path) -> set[str]:
    """Files that git tracks, and new ones that it would."""
    done = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=repository, capture_output=True, text=True, check=True,
    )  # fmt: skip
    names = filter(None, done.stdout.split("\0"))
    return {name for name in names if (repository / name).is_file()}


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel, built from a copy of the tracked files."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    if not (repository / ".git").exists():
        pytest.skip("what belongs into a distribution is told by git, and this is no checkout")
    for name in tracked(repository):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((repository / name).read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ".", cwd=source)
    return out


def test_sdist_gives_packing_and_rows_with_numpy_alone(distributions: Path, tmp_path: Path) -> None:
    (sdist,) = distributions.glob("*.tar.gz")
    uv = Path(sys.executable).parent / "uv"
    run(uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "bare", cwd=tmp_path)
    python = tmp_path / "bare" / "bin" / "python"
    run(uv, "pip", "install", "--quiet", "--python", python, sdist, cwd=tmp_path)
    packages = run(uv, "pip", "freeze", "--python", python, cwd=tmp_path).split()
    assert {line.split("==")[0] for line in packages if "==" in line} <= {"numpy", "hermes4-core"}
    where = run(python, "-P", "-c", BARE_SCRIPT, cwd=tmp_path)
    assert str(tmp_path) in where
    asked = subprocess.run(
        [python.with_name("hermes4"), "--help"], capture_output=True, text=True, timeout=60
    )
    line = "hermes4 needs more than the library: pip install 'hermes4-core[pipeline]'\n"
    assert (asked.returncode, asked.stdout, asked.stderr) == (2, "", line)


def test_sdist_holds_what_git_tracks(distributions: Path, repository: Path) -> None:
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        files = {member.name.split("/", 1)[1] for member in archive if member.isfile()}
    names = {name for name in files if not name.startswith("hermes4_core.egg-info/")}
    assert names - MADE == tracked(repository) - LEFT_OUT


def test_wheel_holds_package_data_and_no_sources(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in (
        "hermes_core/py.typed",
        "hermes_core/_C.pyi",
        "hermes_kernels/py.typed",
        "hermes_pipeline/py.typed",
        "hermes_pipeline/templates/hermes_chatml.jinja",
        "hermes_pipeline/recipes/tiny.toml",
        "hermes_pipeline/recipes/hermes4_405b.toml",
    ):
        assert wanted in names
    assert not [name for name in names if name.endswith((".cpp", ".hpp"))]
    assert not [name for name in names if name.startswith(("tests/", "bench/"))]
