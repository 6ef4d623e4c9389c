"""Rates in every second, what servers' headers ask for, and which address comes next."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import Sequence

import pytest
from multidict import CIMultiDict

from hermes_pipeline.records import Message
from hermes_pipeline.services import limits
from hermes_pipeline.services.endpoint import Endpoint, Sampling
from hermes_pipeline.services.limits import Address, Bucket, asked_pause_s, backoff_s, choose
from scripted import Script, good

NOW = 1_800_000_000.0  # Fri, 15 Jan 2027 08:00:00 GMT


def most_in_a_second(times: Sequence[float]) -> int:
    """The most of them in any second, however it lies."""
    times = sorted(times)
    return max(bisect_left(times, start + 1) - i for i, start in enumerate(times))


async def passing(bucket: Bucket, count: int, amount: float = 1.0) -> list[float]:
    times: list[float] = []

    async def pass_one() -> None:
        await bucket.take(amount)
        times.append(asyncio.get_running_loop().time())

    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        for _ in range(count):
            tasks.create_task(pass_one())
    return times


def test_no_second_lets_more_than_the_rate_through_not_even_the_first() -> None:
    times = asyncio.run(passing(Bucket(500), 1100))
    assert most_in_a_second(times) <= 520
    assert times[-1] - times[0] < 10  # 2.2 s, and room for a busy machine


def test_a_loop_that_was_held_up_does_not_make_good_what_it_missed() -> None:
    async def run() -> list[float]:
        asyncio.get_running_loop().call_later(0.3, time.sleep, 0.2)
        return await passing(Bucket(500), 700)

    times = asyncio.run(run())
    assert most_in_a_second(times) <= 520
    assert times[-1] - times[0] > 1.5  # 1.4 s, and what was missed


def test_who_stops_waiting_takes_nothing_and_holds_nobody_up() -> None:
    async def run() -> float:
        bucket = Bucket(10)
        await bucket.take(1)
        waiting = [asyncio.create_task(bucket.take(1)) for _ in range(50)]
        await asyncio.sleep(0)
        for task in waiting[:-1]:
            task.cancel()
        start = time.monotonic()
        await asyncio.gather(*waiting, return_exceptions=True)
        return time.monotonic() - start

    assert asyncio.run(run()) < 4  # a tenth of a second; five if they counted


def test_a_charge_moves_those_who_wait() -> None:
    async def run() -> float:
        bucket = Bucket(10)
        start = time.monotonic()
        await bucket.take(100)  # ten seconds
        waiting = asyncio.create_task(bucket.take(1))
        await asyncio.sleep(0)
        bucket.charge(-98)
        await waiting
        return time.monotonic() - start

    assert 0.1 < asyncio.run(run()) < 8


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": "0.5"}, 0.5),
        ({"Retry-After": "-3"}, 0.0),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "Wed, 21 Oct 2099 07:28:00 +99999999999999"}, None),
        ({"Retry-After": "nan"}, 0.0),
        ({"Retry-After": "86400"}, limits.LONGEST_ASKED_PAUSE_S),
        ({"Retry-After": "Fri, 15 Jan 2027 08:00:20 GMT"}, 20.0),
        (
            {
                "Retry-After": "Fri, 15 Jan 2027 08:00:20 GMT",
                "Date": "Fri, 15 Jan 2027 08:00:15 GMT",  # its clock is ahead of ours
            },
            5.0,
        ),
        ({"retry-after-ms": "250", "Retry-After": "1"}, 0.25),
        ({"x-ms-retry-after-ms": "1500"}, 1.5),
        ({"x-ratelimit-reset-requests": "1m2.5s"}, 62.5),
        ({"x-ratelimit-reset-requests": "20ms", "x-ratelimit-reset-tokens": "6m0s"}, 120.0),
        ({"x-ratelimit-reset-requests": "2s", "x-ratelimit-reset-tokens": "-1"}, 2.0),
        ({"x-ratelimit-reset-requests": "0", "x-ratelimit-reset-tokens": "-1"}, None),
        ({"x-ratelimit-reset-requests": "2s", "Retry-After": "1"}, 1.0),
    ],
)
def test_a_pause_is_read_in_every_form(headers: dict[str, str], seconds: float | None) -> None:
    assert asked_pause_s(CIMultiDict(headers), NOW) == seconds


def test_backoff_doubles_with_full_jitter_up_to_a_minute() -> None:
    for attempt, most in [(0, 0.5), (1, 1.0), (4, 8.0), (7, 60.0), (10_000, 60.0)]:
        pauses = [backoff_s(attempt) for _ in range(400)]
        assert min(pauses) < 0.1 * most
        assert 0.9 * most < max(pauses) <= most


def test_requests_go_where_least_is_in_flight() -> None:
    a, b, c = (Address(name, name, in_flight=n) for name, n in [("a", 3), ("b", 1), ("c", 2)])
    assert choose([a, b, c], 0) is b


def test_one_that_failed_gets_a_single_request_after_a_while_and_all_once_it_answers() -> None:
    alive, dead = Address("alive", "alive", in_flight=50), Address("dead", "dead")
    dead.set_aside(100)
    dead.set_aside(100.01)  # another call of the same outage
    assert choose([alive, dead], 100.9) is alive
    assert choose([alive, dead], 101) is dead
    assert choose([alive, dead], 101) is alive
    assert choose([alive, dead], 102.9) is alive
    assert choose([alive, dead], 103) is dead  # two seconds the second time
    dead.answered()
    assert choose([alive, dead], 103) is dead


def test_what_failed_goes_where_it_has_not_yet_and_tries_out_no_address_twice() -> None:
    a, b, c = (Address(name, name, in_flight=n) for name, n in [("a", 0), ("b", 1), ("c", 2)])
    assert choose([a, b, c], 0, [a]) is b
    assert choose([a, b, c], 0, [a, b]) is c
    assert choose([a, b, c], 0, [a, b, c, a]) is b
    a.set_aside(0)
    assert choose([a, b, c], 1, [a]) is b
    assert choose([a, b, c], 1) is a


def test_one_that_is_paused_is_chosen_only_when_all_are() -> None:
    a, b = Address("a", "a"), Address("b", "b", in_flight=9)
    a.pause(10)
    assert choose([a, b], 5) is b
    b.pause(20)
    assert choose([a, b], 5) is a


async def ask_many(count: int, **options: float) -> Script:
    script = Script(good)
    async with asyncio.timeout(20), script as url, Endpoint(url, "tiny", **options) as endpoint:  # type: ignore[arg-type]
        asked = (
            endpoint.chat((Message("user", "hi"),), Sampling(max_tokens=100)) for _ in range(count)
        )
        await asyncio.gather(*asked)
    return script


def test_a_limit_of_requests_holds_in_every_second_at_the_server() -> None:
    arrivals = asyncio.run(ask_many(250, requests_per_s=100)).arrivals
    assert most_in_a_second(arrivals) <= 108  # 102, and what came late
    assert arrivals[-1] - arrivals[0] < 12


def test_a_limit_of_tokens_holds_in_every_second_at_the_server() -> None:
    # Eight tokens each; before the first answer more are assumed, then given back.
    arrivals = asyncio.run(ask_many(250, tokens_per_s=800)).arrivals
    assert most_in_a_second(arrivals) <= 108  # 102, and what came late
    assert arrivals[-1] - arrivals[0] < 12
