"""The figures of an evaluation, from its scores."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Graded:
    """What the figures need of one answer."""

    key: str
    score: float
    overlong: bool
    completion_tokens: int
    thinking_tokens: int | None


@dataclass(frozen=True, slots=True)
class Figures:
    """An evaluation in numbers; shares and scores lie in [0, 1]."""

    items: int
    answers: int
    failed: int  # requests without an answer: not in the score
    score: float | None  # mean over items of the mean over their draws; None without answers
    standard_error: float | None  # of that mean, over items; None with fewer than two
    overlong: float | None
    completion_tokens: float | None  # mean of an answer
    thinking_tokens: float | None  # mean of an answer; None where nobody could count


def summarize(graded: Sequence[Graded], *, failed: int) -> Figures:
    """Figures of all the answers of one evaluation.

    The standard error is that of items: draws of one item are no independent answers.
    """
    by_item: dict[str, list[float]] = {}
    for answer in graded:
        by_item.setdefault(answer.key, []).append(answer.score)
    means = [statistics.fmean(scores) for scores in by_item.values()]
    thinking = [a.thinking_tokens for a in graded if a.thinking_tokens is not None]
    return Figures(
        items=len(means),
        answers=len(graded),
        failed=failed,
        score=_mean(means),
        standard_error=statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None,
        overlong=_mean([float(a.overlong) for a in graded]),
        completion_tokens=_mean([a.completion_tokens for a in graded]),
        thinking_tokens=_mean(thinking) if len(thinking) == len(graded) else None,
    )


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
