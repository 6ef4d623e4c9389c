"""The command `hermes4`: one subcommand for each step, in the order of the flow.

Every command imports what it needs when it runs, so that `--help` is instant.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hermes_pipeline.errors import UserError
from hermes_pipeline.exits import (
    EXIT_CODES,
    INTERRUPTED,
    MISTAKEN,
    STOPPED,
    hearing_signals,
    open_closed_streams,
    say,
    unread,
)

UsageError: Any = typer.BadParameter.__base__  # its home has moved from click into typer

app = typer.Typer(
    name="hermes4",
    help="From conversations to a trained, served and scored model.",
    epilog=EXIT_CODES,
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

# A model, and its answers. What is not given is the recipe's, or the default that is shown.
Endpoints = Annotated[
    list[str] | None,
    typer.Option(
        "--endpoint",
        help="An OpenAI-compatible endpoint, such as http://host/v1; several for a cluster. "
        "OPENAI_API_KEY holds its key.",
    ),
]
ModelName = Annotated[str | None, typer.Option("--model", help="Name of the model at --endpoint.")]
Checkpoint = Annotated[
    str | None, typer.Option(help="Model folder to serve with vLLM, instead of --endpoint.")
]
MaxModelLen = Annotated[
    int | None, typer.Option(min=1, help="Context length of a --checkpoint; its own if not given.")
]
Temperature = Annotated[float | None, typer.Option(min=0, show_default="0.6")]
TopP = Annotated[float | None, typer.Option(min=0, max=1, show_default="0.95")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Of one answer.")]
Concurrency = Annotated[
    int | None, typer.Option(min=1, help="Requests in flight.", show_default="64")
]
TimeoutS = Annotated[
    float | None, typer.Option(min=0.001, help="Seconds for one try.", show_default="600")
]
OnRay = Annotated[
    str | None, typer.Option(help="Work on a Ray cluster: auto, host:port or ray://host:port.")
]
Seed = Annotated[int | None, typer.Option(show_default="0")]
OwnRecipe = Annotated[
    str | None,
    typer.Option("--recipe", help="A .toml file with these settings, and finer ones."),
]

# Serving.
Host = Annotated[str, typer.Option(help="Where to listen; 0.0.0.0: for other machines, too.")]

# Training.
Recipe = Annotated[str, typer.Option(help="A recipe of the project, or a .toml file.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="One setting over the recipe's, as section.key=value."),
]


@app.command()
def complete(
    data: Annotated[
        str | None,
        typer.Option(
            help="Conversations: a .jsonl, .jsonl.gz, .json or .parquet file, a folder of them, or "
            "the name of a Hugging Face data set."
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Folder of the answers, such as runs/first/answers.")
    ] = None,
    endpoint: Endpoints = None,
    model: ModelName = None,
    checkpoint: Checkpoint = None,
    max_model_len: MaxModelLen = None,
    n: Annotated[
        int | None,
        typer.Option("--n", min=1, help="Answers to each conversation.", show_default="4"),
    ] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: MaxTokens = None,
    system: Annotated[
        str | None, typer.Option(help="System message of conversations that have none.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read only so many records.")] = None,
    seed: Seed = None,
    concurrency: Concurrency = None,
    timeout_s: TimeoutS = None,
    requests_per_s: Annotated[float | None, typer.Option(help="At most so many requests.")] = None,
    tokens_per_s: Annotated[
        float | None, typer.Option(help="At most so many tokens, of prompts and answers.")
    ] = None,
    pilot: Annotated[
        int | None,
        typer.Option(
            min=2, help="Draw only so many answers, at random, and say what all will cost."
        ),
    ] = None,
    prompt_price: Annotated[
        float | None, typer.Option(min=0, help="Money for a million tokens of prompts.")
    ] = None,
    completion_price: Annotated[
        float | None, typer.Option(min=0, help="Money for a million tokens of answers.")
    ] = None,
    max_cost: Annotated[
        float | None, typer.Option(min=0, help="Stop once the answers have cost so much.")
    ] = None,
    ray: OnRay = None,
    recipe: OwnRecipe = None,
    set_: Settings = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Progress and counts as lines of JSON.")
    ] = False,
    revision: Revision = None,
    split: Annotated[
        str | None, typer.Option(help="Split of the data set.", show_default="train")
    ] = None,
    subset: Subset = None,
) -> None:
    """Draw n answers to each conversation; resumes where the folder left off."""
    from hermes_pipeline.config import load
    from hermes_pipeline.sampling.recipe import Recipe
    from hermes_pipeline.stages.complete import run

    over = {
        "data.name": data,
        "data.revision": revision,
        "data.split": split,
        "data.subset": subset,
        "data.limit": limit,
        "data.system": system,
        "model.endpoint": endpoint or None,
        "model.name": model,
        "model.checkpoint": checkpoint,
        "model.max_model_len": max_model_len,
        "sampling.temperature": temperature,
        "sampling.top_p": top_p,
        "sampling.max_tokens": max_tokens,
        "requests.concurrency": concurrency,
        "requests.timeout_s": timeout_s,
        "requests.requests_per_s": requests_per_s,
        "requests.tokens_per_s": tokens_per_s,
        "prices.prompt": prompt_price,
        "prices.completion": completion_price,
        "prices.max_cost": max_cost,
        "ray.address": ray,
        "run.out": out,
        "run.draws": n,
        "run.seed": seed,
    }
    run(load(Recipe, recipe, set_ or [], over), pilot=pilot, as_json=as_json)


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
    host: Host = "127.0.0.1",
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Context length to serve; the model's if None.")
    ] = None,
    log: Annotated[
        Path | None, typer.Option(help="vLLM's output; MODEL.server.log here if None.")
    ] = None,
    join: Annotated[
        str | None,
        typer.Option(help="Address of a `hermes4 route`, to be one of its workers."),
    ] = None,
    advertise: Annotated[
        str | None,
        typer.Option(help="Address by which the router calls us, where it is not found out."),
    ] = None,
) -> None:
    """Serve a model with vLLM behind an OpenAI-compatible endpoint until interrupted.

    VLLM_API_KEY makes it ask for a key. With --join it may be killed at any time, and rejoin.
    """
    from hermes_pipeline.stages.serve import serve as run

    run(
        model,
        host=host,
        port=port,
        max_model_len=max_model_len,
        log=log,
        join=join,
        advertise=advertise,
    )


@app.command()
def route(
    workers: Annotated[
        list[str] | None,
        typer.Argument(help="Servers that do not --join, such as http://host:8000."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0: any free port.")] = 8000,
    host: Host = "127.0.0.1",
    log: Annotated[
        Path | None, typer.Option(help="vllm-router's output; router.log here if None.")
    ] = None,
) -> None:
    """Put one endpoint before many workers, which come and go.

    `hermes4 serve --join` makes one. Whoever reaches the port can add and remove workers: keep it
    inside the cluster.
    """
    from hermes_pipeline.stages.serve import route as run

    run(workers or [], host=host, port=port, log=log)


@app.command()
def evaluate(
    benchmark: Annotated[str | None, typer.Option(help="Name of a benchmark.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder for the scores and every answer.")] = None,
    endpoint: Endpoints = None,
    model: ModelName = None,
    checkpoint: Checkpoint = None,
    max_model_len: MaxModelLen = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many items.")] = None,
    draws: Annotated[
        int | None, typer.Option(min=1, help="Answers to each item; the benchmark's if None.")
    ] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    concurrency: Concurrency = None,
    timeout_s: TimeoutS = None,
    ray: OnRay = None,
    recipe: OwnRecipe = None,
    set_: Settings = None,
) -> None:
    """Score a model on a benchmark through one endpoint; every answer is logged."""
    from hermes_pipeline.config import load
    from hermes_pipeline.evaluation.recipe import Recipe
    from hermes_pipeline.stages.evaluate import run

    over = {
        "benchmark.name": benchmark,
        "benchmark.limit": limit,
        "benchmark.draws": draws,
        "model.endpoint": endpoint or None,
        "model.name": model,
        "model.checkpoint": checkpoint,
        "model.max_model_len": max_model_len,
        "sampling.temperature": temperature,
        "sampling.top_p": top_p,
        "sampling.max_tokens": max_tokens,
        "requests.concurrency": concurrency,
        "requests.timeout_s": timeout_s,
        "ray.address": ray,
        "run.out": out,
        "run.seed": seed,
    }
    run(load(Recipe, recipe, set_ or [], over))


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
    """Run `hermes4`; ends the process with one of `EXIT_CODES`."""
    open_closed_streams()
    with hearing_signals() as is_told_to_stop:
        code = _run()
    if code == INTERRUPTED:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # another one changes nothing any more
        code = STOPPED if is_told_to_stop() else INTERRUPTED
    raise SystemExit(code)


def _run() -> Any:
    """Run the command; a user's mistake is one line on standard error. The exit code."""
    try:
        code = app(prog_name="hermes4", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:  # typer keeps Ctrl-C to itself
            raise KeyboardInterrupt
    except SystemExit as end:
        # Typer makes 1 of a broken pipe.
        return unread() if isinstance(end.__context__, BrokenPipeError) else end.code
    except UsageError as error:
        # Without any argument the help has been printed, and nothing is left to say.
        if message := error.format_message():
            command = error.ctx.command_path if error.ctx else "hermes4"
            say(f"hermes4: error: {message.rstrip('.')} (see {command} --help)")
        return MISTAKEN
    except BrokenPipeError:
        return unread()
    except (UserError, OSError) as error:  # files and disks, too, are the user's
        if os.environ.get("HERMES4_TRACEBACK"):
            raise
        say(f"hermes4: error: {error}")
        return MISTAKEN
    except KeyboardInterrupt:
        say("hermes4: interrupted")
        return INTERRUPTED
    return 0
