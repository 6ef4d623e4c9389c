"""What tells data from other data, and how two of them differ, in words."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FEW_FILES = 16  # are named one by one
SAMPLED = 1 << 26  # bytes that are read of all files, and of each of many two blocks
_BLOCK = 1 << 16


def identify(files: Sequence[Path]) -> list[list[Any]]:
    """Path, size and a digest of the content of each file, whenever it was written.

    Of files that hold more than `SAMPLED` bytes together, those that are larger than their share of
    them are read in blocks at even distances: an edit between these that leaves the size as it was
    is not seen.
    """
    sizes = [path.stat().st_size for path in files]
    share = SAMPLED if sum(sizes) <= SAMPLED else max(_BLOCK, SAMPLED // len(files))
    return [
        [str(path.resolve()), size, _digest(path, share)]
        for path, size in zip(files, sizes, strict=True)
    ]


def _digest(path: Path, most: int) -> str:
    digest, size = hashlib.blake2b(digest_size=16), path.stat().st_size
    with path.open("rb") as file:
        if size <= most:
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
        blocks = max(2, most // _BLOCK)
        for index in range(blocks):
            file.seek((size - _BLOCK) * index // (blocks - 1))
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def changed(then: Any, now: Mapping[str, Any]) -> str:
    """How the data differs from what it was, in words: what it was, and what it is now.

    Args:
        then, now: of `hub.DataSource.identity`; ``then`` as a file gave it.
    """
    if not isinstance(then, Mapping):
        return "nobody knows which"
    before, after = then.get("files"), now.get("files")
    if isinstance(before, list) and isinstance(after, list):
        return _changed_files(before, after)
    if "data_set" in then and "data_set" in now:
        for key in ("data_set", "revision", "split", "subset", "records"):
            if then.get(key) != now[key]:
                name = "" if key == "data_set" else f"{key} "
                return f"{name}{then.get(key)}, not {now[key]}"
        return f"{now['data_set']} of other contents"
    was, is_now = _in_short(then), _in_short(now)
    return f"{was}, not {is_now}" if was != is_now else f"{was} of other contents"


def _changed_files(before: list[Any], after: list[Any]) -> str:
    then, now = ({path: rest for path, *rest in files} for files in (before, after))
    gone, new = [path for path in then if path not in now], [p for p in now if p not in then]
    if gone and new:
        return f"{', '.join(gone)}, not {', '.join(new)}"
    if gone:
        return f"{', '.join(gone)}, which is not there any more"
    if new:
        return f"less: {', '.join(new)} is new"
    path = next((path for path in now if then[path] != now[path]), None)
    if path is None:
        return "the same files, listed otherwise"
    (size, mark), (size_now, _) = then[path], now[path]
    if size != size_now:
        return f"{path} of {size:,} bytes, which has {size_now:,} now"
    if not isinstance(mark, str):
        return f"{path} by an earlier version, which did not look into it"
    return f"{path} of other contents"


def _in_short(identity: Mapping[str, Any]) -> str:
    if "data_set" in identity:
        return f"data set {identity['data_set']}"
    files = identity.get("files")
    if isinstance(files, list):
        return ", ".join(str(path) for path, *_ in files)
    if "count" not in identity:
        return "files by an earlier version, which did not look into them"
    return f"{identity['count']:,} files of {identity['bytes']:,} bytes"
