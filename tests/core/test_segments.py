"""Segments: bounds of each token and the orders of tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hermes_core.segments import segments, segments_of_positions
from hermes_kernels.launch import TILE


def test_lengths_and_the_longest_follow_from_cu_seqlens() -> None:
    where = segments(np.array([0, 3, 3, 10, 11], dtype=np.int32))
    assert where.lengths.tolist() == [3, 7, 1]  # the segment of no token is left out
    assert (where.max_length, where.tokens) == (7, 11)
    assert where.places.starts.dtype == where.places.ends.dtype == torch.int32
    assert where.cu_seqlens.tolist() == [0, 3, 10, 11]
    assert where.cu_seqlens.dtype == torch.int32
    assert where.cu_seqlens is where.cu_seqlens  # made once, for all layers


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


def test_more_tokens_than_cu_seqlens_covers_are_segments_of_their_own() -> None:
    where = segments(np.array([0, 2]), 5)
    assert where.tokens == 5
    assert where.lengths.tolist() == [2, 1, 1, 1]
    assert where.places.starts.tolist() == [0, 0, 2, 3, 4]
    assert where.places.ends.tolist() == [2, 2, 3, 4, 5]


def test_fewer_tokens_than_cu_seqlens_covers_are_refused() -> None:
    with pytest.raises(ValueError, match="ends at 9, beyond the 8 tokens"):
        segments(np.array([0, 9]), 8)


@given(st.lists(st.integers(0, 300), max_size=30), st.integers(0, 200))
@settings(max_examples=100)
def test_each_token_knows_its_segment(lengths: list[int], tail: int) -> None:
    where = segments(
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), sum(lengths) + tail
    )
    wanted = [n for n in lengths if n] + [1] * tail
    ends = np.cumsum(wanted, dtype=np.int64)
    assert where.places.starts.tolist() == np.repeat(ends - wanted, wanted).tolist()
    assert where.places.ends.tolist() == np.repeat(ends, wanted).tolist()
    assert where.lengths.tolist() == wanted


@given(st.lists(st.integers(1, 700), min_size=1, max_size=20))
@settings(max_examples=50)
def test_every_tile_is_ordered_once_by_its_falling_walk(lengths: list[int]) -> None:
    where = segments(np.concatenate([[0], np.cumsum(lengths)]))
    starts, ends, block_of, _, query_order, key_order = (x.tolist() for x in where.places)
    tiles = [range(a, min(a + TILE, where.tokens)) for a in range(0, where.tokens, TILE)]
    back = [block_of[tile[-1]] - block_of[starts[tile[0]]] for tile in tiles]
    on = [block_of[ends[tile[-1]] - 1] - block_of[tile[0]] for tile in tiles]
    for order, walk in ((query_order, back), (key_order, on)):
        assert sorted(order) == list(range(len(tiles)))
        assert [walk[i] for i in order] == sorted(walk, reverse=True)


@given(st.lists(st.integers(0, 300), max_size=20), st.integers(0, 200))
@settings(max_examples=100)
def test_segments_are_cut_into_blocks_from_their_own_start(lengths: list[int], tail: int) -> None:
    where = segments(
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), sum(lengths) + tail
    )
    wanted, alone = [], False  # does a block of single tokens go on?
    for start, length in zip(
        np.cumsum(where.lengths) - where.lengths, where.lengths.tolist(), strict=True
    ):
        if not (length == 1 and alone and start % TILE):
            wanted += range(start, start + length, TILE)
        alone = length == 1
    blocks = where.places.blocks.tolist()
    assert blocks[: len(wanted)] == wanted
    assert set(blocks[len(wanted) :]) == {where.tokens}
    counts = np.diff(np.array(blocks[: len(wanted) + 1]))
    assert where.places.block_of.tolist() == np.repeat(np.arange(len(wanted)), counts).tolist()


def test_shapes_follow_from_the_tokens_alone() -> None:
    one, many = segments(np.array([0, 500])), segments(np.arange(501))
    for a, b in zip(one.places, many.places, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_bounds_on_the_device_are_never_read_by_the_host() -> None:
    """On "meta" there is nothing to read: any look at a value would fail."""
    where = segments(torch.empty(9, dtype=torch.int32, device="meta"), 300)
    assert where.places.starts.shape == (300,)
    assert where.places.query_order.shape == (3,)


@given(
    st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=5), min_size=1, max_size=4),
    st.integers(0, 9),
)
@settings(max_examples=50)
def test_positions_tell_the_segments_of_rows(rows: list[list[int]], padding: int) -> None:
    width = max(map(sum, rows)) + padding
    lengths = [n for row in rows for n in (*row, width - sum(row)) if n]
    positions = torch.cat([torch.arange(n) for n in lengths]).view(len(rows), width)
    where = segments_of_positions(positions)
    wanted = segments(np.concatenate([[0], np.cumsum(lengths)]))
    for one, other in zip(where.places, wanted.places, strict=True):
        assert torch.equal(one, other)
    assert where.lengths.tolist() == lengths


def test_rows_of_one_segment_each_do_not_join() -> None:
    where = segments_of_positions(torch.arange(4).expand(3, 4))
    assert where.lengths.tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("mask", "lengths"), [([0, 0, 1, 1, 1], [1, 1, 3]), ([1, 1, 1, 0, 0], [3, 1, 1])]
)
def test_each_token_of_padding_is_a_segment_of_its_own(mask: list[int], lengths: list[int]) -> None:
    where = segments_of_positions(torch.arange(5)[None], torch.tensor([mask]))
    assert where.lengths.tolist() == lengths
