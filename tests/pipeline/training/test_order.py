"""The order of rows: of the store, the seed and the packing settings alone."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hermes_core import Rows, Samples, pack
from hermes_pipeline.errors import UserError
from hermes_pipeline.training.order import Position, RowOrder

LENGTHS = np.random.default_rng(3).integers(1, 17, 90).tolist()
ROW = 32
SEED = 5


def samples_of(lengths: list[int]) -> Samples:
    """Every token is the id of its sample."""
    return Samples.from_lists(
        [[number] * length for number, length in enumerate(lengths)],
        [[True] * length for length in lengths],
    )


def order_of(samples: Samples, *, seed: int = SEED, **settings: Any) -> RowOrder:
    usual: dict[str, Any] = {
        "row_length": ROW,
        "packing": "best_fit_decreasing",
        "too_long": "error",
    }
    return RowOrder(samples, seed=seed, **usual | settings)


@pytest.fixture(scope="module")
def samples() -> Samples:
    return samples_of(LENGTHS)


@pytest.fixture(scope="module")
def epoch_rows(samples: Samples) -> int:
    """Rows of one epoch; all epochs have the same number, since lengths decide it."""
    rows = pack(samples.lengths, row_length=ROW, seed=SEED).rows
    assert rows > 8
    return rows


def consumed(order: RowOrder, *, ranks: int, local_rows: int, passes: int) -> list[Rows]:
    """What ``ranks`` take together, pass after pass, rank after rank."""
    taken = []
    for _ in range(passes):
        first = order.position.rows
        taken += [order.batch(first + rank * local_rows, local_rows).rows for rank in range(ranks)]
        order.advance(ranks * local_rows)
    return taken


def stacked(parts: list[Rows], name: str) -> Any:
    return np.concatenate([getattr(part, name) for part in parts])


@pytest.mark.parametrize(("ranks", "local_rows", "passes"), [(1, 3, 16), (4, 3, 4), (2, 1, 24)])
def test_rows_do_not_depend_on_their_division(
    samples: Samples, epoch_rows: int, ranks: int, local_rows: int, passes: int
) -> None:
    assert epoch_rows < 48 < 10 * epoch_rows  # the rows lie in several epochs
    whole = consumed(order_of(samples), ranks=1, local_rows=48, passes=1)
    parts = consumed(order_of(samples), ranks=ranks, local_rows=local_rows, passes=passes)
    for name in ("input_ids", "labels", "positions"):
        np.testing.assert_array_equal(stacked(parts, name), stacked(whole, name))


def test_batch_over_an_epoch_boundary_joins_segments_and_kept_positions(
    samples: Samples, epoch_rows: int
) -> None:
    order = order_of(samples)
    joined = order.batch(epoch_rows - 2, 4).rows
    singles = [order.batch(row, 1).rows for row in range(epoch_rows - 2, epoch_rows + 2)]
    ends = [one.cu_seqlens[1:] + ROW * number for number, one in enumerate(singles)]
    np.testing.assert_array_equal(joined.cu_seqlens, np.concatenate([[0], *ends]))
    kept = [one.kept + ROW * number for number, one in enumerate(singles)]
    np.testing.assert_array_equal(joined.kept, np.concatenate(kept))


def test_batch_counts_the_tokens_of_samples(samples: Samples, epoch_rows: int) -> None:
    batch = order_of(samples).batch(0, epoch_rows)
    assert batch.tokens == sum(LENGTHS)
    assert batch.tokens < batch.rows.input_ids.size


def test_first_epoch_is_the_plan_that_pack_makes(samples: Samples, epoch_rows: int) -> None:
    plan = pack(samples.lengths, row_length=ROW, seed=SEED)
    rows = [ids.tolist() for ids in np.split(plan.samples, plan.row_offsets[1:-1])]
    assert order_of(samples).sample_ids(0, epoch_rows) == rows


@pytest.mark.parametrize("epoch", range(3))
def test_epoch_holds_every_sample_once(samples: Samples, epoch_rows: int, epoch: int) -> None:
    rows = order_of(samples).sample_ids(epoch * epoch_rows, epoch_rows)
    assert sorted(chain.from_iterable(rows)) == list(range(len(LENGTHS)))


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40),
    too_long=st.sampled_from(["drop", "truncate"]),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 2**31 - 1),
)
def test_epoch_fills_its_rows_with_whole_samples(
    lengths: list[int], too_long: str, epoch: int, seed: int
) -> None:
    fitting = [number for number, length in enumerate(lengths) if length <= ROW]
    expected = fitting if too_long == "drop" else list(range(len(lengths)))
    if not expected:
        return
    order = order_of(samples_of(lengths), seed=seed, too_long=too_long)
    count = pack(lengths, row_length=ROW, too_long=too_long).rows  # type: ignore[arg-type]
    order.advance(epoch * count)
    batch = order.batch(epoch * count, count)
    tokens = batch.rows.input_ids[batch.rows.labels >= 0].tolist()
    wanted = {number: min(lengths[number], ROW) - 1 for number in expected}  # last: no label
    assert Counter(tokens) == Counter({k: n for k, n in wanted.items() if n})
    assert batch.tokens == sum(min(lengths[number], ROW) for number in expected)


def test_later_epochs_come_in_another_order(samples: Samples, epoch_rows: int) -> None:
    order = order_of(samples)
    epochs = [order.sample_ids(epoch * epoch_rows, epoch_rows) for epoch in range(3)]
    firsts = [[row[0] for row in rows] for rows in epochs]
    assert firsts[0] != firsts[1] != firsts[2] != firsts[0]


def test_later_epochs_give_samples_other_neighbours(samples: Samples, epoch_rows: int) -> None:
    order = order_of(samples)
    epochs = [
        {frozenset(row) for row in order.sample_ids(epoch * epoch_rows, epoch_rows)}
        for epoch in range(3)
    ]
    for one, other in [(0, 1), (0, 2), (1, 2)]:
        assert len(epochs[one] & epochs[other]) < epoch_rows / 4


def test_later_epochs_fill_rows_alike(samples: Samples, epoch_rows: int) -> None:
    order = order_of(samples)
    filled = [
        sorted(
            sorted(LENGTHS[number] for number in row)
            for row in order.sample_ids(epoch * epoch_rows, epoch_rows)
        )
        for epoch in range(2)
    ]
    assert filled[0] == filled[1]


def test_other_seed_gives_another_order(samples: Samples, epoch_rows: int) -> None:
    one, other = order_of(samples), order_of(samples, seed=SEED + 1)
    for epoch in range(2):
        first = epoch * epoch_rows
        assert one.sample_ids(first, epoch_rows) != other.sample_ids(first, epoch_rows)


@pytest.mark.parametrize("before", [-1, 0, 1])
def test_position_goes_on_at_an_epoch_boundary(
    samples: Samples, epoch_rows: int, before: int
) -> None:
    straight = order_of(samples)
    stop = 2 * epoch_rows + before
    straight.advance(stop)
    resumed = order_of(samples)
    resumed.position = Position(stop, straight.position.epoch, straight.position.epoch_start)
    expected = order_of(samples).sample_ids(stop, 5)
    assert straight.sample_ids(stop, 5) == resumed.sample_ids(stop, 5) == expected
    assert straight.position.epoch == (2 if before >= 0 else 1)


def test_rows_before_the_epoch_are_refused(samples: Samples, epoch_rows: int) -> None:
    order = order_of(samples)
    order.advance(epoch_rows)
    with pytest.raises(ValueError, match=f"row {epoch_rows - 1} lies before the epoch"):
        order.batch(epoch_rows - 1, 1)


def test_sample_longer_than_a_row_is_a_mistake_of_the_user() -> None:
    with pytest.raises(UserError, match=f"cannot be packed into rows of {ROW}"):
        order_of(samples_of([3, ROW + 1])).batch(0, 1)
