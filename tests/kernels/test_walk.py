"""Walks over parts of blocks, interpreted, against what each token is to meet, one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bench.attention import Shape
from bench.attention_model import walk_back, walk_on
from hermes_core.segments import segments
from hermes_kernels import walk
from hermes_kernels.places import Places

ROOM = 320  # parts of a walk, at most
LENGTHS = st.lists(
    st.one_of(st.integers(1, 3), st.integers(1, 300), st.sampled_from([1, 64, 128, 256])),
    min_size=1,
    max_size=12,
)


@triton.jit
def tell(
    found, first, after, rest, count, before, inner, blocks, J: tl.constexpr, ROOM: tl.constexpr
):
    found += tl.program_id(0) * (3 + 2 * ROOM)
    tl.store(found, count)
    tl.store(found + 1, before)
    tl.store(found + 2, inner)
    for i in range(count):
        begin, end = walk.part(i, first, after, rest, blocks, J)
        tl.store(found + 3 + 2 * i, begin)
        tl.store(found + 4 + 2 * i, end)


@triton.jit
def back_kernel(
    found, starts, ends, block_of, blocks, T, M: tl.constexpr, J: tl.constexpr, ROOM: tl.constexpr
):  # fmt: skip
    first, after, rest, count, inner = walk.back(
        tl.program_id(0) * M, starts, ends, block_of, blocks, T, M, J
    )
    tell(found, first, after, rest, count, 0, inner, blocks, J, ROOM)


@triton.jit
def on_kernel(
    found, starts, ends, block_of, blocks, T, M: tl.constexpr, J: tl.constexpr, ROOM: tl.constexpr
):  # fmt: skip
    first, after, rest, count, before, inner = walk.on(
        tl.program_id(0) * M, starts, ends, block_of, blocks, T, M, J
    )
    tell(found, first, after, rest, count, before, inner, blocks, J, ROOM)


def walks(
    kernel: object, places: Places, tile: int, part: int
) -> list[tuple[list[tuple[int, int]], range]]:
    """Of each tile: its parts, begin and end, and which of them are met whole."""
    tokens = len(places.starts)
    found = torch.full((-(-tokens // tile), 3 + 2 * ROOM), -1, dtype=torch.int32)
    kernel[(len(found),)](found, *places[:4], tokens, tile, part, ROOM)  # type: ignore[index]
    told = []
    for count, before, inner, *parts in found.tolist():
        pairs = list(zip(parts[: 2 * count : 2], parts[1 : 2 * count : 2], strict=True))
        told.append((pairs, range(before, before + inner)))
    return told


@pytest.mark.parametrize("kernel", [back_kernel, on_kernel], ids=["back", "on"])
@pytest.mark.parametrize(("tile", "part"), [(128, 64), (128, 128), (64, 32), (64, 128), (256, 128)])
@given(lengths=LENGTHS, tail=st.integers(0, 150))
@example(lengths=[500, 12], tail=0)
@example(lengths=[1] * 300, tail=0)
@example(lengths=[1, 128], tail=0)
@example(lengths=[100, 1, 1, 1, 156, 1, 2], tail=140)
@settings(max_examples=20)
def test_a_tile_meets_each_token_that_it_must_once(
    kernel: object, tile: int, part: int, lengths: list[int], tail: int
) -> None:
    """Parts rise, begin at multiples of their size from a segment's start, and hold what counts."""
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    at = segments(bounds, int(bounds[-1]) + tail)
    starts, ends = (x.numpy() for x in at.places[:2])
    t = np.arange(at.tokens)
    seen = (t[None, :] <= t[:, None]) & (t[None, :] >= starts[:, None])  # [query, key]
    met = seen if kernel is back_kernel else seen.T
    told = walks(kernel, at.places, tile, part)
    for i, (parts, whole) in enumerate(told):
        assert kernel is on_kernel or len(parts) - 1 not in whole
        rows = slice(i * tile, min((i + 1) * tile, at.tokens))
        times = np.zeros(at.tokens, int)
        begins = []
        for j, (begin, end) in enumerate(parts):
            if begin >= end:  # a short block's later part, of nothing
                assert j not in whole
                continue
            begins.append(begin)
            tokens = slice(begin, min(begin + part, end))
            times[tokens] += 1
            alone = ends[begin] - starts[begin] == 1
            assert alone or (begin - starts[begin]) % part == 0
            assert alone or ends[begin] >= tokens.stop
            if j in whole:
                assert begin + part <= end
                assert met[rows, tokens].all()
        assert (times <= 1).all()
        assert (times[met[rows].any(0)] == 1).all()
        assert begins == sorted(begins)
    count = walk_back if kernel is back_kernel else walk_on
    all_lengths = tuple(at.lengths.tolist())
    parts, masked = count(Shape("", all_lengths, (1, 1), 64, torch.bfloat16), tile, part)
    assert parts.tolist() == [len(parts) for parts, _ in told]
    assert masked.tolist() == [len(parts) - len(whole) for parts, whole in told]
