"""Commands that serve: `serve`, `route`, `sandbox`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hermes_pipeline.cli.options import (
    Host,
)


def serve(
    model: Annotated[Path, typer.Argument(help="Model folder in Hugging Face form.")],
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0: any free port.")] = 8000,
    host: Host = "127.0.0.1",
    max_model_len: Annotated[
        int | None,
        typer.Option(min=1, help="Context length to serve; the model's own if not given."),
    ] = None,
    ready_s: Annotated[
        float, typer.Option(min=1, help="Seconds to wait for the server's first answer.")
    ] = 600.0,
    log: Annotated[
        Path | None, typer.Option(help="vLLM's output; MODEL.server.log here if not given.")
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
        ready_s=ready_s,
        log=log,
        join=join,
        advertise=advertise,
    )


def route(
    workers: Annotated[
        list[str] | None,
        typer.Argument(help="Servers that do not --join, such as http://host:8000."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0: any free port.")] = 8000,
    host: Host = "127.0.0.1",
    log: Annotated[
        Path | None, typer.Option(help="vllm-router's output; router.log here if not given.")
    ] = None,
) -> None:
    """Put one endpoint before many workers, which come and go.

    `hermes4 serve --join` makes one. Whoever reaches the port can add and remove workers: keep it
    inside the cluster.
    """
    from hermes_pipeline.stages.serve import route as run

    run(workers or [], host=host, port=port, log=log)


def sandbox(
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0: any free port.")] = 8090,
    host: Annotated[
        str, typer.Option(help="Others than 127.0.0.1 need HERMES4_SANDBOX_TOKEN to be set.")
    ] = "127.0.0.1",
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=4_096, help="Jobs at a time; one for each core if not given."),
    ] = None,
    box: Annotated[
        str,
        typer.Option(
            help="bubblewrap, docker, podman, docker:IMAGE, podman:IMAGE, or http://HOST:PORT "
            "of another `hermes4 sandbox`."
        ),
    ] = "bubblewrap",
) -> None:
    """Run model-written code for other machines, in boxes here, until interrupted."""
    from hermes_pipeline.stages.sandbox import run

    run(host=host, port=port, workers=workers, box=box)
