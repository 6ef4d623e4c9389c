"""The buckets of the CPU backend: a layout in which each token has one place."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hermes_core.attention_cpu import buckets_of, padded_width


@given(st.lists(st.integers(1, 400), min_size=1, max_size=40))
@settings(max_examples=100, deadline=None)
def test_every_token_has_one_real_slot_in_a_line_of_its_segment(lengths: list[int]) -> None:
    total = sum(lengths)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    written = np.zeros(total + 1, dtype=int)
    for bucket in buckets_of(np.array(lengths, dtype=np.int64)):
        if bucket.source is None:
            tokens = np.arange(bucket.first, bucket.first + bucket.width)
            written[tokens] += 1
            assert len(set(owner[tokens])) == 1
            continue
        assert bucket.target is not None
        real = bucket.target.numpy() < total
        assert (bucket.source.numpy() == bucket.target.numpy())[real].all()
        assert (bucket.real is None) == real.all()
        assert bucket.real is None or bucket.real.flatten().tolist() == real.tolist()
        written[bucket.target.numpy()[real]] += 1
        for line in bucket.source.view(bucket.count, bucket.width):
            assert len(set(owner[line.numpy()])) == 1
            assert (line.diff() >= 0).all()
    assert (written[:total] == 1).all()


def test_long_segments_are_never_padded() -> None:
    assert [padded_width(n) for n in (1, 8, 9, 32, 33, 1001)] == [8, 8, 16, 32, 33, 1001]


def test_one_segment_needs_no_copy() -> None:
    (bucket,) = buckets_of(np.array([300]))
    assert (bucket.source, bucket.first, bucket.width) == (None, 0, 300)


def test_segments_of_one_length_need_no_mask() -> None:
    (bucket,) = buckets_of(np.array([20, 20]))
    assert bucket.real is None
    assert torch.equal(bucket.source, torch.arange(40))
