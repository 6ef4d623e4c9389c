"""A server that follows a script: drops, delays, errors, halves of replies."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import web

Step = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Script:
    """A server that answers its requests with one step each, and the last step from then on.

    Attributes:
        arrivals: when each request came, in the event loop's seconds.
    """

    def __init__(self, *steps: Step) -> None:
        self.steps, self.bodies, self.headers = list(steps), list[Any](), list[Any]()
        self.arrivals = list[float]()
        self.in_flight = self.most_in_flight = 0
        self.port = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.arrivals.append(asyncio.get_running_loop().time())
        self.bodies.append(await request.json())
        self.headers.append(request.headers)
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await step(request)
        finally:
            self.in_flight -= 1

    @property
    def connections(self) -> int:
        assert self.runner.server is not None
        return len(self.runner.server.connections)

    async def __aenter__(self) -> str:
        app = web.Application()
        app.router.add_post("/v1/{path:.*}", self.answer)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self.runner.setup()
        # The port of last time: who comes back has its old address.
        await web.TCPSite(self.runner, "127.0.0.1", self.port, reuse_address=True).start()
        self.port = self.runner.addresses[0][1]
        return f"http://127.0.0.1:{self.port}/v1"

    async def __aexit__(self, *_: object) -> None:
        await self.runner.cleanup()


def reply(n: int = 1, text: str = "2") -> dict[str, Any]:
    choice = {"message": {"content": text}, "text": text, "finish_reason": "stop"}
    usage = {"prompt_tokens": 5, "completion_tokens": 3 * n}
    return {"choices": [dict(choice) for _ in range(n)], "usage": usage}


async def good(request: web.Request) -> web.StreamResponse:
    return web.json_response(reply((await request.json())["n"]))


async def drop(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.close()
    return web.Response()


async def half_json(request: web.Request) -> web.StreamResponse:
    return web.Response(body=json.dumps(reply())[:30].encode(), content_type="application/json")


async def no_choices(request: web.Request) -> web.StreamResponse:
    return web.json_response({"choices": []})


async def cut_body(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b'{"choices": [')
    assert request.transport is not None
    request.transport.close()
    return response


def status(number: int, message: str = "busy", *, code: str = "", **headers: str) -> Step:
    async def step(request: web.Request) -> web.StreamResponse:
        error = {"message": message, "code": code}
        return web.json_response({"error": error}, status=number, headers=headers)

    return step


def at_random(shares: Mapping[Step, float], seed: int = 0) -> Step:
    """A step that is one of these in so many of all cases, and good in the others."""
    draw = random.Random(seed)

    async def step(request: web.Request) -> web.StreamResponse:
        left = draw.random()
        for each, share in shares.items():
            if (left := left - share) < 0:
                return await each(request)
        return await good(request)

    return step


def slow(seconds: float) -> Step:
    async def step(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(seconds)
        return await good(request)

    return step
