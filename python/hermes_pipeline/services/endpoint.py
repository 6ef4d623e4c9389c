"""An asynchronous client for any OpenAI-compatible server: bounded, limited, retried, counted."""

from __future__ import annotations

import asyncio
import gc
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import aiohttp
import orjson

from hermes_pipeline.errors import UserError
from hermes_pipeline.records import Message
from hermes_pipeline.services.account import Usage
from hermes_pipeline.services.faults import (
    HOPELESS,
    HOPELESS_CODES,
    RETRIED,
    UNTAKEN,
    EndpointError,
    Fault,
)
from hermes_pipeline.services.limits import (
    RESETS,
    Address,
    Bucket,
    TooLate,
    allow_files,
    asked_pause_s,
    backoff_s,
    choose,
    read_address,
    read_key,
    sleep,
    wait,
)
from hermes_pipeline.services.wire import (
    CHAT,
    COMPLETIONS,
    Answer,
    BrokenReply,
    Reply,
    Sampling,
    chat_body,
    completion_body,
    read_answer,
    read_refusal,
)

__all__ = ["Endpoint", "EndpointError", "Reply", "Sampling", "Usage"]

OUTAGE_S = 300.0  # a server that has answered is waited for so long, from its last answer on
OUTAGE_PAUSE_S = 5.0  # at most, while nobody is there
CONNECT_S = 30.0
KEEP_ALIVE_S = 4.0  # uvicorn closes after 5: a request must not meet that
SPARE_FILES = 128
OBJECTS_A_CALL = 64  # new ones between two looks of the garbage collector
CHARACTERS_A_TOKEN = 4  # until a first answer tells
SHOWN = 500  # characters of what went wrong


