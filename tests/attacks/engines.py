"""What tests of containers need: an image of this system's Python, and a stand-in for podman."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

IMAGE = "localhost/hermes4-sandbox-test:1"
PROGRAMS = ("python3", "env", "sh", "cat", "ls", "wc", "sleep")
SKIPPED = {"test", "idlelib", "ensurepip", "__pycache__"}  # of the standard library


def write_image(to: Path) -> None:
    """An image from the Python of this system, as a tar file, where no registry can be reached."""
    programs = [Path("/usr/bin", name) for name in PROGRAMS]
    version = Path("/usr/bin/python3").resolve().name
    library = Path("/usr/lib", version)
    linked = [*programs, *library.glob("lib-dynload/*.so")]
    needed = subprocess.run(["ldd", *linked], capture_output=True, text=True, check=True).stdout
    libraries = sorted(set(re.findall(r"(/\S+) \(0x", needed)))
    with tarfile.open(to, "w", dereference=True) as tar:
        for path in _folders(
            [*map(str, (*programs, library)), *libraries, "/tmp/x", "/proc/x", "/dev/x"]
        ):
            folder = tarfile.TarInfo(path)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o1777 if path == "tmp" else 0o755
            tar.addfile(folder)
        for path in (*map(str, programs), *libraries):
            tar.add(path)
        tar.add(library, filter=lambda file: None if _is_skipped(file.name) else file)


def _is_skipped(path: str) -> bool:
    return bool(SKIPPED & set(path.split("/"))) or "/config-" in path


def _folders(paths: list[str]) -> Iterator[str]:
    """The folders above paths, the outer ones first."""
    above = {str(folder)[1:] for path in paths for folder in Path(path).parents}
    yield from sorted(above - {""})


# Named podman, and first in PATH: it runs what podman would, in a box of bubblewrap.
STAND_IN = f"""#!{sys.executable}
import os, sys
words = sys.argv[1:]
if words[0] != "run":
    print({{"version": "0.0", "info": "false", "image": "sha256:0"}}.get(words[0], ""))
    sys.exit(0)
from hermes_pipeline.services.sandbox.programs import find_bwrap
at = words.index("--entrypoint")
box = [find_bwrap(), "--unshare-all", "--as-pid-1", "--die-with-parent", "--cap-drop", "ALL"]
box += ["--ro-bind", "/usr", "/usr", "--proc", "/proc", "--dev", "/dev"]
box += ["--perms", "1777", "--size", str(64 << 20), "--tmpfs", "/tmp"]
for name in ("bin", "lib", "lib64"):
    box += ["--symlink", "usr/" + name, "/" + name]
os.execv(box[0], [*box, "--", words[at + 1], *words[at + 3:]])
"""


def write_stand_in(folder: Path) -> None:
    """A program `podman` that is none."""
    program = folder / "podman"
    program.write_text(STAND_IN)
    program.chmod(0o755)
