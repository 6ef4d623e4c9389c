"""Commands that ask a model: `complete`, `evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

from hermes_pipeline.cli.options import (
    ANSWERS,
    COST,
    NEEDED,
    REQUESTS,
    AsJson,
    Checkpoint,
    Concurrency,
    Endpoints,
    Limit,
    MaxModelLen,
    MaxTokens,
    ModelName,
    OnRay,
    Revision,
    Seed,
    Settings,
    Subset,
    Temperature,
    TimeoutS,
    TopP,
    default,
    name_model,
)


def complete(
    data: Annotated[
        str | None,
        typer.Option(
            help="Conversations: a .jsonl, .jsonl.gz, .json or .parquet file, a folder of them, or "
            f"the name of a Hugging Face data set. {NEEDED}"
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(help=f"Folder of the answers, such as runs/first/answers. {NEEDED}"),
    ] = None,
    limit: Limit = None,
    revision: Revision = None,
    split: Annotated[
        str | None, typer.Option(help=f"Split of the data set. {default('train')}")
    ] = None,
    subset: Subset = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="answers, which has every setting with its default, or a .toml file like it."
        ),
    ] = None,
    set_: Settings = None,
    as_json: AsJson = False,
    endpoint: Endpoints = None,
    model: ModelName = None,
    checkpoint: Checkpoint = None,
    max_model_len: MaxModelLen = None,
    n: Annotated[
        int | None,
        typer.Option(
            "--n",
            min=1,
            help=f"Answers to each conversation. {default(4)}",
            rich_help_panel=ANSWERS,
        ),
    ] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: MaxTokens = None,
    system: Annotated[
        str | None,
        typer.Option(
            help="System message of conversations that have none.", rich_help_panel=ANSWERS
        ),
    ] = None,
    seed: Seed = None,
    concurrency: Concurrency = None,
    timeout_s: TimeoutS = None,
    requests_per_s: Annotated[
        float | None,
        typer.Option(help="Send at most this many requests a second.", rich_help_panel=REQUESTS),
    ] = None,
    tokens_per_s: Annotated[
        float | None,
        typer.Option(
            help="Send and draw at most this many tokens a second.",
            rich_help_panel=REQUESTS,
        ),
    ] = None,
    pilot: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Draw only this many answers, at random, and estimate the cost of all of them.",
            rich_help_panel=COST,
        ),
    ] = None,
    prompt_price: Annotated[
        float | None,
        typer.Option(min=0, help="Money for a million tokens of prompts.", rich_help_panel=COST),
    ] = None,
    completion_price: Annotated[
        float | None,
        typer.Option(min=0, help="Money for a million tokens of answers.", rich_help_panel=COST),
    ] = None,
    max_cost: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Stop once the answers have cost this much; failed tries are not counted.",
            rich_help_panel=COST,
        ),
    ] = None,
    ray: OnRay = None,
) -> None:
    """Draw n answers to each conversation; resumes where the folder left off."""
    from hermes_pipeline.config import check_command, load
    from hermes_pipeline.sampling.recipe import Recipe
    from hermes_pipeline.stages.complete import run

    check_command(recipe, "complete")
    over = {
        "data.name": data,
        "data.revision": revision,
        "data.split": split,
        "data.subset": subset,
        "data.limit": limit,
        "data.system": system,
        **name_model(endpoint, model, checkpoint, max_model_len),
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


def evaluate(
    benchmark: Annotated[str | None, typer.Option(help=f"Which benchmark: chain. {NEEDED}")] = None,
    out: Annotated[
        str | None, typer.Option(help=f"Folder for the scores and every answer. {NEEDED}")
    ] = None,
    endpoint: Endpoints = None,
    model: ModelName = None,
    checkpoint: Checkpoint = None,
    max_model_len: MaxModelLen = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use at most this many items.")] = None,
    draws: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Answers to each item; the benchmark's own number if not given.",
            rich_help_panel=ANSWERS,
        ),
    ] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    concurrency: Concurrency = None,
    timeout_s: TimeoutS = None,
    ray: OnRay = None,
    recipe: Annotated[
        str | None, typer.Option(help="A .toml file with these settings, and finer ones.")
    ] = None,
    set_: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Score a model on a benchmark through one endpoint; every answer is logged."""
    from hermes_pipeline.config import check_command, load
    from hermes_pipeline.evaluation.recipe import Recipe
    from hermes_pipeline.stages.evaluate import run

    check_command(recipe, "evaluate")
    over = {
        "benchmark.name": benchmark,
        "benchmark.limit": limit,
        "benchmark.draws": draws,
        **name_model(endpoint, model, checkpoint, max_model_len),
        "sampling.temperature": temperature,
        "sampling.top_p": top_p,
        "sampling.max_tokens": max_tokens,
        "requests.concurrency": concurrency,
        "requests.timeout_s": timeout_s,
        "ray.address": ray,
        "run.out": out,
        "run.seed": seed,
    }
    run(load(Recipe, recipe, set_ or [], over), as_json=as_json)
