"""What a training run will do, checked before anything is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hermes_core import Store, StoreError, open_store
from hermes_pipeline import config
from hermes_pipeline.errors import UserError
from hermes_pipeline.services.folders import check_folder
from hermes_pipeline.training import run_folder
from hermes_pipeline.training.lost import lost_to_rows
from hermes_pipeline.training.recipes import Recipe, load_recipe
from hermes_pipeline.training.shape import Shape, check_shape, read_json, read_shape
from hermes_pipeline.training.weights import check_weights, tokenizer_fingerprint_of


@dataclass(frozen=True, slots=True)
class Job:
    """A checked run."""

    recipe: Recipe
    folder: Path
    store: Store
    shape: Shape
    model: Path | None  # start weights; None where a checkpoint takes their place
    begun: bool  # does the folder hold the record of this run?
    step: int  # of the latest whole checkpoint; 0 where there is none
    notes: tuple[str, ...]  # what to say before the first step

    @property
    def complete(self) -> bool:
        """Has the run reached its last step?"""
        return self.step >= self.recipe.training.steps

    def facts(self) -> dict[str, Any]:
        """What decides the steps, by name; not folders, which have a place on each machine."""
        settings = config.flatten(self.recipe)
        places = ("data.store", "model.path", "run.out")
        return {
            "the last checkpoint's step": self.step,
            "the store's fingerprint": self.store.fingerprint,
            **{key: value for key, value in settings.items() if key not in places},
        }

    def completion(self) -> str:
        """In words, that there is nothing left to do."""
        return (
            f"run {self.folder} is complete: step {self.step} of {self.recipe.training.steps}; "
            f"`hermes4 export {self.folder} --out MODEL` writes its model"
        )


def prepare(
    recipe_name: str,
    *,
    store: Path | None,
    model: str | None,
    out: Path | None,
    settings: Sequence[str],
    processes: int,
) -> Job:
    """Read and check everything a run needs; start and write nothing.

    Args:
        store, model, out: over the recipe's; a run that goes on knows its own.

    Raises:
        UserError: something cannot work; the message says what and how to go on.
    """
    recipe = _with_paths(load_recipe(recipe_name, settings), store, model, out)
    if recipe.run.out is None:
        raise UserError("where shall the run go? give --out RUN")
    folder = Path(recipe.run.out)
    check_folder(folder, "run.json", may_hold=run_folder.is_log)
    record = run_folder.read_record(folder)
    recipe = _as_begun(recipe, record, folder)
    recipe.data_ranks(processes)
    opened = _open_store(recipe, record)
    run_folder.read_metrics(folder)  # so that damage is said before anything starts
    steps = run_folder.checkpoint_steps(folder) if record else []
    step = steps[-1] if steps else 0
    _check_lengths(recipe, opened)
    notes = _check_lost(recipe, opened)
    if record is not None and step > 0:
        notes += _check_unused(recipe, record, step)
        recipe = replace(recipe, model=replace(recipe.model, path=record["model"]))
    start = _start_weights(recipe) if step == 0 else None
    shape = read_shape(folder / "model" if start is None else start)
    job = Job(recipe, folder, opened, shape, start, record is not None, step, tuple(notes))
    _check(job)
    return job


def _with_paths(recipe: Recipe, store: Path | None, model: str | None, out: Path | None) -> Recipe:
    if store is not None:
        recipe = replace(recipe, data=replace(recipe.data, store=str(store)))
    if model is not None:
        recipe = replace(recipe, model=replace(recipe.model, path=model))
    if out is not None:
        recipe = replace(recipe, run=replace(recipe.run, out=str(out)))
    return recipe


def _as_begun(recipe: Recipe, record: dict[str, Any] | None, folder: Path) -> Recipe:
    """The recipe with the length of its schedule fixed, by the run's record if there is one."""
    if record is None:
        length = recipe.training.schedule_steps or recipe.training.steps
        return replace(recipe, training=replace(recipe.training, schedule_steps=length))
    run_folder.refuse_changes(folder, record, recipe)
    begun = record["recipe"]["training.schedule_steps"]
    length = recipe.training.schedule_steps or begun
    if recipe.training.steps > length:
        raise UserError(
            f"training.steps = {recipe.training.steps} goes past the learning-rate schedule of "
            f"{length} steps with which run {folder} began; --set "
            f"training.schedule_steps={recipe.training.steps} changes the schedule from here on"
        )
    recipe = replace(recipe, training=replace(recipe.training, schedule_steps=length))
    if recipe.data.store is None:
        recipe = replace(recipe, data=replace(recipe.data, store=record["store"]["folder"]))
    if recipe.model.path is None:
        recipe = replace(recipe, model=replace(recipe.model, path=record["model"]))
    return recipe


