"""Rows: equal to a loop over tokens, and nothing outside a shard is ever read."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from hermes_core import IGNORE_INDEX, Packing, Rows, Samples, Shard, build_rows, pack

ARRAYS = ("input_ids", "labels", "positions", "cu_seqlens")
DTYPES = (np.int64, np.int32)


def plain_rows(
    samples: Samples, packing: Packing, rows: list[int], pad_id: int, dtype: Any = np.int64
) -> Rows:
    """Token by token in Python."""
    length = packing.row_length
    input_ids = np.full((len(rows), length), pad_id, dtype)
    labels = np.full((len(rows), length), IGNORE_INDEX, dtype)
    positions = np.zeros((len(rows), length), dtype)
    starts, kept = [], 0
    for r, row in enumerate(rows):
        at = 0
        for sample in packing.samples[packing.row_offsets[row] : packing.row_offsets[row + 1]]:
            token_ids, loss_mask = samples[int(sample)]
            count = min(len(token_ids), length)
            starts.append(r * length + at)
            for t in range(count):
                input_ids[r, at + t] = token_ids[t]
                positions[r, at + t] = t
                if t + 1 < count and loss_mask[t + 1]:
                    labels[r, at + t] = token_ids[t + 1]
                    kept += 1
            at += count
        if at < length:
            starts.append(r * length + at)
            positions[r, at:] = range(length - at)
    cu_seqlens = np.array([*starts, len(rows) * length], np.int32)
    return Rows(input_ids, labels, positions, cu_seqlens, kept)


def assert_equal(got: Rows, expected: Rows) -> None:
    for name in ARRAYS:
        have, want = getattr(got, name), getattr(expected, name)
        assert have.dtype == want.dtype, name
        assert np.array_equal(have, want), name
    assert got.kept_count == expected.kept_count


def shard_of(masks: Sequence[ArrayLike], dtype: type, rng: np.random.Generator) -> Shard:
    largest = min(np.iinfo(dtype).max, (1 << 31) - 1)  # which int32 can hold
    ids = [rng.integers(0, largest, np.size(mask), endpoint=True) for mask in masks]
    shard = Samples.from_lists(ids, masks).shards[0]
    return replace(shard, tokens=shard.tokens.astype(dtype))


def runs(draw: st.DrawFn) -> list[bool]:
    """A mask of short and long runs: those of 16 tokens and more take another way."""
    lengths = st.lists(st.integers(1, 3) | st.integers(14, 50), min_size=1, max_size=5)
    first = draw(st.booleans())
    return [first ^ bool(i % 2) for i, n in enumerate(draw(lengths)) for _ in range(n)]


@st.composite
def stores(draw: st.DrawFn) -> Samples:
    masks = st.lists(st.composite(runs)(), min_size=1, max_size=6)
    shards = draw(
        st.lists(st.tuples(masks, st.sampled_from([np.uint16, np.uint32])), min_size=1, max_size=3)
    )
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    return Samples([shard_of(mask, dtype, rng) for mask, dtype in shards])


@settings(max_examples=100)
@given(
    samples=stores(),
    row_length=st.integers(1, 200),
    pad_id=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    mine=st.booleans(),
    data=st.data(),
)
def test_rows_equal_a_loop_over_tokens(
    samples: Samples, row_length: int, pad_id: int, dtype: Any, mine: bool, data: st.DataObject
) -> None:
    packing = pack(samples.lengths, row_length=row_length, too_long="truncate")
    rows = data.draw(st.lists(st.integers(0, packing.rows - 1), max_size=6))
    out = filled_with_noise(len(rows), row_length, dtype) if mine else None
    got = build_rows(samples, packing, rows, pad_id=pad_id, dtype=dtype, out=out)
    assert_equal(got, plain_rows(samples, packing, rows, pad_id, dtype))


def filled_with_noise(rows: int, row_length: int, dtype: Any) -> Rows:
    out = Rows.empty(rows, row_length, dtype=dtype)
    for name in ARRAYS:
        getattr(out, name).fill(0x5A5A5A)
    return out


def fixed_samples() -> Samples:
    rng = np.random.default_rng(5)
    masks = [(rng.random(n // 9 + 1) < 0.5).repeat(9)[:n] for n in rng.integers(1, 1001, size=300)]
    return Samples(
        [
            shard_of(masks[:100], np.uint16, rng),
            shard_of(masks[100:220], np.uint32, rng),
            shard_of(masks[220:], np.uint16, rng),
        ]
    )


def test_all_rows_of_a_plan_hold_every_token_once() -> None:
    samples = fixed_samples()
    packing = pack(samples.lengths, row_length=1001)
    rows = build_rows(samples, packing, range(packing.rows), pad_id=7)
    assert_equal(rows, plain_rows(samples, packing, list(range(packing.rows)), 7))
    first_tokens = sum(bool(samples[i][1][0]) for i in range(len(samples)))
    assert rows.kept_count == samples.kept_count - first_tokens  # nobody asks for a first token


def test_hand_worked_row() -> None:
    samples = Samples.from_lists(
        [[11, 12, 13, 14], [21, 22, 23]], [[True, False, True, True], [False, False, True]]
    )
    rows = build_rows(samples, pack(samples.lengths, row_length=9), [0], pad_id=5)
    _ = IGNORE_INDEX
    assert rows.input_ids.tolist() == [[11, 12, 13, 14, 21, 22, 23, 5, 5]]
    assert rows.labels.tolist() == [[_, 13, 14, _, _, 23, _, _, _]]
    assert rows.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1]]
    assert rows.cu_seqlens.tolist() == [0, 4, 7, 9]
    assert rows.kept.tolist() == [1, 2, 5]
    assert rows.kept.dtype == np.int64
    assert rows.kept_count == 3


def test_truncated_sample_has_no_label_behind_its_end() -> None:
    samples = Samples.from_lists([[1, 2, 3, 4]], [[True] * 4])
    packing = pack(samples.lengths, row_length=2, too_long="truncate")
    rows = build_rows(samples, packing, [0])
    assert rows.input_ids.tolist() == [[1, 2]]
    assert rows.labels.tolist() == [[2, IGNORE_INDEX]]


def test_no_rows_are_an_empty_batch() -> None:
    samples = Samples.from_lists([[1]], [[True]])
    rows = build_rows(samples, pack([1], row_length=4), [])
    assert rows.input_ids.shape == rows.labels.shape == rows.positions.shape == (0, 4)
    assert rows.cu_seqlens.tolist() == [0]
    assert rows.kept.tolist() == []
    assert rows.kept_count == 0


def test_any_integer_row_numbers_are_taken_in_their_order() -> None:
    samples = fixed_samples()
    packing = pack(samples.lengths, row_length=1001)
    expected = build_rows(samples, packing, [4, 2, 0])
    for rows in (range(4, -1, -2), np.array([4, 2, 0], np.uint8), np.arange(5)[::-2], (4, 2, 0)):
        assert_equal(build_rows(samples, packing, rows), expected)


@pytest.mark.parametrize("rows", [[1], [-1], [0, 1 << 40]])
def test_row_number_out_of_range_is_refused(rows: list[int]) -> None:
    samples = Samples.from_lists([[1]], [[True]])
    with pytest.raises(ValueError, match=rf"rows\[{len(rows) - 1}\] is {rows[-1]}, outside \[0, 1"):
        build_rows(samples, pack([1], row_length=4), rows)


@pytest.mark.parametrize("rows", [[0.0], [True], ["0"]])
def test_row_numbers_that_are_no_integers_are_refused(rows: object) -> None:
    samples = Samples.from_lists([[1]], [[True]])
    with pytest.raises(TypeError, match=r"rows is .*, want integers"):
        build_rows(samples, pack([1], row_length=4), rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [[[0]], 0])
def test_row_numbers_of_another_shape_are_refused(rows: Any) -> None:
    samples = Samples.from_lists([[1]], [[True]])
    with pytest.raises(ValueError, match=r"rows has shape \[.*\], want \[rows\]"):
        build_rows(samples, pack([1], row_length=4), rows)


@pytest.mark.parametrize(
    ("pad_id", "dtype"), [(-1, np.int64), (1 << 63, np.int64), (-1, np.int32), (1 << 31, np.int32)]
)
def test_pad_id_that_is_no_token_is_refused(pad_id: int, dtype: Any) -> None:
    samples = Samples.from_lists([[1]], [[True]])
    with pytest.raises(ValueError, match=rf"pad_id is {pad_id}, outside \[0, "):
        build_rows(samples, pack([1], row_length=4), [0], pad_id=pad_id, dtype=dtype)


@pytest.mark.parametrize("dtype", [np.int16, np.uint32, np.float32, "object"])
def test_other_dtypes_are_refused(dtype: Any) -> None:
    samples = Samples.from_lists([[1]], [[True]])
    with pytest.raises(TypeError, match=f"dtype is {np.dtype(dtype)}, want int64 or int32"):
        build_rows(samples, pack([1], row_length=4), [0], dtype=dtype)


@pytest.mark.parametrize("at", [0, 17, 63])
def test_token_id_over_int32_is_refused_by_sample_and_value(at: int) -> None:
    ids = [[1, 2], [5] * 64]
    ids[1][at] = 1 << 31
    samples = Samples.from_lists(ids, [[True] * 2, [True] * 64])
    packing = pack(samples.lengths, row_length=66)
    with pytest.raises(ValueError, match="sample 1 of shard 0 has the token id 2147483648, over"):
        build_rows(samples, packing, [0], dtype=np.int32)
    assert build_rows(samples, packing, [0]).input_ids.max() == 1 << 31


@pytest.mark.parametrize("threads", [0, -1, 1 << 20])
def test_number_of_threads_is_checked(threads: int) -> None:
    samples = Samples.from_lists([[1]], [[True]])
    with pytest.raises(ValueError, match=rf"threads is {threads}, outside \[1, 1024\]"):
        build_rows(samples, pack([1], row_length=4), [0], threads=threads)


def test_more_tokens_than_cu_seqlens_can_count_are_refused() -> None:
    samples = Samples.from_lists([[1]], [[True]])
    packing = pack([1], row_length=1 << 30)
    with pytest.raises(ValueError, match="2 rows of 1073741824 tokens are more than the 2"):
        build_rows(samples, packing, [0, 0])


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (0, "samples is list, want Samples"),
        (1, "packing is list, want a Packing or PackedRows"),
        (2, "out is list, want Rows"),
    ],
)
def test_arguments_of_other_types_are_refused_by_name(place: int, message: str) -> None:
    given: list[Any] = [Samples.from_lists([[1]], [[True]]), pack([1], row_length=4), None]
    given[place] = [1]
    with pytest.raises(TypeError, match=message):
        build_rows(given[0], given[1], [0], out=given[2])


def test_plan_of_other_samples_is_refused() -> None:
    samples = Samples.from_lists([[1, 2, 3], [4, 5]], [[True] * 3, [True] * 2])
    with pytest.raises(ValueError, match="the plan names sample 2 but there are 2"):
        build_rows(samples, pack([1, 1, 1], row_length=9), [0])
    with pytest.raises(ValueError, match="sample 1 of shard 0 ends at token 5 of a row of 4"):
        build_rows(samples, pack([2, 2], row_length=4), [0])
    with pytest.raises(ValueError, match="sample 0 of shard 0 has 3 tokens, more than a row of 2"):
        build_rows(samples, pack([2, 2], row_length=2, seed=None), [0])


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("offsets", 1, 99, r"sample 0 of shard 0 has tokens \[0, 99\) of 12"),
        ("offsets", 1, -1, r"sample 0 of shard 0 has tokens \[0, -1\) of 12"),
        ("offsets", 1, 0, r"sample 0 of shard 0 has tokens \[0, 0\) of 12"),
        ("offsets", 2, 1, r"sample 1 of shard 0 has tokens \[4, 1\) of 12"),
        ("offsets", 1, 1 << 62, r"has tokens \[0, 4611686018427387904\) of 12"),
        ("span_offsets", 1, 99, r"sample 0 of shard 0 has spans \[0, 99\) of 6"),
        ("span_offsets", 1, -7, r"sample 0 of shard 0 has spans \[0, -7\) of 6"),
        ("span_offsets", 2, 1, r"sample 1 of shard 0 has spans \[2, 1\) of 6"),
        ("spans", (0, 1), 99, r"sample 0 of shard 0 has the kept span \[0, 99\) in 4 tokens"),
        ("spans", (1, 0), 0, r"sample 0 of shard 0 has the kept span \[0, 4\) in 4 tokens"),
        ("spans", (1, 1), 3, r"sample 0 of shard 0 has the kept span \[3, 3\) in 4 tokens"),
        ("spans", (1, 0), (1 << 32) - 1, r"kept span \[4294967295, 4\) in 4 tokens"),
    ],
)
def test_corrupt_shard_is_refused_by_sample_and_value(
    name: str, index: int | tuple[int, int], value: int, message: str
) -> None:
    masks = [[True, False, False, True]] * 3
    samples = Samples.from_lists([[1, 2, 3, 4]] * 3, masks)
    packing = pack(samples.lengths, row_length=12)
    getattr(samples.shards[0], name)[index] = value
    with pytest.raises(ValueError, match=message + r".*: the store is corrupt|" + message):
        build_rows(samples, packing, [0])


@settings(max_examples=150)
@given(data=st.data())
def test_random_damage_gives_an_error_or_rows_never_a_crash(data: st.DataObject) -> None:
    masks = [[True, False, True, True]] * 4
    samples = Samples.from_lists([[1, 2, 3, 4]] * 4, masks)
    packing = pack(samples.lengths, row_length=9, seed=None)
    array = getattr(samples.shards[0], data.draw(st.sampled_from(["offsets", "span_offsets"])))
    for _ in range(data.draw(st.integers(1, 4))):
        array[data.draw(st.integers(0, 4))] = data.draw(
            st.integers(-20, 20) | st.integers(-(1 << 63), (1 << 63) - 1)
        )
    message = refusal(samples, packing)
    assert message == "" or "store is corrupt" in message or "for other samples" in message


def refusal(samples: Samples, packing: Packing) -> str:
    try:
        build_rows(samples, packing, range(packing.rows))
    except ValueError as error:
        return str(error)
    return ""


def test_only_shards_in_use_are_loaded_and_once() -> None:
    shards = fixed_samples().shards
    samples = Counting(shards)
    packing = pack(Samples(shards).lengths, row_length=1001, seed=None)
    wanted = packing.samples[packing.row_offsets[3] : packing.row_offsets[4]]
    for _ in range(2):
        build_rows(samples, packing, [3])
        shards_of_row = {int(np.searchsorted([100, 220], i, side="right")) for i in wanted}
        assert samples.loads == sorted(shards_of_row)


class Counting(Samples):
    """Knows which shards it was asked for."""

    def __init__(self, shards: tuple[Shard, ...]) -> None:
        self.loads: list[int] = []
        self._set_up(
            [len(shard) for shard in shards], lambda i: (self.loads.append(i), shards[i])[1]
        )


def test_threads_build_the_same_rows_at_once() -> None:
    samples = fixed_samples()
    packing = pack(samples.lengths, row_length=1001)
    expected = build_rows(samples, packing, range(packing.rows))
    results: list[Rows] = []

    def build() -> None:
        results.extend(build_rows(samples, packing, range(packing.rows)) for _ in range(5))

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(results) == 20
    for rows in results:
        assert_equal(rows, expected)


DIGEST = """
import hashlib
import numpy as np
from hermes_core import Samples, Shard, build_rows, pack

rng = np.random.default_rng(5)
lengths = rng.integers(1, 1001, size=200)
samples = Samples.from_lists([rng.integers(0, 60_000, n) for n in lengths],
                             [(np.arange(n) // 30) % 3 > 0 for n in lengths])
wide = samples.shards[0]
narrow = Shard(wide.tokens.astype(np.uint16), wide.offsets, wide.spans, wide.span_offsets)
samples = Samples([wide, narrow])
packing = pack(samples.lengths, row_length=1001)
digest = hashlib.sha256()
for dtype in (np.int64, np.int32):
    rows = build_rows(samples, packing, range(packing.rows), dtype=dtype)
    for array in (rows.input_ids, rows.labels, rows.positions, rows.cu_seqlens):
        digest.update(array)
print(digest.hexdigest())
"""


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_rows_are_the_same_on_every_instruction_set(
    isa: str, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(DIGEST, {})
    expected = capsys.readouterr().out
    got = subprocess.run(
        [sys.executable, "-P", "-c", DIGEST], env={**os.environ, "HERMES_CORE_ISA": isa},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert got.stdout == expected, got.stderr
