"""The order of rows: of the store, the seed and the packing settings alone."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hermes_core import Rows, Samples, pack
from hermes_core.packing import Strategy
from hermes_pipeline.errors import UserError
from hermes_pipeline.training.order import Position, RowOrder

LENGTHS = np.random.default_rng(3).integers(1, 17, 90).tolist()
ROW = 32
PACKING: Strategy = "best_fit_decreasing"
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
        "packing": PACKING,
        "too_long": "error",
    }
    return RowOrder(samples, seed=seed, **usual | settings)


@pytest.fixture(scope="module")
def samples() -> Samples:
    return samples_of(LENGTHS)


@pytest.fixture(scope="module")
def epoch_rows(samples: Samples) -> int:
    """Rows of one epoch; all epochs have the same number, since lengths decide it."""
    rows = pack(samples.lengths, row_length=ROW, strategy=PACKING, seed=SEED).rows
    assert rows > 8
    return rows


def rows_of(epoch: int, count: int) -> range:
    """The numbers of an epoch's rows."""
    return range(epoch * count, (epoch + 1) * count)


# Ranks, micro-batches and rows of a share, for a step of twelve rows.
DIVISIONS = [(1, 1, 12), (1, 12, 1), (4, 3, 1), (2, 3, 2), (12, 1, 1), (3, 1, 4)]


def steps_of(order: RowOrder, division: tuple[int, int, int], *, steps: int) -> list[Any]:
    """The numbers that are dealt, step after step."""
    ranks, micro_batches, local_rows = division
    dealt = []
    for _ in range(steps):
        dealt.append(
            order.deal_step(ranks=ranks, micro_batches=micro_batches, local_rows=local_rows)
        )
        order.advance(ranks * micro_batches * local_rows)
    return dealt


def costs_of(order: RowOrder, numbers: Any) -> Any:
    """The sum of squared segment lengths of each row."""
    sizes = [np.diff(order.batch([number]).rows.cu_seqlens) for number in numbers.flat]
    return np.array([(size.astype(int) ** 2).sum() for size in sizes]).reshape(numbers.shape)


@pytest.mark.parametrize("division", DIVISIONS)
def test_rows_of_a_step_do_not_depend_on_their_division(
    samples: Samples, epoch_rows: int, division: tuple[int, int, int]
) -> None:
    assert epoch_rows < 60 < 10 * epoch_rows  # the rows lie in several epochs
    for step, dealt in enumerate(steps_of(order_of(samples), division, steps=5)):
        assert dealt.shape == (division[1], division[0], division[2])
        assert sorted(dealt.flat) == list(range(12 * step, 12 * step + 12))


def test_row_holds_the_same_wherever_it_is_dealt(samples: Samples, epoch_rows: int) -> None:
    order, first = order_of(samples), epoch_rows - 3
    order.advance(first)  # a step over an epoch boundary
    whole = order.batch(range(first, first + 12)).rows
    for share in order.deal_step(ranks=2, micro_batches=3, local_rows=2).reshape(-1, 2):
        rows = order.batch(share).rows
        for name in ("input_ids", "labels", "positions"):
            expected = getattr(whole, name)[share - first]
            np.testing.assert_array_equal(getattr(rows, name), expected)


def test_ranks_of_a_step_are_dealt_equal_work(samples: Samples) -> None:
    before, after = 0, 0
    order = order_of(samples)
    for step in steps_of(order_of(samples), (4, 3, 1), steps=4):
        costs, plain = costs_of(order, step), costs_of(order, np.sort(step, None).reshape(3, 4, 1))
        after += costs.max(axis=1).sum()
        before += plain.max(axis=1).sum()
    assert after < before


def test_heaviest_rows_of_a_step_are_dealt_to_one_micro_batch(samples: Samples) -> None:
    order = order_of(samples)
    (step,) = steps_of(order_of(samples), (4, 3, 1), steps=1)
    costs = costs_of(order, step).reshape(3, 4)
    assert costs[0].min() >= costs[1].max()
    assert costs[1].min() >= costs[2].max()


