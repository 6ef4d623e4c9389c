"""Draw answers to conversations: many requests at once, each answer kept as soon as it is there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from hermes_pipeline.chat import Refused
from hermes_pipeline.records import Conversation, Message
from hermes_pipeline.services.account import Usage
from hermes_pipeline.services.endpoint import EndpointError, Reply
from hermes_pipeline.services.faults import HOPELESS
from hermes_pipeline.services.store import Input, Last, RecordRefused, draw_seed

_END: Any = object()
FEWEST_LOST = 16  # requests in a row that no server has answered: then there is none


@dataclass(frozen=True, slots=True)
class Draw:
    """One answer to be had."""

    given: Input
    conversation: Conversation
    number: int  # from 0, among the draws of this input
    attempt: int  # from 0; one more each time an earlier run has set the draw aside
    seed: int


class Ask(Protocol):
    """The model's answer to one draw."""

    async def __call__(self, draw: Draw) -> Reply: ...


class Keep(Protocol):
    """Where answers go; both return when what they were given is safe."""

    async def keep(
        self, given: Input, draw: int, attempt: int, record: Mapping[str, Any]
    ) -> None: ...

    async def set_aside(self, given: Input, draw: int, attempt: int, error: str) -> None: ...


@dataclass(slots=True)
class Tally:
    """What has become of the draws so far."""

    kept: int = 0
    set_aside: int = 0
    inputs_set_aside: set[int] = field(default_factory=set)  # numbers of those with such a draw
    in_flight: int = 0  # asked for, and not yet answered
    usage: Usage = field(default_factory=Usage)  # of the answers, from when they are there


class NobodyAnswers(Exception):
    """So many requests in a row failed for good, without a word of the model, that it is gone."""


def as_input(number: int, conversation: Conversation) -> Input:
    """The conversation as what its answers are kept for.

    Raises:
        Refused: a number in its tools or calls is too large for our JSON.
    """
    messages = [_turn(message) for message in conversation.messages]
    tools = [dict(tool) for tool in conversation.tools]
    about = {"source": conversation.source, "messages": messages}
    try:
        return Input.of(number, [messages, tools], about | ({"tools": tools} if tools else {}))
    except TypeError as error:
        raise Refused(f"the conversation cannot be written as JSON: {error}") from None


def plan(
    inputs: Iterable[tuple[Input, Conversation] | None],
    past: Callable[[Input], Mapping[int, Last]],
    *,
    draws: int,
    seed: int,
) -> Iterator[Draw | None]:
    """The draws still to be had, in the order of the inputs; None where others may have a turn.

    Args:
        inputs: None where there is none.
        past: what earlier runs have made of an input's draws; kept ones are left out.
    """
    for entry in inputs:
        if entry is not None:
            given, conversation = entry
            before = past(given)
            for number in range(draws):
                last = before.get(number)
                if last is None or not last.kept:
                    attempt = 0 if last is None else last.attempt + 1
                    yield Draw(
                        given, conversation, number, attempt, draw_seed(seed, given.id, number)
                    )
        yield None


def take(draws: Iterator[Draw | None], count: int) -> Iterator[Draw | None]:
    """So many of the draws; the iterator goes on behind them."""
    while count > 0 and (draw := next(draws, _END)) is not _END:
        count -= draw is not None
        yield draw


async def run(
    draws: Iterable[Draw | None], ask: Ask, store: Keep, tally: Tally, *, concurrency: int
) -> None:
    """Have every draw answered and kept, or set aside with its error.

    A draw holds its turn until it is safe, so that no more than ``concurrency`` can be lost, and
    ``draws`` are taken when there is a turn for them.

    Raises:
        EndpointError: every request would fail: wrong address, key or name of the model.
        NobodyAnswers: the server is gone.
    """
    waiting = iter(draws)
    most_lost = max(FEWEST_LOST, 2 * concurrency)
    lost = 0  # requests in a row

    async def answer(draw: Draw) -> None:
        nonlocal lost
        tally.in_flight += 1
        try:
            reply = await ask(draw)
        finally:
            tally.in_flight -= 1
        lost = 0
        tally.usage.add(reply.prompt_tokens or 0, reply.completion_tokens or 0)
        tally.usage.retries += reply.tries - 1
        await store.keep(draw.given, draw.number, draw.attempt, _record(draw, reply))
        tally.kept += 1

    async def set_aside(draw: Draw, error: Exception) -> None:
        await store.set_aside(draw.given, draw.number, draw.attempt, str(error))
        tally.set_aside += 1
        tally.inputs_set_aside.add(draw.given.number)

    async def work() -> None:
        nonlocal lost
        for draw in waiting:
            if draw is None:
                await asyncio.sleep(0)
                continue
            try:
                await answer(draw)
            except RecordRefused as error:
                await set_aside(draw, error)
            except EndpointError as error:
                if error.hopeless:
                    raise
                await set_aside(draw, error)
                lost = lost + 1 if _unheard(error) else 0
                if lost >= most_lost:
                    raise NobodyAnswers(f"{lost} requests in a row failed; {error}") from None

    async with asyncio.TaskGroup() as working:
        for _ in range(concurrency):
            working.create_task(work())


def _turn(message: Message) -> dict[str, Any]:
    """The message as `chat.parse` reads it."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        turn["reasoning"] = message.reasoning
    if message.tool_calls:
        turn["tool_calls"] = [dict(call) for call in message.tool_calls]
    named = {"name": message.name, "tool_call_id": message.tool_call_id}
    return turn | {key: value for key, value in named.items() if value is not None}


def _record(draw: Draw, reply: Reply) -> dict[str, Any]:
    record: dict[str, Any] = {
        "seed": draw.seed,
        "text": reply.text,
        "finish_reason": reply.finish_reason,
        "prompt_tokens": reply.prompt_tokens,
        "tokens": reply.completion_tokens,
    }
    if reply.tool_calls:  # the server has taken them out of the text
        record["tool_calls"] = list(reply.tool_calls)
    return record


def _unheard(error: EndpointError) -> bool:
    """Has no server looked at the request itself?"""
    status = error.status
    return status is None or status == 429 or status in HOPELESS or status >= 500
