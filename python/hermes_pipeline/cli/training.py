"""Commands of training: `init`, `train`, `export`, `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hermes_pipeline.cli.options import (
    LARGEST_SEED,
    NEEDED,
    Recipe,
    Settings,
    Tokenizer,
)


def init(
    recipe: Annotated[
        str,
        typer.Option(
            help="tiny, hermes4_14b, hermes4_70b, hermes4_405b, or a .toml file like them."
        ),
    ],
    tokenizer: Tokenizer,
    out: Annotated[Path, typer.Option(help="Folder for the Hugging Face model.")],
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=LARGEST_SEED, help="Random seed; the same seed gives the same bytes."
        ),
    ] = 0,
    set_: Settings = None,
) -> None:
    """Write a model folder of the recipe's shape with random weights."""
    from hermes_pipeline.stages.train import init as run

    run(recipe, tokenizer=tokenizer, out=out, seed=seed, settings=set_ or [])


def train(
    recipe: Recipe,
    store: Annotated[
        Path | None, typer.Option(help=f"Token store; a resumed run remembers its own. {NEEDED}")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help=f"Start weights in Hugging Face form; a resumed run remembers its own. {NEEDED}"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help=f"Run folder. {NEEDED}")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    set_: Settings = None,
) -> None:
    """Train on packed rows; resumes where the run folder left off."""
    from hermes_pipeline.stages.train import run

    raise SystemExit(
        run(recipe, store=store, model=model, out=out, processes=processes, settings=set_ or [])
    )


def export(
    folder: Annotated[
        Path, typer.Argument(help="Folder of `hermes4 train`, or of `hermes4 complete`.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the model; file or folder for answers, beside them if not given."
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format", help="Form of answers: jsonl, parquet or datasets; jsonl if not given."
        ),
    ] = None,
    licence: Annotated[
        str | None, typer.Option(help="Licence of answers, for the card of --format datasets.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="Step of the checkpoint; the last if not given.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; that of the start weights if not given."),
    ] = None,
) -> None:
    """Write a checkpoint as a Hugging Face model, or answers as a file or a data set."""
    from hermes_pipeline.stages.export import run

    run(folder, out, form=form, licence=licence, step=step, dtype=dtype)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=LARGEST_SEED,
            help="Random seed of the data, the weights and the order of rows.",
        ),
    ] = 0,
) -> None:
    """Run the whole job on a tiny model: data, packing, training, serving, scores, report."""
    from hermes_pipeline.stages.demo import run

    run(out, seed=seed)
