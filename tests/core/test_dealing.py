"""Dealing: the rows of a step stay its rows, and ranks that meet have equal cost."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hermes_core import Packing, deal, pack, row_costs
from hermes_core.dealing import NO_ROW, Dealing, in_order

Sizes = dict[str, int]
# Parameters, layers and width of Qwen3 14B, rows of the report.
LINEAR, QUADRATIC, ROW_LENGTH = 6 * 14_768_307_200, 6 * 40 * 5120, 16_384

costs_of_rows = st.lists(st.integers(1, 9) | st.floats(0.5, 50), min_size=1, max_size=60)
all_sizes = st.fixed_dictionaries(
    {name: st.integers(1, 5) for name in ("ranks", "micro_batches", "local_rows")}
)


def plainly(costs: list[float], ranks: int, micro_batches: int, local_rows: int) -> list[Any]:
    """The rules of `deal` in plain Python: rows[step][micro-batch][rank], without `NO_ROW`."""
    size, steps = ranks * micro_batches * local_rows, []
    for first in range(0, len(costs), size):
        left = list(range(first, min(first + size, len(costs))))
        needed = math.ceil(len(left) / (ranks * local_rows))
        left.sort(key=lambda row: (-costs[row], row))
        shares: list[list[int]] = [[] for _ in range(needed * ranks)]
        while left:
            turn, left = left[: len(shares)], left[len(shares) :]
            takers = sorted(range(len(shares)), key=lambda n: (cost_of(shares[n], costs), n))
            for taker, row in zip(takers, turn, strict=False):
                shares[taker].append(row)
        shares.sort(key=lambda share: -cost_of(share, costs))
        totals, step = [0.0] * ranks, []
        for start in range(0, len(shares), ranks):
            taken = dict(zip(by_total(totals), shares[start : start + ranks], strict=True))
            totals = [totals[rank] + cost_of(taken[rank], costs) for rank in range(ranks)]
            step.append([sorted(taken[rank]) for rank in range(ranks)])
        empty: list[list[int]] = [[] for _ in range(ranks)]
        steps.append(step + [empty] * (micro_batches - needed))
    return steps


def cost_of(rows: list[int], costs: list[float]) -> float:
    """The sum in the order in which rows were taken."""
    total = 0.0
    for row in rows:
        total += costs[row]
    return total


def by_total(totals: list[float]) -> list[int]:
    return sorted(range(len(totals)), key=lambda rank: (totals[rank], rank))


def rows_of(dealing: Dealing) -> list[Any]:
    return [
        [[[n for n in share if n != NO_ROW] for share in ranks] for ranks in step]
        for step in dealing.rows.tolist()
    ]


def shuffled_costs(count: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Costs of packed rows: few are one long sample, most are several."""
    return 1.0 + 0.23 * np.random.default_rng(seed).beta(2, 3, count)


