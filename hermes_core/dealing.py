"""Rows dealt to ranks and micro-batches, so that ranks which wait for each other have equal work.

Rows have equal tokens, but attention costs the squares of their segments' lengths.

S steps, M micro-batches of a step, R ranks, B rows of a share: what one rank takes in one
micro-batch. N = M * R shares of a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hermes_core.packing import Packing, counted
from hermes_core.samples import check_integer

NO_ROW = -1  # in a last step that has fewer rows than places
MOST = 1 << 24  # rows of a step


class Imbalance(NamedTuple):
    """What ranks lose by waiting for the slowest: its cost / the mean cost of all - 1."""

    micro_batch: float  # where they meet at each micro-batch, as under FSDP
    step: float  # where they meet once a step


@dataclass(frozen=True, slots=True, eq=False)
class Dealing:
    """Which rows each rank takes in which micro-batch.

    Attributes:
        rows: [S, M, R, B] int64, row numbers, rising in a share; `NO_ROW` where a last short
            step has none left.
        costs: [rows] float64, of each row.
    """

    rows: NDArray[np.int64]
    costs: NDArray[np.float64]

    def imbalance(self) -> Imbalance:
        """Mean over the steps; a last short step is left out, unless it is the only one."""
        costs_SMR = np.append(self.costs, 0.0)[self.rows].sum(3)  # NO_ROW, -1, costs nothing
        if self._leaves_out_last:
            costs_SMR = costs_SMR[:-1]
        mean_S = costs_SMR.sum((1, 2)) / costs_SMR.shape[2]
        micro_batch_S = costs_SMR.max(2).sum(1) / mean_S - 1
        step_S = costs_SMR.sum(1).max(1) / mean_S - 1
        return Imbalance(float(micro_batch_S.mean()), float(step_S.mean()))

    def report(self) -> str:
        """The dealing in words and numbers, a few lines for a person."""
        steps, micro_batches, ranks, local_rows = self.rows.shape
        before = in_order(
            self.costs, ranks=ranks, micro_batches=micro_batches, local_rows=local_rows
        ).imbalance()
        after = self.imbalance()
        lines = [
            f"{counted(len(self.costs), 'row')} in {counted(steps, 'step')} of "
            f"{counted(ranks, 'rank')} x {counted(micro_batches, 'micro-batch', 'es')} x "
            f"{counted(local_rows, 'row')}",
            f"ranks that meet at each micro-batch lose {before.micro_batch:.2%} in the plan's "
            f"order, {after.micro_batch:.2%} as dealt",
            f"ranks that meet once a step lose {before.step:.2%} in the plan's order, "
            f"{after.step:.2%} as dealt",
        ]
        if self._leaves_out_last:
            lines.append(f"the last step is left out: {self._rest:,} of {self._step_rows:,} rows")
        return "\n".join(lines)

    @property
    def _step_rows(self) -> int:
        return math.prod(self.rows.shape[1:])

    @property
    def _rest(self) -> int:
        """Rows of a last short step; 0 where all steps are whole."""
        return len(self.costs) % self._step_rows

    @property
    def _leaves_out_last(self) -> bool:
        return self._rest > 0 and len(self.rows) > 1


def row_costs(
    packing: Packing, lengths: ArrayLike, *, linear: float, quadratic: float
) -> NDArray[np.float64]:
    """[rows] the cost of each row: the sum over segments of linear * length + quadratic * length².

    The padding of a row is a segment; a truncated sample counts ``row_length``.

    Args:
        lengths: [N] tokens of each sample that the plan was made from; others are refused where
            totals, or the longest and the shortest, differ.
        linear: of a token by itself, in any unit; FLOPs of training are 6 for each parameter.
        quadratic: of a pair of tokens; FLOPs of training are 6 * layers * model size.

    Raises:
        TypeError: lengths are not integers, or a coefficient is no number.
        ValueError: lengths of another shape, a coefficient out of range, or the plan was made from
            other lengths.
    """
    for name, value in (("linear", linear), ("quadratic", quadratic)):
        if not isinstance(value, int | float | np.number):
            raise TypeError(f"{name} is {value!r}, want a number")
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}, want a finite number, 0 or more")
    if linear == quadratic == 0:
        raise ValueError("linear and quadratic are both 0: every row would cost nothing")
    lengths_P = _packed_lengths(packing, lengths)
    starts = packing.row_offsets[:-1]
    tokens = np.add.reduceat(lengths_P, starts)
    total, fullest = int(tokens.sum()), int(tokens.max(initial=0))
    ends = (int(lengths_P.min()), int(lengths_P.max()))
    if total != packing.tokens or fullest > packing.row_length or ends != (
        packing.shortest, packing.longest
    ):  # fmt: skip
        raise ValueError(
            f"by these lengths the plan holds {total} tokens, {fullest} in its fullest row, in "
            f"samples of {ends[0]} to {ends[1]}, but it has {packing.tokens} in rows of "
            f"{packing.row_length} and samples of {packing.shortest} to {packing.longest}: it was "
            "made from other lengths"
        )
    # In integers, so that every machine deals alike; row_length <= 2**31, so squares fit.
    squares = np.add.reduceat(lengths_P * lengths_P, starts) + (packing.row_length - tokens) ** 2
    costs: NDArray[np.float64] = float(linear) * packing.row_length + float(quadratic) * squares
    _check_sum(costs)
    return costs


def _packed_lengths(packing: Packing, lengths: ArrayLike) -> NDArray[np.int64]:
    """[P] tokens of each packed sample, row after row."""
    values = np.asarray(lengths)
    if values.ndim != 1:
        raise ValueError(f"lengths has shape {list(values.shape)}, want [samples]")
    if values.dtype.kind not in "iu":
        raise TypeError(f"lengths is {values.dtype}, want integers")
    if len(packing.samples) and packing.samples.max() >= len(values):
        raise ValueError(
            f"the plan names sample {packing.samples.max()} but there are {len(values)} lengths: "
            f"it was made from others"
        )
    packed = values[packing.samples]
    if packing.too_long == "truncate":
        return np.where(packed > packing.row_length, packing.row_length, packed.astype(np.int64))
    return packed.astype(np.int64, copy=False)


def deal(costs: ArrayLike, *, ranks: int, micro_batches: int, local_rows: int = 1) -> Dealing:
    """Deal the rows of each step so that ranks meet with equal cost; deterministic.

    A step has ranks * micro_batches * local_rows rows, in the order of ``costs``. Which rows it
    has stays the same, and with it what it computes. A last short step uses no more micro-batches
    than its rows need.

    1. Rows, by falling cost, go to shares in rounds: one to each, the largest to the share with
       the least so far.
    2. Shares, by falling cost, are cut into micro-batches; no other cut of them loses less.
    3. Micro-batch by micro-batch, the largest share goes to the rank with the least so far.

    Args:
        costs: [rows] in any unit, above 0; see `row_costs`.
        ranks: data-parallel processes.
        micro_batches: forward passes of a rank in a step, those of gradient accumulation.
        local_rows: that a rank takes in one forward pass.

    Raises:
        TypeError: costs or sizes are not numbers.
        ValueError: no costs or costs of another shape, one that is not finite and above 0, or sizes
            out of range.
    """
    values, sizes = _check(costs, ranks, micro_batches, local_rows)
    rows = _places(len(values), sizes)
    micro_batches, ranks, local_rows = sizes
    step_rows = math.prod(sizes)
    whole = len(values) // step_rows * step_rows
    if whole:
        dealt = _deal_steps(values[:whole].reshape(-1, step_rows), sizes)
        first = np.arange(0, whole, step_rows)
        rows[: len(first)] = dealt + first[:, None, None, None]
    if rest := len(values) - whole:
        needed = -(-rest // (ranks * local_rows))
        padded = np.zeros((1, needed * ranks * local_rows))
        padded[0, :rest] = values[whole:]
        dealt = _deal_steps(padded, (needed, ranks, local_rows))
        rows[-1, :needed] = np.where(dealt < rest, dealt + whole, NO_ROW)
    return Dealing(rows, values)


def in_order(costs: ArrayLike, *, ranks: int, micro_batches: int, local_rows: int = 1) -> Dealing:
    """The same steps, with rows taken as they come: what `deal` is compared with."""
    values, sizes = _check(costs, ranks, micro_batches, local_rows)
    rows = _places(len(values), sizes)
    rows.reshape(-1)[: len(values)] = np.arange(len(values))
    return Dealing(rows, values)


def _check(
    costs: ArrayLike, ranks: int, micro_batches: int, local_rows: int
) -> tuple[NDArray[np.float64], tuple[int, int, int]]:
    """Costs as float64, and M, R, B."""
    values = np.asarray(costs)
    if values.size == 0:
        raise ValueError("costs is empty: nothing to deal")
    if values.ndim != 1:
        raise ValueError(f"costs has shape {list(values.shape)}, want [rows]")
    if values.dtype.kind not in "iuf":
        raise TypeError(f"costs is {values.dtype}, want numbers")
    bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    if bad.size:
        raise ValueError(f"costs[{bad[0]}] is {values[bad[0]]}, want a finite number above 0")
    ranks = check_integer("ranks", ranks, 1, MOST)
    micro_batches = check_integer("micro_batches", micro_batches, 1, MOST)
    local_rows = check_integer("local_rows", local_rows, 1, MOST)
    _check_sum(values)
    if ranks * micro_batches * local_rows > MOST:
        raise ValueError(
            f"ranks x micro_batches x local_rows is {ranks} x {micro_batches} x {local_rows} = "
            f"{ranks * micro_batches * local_rows} rows a step, want at most {MOST}"
        )
    return values.astype(np.float64), (micro_batches, ranks, local_rows)


def _check_sum(costs: NDArray[Any]) -> None:
    with np.errstate(over="ignore"):
        if not np.isfinite(costs.sum(dtype=np.float64)):
            raise ValueError("costs add up to more than float64 can hold; take a larger unit")


def _places(count: int, sizes: tuple[int, int, int]) -> NDArray[np.int64]:
    """[S, M, R, B] without rows."""
    return np.full((-(-count // math.prod(sizes)), *sizes), NO_ROW, np.int64)


def _deal_steps(costs_SP: NDArray[np.float64], sizes: tuple[int, int, int]) -> NDArray[np.int64]:
    """[S, M, R, B] numbers in [0, P) of the P = M * R * B rows of each step."""
    micro_batches, ranks, local_rows = sizes
    steps, shares = len(costs_SP), micro_batches * ranks
    rows_SP = np.argsort(-costs_SP, axis=1, kind="stable")
    falling_SBN = np.take_along_axis(costs_SP, rows_SP, 1).reshape(steps, local_rows, shares)
    taken_SBN = _largest_to_least(falling_SBN)
    rows_SBN = np.take_along_axis(rows_SP.reshape(steps, local_rows, shares), taken_SBN, 2)

    costs_SN = np.take_along_axis(falling_SBN, taken_SBN, 2).sum(1)
    shares_SN = np.argsort(-costs_SN, axis=1, kind="stable")
    falling_SMR = np.take_along_axis(costs_SN, shares_SN, 1).reshape(steps, micro_batches, ranks)
    taken_SMR = _largest_to_least(falling_SMR)
    shares_SMR = np.take_along_axis(shares_SN.reshape(falling_SMR.shape), taken_SMR, 2)

    dealt_SBN = np.take_along_axis(rows_SBN, shares_SMR.reshape(steps, 1, shares), 2)
    dealt_SMRB = np.moveaxis(dealt_SBN.reshape(steps, local_rows, micro_batches, ranks), 1, 3)
    return np.sort(dealt_SMRB, axis=3)


def _largest_to_least(falling: NDArray[np.float64]) -> NDArray[np.int64]:
    """[S, K, N] which of a round's N costs each of N takers gets, in K rounds of one for each.

    Args:
        falling: [S, K, N] costs, falling inside a round.
    """
    taken = np.empty(falling.shape, np.int64)
    totals = np.zeros((falling.shape[0], falling.shape[2]))
    for k in range(falling.shape[1]):
        takers = np.argsort(totals, axis=1, kind="stable")  # the least so far first
        np.put_along_axis(taken[:, k], takers, np.arange(falling.shape[2])[None], 1)
        totals += np.take_along_axis(falling[:, k], taken[:, k], 1)
    return taken
