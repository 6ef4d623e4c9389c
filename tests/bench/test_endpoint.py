"""The gate before any time of a client: every call sent once, and answered in full."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from bench.endpoint import WrongAnswer, _calls
from bench.endpoint_clients import OURS, Call
from bench.endpoint_server import ask_counts, serving

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(120)]


def test_each_call_reaches_the_server_once_with_as_many_in_flight_as_asked_for() -> None:
    with serving() as (url, line):
        few = replace(OURS, calls=40)
        got = asyncio.run(_calls(few, url, 10))
        assert ask_counts(line) == (6 * 40, 10)
    assert got.calls == 40
    assert len(got.cpu_s) == 5
    assert got.rate > 0


def test_a_wrong_answer_gets_no_time() -> None:
    @asynccontextmanager
    async def wrong(url: str, in_flight: int) -> AsyncIterator[Call]:
        async def call() -> str:
            return "wrong"

        yield call

    with pytest.raises(BaseExceptionGroup) as caught:
        asyncio.run(_calls(replace(OURS, open=wrong), "", 4))
    assert caught.group_contains(WrongAnswer)
