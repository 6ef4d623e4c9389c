"""The client against a server that follows a script: drops, delays, errors, halves of replies."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest
from aiohttp import web

from hermes_pipeline.errors import UserError
from hermes_pipeline.records import Message
from hermes_pipeline.services import limits
from hermes_pipeline.services.endpoint import Endpoint, EndpointError, Reply, Sampling
from hermes_pipeline.services.limits import read_address
from scripted import Script, Step, cut_body, drop, good, half_json, no_choices, slow, status

REFUSES = status(404, "no model of that name")

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


def at_each(
    *scripts: Script, count: int = 1, asked: str = "1+1?", **options: Any
) -> list[Reply | BaseException]:
    """What so many requests at once bring, spread over the addresses."""

    async def ask() -> Any:
        async with asyncio.timeout(20), AsyncExitStack() as stack:
            urls = [await stack.enter_async_context(script) for script in scripts]
            endpoint = await stack.enter_async_context(Endpoint(urls, "tiny", **options))
            texts = [asked] + ["1+1?"] * (count - 1)
            requests = (endpoint.chat((Message("user", t),), Sampling()) for t in texts)
            return await asyncio.gather(*requests, return_exceptions=True)

    return [r if isinstance(r, BaseException) else r[0] for r in asyncio.run(ask())]


def failures(answers: Sequence[Reply | BaseException]) -> list[EndpointError]:
    return [a for a in answers if isinstance(a, EndpointError)]


@pytest.mark.parametrize("fault", [status(500), status(429), status(408), status(503), REFUSES])
def test_one_address_of_several_that_always_fails_takes_no_request_from_the_others(
    fault: Step,
) -> None:
    bad, scripts = Script(fault), [Script(slow(0.05)), Script(slow(0.05))]
    assert not failures(at_each(bad, *scripts, count=100, concurrency=12))
    assert len(bad.bodies) <= 4 + 4  # its share of the first, and a few trials


def test_what_failed_is_tried_elsewhere() -> None:
    scripts = Script(status(500), good), Script(good), Script(status(500), good)
    (answer,) = at_each(*scripts)
    assert isinstance(answer, Reply)
    assert [len(script.bodies) for script in scripts] == [1, 1, 0]


def test_a_request_that_fails_wherever_it_goes_takes_no_address_from_the_others() -> None:
    async def choosy(request: web.Request) -> web.StreamResponse:
        is_poison = "poison" in str(await request.json())
        return await (status(500) if is_poison else slow(0.02))(request)

    scripts = Script(choosy), Script(choosy)
    answers = at_each(*scripts, count=200, asked="poison", concurrency=8)
    assert ["failed 6 times" in str(error) for error in failures(answers)] == [True]
    assert min(len(script.bodies) for script in scripts) > 50


@pytest.mark.parametrize("code", ["", "model_not_found"])
def test_one_address_of_several_that_refuses_all_is_told_once_and_uses_up_no_try(
    code: str,
) -> None:
    told = list[str]()
    bad = Script(status(400 if code else 404, "no such model", code=code))
    answers = at_each(bad, Script(slow(0.05)), count=40, concurrency=8, tries=1, tell=told.append)
    assert not failures(answers)
    (line,) = told
    assert "no such model; others are asked instead" in line


def test_addresses_that_all_refuse_all_are_hopeless() -> None:
    told = list[str]()
    (error,) = at_each(Script(REFUSES), Script(status(401)), tries=1, tell=told.append)
    assert isinstance(error, EndpointError)
    assert (error.hopeless, error.status, len(told)) == (True, 401, 1)


def test_one_that_refuses_all_beside_one_that_is_gone_is_not_hopeless() -> None:
    (error,) = at_each(Script(REFUSES), Script(drop), tries=2)
    assert isinstance(error, EndpointError)
    assert not error.hopeless


@pytest.mark.parametrize("number", [200, 401, 500])
def test_a_login_and_a_key_that_a_server_repeats_are_never_shown(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def echo(request: web.Request) -> web.StreamResponse:
        text = json.dumps(dict(request.headers))  # and as PHP writes it
        return web.Response(text=text + text.replace("/", "\\/"), status=number)

    async def ask(login: str) -> str:
        async with (
            Script(echo) as url,
            Endpoint(url.replace("//", f"//{login}"), "tiny", tries=1) as e,
        ):
            with pytest.raises(EndpointError) as error:
                await e.chat(ASK, Sampling())
        return str(error.value)

    said = asyncio.run(ask("me:hu%3F%3Fsh%3Fhu%3F%3Fsh@"))
    assert "Basic ***" in said
    assert "aHU/P3NoP2h1Pz9za" not in said.replace("\\", "")
    assert "sh" not in said
    monkeypatch.setenv("OPENAI_API_KEY", 'sk-"very/secret')
    said = asyncio.run(ask(""))
    assert said.count("Bearer ***") == 2
    assert "secret" not in said


@pytest.mark.parametrize("url", ["http://h/v1?key=hush", "http://me:hu#sh@h/v1", "//h?k=hush"])
def test_a_query_or_fragment_is_a_users_mistake_and_never_shown(url: str) -> None:
    with pytest.raises(UserError, match=r"a base URL holds a \? or #") as error:
        read_address(url, "")
    assert "hu" not in str(error.value)


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
