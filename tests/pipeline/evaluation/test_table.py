"""The figures of an evaluation, worked out by hand."""

from __future__ import annotations

import math

import pytest

from hermes_pipeline.evaluation.table import Graded, summarize


def graded(key: str, score: float, *, overlong: bool = False, thinking: int | None = 4) -> Graded:
    return Graded(key, score, overlong, completion_tokens=10, thinking_tokens=thinking)


def test_the_score_is_the_mean_over_items_of_the_mean_over_draws() -> None:
    figures = summarize([graded("a", 1), graded("a", 0), graded("b", 1)], failed=0)
    assert figures.score == pytest.approx((0.5 + 1) / 2)
    assert (figures.items, figures.answers) == (2, 3)


def test_the_standard_error_is_that_of_items() -> None:
    figures = summarize([graded(k, s) for k, s in zip("abcd", (1, 1, 1, 0), strict=True)], failed=0)
    assert figures.standard_error == pytest.approx(0.5 / math.sqrt(4))


def test_failures_are_counted_and_not_scored() -> None:
    figures = summarize([graded("a", 1)], failed=3)
    assert (figures.score, figures.failed, figures.standard_error) == (1.0, 3, None)


def test_overlong_answers_are_a_share_of_all() -> None:
    figures = summarize([graded("a", 0, overlong=True), graded("b", 1)], failed=0)
    assert figures.overlong == 0.5


def test_thinking_is_left_out_where_one_answer_was_not_counted() -> None:
    assert summarize([graded("a", 1), graded("b", 1)], failed=0).thinking_tokens == 4
    assert summarize([graded("a", 1, thinking=None)], failed=0).thinking_tokens is None


def test_no_answers_make_no_score() -> None:
    figures = summarize([], failed=2)
    assert (figures.score, figures.overlong, figures.failed) == (None, None, 2)
