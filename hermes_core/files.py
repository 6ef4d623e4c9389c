"""Files that are written whole or not at all, also when the machine stops in between."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def write_atomically(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes ``path``'s place, durably, when the block ends without an error.

    Of several writers, in other threads or on other machines, the last to end wins. Where ``path``
    is a link, the file that it leads to is replaced.

    Raises:
        FileExistsError: a folder, a pipe, a device or the like stands there.
    """
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "no regular file stands there", str(path))
    path = Path(os.path.realpath(path))
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}.unfinished")
    try:
        with open(unfinished, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, durably, whole or not at all."""
    with write_atomically(path) as file:
        file.write(text.encode())


def remove_unfinished(folder: Path) -> None:
    """Remove what `write_atomically` had not finished when it was killed; no one may be writing."""
    for path in folder.glob(".*.unfinished"):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames, new and removed files in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
