"""The client when things break: faults, storms, pauses, dead addresses, cancellation."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from hermes_pipeline.errors import UserError
from hermes_pipeline.records import Message
from hermes_pipeline.services import endpoint as endpoint_module
from hermes_pipeline.services import limits
from hermes_pipeline.services.endpoint import Endpoint, EndpointError, Reply, Sampling
from scripted import Script, Step, at_random, cut_body, drop, good, half_json, reply, slow, status

ASK = (Message("user", "1+1?"),)
pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(limits, "LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr(limits, "FIRST_ASIDE_S", 0.1)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def against(
    script: Script, work: Callable[[Endpoint], Awaitable[Any]], **options: Any
) -> tuple[Any, Endpoint]:
    """What the work gives, and the endpoint it was done with."""

    async def run() -> tuple[Any, Endpoint]:
        async with asyncio.timeout(40), script as url, Endpoint(url, "tiny", **options) as endpoint:
            return await work(endpoint), endpoint

    return asyncio.run(run())


async def one(endpoint: Endpoint) -> Reply:
    return (await endpoint.chat(ASK, Sampling()))[0]


def many(count: int) -> Callable[[Endpoint], Awaitable[list[Reply | BaseException]]]:
    async def work(endpoint: Endpoint) -> list[Reply | BaseException]:
        asked = (one(endpoint) for _ in range(count))
        return await asyncio.gather(*asked, return_exceptions=True)

    return work


def refused(script: Script, **options: Any) -> EndpointError:
    with pytest.raises(EndpointError) as caught:
        against(script, one, **options)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("number", [408, 409, 425, 429, 500, 502, 503, 504, 529])
def test_a_passing_status_is_tried_again(number: int) -> None:
    answer, endpoint = against(Script(status(number), status(number), good), one)
    assert answer.text == "2"
    assert endpoint.usage.retries == 2


@pytest.mark.parametrize(
    ("step", "hopeless"),
    [
        (status(400, "This model's maximum context length is 2048 tokens"), False),
        (status(422, "Input should be a valid list"), False),
        (status(413, "too large"), False),
        (status(401, "bad key"), True),
        (status(403, "no access"), True),
        (status(404, "no such model"), True),
        (status(400, "no such model", code="model_not_found"), True),
        (status(429, "You exceeded your current quota", code="insufficient_quota"), True),
        (status(307, Location="http://elsewhere/v1"), True),
    ],
)
def test_a_refusal_is_final_and_says_whether_others_may_fare_better(
    step: Step, hopeless: bool
) -> None:
    script = Script(step)
    assert refused(script).hopeless == hopeless
    assert len(script.bodies) == 1


def test_fewer_answers_than_asked_for_are_no_answer() -> None:
    async def single(request: web.Request) -> web.StreamResponse:
        return web.json_response(reply(1))

    with pytest.raises(EndpointError, match="1 answers where n=3 were asked for"):
        against(Script(single), lambda endpoint: endpoint.chat(ASK, Sampling(), n=3))


def test_a_storm_of_429_loses_no_request() -> None:
    script = Script(at_random({status(429): 0.9}))
    answers, endpoint = against(script, many(200), tries=2)
    assert [a.text for a in answers] == ["2"] * 200
    assert (endpoint.usage.requests, endpoint.usage.failed) == (200, 0)
    assert len(script.bodies) == 200 + endpoint.usage.retries > 1000


def test_every_request_of_a_bad_hour_ends_once_and_the_counts_add_up() -> None:
    shares = {status(500): 0.2, cut_body: 0.05, slow(30): 0.05, drop: 0.05, half_json: 0.05}
    script = Script(at_random(shares))
    answers, endpoint = against(script, many(400), tries=3, timeout_s=2)
    usage = endpoint.usage
    failed = [a for a in answers if isinstance(a, EndpointError)]
    assert usage.requests + usage.failed == len(answers) == 400
    assert len(failed) == usage.failed > 0
    assert usage.cancelled == usage.in_flight == 0
    assert len(script.bodies) == 400 + usage.retries
    assert usage.completion_tokens == 3 * usage.requests
    assert all("failed 3 times" in str(error) for error in failed)


@pytest.mark.parametrize("number", [429, 503])
def test_a_pause_that_a_server_asks_for_holds_for_all_calls(number: int) -> None:
    script = Script(status(number, **{"retry-after-ms": "400"}), good)

    async def work(endpoint: Endpoint) -> None:
        first = asyncio.create_task(one(endpoint))
        while not endpoint.usage.retries:
            await asyncio.sleep(0.01)
        await asyncio.gather(first, *(one(endpoint) for _ in range(10)))

    against(script, work)
    first, *others = script.arrivals
    assert len(others) == 11
    assert min(others) - first >= 0.4
    assert max(others) - min(others) > 0.001  # not all in the same moment


@pytest.mark.parametrize("gone", [None, 502, 503])
def test_an_outage_uses_up_no_try(gone: int | None) -> None:
    script = Script(good)

    async def work(endpoint: Endpoint) -> None:
        await one(endpoint)
        if gone is None:
            await script.__aexit__()
        else:
            script.steps = [status(gone)]
        asked = asyncio.create_task(one(endpoint))
        while endpoint.usage.retries < 20:
            await asyncio.sleep(0.01)
        script.steps = [good]
        if gone is None:
            await script.__aenter__()
        await asked

    _, endpoint = against(script, work, tries=3)
    assert endpoint.usage.retries >= 20
    assert endpoint.usage.failed == 0


def test_an_outage_ends_some_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "OUTAGE_S", 0.3)

    async def work(endpoint: Endpoint) -> None:
        await one(endpoint)
        await one(endpoint)

    with pytest.raises(EndpointError, match="failed 3 times; the last time 503"):
        against(Script(good, status(503)), work, tries=3)


def test_one_that_fails_alone_is_no_outage() -> None:
    async def refuse_some(request: web.Request) -> web.StreamResponse:
        refused = "never" in str(await request.json())
        return await (status(503) if refused else good)(request)

    async def work(endpoint: Endpoint) -> None:
        async def others() -> None:
            while True:
                await one(endpoint)

        answered = asyncio.create_task(others())
        try:
            await endpoint.chat((Message("user", "never"),), Sampling())
        finally:
            answered.cancel()

    with pytest.raises(EndpointError, match="failed 3 times"):
        against(Script(refuse_some), work, tries=3)


def test_a_server_that_never_answered_is_not_waited_for() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    async def run() -> None:
        async with Endpoint(f"http://127.0.0.1:{port}/v1", "tiny") as endpoint:
            await one(endpoint)

    with pytest.raises(EndpointError, match="failed 6 times"):
        asyncio.run(run())


def test_a_request_gives_up_on_429_when_its_time_is_up() -> None:
    error = refused(Script(status(429, "slow down")), request_timeout_s=0.5)
    assert "the request's 0.5 s leave no time" in str(error)
    assert "429: slow down" in str(error)
    assert error.hopeless  # nobody was answered in all that time


def test_one_that_times_out_while_others_are_answered_is_not_hopeless() -> None:
    async def busy_for_three(request: web.Request) -> web.StreamResponse:
        is_busy = (await request.json())["n"] == 3
        return await (status(429) if is_busy else good)(request)

    async def work(endpoint: Endpoint) -> Any:
        asked = asyncio.create_task(endpoint.chat(ASK, Sampling(), n=3))
        await asyncio.sleep(0.1)
        await one(endpoint)
        return await asyncio.gather(asked, return_exceptions=True)

    (error,), _ = against(Script(busy_for_three), work, request_timeout_s=3)
    assert isinstance(error, EndpointError)
    assert not error.hopeless


def test_a_run_ends_when_its_time_is_up() -> None:
    answers, endpoint = against(Script(slow(0.2)), many(20), concurrency=4, run_timeout_s=0.5)
    late = [a for a in answers if isinstance(a, EndpointError)]
    assert len(late) == endpoint.usage.failed == 20 - endpoint.usage.requests > 0
    assert all(error.hopeless and "the run's 0.5 s leave no time" in str(error) for error in late)


def test_cancelling_leaves_no_task_and_no_socket() -> None:
    def sockets() -> int:
        links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
        return sum(os.readlink(link).startswith("socket:") for link in links if link.is_symlink())

    async def run() -> None:
        script = Script(slow(30))
        async with script as url:
            tasks_before, sockets_before = len(asyncio.all_tasks()), sockets()
            async with Endpoint(url, "tiny", concurrency=20) as endpoint:
                asked = [asyncio.create_task(one(endpoint)) for _ in range(30)]
                while script.in_flight < 20:
                    await asyncio.sleep(0.01)
                assert sockets() > sockets_before
                for task in asked:
                    task.cancel()
                await asyncio.gather(*asked, return_exceptions=True)
                assert (endpoint.usage.cancelled, endpoint.usage.in_flight) == (20, 0)
            while script.connections or len(asyncio.all_tasks()) > tasks_before:
                await asyncio.sleep(0.01)
            assert script.in_flight == 0
            assert sockets() == sockets_before

    asyncio.run(asyncio.wait_for(run(), 20))


def test_a_request_that_waits_to_be_sent_again_can_be_cancelled() -> None:
    script = Script(status(429, **{"Retry-After": "60"}))

    async def work(endpoint: Endpoint) -> None:
        asked = asyncio.create_task(one(endpoint))
        while not script.bodies:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert (endpoint.usage.cancelled, endpoint.usage.in_flight) == (1, 0)

    against(script, work)
    assert len(script.bodies) == 1


def test_two_addresses_share_the_requests() -> None:
    a, b = Script(slow(0.01)), Script(slow(0.01))

    async def run() -> None:
        async with a as url_a, b as url_b, Endpoint([url_a, url_b], "tiny") as endpoint:
            await many(200)(endpoint)

    asyncio.run(asyncio.wait_for(run(), 20))
    assert len(a.bodies) + len(b.bodies) == 200
    assert 80 <= len(a.bodies) <= 120


def test_an_address_that_dies_and_returns_loses_nothing_and_gets_its_share_again() -> None:
    a, b = Script(slow(0.01)), Script(slow(0.01))

    async def run() -> None:
        async with (
            a as url_a,
            b as url_b,
            Endpoint([url_a, url_b], "tiny", concurrency=16) as endpoint,
        ):
            asked = [asyncio.create_task(one(endpoint)) for _ in range(300)]
            while len(b.bodies) < 50:
                await asyncio.sleep(0.001)
            await b.__aexit__()
            assert [r.text for r in await asyncio.gather(*asked)] == ["2"] * 300
            assert endpoint.usage.retries <= 16 + 10  # what was in flight, and a few trials
            await b.__aenter__()
            before = len(b.bodies)
            while len(b.bodies) == before:  # its time aside is over
                await one(endpoint)
            before = len(a.bodies), len(b.bodies)
            await many(200)(endpoint)
            assert len(b.bodies) - before[1] >= 60
            assert endpoint.usage.failed == 0

    asyncio.run(asyncio.wait_for(run(), 30))


async def echo_the_key(request: web.Request) -> web.StreamResponse:
    return web.Response(body=b'{"choices": ' + request.headers["Authorization"].encode())


@pytest.mark.parametrize(
    "step",
    [status(401, "bad key sk-very-secret"), status(500, "sk-very-secret"), echo_the_key, drop],
    ids=["401", "500", "half a reply", "drop"],
)
def test_the_key_is_in_no_error_and_no_log(
    step: Step, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", " sk-very-secret\n")
    caplog.set_level("DEBUG")
    script = Script(step)
    error = refused(script, tries=2)
    assert script.headers[0]["Authorization"] == "Bearer sk-very-secret"
    told = repr(error) + "".join(traceback.format_exception(error)) + caplog.text
    assert "very-secret" not in told


def test_a_login_and_a_key_are_a_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with pytest.raises(UserError, match="carries a login and OPENAI_API_KEY") as error:
        Endpoint("http://me:hush@127.0.0.1:9/v1", "tiny")
    assert "hush" not in str(error.value)


def test_a_key_that_no_header_can_carry_is_a_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very\nsecret")
    with pytest.raises(UserError, match="no header can carry"):
        Endpoint("http://127.0.0.1:9/v1", "tiny")


def test_more_requests_than_files_may_be_open_are_a_users_mistake() -> None:
    async def run() -> None:
        async with Endpoint("http://127.0.0.1:9/v1", "tiny", concurrency=10**9):
            pass

    with pytest.raises(UserError, match="open files"):
        asyncio.run(run())


def test_outside_its_block_an_endpoint_says_so() -> None:
    async def run() -> None:
        await one(Endpoint("http://127.0.0.1:9/v1", "tiny"))

    with pytest.raises(EndpointError, match="outside its `async with` block"):
        asyncio.run(run())


def test_the_garbage_collector_looks_less_often_inside_the_block_alone() -> None:
    before = gc.get_threshold()

    async def run() -> None:
        async with Endpoint("http://127.0.0.1:9/v1", "tiny", concurrency=1000):
            assert gc.get_threshold() == (64_000, *before[1:])

    asyncio.run(run())
    assert gc.get_threshold() == before


@pytest.mark.parametrize(
    "options", [{"concurrency": 0}, {"tries": 0}, {"requests_per_s": 0}, {"tokens_per_s": -1.0}]
)
def test_numbers_that_let_nothing_through_are_a_users_mistake(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"wants 1 or more|lets nothing through"):
        Endpoint("http://127.0.0.1:9/v1", "tiny", **options)
