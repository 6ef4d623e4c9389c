"""Drawing answers: what is read ahead, what is in flight, and when a run gives up."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from hermes_pipeline.records import Conversation, Message
from hermes_pipeline.sampling.draw import Draw, NobodyAnswers, Tally, as_input, plan, run
from hermes_pipeline.services.endpoint import EndpointError, Reply
from hermes_pipeline.services.store import Input, Last, RecordRefused

pytestmark = pytest.mark.timeout(30)


class Kept:
    """Answers in memory."""

    def __init__(self, refuse: tuple[int, ...] = ()) -> None:
        self.records: dict[tuple[int, int, int], Mapping[str, Any]] = {}
        self.errors: dict[tuple[int, int, int], str] = {}
        self._refuse = refuse

    async def keep(self, given: Input, draw: int, attempt: int, record: Mapping[str, Any]) -> None:
        await asyncio.sleep(0)
        if given.number in self._refuse:
            raise RecordRefused("too large")
        self.records[given.number, draw, attempt] = record

    async def set_aside(self, given: Input, draw: int, attempt: int, error: str) -> None:
        self.errors[given.number, draw, attempt] = error


def conversation(number: int) -> Conversation:
    return Conversation((Message("user", f"{number}?"),), source=f"data:{number}")


def planned(
    count: int, past: Mapping[int, Mapping[int, Last]] | None = None, *, draws: int = 2
) -> Iterator[Draw | None]:
    inputs = ((as_input(n, conversation(n)), conversation(n)) for n in range(1, count + 1))
    return plan(inputs, lambda given: (past or {}).get(given.number, {}), draws=draws, seed=0)


async def echo(draw: Draw) -> Reply:
    await asyncio.sleep(0)
    return Reply(draw.conversation.messages[-1].content, "stop", 3)


def drawn(draws: Iterator[Draw | None], ask: Any, kept: Kept, *, concurrency: int = 4) -> Tally:
    tally = Tally()

    async def timed() -> None:
        working = run(draws, ask, kept, tally, concurrency=concurrency)
        await asyncio.wait_for(working, 20)

    asyncio.run(timed())
    return tally


def test_what_an_earlier_run_has_kept_is_not_planned_and_what_it_set_aside_is() -> None:
    past = {1: {0: Last(0, kept=True), 1: Last(0, kept=False)}, 2: {0: Last(2, kept=True)}}
    todo = [draw for draw in planned(2, past) if draw is not None]
    assert [(d.given.number, d.number, d.attempt) for d in todo] == [(1, 1, 1), (2, 1, 0)]


def test_seeds_depend_on_the_draw_and_not_on_the_attempt() -> None:
    first = [draw.seed for draw in planned(3) if draw is not None]
    again = {n: {0: Last(0, kept=False), 1: Last(5, kept=False)} for n in (1, 2, 3)}
    assert len(set(first)) == 6
    assert [draw.seed for draw in planned(3, again) if draw is not None] == first


def test_equal_conversations_at_two_places_are_two_inputs() -> None:
    assert as_input(1, conversation(7)).id != as_input(2, conversation(7)).id


def test_every_draw_is_kept_with_its_seed_and_counted() -> None:
    kept = Kept()
    tally = drawn(planned(5), echo, kept)
    assert len(kept.records) == tally.kept == 10
    assert kept.records[3, 1, 0]["text"] == "3?"
    assert (tally.usage.completion_tokens, tally.in_flight, tally.set_aside) == (30, 0, 0)


def test_calls_of_tools_are_kept_where_there_are_any() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": "{}"}}

    async def ask(draw: Draw) -> Reply:
        return Reply("", "tool_calls", 3, tool_calls=(call,) if draw.number else ())

    kept = Kept()
    drawn(planned(1), ask, kept)
    assert kept.records[1, 1, 0]["tool_calls"] == [call]
    assert "tool_calls" not in kept.records[1, 0, 0]


def test_no_more_is_read_than_there_are_turns_for() -> None:
    taken, most = 0, 0
    tally = Tally()

    def counted() -> Iterator[Draw | None]:
        nonlocal taken, most
        for draw in planned(500):
            if draw is not None:
                taken += 1
                most = max(most, taken - tally.kept)
            yield draw

    asyncio.run(run(counted(), echo, Kept(), tally, concurrency=7))
    assert taken == 1000
    assert most <= 7


def test_a_record_that_cannot_be_kept_is_set_aside_and_the_run_goes_on() -> None:
    kept = Kept(refuse=(2,))
    tally = drawn(planned(4), echo, kept)
    assert set(kept.errors) == {(2, 0, 0), (2, 1, 0)}
    assert (tally.kept, tally.set_aside, tally.inputs_set_aside) == (6, 2, {2})


def failing(status: int | None, *, hopeless: bool = False) -> Any:
    async def ask(draw: Draw) -> Reply:
        await asyncio.sleep(0)
        raise EndpointError("no", status, hopeless=hopeless)

    return ask


@pytest.mark.parametrize("status", [None, 403, 404, 429, 500, 503])
def test_a_server_that_never_answers_ends_the_run(status: int | None) -> None:
    kept = Kept()
    with pytest.raises(ExceptionGroup) as group:
        drawn(planned(1000), failing(status), kept)
    assert group.group_contains(NobodyAnswers, match="16 requests in a row failed; no")
    assert len(kept.errors) < 30


def test_refusals_do_not_end_the_run() -> None:
    kept = Kept()
    assert drawn(planned(100), failing(400), kept).set_aside == 200


def test_a_wrong_key_ends_the_run_at_once() -> None:
    kept = Kept()
    with pytest.raises(ExceptionGroup) as group:
        drawn(planned(100), failing(401, hopeless=True), kept)
    assert group.group_contains(EndpointError)
    assert kept.errors == {}
