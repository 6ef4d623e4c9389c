"""An asynchronous client for any OpenAI-compatible server: bounded, retried, counted."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import orjson

from hermes_pipeline.errors import UserError
from hermes_pipeline.records import Message

RETRIED = frozenset({408, 409, 425, 429})  # and every 5xx
HOPELESS = frozenset({401, 403, 404})  # no other request would fare better
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 30.0
MAX_RETRY_AFTER_S = 120.0


class EndpointError(Exception):
    """A request failed for good.

    Attributes:
        status: HTTP status of the last reply; None when there was none.
        hopeless: the address, the key or the model's name is wrong, so every request would fail.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.hopeless = status in HOPELESS


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer of a model."""

    text: str
    finish_reason: str  # "stop", "length", ...
    completion_tokens: int | None  # None when several answers share one count


@dataclass(slots=True)
class Usage:
    """What an endpoint has cost so far."""

    requests: int = 0  # answered ones
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a model draws its answers; None leaves the choice to the server."""

    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)  # sent as it stands


class Endpoint:
    """One model at one address, for the time of an `async with` block.

    Args:
        base_url: up to and with `/v1`.
        model: the name the server knows it by.
        concurrency: requests in flight at most; the others wait their turn.
        timeout_s: time limit of one try.
        tries: how often a request is sent before it has failed for good.

    The key is read from OPENAI_API_KEY and appears in no message.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        concurrency: int = 64,
        timeout_s: float = 600.0,
        tries: int = 6,
    ) -> None:
        if urlsplit(base_url).scheme not in ("http", "https"):
            raise UserError(f"base URL {base_url!r} wants the form http://host:port/v1")
        self.base_url, self.model = base_url.rstrip("/"), model
        self.usage = Usage()
        self._shown_url = _without_login(self.base_url)
        self._key = os.environ.get("OPENAI_API_KEY", "")
        self._tries = tries
        self._turn = asyncio.Semaphore(concurrency)
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(30.0, timeout_s))
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Endpoint:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._session = aiohttp.ClientSession(
            headers=headers | {"Content-Type": "application/json"},
            connector=aiohttp.TCPConnector(limit=0),
            timeout=self._timeout,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._session is not None
        await self._session.close()
        self._session = None

    async def chat(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        *,
        n: int = 1,
        seed: int | None = None,
    ) -> list[Reply]:
        """``n`` answers to a conversation.

        Raises:
            EndpointError: the request was refused, or failed `tries` times.
        """
        body = {"messages": [_wire_message(m) for m in messages]}
        return await self._ask("/chat/completions", body, sampling, n, seed)

    async def complete(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling,
        *,
        n: int = 1,
        seed: int | None = None,
    ) -> list[Reply]:
        """``n`` continuations of a text or of token ids; raises as `chat` does."""
        body = {"prompt": prompt if isinstance(prompt, str) else list(prompt)}
        return await self._ask("/completions", body, sampling, n, seed)

    async def _ask(
        self, path: str, body: dict[str, Any], sampling: Sampling, n: int, seed: int | None
    ) -> list[Reply]:
        body |= {"model": self.model, "n": n}
        body |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.max_tokens is not None:
            body["max_tokens"] = sampling.max_tokens
        if seed is not None:
            body["seed"] = seed
        try:
            data = orjson.dumps(body | dict(sampling.extra))
        except TypeError as error:  # half of a surrogate pair, for one
            raise EndpointError(f"the request cannot be written as JSON: {error}") from None
        reply = await self._post(path, data)
        usage = reply.get("usage") or {}
        self.usage.requests += 1
        self.usage.prompt_tokens += usage.get("prompt_tokens") or 0
        self.usage.completion_tokens += usage.get("completion_tokens") or 0
        tokens = usage.get("completion_tokens") if n == 1 else None
        return [Reply(c["text"], c["finish_reason"], tokens) for c in reply["choices"]]

    async def _post(self, path: str, data: bytes) -> dict[str, Any]:
        """The body of the first whole reply; tries again what may fare better."""
        assert self._session is not None, "use the endpoint inside `async with`"
        async with self._turn:
            for attempt in range(self._tries):
                pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt) * random.uniform(0.5, 1)
                status = None
                try:
                    async with self._session.post(self.base_url + path, data=data) as reply:
                        status, content = reply.status, await reply.read()
                        if status == 200:
                            return _whole(content)
                        problem = f"{status}: {_message(content)}"
                        if status not in RETRIED and status < 500:
                            raise EndpointError(self._clean(problem), status)
                        pause = _retry_after(reply.headers.get("Retry-After")) or pause
                except aiohttp.InvalidURL as error:
                    raise UserError(f"base URL {self._shown_url!r} is none: {error}") from None
                except (aiohttp.ClientError, TimeoutError, OSError) as error:
                    problem = f"{type(error).__name__}: {error}" if str(error) else "timed out"
                if attempt + 1 < self._tries:
                    self.usage.retries += 1
                    await asyncio.sleep(pause)
        problem = f"failed {self._tries} times; the last time {problem}"
        raise EndpointError(self._clean(problem), status)

    def _clean(self, problem: str) -> str:
        """The problem with its address, and without the key should the server have echoed it."""
        problem = problem.replace(self.base_url, self._shown_url)
        text = f"{self._shown_url} (model {self.model}): {problem}"
        return text.replace(self._key, "***") if self._key else text


def _whole(content: bytes) -> dict[str, Any]:
    """The reply as JSON; an error that is tried again when it was cut or is something else."""
    try:
        reply = orjson.loads(content)
        for choice in reply["choices"]:
            choice["finish_reason"] = choice.get("finish_reason") or "unknown"
            if "text" not in choice:
                choice["text"] = _text(choice["message"])
        if reply["choices"]:
            return dict(reply)
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise aiohttp.ClientPayloadError(f"a reply that is not whole: {content[:100]!r}")


def _text(message: Mapping[str, Any]) -> str:
    """All a model wrote, also where a server has put its thinking apart."""
    content = message.get("content") or ""
    thinking = message.get("reasoning_content") or message.get("reasoning")
    if not thinking:
        return str(content)
    return f"<think>{thinking}" + (f"</think>{content}" if content else "")


def _message(content: bytes) -> str:
    """What a server says about an error, in the forms servers say it."""
    try:
        reply = orjson.loads(content)
        error = reply.get("error", reply)
        said = error.get("message") or error.get("detail") if isinstance(error, dict) else error
        return str(said or reply)[:500]
    except (ValueError, AttributeError):
        return content[:500].decode(errors="replace").strip() or "no message"


def _retry_after(value: str | None) -> float | None:
    """The seconds a server asks to wait; None when it names a date or nothing."""
    try:
        return min(MAX_RETRY_AFTER_S, max(0.0, float(value or "")))
    except ValueError:
        return None


def _wire_message(message: Message) -> dict[str, Any]:
    wire: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        wire["tool_calls"] = [dict(call) for call in message.tool_calls]
    if message.name is not None:
        wire["name"] = message.name
    if message.tool_call_id is not None:
        wire["tool_call_id"] = message.tool_call_id
    return wire


def _without_login(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
