"""Rows while samples arrive: complete, full, in order, the same however they come."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hermes_core import pack
from hermes_core.packing import seed_words
from hermes_core.windows import PackedRows, WindowedPacker
from twins.packing import seed_for, shuffle, windows, xoshiro

ROW = 16_384
Rows = list[list[int]]


def like_the_report(count: int, seed: int = 0) -> NDArray[np.int64]:
    """Lengths as of Hermes 4's samples: two log-normal kinds, mixed, none over a row."""
    rng = np.random.default_rng(seed)
    kinds = [rng.lognormal(8.19, 0.8, 2 * count), rng.lognormal(6.45, 0.95, count)]
    lengths = np.concatenate(kinds).astype(np.int64) + 1
    lengths = lengths[lengths <= ROW]
    rng.shuffle(lengths)
    return lengths[:count]


def rows_of(*parts: PackedRows) -> Rows:
    return [row.tolist() for part in parts for row in part.split()]


def packed(packer: WindowedPacker, lengths: NDArray[np.int64], chunk: int) -> Rows:
    parts = [packer.add(lengths[i : i + chunk]) for i in range(0, len(lengths), chunk)]
    return rows_of(*parts, packer.finish())


@settings(max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 64), min_size=1, max_size=300),
    window=st.sampled_from([1, 2, 7, 50, 1000]),
    max_samples=st.sampled_from([None, 1, 2, 5]),
    seed=st.integers(0, 3),
)
def test_every_sample_is_in_one_row_and_no_row_is_too_long(
    lengths: list[int], window: int, max_samples: int | None, seed: int
) -> None:
    packer = WindowedPacker(row_length=64, window=window, max_samples=max_samples, seed=seed)
    rows = packed(packer, np.array(lengths), 30)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    for row in rows:
        assert 0 < sum(lengths[sample] for sample in row) <= 64
        assert len(row) <= (max_samples or 64)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1 << 40),
    window=st.sampled_from([1, 30, 130, 200]),
    row_length=st.sampled_from([64, 500, 1_000, 9_973, 1_000_003]),
    share=st.sampled_from([2, 3, 8, 40]),
    max_samples=st.sampled_from([None, 1, 2, 3, 10]),
)
def test_rows_equal_those_of_the_plain_twin(
    seed: int, window: int, row_length: int, share: int, max_samples: int | None
) -> None:
    lengths = np.random.default_rng(seed).integers(1, 1 + row_length // share, 400)
    packer = WindowedPacker(
        row_length=row_length, window=window, max_samples=max_samples, seed=seed
    )
    want = windows(lengths.tolist(), row_length, max_samples or 1 << 31, window, seed_words(seed))
    assert packed(packer, lengths, 150) == want


@pytest.mark.parametrize("dtype", [np.uint32, np.int64])
@pytest.mark.parametrize("longest", [90, 70_000, 1 << 30])  # a slot for each length, and not
@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_a_whole_set_is_shuffled_by_fisher_and_yates_and_packed_as_by_the_twin(
    dtype: type, longest: int, too_long: Any
) -> None:
    lengths = np.random.default_rng(longest).integers(1, longest + 1, 650).astype(dtype)
    row_length, words = longest - longest // 20, seed_words(1 << 100)
    order = list(range(len(lengths)))
    shuffle(order, xoshiro(words))
    if too_long == "drop":
        order = [i for i in order if lengths[i] <= row_length]
    cut = [min(int(lengths[i]), row_length) for i in order]
    want = [[order[i] for i in row] for row in windows(cut, row_length, 1 << 31, 100, words)]
    plan = pack(
        lengths, row_length=row_length, strategy="windowed", window=100, too_long=too_long,
        seed=1 << 100,
    )  # fmt: skip
    rows = [plan.samples[a:b].tolist() for a, b in pairwise(plan.row_offsets)]
    assert rows == want
    assert sorted(plan.samples.tolist() + plan.dropped.tolist()) == list(range(len(lengths)))


@pytest.mark.parametrize("samples", [65_536, 66_049, 66_560])
def test_orders_of_more_samples_are_those_of_the_twin(samples: int) -> None:
    order = list(range(samples))
    shuffle(order, xoshiro(seed_words(7)))
    plan = pack([5] * samples, row_length=5, strategy="windowed", window=samples, seed=7)
    made = list(range(samples))
    shuffle(made, xoshiro(seed_for(seed_words(7), 0)))
    assert plan.samples.tolist() == [order[row] for row in made]


@pytest.mark.parametrize("chunk", [1, 333, 1_000, 2_500, 9_000])
def test_rows_do_not_depend_on_how_the_samples_come(chunk: int) -> None:
    lengths = like_the_report(9_000)
    rows = packed(WindowedPacker(row_length=ROW), lengths, chunk)
    assert rows == packed(WindowedPacker(row_length=ROW), lengths, 4_000)


def test_rows_come_as_soon_as_their_window_is_full() -> None:
    packer, lengths = WindowedPacker(row_length=ROW, window=500), like_the_report(1_000)
    assert rows_of(packer.add(lengths[:499])) == []
    first = rows_of(packer.add(lengths[499:500]))
    assert len(first) > 50
    assert all(lengths[row].sum() == ROW for row in first)


@pytest.mark.parametrize("row_length", [ROW, 65_536])
def test_rows_of_lengths_like_those_of_the_report_are_full(row_length: int) -> None:
    lengths = like_the_report(100_000)
    rows = packed(WindowedPacker(row_length=row_length), lengths, 1_000)
    assert lengths.sum() / (len(rows) * row_length) > 0.9999


def test_nobody_waits_longer_than_three_windows() -> None:
    lengths = like_the_report(50_000)
    order = np.concatenate(packed(WindowedPacker(row_length=ROW), lengths, 1_000))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    assert np.abs(place - np.arange(len(order))).max() < 3_300


def test_lengths_do_not_drift_over_the_rows() -> None:
    lengths = like_the_report(100_000)
    order = np.concatenate(packed(WindowedPacker(row_length=ROW), lengths, 1_000))
    means = [part.mean() for part in np.split(lengths[order], 10)]
    error = lengths.std() / np.sqrt(len(lengths) / 10)
    assert np.abs(means - lengths.mean()).max() < 4 * error
    inside = np.concatenate([lengths[order[i : i + 1000]] for i in range(0, 99_000, 1_000)])
    thirds = inside.reshape(99, 1_000)[:, :999].reshape(99, 3, 333).mean(axis=(0, 2))
    assert np.ptp(thirds) / thirds.mean() < 0.03  # long ones first would give about 1


def test_seed_changes_the_order_of_rows_and_none_of_them() -> None:
    lengths = like_the_report(3_000)
    one, other = (packed(WindowedPacker(row_length=ROW, seed=s), lengths, 3_000) for s in (0, 1))
    assert one != other
    assert sorted(one) == sorted(other)


@pytest.mark.parametrize("moment", [1, 999, 1_000, 4_321])
def test_state_goes_on_with_the_same_rows(moment: int) -> None:
    lengths = like_the_report(6_000)
    calm = packed(WindowedPacker(row_length=ROW, window=300), lengths, 100)
    packer = WindowedPacker(row_length=ROW, window=300)
    before = rows_of(packer.add(lengths[:moment]))
    state = json.loads(json.dumps(packer.state_dict()))
    assert len(state["numbers"]) < 300 + 200  # a few windows, never the data
    other = WindowedPacker(row_length=ROW, window=300)
    other.load_state_dict(state)
    assert before + packed(other, lengths[moment:], 700) == calm
    assert other.added == 6_000


def test_state_of_other_settings_is_refused() -> None:
    state = WindowedPacker(row_length=ROW).state_dict()
    with pytest.raises(ValueError, match=r"'row_length': 16384.* this one has .*8192"):
        WindowedPacker(row_length=8192).load_state_dict(state)


def test_damaged_state_is_refused() -> None:
    packer = WindowedPacker(row_length=ROW)
    packer.add([5, 6])
    state = packer.state_dict() | {"lengths": [5]}
    with pytest.raises(ValueError, match="damaged: 2 numbers, 1 lengths, 0 ages"):
        packer.load_state_dict(state)


def test_samples_longer_than_a_row_are_dropped_or_cut_and_counted() -> None:
    packer = WindowedPacker(row_length=10, too_long="drop")
    assert rows_of(packer.add([4, 11, 6, 99]), packer.finish()) == [[2, 0]]
    assert (packer.added, packer.dropped, packer.truncated) == (4, 2, 0)
    packer = WindowedPacker(row_length=10, too_long="truncate")
    assert sorted(rows_of(packer.add([4, 11, 6, 99]), packer.finish())) == [[1], [2, 0], [3]]
    assert (packer.added, packer.dropped, packer.truncated) == (4, 0, 2)


def test_what_was_refused_was_not_added() -> None:
    packer = WindowedPacker(row_length=10)
    with pytest.raises(ValueError, match=r"lengths\[1\] is 11, outside \[1, 10\]; set too_long"):
        packer.add([4, 11])
    with pytest.raises(ValueError, match=r"lengths\[0\] is 0, outside \[1, 10\]; every sample"):
        packer.add([0])
    with pytest.raises(TypeError, match="lengths is float64"):
        packer.add([1.5])
    assert packer.added == 0
    assert rows_of(packer.finish()) == []


def test_wrong_settings_are_refused_by_name_and_value() -> None:
    with pytest.raises(ValueError, match="window is 0, outside"):
        WindowedPacker(row_length=10, window=0)
    with pytest.raises(ValueError, match="too_long is 'cut'"):
        WindowedPacker(row_length=10, too_long="cut")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"seed is 1\.5"):
        WindowedPacker(row_length=10, seed=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [None, 5])
