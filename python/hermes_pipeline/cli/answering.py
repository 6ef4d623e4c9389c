"""Commands that ask a model: `complete`, `evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

from hermes_pipeline.cli.options import (
    ANSWERS,
    COST,
    REQUESTS,
    AsJson,
    Checkpoint,
    Concurrency,
    Endpoints,
    MaxModelLen,
    MaxTokens,
    ModelName,
    OnRay,
    OwnRecipe,
    Revision,
    Seed,
    Settings,
    Subset,
    Temperature,
    TimeoutS,
    TopP,
    name_model,
)


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
    limit: Annotated[int | None, typer.Option(min=1, help="Read only so many records.")] = None,
    revision: Revision = None,
    split: Annotated[
        str | None, typer.Option(help="Split of the data set.", show_default="train")
    ] = None,
    subset: Subset = None,
    recipe: OwnRecipe = None,
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
            help="Answers to each conversation.",
            show_default="4",
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
        float | None, typer.Option(help="At most so many requests.", rich_help_panel=REQUESTS)
    ] = None,
    tokens_per_s: Annotated[
        float | None,
        typer.Option(
            help="At most so many tokens, of prompts and answers.", rich_help_panel=REQUESTS
        ),
    ] = None,
    pilot: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Draw only so many answers, at random, and say what all will cost.",
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
            help="Stop once the answers have cost so much; tries that failed are not counted.",
            rich_help_panel=COST,
        ),
    ] = None,
    ray: OnRay = None,
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
    benchmark: Annotated[str | None, typer.Option(help="Name of a benchmark.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder for the scores and every answer.")] = None,
    endpoint: Endpoints = None,
    model: ModelName = None,
    checkpoint: Checkpoint = None,
    max_model_len: MaxModelLen = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many items.")] = None,
    draws: Annotated[
        int | None,
        typer.Option(
            min=1, help="Answers to each item; the benchmark's if None.", rich_help_panel=ANSWERS
        ),
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
    as_json: AsJson = False,
) -> None:
    """Score a model on a benchmark through one endpoint; every answer is logged."""
    from hermes_pipeline.config import load
    from hermes_pipeline.evaluation.recipe import Recipe
    from hermes_pipeline.stages.evaluate import run

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
