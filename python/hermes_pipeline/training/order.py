"""Which rows come when: one order of all rows of all epochs, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from hermes_core import Packing, Rows, Samples, build_rows, pack
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
    """Consecutive rows of the order, built."""

    rows: Rows
    first: int  # number of the first row, counted from the run's first
    tokens: int  # of samples; padding left out


class RowOrder:
    """The rows of a store, epoch after epoch, by a number that counts from the run's start.

    Each epoch is planned for the whole store before anything is divided among ranks, so the
    order depends on the store, the seed and the packing settings alone. The first epoch is what
    `hermes4 pack` shows; later ones exchange samples of equal length, so that a row does not hold
    the same neighbours every time.
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

    def batch(self, first: int, count: int) -> Batch:
        """Rows ``first`` to ``first + count``; they may lie in several epochs."""
        built, tokens = [], 0
        for plan, rows in self._pieces(first, count):
            built.append(self._build(plan, rows))
            tokens += int(self._row_tokens(plan, rows).sum())
        return Batch(_joined(built), first, tokens)

    def sample_ids(self, first: int, count: int) -> list[list[int]]:
        """The samples of each of these rows."""
        return [
            plan.samples[plan.row_offsets[row] : plan.row_offsets[row + 1]].tolist()
            for plan, rows in self._pieces(first, count)
            for row in rows
        ]

    def advance(self, count: int) -> None:
        """All ranks together have consumed ``count`` more rows."""
        position = self.position
        rows, epoch, start = position.rows + count, position.epoch, position.epoch_start
        while rows >= start + self._plan(epoch).rows:
            start, epoch = start + self._plan(epoch).rows, epoch + 1
        self.position = Position(rows, epoch, start)

    def _pieces(self, first: int, count: int) -> Iterator[tuple[Packing, range]]:
        """The plan of each epoch that the rows lie in, and which of its rows they are."""
        epoch, start = self.position.epoch, self.position.epoch_start
        if first < start:
            raise ValueError(f"row {first} lies before the epoch that starts at row {start}")
        while count > 0:
            plan = self._plan(epoch)
            inside = first - start
            here = min(count, plan.rows - inside)
            if here > 0:
                yield plan, range(inside, inside + here)
                first, count = first + here, count - here
            start, epoch = start + plan.rows, epoch + 1

    def _build(self, plan: Packing, rows: range) -> Rows:
        try:
            return build_rows(self._samples, plan, rows)
        except ValueError as error:
            raise UserError(f"the store is damaged: {error}") from None

    def _make_plan(self, epoch: int) -> Packing:
        try:
            plan = self._pack(epoch)
        except ValueError as error:
            raise UserError(
                f"the store cannot be packed into rows of {self._row_length}: {error}"
            ) from None
        if plan.rows == 0:
            raise UserError(f"the store has no sample that fits a row of {self._row_length} tokens")
        return plan

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

    def _row_tokens(self, plan: Packing, rows: range) -> NDArray[np.int64]:
        """Tokens of samples in each of these rows."""
        offsets = plan.row_offsets[rows.start : rows.stop + 1]
        lengths = self._samples.lengths[plan.samples[offsets[0] : offsets[-1]]]
        cut = np.minimum(lengths, self._row_length)
        return np.add.reduceat(cut, offsets[:-1] - offsets[0])


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of one epoch's row order; the first epoch's is ``seed`` itself."""
    if epoch == 0:
        return seed
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint32)[0])


def _joined(parts: list[Rows]) -> Rows:
    """Rows of several plans as one batch."""
    if len(parts) == 1:
        return parts[0]
    offsets = np.cumsum([0] + [part.input_ids.size for part in parts])
    return Rows(
        input_ids=np.concatenate([part.input_ids for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        positions=np.concatenate([part.positions for part in parts]),
        cu_seqlens=np.concatenate(
            [np.zeros(1, np.int32)]
            + [
                (part.cu_seqlens[1:] + offset).astype(np.int32)
                for part, offset in zip(parts, offsets, strict=False)
            ]
        ),
        kept=np.concatenate(
            [part.kept + offset for part, offset in zip(parts, offsets, strict=False)]
        ),
    )
