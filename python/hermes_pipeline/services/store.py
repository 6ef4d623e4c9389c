"""The results of one stage of one run, written: kill -9 at any instant costs what was in flight.

A folder, by custom runs/<run>/<stage>/:

    stage.json      stage, settings, seed, recipe, versions, and the fingerprint of what decides
                    a result
    records.sqlite  inputs, and the results of each
    counts.json     what the last whole pass over the data came to
    set_aside.jsonl draws whose last attempt failed: which, and why
    .lock           held by the process that writes

A result is known by what made it: stage and settings, which the database holds as a fingerprint,
the input, by its place and a digest of what it says, the draw and the attempt. So a second run
finds what is there, and nothing is asked or kept twice. `store_reader` reads it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import socket
import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import orjson

from hermes_core import __version__
from hermes_core.files import remove_unfinished, write_atomically, write_text
from hermes_pipeline.config import changes
from hermes_pipeline.errors import UserError
from hermes_pipeline.services.files import without_numbers
from hermes_pipeline.services.folders import check_folder, explain, writing
from hermes_pipeline.services.store_reader import (
    FORMAT,
    explained,
    is_stage,
    read_about,
    read_errors,
)

COMMIT_ROWS, COMMIT_S = 512, 0.02  # a commit waits for so many rows, or so long

# A result is either a record or an error.
_TABLES = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS about (fingerprint TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS inputs (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL, body BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS results (
    input INTEGER NOT NULL, draw INTEGER NOT NULL, attempt INTEGER NOT NULL,
    error TEXT, body BLOB,  -- so that an error is found without reading a long body
    UNIQUE (input, draw, attempt), CHECK ((body IS NULL) <> (error IS NULL))
);
COMMIT;
"""
_ADD_INPUT = "INSERT OR IGNORE INTO inputs VALUES (?, ?, ?)"
_ADD_RESULT = "INSERT INTO results VALUES (?, ?, ?, ?, ?)"
# With max() alone SQLite takes the other columns from that row: the last attempt.
_PAST = """
SELECT inputs.id, draw, max(attempt), error IS NULL FROM results
JOIN inputs ON inputs.number = results.input WHERE results.input = ? GROUP BY draw
"""

_Row = tuple[int, int, int, str | None, bytes | None]


class RecordRefused(ValueError):
    """A record that cannot be kept, by its key or its size; the others can."""


@dataclass(frozen=True, slots=True)
class Input:
    """What results are kept for."""

    number: int  # its place in the data, from 1
    id: str  # a digest of its place and of what it says
    body: bytes  # a JSON object: what an export says of it

    @classmethod
    def of(cls, number: int, content: Any, about: Mapping[str, Any]) -> Input:
        """An input known by ``content``; an export says ``about``, too. Both are JSON values."""
        text = orjson.dumps([number, content])
        return cls(number, hashlib.blake2b(text, digest_size=16).hexdigest(), orjson.dumps(about))


@dataclass(frozen=True, slots=True)
class Last:
    """The last attempt at one draw."""

    attempt: int
    kept: bool  # else it was set aside


def draw_seed(seed: int, key: str, number: int) -> int:
    """A seed of 31 bits for one draw, the same on every machine."""
    text = f"{seed}|{key}|{number}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") >> 1


