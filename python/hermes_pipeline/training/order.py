"""Which rows come when: one order of all rows of all epochs, whatever the number of processes.

Shapes: M micro-batches of a step, R ranks, B rows of one rank in one micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

from hermes_core import Packing, Rows, Samples, build_rows, deal, pack, row_costs
from hermes_core.packing import Strategy, TooLong
from hermes_pipeline.errors import UserError


@dataclass(frozen=True, slots=True)
class Position:
    """How far all ranks together have come, and where the epoch they are in began."""

    rows: int = 0
    epoch: int = 0
    epoch_start: int = 0  # number of the epoch's first row, counted from the run's first


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows of the order, built."""

    rows: Rows
    numbers: tuple[int, ...]  # of each row, counted from the run's first
    tokens: int  # of samples; padding left out


class RowOrder:
    """The rows of a store, epoch after epoch, by a number that counts from the run's start.

    Each epoch is planned for the whole store before anything is divided among ranks, so the
    order depends on the store, the seed and the packing settings alone. The first epoch is what
    `hermes4 pack` shows; later ones exchange samples of equal length, so that a row does not hold
    the same neighbours every time. A step takes the next rows of the order, whoever gets which.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        row_length: int,
        packing: Strategy,
        too_long: TooLong,
        seed: int,
        fingerprint: str = "",
    ) -> None:
        self._samples = samples
        self._row_length, self._strategy, self._too_long = row_length, packing, too_long
        self._seed, self._fingerprint = seed, fingerprint
        self.position = Position()
        self._plan = lru_cache(maxsize=2)(self._make_plan)
        self._costs = lru_cache(maxsize=2)(self._make_costs)
        self._rows_of = cache(lambda epoch: self._plan(epoch).rows)

    def batch(
        self, numbers: Sequence[int] | NDArray[np.int64], *, out: Rows | None = None
    ) -> Batch:
        """The rows of these rising numbers, in ``out`` if given; of one epoch or several."""
        pieces = [(self._plan(epoch), rows) for epoch, rows in self._pieces(numbers)]
        tokens = sum(self._tokens(plan, rows) for plan, rows in pieces)
        if len(pieces) == 1:
            built = self._build(*pieces[0], out)
        else:
            whole = Rows.empty(len(numbers), self._row_length) if out is None else out
            built = self._build_joined(pieces, whole)
        return Batch(built, tuple(int(number) for number in numbers), tokens)

    def sample_ids(self, numbers: Sequence[int] | NDArray[np.int64]) -> list[list[int]]:
        """The samples of each row of these rising numbers."""
        return [
            _samples_of(self._plan(epoch), row).tolist()
            for epoch, rows in self._pieces(numbers)
            for row in rows
        ]

    def deal_step(self, *, ranks: int, micro_batches: int, local_rows: int) -> NDArray[np.int64]:
        """[M, R, B] numbers of the next step's rows, so dealt that ranks wait least.

        Which rows the step has does not depend on it.
        """
        first = self.position.rows
        step = np.arange(first, first + ranks * micro_batches * local_rows)
        costs = np.concatenate([self._costs(epoch)[rows] for epoch, rows in self._pieces(step)])
        dealing = deal(costs, ranks=ranks, micro_batches=micro_batches, local_rows=local_rows)
        numbers: NDArray[np.int64] = step[dealing.rows[0]]
        return numbers

    def advance(self, count: int) -> None:
        """All ranks together have consumed ``count`` more rows."""
        position = self.position
        rows, epoch, start = position.rows + count, position.epoch, position.epoch_start
        while rows >= start + self._rows_of(epoch):
            start, epoch = start + self._rows_of(epoch), epoch + 1
        self.position = Position(rows, epoch, start)

    def _pieces(
        self, numbers: Sequence[int] | NDArray[np.int64]
    ) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Each epoch that rows of these rising numbers lie in, and which of its rows they are."""
        left = np.asarray(numbers)
        epoch, start = self.position.epoch, self.position.epoch_start
        if left[0] < start:
            raise ValueError(f"row {left[0]} lies before the epoch that starts at row {start}")
        if (np.diff(left) <= 0).any():
            raise ValueError(f"rows {left.tolist()} do not rise")
        while len(left):
            end = start + self._rows_of(epoch)
            here = int(np.searchsorted(left, end))
            if here:
                yield epoch, left[:here] - start
            left, start, epoch = left[here:], end, epoch + 1

    def _build(self, plan: Packing, rows: NDArray[np.int64], out: Rows | None) -> Rows:
        try:
            return build_rows(self._samples, plan, rows, out=out)
        except ValueError as error:
            raise UserError(f"the store is damaged: {error}") from None

    def _build_joined(self, pieces: list[tuple[Packing, NDArray[np.int64]]], out: Rows) -> Rows:
        """Rows of several plans as one batch."""
        row = segments = kept = 0
        for plan, rows in pieces:
            here, ends = slice(row, row + len(rows)), out.cu_seqlens[segments:]
            columns = (out.input_ids[here], out.labels[here], out.positions[here])
            built = self._build(plan, rows, Rows(*columns, ends))
            np.add(built.cu_seqlens, row * self._row_length, out=built.cu_seqlens)
            row, kept = row + len(rows), kept + built.kept_count
            segments += len(built.cu_seqlens) - 1
        ends = out.cu_seqlens[: segments + 1]
        return Rows(out.input_ids, out.labels, out.positions, ends, kept)

    def _make_plan(self, epoch: int) -> Packing:
        try:
            return self._pack(epoch)
        except ValueError as error:
            raise UserError(
                f"the store cannot be packed into rows of {self._row_length}: {error}"
            ) from None

    def _pack(self, epoch: int) -> Packing:
        seed = epoch_seed(self._seed, epoch)
        lengths = self._samples.lengths
        ids = np.arange(len(lengths))
        if epoch > 0:
            np.random.default_rng(seed).shuffle(ids)
        plan = pack(
            lengths[ids],
            row_length=self._row_length,
            strategy=self._strategy,
            too_long=self._too_long,
            seed=seed,
            fingerprint=self._fingerprint,
        )
        # Packing goes by length alone, so the rows have the same lengths, of other samples.
        return replace(
            plan,
            samples=ids[plan.samples],
            dropped=np.sort(ids[plan.dropped]),
            truncated=np.sort(ids[plan.truncated]),
        )

    def _tokens(self, plan: Packing, rows: NDArray[np.int64]) -> int:
        """Tokens of samples in these rows."""
        lengths = self._samples.lengths[np.concatenate([_samples_of(plan, row) for row in rows])]
        return int(np.minimum(lengths, self._row_length).sum())

    def _make_costs(self, epoch: int) -> NDArray[np.float64]:
        """Of attention alone: all rows have the same number of tokens."""
        return row_costs(self._plan(epoch), self._samples.lengths, linear=0, quadratic=1)


def _samples_of(plan: Packing, row: int) -> NDArray[np.int64]:
    return plan.samples[plan.row_offsets[row] : plan.row_offsets[row + 1]]


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of one epoch's row order; the first epoch's is ``seed`` itself."""
    if epoch == 0:
        return seed
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint32)[0])
