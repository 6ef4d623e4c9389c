"""What every benchmark shares: runs by turns, and ratios of what they took."""

from __future__ import annotations

import pytest

from bench.harness import Timing, by_turns


def test_a_ratio_is_the_median_over_rounds() -> None:
    slow, fast = Timing((2.0, 4.0, 9.0), (1.0, 1.0, 1.0)), Timing((1.0, 4.0, 3.0), (1.0, 1.0, 1.0))
    assert slow.times(fast) == 2.0  # of 2, 1 and 3; the medians' would be 4 / 3
    assert fast.times(slow) == 0.5


def test_a_ratio_with_a_single_run_is_that_of_medians() -> None:
    many, single = Timing((2.0, 4.0, 9.0), (1.0, 1.0, 1.0)), Timing((8.0,), (8.0,))
    assert single.times(many) == 2.0
    assert many.times(single) == 0.5
    with pytest.raises(ValueError, match="shorter"):
        many.times(Timing((1.0, 1.0), (1.0, 1.0)))


def test_calls_go_by_turns_each_after_one_of_its_own() -> None:
    order: list[str] = []
    timings = by_turns([lambda: order.append("a"), lambda: order.append("b")], runs=3)
    assert order == ["a", "a", "b", "b"] * 3
    assert [timing.runs for timing in timings] == [3, 3]