class Endpoint:
    """One model at one address or several, for the time of an `async with` block.

    Requests are spread over the addresses by what each has in flight. One that fails is set aside
    for a while and tried again with a single request, and what failed there goes elsewhere; one
    that asks for a pause gets no request before it is over. 429 uses up no try: a request may be
    put off for `request_timeout_s`. Nor does an outage of a server that has answered before, for
    `OUTAGE_S`, nor an address that would refuse any request, while there are others.

    Args:
        base_url: up to and with `/v1`; several for a cluster.
        model: the name the server knows it by.
        concurrency: requests in flight at most; the others wait their turn.
        timeout_s: time limit of one try.
        tries: how often a request is sent before it has failed for good.
        request_timeout_s: time limit of a request with all tries and pauses, from its turn on.
        run_timeout_s: time limit of the block; requests after it fail, and are `hopeless`.
        requests_per_s: tries in any second, over all addresses.
        tokens_per_s: tokens of prompts and answers; an answer's length is assumed to be the mean
            so far, and put right when it is there.
        tell: takes a line about each address that would refuse any request, once.

    Raises:
        UserError: an address, the key or a number cannot be used.

    The key is read from OPENAI_API_KEY and appears in no message.
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        model: str,
        *,
        concurrency: int = 64,
        timeout_s: float = 600.0,
        tries: int = 6,
        request_timeout_s: float = 3600.0,
        run_timeout_s: float = math.inf,
        requests_per_s: float | None = None,
        tokens_per_s: float | None = None,
        tell: Callable[[str], object] | None = None,
    ) -> None:
        if concurrency < 1 or tries < 1:
            raise UserError(f"concurrency is {concurrency} and tries {tries}; each wants 1 or more")
        urls = [base_url] if isinstance(base_url, str) else base_url
        self.model = model
        self.usage = Usage()
        self._key = read_key("OPENAI_API_KEY")
        self._addresses = [read_address(url, self._key) for url in urls or [""]]
        self._concurrency, self._tries = concurrency, tries
        self._request_timeout_s, self._run_timeout_s = request_timeout_s, run_timeout_s
        self._requests = None if requests_per_s is None else Bucket(requests_per_s)
        self._tokens = None if tokens_per_s is None else Bucket(tokens_per_s)
        self._turn = asyncio.Semaphore(concurrency)
        self._timeout_s, self._tell = timeout_s, tell
        self._told_of = set[Address]()
        self._session: aiohttp.ClientSession | None = None
        self._run_ends = math.inf
        self._answered_at = -math.inf

    async def __aenter__(self) -> Endpoint:
        allow_files(self._concurrency + SPARE_FILES)
        self._collector = gc.get_threshold()
        if self._collector[0]:
            # Calls in flight are no garbage, and by default all of them are looked at every few
            # hundred calls: half of the CPU time with thousands in flight.
            often = max(self._collector[0], OBJECTS_A_CALL * self._concurrency)
            gc.set_threshold(often, *self._collector[1:])
        self._run_ends = asyncio.get_running_loop().time() + self._run_timeout_s
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._session = aiohttp.ClientSession(
            headers=headers | {"Content-Type": "application/json"},
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            # A try has a timer of its own; one of aiohttp's would cost as much again.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        session, self._session = self._session, None
        assert session is not None
        gc.set_threshold(*self._collector)
        await session.close()

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
            EndpointError: the request was refused, failed `tries` times, or took too long.
        """
        return await self._ask(CHAT, chat_body(messages, sampling), n, seed)

    async def complete(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling,
        *,
        n: int = 1,
        seed: int | None = None,
    ) -> list[Reply]:
        """``n`` continuations of a text or of token ids; raises as `chat` does."""
        return await self._ask(COMPLETIONS, completion_body(prompt, sampling), n, seed)

    async def _ask(self, path: str, body: dict[str, Any], n: int, seed: int | None) -> list[Reply]:
        body = {"model": self.model, "n": n} | body
        if seed is not None:
            body["seed"] = seed
        async with self._turn:
            self.usage.in_flight += 1
            try:
                answer = await self._answer(path, body, n)
            except asyncio.CancelledError:
                self.usage.cancelled += 1
                raise
            except BaseException:
                self.usage.failed += 1
                raise
            finally:
                self.usage.in_flight -= 1
            self.usage.add(answer.prompt_tokens, answer.completion_tokens)
        return answer.replies

    async def _answer(self, path: str, body: dict[str, Any], n: int) -> Answer:
        """The first whole answer; tries again what may fare better."""
        try:
            # A copy: what orjson gives keeps the 16 kB it was written into.
            data = bytes(memoryview(orjson.dumps(body)))
        except TypeError as error:  # half of a surrogate pair, for one
            raise EndpointError(f"the request cannot be written as JSON: {error}") from None
        cost = 0.0 if self._tokens is None else self._expected_tokens(data, body, n)
        address, answer = await self._try(path, data, cost)
        if self._tokens is not None and answer.tokens:
            self._tokens.charge(answer.tokens - cost)
        if len(answer.replies) != n:
            problem = f"{len(answer.replies)} answers where n={n} were asked for"
            raise self._failure(address, Fault(problem, 200, is_final=True), 1)
        return answer

    async def _try(self, path: str, data: bytes, cost: float) -> tuple[Address, Answer]:
        """Who gave the first whole answer, and that."""
        began = asyncio.get_running_loop().time()
        deadline = min(began + self._request_timeout_s, self._run_ends)
        address, fault = self._addresses[0], Fault("none has ended")
        failed = list[Address]()  # where, each time
        tries, gone_since = 0, math.inf
        try:
            while True:
                address = await self._take_turn(cost, deadline, failed)
                answer = await self._send(address, path, data, deadline)
                if isinstance(answer, Answer):
                    return address, answer.after(len(failed))
                fault = answer
                if fault.is_throttled and self._tokens is not None:
                    self._tokens.charge(-cost)  # nothing was computed for it
                now = asyncio.get_running_loop().time()
                gone_since = min(gone_since, now) if fault.is_gone else math.inf
                is_out = fault.is_gone and self._is_out(gone_since, now)
                is_news = fault.is_wrong and address not in failed
                tries += not (fault.is_throttled or is_out or is_news)
                if fault.is_final or tries == self._tries:
                    raise self._failure(address, fault, tries)
                failed.append(address)
                self.usage.retries += 1
                if not fault.pause_asked:
                    longest = OUTAGE_PAUSE_S if fault.is_gone else math.inf
                    await sleep(min(longest, backoff_s(len(failed) - 1)), deadline)
        except TooLate:
            raise self._late(address, fault, began, deadline) from None

    def _is_out(self, since: float, now: float) -> bool:
        """Has nobody been answered since then, but not long before?"""
        return self._answered_at < since and now < self._answered_at + OUTAGE_S

    async def _take_turn(
        self, tokens: float, deadline: float, failed: Sequence[Address]
    ) -> Address:
        """Where to send now, once no pause and no rate stands against it."""
        loop = asyncio.get_running_loop()
        while True:
            await self._sit_out_pause(deadline)
            for bucket, amount in ((self._requests, 1.0), (self._tokens, tokens)):
                if bucket is not None and not bucket.takes_now(amount):
                    await wait(bucket.take(amount), deadline)
            now = loop.time()
            if now >= deadline:
                raise TooLate
            address = choose(self._addresses, now, failed)
            if address.paused_until <= now:
                return address
            if self._tokens is not None:  # a pause came up meanwhile
                self._tokens.charge(-tokens)

    async def _sit_out_pause(self, deadline: float) -> None:
        """Wait until there is an address that has asked for no pause."""
        loop = asyncio.get_running_loop()
        while (pause := min(a.paused_until for a in self._addresses) - loop.time()) > 0:
            # All wait for the same moment: not one goes before, and not all at once.
            await sleep(pause * random.uniform(1, 1.1), deadline)

    async def _send(
        self, address: Address, path: str, data: bytes, deadline: float
    ) -> Answer | Fault:
        """One try."""
        if self._session is None:
            problem = "the endpoint is used outside its `async with` block"
            raise EndpointError(problem, hopeless=True)
        loop = asyncio.get_running_loop()
        try_ends = loop.time() + self._timeout_s
        address.in_flight += 1
        try:
            async with (
                asyncio.timeout_at(min(try_ends, deadline)),
                self._session.post(address.url + path, data=data, allow_redirects=False) as reply,
            ):
                content = await reply.read()
            if reply.status == 200:
                answer = read_answer(content)
                address.answered()
                self._answered_at = loop.time()
                return answer
        except (aiohttp.InvalidURL, UnicodeError):  # no port, no name of a host
            raise UserError(f"base URL {address.shown!r} is not valid") from None
        except (aiohttp.ClientError, BrokenReply, TimeoutError, OSError) as error:
            now = loop.time()
            if now >= deadline:
                raise TooLate from None
            address.set_aside(now)
            problem = f"{type(error).__name__}: {error}" if str(error) else "timed out"
            nobody = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
            return Fault(problem, is_gone=isinstance(error, nobody))
        finally:
            address.in_flight -= 1
        return self._refusal(address, reply, content)

    def _refusal(self, address: Address, reply: aiohttp.ClientResponse, content: bytes) -> Fault:
        """What an error's status and headers mean, for the request and for the address."""
        said, code = read_refusal(content)
        if 300 <= reply.status < 400:
            said = f"moved to {reply.headers.get('Location')}; give that address"
        problem, now = f"{reply.status}: {said}", asyncio.get_running_loop().time()
        if code in HOPELESS_CODES or reply.status in HOPELESS or reply.status < 400:
            return self._wrong(address, Fault(problem, reply.status, is_wrong=True), now)
        if not (reply.status in RETRIED or reply.status >= 500):
            address.answered()
            return Fault(problem, reply.status, is_final=True)
        headers = reply.headers.copy()
        if reply.status != 429:  # when a quota will be full again is told in any reply
            for name in RESETS:
                headers.popall(name, None)
        pause = asked_pause_s(headers, time.time())
        if pause:
            address.pause(now + pause)
        if not pause or reply.status != 429:  # one that asks for patience is well
            address.set_aside(now)
        is_gone = reply.status in UNTAKEN
        return Fault(problem, reply.status, is_gone=is_gone, pause_asked=bool(pause))

    def _wrong(self, address: Address, fault: Fault, now: float) -> Fault:
        """Leave out an address that would refuse any request; final once all of them would."""
        address.is_wrong = True
        address.set_aside(now)
        if all(each.is_wrong for each in self._addresses):
            return replace(fault, is_final=True)
        if self._tell is not None and address not in self._told_of:
            self._told_of.add(address)
            self._tell(f"{self._clean(address, fault.problem)}; others are asked instead")
        return fault

    def _expected_tokens(self, data: bytes, body: Mapping[str, Any], n: int) -> float:
        if self.usage.tokens:
            return self.usage.tokens / self.usage.requests
        return len(data) / CHARACTERS_A_TOKEN + n * (body.get("max_tokens") or 0)

    def _failure(self, address: Address, fault: Fault, tries: int) -> EndpointError:
        problem = fault.problem
        if not fault.is_final:
            problem = f"failed {tries} times; the last time {problem}"
        message = self._clean(address, problem)
        is_hopeless = fault.is_wrong and fault.is_final
        return EndpointError(message, fault.status, hopeless=is_hopeless)

    def _late(self, address: Address, fault: Fault, began: float, deadline: float) -> EndpointError:
        """The failure of a request whose time is up.

        Hopeless when the run's is, and when a server that asks for patience answered nobody.
        """
        run_over = deadline == self._run_ends
        limit = (
            f"the run's {self._run_timeout_s:g} s"
            if run_over
            else f"the request's {self._request_timeout_s:g} s"
        )
        problem = f"{limit} leave no time for another try; the last: {fault.problem}"
        message = self._clean(address, problem)
        is_hopeless = run_over or (fault.is_throttled and self._answered_at < began)
        return EndpointError(message, fault.status, hopeless=is_hopeless)

    def _clean(self, address: Address, problem: str) -> str:
        """The problem with its address, and without what is secret."""
        return f"{address.shown} (model {self.model}): {address.clean(problem)[:SHOWN]}"
