"""Dealing the rows of an epoch to ranks, and what ranks lose by waiting, before and after."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from bench.harness import Result, Timing, measure
from bench.lengths import ROW_LENGTH, hermes_lengths
from hermes_core import deal, pack, row_costs
from hermes_core.dealing import in_order
from hermes_pipeline.training.shape import BASES

SHARE = 1.087  # of Hermes 4's samples: 1.1 M rows
BASE = "qwen3_14b"  # of recipes/hermes4_14b.toml
PLAIN_ROWS = 49_152  # enough for a Python loop; whole steps of each size
# Ranks, micro-batches, rows of a share: a large step, then the report's 384 rows.
SIZES = ((192, 16, 1), (192, 4, 1), (96, 4, 1), (192, 2, 1), (96, 2, 2), (96, 1, 4))

Costs = NDArray[np.float64]


def run() -> Iterator[Result | str]:
    """Time for one epoch of 1.1 M rows, and the imbalance of its steps."""
    lengths = hermes_lengths(SHARE)
    packing = pack(lengths, row_length=ROW_LENGTH)
    linear, quadratic = BASES[BASE].training_flops()
    costs = row_costs(packing, lengths, linear=linear, quadratic=quadratic)
    gate(costs)
    yield "gate passed: every row once, and rows of single shares as in a loop over them"
    yield f"{packing.rows:,} rows of {ROW_LENGTH:,} tokens, FLOPs of {BASE}\n"
    timing = measure(lambda: row_costs(packing, lengths, linear=linear, quadratic=quadratic))
    yield told("row_costs", len(costs), timing, f"{len(packing.samples):,} samples")
    for sizes in SIZES:
        yield dealt(costs, *sizes)
    ranks, micro_batches, _ = SIZES[0]
    timing = measure(lambda: plainly(costs[:PLAIN_ROWS], ranks, micro_batches), runs=5)
    yield told(f"loop in Python {ranks} x {micro_batches}", PLAIN_ROWS, timing, "the same shares")


def dealt(costs: Costs, ranks: int, micro_batches: int, local_rows: int) -> Result:
    """What `deal` takes, and the share of time that is lost in the plan's order and as dealt."""
    sizes = {"ranks": ranks, "micro_batches": micro_batches, "local_rows": local_rows}
    before, after = in_order(costs, **sizes).imbalance(), deal(costs, **sizes).imbalance()
    return told(
        f"deal {ranks} x {micro_batches} x {local_rows}",
        len(costs),
        measure(lambda: deal(costs, **sizes)),
        f"lost at micro-batches {before.micro_batch:.2%} -> {after.micro_batch:.2%}, "
        f"at steps {before.step:.2%} -> {after.step:.2%}",
    )


def told(backend: str, rows: int, timing: Timing, notes: str) -> Result:
    return Result(
        op="dealing",
        shape=f"{rows} rows of {ROW_LENGTH}",
        dtype="float64",
        backend=backend,
        unit="ms",
        value=1e3 * timing.cpu_s,
        spread=(1e3 * timing.fastest_s, 1e3 * timing.slowest_s),
        runs=timing.runs,
        notes=f"{rows:,} rows; {notes}",
    )


def gate(costs: Costs) -> None:
    """Stop unless every row is dealt once, and shares of one row go where a loop puts them."""
    for ranks, micro_batches, local_rows in SIZES:
        rows = deal(costs, ranks=ranks, micro_batches=micro_batches, local_rows=local_rows).rows
        if not np.array_equal(np.sort(rows[rows >= 0]), np.arange(len(costs))):
            raise SystemExit(f"deal on {ranks} x {micro_batches} x {local_rows} loses rows")
        some = costs[:PLAIN_ROWS]
        if local_rows == 1:
            rows = deal(some, ranks=ranks, micro_batches=micro_batches).rows
            if rows.reshape(-1).tolist() != plainly(some, ranks, micro_batches):
                raise SystemExit(f"deal on {ranks} x {micro_batches} differs from the loop")


def plainly(costs: Costs, ranks: int, micro_batches: int) -> list[int]:
    """The rows of whole steps in plain Python, one row a share."""
    values, size, dealt = costs.tolist(), ranks * micro_batches, []
    for first in range(0, len(values), size):
        falling = sorted(range(first, first + size), key=lambda row: -values[row])
        totals = [0.0] * ranks
        for start in range(0, size, ranks):
            takers = sorted(range(ranks), key=totals.__getitem__)
            taken = [0] * ranks
            for rank, row in zip(takers, falling[start : start + ranks], strict=True):
                taken[rank] = row
                totals[rank] += values[row]
            dealt += taken
    return dealt
