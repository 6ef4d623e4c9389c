"""Model folders in Hugging Face form: checked before they are read, written whole."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hermes_pipeline.config import changes
from hermes_pipeline.errors import UserError
from hermes_pipeline.services.folders import check_folder, writing
from hermes_pipeline.training.shape import Shape, read_json

MARKER = "hermes4.json"  # who wrote a folder, and of what, so that it may be replaced
LOCK = "hermes4.lock"  # of a work folder, which is ours by it
# What training takes, as what it is written back.
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float32"}
COMPUTED = ".rotary_emb.inv_freq"  # old folders hold it; models compute it
SHARD_BYTES = 5_000_000_000
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def check_weights(folder: Path, shape: Shape) -> None:
    """Compare the tensors in a model folder with a shape, by the files' headers alone.

    Raises:
        UserError: a file cannot be read; a tensor is missing, unknown, or of another shape.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"model {folder} holds no .safetensors file")
    found: dict[str, tuple[int, ...]] = {}
    for path in files:
        found |= {name: size for name, (_, size) in _header(path).items()}
    wanted = shape.tensors()
    spare = {"lm_head.weight"} if shape.tied else set()
    for name, size in wanted.items():
        if name not in found:
            raise UserError(
                f"model {folder} lacks the tensor {name}, which its config.json implies"
            )
        if found[name] != size:
            raise UserError(
                f"model {folder}: {name} is {list(found[name])}, its config.json implies "
                f"{list(size)}"
            )
    for name in found:
        if name not in wanted and name not in spare and not name.endswith(COMPUTED):
            raise UserError(f"model {folder} holds {name}, which its config.json does not imply")


def _header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor of a file, by its name."""
    found = {}
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_slice(name)
                if tensor.get_dtype() not in FLOATS:
                    raise UserError(
                        f"{path}: {name} is {tensor.get_dtype()}; quantised models are not trained"
                    )
                found[name] = tensor.get_dtype(), tuple(tensor.get_shape())
    except UserError:
        raise
    except Exception as error:  # safetensors raises its own, untyped
        raise UserError(f"{path} is not a readable safetensors file: {error}") from None
    return found


def stored_dtype(folder: Path) -> str:
    """The dtype that a model folder's config.json names, or else that of all its weights.

    float32 where weights differ, as no other holds them all.

    Raises:
        UserError: a file cannot be read.
    """
    config = read_json(folder / "config.json")
    if named := config.get("dtype") or config.get("torch_dtype"):
        return str(named)
    dtypes = {
        dtype
        for path in folder.glob("*.safetensors")
        for name, (dtype, _) in _header(path).items()
        if not name.endswith(COMPUTED)
    }
    return FLOATS[dtypes.pop()] if len(dtypes) == 1 else "float32"


def tokenizer_fingerprint_of(folder: Path) -> str | None:
    """Fingerprint of the tokenizer in a model folder; None where there is none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    from hermes_pipeline.services.hub import load_tokenizer, tokenizer_fingerprint

    return tokenizer_fingerprint(load_tokenizer(str(folder)))


@contextmanager
def written_whole(
    out: Path, *, marker: Mapping[str, Any], may_differ: Container[str] = ()
) -> Iterator[Path]:
    """A temporary folder that becomes ``out`` at the end, and leaves nothing after an error.

    A folder that an earlier call wrote with the same marker is replaced, where a link leads to it
    too. What killed calls have left is removed.

    Args:
        may_differ: keys of the marker that may have other values there.

    Raises:
        UserError: ``out`` holds something else, or cannot be written or replaced.
    """
    check_folder(out, MARKER)
    place = out.resolve()
    if place.is_dir() and (place.samefile(".") or place.is_mount()):
        raise UserError(
            f"--out {out} is replaced as a whole, which the current folder and mount points cannot "
            f"be; give a folder inside it"
        )
    hidden = sorted(p.name for p in place.glob(".*")) if place.is_dir() else []
    if hidden:
        raise UserError(
            f"--out {out} is replaced as a whole, and holds {hidden[0]}; choose another --out"
        )
    with writing(out, goes_on="run the same command again"):
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(place)
        _refuse_other(out, marker, may_differ)
        with _work_folder(place) as work:
            new = work / "new"
            new.mkdir()
            yield new
            write_json(new / MARKER, dict(marker))
            _readable(new)
            if place.exists():
                os.replace(place, work / "old")
            os.replace(new, place)


@contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside ``out`` for what replaces it and for what it replaces."""
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        with open(work / f"{LOCK}.new", "wb") as lock:
            with suppress(OSError):  # a disk without locks: nobody else gets one, either
                fcntl.flock(lock, fcntl.LOCK_EX)
            os.replace(lock.name, work / LOCK)  # so that it is never there and free
            yield work
    finally:
        _put_away(work, out)


def _remove_unfinished(out: Path) -> None:
    """Remove work folders of calls that were killed; whose lock is held, those are at work."""
    name = re.compile(rf"\.{re.escape(out.name)}\.[a-z0-9_]{{8}}")  # as mkdtemp makes them
    for path in out.parent.iterdir():
        if name.fullmatch(path.name):
            with suppress(OSError), open(path / LOCK, "r+b") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _put_away(path, out)


def _put_away(work: Path, out: Path) -> None:
    """Remove a work folder, the lock last; what it took away and did not replace goes back."""
    if (work / "old").exists() and not out.exists():
        os.replace(work / "old", out)
    for path in (work / "old", work / "new", work):
        shutil.rmtree(path, ignore_errors=True)


def _refuse_other(out: Path, marker: Mapping[str, Any], may_differ: Container[str]) -> None:
    """Refuse a folder of ours that the same command would not write again."""
    path = out / MARKER
    if not path.is_file():
        return
    try:
        before = read_json(path)
    except UserError:
        raise UserError(f"{path} is damaged; choose another --out, or remove {out}") from None
    if before.get("made_by") != marker["made_by"]:
        raise UserError(
            f"--out {out} holds what `{before.get('made_by')}` wrote; choose another --out, or "
            f"remove this one"
        )
    then, now = (
        {key: value for key, value in each.items() if key not in may_differ}
        for each in (before, marker)
    )
    if differing := changes(then, now):
        raise UserError(
            f"--out {out} holds what `{marker['made_by']}` wrote of something else: "
            f"{'; '.join(differing)}. Choose another --out, or remove this one"
        )


def _readable(folder: Path) -> None:
    """Usual permissions, where temporary files had strict ones."""
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy the files of a tokenizer and its chat template, which becomes a file of its own."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    settings = out / "tokenizer_config.json"
    template = out / "chat_template.jinja"
    if settings.is_file() and not template.is_file():
        text = read_json(settings).get("chat_template")
        if isinstance(text, str):
            template.write_text(text, encoding="utf-8")


def generation_config(earlier: Mapping[str, Any], eos_token_ids: Iterable[int]) -> dict[str, Any]:
    """generation_config.json: what there was, and every token that ends a turn."""
    before = earlier.get("eos_token_id")
    listed = before if isinstance(before, list) else [] if before is None else [before]
    ends = list(dict.fromkeys([*eos_token_ids, *listed]))
    return {**earlier, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_random(folder: Path, shape: Shape, *, embedding_std: float, seed: int) -> None:
    """Write random weights in float32, the same bytes for the same seed.

    Matrices are normal with standard deviation 1 / sqrt(inputs); those that add to the residual
    stream are smaller by sqrt(2 x layers), so that its size does not grow with depth.
    """
    tensors: dict[str, NDArray[np.float32]] = {}
    for number, (name, size) in enumerate(shape.tensors().items()):
        if len(size) == 1:
            tensors[name] = np.ones(size, np.float32)
            continue
        std = embedding_std if name == "model.embed_tokens.weight" else size[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= (2 * shape.layers) ** 0.5
        normal = np.random.Generator(np.random.Philox(key=[seed, number]))
        tensors[name] = (std * normal.standard_normal(size)).astype(np.float32)
    try:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # its words end with the number that the system gave
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from None