def _open_store(recipe: Recipe, record: dict[str, Any] | None) -> Store:
    if recipe.data.store is None:
        raise UserError("train on what? give --store STORE, made by `hermes4 tokenize`")
    try:
        store = open_store(Path(recipe.data.store))
        len(store.lengths)  # which maps every shard
    except (StoreError, OSError) as error:
        raise UserError(str(error)) from None
    if record is not None and store.fingerprint != record["store"]["fingerprint"]:
        raise UserError(
            f"store {recipe.data.store} is not the one this run began with "
            f"({record['store']['folder']}); give that, or choose another --out"
        )
    return store


def _check_unused(recipe: Recipe, record: dict[str, Any], step: int) -> list[str]:
    """In words, which start weights are given in vain: a run keeps those it began with."""
    path = recipe.model.path
    if path is None or str(Path(path).resolve()) == record["model"]:
        return []
    return [f"model {path} is not used: the weights are those of the checkpoint of step {step}"]


def _start_weights(recipe: Recipe) -> Path:
    if recipe.model.path is None:
        raise UserError(
            "from which weights? give --model MODEL, a folder in Hugging Face form; "
            "`hermes4 init` makes one with random weights"
        )
    return Path(recipe.model.path)


def _check(job: Job) -> None:
    recipe, shape, store = job.recipe, job.shape, job.store
    model = job.folder / "model" if job.model is None else job.model
    check_shape(recipe.model, shape, model)
    if store.vocab_size > shape.vocab_size:
        raise UserError(
            f"store {store.folder} has token ids up to {store.vocab_size - 1}, but model {model} "
            f"knows {shape.vocab_size}; tokenize with the model's tokenizer"
        )
    if recipe.data.row_length > shape.max_positions:
        raise UserError(
            f"data.row_length = {recipe.data.row_length} is longer than the "
            f"{shape.max_positions} positions of model {model}"
        )
    _check_tensor_parallel(recipe, shape)
    if job.model is not None:
        check_weights(job.model, shape)
        for name in ("generation_config.json", "tokenizer_config.json"):  # which the run keeps
            read_json(job.model / name)


def _check_tensor_parallel(recipe: Recipe, shape: Shape) -> None:
    degree = recipe.parallel.tensor
    sizes = {
        "model heads": shape.heads,
        "model kv_heads": shape.kv_heads,
        "the vocabulary": shape.vocab_size,
        "data.row_length": recipe.data.row_length,
    }
    for name, size in sizes.items():
        if size % degree:
            raise UserError(f"parallel.tensor = {degree} does not divide {name} = {size}")


def _check_lengths(recipe: Recipe, store: Store) -> None:
    lengths, limit = store.lengths, recipe.data.row_length
    if len(lengths) == 0:
        raise UserError(f"store {store.folder} is empty: {store.quarantined} records set aside")
    too_long = np.flatnonzero(lengths > limit)
    if len(too_long) and recipe.data.too_long == "error":
        raise UserError(
            f"{len(too_long)} of {len(lengths)} samples of store {store.folder} are longer than "
            f"data.row_length = {limit}, the first is sample {too_long[0]} with "
            f"{lengths[too_long[0]]} tokens; --set data.too_long=drop or truncate, or a longer row"
        )
    if len(too_long) == len(lengths) and recipe.data.too_long == "drop":
        raise UserError(
            f"every sample of store {store.folder} is longer than data.row_length = {limit}"
        )


def _check_lost(recipe: Recipe, store: Store) -> list[str]:
    """In words, what rows of this length lose of the store, if they do.

    Raises:
        UserError: no kept token is left.
    """
    if store.kept_count == 0:
        raise UserError(f"store {store.folder} has no kept token: there is nothing to learn")
    length, too_long = recipe.data.row_length, recipe.data.too_long
    lost = lost_to_rows(store, row_length=length, too_long=too_long)
    if lost.samples == 0:
        return []
    told = (
        f"{lost.samples:,} of {len(store):,} samples are longer than a row of {length:,} and are "
        f"{'dropped' if too_long == 'drop' else 'truncated'}: {lost.tokens:,} of "
        f"{store.token_count:,} tokens are lost, {lost.kept:,} of {store.kept_count:,} kept ones"
    )
    if lost.kept == store.kept_count:
        raise UserError(
            f"store {store.folder} has nothing left to learn: {told}; --set data.row_length to "
            f"that of a longer row"
        )
    return [told]


def check_tokenizer(job: Job) -> None:
    """Compare the tokenizers of start weights and store, which takes seconds.

    A model folder without a tokenizer passes: its vocabulary was compared already.

    Raises:
        UserError: they differ.
    """
    model, store = job.model, job.store
    wanted = store.meta.get("tokenizer")
    if model is None or wanted is None:
        return
    found = tokenizer_fingerprint_of(model)
    if found is not None and wanted != found:
        raise UserError(
            f"store {store.folder} was made with another tokenizer "
            f"({store.meta.get('tokenizer_name', 'unknown')}) than that of model {model}; "
            f"tokenize with the model's"
        )
