"""A run folder: one job at a time, what the job was, its checkpoints and its figures.

run.json        the recipe with its settings, the store and the start weights
model/          what an export needs beside weights: configuration, tokenizer, chat template
checkpoint/     step-<n>/, each whole once its .metadata is there
metrics.jsonl   one line for each step
log.txt         what torchtitan says
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from hermes_core import Store
from hermes_core.files import write_text
from hermes_pipeline import config
from hermes_pipeline.errors import UserError
from hermes_pipeline.training.recipes import MAY_CHANGE, Recipe
from hermes_pipeline.training.report import StepReport
from hermes_pipeline.training.shape import read_config, read_json
from hermes_pipeline.training.weights import (
    copy_tokenizer,
    generation_config,
    stored_dtype,
    write_json,
)

FORMAT = 3  # below: before rows were shuffled as they are now


def is_log(name: str) -> bool:
    """Is it a file that a job writes before run.json?"""
    return re.fullmatch(r"log(\.rank\d+)?\.txt", name) is not None


def saves(checkpoints: Path) -> dict[int, Path]:
    """The folders that saves have written or begun, by step; other names are the user's."""
    return {
        int(match.group(1)): path
        for path in checkpoints.glob("step-*")
        if (match := re.fullmatch(r"step-(0|[1-9]\d*)", path.name)) and path.is_dir()
    }


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of whole checkpoints, rising; a save that was cut off is none."""
    found = saves(folder / "checkpoint")
    return sorted(step for step, path in found.items() if (path / ".metadata").is_file())


def remove_torn_checkpoints(folder: Path) -> None:
    """Delete what saves that were cut off have left."""
    whole = checkpoint_steps(folder)
    for step, path in saves(folder / "checkpoint").items():
        if step not in whole:
            shutil.rmtree(path)


@contextmanager
def locked(folder: Path, rank: int) -> Iterator[None]:
    """Hold the run folder, from the first process of a job to its last.

    The first process keeps `.lock`; the others share `.lock.ranks` once all have met, see
    `join_lock`. The kernel drops a lock with its process, however that ends, so what outlives a
    killed launcher keeps the next job out, and nothing else does.

    Raises:
        UserError: another job is at work here.
    """
    if rank != 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+", encoding="utf-8") as lock:
        _take(lock, fcntl.LOCK_EX, folder)
        with open(folder / ".lock.ranks", "a+", encoding="utf-8") as ranks:
            _take(ranks, fcntl.LOCK_EX, folder)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


@contextmanager
def join_lock(folder: Path, rank: int) -> Iterator[None]:
    """Share the lock of the job's other processes; the first process holds its own."""
    if rank == 0:
        yield
        return
    with open(folder / ".lock.ranks", "a+", encoding="utf-8") as lock:
        _take(lock, fcntl.LOCK_SH, folder)
        yield


def _take(lock: TextIO, kind: int, folder: Path) -> None:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        holder = lock.read().strip() or "a process of an earlier job"
        raise UserError(
            f"run folder {folder} is in use by {holder}; wait for it, stop it, or choose "
            f"another --out"
        ) from None


def read_record(folder: Path) -> dict[str, Any] | None:
    """run.json, or None where no run has begun."""
    path = folder / "run.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise UserError(f"{path} is of format {record['format']}, this program reads {FORMAT}")
        store, recipe = record["store"], record["recipe"]
        whole = {"folder", "fingerprint"} <= store.keys() and "model" in record
        if not whole or not isinstance(recipe["training.schedule_steps"], int):
            raise KeyError
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged; move it away to begin anew") from None
    return dict(record)


def write_record(
    folder: Path, recipe: Recipe, *, store: Path, fingerprint: str, model: Path | None
) -> None:
    """Write run.json as a whole."""
    record = {
        "format": FORMAT,
        "recipe": config.flatten(recipe),
        "store": {"folder": str(store.resolve()), "fingerprint": fingerprint},
        "model": None if model is None else str(model.resolve()),
    }
    write_text(folder / "run.json", json.dumps(record, indent=2) + "\n")


def refuse_changes(folder: Path, record: Mapping[str, Any], recipe: Recipe) -> None:
    """Compare the recipe with that of the run in the folder.

    Raises:
        UserError: a setting differs that decides what the steps compute.
    """
    before, now = (
        {key: value for key, value in settings.items() if key not in MAY_CHANGE}
        for settings in (record["recipe"], config.flatten(recipe))
    )
    differing = config.changes(before, now)
    if differing:
        raise UserError(
            f"run folder {folder} belongs to another recipe: {'; '.join(differing)}. Choose "
            f"another --out, or give the recipe it began with"
        )


class Metrics:
    """metrics.jsonl: one line for each step, also after a resumption."""

    def __init__(self, folder: Path, *, step: int) -> None:
        """Go on after ``step``: lines of later steps, which were lost, are dropped."""
        path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(folder) if line["step"] <= step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, report: StepReport) -> None:
        self._file.write(report.line() + "\n")
        self._file.flush()  # before the step may be saved

    def close(self) -> None:
        self._file.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The figures of each step so far; a last line that was cut off is left out.

    Raises:
        UserError: an earlier line is damaged.
    """
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    figures = [_figures(line) for line in lines]
    if figures and figures[-1] is None:
        figures.pop()
    if None in figures:
        raise UserError(
            f"{path}: line {figures.index(None) + 1} is damaged; mend it, or move the file away, "
            f"and the same command goes on"
        )
    return [line for line in figures if line is not None]


def _figures(line: bytes) -> dict[str, Any] | None:
    """The figures of one step, or None where it is no such line."""
    try:
        figures = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(figures, dict) and isinstance(figures.get("step"), int)
    return figures if whole else None


def write_model_files(folder: Path, model: Path, store: Store) -> None:
    """Keep what an export needs beside weights, so that it asks for neither model nor store.

    The tokenizer is the store's, which carries the chat template the samples were made with; the
    model's where the store has none.
    """
    tokenizer = store.folder / "tokenizer"
    out = folder / "model"
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", read_config(model) | {"dtype": stored_dtype(model)})
    copy_tokenizer(tokenizer if tokenizer.is_dir() else model, out)
    ends = [int(token) for token in store.meta.get("eos_token_ids") or ()]
    earlier = read_json(model / "generation_config.json")
    write_json(out / "generation_config.json", generation_config(earlier, ends))


def model_files(folder: Path, record: Mapping[str, Any]) -> Path:
    """The folder that `write_model_files` has filled.

    Raises:
        UserError: it is gone.
    """
    out = folder / "model"
    if not (out / "config.json").is_file():
        raise UserError(
            f"run {folder} has lost {out}, which `hermes4 train` writes as a run begins; bring it "
            f"back from a copy, or begin a run elsewhere with --store {record['store']['folder']} "
            f"--model {record['model']} and copy that one's"
        )
    return out
