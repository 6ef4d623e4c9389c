"""The chain benchmark: frozen items, and answers that pass and fail."""

from __future__ import annotations

import pytest

from hermes_pipeline.errors import UserError
from hermes_pipeline.evaluation.benchmarks import BENCHMARKS, find_benchmark
from hermes_pipeline.evaluation.benchmarks.chain import CHAIN
from hermes_pipeline.records import Trace

FIRST = [
    ("a=6; b=a-4; c=b+7; b c?", "2 9"),
    ("a=9; b=a-9; c=b+7; d=c-5; e=d+2; f=e-7; g=f-3; f g?", "7 4"),
    ("a=9; b=a-9; c=b-9; b c?", "0 1"),
    ("a=1; b=a+3; c=b-4; d=c+5; e=d+5; f=e-2; e f?", "0 8"),
    ("a=9; b=a*3; c=b-4; d=c+3; e=d*3; f=e-9; g=f+8; f g?", "9 7"),
    ("a=5; b=a-1; c=b*7; b c?", "4 8"),
    ("a=5; b=a-4; c=b-2; d=c-4; e=d+3; f=e+3; e f?", "8 1"),
    ("a=4; b=a*3; c=b+5; d=c+5; c d?", "7 2"),
    ("a=9; b=a-4; c=b*3; d=c-4; e=d+6; d e?", "1 7"),
    ("a=0; b=a+8; c=b-7; b c?", "8 1"),
]


def trace(answer: str) -> Trace:
    return Trace(text=answer, thinking="", answer=answer)


def test_the_first_items_stay_what_they_were() -> None:
    items = [CHAIN.prompt(item) for item in CHAIN.items()][:10]
    assert [(p.key, p.target) for p in items] == FIRST


def test_there_are_400_different_items() -> None:
    assert len({CHAIN.prompt(item).key for item in CHAIN.items()}) == 400


@pytest.mark.parametrize("answer", ["{} {}", " {}  {} "])
def test_the_right_answer_passes(answer: str) -> None:
    prompt = CHAIN.prompt(next(iter(CHAIN.items())))
    boxed = answer.format(*prompt.target.split())
    assert CHAIN.score(trace(f"\\boxed{{{boxed}}}"), prompt).passed


@pytest.mark.parametrize("answer", ["", "{1} {0}", "{0}{1}", "{0}", "{0} {1} {1}"])
def test_other_answers_fail(answer: str) -> None:
    prompt = CHAIN.prompt(next(iter(CHAIN.items())))
    boxed = answer.format(*prompt.target.split())
    assert not CHAIN.score(trace(f"\\boxed{{{boxed}}}"), prompt).passed


def test_benchmarks_are_found_by_name() -> None:
    assert find_benchmark("chain") is CHAIN
    assert all(name == benchmark.name for name, benchmark in BENCHMARKS.items())


def test_an_unknown_benchmark_names_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'chian'; did you mean 'chain'\?.*known: chain"):
        find_benchmark("chian")
