"""Every benchmark by name, one line each."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from hermes_pipeline.errors import UserError
from hermes_pipeline.evaluation.benchmark import Benchmark
from hermes_pipeline.evaluation.benchmarks.chain import CHAIN

BENCHMARKS: Mapping[str, Benchmark[Any]] = MappingProxyType({b.name: b for b in (CHAIN,)})


def find_benchmark(name: str) -> Benchmark[Any]:
    """The benchmark of that name.

    Raises:
        UserError: there is none; the message lists them.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    close = difflib.get_close_matches(name, BENCHMARKS, n=1)
    meant = f"did you mean {close[0]!r}? " if close else ""
    raise UserError(f"unknown benchmark {name!r}; {meant}known: {', '.join(sorted(BENCHMARKS))}")
