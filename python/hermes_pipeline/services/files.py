"""Records out of files: JSON Lines, JSON lists, Parquet; never a large file as a whole.

A `.json` file that holds one list is the exception: it is read at once.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hermes_pipeline.errors import UserError

EXTENSIONS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
SMALL_RECORD = 4_096  # bytes; a smaller one is kept in the quarantine as it is
# What Arrow raises of a value that Python cannot hold: a date after the year 9999, for one.
UNREADABLE = (ArithmeticError, ValueError)
_CHUNK = 1 << 20
_ROWS = 128  # of a Parquet batch
DEFAULT_SPLIT = "train"  # where nobody has chosen one
# Marks of folders that are written here: answers and scores, a token store, one in the making.
RESULTS, UNFINISHED = ("stage.json", "store.json"), ("writing", "progress.json")
_SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a data source, not yet understood."""

    source: str  # file and line, or data set and row
    line: int  # line of the file, or row, from 1
    data: bytes | Mapping[str, Any] | None  # a line of JSON, or an object
    error: str | None = None  # why it could not be read; then data is None


@dataclass(slots=True)
class Cursor:
    """How far reading has come, in bytes of the files on disk and in records."""

    done: int = 0
    total: int = 0
    records: int = 0  # skipped ones too

    def share(self) -> float:
        """Return the share of the bytes that has been read, in [0, 1]."""
        return min(1.0, self.done / self.total) if self.total else 1.0


