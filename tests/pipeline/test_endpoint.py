"""The client against a server that follows a script: drops, delays, errors, halves of replies."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from aiohttp import web

from hermes_pipeline.errors import UserError
from hermes_pipeline.records import Message
from hermes_pipeline.services import limits
from hermes_pipeline.services.endpoint import Endpoint, EndpointError, Sampling
from scripted import Script, Step, cut_body, drop, good, half_json, no_choices, slow, status

ASK = (Message("user", "1+1?"),)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FIRST_PAUSE_S", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def chat(script: Script, *, n: int = 1, seed: int | None = None, **options: Any) -> Any:
    """The texts of one request, and the endpoint that made it."""

    async def ask() -> Any:
        async with script as url, Endpoint(url, "tiny", **options) as endpoint:
            replies = await endpoint.chat(ASK, Sampling(), n=n, seed=seed)
            return [r.text for r in replies], endpoint

    return asyncio.run(asyncio.wait_for(ask(), 20))


@pytest.mark.parametrize(
    "fault",
    [drop, half_json, no_choices, cut_body, status(500), status(503), status(429), status(408)],
    ids=["drop", "half json", "no choices", "cut body", "500", "503", "429", "408"],
)
def test_a_passing_fault_is_tried_again(fault: Step) -> None:
    texts, endpoint = chat(Script(fault, fault, good))
    assert texts == ["2"]
    assert endpoint.usage.retries == 2


def test_a_lasting_fault_names_itself_and_the_tries() -> None:
    with pytest.raises(EndpointError, match=r"failed 3 times; the last time 500: broken pipe") as e:
        chat(Script(status(500, "broken pipe")), tries=3)
    assert not e.value.hopeless


@pytest.mark.parametrize("code", [401, 403, 404])
def test_a_hopeless_request_fails_at_once_with_the_servers_words(code: int) -> None:
    script = Script(status(code, "no model of that name"))
    with pytest.raises(EndpointError, match="no model of that name") as error:
        chat(script)
    assert error.value.hopeless
    assert len(script.bodies) == 1


def test_a_refused_request_fails_at_once_but_others_may_fare_better() -> None:
    script = Script(status(400, "prompt too long"))
    with pytest.raises(EndpointError, match="400: prompt too long") as error:
        chat(script)
    assert not error.value.hopeless
    assert len(script.bodies) == 1


def test_retry_after_is_honoured() -> None:
    start = time.monotonic()
    chat(Script(status(429, **{"Retry-After": "1"}), good))
    assert time.monotonic() - start >= 1


def test_a_late_reply_is_tried_again() -> None:
    texts, endpoint = chat(Script(slow(30), good), timeout_s=1)
    assert texts == ["2"]
    assert endpoint.usage.retries == 1


def test_nobody_listening_is_an_endpoint_error() -> None:
    async def ask() -> None:
        async with Endpoint("http://127.0.0.1:9/v1", "tiny", tries=2) as endpoint:
            await endpoint.chat(ASK, Sampling())

    with pytest.raises(EndpointError, match="failed 2 times"):
        asyncio.run(asyncio.wait_for(ask(), 20))


def test_requests_in_flight_are_bounded() -> None:
    script = Script(slow(0.02))

    async def ask() -> None:
        async with script as url, Endpoint(url, "tiny", concurrency=3) as endpoint:
            await asyncio.gather(*(endpoint.chat(ASK, Sampling()) for _ in range(20)))

    asyncio.run(asyncio.wait_for(ask(), 20))
    assert script.most_in_flight == 3


def test_the_request_carries_seed_sampling_and_draws() -> None:
    script = Script(good)
    texts, _ = chat(script, n=3, seed=7)
    assert texts == ["2", "2", "2"]
    body = script.bodies[0]
    assert body["messages"] == [{"role": "user", "content": "1+1?"}]
    assert {k: body[k] for k in ("model", "n", "seed", "temperature", "top_p")} == {
        "model": "tiny",
        "n": 3,
        "seed": 7,
        "temperature": 0.6,
        "top_p": 0.95,
    }
    assert "max_tokens" not in body


def test_usage_is_counted() -> None:
    _, endpoint = chat(Script(good), n=2)
    assert endpoint.usage.requests == 1
    assert endpoint.usage.prompt_tokens == 5
    assert endpoint.usage.completion_tokens == 6


def test_thinking_that_a_server_puts_apart_comes_back_in_its_tags() -> None:
    async def apart(request: web.Request) -> web.StreamResponse:
        message = {"content": "\n2", "reasoning_content": "one and one\n"}
        return web.json_response({"choices": [{"message": message}]})

    texts, _ = chat(Script(apart))
    assert texts == ["<think>one and one\n</think>\n2"]


def test_the_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    script = Script(status(401, "bad key sk-very-secret"))
    with pytest.raises(EndpointError) as error:
        chat(script)
    assert script.headers[0]["Authorization"] == "Bearer sk-very-secret"
    assert "secret" not in str(error.value)


def test_a_login_in_the_address_is_never_shown() -> None:
    async def ask() -> None:
        async with Endpoint("http://me:hush@127.0.0.1:9/v1", "tiny", tries=1) as endpoint:
            await endpoint.chat(ASK, Sampling())

    with pytest.raises(EndpointError) as error:
        asyncio.run(asyncio.wait_for(ask(), 20))
    assert "hush" not in str(error.value)


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "", "ftp://host/v1", "http://", "http://[::1/v1"]
)
def test_an_address_without_http_is_a_users_mistake(url: str) -> None:
    async def make() -> None:
        Endpoint(url, "tiny")

    with pytest.raises(UserError, match="base URL"):
        asyncio.run(make())


def test_text_that_no_json_can_hold_is_an_endpoint_error() -> None:
    async def ask() -> None:
        async with Script(good) as url, Endpoint(url, "tiny") as endpoint:
            await endpoint.chat((Message("user", "\ud800"),), Sampling())

    with pytest.raises(EndpointError, match="cannot be written as JSON"):
        asyncio.run(asyncio.wait_for(ask(), 20))


def test_completions_take_token_ids() -> None:
    script = Script(good)

    async def ask() -> list[str]:
        async with script as url, Endpoint(url, "tiny") as endpoint:
            return [r.text for r in await endpoint.complete([1, 2], Sampling(max_tokens=4))]

    assert asyncio.run(asyncio.wait_for(ask(), 20)) == ["2"]
    assert script.bodies[0]["prompt"] == [1, 2]
    assert script.bodies[0]["max_tokens"] == 4