class RunStore:
    """Writes the results of a stage, for the time of a `with` block.

    Args:
        stage: its name.
        settings: JSON values; whatever decides what a result is, and nothing else.
        seed: of the run.
        recipe: JSON values; all that the run which began here was told, for the record.

    Raises:
        UserError: another process writes here, the folder holds something else or was begun with
            other settings, or it cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        stage: str,
        settings: Mapping[str, Any],
        seed: int,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        about = {"stage": stage, "settings": dict(settings), "seed": seed}
        fingerprint = hashlib.blake2b(_canonical(about), digest_size=16).hexdigest()
        self._path = folder / "records.sqlite"
        self._lock = _take_lock(folder)
        try:
            remove_unfinished(folder)
            _keep_about(folder, about | {"fingerprint": fingerprint}, recipe or {})
            with explained(self._path):
                self._connection = _connect(self._path)
                try:
                    self._check(fingerprint)
                    self._reader = sqlite3.connect(self._path)
                except BaseException:
                    self._connection.close()
                    raise
        except BaseException:
            self._lock.close()
            raise
        self._writer = ThreadPoolExecutor(1, "run store")
        self._waiting: list[tuple[Input, _Row, asyncio.Future[None]]] = []
        self._failure: UserError | None = None

    def __enter__(self) -> RunStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Commit what waits, and let the next writer in."""
        failed = self._failure
        self._flush()
        self._writer.shutdown()
        with contextlib.suppress(sqlite3.Error):  # what is committed is safe without it
            self._reader.close()
            self._connection.close()
        self._lock.close()
        if self._failure is not None and failed is None and error is None:
            raise self._failure

    def past(self, given: Input) -> dict[int, Last]:
        """The last attempt at each draw of an input, of those that an earlier run has made.

        Raises:
            UserError: at its place in the data stood another input.
        """
        with explained(self._path):
            rows = self._reader.execute(_PAST, (given.number,)).fetchall()
        if rows and rows[0][0] != given.id:
            raise UserError(
                f"record {given.number:,} of the data is not what it was when {self.folder} was "
                f"begun; choose another --out"
            )
        return {draw: Last(attempt, bool(kept)) for _, draw, attempt, kept in rows}

    async def keep(self, given: Input, draw: int, attempt: int, record: Mapping[str, Any]) -> None:
        """Keep one record; returns when it is committed.

        Raises:
            RecordRefused: it is no JSON, too large, or there is one of this key.
            UserError: nothing can be written any more.
        """
        try:
            body = orjson.dumps(record)
        except TypeError as error:
            raise RecordRefused(f"the record cannot be written as JSON: {error}") from None
        await self._put(given, (given.number, draw, attempt, None, body))

    async def set_aside(self, given: Input, draw: int, attempt: int, error: str) -> None:
        """Keep why there is no record; returns, and raises, as `keep` does."""
        text = error.encode("utf-8", "replace").decode()
        await self._put(given, (given.number, draw, attempt, text, None))

    def write_counts(self, counts: Mapping[str, int]) -> None:
        """Say what a whole pass over the data came to."""
        write_text(self.folder / "counts.json", json.dumps(dict(counts), indent=2) + "\n")

    def write_errors(self) -> Counter[str]:
        """Write set_aside.jsonl: the draws whose last attempt failed.

        Returns:
            How often each error stands in it; those that differ in numbers alone count as one.
        """
        path = self.folder / "set_aside.jsonl"
        errors: Counter[str] = Counter()
        shown: dict[str, str] = {}
        with write_atomically(path) as file:
            for entry in read_errors(self.folder):
                errors[shown.setdefault(without_numbers(entry["error"]), entry["error"])] += 1
                file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        if not errors:
            path.unlink()
        return errors

    async def _put(self, given: Input, row: _Row) -> None:
        if self._failure is not None:
            raise self._failure
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[None] = loop.create_future()
        self._waiting.append((given, row, answer))
        if len(self._waiting) == COMMIT_ROWS:
            self._flush()
        elif len(self._waiting) == 1:
            loop.call_later(COMMIT_S, self._flush)
        await answer

    def _flush(self) -> None:
        """Hand what waits to the writer."""
        if not self._waiting:
            return
        batch, self._waiting = self._waiting, []
        loop = batch[0][2].get_loop()

        def tell(done: Future[list[RecordRefused | None]]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and who waited in it
                loop.call_soon_threadsafe(_answer, [answer for *_, answer in batch], done)

        rows = [(given, row) for given, row, _ in batch]
        self._writer.submit(self._commit, rows).add_done_callback(tell)

    def _commit(self, rows: Sequence[tuple[Input, _Row]]) -> list[RecordRefused | None]:
        """Write rows in one transaction, in the writer's thread; says which could not be kept."""
        execute = self._connection.execute
        try:
            if self._failure is not None:
                raise self._failure
            with explained(self._path):
                execute("BEGIN IMMEDIATE")
                refusals = [self._insert(given, row) for given, row in rows]
                execute("COMMIT")
        except UserError as error:
            self._failure = error
            with contextlib.suppress(sqlite3.Error):
                if self._connection.in_transaction:
                    execute("ROLLBACK")
            raise
        return refusals

    def _insert(self, given: Input, row: _Row) -> RecordRefused | None:
        try:
            self._connection.execute(_ADD_RESULT, row)  # first: no input is without a result
            self._connection.execute(_ADD_INPUT, (given.number, given.id, given.body))
        except (sqlite3.IntegrityError, sqlite3.DataError, OverflowError) as error:
            return RecordRefused(f"the record cannot be kept: {error}")
        return None

    def _check(self, fingerprint: str) -> None:
        """Refuse a database that was written for other settings than stage.json says."""
        found = self._connection.execute("SELECT fingerprint FROM about").fetchone()
        if found is None:
            self._connection.execute("INSERT INTO about VALUES (?)", (fingerprint,))
        elif found[0] != fingerprint:
            raise UserError(
                f"{self._path} belongs to other settings than {self.folder / 'stage.json'}; choose "
                f"another --out"
            )


def _answer(
    answers: Sequence[asyncio.Future[None]], done: Future[list[RecordRefused | None]]
) -> None:
    """Tell those who wait what became of their rows."""
    failure = done.exception()
    outcomes = [failure] * len(answers) if failure else done.result()
    for answer, outcome in zip(answers, outcomes, strict=True):
        if answer.done():  # nobody waits any more
            continue
        if outcome is None:
            answer.set_result(None)
        else:
            answer.set_exception(outcome)
            answer.exception()  # seen, also when who waits is cancelled first


def _connect(path: Path) -> sqlite3.Connection:
    """A connection that answers for what it has committed, also when the power fails."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        if mode != "wal":
            raise UserError(f"{path}: this file system has no write-ahead log; use a local disk")
        connection.execute("PRAGMA synchronous=FULL")
        connection.executescript(_TABLES)
    except BaseException:
        connection.close()
        raise
    return connection


def _take_lock(folder: Path) -> IO[bytes]:
    """Hold the folder; the kernel lets go when the process ends, however it does."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+b", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise UserError(explain(error, folder)) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().decode().strip() or "another process"
        lock.close()
        raise UserError(
            f"--out {folder} is in use by {holder}; wait for it, stop it, or choose another --out"
        ) from None
    except OSError as error:
        lock.close()
        raise UserError(f"--out {folder} cannot be locked: {error.strerror}") from None
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    return lock


def _keep_about(folder: Path, about: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    """Write stage.json, or refuse a folder that was begun with other settings."""
    if not is_stage(folder):
        check_folder(folder, "stage.json")
        versions = {"hermes4-core": __version__, "python": platform.python_version()}
        whole = {"format": FORMAT, **about, "recipe": dict(recipe), "versions": versions}
        with writing(folder):
            write_text(folder / "stage.json", json.dumps(whole, indent=2) + "\n")
        return
    before = read_about(folder)
    if before["fingerprint"] == about["fingerprint"]:
        return
    then = {**before["settings"], "stage": before["stage"], "seed": before["seed"]}
    now = {**about["settings"], "stage": about["stage"], "seed": about["seed"]}
    raise UserError(
        f"--out {folder} was begun with other settings: {'; '.join(changes(then, now))}. Choose "
        f"another --out, or remove this one"
    )


def _canonical(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
