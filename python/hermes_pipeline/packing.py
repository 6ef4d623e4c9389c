"""Samples to rows: the plan of the first epoch, and how evenly its rows can be dealt."""

from __future__ import annotations

from itertools import pairwise
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from hermes_core import Packing, Store, deal, pack, row_costs
from hermes_core.packing import Strategy, TooLong, counted
from hermes_pipeline.errors import UserError

_BAR = 40  # characters


def plan_epoch(
    store: Store,
    *,
    row_length: int,
    strategy: str = "best",
    too_long: str = "error",
    seed: int = 0,
) -> Packing:
    """Return the rows of the first epoch of ``store``; the same for the same arguments.

    Args:
        row_length: tokens in a row.
        strategy: best, guided, exact_gap, windowed, best_fit_decreasing or first_fit_decreasing.
        too_long: samples longer than a row: error, drop or truncate.
        seed: order of the rows.

    Raises:
        UserError: the store cannot be packed so; the message says why.
    """
    check_choices(strategy, too_long)
    if len(store) == 0:
        raise UserError(f"the store {store.folder} has no samples")
    longest = int(store.lengths.max())
    if too_long == "error" and longest > row_length:
        count = int((store.lengths > row_length).sum())
        raise UserError(
            f"{count:,} of {len(store):,} samples are longer than --row-length {row_length} (the "
            f"longest has {longest:,} tokens); choose longer rows, or --too-long drop or truncate"
        )
    try:
        return pack(
            store.lengths,
            row_length=row_length,
            strategy=strategy,  # type: ignore[arg-type] # checked above
            too_long=too_long,  # type: ignore[arg-type]
            seed=seed,
            fingerprint=store.fingerprint,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"the store {store.folder} cannot be packed: {error}") from None


def check_choices(strategy: str, too_long: str) -> None:
    """Refuse what is no strategy, or no way with samples longer than a row.

    Raises:
        UserError: it is not known.
    """
    for name, value, known in (
        ("strategy", strategy, get_args(Strategy)),
        ("too-long", too_long, get_args(TooLong)),
    ):
        if value not in known:
            raise UserError(f"--{name} {value!r} is not known; known: {', '.join(known)}")


def imbalance_report(
    plan: Packing,
    lengths: NDArray[np.int64],
    flops: tuple[int, int],
    *,
    ranks: int,
    micro_batches: int,
) -> str:
    """Return in words what ranks lose by waiting for each other, one row at a time on each.

    Args:
        flops: of each token, and of each square of a segment's length.

    Raises:
        UserError: a step is larger than can be dealt.
    """
    costs = row_costs(plan, lengths, linear=flops[0], quadratic=flops[1])
    try:
        dealing = deal(costs, ranks=ranks, micro_batches=micro_batches)
    except ValueError as error:
        raise UserError(f"--ranks {ranks}, --micro-batches {micro_batches}: {error}") from None
    if plan.rows < ranks * micro_batches:
        return (
            f"{counted(plan.rows, 'row')}: fewer than one step of {counted(ranks, 'rank')} x "
            f"{counted(micro_batches, 'micro-batch', 'es')} has, too few to say what they lose"
        )
    return dealing.report()


def length_histogram(lengths: NDArray[np.int64], row_length: int) -> list[str]:
    """Return one line for each range of lengths: its bounds, samples, share and a bar."""
    last = max(int(lengths.max()), row_length)
    edges = [1]
    while edges[-1] <= last:
        edges.append(edges[-1] * 2)
    # The row length is an edge of its own: what lies past it does not fit.
    edges = sorted({*edges, row_length + 1})
    counts = np.histogram(lengths, bins=edges)[0].tolist()
    bounds = list(pairwise(edges))
    shown = [i for i, count in enumerate(counts) if count]
    top = max(counts)
    lines = []
    for i in range(shown[0], shown[-1] + 1):
        low, high = bounds[i][0], bounds[i][1] - 1
        bar = "█" * -(-counts[i] * _BAR // top)
        mark = "  longer than a row" if low > row_length else ""
        share = counts[i] / len(lengths)
        span = f"{low:,} to {high:,}"
        lines.append(f"{span:>22} {counts[i]:>12,} {share:>7.2%} {bar}{mark}".rstrip())
    return lines
