"""Segments: lengths and the padded layout of the CPU backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hermes_core.segments import padded_width, plan_buckets, segments


def test_lengths_and_the_longest_follow_from_cu_seqlens() -> None:
    where = segments(np.array([0, 3, 3, 10, 11], dtype=np.int32))
    assert where.lengths.tolist() == [3, 7, 1]  # the segment of no token is left out
    assert (where.max_length, where.tokens) == (7, 11)
    assert where.cu_seqlens.dtype == torch.int32
    assert where.cu_seqlens.tolist() == [0, 3, 10, 11]


def test_tensor_and_array_give_the_same_segments() -> None:
    bounds = [0, 5, 9]
    a, b = segments(torch.tensor(bounds, dtype=torch.int32)), segments(np.array(bounds))
    assert a.lengths.tolist() == b.lengths.tolist()


@pytest.mark.parametrize(
    ("bounds", "error", "words"),
    [
        (np.array([1, 4]), ValueError, "start at 0, got 1"),
        (np.array([0, 4, 2]), ValueError, "falls from 4 to 2 at entry 2"),
        (np.array([0.0, 4.0]), TypeError, "float64"),
        (np.array([[0, 4]]), ValueError, "1-D"),
        (np.array([], dtype=np.int64), ValueError, "at least one entry"),
        (np.array([0, 2**31]), ValueError, "beyond int32"),
    ],
)
def test_bad_cu_seqlens_are_refused(bounds: np.ndarray, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        segments(bounds)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=40))
@settings(max_examples=100, deadline=None)
def test_every_token_has_one_real_slot_in_a_line_of_its_segment(lengths: list[int]) -> None:
    plan = plan_buckets(np.array(lengths, dtype=np.int64))
    total = sum(lengths)
    slots = sum(b.count * b.width for b in plan.buckets)
    tokens = torch.arange(total) if plan.token_of_slot is None else plan.token_of_slot
    places = torch.arange(total) if plan.slot_of_token is None else plan.slot_of_token
    assert len(tokens) == slots
    assert tokens[places].tolist() == list(range(total))
    real = torch.ones(slots) if plan.real_slots is None else plan.real_slots.flatten()
    assert int(real.sum()) == total
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for bucket in plan.buckets:
        line = tokens[bucket.start : bucket.start + bucket.count * bucket.width]
        for row in line.view(bucket.count, bucket.width):
            assert len(set(owner[row.numpy()])) == 1  # one segment a line
            assert (row.diff() >= 0).all()


def test_long_segments_are_never_padded() -> None:
    assert [padded_width(n) for n in (1, 8, 9, 64, 65, 256, 257, 1001)] == [
        8, 8, 16, 64, 96, 256, 257, 1001,
    ]  # fmt: skip


def test_one_segment_needs_no_copy() -> None:
    assert plan_buckets(np.array([300])).token_of_slot is None