def find_files(folder: Path, split: str) -> list[Path]:
    """Return the data files under ``folder`` in order, those of ``split`` where names tell.

    Raises:
        UserError: there are none, some are results of ours, or names tell no splits and one was
            chosen.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and _extension(p) is not None)
    files = [p for p in files if not any(x.startswith(".") for x in p.relative_to(folder).parts)]
    if not files:
        raise UserError(f"{folder} holds no data file; known: {', '.join(EXTENSIONS)}")
    for path in files:
        if path.name in RESULTS or path.parts[-2:] == UNFINISHED:
            raise UserError(
                f"{path} belongs to results of hermes4, which would be read as data; give a data "
                f"file by name, or a folder without such results"
            )
    named = {path: _split_of(path.relative_to(folder)) for path in files}
    if not any(named.values()):
        if split != DEFAULT_SPLIT:
            raise UserError(
                f"--split {split}: no file in {folder} has the name of a split, such as train or "
                f"test; leave it out to read them all"
            )
        return files
    wanted = _SPLITS.get(split, split)
    chosen = [path for path in files if named[path] == wanted]
    if not chosen:
        found = ", ".join(sorted({name for name in named.values() if name}))
        raise UserError(f"{folder} has no file of split {split!r}; found: {found}")
    return chosen


def check_file(path: Path) -> Path:
    """Return ``path`` when it is a data file of a known kind.

    Raises:
        UserError: it does not exist or is of another kind.
    """
    if not path.is_file():
        raise UserError(f"no such data file: {path}")
    if _extension(path) is None:
        raise UserError(f"{path} has an unknown file type; known: {', '.join(EXTENSIONS)}")
    return path


def source_of(data: object, number: int) -> str:
    """Return what a record is called: its data and its number; text, though a path may be none."""
    return f"{data}:{number}".encode("utf-8", "backslashreplace").decode()


def count_records(path: Path) -> int | None:
    """Return the number of records in ``path`` where the file tells it at once."""
    if _extension(path) != ".parquet":
        return None
    return int(_parquet(path).metadata.num_rows)


def read_file(
    path: Path, *, skip: int = 0, max_bytes: int, cursor: Cursor | None = None
) -> Iterator[Record]:
    """Yield the records of one file from number ``skip`` on.

    A line of more than ``max_bytes`` is passed over without being held, as a record with an
    error. Blank lines are none.

    Raises:
        UserError: the file as a whole cannot be read.
    """
    cursor = cursor or Cursor(total=path.stat().st_size)
    begun = cursor.done
    if _extension(path) == ".parquet":
        yield from _read_parquet(path, skip, cursor)
    else:
        try:
            with path.open("rb") as raw:
                opened: Any = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw
                with io.BufferedReader(opened, _CHUNK) as file:
                    if _holds_list(path, file):
                        records = _read_list(path, file)
                    else:
                        records = _read_lines(path, file, max_bytes)
                    for index, record in enumerate(records):
                        cursor.records += 1
                        cursor.done = begun + raw.tell()
                        if index >= skip:
                            yield record
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path} is damaged: {error}") from None
    cursor.done = begun + path.stat().st_size


def _read_lines(path: Path, file: BinaryIO, max_bytes: int) -> Iterator[Record]:
    number = 0
    while line := file.readline(max_bytes + 1):
        number += 1
        length = len(line)
        if length > max_bytes and not line.endswith(b"\n"):
            while rest := file.readline(_CHUNK):
                length += len(rest)
                if rest.endswith(b"\n"):
                    break
            line = b""
        elif number == 1:
            line = line.removeprefix(_BOM)
        if length <= max_bytes and not line.strip():
            continue
        source = source_of(path, number)
        if line:
            yield Record(source, number, line.strip())
        else:
            reason = f"the line of {length:,} bytes is longer than {max_bytes:,}"
            yield Record(source, number, None, reason)


def _holds_list(path: Path, file: io.BufferedReader) -> bool:
    if _extension(path) not in (".json", ".json.gz"):
        return False
    return file.peek(64).removeprefix(_BOM).lstrip()[:1] == b"["


def _read_list(path: Path, file: BinaryIO) -> Iterator[Record]:
    try:
        records = json.loads(file.read().removeprefix(_BOM))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON list: {error}") from None
    for index, record in enumerate(records):
        source = source_of(path, index + 1)
        if isinstance(record, dict):
            yield Record(source, index + 1, record)
        else:
            reason = f"a record must be a JSON object, not {type(record).__name__}"
            yield Record(source, index + 1, None, reason)


def _read_parquet(path: Path, skip: int, cursor: Cursor) -> Iterator[Record]:
    file = _parquet(path)
    size, begun = path.stat().st_size, cursor.done
    groups: list[int] = []
    first = 0
    for group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if groups or first + rows > skip:
            groups.append(group)
        else:
            first += rows
    row = first
    cursor.records += min(skip, file.metadata.num_rows)
    try:
        for batch in file.iter_batches(batch_size=_ROWS, row_groups=groups):
            for index in range(max(0, skip - row), batch.num_rows):
                cursor.records += 1
                yield _row(source_of(path, row + index + 1), row + index + 1, batch, index)
            row += batch.num_rows
            cursor.done = begun + size * row // max(1, file.metadata.num_rows)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _row(source: str, number: int, batch: Any, index: int) -> Record:
    values = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            values[name] = column[index].as_py()
        except UnicodeDecodeError as error:
            return Record(source, number, None, f"invalid UTF-8 at byte {error.start} of a text")
        except UNREADABLE as error:
            return Record(source, number, None, f"column {name!r} cannot be read: {error}")
    return Record(source, number, without_nulls(values))


def quarantine_entry(record: Record, reason: str) -> dict[str, Any]:
    """Return what a quarantine says: which record it is, why, and the record if it is small."""
    entry: dict[str, Any] = {"source": record.source, "line": record.line, "reason": reason}
    if isinstance(record.data, bytes):
        text = record.data.decode("utf-8", "replace")
    else:
        text = "" if record.data is None else json.dumps(record.data, default=str)
    if text and len(text) <= SMALL_RECORD:
        entry["record"] = text
    return entry


def without_numbers(reason: str) -> str:
    """Return a reason on one line and without its numbers, so that equal ones can be counted."""
    reason = " ".join(re.sub(r"\d[\d,]*", "N", reason).split())
    return reason if len(reason) <= 200 else reason[:197] + "..."


def without_nulls(value: Any) -> Any:
    """Return ``value`` without the keys that Arrow adds to give every record the same ones."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError, ValueError) as error:  # names that are not UTF-8, too
        raise UserError(f"{path} is not a Parquet file, or damaged: {error}") from None


def _extension(path: Path) -> str | None:
    name = path.name.lower()
    return next((x for x in sorted(EXTENSIONS, key=len, reverse=True) if name.endswith(x)), None)


def _split_of(path: Path) -> str | None:
    for part in reversed(path.parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return None
