"""vLLM's API server as far as `hermes4 serve` and a router see it: each answer says who gave it.

`put(folder)` makes a folder that, in PYTHONPATH, stands before the real vLLM.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from pathlib import Path

from aiohttp import web

ANSWER_S = 0.05


def put(folder: Path) -> Path:
    """Write the package `vllm`, of this one program, and a model folder for it."""
    package = folder / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for path in (package, *package.parents[:2]):
        (path / "__init__.py").touch()
    (package / "api_server.py").write_text("from scripted_vllm import main\n\nmain()\n")
    model = folder / "tiny"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return model


async def answer(request: web.Request) -> web.Response:
    """The id of this process, after a while."""
    await request.read()
    await asyncio.sleep(ANSWER_S)
    text = str(os.getpid())
    choice = {"message": {"content": text}, "text": text, "finish_reason": "stop"}
    usage = {"prompt_tokens": 5, "completion_tokens": 1}
    return web.json_response({"choices": [choice], "usage": usage})


async def health(request: web.Request) -> web.Response:
    return web.Response()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    options, _ = parser.parse_known_args()
    app = web.Application()
    app.router.add_get("/health", health)
    app.router.add_post("/v1/{path:.*}", answer)
    web.run_app(app, host=options.host, port=options.port, print=None, shutdown_timeout=0.1)
