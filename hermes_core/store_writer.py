"""Writing a token store, so that kill -9 at any instant costs seconds and changes no byte."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
import time
import weakref
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hermes_core.files import sync_folder, write_atomically
from hermes_core.samples import TokenDtype, check_integer, check_spans, check_token_ids, join
from hermes_core.store import (
    FORMAT,
    VERSION,
    StoreError,
    canonical,
    fingerprint_of,
    read_about,
    read_header,
    token_dtype,
    write_shard,
)

COMMIT_SECONDS = 2.0  # work that kill -9 may cost
BLOCK = struct.Struct("<3QI")  # a commit's block in the log: records, tokens, spans; crc32

_held: set[Path] = set()  # POSIX locks do not keep a process out of what it holds itself


@dataclass(frozen=True, slots=True)
class Progress:
    """What is committed: finished shards, and bytes of the open shard's log and of quarantine."""

    stored: int = 0
    quarantined: int = 0
    shards: int = 0
    log_bytes: int = 0
    quarantine_bytes: int = 0


class StoreWriter:
    """Appends records to a store in ``folder`` and resumes by itself; a context manager.

    Feed records from number ``records_done`` on, each to `append` or `quarantine`, then `finish`.
    Commits by itself every few seconds and when the block ends; one writer at a time. A writer
    that failed to write is closed: make another, which goes on behind the last commit.

    Args:
        meta: JSON values that say what the store is made from.
        vocab_size: token ids are below it; up to 65,536 they are stored as uint16.
        shard_tokens: a shard ends before it would pass this; a longer sample has its own.

    Raises:
        StoreError: the folder holds a store of other meta or sizes, or another writer is at work.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        meta: Mapping[str, Any],
        vocab_size: int,
        shard_tokens: int = 1 << 25,
    ) -> None:
        self._about = {
            "format": FORMAT,
            "version": VERSION,
            "meta": json.loads(_encode_json("meta", dict(meta))),
            "vocab_size": check_integer("vocab_size", vocab_size, 1, 1 << 32),
            "shard_tokens": check_integer("shard_tokens", shard_tokens, 1, 1 << 40),
        }
        self.folder = Path(folder).resolve()
        self.finished = False
        self._writing = self.folder / "writing"
        self._dtype = token_dtype(vocab_size)
        self._progress = Progress()
        self._token_ids: list[NDArray[Any]] = []  # the open shard
        self._spans: list[NDArray[np.uint32]] = []
        self._tokens = 0
        self._logged = 0  # records of the open shard that its log holds
        self._lines: list[bytes] = []  # of quarantine.jsonl, since the last commit
        self._last_commit = time.monotonic()
        self._release: weakref.finalize[..., StoreWriter] | None = None
        if self._find_finished():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = _take_lock(self.folder)
        self._release = weakref.finalize(self, _let_go, lock, self.folder)  # dropped, not closed
        with self._closed_on_failure():
            if not self._find_finished():
                self._resume()

    @property
    def records_done(self) -> int:
        """Records, stored or quarantined, that committed data covers."""
        return self._progress.stored + self._progress.quarantined

    def append(self, token_ids: ArrayLike, kept_spans: ArrayLike) -> None:
        """Store one record: [n] token ids and [m, 2] kept spans [start, end), rising.

        Raises:
            TypeError, ValueError: not that; the record counts as not seen.
        """
        self._check_open()
        ids = check_token_ids("token_ids", token_ids, self._about["vocab_size"])
        spans = check_spans("kept_spans", kept_spans, len(ids))
        if self._token_ids and self._tokens + len(ids) > self._about["shard_tokens"]:
            self._close_shard()
        self._token_ids.append(ids.astype(self._dtype))
        self._spans.append(spans)
        self._tokens += len(ids)
        self._commit_in_time()

    def quarantine(self, entry: Mapping[str, Any]) -> None:
        """Set one record aside; its line in quarantine.jsonl says which it is, and why."""
        self._check_open()
        self._lines.append(_encode_json("entry", dict(entry)) + b"\n")
        self._commit_in_time()

    def commit(self) -> None:
        """Make everything so far durable."""
        self._check_open()
        with self._closed_on_failure():
            new = len(self._token_ids) - self._logged
            if new or self._lines:
                block = _encode_block(
                    self._token_ids[self._logged :], self._spans[self._logged :], self._dtype
                )
                done = self._progress
                _write_at(self._log_path(), done.log_bytes, block)
                self._advance(stored=done.stored + new, log_bytes=done.log_bytes + len(block))
                self._logged += new
            self._last_commit = time.monotonic()

    def finish(self) -> None:
        """Write what is left, then store.json: from here on the store never changes."""
        if self.finished:
            return
        if self._token_ids:
            self._close_shard()
        self.commit()
        with self._closed_on_failure():
            done = self._progress
            shards = [read_header(self._shard_path(i))[0] for i in range(done.shards)]
            about = {
                **self._about,
                "read": self.records_done,
                "stored": done.stored,
                "quarantined": done.quarantined,
                "shards": [list(entry) for entry in shards],
            }
            about["fingerprint"] = fingerprint_of(about)
            with write_atomically(self.folder / "store.json") as file:
                file.write(canonical(about) + b"\n")
            self._find_finished()

    def close(self) -> None:
        """Let the next writer in; what is not committed is lost."""
        if self._release is not None:
            self._release()
            self._release = None

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None and not self.finished:
                self.commit()
        finally:
            self.close()

    def _find_finished(self) -> bool:
        path = self.folder / "store.json"
        if path.exists():
            about = read_about(path)
            self._check_same(about, path)
            self._progress = Progress(about["stored"], about["quarantined"])
            shutil.rmtree(self._writing, ignore_errors=True)
            self.finished = True
        return self.finished

    def _check_same(self, found: Mapping[str, Any], path: Path) -> None:
        theirs, ours = _options(found), _options(self._about)
        for name in ours | theirs:
            if theirs.get(name) != ours.get(name):
                raise StoreError(
                    f"{path} has {name} = {theirs.get(name)!r}, not {ours.get(name)!r}: "
                    f"choose another folder, or remove this one"
                )

    def _check_open(self) -> None:
        if self.finished:
            raise StoreError(f"{self.folder} is finished: its records never change")
        if self._release is None:
            raise StoreError(f"the writer of {self.folder} is closed: make another one")

    @contextmanager
    def _closed_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _commit_in_time(self) -> None:
        if time.monotonic() - self._last_commit > COMMIT_SECONDS:
            self.commit()

    def _resume(self) -> None:
        path = self._writing / "progress.json"
        shards = set(self.folder.glob("shard-*.bin"))
        if not path.exists():
            if shards and not self._writing.exists():
                raise StoreError(f"{min(shards)} exists without store.json: choose another folder")
            self._writing.mkdir(exist_ok=True)
            self._advance()
            sync_folder(self.folder)
            sync_folder(self.folder.parent)
            return
        about = read_about(path)
        self._check_same(about, path)
        try:
            self._progress = Progress(**about["progress"])
        except (KeyError, TypeError) as error:
            raise StoreError(f"{path} is damaged: {error!r}") from error
        committed = [self._shard_path(number) for number in range(self._progress.shards)]
        for missing in (path for path in committed if path not in shards):
            raise StoreError(f"{missing} is missing: it was committed; remove {self.folder}")
        # What a writer left that was stopped between two commits.
        log = self._log_path()
        _cut(self.folder / "quarantine.jsonl", self._progress.quarantine_bytes)
        _cut(log, self._progress.log_bytes)
        for left in (
            *shards.difference(committed),
            *self.folder.glob(".*.unfinished"),
            *(other for other in self._writing.glob("*.log") if other != log),
        ):
            left.unlink()
        self._token_ids, self._spans = _decode_log(log, self._dtype)
        self._logged = len(self._token_ids)
        self._tokens = sum(map(len, self._token_ids))

    def _close_shard(self) -> None:
        self._check_open()
        with self._closed_on_failure():
            done, log = self._progress, self._log_path()
            new = len(self._token_ids) - self._logged
            shard = join(self._token_ids, self._spans, self._dtype)
            write_shard(self._shard_path(done.shards), shard)
            self._advance(stored=done.stored + new, shards=done.shards + 1, log_bytes=0)
            self._token_ids, self._spans = [], []
            self._tokens = self._logged = 0
            log.unlink(missing_ok=True)

    def _advance(self, **changes: int) -> None:
        """The commit itself: log or shard are durable; now quarantine.jsonl, then progress.json."""
        done, lines = self._progress, b"".join(self._lines)
        _write_at(self.folder / "quarantine.jsonl", done.quarantine_bytes, lines)
        progress = replace(
            done,
            quarantined=done.quarantined + len(self._lines),
            quarantine_bytes=done.quarantine_bytes + len(lines),
            **changes,
        )
        with write_atomically(self._writing / "progress.json") as file:
            file.write(canonical({**self._about, "progress": asdict(progress)}))
        self._progress = progress
        self._lines = []

    def _shard_path(self, index: int) -> Path:
        return self.folder / f"shard-{index:05}.bin"

    def _log_path(self) -> Path:
        return self._writing / f"shard-{self._progress.shards:05}.log"


def _take_lock(folder: Path) -> IO[bytes]:
    taken = f"another writer is at work in {folder}: wait for it, or stop it"
    if folder in _held:  # before open: closing any descriptor of a file drops its POSIX locks
        raise StoreError(taken)
    # lockf, not flock: a forked tokenizer process must not hold the lock when its parent is gone.
    lock = open(folder / ".lock", "ab")  # noqa: SIM115
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        if isinstance(error, BlockingIOError | PermissionError):
            raise StoreError(taken) from None
        raise
    _held.add(folder)
    return lock


def _let_go(lock: IO[bytes], folder: Path) -> None:
    lock.close()
    _held.discard(folder)


def _encode_json(name: str, value: Mapping[str, Any]) -> bytes:
    try:
        return canonical(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} is not JSON ({error}): {value!r}") from error


def _options(about: Mapping[str, Any]) -> dict[str, Any]:
    meta = {f"meta[{name!r}]": value for name, value in about["meta"].items()}
    return {name: about[name] for name in ("vocab_size", "shard_tokens")} | meta


def _encode_block(
    token_ids: list[NDArray[Any]], spans: list[NDArray[np.uint32]], dtype: TokenDtype
) -> bytes:
    if not token_ids:
        return b""
    shard = join(token_ids, spans, dtype)
    parts = (np.diff(shard.offsets), np.diff(shard.span_offsets), shard.spans, shard.tokens)
    body = b"".join(part.tobytes() for part in parts)
    counts = (len(shard), len(shard.tokens), len(shard.spans))
    return BLOCK.pack(*counts, zlib.crc32(body)) + body


def _decode_log(
    path: Path, dtype: TokenDtype
) -> tuple[list[NDArray[Any]], list[NDArray[np.uint32]]]:
    token_ids: list[NDArray[Any]] = []
    all_spans: list[NDArray[np.uint32]] = []
    data, at = path.read_bytes(), 0
    while at < len(data):
        if len(data) < at + BLOCK.size:
            raise StoreError(f"{path} is damaged at byte {at}")
        records, tokens, spans, crc = BLOCK.unpack_from(data, at)
        at += BLOCK.size
        end = at + 16 * records + 8 * spans + tokens * dtype.itemsize
        if end > len(data) or zlib.crc32(data[at:end]) != crc:
            raise StoreError(f"{path} is damaged at byte {at}")
        counts = np.frombuffer(data, np.int64, 2 * records, at).reshape(2, records)
        at += 16 * records
        pairs = np.frombuffer(data, np.uint32, 2 * spans, at).reshape(-1, 2)
        ids = np.frombuffer(data, dtype, tokens, at + 8 * spans)
        token_ids += np.split(ids, np.cumsum(counts[0])[:-1])
        all_spans += np.split(pairs, np.cumsum(counts[1])[:-1])
        at = end
    return token_ids, all_spans


def _write_at(path: Path, at: int, data: bytes | bytearray) -> None:
    """Write ``data`` at byte ``at``, durably; whatever lay behind is of no account."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        view = memoryview(data)
        while view:
            written = os.pwrite(descriptor, view, at)
            view, at = view[written:], at + written
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cut(path: Path, size: int) -> None:
    """Cut what was never committed off the end of ``path``."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        found = os.fstat(descriptor).st_size
        if found < size:
            raise StoreError(f"{path} is {found} bytes long, want at least {size}: it is damaged")
        os.ftruncate(descriptor, size)
    finally:
        os.close(descriptor)
