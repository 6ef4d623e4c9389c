"""The token store: samples on disk, written once, never read whole.

A folder with shard-00000.bin, shard-00001.bin, ..., quarantine.jsonl (records set aside) and
store.json (counts, checksums, what the store was made from), which is written last: a folder
without it is unfinished. While a store is written, ``writing/`` holds the log of the open shard
and progress.json, replaced at each commit; all that comes after the last commit is cut off on
resume. Shards end where the records say, never where a commit fell, so that the finished files
have the same bytes whatever interrupted the writing.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hermes_core import _C
from hermes_core.files import write_atomically
from hermes_core.samples import Samples, Shard, TokenDtype

FORMAT = "hermes4 store"
VERSION = 1
MAGIC = b"HERMES4S"
# magic, version, bytes a token; samples, tokens, spans, kept tokens; where the four sections
# start; sha256 of the file with these 32 bytes zero.
HEADER = struct.Struct("<8sII4Q4Q32s")
ALIGNMENT = 64


class StoreError(ValueError):
    """A store that cannot be read or written as asked; the message names file and way out."""


class ShardEntry(NamedTuple):
    """What store.json says of one shard file."""

    name: str
    samples: int
    tokens: int
    spans: int
    kept: int
    size: int
    sha256: str


class Store(Samples):
    """The samples of a finished store; shards are mapped when first used.

    Attributes:
        meta: what the writer was told that the store was made from.
        fingerprint: hex sha256 of meta and of every shard's checksum.
        read, stored, quarantined: records; read = stored + quarantined.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder = folder.absolute()  # shards are mapped later, wherever the process is then
        self.meta: dict[str, Any] = about["meta"]
        self.vocab_size: int = about["vocab_size"]
        self.fingerprint: str = about["fingerprint"]
        self.read: int = about["read"]
        self.stored: int = about["stored"]
        self.quarantined: int = about["quarantined"]
        self.dtype = token_dtype(self.vocab_size)
        if fingerprint_of(about) != self.fingerprint:
            raise ValueError("its fingerprint differs from what it lists")
        self.entries = [ShardEntry(*entry) for entry in about["shards"]]
        self._set_up([entry.samples for entry in self.entries], self._map)

    def __reduce__(self) -> tuple[Any, ...]:
        return open_store, (self.folder,)  # a worker maps the files again: no token is copied

    def _measure(self) -> NDArray[np.int64]:
        lengths = super()._measure()
        low, high = int(lengths.min(initial=1)), int(lengths.max(initial=1))
        if not 1 <= low <= high <= max(self.token_count, 1):
            raise StoreError(
                f"{self.folder} is damaged: its {self.token_count:,} tokens are in samples of "
                f"{low:,} to {high:,}; copy the store again"
            )
        return lengths

    @property
    def token_count(self) -> int:
        return sum(entry.tokens for entry in self.entries)

    @property
    def kept_count(self) -> int:
        return sum(entry.kept for entry in self.entries)

    def _map(self, index: int) -> Shard:
        entry = self.entries[index]
        path = self.folder / entry.name
        found, width, starts = read_header(path)
        if found != entry or width != self.dtype.itemsize:
            raise StoreError(
                f"{path} is not the shard that store.json lists: {found} of {width} bytes a token, "
                f"want {entry} of {self.dtype.itemsize}"
            )
        data = _C.map_file(os.fsencode(path))

        def section(number: int, count: int, dtype: Any) -> Any:
            start = starts[number]
            return data[start : start + count * np.dtype(dtype).itemsize].view(dtype)

        try:
            return Shard(
                section(0, entry.tokens, self.dtype),
                section(1, entry.samples + 1, np.int64),
                section(2, 2 * entry.spans, np.uint32).reshape(-1, 2),
                section(3, entry.samples + 1, np.int64),
            )
        except ValueError as error:
            raise StoreError(f"{path} is damaged: {error}; copy the store again") from error

    def verify(self) -> None:
        """Read everything and compare the checksums.

        Raises:
            StoreError: naming the first file that differs.
        """
        quarantine = self.folder / "quarantine.jsonl"
        lines = quarantine.read_bytes().count(b"\n") if quarantine.exists() else 0
        if lines != self.quarantined:
            raise StoreError(f"{quarantine} has {lines} lines, want {self.quarantined}")
        for entry in self.entries:
            path = self.folder / entry.name
            try:
                found = checksum(_C.map_file(os.fsencode(path)))
            except OSError as error:
                raise StoreError(f"{path} cannot be read: {error}") from error
            if found != entry.sha256:
                raise StoreError(f"{path} is damaged: its checksum differs from store.json")


