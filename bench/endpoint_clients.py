"""Ways to ask a server for an answer: ours with everything switched on, and what others use."""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from hermes_pipeline.records import Message
from hermes_pipeline.services.endpoint import Endpoint, Sampling

PROMPT = "Explain once more, and in other words. " * 26  # 1 kB
MESSAGES = [{"role": "user", "content": PROMPT}]
BODY: dict[str, Any] = {
    "model": "tiny",
    "messages": MESSAGES,
    "n": 1,
    "temperature": 0.6,
    "top_p": 0.95,
}
MANY = 100_000  # connections: None means 100 to one of the transports
PLENTY = 1e12  # a limit that is kept but never reached

Call = Callable[[], Awaitable[str]]


@dataclass(frozen=True, slots=True)
class Client:
    """``open`` gives, for an address and a number of requests in flight, what makes one call."""

    name: str
    modules: tuple[str, ...]  # to be imported first
    open: Callable[[str, int], AbstractAsyncContextManager[Call]]
    calls: int  # of one run at least, by its speed


@asynccontextmanager
async def ours(url: str, in_flight: int) -> AsyncIterator[Call]:
    messages, sampling = (Message("user", PROMPT),), Sampling()
    async with Endpoint(
        url,
        "tiny",
        concurrency=in_flight,
        run_timeout_s=3600,
        requests_per_s=PLENTY,
        tokens_per_s=PLENTY,
    ) as endpoint:

        async def call() -> str:
            return (await endpoint.chat(messages, sampling))[0].text

        yield call


@asynccontextmanager
async def bare_aiohttp(url: str, in_flight: int) -> AsyncIterator[Call]:
    aiohttp, orjson = importlib.import_module("aiohttp"), importlib.import_module("orjson")
    address = f"{url}/chat/completions"
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), headers=headers
    ) as session:

        async def call() -> str:
            async with session.post(address, data=orjson.dumps(BODY)) as reply:
                answer = orjson.loads(await reply.read())
            return str(answer["choices"][0]["message"]["content"])

        yield call


@asynccontextmanager
async def httpx(url: str, in_flight: int) -> AsyncIterator[Call]:
    module = importlib.import_module("httpx")
    limits = module.Limits(max_connections=None, max_keepalive_connections=None)
    async with module.AsyncClient(limits=limits, timeout=600) as client:

        async def call() -> str:
            answer = (await client.post(f"{url}/chat/completions", json=BODY)).json()
            return str(answer["choices"][0]["message"]["content"])

        yield call


def openai(http_client: str) -> Callable[[str, int], AbstractAsyncContextManager[Call]]:
    """The client as it comes, over one of its transports, but for the limit of connections."""

    @asynccontextmanager
    async def opened(url: str, in_flight: int) -> AsyncIterator[Call]:
        module = importlib.import_module("openai")
        limits = importlib.import_module("httpx2").Limits(
            max_connections=MANY, max_keepalive_connections=MANY
        )
        http = getattr(module, http_client)(limits=limits)
        async with module.AsyncOpenAI(base_url=url, api_key="none", http_client=http) as client:

            async def call() -> str:
                answer = await client.chat.completions.create(**BODY)
                return str(answer.choices[0].message.content)

            yield call

    return opened


OURS = Client("Endpoint", (), ours, 8192)
BARE = Client("aiohttp + orjson, bare", ("aiohttp", "orjson"), bare_aiohttp, 8192)
OPENAI = Client("openai async", ("openai",), openai("DefaultAsyncHttpxClient"), 1024)
PEERS = (
    BARE,
    OPENAI,
    Client("openai async on aiohttp", ("openai",), openai("DefaultAioHttpClient"), 2048),
    Client("httpx, bare", ("httpx",), httpx, 1024),
)
