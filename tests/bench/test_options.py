"""`python -m bench`: each benchmark has its own options, and its help tells them alone."""

from __future__ import annotations

import re
from importlib.util import find_spec

import pytest

from bench.__main__ import BENCHMARKS, MODES, build_parser

OWN = {"attention": {"--static", "--sweep", "--only"}, "loss": {"--static", "--only"}}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help_tells_the_options_of_this_benchmark_alone(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        build_parser().parse_args([name, "--help"])
    told = capsys.readouterr().out
    assert set(re.findall(r"--\w+", told)) == {"--json", "--help"} | OWN.get(name, set())


def test_help_names_every_benchmark_and_the_trial(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        build_parser().parse_args(["--help"])
    told = capsys.readouterr().out
    assert all(re.search(rf"^ +{name} ", told, re.MULTILINE) for name in (*BENCHMARKS, "kills"))


@pytest.mark.parametrize(
    "words", [["loss", "--sweep"], ["rows", "--only", "x"], ["loss", "--static", "--only", "x"], []]
)
def test_options_of_others_are_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        build_parser().parse_args(words)
    assert "error: " in capsys.readouterr().err


def test_every_benchmark_has_its_module() -> None:
    modes = [module for ways in MODES.values() for module, _ in ways.values()]
    assert all(find_spec(f"bench.{module}") for module in (*BENCHMARKS, *modes))