def test_pack_takes_the_samples_in_order_or_shuffled(seed: int | None) -> None:
    lengths = like_the_report(20_000)
    plan = pack(lengths, row_length=ROW, strategy="windowed", seed=seed)
    assert plan.strategy == "windowed"
    assert sorted(plan.samples.tolist()) == list(range(len(lengths)))
    sums = [lengths[plan.samples[a:b]].sum() for a, b in pairwise(plan.row_offsets)]
    assert max(sums) <= ROW
    assert plan.fill > 0.999
    is_near = np.abs(plan.samples - np.arange(len(lengths))) < 3_300
    assert is_near.all() == (seed is None)


def test_pack_in_windows_drops_and_cuts() -> None:
    lengths = [4, 11, 6, 99]
    plan = pack(lengths, row_length=10, strategy="windowed", too_long="drop", seed=None)
    assert (plan.samples.tolist(), plan.dropped.tolist()) == ([2, 0], [1, 3])
    plan = pack(lengths, row_length=10, strategy="windowed", too_long="truncate", seed=None)
    assert (plan.rows, plan.truncated.tolist(), plan.fill) == (3, [1, 3], 1.0)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint64])
@pytest.mark.parametrize("row_length", [10, 70_000])
def test_pack_in_windows_cuts_lengths_of_any_dtype(dtype: type, row_length: int) -> None:
    lengths = np.array([4, 11, 6, np.iinfo(dtype).max], dtype)
    plan = pack(lengths, row_length=row_length, strategy="windowed", too_long="truncate", seed=None)
    assert plan.tokens == np.minimum(lengths.astype(object), row_length).sum()
    assert sorted(plan.samples.tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("length", [11, 1 << 62, (1 << 64) - 1])
def test_a_packer_cuts_lengths_that_only_uint64_holds(length: int) -> None:
    packer = WindowedPacker(row_length=10, too_long="truncate", seed=np.int64(3))
    assert packer.add(np.array([length], np.uint64)).rows == 0
    json.dumps(packer.state_dict())
    assert packer.finish().rows == 1


@pytest.mark.parametrize(
    "change",
    [
        {"windows": None}, {"windows": 2}, {"windows": (1 << 63) - 1}, {"added": "x"},
        {"added": (1 << 63) - 1}, {"lengths": [11]}, {"lengths": [3.7]}, {"lengths": [[3]]},
        {"lengths": 3}, {"numbers": [-5]}, {"numbers": [1]}, {"ages": [-1]},
        {"numbers": [0, 0], "lengths": [3, 3]},
    ],
)  # fmt: skip
def test_a_state_that_lacks_something_changes_nothing(change: dict[str, Any]) -> None:
    packer = WindowedPacker(row_length=10)
    packer.add([3])
    state = packer.state_dict()
    other = WindowedPacker(row_length=10)
    with pytest.raises(ValueError, match="the state is damaged"):
        other.load_state_dict(state | change)
    assert other.finish().rows == 0


def test_a_state_that_is_no_dict_is_refused() -> None:
    with pytest.raises(TypeError, match="the state is None, want what state_dict gave"):
        WindowedPacker(row_length=10).load_state_dict(None)  # type: ignore[arg-type]


def test_samples_that_cannot_be_held_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    packer = WindowedPacker(row_length=10)

    def full(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(np, "concatenate", full)
        with pytest.raises(MemoryError):
            packer.add([3, 4])
    packer.add([5])
    rows = packer.finish()
    assert packer.added == 1
    assert rows.samples.tolist() == [0]
