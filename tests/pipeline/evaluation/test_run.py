"""Asking and scoring: overlap, failures apart from wrong answers, seeds, thinking and answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from hermes_pipeline.errors import UserError
from hermes_pipeline.evaluation.benchmark import Benchmark
from hermes_pipeline.evaluation.run import Ask, Draw, is_overlong, plan, read_trace, run
from hermes_pipeline.records import Message, Prompt, Score, Trace, Verdict
from hermes_pipeline.services.endpoint import EndpointError, Reply
from hermes_pipeline.services.store import draw_seed


def exact(trace: Trace, prompt: Prompt) -> Verdict:
    return Verdict.of(trace.answer == prompt.target, "")


def benchmark(count: int = 6, score: Any = exact) -> Benchmark[int]:
    return Benchmark(
        name="squares",
        items=lambda: range(count),
        prompt=lambda i: Prompt(str(i), (Message("user", str(i)),), str(i * i)),
        score=score,
        draws=2,
    )


async def square(messages: Sequence[Message], *, seed: int) -> Reply:
    return Reply(f"<think>\n</think>{int(messages[0].content) ** 2}", "stop", 4)


def scores(
    ask: Ask, of: Benchmark[int] | None = None, *, concurrency: int = 4
) -> list[tuple[Draw, Score]]:
    of = of or benchmark()
    seen: list[tuple[Draw, Score]] = []

    async def keep(draw: Draw, score: Score) -> None:
        seen.append((draw, score))

    work = run(of, plan(of, seed=0), ask, keep, concurrency=concurrency)
    asyncio.run(asyncio.wait_for(work, 20))
    return seen


def test_every_draw_of_every_item_is_scored_once() -> None:
    seen = scores(square)
    assert sorted((s.key, s.draw) for _, s in seen) == [
        (str(i), d) for i in range(6) for d in (0, 1)
    ]
    assert all(s.verdict.passed for _, s in seen)


def test_a_failed_request_is_no_wrong_answer() -> None:
    async def ask(messages: Sequence[Message], *, seed: int) -> Reply:
        if messages[0].content == "3":
            raise EndpointError("500: broken", 500)
        return await square(messages, seed=seed)

    seen = scores(ask)
    failed = [s for _, s in seen if s.error is not None]
    assert [(s.key, s.error) for s in failed] == [("3", "500: broken")] * 2
    assert len(seen) == 12


def test_a_hopeless_request_stops_everything() -> None:
    asked = 0

    async def ask(messages: Sequence[Message], *, seed: int) -> Reply:
        nonlocal asked
        asked += 1
        raise EndpointError("401: wrong key", 401, hopeless=True)

    with pytest.raises(BaseExceptionGroup) as caught:
        scores(ask, concurrency=2)
    assert caught.group_contains(EndpointError)
    assert asked <= 2


def test_a_verifier_that_fails_costs_its_own_answer_alone() -> None:
    def brittle(trace: Trace, prompt: Prompt) -> Verdict:
        if prompt.key == "2":
            raise ZeroDivisionError
        return exact(trace, prompt)

    seen = scores(square, benchmark(score=brittle))
    assert {s.key for _, s in seen if s.error} == {"2"}
    assert sum(s.verdict.passed for _, s in seen) == 10


def test_a_verifier_that_lacks_its_package_ends_the_run() -> None:
    def lacking(trace: Trace, prompt: Prompt) -> Verdict:
        raise UserError("the verifier needs a package")

    with pytest.raises(BaseExceptionGroup) as caught:
        scores(square, benchmark(score=lacking))
    assert caught.group_contains(UserError, match="needs a package")


def test_answers_are_scored_while_others_are_asked_for() -> None:
    asked, fourth = [], threading.Event()

    def slow(trace: Trace, prompt: Prompt) -> Verdict:
        assert fourth.wait(20)  # the first score is there after the fourth question
        return exact(trace, prompt)

    async def ask(messages: Sequence[Message], *, seed: int) -> Reply:
        asked.append(messages)
        if len(asked) == 4:
            fourth.set()
        return await square(messages, seed=seed)

    assert sum(s.verdict.passed for _, s in scores(ask, benchmark(score=slow), concurrency=2)) == 12


def test_requests_in_flight_are_bounded() -> None:
    now = most = 0

    async def ask(messages: Sequence[Message], *, seed: int) -> Reply:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        return await square(messages, seed=seed)

    scores(ask, concurrency=3)
    assert most == 3


def test_plan_keeps_the_order_of_items_and_draws() -> None:
    draws = list(plan(benchmark(), seed=0, limit=2, draws=2))
    assert [(d.prompt.key, d.number) for d in draws] == [("0", 0), ("0", 1), ("1", 0), ("1", 1)]


def test_plan_takes_the_draws_of_the_benchmark() -> None:
    assert len(list(plan(benchmark(3), seed=0))) == 6


def test_seeds_depend_on_run_item_and_draw_alone() -> None:
    assert draw_seed(0, "a", 0) == 939562382
    others = {draw_seed(1, "a", 0), draw_seed(0, "b", 0), draw_seed(0, "a", 1)}
    assert len(others | {draw_seed(0, "a", 0)}) == 4
    assert all(0 <= seed < 2**31 for seed in others)


@pytest.mark.parametrize(
    ("text", "finish", "thinking", "answer", "overlong"),
    [
        ("<think>\nhm\n</think>\n4", "stop", "hm", "4", False),
        ("hm\n</think>4", "stop", "hm", "4", False),  # the prompt had opened the tag
        ("<think>\nhm", "length", "hm", "", True),
        ("hm", "length", "hm", "", True),
        ("<think>hm", "stop", "hm", "", False),
        ("4", "stop", "", "4", False),  # a model that does not think
        ("<think>hm</think>4 and 5", "length", "hm", "4 and 5", False),
        ("<think>a</think>b</think>c", "stop", "a", "b</think>c", False),
        ("", "stop", "", "", False),
    ],
)
def test_a_reply_is_read_as_thinking_and_answer(
    text: str, finish: str, thinking: str, answer: str, overlong: bool
) -> None:
    trace = read_trace(Reply(text, finish, 3))
    assert (trace.thinking, trace.answer, is_overlong(trace)) == (thinking, answer, overlong)