def open_store(folder: str | os.PathLike[str]) -> Store:
    """The finished store in ``folder``; opens in milliseconds at any size.

    Raises:
        StoreError: missing, unfinished, not a store, of a newer version, or a shard is missing or
            truncated.
    """
    folder = Path(folder)
    path = folder / "store.json"
    if not path.exists():
        if (folder / "writing").exists():
            raise StoreError(f"{folder} is unfinished: run the same command again to finish it")
        raise StoreError(f"{folder} is not a token store: it has no store.json")
    about = read_about(path)
    try:
        store = Store(folder, about)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path} is damaged: {error!r}; copy the store again") from error
    for entry in store.entries:
        shard = folder / entry.name
        size = shard.stat().st_size if shard.exists() else None
        if size != entry.size:
            state = "missing" if size is None else f"{size} bytes long"
            raise StoreError(f"{shard} is {state}, want {entry.size} bytes: copy the store again")
    return store


def read_about(path: Path) -> dict[str, Any]:
    """store.json or progress.json, checked to be one that this version understands."""
    try:
        about = json.loads(path.read_bytes())
        kind, version = about["format"], about["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} does not describe a token store: {error!r}") from error
    if kind != FORMAT or not isinstance(version, int):
        raise StoreError(f"{path} is {kind!r} version {version!r}, want {FORMAT!r}")
    if version > VERSION:
        raise StoreError(
            f"{path} has format version {version}, newer than {VERSION}: update hermes4-core"
        )
    assert isinstance(about, dict)
    return about


def token_dtype(vocab_size: int) -> TokenDtype:
    return np.dtype(np.uint16) if vocab_size <= 1 << 16 else np.dtype(np.uint32)


def fingerprint_of(about: Mapping[str, Any]) -> str:
    sums = [ShardEntry(*entry).sha256 for entry in about["shards"]]
    return hashlib.sha256(canonical([about["meta"], about["vocab_size"], sums])).hexdigest()


def canonical(value: Any) -> bytes:
    """JSON with one spelling for equal values."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace")  # a lone surrogate: JSON's own escape


def write_shard(path: Path, shard: Shard) -> None:
    """The shard in one file, whole or not at all."""
    sections = [shard.tokens, shard.offsets, shard.spans, shard.span_offsets]
    *starts, at = _starts([section.nbytes for section in sections])
    counts = (len(shard), len(shard.tokens), len(shard.spans))
    kept = int(np.diff(shard.spans.astype(np.int64)).sum())
    data = bytearray(at)
    HEADER.pack_into(
        data, 0, MAGIC, VERSION, shard.tokens.itemsize, *counts, kept, *starts, bytes(32)
    )
    for start, section in zip(starts, sections, strict=True):
        data[start : start + section.nbytes] = section.tobytes()
    data[HEADER.size - 32 : HEADER.size] = hashlib.sha256(data).digest()
    with write_atomically(path) as file:
        file.write(data)


def read_header(path: Path) -> tuple[ShardEntry, int, list[int]]:
    """What a shard file says of itself, its bytes a token, and where its four sections start."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(HEADER.size)
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing") from error
    if len(header) < HEADER.size or header[:8] != MAGIC:
        raise StoreError(f"{path} is not a shard of a token store: it starts {header[:8]!r}")
    _, version, width, samples, tokens, spans, kept, *rest = HEADER.unpack(header)
    if version > VERSION:
        raise StoreError(f"{path} has format version {version}, newer than {VERSION}")
    starts, digest = list(rest[:4]), rest[4]
    *wanted, end = _starts([tokens * width, (samples + 1) * 8, spans * 8, (samples + 1) * 8])
    if starts != wanted or size != end:
        raise StoreError(
            f"{path} is {size} bytes long with sections at {starts}, want {end} and {wanted}: it "
            "is damaged"
        )
    return ShardEntry(path.name, samples, tokens, spans, kept, size, digest.hex()), width, starts


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where sections of so many bytes start in a shard file, and where it ends."""
    starts = [_aligned(HEADER.size)]
    for size in sizes:
        starts.append(_aligned(starts[-1] + size))
    return starts


def checksum(data: np.ndarray[Any, np.dtype[np.uint8]]) -> str:
    """sha256 of a shard file's bytes, its own place in the header counted as zero."""
    digest = hashlib.sha256(bytes(data[: HEADER.size - 32]) + bytes(32))
    digest.update(data.data[HEADER.size :])
    return digest.hexdigest()


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
