"""Runners of training: random start weights, a run, an export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hermes_pipeline.config import LARGEST_SEED
from hermes_pipeline.errors import UserError
from hermes_pipeline.exits import say
from hermes_pipeline.services.folders import as_size, check_room
from hermes_pipeline.training import run_folder
from hermes_pipeline.training.job import check_tokenizer, prepare
from hermes_pipeline.training.launch import launch
from hermes_pipeline.training.recipes import Model, load_recipe
from hermes_pipeline.training.shape import (
    Shape,
    hugging_face_config,
    read_json,
    read_shape,
    recipe_shape,
)
from hermes_pipeline.training.weights import (
    copy_tokenizer,
    generation_config,
    stored_dtype,
    write_json,
    write_random,
    written_whole,
)

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of a weight
VOCAB_MULTIPLE = 64  # so that tensor parallelism and vLLM can divide it


def init(
    recipe: str, *, tokenizer: str, out: Path, seed: int = 0, settings: Sequence[str] = ()
) -> None:
    """Write a model folder of the recipe's shape with random weights, the same for the same seed.

    Args:
        tokenizer: a folder, a file or a name; its vocabulary, rounded up, is the model's where
            the recipe gives none.
        seed: from 0 to `LARGEST_SEED`.
    """
    if not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"seed is {seed}, outside [0, {LARGEST_SEED}]")
    from hermes_pipeline.services.hub import load_tokenizer, tokenizer_fingerprint

    model = load_recipe(recipe, settings).model
    loaded = load_tokenizer(tokenizer)
    shape = _shape_for(model, loaded, tokenizer)
    token_ids = {
        name: getattr(loaded, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    ends = [] if token_ids["eos_token_id"] is None else [token_ids["eos_token_id"]]
    std = model.embedding_std or 0.02
    marker = {
        "made_by": "hermes4 init",
        "recipe": recipe,
        **{f"model.{key}": value for key, value in asdict(shape).items()},
        "model.embedding_std": std,
        "tokenizer": tokenizer_fingerprint(loaded)[:16],
        "seed": seed,
    }
    with written_whole(out, marker=marker) as folder:
        size = BYTES["float32"] * shape.parameters()
        check_room(out, size)
        say(f"init: a model of {shape.parameters():,} parameters, {as_size(size)} in float32")
        write_json(
            folder / "config.json",
            hugging_face_config(shape, dtype="float32", token_ids=token_ids),
        )
        write_json(folder / "generation_config.json", generation_config(token_ids, ends))
        loaded.save_pretrained(folder)
        write_random(folder, shape, embedding_std=std, seed=seed)
    say(f"init: wrote {_what_is(out, shape)}")


def _shape_for(model: Model, tokenizer: Any, name: str) -> Shape:
    """The recipe's shape, with room for every token of the tokenizer."""
    needed = _vocabulary(tokenizer)
    shape = recipe_shape(model, -(-needed // VOCAB_MULTIPLE) * VOCAB_MULTIPLE)
    if shape.vocab_size < needed:
        raise UserError(
            f"the recipe's model.vocab_size = {shape.vocab_size}, but tokenizer {name} has "
            f"{needed} tokens"
        )
    return shape


def _vocabulary(tokenizer: Any) -> int:
    """How many token ids the tokenizer can give."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))


def run(
    recipe: str,
    *,
    store: Path | None = None,
    model: str | Path | None = None,
    out: Path | None = None,
    processes: int = 1,
    settings: Sequence[str] = (),
) -> int:
    """Train, or go on where the run folder left off; the exit code of `training.run`.

    Everything that can be checked is checked here, before a process is started.
    """
    job = prepare(
        recipe,
        store=store,
        model=None if model is None else str(model),
        out=out,
        settings=settings,
        processes=processes,
    )
    if job.complete:
        say(f"train: {job.completion()}")
        return 0
    say("train: loading ...")
    check_tokenizer(job)
    options = [("recipe", recipe), ("store", store), ("model", model), ("out", out)]
    options += [("set", setting) for setting in settings]
    # In one word each, for a value may begin with a hyphen.
    arguments = [f"--{name}={value}" for name, value in options if value is not None]
    return launch(arguments, processes)


def export(run: Path, out: Path, *, step: int | None = None, dtype: str | None = None) -> None:
    """Write a checkpoint of a run as a Hugging Face folder, whole or not at all.

    Args:
        step: of the checkpoint; the last one if None.
        dtype: float32, bfloat16 or float16; that of the start weights if None.
    """
    record = run_folder.read_record(run)
    if record is None:
        raise UserError(f"{run} is no run folder: it holds no run.json")
    steps = run_folder.checkpoint_steps(run)
    if not steps or (step is not None and step not in steps):
        wanted = "a checkpoint" if step is None else f"a whole checkpoint of step {step}"
        there = ", ".join(map(str, steps)) or "none"
        raise UserError(f"run {run} has not {wanted}; steps with one: {there}")
    chosen = steps[-1] if step is None else step
    files = run_folder.model_files(run, record)
    shape = read_shape(files)
    dtype = dtype or stored_dtype(files)
    if dtype not in BYTES:
        raise UserError(
            f"dtype is {dtype!r}, not float32, bfloat16 or float16; choose one by --dtype"
        )
    from hermes_pipeline.training.titan.export import export_weights

    source = {"run": str(run.resolve()), "dtype": dtype, "step": chosen}
    marker = {"made_by": "hermes4 export"} | source
    with written_whole(out, marker=marker, may_differ=("step",)) as folder:
        check_room(out, BYTES[dtype] * shape.parameters())
        export_weights(run / "checkpoint" / f"step-{chosen}", folder, shape, dtype=dtype)
        config = read_json(files / "config.json") | {"dtype": dtype}
        if "torch_dtype" in config:
            config["torch_dtype"] = dtype
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", read_json(files / "generation_config.json"))
        copy_tokenizer(files, folder)
    say(f"export: step {chosen} of {run} in {_what_is(out, shape)}, {dtype}")


def _what_is(out: Path, shape: Shape) -> str:
    """A model folder in words."""
    size = sum(path.stat().st_size for path in out.iterdir())
    return f"{out}: {shape.parameters():,} parameters, {as_size(size)}"
