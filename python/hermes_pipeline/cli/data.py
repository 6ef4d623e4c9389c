"""Commands from conversations to rows: `show`, `tokenize`, `pack`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from hermes_pipeline.cli.options import (
    Data,
    Limit,
    Revision,
    Split,
    Subset,
    Template,
    Tokenizer,
    TokenizerRevision,
)


def show(
    data: Data,
    tokenizer: Tokenizer,
    index: Annotated[int, typer.Option(min=0, help="First conversation to print, from 0.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="How many conversations.")] = 1,
    template: Template = None,
    tokenizer_revision: TokenizerRevision = None,
    revision: Revision = None,
    split: Split = "train",
    subset: Subset = None,
) -> None:
    """Print conversations with their kept tokens coloured."""
    from hermes_pipeline.services.hub import DataSource
    from hermes_pipeline.stages.show import run

    source = DataSource(data, revision=revision, split=split, subset=subset)
    run(
        source,
        tokenizer,
        tokenizer_revision=tokenizer_revision,
        template=template,
        index=index,
        count=count,
    )


def tokenize(
    data: Data,
    tokenizer: Tokenizer,
    out: Annotated[Path, typer.Option(help="Folder of the token store.")],
    template: Template = None,
    workers: Annotated[
        int,
        typer.Option(
            min=1, max=4_096, help="Processes; one for each core if not given.", show_default=False
        ),
    ] = os.cpu_count() or 1,
    max_chars: Annotated[
        int, typer.Option(min=1, help="Longer conversations go to quarantine.")
    ] = 4_000_000,
    limit: Limit = None,
    tokenizer_revision: TokenizerRevision = None,
    revision: Revision = None,
    split: Split = "train",
    subset: Subset = None,
) -> None:
    """Turn conversations into a token store: token ids and loss mask."""
    from hermes_pipeline.services.hub import DataSource
    from hermes_pipeline.stages.tokenize import run

    source = DataSource(data, revision=revision, split=split, subset=subset)
    run(
        source,
        tokenizer,
        out,
        tokenizer_revision=tokenizer_revision,
        template=template,
        workers=workers,
        max_chars=max_chars,
        limit=limit,
    )


def pack(
    store: Annotated[Path, typer.Argument(help="A token store.")],
    row_length: Annotated[int, typer.Option(min=2, help="Tokens in a row.")] = 16_384,
    strategy: Annotated[
        str,
        typer.Option(
            help="best, guided (slower, fuller), exact_gap, windowed (nearly keeps the data's "
            "order), best_fit_decreasing or first_fit_decreasing."
        ),
    ] = "best",
    too_long: Annotated[
        str, typer.Option(help="Samples longer than a row: error, drop or truncate.")
    ] = "error",
    seed: Annotated[int, typer.Option(help="Random seed of the row order.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the plan here (.npz).")] = None,
    ranks: Annotated[
        int | None,
        typer.Option(min=1, help="Also print what this many data-parallel ranks lose by waiting."),
    ] = None,
    micro_batches: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --ranks: rows that each rank takes in a step, one after another; 1 if not "
            "given.",
        ),
    ] = None,
    base: Annotated[
        str,
        typer.Option(
            help="With --ranks: the model by whose FLOPs rows are weighed: qwen3_14b, llama3.1_70b "
            "or llama3.1_405b."
        ),
    ] = "qwen3_14b",
) -> None:
    """Plan the rows of one epoch; print rows, fill, lower bound and histogram."""
    from hermes_pipeline.stages.pack import run

    run(
        store,
        row_length=row_length,
        strategy=strategy,
        too_long=too_long,
        seed=seed,
        out=out,
        ranks=ranks,
        micro_batches=micro_batches,
        base=base,
    )
