"""Ask every item, score every answer: both at once, and nothing dropped."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from hermes_pipeline.errors import UserError
from hermes_pipeline.evaluation.benchmark import Benchmark
from hermes_pipeline.records import Message, Prompt, Score, Trace, Verdict
from hermes_pipeline.services.endpoint import EndpointError, Reply
from hermes_pipeline.services.store import draw_seed

SCORERS = 2  # verdicts in the making at once; a verifier may be slow


class Keep(Protocol):
    """Where scores go, as soon as they are there; returns when one is safe."""

    async def __call__(self, draw: Draw, score: Score) -> None: ...


class Ask(Protocol):
    """One answer to a conversation, drawn with a seed."""

    async def __call__(self, messages: Sequence[Message], *, seed: int) -> Reply: ...


@dataclass(frozen=True, slots=True)
class Draw:
    """One answer to be had."""

    prompt: Prompt
    number: int  # from 0, among the draws of this prompt
    seed: int


def plan(
    benchmark: Benchmark[Any],
    *,
    seed: int,
    limit: int | None = None,
    draws: int | None = None,
) -> Iterator[Draw]:
    """All draws, in the order of the items; equal seeds give equal draws."""
    for item in islice(benchmark.items(), limit):
        prompt = benchmark.prompt(item)
        for number in range(draws or benchmark.draws):
            yield Draw(prompt, number, draw_seed(seed, prompt.key, number))


async def run(
    benchmark: Benchmark[Any],
    draws: Iterable[Draw],
    ask: Ask,
    keep: Keep,
    *,
    concurrency: int,
) -> None:
    """Have every draw answered, scored and kept.

    Answers are scored in threads while others are still asked for. A request that failed for good
    is kept as a failure, no wrong answer.

    Raises:
        EndpointError: every request would fail: wrong address, key or name of the model.
        UserError: nothing could be scored: the verifier lacks a package.
    """
    waiting = iter(draws)
    # Short: what waits in it is paid for, and would be lost with the process.
    answers: asyncio.Queue[tuple[Draw, Reply] | None] = asyncio.Queue(SCORERS)

    async def generate() -> None:
        for draw in waiting:
            try:
                reply = await ask(draw.prompt.messages, seed=draw.seed)
            except EndpointError as error:
                if error.hopeless:
                    raise
                await keep(draw, _failure(draw, str(error)))
            else:
                await answers.put((draw, reply))

    async def score() -> None:
        while (answer := await answers.get()) is not None:
            draw, reply = answer
            scored = await asyncio.to_thread(_score, benchmark, draw, reply)
            scoring.create_task(keep(draw, scored))  # the next verdict does not wait for the disk

    async with asyncio.TaskGroup() as scoring:
        for _ in range(SCORERS):
            scoring.create_task(score())
        async with asyncio.TaskGroup() as generating:
            for _ in range(concurrency):
                generating.create_task(generate())
        for _ in range(SCORERS):
            await answers.put(None)


def read_trace(reply: Reply) -> Trace:
    """A reply as thinking and answer.

    Without a closing tag there is no answer, unless the model never thought and ended by itself.
    """
    before, closed, after = reply.text.partition("</think>")
    opened = "<think>" in before
    thinking = before.partition("<think>")[2] if opened else before
    answer = after
    if not closed and not opened and reply.finish_reason != "length":
        thinking, answer = "", reply.text
    return Trace(
        text=reply.text,
        thinking=thinking.strip(),
        answer=answer.strip(),
        finish_reason=reply.finish_reason,
        completion_tokens=reply.completion_tokens or 0,
    )


def is_overlong(trace: Trace) -> bool:
    """Did the context end before the thinking did?"""
    return trace.finish_reason == "length" and "</think>" not in trace.text


def _score(benchmark: Benchmark[Any], draw: Draw, reply: Reply) -> Score:
    trace = read_trace(reply)
    try:
        verdict, error = benchmark.score(trace, draw.prompt), None
    except UserError:  # a package is missing: no answer could be scored
        raise
    except Exception as defect:  # one answer that breaks a verifier must not cost all the others
        verdict, error = Verdict.of(False, "not scored"), f"the verifier failed: {defect!r}"
    return Score(draw.prompt.key, draw.number, verdict, trace, draw.prompt.target, error)


def _failure(draw: Draw, error: str) -> Score:
    trace = Trace(text="", thinking="", answer="", finish_reason="error")
    verdict = Verdict.of(False, "no answer")
    return Score(draw.prompt.key, draw.number, verdict, trace, draw.prompt.target, error)