def test_step_is_dealt_alike_after_a_resumption(samples: Samples, epoch_rows: int) -> None:
    straight = order_of(samples)
    steps_of(straight, (4, 3, 1), steps=2 * epoch_rows // 12)
    resumed = order_of(samples)
    resumed.position = straight.position
    ours, theirs = (steps_of(order, (4, 3, 1), steps=2) for order in (resumed, straight))
    np.testing.assert_array_equal(ours, theirs)


def test_step_of_several_epochs_is_dealt(samples: Samples, epoch_rows: int) -> None:
    order = order_of(samples)
    dealt = order.deal_step(ranks=4, micro_batches=epoch_rows, local_rows=1)
    assert sorted(dealt.flat) == list(range(4 * epoch_rows))


def test_batch_over_an_epoch_boundary_joins_segments_and_kept_positions(
    samples: Samples, epoch_rows: int
) -> None:
    order = order_of(samples)
    joined = order.batch(range(epoch_rows - 2, epoch_rows + 2)).rows
    singles = [order.batch([row]).rows for row in range(epoch_rows - 2, epoch_rows + 2)]
    ends = [one.cu_seqlens[1:] + ROW * number for number, one in enumerate(singles)]
    np.testing.assert_array_equal(joined.cu_seqlens, np.concatenate([[0], *ends]))
    kept = [one.kept + ROW * number for number, one in enumerate(singles)]
    np.testing.assert_array_equal(joined.kept, np.concatenate(kept))


@pytest.mark.parametrize("first", [0, -2])
def test_batch_is_built_in_the_memory_it_is_given(
    samples: Samples, epoch_rows: int, first: int
) -> None:
    order, out = order_of(samples), Rows.empty(4, ROW)
    numbers = range(epoch_rows + first, epoch_rows + first + 4)
    expected = order.batch(numbers).rows
    got = order.batch(numbers, out=out).rows
    for name in ("input_ids", "labels", "positions", "cu_seqlens", "kept"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
    assert got.kept_count == expected.kept_count == len(expected.kept)
    assert np.shares_memory(got.labels, out.labels)
    assert np.shares_memory(got.cu_seqlens, out.cu_seqlens)


def test_batch_counts_the_tokens_of_samples(samples: Samples, epoch_rows: int) -> None:
    batch = order_of(samples).batch(range(epoch_rows))
    assert batch.tokens == sum(LENGTHS)
    assert batch.tokens < batch.rows.input_ids.size


def test_first_epoch_is_the_plan_that_pack_makes(samples: Samples, epoch_rows: int) -> None:
    plan = pack(samples.lengths, row_length=ROW, strategy=PACKING, seed=SEED)
    rows = [ids.tolist() for ids in np.split(plan.samples, plan.row_offsets[1:-1])]
    assert order_of(samples).sample_ids(range(epoch_rows)) == rows


@pytest.mark.parametrize("epoch", range(3))
def test_epoch_holds_every_sample_once(samples: Samples, epoch_rows: int, epoch: int) -> None:
    rows = order_of(samples).sample_ids(rows_of(epoch, epoch_rows))
    assert sorted(chain.from_iterable(rows)) == list(range(len(LENGTHS)))


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40),
    too_long=st.sampled_from(["drop", "truncate"]),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 2**31 - 1),
)
@example(lengths=[6, 7, 10, 10, 10, 17], too_long="drop", epoch=1, seed=0)  # exact gap: one fewer
def test_epoch_fills_its_rows_with_whole_samples(
    lengths: list[int], too_long: str, epoch: int, seed: int
) -> None:
    fitting = [number for number, length in enumerate(lengths) if length <= ROW]
    expected = fitting if too_long == "drop" else list(range(len(lengths)))
    if not expected:
        return
    order = order_of(samples_of(lengths), seed=seed, too_long=too_long)
    plan = pack(lengths, row_length=ROW, strategy=PACKING, too_long=too_long)  # type: ignore[arg-type]
    count = plan.rows
    order.advance(epoch * count)
    batch = order.batch(rows_of(epoch, count))
    tokens = batch.rows.input_ids[batch.rows.labels >= 0].tolist()
    wanted = {number: min(lengths[number], ROW) - 1 for number in expected}  # last: no label
    assert Counter(tokens) == Counter({k: n for k, n in wanted.items() if n})
    assert batch.tokens == sum(min(lengths[number], ROW) for number in expected)


def test_later_epochs_come_in_another_order(samples: Samples, epoch_rows: int) -> None:
    order = order_of(samples)
    epochs = [order.sample_ids(rows_of(epoch, epoch_rows)) for epoch in range(3)]
    firsts = [[row[0] for row in rows] for rows in epochs]
    assert firsts[0] != firsts[1] != firsts[2] != firsts[0]


def test_later_epochs_give_samples_other_neighbours(samples: Samples, epoch_rows: int) -> None:
    order = order_of(samples)
    epochs = [
        {frozenset(row) for row in order.sample_ids(rows_of(epoch, epoch_rows))}
        for epoch in range(3)
    ]
    for one, other in [(0, 1), (0, 2), (1, 2)]:
        assert len(epochs[one] & epochs[other]) < epoch_rows / 4


def test_later_epochs_fill_rows_alike(samples: Samples, epoch_rows: int) -> None:
    order = order_of(samples)
    filled = [
        sorted(
            sorted(LENGTHS[number] for number in row)
            for row in order.sample_ids(rows_of(epoch, epoch_rows))
        )
        for epoch in range(2)
    ]
    assert filled[0] == filled[1]


def test_other_seed_gives_another_order(samples: Samples, epoch_rows: int) -> None:
    one, other = order_of(samples), order_of(samples, seed=SEED + 1)
    for epoch in range(2):
        numbers = rows_of(epoch, epoch_rows)
        assert one.sample_ids(numbers) != other.sample_ids(numbers)


@pytest.mark.parametrize("before", [-1, 0, 1])
def test_position_goes_on_at_an_epoch_boundary(
    samples: Samples, epoch_rows: int, before: int
) -> None:
    straight = order_of(samples)
    stop = 2 * epoch_rows + before
    straight.advance(stop)
    resumed = order_of(samples)
    resumed.position = Position(stop, straight.position.epoch, straight.position.epoch_start)
    numbers = range(stop, stop + 5)
    expected = order_of(samples).sample_ids(numbers)
    assert straight.sample_ids(numbers) == resumed.sample_ids(numbers) == expected
    assert straight.position.epoch == (2 if before >= 0 else 1)


def test_rows_before_the_epoch_are_refused(samples: Samples, epoch_rows: int) -> None:
    order = order_of(samples)
    order.advance(epoch_rows)
    with pytest.raises(ValueError, match=f"row {epoch_rows - 1} lies before the epoch"):
        order.batch([epoch_rows - 1])


def test_rows_that_do_not_rise_are_refused(samples: Samples) -> None:
    with pytest.raises(ValueError, match=r"rows \[3, 1\] do not rise"):
        order_of(samples).batch([3, 1])


def test_sample_longer_than_a_row_is_a_mistake_of_the_user() -> None:
    with pytest.raises(UserError, match=f"cannot be packed into rows of {ROW}"):
        order_of(samples_of([3, ROW + 1])).batch([0])
