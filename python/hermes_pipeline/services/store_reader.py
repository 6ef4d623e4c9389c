"""The results of one stage of one run, read: also while they are written."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from hermes_pipeline.errors import UserError
from hermes_pipeline.services.account import Usage

FORMAT = 1
DAMAGED = ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_ERROR", "SQLITE_MISMATCH")
# With max() alone SQLite takes the other columns from that row: the last attempt.
_LAST = "SELECT input, draw, body, error, max(attempt) FROM results GROUP BY input, draw"
_ERRORS = """
SELECT inputs.id, inputs.body, draw, error FROM results JOIN inputs ON inputs.number = input
WHERE error IS NOT NULL AND attempt = (
    SELECT max(attempt) FROM results AS all_of_it
    WHERE all_of_it.input = results.input AND all_of_it.draw = results.draw
) ORDER BY input, draw
"""
# An answer's tokens stand in its record; a record that says none costs none.
_USAGE = """
SELECT count(*), total(prompt), total(answer), total(prompt * prompt), total(answer * answer) FROM (
    SELECT json_extract(body, '$.prompt_tokens') AS prompt, json_extract(body, '$.tokens') AS answer
    FROM (SELECT CAST(body AS TEXT) AS body FROM results WHERE body IS NOT NULL)
)
"""
_COUNT_KEPT = "SELECT count(body) FROM results WHERE input <= ? AND draw < ?"
_COUNTS = "SELECT (SELECT count(*) FROM inputs), (SELECT count(body) FROM results)"


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one draw: a record, or the error it was set aside with."""

    draw: int
    record: Mapping[str, Any] | None
    error: str | None


@dataclass(frozen=True, slots=True)
class Recorded:
    """One input, and what became of its draws."""

    id: str
    about: Mapping[str, Any]
    results: tuple[Result, ...]


class Counts(NamedTuple):
    inputs: int  # that have a result
    records: int


def is_own(name: str) -> bool:
    """Is this the name of a file that a stage keeps in its folder?"""
    kept = ("stage.json", "counts.json", "set_aside.jsonl", "quarantine.jsonl", "server.log")
    return name in (*kept, ".lock") or name.startswith("records.sqlite")


def is_stage(folder: Path) -> bool:
    """Does the folder hold the results of a stage?"""
    return (folder / "stage.json").is_file()


def read_about(folder: Path) -> dict[str, Any]:
    """Stage, settings, seed and versions of a folder.

    Raises:
        UserError: there is none, or it is damaged or of another format.
    """
    path = folder / "stage.json"
    try:
        about = json.loads(path.read_bytes())
        if about["format"] != FORMAT:
            raise UserError(f"{path} is of format {about['format']}, this program reads {FORMAT}")
        if not {"stage", "settings", "seed", "fingerprint", "versions"} <= about.keys():
            raise KeyError
    except FileNotFoundError:
        raise UserError(f"{folder} holds no results of a stage: it has no stage.json") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged; put back a copy, or move the folder away") from None
    return dict(about)


def read_counts(folder: Path) -> dict[str, int]:
    """What the last whole pass came to; empty before there was one."""
    try:
        return dict(json.loads((folder / "counts.json").read_bytes()))
    except (OSError, ValueError):
        return {}


def count(folder: Path) -> Counts:
    """How much is committed."""
    with _reading(folder) as connection:
        return Counts(*connection.execute(_COUNTS).fetchone())


def count_kept(folder: Path, *, inputs: int, draws: int) -> int:
    """How many records there are of the first draws of the first inputs."""
    with _reading(folder) as connection:
        return int(connection.execute(_COUNT_KEPT, (inputs, draws)).fetchone()[0])


def read_usage(folder: Path) -> Usage:
    """What the records that are kept have cost."""
    with _reading(folder) as connection:
        return Usage(*map(int, connection.execute(_USAGE).fetchone()))


def read_results(folder: Path) -> Iterator[Recorded]:
    """The inputs in order, each with its draws in order."""
    with _reading(folder) as connection:
        inputs = connection.execute("SELECT number, id, body FROM inputs ORDER BY number")
        rows = connection.execute(f"{_LAST} ORDER BY input, draw")
        # No input is without a result, no result without its input: they were written at once.
        pairs = zip(groupby(rows, key=itemgetter(0)), inputs, strict=True)
        for (_, results), (_, key, body) in pairs:
            yield Recorded(key, orjson.loads(body), tuple(_result(*row) for row in results))


def _result(_: int, draw: int, body: bytes | None, error: str | None, __: int) -> Result:
    return Result(draw, None if body is None else orjson.loads(body), error)


def read_errors(folder: Path) -> Iterator[dict[str, Any]]:
    """The draws that have been set aside: input, source, draw and error, in order."""
    with _reading(folder) as connection:
        for key, body, draw, error in connection.execute(_ERRORS):
            source = orjson.loads(body).get("source")
            yield {"id": key, "source": source, "draw": draw, "error": error}


@contextmanager
def _reading(folder: Path) -> Iterator[sqlite3.Connection]:
    """A connection for one look at what is committed, also where nothing may be written."""
    path = folder / "records.sqlite"
    if not path.is_file():
        raise UserError(f"{folder} holds no {path.name}; nothing has been kept there")
    # Readers of a write-ahead log write beside it, unless they may trust that nobody else does.
    alone = not os.access(folder, os.W_OK) and not path.with_name(f"{path.name}-wal").exists()
    how = "immutable=1" if alone else "mode=ro"
    with (
        explained(path),
        closing(sqlite3.connect(f"{path.resolve().as_uri()}?{how}", uri=True)) as connection,
    ):
        connection.execute("BEGIN")
        yield connection


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Say in one line what is wrong with a database, and the way out."""
    try:
        yield
    except sqlite3.ProgrammingError:  # ours
        raise
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", None) or ""
        if "no such table" in str(error):  # a run is just beginning there
            raise UserError(f"{path} holds nothing yet; try again in a moment") from None
        if name.startswith(DAMAGED):
            raise UserError(
                f"{path} is damaged ({error}); put back a copy, or begin in another folder"
            ) from None
        raise UserError(
            f"{path} cannot be read or written: {error}; what is committed is safe: make room, or "
            f"give the right to write, then run the same command again"
        ) from None
