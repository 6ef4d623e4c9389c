"""Plans: equal to the textbook, complete, stable."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hermes_core import Packing, pack
from hermes_core.packing import Strategy, seed_words
from twins.packing import ExactGap, shuffle_rows, xoshiro

STRATEGIES: list[Strategy] = ["best_fit_decreasing", "first_fit_decreasing"]
EVERY: list[Strategy] = [*STRATEGIES, "exact_gap", "best"]


def textbook(
    lengths: list[int], row_length: int, strategy: Strategy, max_samples: int = 1 << 31
) -> list[list[int]]:
    """Each sample by falling length, then id, into the row that the strategy names: O(n * rows)."""
    rows: list[list[int]] = []
    room: list[int] = []
    for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [
            r for r in range(len(rows)) if room[r] >= lengths[sample] and len(rows[r]) < max_samples
        ]
        if not fitting:
            fitting = [len(rows)]
            rows.append([])
            room.append(row_length)
        if strategy == "best_fit_decreasing":
            row = min(fitting, key=lambda r: (room[r], r))
        else:
            row = fitting[0]
        rows[row].append(sample)
        room[row] -= lengths[sample]
    return rows


def rows_of(packing: Packing) -> list[list[int]]:
    bounds = packing.row_offsets.tolist()
    samples = packing.samples.tolist()
    return [samples[a:b] for a, b in pairwise(bounds)]


@st.composite
def instances(draw: st.DrawFn) -> tuple[list[int], int]:
    row_length = draw(st.sampled_from([1, 2, 7, 63, 100, 1001, 16_384, 131_072, 200_003, 1 << 31]))
    kinds = draw(st.integers(1, 12))  # few lengths make long runs, many make short ones
    some = draw(st.lists(st.integers(1, row_length), min_size=kinds, max_size=kinds))
    near = st.integers(max(1, row_length // 5), max(1, row_length // 2))
    length = draw(st.sampled_from([st.sampled_from(some), st.integers(1, row_length), near]))
    return draw(st.lists(length, min_size=1, max_size=150)), row_length


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=400)
@given(instance=instances())
def test_pack_equals_textbook_row_by_row(
    instance: tuple[list[int], int], strategy: Strategy
) -> None:
    lengths, row_length = instance
    packing = pack(lengths, row_length=row_length, strategy=strategy, seed=None)
    assert rows_of(packing) == textbook(lengths, row_length, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=200)
@given(instance=instances(), max_samples=st.integers(1, 12))
def test_pack_equals_textbook_where_a_row_holds_few_samples(
    instance: tuple[list[int], int], strategy: Strategy, max_samples: int
) -> None:
    lengths, row_length = instance
    packing = pack(
        lengths, row_length=row_length, strategy=strategy, seed=None, max_samples=max_samples
    )
    assert rows_of(packing) == textbook(lengths, row_length, strategy, max_samples)
    assert packing.lower_bound >= -(-len(lengths) // max_samples)


@settings(max_examples=300)
@given(instance=instances(), max_samples=st.sampled_from([1, 2, 3, 5, 1 << 30]))
def test_exact_gap_equals_its_plain_twin_row_by_row(
    instance: tuple[list[int], int], max_samples: int
) -> None:
    lengths, row_length = instance
    packing = pack(
        lengths, row_length=row_length, strategy="exact_gap", seed=None, max_samples=max_samples
    )
    got = [[lengths[i] for i in row] for row in rows_of(packing)]
    twin, want = ExactGap(lengths, row_length, max_samples), []
    while twin.falling(row_length):
        want.append(twin.row())
        twin.left.subtract(want[-1])
    assert got == want


@pytest.mark.parametrize("strategy", EVERY)
@settings(max_examples=150)
@given(instance=instances(), max_samples=st.sampled_from([1, 2, 7, None]), seed=st.integers(0, 9))
def test_every_sample_is_packed_once_and_no_row_is_too_long(
    instance: tuple[list[int], int], strategy: Strategy, max_samples: int | None, seed: int
) -> None:
    lengths, row_length = instance
    packing = pack(
        lengths, row_length=row_length, strategy=strategy, max_samples=max_samples, seed=seed
    )
    assert sorted(packing.samples.tolist()) == list(range(len(lengths)))
    for row in rows_of(packing):
        assert row
        assert sum(lengths[i] for i in row) <= row_length
        assert len(row) <= (max_samples or len(lengths))
    assert packing.lower_bound <= packing.rows


@settings(max_examples=150)
@given(instance=instances())
def test_best_has_the_fewest_rows(instance: tuple[list[int], int]) -> None:
    lengths, row_length = instance
    rows = {s: pack(lengths, row_length=row_length, strategy=s).rows for s in EVERY}
    best = pack(lengths, row_length=row_length)
    assert best.rows == min(rows.values())
    assert rows[best.strategy] == best.rows


def test_exact_gap_fills_rows_that_best_fit_cannot() -> None:
    lengths = [6, 5, 3, 3, 3]  # best fit: 6 + 3, 5 + 3, 3; but 6 + 3 and 5 + 3 leave nothing out
    lengths += [7, 4, 4, 5]  # 20 = 7 + 4 + 4 + 5
    plan = pack(lengths, row_length=20, strategy="exact_gap", seed=None)
    assert [sum(lengths[i] for i in row) for row in rows_of(plan)] == [20, 20]


def test_exact_gap_reaches_the_lower_bound_on_lengths_like_those_of_the_report() -> None:
    rng = np.random.default_rng(3)
    mixed = [rng.lognormal(8.2, 0.8, 28_000), rng.lognormal(6.45, 0.95, 12_000)]
    lengths = np.concatenate(mixed).astype(np.int64) + 1
    plan = pack(lengths, row_length=16_384, too_long="drop")
    assert plan.rows == plan.lower_bound
    assert plan.strategy == "exact_gap"


@pytest.mark.parametrize("seed", range(4))
def test_exact_gap_mixes_samples_of_nearly_one_length(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(80, 106, 20_000)
    rows = {s: pack(lengths, row_length=16_384, strategy=s).rows for s in STRATEGIES}
    plan = pack(lengths, row_length=16_384, strategy="exact_gap")
    assert plan.rows == plan.lower_bound < min(rows.values())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("row_length", [50, 1000, 300_000])
def test_pack_equals_textbook_on_thousands_of_samples(row_length: int, strategy: Strategy) -> None:
    rng = np.random.default_rng(row_length)
    for high in (row_length, row_length // 2, row_length // 3):
        lengths = rng.integers(1, high + 1, size=2_500).tolist()
        packing = pack(lengths, row_length=row_length, strategy=strategy, seed=None)
        assert rows_of(packing) == textbook(lengths, row_length, strategy)


@given(instance=instances(), seed=st.integers(0, 1 << 70))
def test_seed_reorders_rows_and_nothing_else(instance: tuple[list[int], int], seed: int) -> None:
    lengths, row_length = instance
    plain = pack(lengths, row_length=row_length, seed=None)
    shuffled = pack(lengths, row_length=row_length, seed=seed)
    assert sorted(rows_of(shuffled)) == sorted(rows_of(plain))
    again = pack(lengths, row_length=row_length, seed=seed)
    assert np.array_equal(again.samples, shuffled.samples)
    assert np.array_equal(again.row_offsets, shuffled.row_offsets)


def test_each_seed_gives_another_order() -> None:
    lengths = np.arange(1, 1001)
    plans = [pack(lengths, row_length=1000, seed=seed).samples.tolist() for seed in range(5)]
    assert all(a != b for i, a in enumerate(plans) for b in plans[:i])


@pytest.mark.parametrize("samples", [1, 2, 5, 1_000, 4_096, 4_097, 32_769, 140_001])
@pytest.mark.parametrize("longest", [1, 30, 1_000, 2_000])
def test_rows_are_shuffled_by_buckets_then_fisher_and_yates(samples: int, longest: int) -> None:
    """A twin in plain Python: any other platform has to give this order."""
    lengths = np.random.default_rng(samples).integers(1, longest + 1, samples)
    rows = rows_of(pack(lengths, row_length=2_000, seed=None))
    for seed in (0, 1 << 100):
        packing = pack(lengths, row_length=2_000, seed=seed)
        assert rows_of(packing) == shuffle_rows(rows, samples, xoshiro(seed_words(seed)))


def test_every_order_is_as_likely_as_another() -> None:
    orders = Counter(
        tuple(pack([5] * 5, row_length=5, seed=seed).samples.tolist()) for seed in range(24_000)
    )
    chi_square = sum((n - 200) ** 2 / 200 for n in orders.values())
    assert len(orders) == 120
    assert chi_square < 119 + 6 * (2 * 119) ** 0.5


@pytest.mark.parametrize("rows", [4_096, 5_000, 30_000])
@pytest.mark.parametrize("seed", [None, 3])
def test_rows_of_many_sizes_stay_whole_when_they_are_laid_out(rows: int, seed: int | None) -> None:
    """Rows of one class each: what is packed together is known."""
    sizes = [1 + i % 23 for i in range(rows)]
    lengths = [(1 << 20) // size for size in sizes for _ in range(size)]
    packing = pack(lengths, row_length=1 << 20, seed=seed, strategy="best_fit_decreasing")
    plain = pack(lengths, row_length=1 << 20, seed=None, strategy="first_fit_decreasing")
    for row in rows_of(packing):
        assert sum(lengths[i] for i in row) <= 1 << 20
    assert sorted(packing.samples.tolist()) == list(range(len(lengths)))
    assert packing.rows == plain.rows


def test_shuffle_of_twelve_rows_is_frozen() -> None:
    packing = pack([5] * 12, row_length=5, seed=1234)
    assert packing.samples.tolist() == [5, 4, 3, 2, 8, 7, 11, 0, 9, 10, 6, 1]


def test_shuffle_puts_each_row_everywhere_equally_often() -> None:
    counts = np.zeros((6, 6))
    for seed in range(3_000):
        counts[np.arange(6), pack([1] * 6, row_length=1, seed=seed).samples] += 1
    assert np.abs(counts - 500).max() < 5 * np.sqrt(500)


@settings(max_examples=150)
@given(instance=instances())
def test_lower_bound_is_l2_of_martello_and_toth(instance: tuple[list[int], int]) -> None:
    lengths, size = instance
    bounds = [-(-sum(lengths) // size)]
    for a in {0, *(length for length in lengths if 2 * length <= size)}:
        alone = [x for x in lengths if x > size - a]
        large = [x for x in lengths if size - a >= x and 2 * x > size]
        small = [x for x in lengths if 2 * x <= size and x >= a]
        rest = sum(small) - (len(large) * size - sum(large))
        bounds.append(len(alone) + len(large) + max(0, -(-rest // size)))
    packing = pack(lengths, row_length=size)
    assert packing.lower_bound == max(bounds)
    assert packing.lower_bound <= packing.rows


def test_lower_bound_sees_samples_that_cannot_share_a_row() -> None:
    assert pack([6] * 10, row_length=10).lower_bound == 10  # by tokens alone it would be 6


def test_plan_counts_what_it_holds() -> None:
    packing = pack([4, 9, 6, 1], row_length=10, seed=None)
    assert rows_of(packing) == [[1, 3], [2, 0]]
    assert (packing.strategy, packing.max_samples) == ("best_fit_decreasing", None)
    assert (packing.rows, packing.tokens, packing.fill) == (2, 20, 1.0)
    assert (packing.longest, packing.shortest, packing.lower_bound) == (9, 1, 2)
    assert packing.samples.dtype == packing.row_offsets.dtype == np.int64


@pytest.mark.parametrize("strategy", EVERY)
def test_dropped_samples_are_listed_and_the_others_packed(strategy: Strategy) -> None:
    lengths = [3, 11, 10, 99, 7, 1 << 40]
    packing = pack(lengths, row_length=10, too_long="drop", strategy=strategy, seed=None)
    assert packing.dropped.tolist() == [1, 3, 5]
    assert rows_of(packing) == [[2], [4, 0]]
    assert packing.truncated.tolist() == []
    assert "3 samples longer than a row dropped" in packing.report()


def test_truncated_samples_are_listed_and_count_as_a_row() -> None:
    packing = pack([3, 11, 10, 99, 7], row_length=10, too_long="truncate", seed=None)
    assert packing.truncated.tolist() == [1, 3]
    assert rows_of(packing) == [[1], [2], [3], [4, 0]]
    assert (packing.tokens, packing.longest, packing.fill) == (40, 10, 1.0)
    assert "2 samples longer than a row truncated" in packing.report()


def test_report_says_rows_fill_and_distance_from_lower_bound() -> None:
    report = pack([6, 6, 6, 5], row_length=12).report()
    assert "2 rows of 12 tokens by best_fit_decreasing" in report
    assert "4 samples of 5 to 6 tokens, 23 in all" in report
    assert "fill 95.8333%; lower bound 2 rows, reached" in report
    report = pack([5, 5, 4, 4, 3, 3], row_length=12, strategy="first_fit_decreasing").report()
    assert "fill 66.6667%; lower bound 2 rows, 1 above it (50.0000%)" in report
    report = pack([5, 5, 4, 4, 3, 3], row_length=12).report()
    assert "2 rows of 12 tokens by exact_gap" in report


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "uint64"])
def test_any_integer_dtype_gives_the_same_plan(dtype: str) -> None:
    lengths = np.arange(1, 101)
    expected = pack(lengths, row_length=128)
    got = pack(lengths.astype(dtype), row_length=128)
    assert np.array_equal(got.samples, expected.samples)


@pytest.mark.parametrize("dtype", ["int16", "uint16", "int64", "uint64"])
@pytest.mark.parametrize("row_length", [1, 2, 50, 64, 65, 1000])
@pytest.mark.parametrize("share", [0.01, 0.6])
def test_samples_too_long_are_told_from_thousands_that_fit(
    share: float, row_length: int, dtype: str
) -> None:
    rng = np.random.default_rng(row_length)
    lengths = rng.integers(1, row_length + 1, 5_003)
    too_long = np.flatnonzero(rng.random(lengths.size) < share)
    lengths[too_long] += rng.integers(row_length, 20 * row_length, too_long.size)
    kept = np.setdiff1d(np.arange(lengths.size), too_long)
    given = lengths.astype(dtype)
    dropped = pack(given, row_length=row_length, too_long="drop", seed=None)
    expected = pack(lengths[kept], row_length=row_length, seed=None)
    assert np.array_equal(dropped.dropped, too_long)
    assert np.array_equal(dropped.samples, kept[expected.samples])
    assert np.array_equal(dropped.row_offsets, expected.row_offsets)
    truncated = pack(given, row_length=row_length, too_long="truncate", seed=None)
    cut = pack(np.minimum(lengths, row_length), row_length=row_length, seed=None)
    assert np.array_equal(truncated.truncated, too_long)
    assert np.array_equal(truncated.samples, cut.samples)


def test_strided_and_read_only_and_big_endian_lengths_are_packed() -> None:
    lengths = np.arange(1, 101)
    expected = pack(lengths, row_length=128).samples
    read_only = lengths.copy()
    read_only.flags.writeable = False
    for same in (np.repeat(lengths, 2)[::2], read_only, lengths.astype(">i4")):
        assert np.array_equal(pack(same, row_length=128).samples, expected)


def test_millions_of_samples_that_are_all_different_pack_quickly() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.permutation(1_000_000) + (1 << 29)  # three to a row, each length once
    packing = pack(lengths, row_length=1 << 31, strategy="first_fit_decreasing")
    assert packing.rows == 333_334
    assert np.array_equal(np.sort(packing.samples), np.arange(1_000_000))


@pytest.mark.parametrize("strategy", EVERY)
def test_samples_of_a_few_tokens_in_rows_of_millions(strategy: Strategy) -> None:
    lengths = np.tile(np.arange(1, 1_001), 300)
    packing = pack(lengths, row_length=1 << 26, strategy=strategy)
    assert packing.rows == packing.lower_bound == 3


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_plan_is_the_same_on_every_instruction_set(isa: str) -> None:
    code = (
        "import numpy as np, hashlib, hermes_core as h;"
        "p = h.pack(np.arange(1, 5001), row_length=5000, seed=3);"
        "print(hashlib.sha256(p.samples).hexdigest())"
    )
    got = subprocess.run(
        [sys.executable, "-P", "-c", code], env={**os.environ, "HERMES_CORE_ISA": isa},
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    expected = pack(np.arange(1, 5001), row_length=5000, seed=3).samples
    assert got.strip() == hashlib.sha256(expected).hexdigest()  # type: ignore[arg-type]
