"""Options that several commands take."""

from __future__ import annotations

from typing import Annotated, Any

import typer

# Panels of a long help text.
MODEL, ANSWERS, REQUESTS, COST = "Model", "Answers", "Requests", "Cost"

NEEDED = r"\[required, here or in the recipe]"
LARGEST_SEED = 2**31 - 1  # that of `config`, which help need not wait for
FLAG = ""  # what stands for the value of an option that has none


def default(value: object) -> str:
    """A default that is the recipe's to change, as help texts show others."""
    return rf"\[default: {value}]"


# Data in.
Data = Annotated[
    str,
    typer.Option(
        help="A .jsonl, .jsonl.gz, .json or .parquet file, a folder of them, or the name of a "
        "Hugging Face data set."
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a data set on the Hub; the newest if not given."),
]
Split = Annotated[str, typer.Option(help="Split of the data set.")]
Subset = Annotated[str | None, typer.Option(help="Configuration of the data set.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Read at most this many records.")]
Tokenizer = Annotated[
    str, typer.Option(help="A folder, a tokenizer.json(.gz), or the name of a Hugging Face model.")
]
TokenizerRevision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a tokenizer on the Hub; the newest if not given."),
]
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
        "OPENAI_API_KEY holds its key. Give this with --model, or --checkpoint.",
        rich_help_panel=MODEL,
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option("--model", help="Name of the model at --endpoint.", rich_help_panel=MODEL),
]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        help="Model folder to serve with vLLM, instead of --endpoint.", rich_help_panel=MODEL
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        min=1, help="Context length of a --checkpoint; its own if not given.", rich_help_panel=MODEL
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        min=0,
        help=f"How freely tokens are drawn; 0: always the likeliest. {default(0.6)}",
        rich_help_panel=ANSWERS,
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help=f"Draw among the likeliest tokens that have this share together. {default(0.95)}",
        rich_help_panel=ANSWERS,
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Most tokens of one answer; the server's limit if not given.",
        rich_help_panel=ANSWERS,
    ),
]
Concurrency = Annotated[
    int | None,
    typer.Option(min=1, help=f"Requests at the same time. {default(64)}", rich_help_panel=REQUESTS),
]
TimeoutS = Annotated[
    float | None,
    typer.Option(
        min=0.001,
        help=f"Seconds for one try of a request. {default(600)}",
        rich_help_panel=REQUESTS,
    ),
]
OnRay = Annotated[
    str | None,
    typer.Option(
        help="Work on a Ray cluster: auto, host:port or ray://host:port.", rich_help_panel=REQUESTS
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        help=f"Random seed of the answers. {default(0)}",
        rich_help_panel=ANSWERS,
    ),
]

AsJson = Annotated[
    bool,
    typer.Option("--json", help="Progress and results as lines of JSON.", metavar=FLAG),
]

# Serving.
Host = Annotated[str, typer.Option(help="Where to listen; 0.0.0.0: for other machines, too.")]

# Training.
Recipe = Annotated[
    str,
    typer.Option(
        help="tiny, finetune, hermes4_14b, hermes4_70b, hermes4_405b, or a .toml file like them."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="One setting over the recipe's, as section.key=value; may be repeated."
    ),
]


def name_model(
    endpoint: list[str] | None, model: str | None, checkpoint: str | None, max_model_len: int | None
) -> dict[str, Any]:
    """The options that name a model, over a recipe; one way of naming it ends the other."""
    from hermes_pipeline.config import UNSET

    given = {
        "model.endpoint": endpoint or None,
        "model.name": model,
        "model.checkpoint": checkpoint,
        "model.max_model_len": max_model_len,
    }
    if checkpoint is not None and not endpoint:
        given["model.endpoint"] = UNSET
        given["model.name"] = UNSET if model is None else model
    if endpoint and checkpoint is None:
        given["model.checkpoint"] = UNSET
        given["model.max_model_len"] = UNSET if max_model_len is None else max_model_len
    return given
