"""The trial by kills: it holds, and it would say so if it did not."""

from __future__ import annotations

from collections import Counter

import pytest

from bench.kills import Ended, Found, settle, trial

pytestmark = pytest.mark.timeout(100)


@pytest.mark.heavy
def test_a_few_kills_lose_nothing_and_pay_for_nothing_twice() -> None:
    found = trial(6, 1, faults=False)
    assert found.broken == []
    assert found.phases.total() == 6
    assert found.repeated <= found.in_flight


def ended(phase: str, paid: list[int], in_flight: list[int]) -> Ended:
    return Ended(phase, Counter(paid), frozenset(in_flight))


@pytest.mark.parametrize(
    ("runs", "broken"),
    [
        ([ended("in the middle", [1, 2, 3], [2, 3]), ended("", [2, 3], [])], []),
        ([ended("in the middle", [1, 2, 3], [3]), ended("", [2, 3], [])], ["2 calls repeated, 1"]),
        ([ended("in the middle", [1, 2], []), ended("", [2], [])], ["1 calls repeated, 0"]),
        ([ended("", [1, 1], [])], ["1 calls repeated, 0"]),
        ([ended("in the middle", [], list(range(17)))], ["17 in flight, want 16"]),
        # What is in flight at one kill excuses no other.
        (
            [ended("x", [1], []), ended("x", [1, 2], [1, 2]), ended("", [1, 2], [])],
            ["1 calls repeated, 0"],
        ),
    ],
)
def test_a_call_is_laid_to_the_run_that_paid_for_it_before(
    runs: list[Ended], broken: list[str]
) -> None:
    found = Found()
    settle(found, runs, "out")
    assert len(found.broken) == len(broken)
    assert all(words in said for words, said in zip(broken, found.broken, strict=True))
