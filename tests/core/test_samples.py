"""Samples: views of shards, and what is no shard is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hermes_core import _C, IGNORE_INDEX, Samples, Shard, build_rows, pack
from hermes_core.samples import spans_of

IDS = [[1, 2, 3], [70_000, 5], [6]]
MASKS = [[False, True, True], [True, True], [False]]


def through_pickle(samples: Samples) -> Samples:
    loaded = pickle.loads(pickle.dumps(samples))
    assert isinstance(loaded, Samples)
    return loaded


def a_shard() -> Shard:
    return Samples.from_lists(IDS, MASKS).shards[0]


def test_ignore_index_is_the_same_in_python_and_cpp() -> None:
    assert _C.IGNORE_INDEX == IGNORE_INDEX == -100


def test_samples_come_back_as_they_went_in() -> None:
    samples = Samples.from_lists(IDS, MASKS)
    assert len(samples) == 3
    assert [(ids.tolist(), mask.tolist()) for ids, mask in samples] == list(
        zip(IDS, MASKS, strict=True)
    )
    assert samples[-1][0].tolist() == [6]
    assert samples.lengths.tolist() == [3, 2, 1]
    assert (samples.token_count, samples.kept_count) == (6, 4)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=70), max_size=20))
def test_spans_hold_the_same_mask(masks: list[list[bool]]) -> None:
    samples = Samples.from_lists([range(len(mask)) for mask in masks], masks)
    assert [samples[i][1].tolist() for i in range(len(samples))] == masks
    assert samples.kept_count == sum(map(sum, masks))


def test_spans_are_the_longest_runs() -> None:
    mask = np.array([True, True, False, True, False, False, True])
    assert spans_of(mask).tolist() == [[0, 2], [3, 4], [6, 7]]


def test_samples_of_several_shards_are_numbered_through() -> None:
    narrow = replace(a_shard(), tokens=np.arange(6, dtype=np.uint16))
    samples = Samples([a_shard(), narrow, a_shard()])
    assert samples.lengths.tolist() == [3, 2, 1] * 3
    assert [samples[i][0].tolist() for i in (2, 3, 4, 6)] == [[6], [0, 1, 2], [3, 4], [1, 2, 3]]
    assert (samples.token_count, samples.kept_count) == (18, 12)


def test_token_ids_are_views_of_the_shard() -> None:
    shard = a_shard()
    assert np.shares_memory(Samples([shard])[1][0], shard.tokens)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, through_pickle])
@pytest.mark.parametrize("used", [False, True])
def test_copies_give_the_same_rows(again: Callable[[Samples], Samples], used: bool) -> None:
    samples = Samples([a_shard(), replace(a_shard(), tokens=np.arange(6, dtype=np.uint16))])
    packing = pack(samples.lengths, row_length=7)
    if used:
        build_rows(samples, packing, range(packing.rows))
    other = again(samples)
    expected = build_rows(samples, packing, range(packing.rows)).input_ids.tolist()
    del samples
    assert build_rows(other, packing, range(packing.rows)).input_ids.tolist() == expected


def test_shard_with_other_samples_than_it_was_said_to_have_is_refused() -> None:
    class Wrong(Samples):
        def __init__(self) -> None:
            self._set_up([3, 2], lambda index: a_shard())

    plan = pack([1] * 5, row_length=5, seed=None)
    with pytest.raises(ValueError, match="shard 1 has 3 samples, want 2"):
        build_rows(Wrong(), plan, [0])


def test_lengths_are_computed_once_and_read_only() -> None:
    samples = Samples([a_shard()])
    assert samples.lengths is samples.lengths
    assert samples.lengths.dtype == np.int64
    with pytest.raises(ValueError, match="read-only"):
        samples.lengths[0] = 1


def test_no_samples_are_samples_too() -> None:
    for samples in (Samples([]), Samples.from_lists([], [])):
        assert (len(samples), samples.token_count, samples.kept_count) == (0, 0, 0)
        assert samples.lengths.tolist() == []


@pytest.mark.parametrize("index", [3, -4, 1 << 70])
def test_index_out_of_range_is_an_index_error(index: int) -> None:
    with pytest.raises(IndexError, match=r"is outside \[0, 3\)"):
        Samples.from_lists(IDS, MASKS)[index]


@pytest.mark.parametrize("index", [1.5, slice(0, 2), None])
def test_what_is_no_number_of_a_sample_is_refused(index: Any) -> None:
    with pytest.raises(TypeError, match="want the number of one sample"):
        Samples.from_lists(IDS, MASKS)[index]


def test_a_sample_may_be_named_by_a_small_integer_of_numpy() -> None:
    samples = Samples.from_lists(IDS, MASKS)
    assert samples[np.int8(-1)][0].tolist() == samples[-1][0].tolist()


@pytest.mark.parametrize(
    ("ids", "masks", "error", "message"),
    [
        ([[1]], [], ValueError, "token_ids has 1 samples but loss_masks has 0"),
        ([[1, 2]], [[True]], ValueError, r"loss_masks\[0\] is bool \[1\], want a bool for each"),
        ([[1, 2]], [[1, 0]], ValueError, r"loss_masks\[0\] is int64 \[2\], want a bool"),
        ([[1], []], [[True], []], ValueError, r"token_ids\[1\] has shape \[0\], want \[n\]"),
        ([[[1]]], [[True]], ValueError, r"token_ids\[0\] has shape \[1, 1\]"),
        ([[1.5]], [[True]], TypeError, r"token_ids\[0\] is float64 \(1.5, ...\), want integers"),
        ([[3, -1]], [[True] * 2], ValueError, r"token_ids\[0\]\[1\] is -1, outside \[0, 4294967"),
        ([[1 << 32]], [[True]], ValueError, r"token_ids\[0\]\[0\] is 4294967296, outside"),
    ],
)
def test_wrong_lists_are_refused_by_name_and_value(
    ids: list[list[int]], masks: list[list[bool]], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Samples.from_lists(ids, masks)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": np.zeros(6, np.int64)}, TypeError, "tokens is int64, want an array of uint16"),
        ({"tokens": [1] * 6}, TypeError, "tokens is list, want an array of uint16 or uint32"),
        ({"tokens": np.zeros((6, 1), np.uint16)}, ValueError, "tokens is 2-D"),
        ({"tokens": np.zeros(12, np.uint16)[::2]}, ValueError, r"tokens is 1-D with strides \(4,"),
        ({"tokens": np.zeros(5, np.uint16)}, ValueError, "offsets runs from 0 to 6, want 0 to 5"),
        ({"offsets": np.array([0, 3, 5, 6], np.int32)}, TypeError, "offsets is int32, want an"),
        ({"offsets": np.array([0, 6])}, ValueError, "offsets has 2 elements and span_offsets 4"),
        ({"offsets": np.array([1, 3, 5, 6])}, ValueError, "offsets runs from 1 to 6"),
        ({"spans": np.zeros((2, 3), np.uint32)}, ValueError, r"spans is \(2, 3\), want \[spans"),
        ({"spans": np.zeros(4, np.uint32)}, ValueError, "spans is 1-D"),
        ({"span_offsets": np.array([0, 1, 2, 3])}, ValueError, "span_offsets runs from 0 to 3"),
        ({"span_offsets": np.array([0.0, 1, 2, 2])}, TypeError, "span_offsets is float64"),
    ],
)
def test_what_is_no_shard_is_refused(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        replace(a_shard(), **change)  # type: ignore[arg-type]