def hermes_costs(samples: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of the rows of log-normal lengths like the report's, by the FLOPs of its 14B model."""
    rng = np.random.default_rng(0)
    reasoning = rng.lognormal(math.log(4_974) - 0.32, 0.8, samples * 7 // 10)
    others = rng.lognormal(math.log(995) - 0.45, 0.95, samples * 3 // 10)
    lengths = np.concatenate([reasoning, others]).astype(np.int64) + 1
    packing = pack(lengths, row_length=ROW_LENGTH, too_long="drop")
    return row_costs(packing, lengths, linear=LINEAR, quadratic=QUADRATIC)


# What a row costs.


def test_cost_of_a_row_by_hand() -> None:
    packing = pack([7, 3, 6], row_length=10, seed=None)
    assert packing.samples.tolist() == [0, 1, 2]  # rows [7, 3] and [6], 4 of padding
    costs = row_costs(packing, [7, 3, 6], linear=100, quadratic=2)
    assert costs.tolist() == [1000 + 2 * (49 + 9), 1000 + 2 * (36 + 16)]


def test_truncated_sample_costs_a_whole_row() -> None:
    packing = pack([12, 6], row_length=10, too_long="truncate", seed=None)
    costs = row_costs(packing, [12, 6], linear=0, quadratic=1)
    assert costs.tolist() == [100, 36 + 16]


def test_dropped_sample_costs_nothing() -> None:
    packing = pack([12, 6], row_length=10, too_long="drop")
    assert row_costs(packing, [12, 6], linear=0, quadratic=1).tolist() == [36 + 16]


def test_longest_row_does_not_overflow() -> None:
    packing = pack([2**31], row_length=2**31)
    costs = row_costs(packing, np.array([2**31], np.uint32), linear=0, quadratic=1)
    assert costs.tolist() == [2.0**62]


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), seed=st.integers(0, 9))
def test_cost_equals_a_loop_over_segments(lengths: list[int], seed: int) -> None:
    packing = pack(lengths, row_length=32, too_long="truncate", seed=seed)
    expected = []
    for row in np.split(packing.samples, packing.row_offsets[1:-1]):
        segments = [min(lengths[sample], 32) for sample in row]
        segments.append(32 - sum(segments))
        expected.append(sum(5 * length + 0.5 * length**2 for length in segments))
    assert row_costs(packing, lengths, linear=5, quadratic=0.5).tolist() == expected


@pytest.fixture
def plan() -> Packing:
    return pack([7, 3, 6], row_length=10)


def test_row_costs_rejects_fewer_lengths(plan: Packing) -> None:
    with pytest.raises(ValueError, match="the plan names sample 2 but there are 2 lengths"):
        row_costs(plan, [7, 3], linear=1, quadratic=1)


def test_row_costs_rejects_other_lengths(plan: Packing) -> None:
    with pytest.raises(ValueError, match=r"the plan holds 15 tokens.* but it has 16 in rows of 10"):
        row_costs(plan, [7, 3, 5], linear=1, quadratic=1)


def test_row_costs_rejects_lengths_in_another_order(plan: Packing) -> None:
    with pytest.raises(ValueError, match=r"13 in its fullest row.* in rows of 10"):
        row_costs(plan, [7, 6, 3], linear=1, quadratic=1)


def test_row_costs_rejects_lengths_that_are_not_integers(plan: Packing) -> None:
    with pytest.raises(TypeError, match="lengths is float64, want integers"):
        row_costs(plan, [7.0, 3.0, 6.0], linear=1, quadratic=1)


def test_row_costs_rejects_lengths_of_another_shape(plan: Packing) -> None:
    with pytest.raises(ValueError, match=r"lengths has shape \[1, 3\], want \[samples\]"):
        row_costs(plan, [[7, 3, 6]], linear=1, quadratic=1)


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
@pytest.mark.parametrize("name", ["linear", "quadratic"])
def test_row_costs_rejects_coefficient(plan: Packing, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}, want a finite number, 0 or more"):
        row_costs(plan, [7, 3, 6], **{"linear": 1.0, "quadratic": 1.0} | {name: value})


def test_costs_past_float64_are_refused(plan: Packing) -> None:
    with pytest.raises(TypeError, match="linear is 'a', want a number"):
        row_costs(plan, [7, 3, 6], linear="a", quadratic=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="costs add up to more than float64 can hold"):
        row_costs(plan, [7, 3, 6], linear=1e308, quadratic=1)
    with pytest.raises(ValueError, match="costs add up to more than float64 can hold"):
        deal([1.7e308] * 8, ranks=2, micro_batches=2)


def test_row_costs_rejects_rows_that_cost_nothing(plan: Packing) -> None:
    with pytest.raises(ValueError, match="linear and quadratic are both 0"):
        row_costs(plan, [7, 3, 6], linear=0, quadratic=0)


# Who takes what.


def test_deal_by_hand() -> None:
    dealing = deal([8, 1, 6, 3], ranks=2, micro_batches=2)
    assert rows_of(dealing) == [[[[0], [2]], [[1], [3]]]]  # costs 8, 6, then 1, 3


def test_deal_of_two_rows_a_share_by_hand() -> None:
    dealing = deal([8, 1, 6, 3], ranks=2, micro_batches=1, local_rows=2)
    assert rows_of(dealing) == [[[[0, 1], [2, 3]]]]  # costs 9, 9


def test_equal_costs_go_by_row_number() -> None:
    assert rows_of(deal([1] * 4, ranks=2, micro_batches=2)) == [[[[0], [1]], [[2], [3]]]]


@settings(max_examples=300)
@given(costs=costs_of_rows, sizes=all_sizes)
def test_deal_equals_its_plain_twin(costs: list[float], sizes: Sizes) -> None:
    assert rows_of(deal(costs, **sizes)) == plainly(costs, **sizes)


@given(costs=costs_of_rows, sizes=all_sizes)
def test_each_step_keeps_its_rows(costs: list[float], sizes: Sizes) -> None:
    size = math.prod(sizes.values())
    for step, rows in enumerate(deal(costs, **sizes).rows):
        expected = range(step * size, min((step + 1) * size, len(costs)))
        assert sorted(rows[rows != NO_ROW].tolist()) == list(expected)


@given(costs=costs_of_rows, sizes=all_sizes)
def test_rows_rise_inside_a_share(costs: list[float], sizes: Sizes) -> None:
    for share in deal(costs, **sizes).rows.reshape(-1, sizes["local_rows"]).tolist():
        taken = [row for row in share if row != NO_ROW]
        assert share == sorted(taken) + [NO_ROW] * (len(share) - len(taken))


@given(costs=costs_of_rows, sizes=all_sizes)
def test_short_step_uses_no_more_micro_batches_than_it_needs(
    costs: list[float], sizes: Sizes
) -> None:
    dealing = deal(costs, **sizes)
    rest = len(costs) - (len(dealing.rows) - 1) * math.prod(sizes.values())
    used = (dealing.rows[-1] != NO_ROW).any(axis=(1, 2))
    needed = math.ceil(rest / (sizes["ranks"] * sizes["local_rows"]))
    assert used.tolist() == [True] * needed + [False] * (sizes["micro_batches"] - needed)


@given(costs=st.lists(st.integers(1, 30), min_size=6, max_size=6))
def test_no_order_of_rows_loses_less_at_micro_batches(costs: list[int]) -> None:
    best = min(
        in_order(some, ranks=2, micro_batches=3).imbalance().micro_batch
        for some in set(permutations(costs))
    )
    assert deal(costs, ranks=2, micro_batches=3).imbalance().micro_batch == pytest.approx(best)


@given(costs=st.lists(st.integers(1, 30), min_size=6, max_size=6))
def test_no_pairs_lose_less(costs: list[int]) -> None:
    best = min(
        in_order(some, ranks=3, micro_batches=1, local_rows=2).imbalance().step
        for some in set(permutations(costs))
    )
    dealing = deal(costs, ranks=3, micro_batches=1, local_rows=2)
    assert dealing.imbalance().step == pytest.approx(best)


@given(costs=costs_of_rows, sizes=all_sizes)
def test_ranks_differ_over_a_step_no_more_than_in_one_micro_batch(
    costs: list[float], sizes: Sizes
) -> None:
    dealing = deal(costs, **sizes)
    costs_SMR = np.append(dealing.costs, 0)[dealing.rows].sum(3)
    inside = np.ptp(costs_SMR, axis=2).max(1)
    assert (np.ptp(costs_SMR.sum(1), axis=1) <= inside + 1e-9).all()


@pytest.mark.parametrize("sizes", [(2, 1, 1), (8, 4, 1), (8, 1, 4), (5, 3, 2), (64, 2, 1)])
def test_dealt_rows_lose_less_than_shuffled_ones(sizes: tuple[int, int, int]) -> None:
    ranks, micro_batches, local_rows = sizes
    for seed in range(20):
        costs = shuffled_costs(20 * math.prod(sizes), seed)
        options = {"ranks": ranks, "micro_batches": micro_batches, "local_rows": local_rows}
        before, after = in_order(costs, **options).imbalance(), deal(costs, **options).imbalance()
        assert after.micro_batch <= before.micro_batch
        assert after.step <= before.step


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
def test_unit_of_cost_does_not_matter(factor: float) -> None:
    costs = shuffled_costs(200)
    one, other = (deal(c, ranks=4, micro_batches=3, local_rows=2) for c in (costs, costs * factor))
    np.testing.assert_array_equal(one.rows, other.rows)
    assert one.imbalance() == pytest.approx(other.imbalance())


def test_integers_are_dealt_like_the_same_floats() -> None:
    costs = np.random.default_rng(1).integers(1, 100, 64)
    one, other = (deal(c, ranks=4, micro_batches=4) for c in (costs, costs.astype(np.float64)))
    np.testing.assert_array_equal(one.rows, other.rows)


def test_costs_are_left_as_they_are() -> None:
    costs = shuffled_costs(24)
    costs.flags.writeable = False
    before = costs.copy()
    deal(costs, ranks=4, micro_batches=3)
    np.testing.assert_array_equal(costs, before)


# What is lost.


def test_imbalance_by_hand() -> None:
    imbalance = in_order([8, 1, 6, 3], ranks=2, micro_batches=2).imbalance()
    # Meeting twice: 8 + 6 for a mean of 4.5 + 4.5. Meeting once: 8 + 6 against 1 + 3.
    assert imbalance.micro_batch == pytest.approx(14 / 9 - 1)
    assert imbalance.step == pytest.approx(14 / 9 - 1)


def test_imbalance_of_dealt_rows_by_hand() -> None:
    imbalance = deal([8, 1, 6, 3], ranks=2, micro_batches=2).imbalance()
    assert imbalance.micro_batch == pytest.approx((8 + 3) / 9 - 1)
    assert imbalance.step == pytest.approx(0)  # 8 + 1 and 6 + 3


def test_imbalance_is_the_mean_over_steps() -> None:
    imbalance = in_order([1, 3, 5, 5], ranks=2, micro_batches=1).imbalance()
    assert imbalance == pytest.approx((0.25, 0.25))


def test_short_last_step_is_left_out_of_the_imbalance() -> None:
    whole = in_order([1, 3], ranks=2, micro_batches=1).imbalance()
    assert in_order([1, 3, 9], ranks=2, micro_batches=1).imbalance() == whole


def test_short_step_that_is_alone_counts() -> None:
    assert deal([9], ranks=2, micro_batches=3).imbalance() == pytest.approx((1, 1))


def test_one_rank_waits_for_nobody() -> None:
    assert deal(shuffled_costs(30), ranks=1, micro_batches=5).imbalance() == pytest.approx((0, 0))


def test_report_tells_before_and_after() -> None:
    assert deal([8, 1, 6, 3, 5], ranks=2, micro_batches=2).report().splitlines() == [
        "5 rows in 2 steps of 2 ranks x 2 micro-batches x 1 row",
        "ranks that meet at each micro-batch lose 55.56% in the plan's order, 22.22% as dealt",
        "ranks that meet once a step lose 55.56% in the plan's order, 0.00% as dealt",
        "the last step is left out: 1 of 4 rows",
    ]


def test_hermes_rows_on_192_ranks_lose_little() -> None:
    costs = hermes_costs(150_000)
    sizes = {"ranks": 192, "micro_batches": 16}
    before, after = in_order(costs, **sizes).imbalance(), deal(costs, **sizes).imbalance()
    assert before.micro_batch > 0.1
    assert before.step > 0.025
    assert after.micro_batch <= 0.007
    assert after.step <= 0.0035


@pytest.mark.parametrize(
    ("sizes", "micro_batch", "step"),
    [((96, 4, 1), 0.029, 0.0035), ((96, 1, 4), 0.0035, 0.0035), ((192, 2, 1), 0.062, 0.026)],
)
def test_hermes_rows_in_steps_of_384(
    sizes: tuple[int, int, int], micro_batch: float, step: float
) -> None:
    ranks, micro_batches, local_rows = sizes
    dealing = deal(
        hermes_costs(60_000), ranks=ranks, micro_batches=micro_batches, local_rows=local_rows
    )
    assert dealing.imbalance().micro_batch <= micro_batch
    assert dealing.imbalance().step <= step


# What is refused.


@pytest.mark.parametrize("cost", [0.0, -1.0, math.nan, math.inf])
def test_deal_rejects_cost(cost: float) -> None:
    with pytest.raises(ValueError, match=rf"costs\[1\] is {cost}, want a finite number above 0"):
        deal([1.0, cost], ranks=1, micro_batches=1)


def test_deal_rejects_no_costs() -> None:
    with pytest.raises(ValueError, match="costs is empty: nothing to deal"):
        deal([], ranks=1, micro_batches=1)


@pytest.mark.parametrize("costs", [["one"], [True]])
def test_deal_rejects_what_are_no_costs(costs: Any) -> None:
    with pytest.raises(TypeError, match=r"costs is .*, want numbers"):
        deal(costs, ranks=1, micro_batches=1)


@pytest.mark.parametrize("costs", [[[1.0]], 1.0])
def test_deal_rejects_costs_of_another_shape(costs: Any) -> None:
    with pytest.raises(ValueError, match=r"costs has shape \[.*\], want \[rows\]"):
        deal(costs, ranks=1, micro_batches=1)


@pytest.mark.parametrize("name", ["ranks", "micro_batches", "local_rows"])
@pytest.mark.parametrize("deal_or_not", [deal, in_order])
def test_size_below_1_is_rejected(name: str, deal_or_not: Any) -> None:
    sizes = {"ranks": 1, "micro_batches": 1, "local_rows": 1} | {name: 0}
    with pytest.raises(ValueError, match=rf"{name} is 0, outside \[1, "):
        deal_or_not([1.0], **sizes)


def test_size_that_is_no_integer_is_rejected() -> None:
    with pytest.raises(TypeError, match=r"ranks is 2\.0, want an integer"):
        deal([1.0], ranks=2.0, micro_batches=1)  # type: ignore[arg-type]


def test_step_of_too_many_rows_is_rejected() -> None:
    with pytest.raises(ValueError, match="8192 x 4096 x 1 = 33554432 rows a step, want at most"):
        deal([1.0], ranks=8192, micro_batches=4096)
