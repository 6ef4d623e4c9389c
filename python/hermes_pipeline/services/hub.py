"""Data sets and tokenizers, from disk or from the Hugging Face Hub.

The one door to `datasets` and `transformers`; both load when they are needed.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from hermes_pipeline.errors import UserError
from hermes_pipeline.services.connection import reach_hub
from hermes_pipeline.services.files import (
    DEFAULT_SPLIT,
    EXTENSIONS,
    UNREADABLE,
    Cursor,
    Record,
    check_file,
    count_records,
    find_files,
    read_file,
    source_of,
    without_nulls,
)
from hermes_pipeline.services.identity import FEW_FILES, identify

MAX_BYTES = 1 << 28  # of one record, where the caller sets no limit

# Named tokens of a tokenizer.json without its tokenizer_config.json, the likeliest first.
_LIKELY = {
    "bos_token": ("<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "<bos>", "<s>"),
    "eos_token": (
        "<|im_end|>",
        "<|eot_id|>",
        "<end_of_turn>",
        "<｜end▁of▁sentence｜>",
        "<eos>",
        "</s>",
        "<|endoftext|>",
    ),
    "pad_token": ("<|pad|>", "<pad>", "<｜▁pad▁｜>", "<|finetune_right_pad_id|>", "<|endoftext|>"),
}


class DataSource:
    """Records of a file, of a folder of files, or of a Hugging Face data set.

    Args:
        data: a path, or the name of a data set.
        revision: of the data set; without one the newest is taken.
        split: of the data set, or of a folder whose file names tell their splits.
        subset: configuration of the data set.

    Raises:
        UserError: there is nothing of that name, its file type is unknown, or a revision, split or
            subset is asked of what has none.
    """

    def __init__(
        self,
        data: str,
        *,
        revision: str | None = None,
        split: str = DEFAULT_SPLIT,
        subset: str | None = None,
    ) -> None:
        self.name = data
        self._revision, self._split, self._subset = revision, split, subset
        self._files: list[Path] | None = None
        self._data_set: Any = None
        self._cursor = Cursor()
        path = _path(data)
        if data == "-" or (path.exists() and not path.is_dir() and not path.is_file()):
            raise UserError(
                f"--data {data} is a pipe or a device, which cannot be read twice; write it to a "
                f"file, such as chats.jsonl, and give that"
            )
        if path.is_dir():
            if not _is_data_set(path, subset):
                self._files = find_files(path, split)
        elif path.is_file() or (not path.exists() and _looks_like_path(data)):
            self._files = [check_file(path)]
            _check_whole(path, split, subset)
        if revision is not None and path.exists():
            raise UserError(
                f"{data} lies on this machine and has no revision {revision!r}: that is for a data "
                f"set on the Hub"
            )

    def check_apart(self, out: Path) -> None:
        """Refuse a folder for results inside this data: they would be read as more of it.

        Raises:
            UserError: it lies there.
        """
        folder = _path(self.name)
        if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"--out {out} lies in --data {self.name}, so results would be read as data; choose "
                f"another --out, or give a data file by name"
            )

    def identity(self) -> dict[str, Any]:
        """Return what tells this data from other data, as JSON values; see `changed`."""
        if self._files is None:
            known = {
                "data_set": self.name,
                "revision": self._revision,
                "split": self._split,
                "subset": self._subset,
                "records": self.count(),
            }
            folder = _path(self.name)
            if folder.is_dir():
                return known | {"files": _digest(identify(_seen(folder)))}
            return known
        files = identify(self._files)
        if len(files) <= FEW_FILES:
            return {"files": files}
        size = sum(size for _, size, _ in files)
        return {"files": _digest(files), "count": len(files), "bytes": size}

    def count(self) -> int | None:
        """Return the number of records where that is known without reading."""
        if self._files is None:
            return len(self._load())
        counts = [count_records(path) for path in self._files]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    def share_read(self) -> float:
        """Return how much of the files has been read, in [0, 1]."""
        return self._cursor.share()

    def records(self, *, start: int = 0, max_bytes: int = MAX_BYTES) -> Iterator[Record]:
        """Yield the records from number ``start`` on, in the same order each time.

        Args:
            max_bytes: a longer line becomes a record with an error.
        """
        if self._files is None:
            data = self._load()
            for row in range(start, len(data)):
                yield _row(source_of(self.name, row + 1), row + 1, data)
            return
        self._cursor = Cursor(total=sum(path.stat().st_size for path in self._files))
        for path in self._files:
            before = self._cursor.records
            yield from read_file(path, skip=start, max_bytes=max_bytes, cursor=self._cursor)
            start = max(0, start - (self._cursor.records - before))

    def _load(self) -> Any:
        if self._data_set is None:
            self._data_set = _load_data_set(self.name, self._revision, self._split, self._subset)
        return self._data_set


def load_tokenizer(name_or_path: str, revision: str | None = None) -> Any:
    """Return a fast transformers tokenizer.

    Args:
        name_or_path: a folder, a tokenizer.json or tokenizer.json.gz, or a model's name.
        revision: of the model on the Hub.

    Raises:
        UserError: there is none of that name, or it is not a fast one.
    """
    path = _path(name_or_path)
    if path.is_file():
        # A folder that transformers wrote knows more than the file alone.
        if path.name == "tokenizer.json" and (path.parent / "tokenizer_config.json").is_file():
            return load_tokenizer(str(path.parent))
        return _tokenizer_from_file(path)
    if path.is_dir():
        files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.json.gz")
        found = [path / file for file in files if (path / file).is_file()]
        if not found:
            raise UserError(f"{path} holds no tokenizer: none of {', '.join(files)}")
        if path / "tokenizer_config.json" not in found:
            return _tokenizer_from_file(found[0])
    elif _looks_like_path(name_or_path):
        raise UserError(f"no such tokenizer: {name_or_path}")
    here = path.is_dir() or not reach_hub("tokenizer", name_or_path, "models")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path) if path.is_dir() else name_or_path,
            revision=revision or "main",
            local_files_only=here,
        )
    except Exception as error:
        raise UserError(f"tokenizer {name_or_path!r} cannot be loaded: {_line(error)}") from None
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"tokenizer {name_or_path!r} has no fast form (tokenizer.json)")
    return tokenizer


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return the sha256 of all that decides the ids of a fast tokenizer, wherever it is kept.

    What stands around the ids of a text, and how they are read back, is left out: no id follows
    from a post-processor where special tokens are not added, nor from a decoder.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    merges = [" ".join(m) if isinstance(m, list) else m for m in model.pop("merges", None) or ()]
    vocabulary = model.pop("vocab")
    if isinstance(vocabulary, dict):
        # Whether an added token also stands in the vocabulary depends on who wrote the file.
        known = {token["content"] for token in state["added_tokens"]}
        vocabulary = sorted((id_, text) for text, id_ in vocabulary.items() if text not in known)
    # Who wrote the file decides, too, whether an option that is not used is null, "" or missing.
    used = (item for item in model.items() if item[1] not in (None, "") and item[1] is not False)
    added = sorted((token["id"], sorted(token.items())) for token in state["added_tokens"])
    steps = state["normalizer"], state["pre_tokenizer"]
    return _digest([sorted(used), vocabulary, merges, added, steps])


def load_template(template: str | None, tokenizer: Any) -> tuple[str, str]:
    """Return the name and the Jinja source of a chat template.

    Args:
        template: one of the project's, a file, or None for the tokenizer's own.

    Raises:
        UserError: there is none.
    """
    own = sorted(
        file.name.removesuffix(".jinja")
        for file in (resources.files("hermes_pipeline") / "templates").iterdir()
        if Path(file.name).suffixes == [".jinja"]  # the report's page is no chat template
    )
    if template is None:
        text = tokenizer.chat_template
        if isinstance(text, dict):
            text = text.get("default")
        if not text:
            raise UserError(
                f"the tokenizer has no chat template; give --template: one of {', '.join(own)}, "
                "or a .jinja file"
            )
        return "the tokenizer's own", str(text)
    if template in own:
        file = resources.files("hermes_pipeline") / "templates" / f"{template}.jinja"
        return template, file.read_text(encoding="utf-8")
    path = _path(template)
    if not path.is_file():
        raise UserError(f"no template {template!r}: want one of {', '.join(own)}, or a .jinja file")
    try:
        return path.name, path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"template {path} is not UTF-8: byte {error.start}") from None


def _tokenizer_from_file(path: Path) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix.lower() == ".gz" else data).decode("utf-8")
        backend = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{path} is not a tokenizer.json: {_line(error)}") from None
    special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    named = {}
    for name, likely in _LIKELY.items():
        token = next((token for token in likely if token in special), None)
        if token is not None:
            named[name] = token
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def _load_data_set(name: str, revision: str | None, split: str, subset: str | None) -> Any:
    import datasets

    path = _path(name)
    try:
        if subset is not None and _is_saved(path):
            raise ValueError("save_to_disk wrote it, which keeps no subsets")
        if (path / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(str(path))
            if split not in splits:
                raise ValueError(f"it has no such split; found: {', '.join(splits)}")
            return splits[split]
        if (path / "state.json").is_file():
            whole = datasets.load_from_disk(str(path))
            if split not in (DEFAULT_SPLIT, str(whole.split)):
                raise ValueError("save_to_disk wrote it, and it is no set of splits")
            return whole
        if path.is_dir():
            # The library's own cache is known by README.md alone and outlives an edited file.
            stats = [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in _seen(path)]
            cache = Path(datasets.config.HF_DATASETS_CACHE) / _digest(stats)
            return datasets.load_dataset(str(path), subset, split=split, cache_dir=str(cache))
        cached = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")
        reach_hub("data set", name, "datasets", cached)
        return datasets.load_dataset(name, subset, split=split, revision=revision)
    except UserError:
        raise
    except Exception as error:  # whatever a data set's files and the network raise
        if isinstance(error, datasets.exceptions.DatasetGenerationError):
            error = error.__cause__ or error  # its own words are that there is an error
        asked = ", ".join(
            f"{key} {value!r}"
            for key, value in (("split", split), ("subset", subset), ("revision", revision))
            if value is not None
        )
        raise UserError(f"data set {name!r} ({asked}) cannot be loaded: {_line(error)}") from None


def _row(source: str, number: int, data: Any) -> Record:
    try:
        return Record(source, number, without_nulls(data[number - 1]))
    except UNREADABLE as error:
        return Record(source, number, None, f"it cannot be read: {error}")


def _check_whole(file: Path, split: str, subset: str | None) -> None:
    """Refuse to read a part of a single file."""
    for option, given in (
        ("--split", split if split != DEFAULT_SPLIT else None),
        ("--subset", subset),
    ):
        if given is not None:
            raise UserError(
                f"{option} {given} is for a folder or a data set, and {file} is one file; leave it "
                f"out"
            )


def _path(name: str) -> Path:
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # too long for a file; a home of nobody
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{name[:80]!r} cannot be looked up: {reason}") from None
    return path


def _seen(folder: Path) -> list[Path]:
    """The files under a folder in order, the hidden ones left out."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [p.resolve() for p in files if p.relative_to(folder).as_posix()[0] != "."]


def _is_data_set(folder: Path, subset: str | None) -> bool:
    """Is this a folder that `datasets` knows more about than its files tell?"""
    marks = ("README.md", "dataset_infos.json")
    told = any((folder / mark).is_file() for mark in marks)
    return subset is not None or told or _is_saved(folder)


def _is_saved(folder: Path) -> bool:
    """Did `save_to_disk` write it?"""
    return any((folder / mark).is_file() for mark in ("dataset_dict.json", "state.json"))


def _looks_like_path(name: str) -> bool:
    return (
        name.startswith((".", "/", "~"))
        or name.lower().endswith((*EXTENSIONS, ".gz", ".csv", ".txt", ".arrow", ".zip"))
        or name.count("/") > 1
        or not name.strip()
    )


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()
