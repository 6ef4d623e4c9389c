"""The command `hermes4`: one subcommand for each step, in the order of the flow.

Every command imports what it needs when it runs, so that `--help` is instant.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hermes_pipeline.errors import UserError

INTERRUPTED = 130
UsageError: Any = typer.BadParameter.__base__  # its home has moved from click into typer

app = typer.Typer(
    name="hermes4",
    help="From conversations to a trained, served and scored model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        from hermes_core import __version__

        typer.echo(f"hermes4 {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """From conversations to a trained, served and scored model."""


# Data in.
Data = Annotated[
    str,
    typer.Option(
        help="A .jsonl, .jsonl.gz, .json or .parquet file, a folder of them, or the name of a "
        "Hugging Face data set."
    ),
]
Revision = Annotated[str | None, typer.Option(help="Revision of the data set; name one.")]
Split = Annotated[str, typer.Option(help="Split of the data set.")]
Subset = Annotated[str | None, typer.Option(help="Configuration of the data set.")]
Tokenizer = Annotated[
    str, typer.Option(help="A folder, a tokenizer.json(.gz), or the name of a Hugging Face model.")
]
TokenizerRevision = Annotated[str | None, typer.Option(help="Revision of the tokenizer.")]
Template = Annotated[
    str | None,
    typer.Option(
        help="Chat template: hermes_chatml, hermes_llama3, or a .jinja file. "
        "The tokenizer's own if not given."
    ),
]

# A model's answers.
Temperature = Annotated[float, typer.Option(min=0)]
TopP = Annotated[float, typer.Option(min=0, max=1)]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Of one answer.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests in flight.")]

# Training.
Recipe = Annotated[str, typer.Option(help="A recipe of the project, or a .toml file.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="One setting over the recipe's, as section.key=value."),
]


@app.command()
def complete(
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder of the answers, such as runs/first/answers.")],
    endpoint: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible endpoint, such as http://host/v1.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model at --endpoint.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Model folder to serve with vLLM, instead of --endpoint.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Answers to each conversation.")] = 4,
    concurrency: Concurrency = 64,
    temperature: Temperature = 0.6,
    top_p: TopP = 0.95,
    max_tokens: MaxTokens = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Context length of a --checkpoint.")
    ] = None,
    timeout_s: Annotated[float, typer.Option(min=0.001, help="Seconds for one try.")] = 600.0,
    system: Annotated[
        str | None, typer.Option(help="System message of conversations that have none.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read only so many records.")] = None,
    seed: int = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Progress and counts as lines of JSON.")
    ] = False,
    revision: Revision = None,
    split: Split = "train",
    subset: Subset = None,
) -> None:
    """Draw n answers to each conversation; resumes where the folder left off."""
    from hermes_pipeline.services.endpoint import Sampling
    from hermes_pipeline.services.hub import DataSource
    from hermes_pipeline.stages.complete import Where, run

    run(
        DataSource(data, revision=revision, split=split, subset=subset),
        out,
        Where(
            endpoint=endpoint,
            model=model,
            checkpoint=checkpoint,
            max_model_len=max_model_len,
            concurrency=concurrency,
            timeout_s=timeout_s,
        ),
        Sampling(temperature, top_p, max_tokens),
        draws=n,
        seed=seed,
        system=system,
        limit=limit,
        as_json=as_json,
    )


@app.command()
def show(
    data: Data,
    tokenizer: Tokenizer,
    index: Annotated[int, typer.Option(min=0, help="Which conversation, from 0.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 1,
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


@app.command()
def tokenize(
    data: Data,
    tokenizer: Tokenizer,
    out: Annotated[Path, typer.Option(help="Folder of the token store.")],
    template: Template = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 1,
    max_chars: Annotated[
        int, typer.Option(min=1, help="Longer conversations go to quarantine.")
    ] = 4_000_000,
    limit: Annotated[int | None, typer.Option(min=1, help="Read only so many records.")] = None,
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


@app.command()
def pack(
    store: Annotated[Path, typer.Argument(help="A token store.")],
    row_length: Annotated[int, typer.Option(min=2, help="Tokens in a row.")] = 16_384,
    strategy: Annotated[
        str,
        typer.Option(
            help="best, guided (slower, fuller), exact_gap, windowed (keeps the order nearly), "
            "best_fit_decreasing or first_fit_decreasing."
        ),
    ] = "best",
    too_long: Annotated[
        str, typer.Option(help="Samples longer than a row: error, drop or truncate.")
    ] = "error",
    seed: Annotated[int, typer.Option(help="Order of the rows.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the plan here (.npz).")] = None,
    ranks: Annotated[
        int | None,
        typer.Option(min=1, help="Say what so many data-parallel ranks lose by waiting."),
    ] = None,
    micro_batches: Annotated[int, typer.Option(min=1, help="Of a step, one row a rank.")] = 1,
    base: Annotated[
        str, typer.Option(help="Whose FLOPs count: qwen3_14b, llama3.1_70b or llama3.1_405b.")
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


@app.command()
def init(
    recipe: Recipe,
    tokenizer: Tokenizer,
    out: Annotated[Path, typer.Option(help="Folder for the Hugging Face model.")],
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same bytes.")] = 0,
    set_: Settings = None,
) -> None:
    """Write a model folder of the recipe's shape with random weights."""
    from hermes_pipeline.stages.train import init as run

    run(recipe, tokenizer=tokenizer, out=out, seed=seed, settings=set_ or [])


