"""Folders for results: whose they are, what room there is, and what to say when one cannot be."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hermes_pipeline.errors import UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)


def check_folder(
    out: Path, *marks: str, may_hold: Callable[[str], bool] = lambda name: False
) -> None:
    """Refuse a folder for results that is not missing, empty, or begun by the same command.

    Args:
        marks: what such a folder of ours holds, one of them.
        may_hold: names that say nothing; hidden ones do not, either.

    Raises:
        UserError: a file or a dangling link stands in its place, or it holds something else.
    """
    taken = next(path for path in (out, *out.parents) if path.exists() or path.is_symlink())
    if not taken.exists():
        raise UserError(
            f"--out {out}: {taken} is a link to {os.path.realpath(taken)}, which is not there; "
            f"make that folder, or choose another"
        )
    if not taken.is_dir():
        raise UserError(f"--out {out}: {taken} is a file; choose another folder")
    if taken != out or any((out / mark).exists() for mark in marks):
        return
    names = (path.name for path in out.iterdir())
    others = sorted(name for name in names if not name.startswith(".") and not may_hold(name))
    if others:
        raise UserError(
            f"--out {out} holds {others[0]} and no {marks[0]}, so it is no folder of ours; choose "
            f"another --out"
        )


@contextmanager
def writing(out: Path, *, goes_on: str = "the same command goes on") -> Iterator[None]:
    """Say in one line why a result cannot be written, and the way out.

    What other files, sockets or devices refuse meanwhile is raised as it is.

    Args:
        goes_on: what happens once there is room.

    Raises:
        UserError: a file or a disk refused.
    """
    try:
        yield
    except OSError as error:
        if not _is_of(error, out):
            raise
        raise UserError(explain(error, out, goes_on=goes_on)) from None


def explain(error: OSError, out: Path | None = None, *, goes_on: str = "") -> str:
    """What a file or a disk has refused, where, and the way out.

    Args:
        out: the result that was being written; files inside it, and beside it, are not named.
        goes_on: what happens once there is room.
    """
    if error.strerror is None:
        return str(error)
    named = _named(error)
    ours = out is not None and _is_of(error, out)
    where = f"--out {out} cannot be written: " if ours else f"{named}: " if named else ""
    text = f"{where}{error.strerror}"
    place = out if ours else named
    if error.errno in NO_ROOM:
        free = "" if place is None else f"; {as_size(room(place))} are free there"
        return f"{text}{free}. Make room, and {goes_on or 'run the same command again'}"
    if ours and error.errno in NO_RIGHT:
        return f"{text}; choose another --out, or give the right to write"
    return text


def room(path: Path) -> int:
    """Bytes that are free where a path is, or will be."""
    there = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    return shutil.disk_usage(there).free


def check_room(out: Path, needed: int) -> None:
    """Refuse to begin what the disk has not the room for; sizes in bytes.

    Raises:
        UserError: it has not.
    """
    free = room(out)
    if free < needed:
        raise UserError(
            f"--out {out} wants {as_size(needed)}, and {as_size(free)} are free there; make room, "
            f"or choose another --out"
        )


def as_size(size: int) -> str:
    """Bytes in words."""
    value, unit = float(size), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{size:,} bytes" if unit == "bytes" else f"{value:,.1f} {unit}"


def _named(error: OSError) -> Path | None:
    """The file that was refused; of a copy or a new name, what was to be written."""
    name = error.filename if error.filename2 is None else error.filename2
    return None if name is None else Path(os.fsdecode(name))


def _is_of(error: OSError, out: Path) -> bool:
    """Is it the result that was refused? Nameless errors may be of a socket or a device."""
    named = _named(error)
    return error.errno in NO_ROOM + NO_RIGHT if named is None else _is_part(named, out)


def _is_part(path: Path, out: Path) -> bool:
    """Is it the result, above it, in it, or in a temporary one beside it?"""
    path, out = (Path(os.path.realpath(each)) for each in (path, out))
    if path.is_relative_to(out) or out.is_relative_to(path):
        return True
    if not path.is_relative_to(out.parent):
        return False
    return path.relative_to(out.parent).parts[0].startswith(f".{out.name}.")