@app.command()
def train(
    recipe: Recipe,
    store: Annotated[Path | None, typer.Option(help="Token store; over the recipe's.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Start weights in Hugging Face form; over the recipe's.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; over the recipe's.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    set_: Settings = None,
) -> None:
    """Train on packed rows; resumes where the run folder left off."""
    from hermes_pipeline.stages.train import run

    raise SystemExit(
        run(recipe, store=store, model=model, out=out, processes=processes, settings=set_ or [])
    )


@app.command()
def export(
    folder: Annotated[
        Path, typer.Argument(help="Folder of `hermes4 train`, or of `hermes4 complete`.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the model; file or folder for answers, theirs if None."),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option("--format", help="Of answers: jsonl (if None), parquet or datasets."),
    ] = None,
    licence: Annotated[
        str | None, typer.Option(help="Of answers, for the card of --format datasets.")
    ] = None,
    step: Annotated[int | None, typer.Option(help="Checkpoint step; the last if None.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; that of the start weights if None."),
    ] = None,
) -> None:
    """Write a checkpoint as a Hugging Face model, or answers as a file or a data set."""
    from hermes_pipeline.stages.export import run

    run(folder, out, form=form, licence=licence, step=step, dtype=dtype)


@app.command()
def serve(
    model: Annotated[Path, typer.Argument(help="Model folder in Hugging Face form.")],
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0: any free port.")] = 8000,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Context length to serve; the model's if None.")
    ] = None,
    log: Annotated[
        Path | None, typer.Option(help="vLLM's output; MODEL.server.log here if None.")
    ] = None,
) -> None:
    """Serve a model with vLLM behind an OpenAI-compatible endpoint until interrupted."""
    from hermes_pipeline.stages.evaluate import serve as run

    run(model, port=port, max_model_len=max_model_len, log=log)


@app.command()
def sandbox(
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0: any free port.")] = 8090,
    host: Annotated[
        str, typer.Option(help="Others than 127.0.0.1 need HERMES4_SANDBOX_TOKEN to be set.")
    ] = "127.0.0.1",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Jobs at a time; one for each core if None.")
    ] = None,
    box: Annotated[
        str, typer.Option(help="bubblewrap, docker, podman, docker:IMAGE or podman:IMAGE.")
    ] = "bubblewrap",
) -> None:
    """Run model-written code for other machines, in boxes here, until interrupted."""
    from hermes_pipeline.stages.sandbox import run

    run(host=host, port=port, workers=workers, box=box)


@app.command()
def evaluate(
    benchmark: Annotated[str, typer.Option(help="Name of a benchmark.")],
    out: Annotated[Path, typer.Option(help="Folder for the scores and every answer.")],
    model: Annotated[
        str, typer.Option(help="Model folder to serve with vLLM, or a name at --base-url.")
    ],
    base_url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible endpoint, such as http://host/v1.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many items.")] = None,
    draws: Annotated[
        int | None, typer.Option(min=1, help="Answers for each item; the benchmark's if None.")
    ] = None,
    temperature: Temperature = 0.6,
    top_p: TopP = 0.95,
    max_tokens: MaxTokens = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Context length, where the model is served by us.")
    ] = None,
    concurrency: Concurrency = 64,
    seed: int = 0,
) -> None:
    """Score a model on a benchmark through one endpoint; every answer is logged."""
    from hermes_pipeline.stages.evaluate import run

    run(
        benchmark,
        out,
        model,
        base_url=base_url,
        limit=limit,
        draws=draws,
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        max_model_len=max_model_len,
        concurrency=concurrency,
        seed=seed,
    )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path(
        "runs/demo"
    ),
    seed: int = 0,
) -> None:
    """Run the whole job on a tiny model: data, packing, training, serving, scores, report."""
    from hermes_pipeline.stages.demo import run

    run(out, seed=seed)


def main() -> None:
    """Run `hermes4`; a user's mistake is one line on standard error and exit code 2."""
    try:
        code = app(prog_name="hermes4", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:  # typer keeps Ctrl-C to itself
            raise KeyboardInterrupt
    except UsageError as error:
        # Without any argument the help has been printed, and nothing is left to say.
        if message := error.format_message():
            command = error.ctx.command_path if error.ctx else "hermes4"
            sys.stderr.write(f"hermes4: error: {message.rstrip('.')} (see {command} --help)\n")
        raise SystemExit(2) from None
    except BrokenPipeError:  # the reader has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (UserError, OSError) as error:  # files and disks, too, are the user's
        if os.environ.get("HERMES4_TRACEBACK"):
            raise
        sys.stderr.write(f"hermes4: error: {error}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.stderr.write("hermes4: interrupted\n")
        raise SystemExit(INTERRUPTED) from None
