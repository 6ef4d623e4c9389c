"""Memory of rows: the caller's is written where it lies, our own is used again, never too early."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from hermes_core import _C, Packing, Rows, Samples, build_rows, pack

ARRAYS = ("input_ids", "labels", "positions", "cu_seqlens")
LENGTH = 1001


@pytest.fixture(scope="module")
def samples() -> Samples:
    rng = np.random.default_rng(5)
    lengths = rng.integers(1, LENGTH, size=1200)
    return Samples.from_lists(
        [rng.integers(0, 60_000, n) for n in lengths], [rng.random(n) < 0.7 for n in lengths]
    )


@pytest.fixture(scope="module")
def packing(samples: Samples) -> Packing:
    return pack(samples.lengths, row_length=LENGTH)


def assert_same(got: Rows, expected: Rows) -> None:
    for name in ARRAYS:
        assert np.array_equal(getattr(got, name), getattr(expected, name)), name
    assert got.kept_count == expected.kept_count


def address(array: np.ndarray[Any, Any]) -> int:
    return int(array.ctypes.data)


# ---- the caller's -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_rows_are_written_where_the_caller_says(
    samples: Samples, packing: Packing, dtype: Any
) -> None:
    out = Rows.empty(5, LENGTH, dtype=dtype)
    for first in (0, 7):  # again and again
        rows = build_rows(samples, packing, range(first, first + 5), out=out)
        assert all(address(getattr(rows, name)) == address(getattr(out, name)) for name in ARRAYS)
        assert_same(rows, build_rows(samples, packing, range(first, first + 5), dtype=dtype))
        assert np.shares_memory(rows.cu_seqlens, out.cu_seqlens)
        assert rows.input_ids.dtype == dtype


def test_rows_written_over_count_what_they_hold_now(samples: Samples, packing: Packing) -> None:
    first = Rows.empty(2, LENGTH)
    build_rows(samples, packing, range(2), out=first)
    before = first.kept_count
    second = build_rows(samples, packing, range(2, 4), out=first)
    assert second.kept_count != before
    assert first.kept_count == second.kept_count == len(second.kept) != 0


def test_only_what_is_used_of_cu_seqlens_is_written(samples: Samples, packing: Packing) -> None:
    out = Rows.empty(2, LENGTH)
    out.cu_seqlens.fill(-7)
    used = len(build_rows(samples, packing, [0, 1], out=out).cu_seqlens)
    assert used < len(out.cu_seqlens)
    assert (out.cu_seqlens[used:] == -7).all()


def test_empty_rows_have_room_for_a_segment_a_token() -> None:
    samples = Samples.from_lists([[3]] * 8, [[True]] * 8)
    rows = build_rows(samples, pack([1] * 8, row_length=4), [0, 1], out=Rows.empty(2, 4))
    assert rows.cu_seqlens.tolist() == list(range(9))


def test_tensors_of_torch_are_written_in_place(samples: Samples, packing: Packing) -> None:
    tensors = [torch.empty(3, LENGTH, dtype=torch.int64) for _ in range(3)]
    ends = torch.empty(3 * LENGTH + 1, dtype=torch.int32)
    out = Rows(*(tensor.numpy() for tensor in (*tensors, ends)))  # type: ignore[arg-type]
    build_rows(samples, packing, range(3), out=out)
    expected = build_rows(samples, packing, range(3))
    assert np.array_equal(tensors[0].numpy(), expected.input_ids)
    assert np.array_equal(tensors[1].numpy(), expected.labels)
    assert out.kept_count == expected.kept_count  # counted, where nobody said


def test_parts_of_one_memory_hold_several_batches(samples: Samples, packing: Packing) -> None:
    whole = Rows.empty(6, LENGTH)
    for first in (0, 2, 4):
        here = slice(first, first + 2)
        part = Rows(whole.input_ids[here], whole.labels[here], whole.positions[here],
                    np.empty(2 * LENGTH, np.int32))  # fmt: skip
        build_rows(samples, packing, range(first, first + 2), out=part)
    expected = build_rows(samples, packing, range(6))
    assert np.array_equal(whole.input_ids, expected.input_ids)
    assert np.array_equal(whole.positions, expected.positions)


def misaligned(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return np.zeros(8 * int(np.prod(shape)) + 1, np.uint8)[1:].view(np.int64).reshape(shape)


def read_only(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    array = np.zeros(shape, np.int64)
    array.flags.writeable = False
    return array


def out_with(change: dict[str, Any]) -> Rows:
    """Memory for one row of eight tokens in two segments, with some arrays of it changed."""
    arrays = {name: np.zeros((1, 8), np.int64) for name in ARRAYS[:3]}
    return Rows(**{**arrays, "cu_seqlens": np.zeros(3, np.int32), **change})


def build_eight(out: Rows, dtype: Any = np.int64) -> Rows:
    samples = Samples.from_lists([[1] * 5, [2] * 3], [[True] * 5, [True] * 3])
    return build_rows(samples, pack([5, 3], row_length=8), [0], out=out, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "array", "kind", "got"),
    [
        ("input_ids", np.zeros((1, 8), np.int32), TypeError, r"int32 \[1, 8\]"),
        ("labels", np.zeros((1, 8)), TypeError, r"float64 \[1, 8\]"),
        ("labels", np.zeros((1, 8), ">i8"), TypeError, r">i8 \[1, 8\]"),
        ("labels", [[0] * 8], TypeError, "list"),
        ("positions", None, TypeError, "NoneType"),
        ("positions", np.zeros((2, 8), np.int64), ValueError, r"int64 \[2, 8\]"),
        ("input_ids", np.zeros((8, 1), np.int64), ValueError, r"int64 \[8, 1\]"),
        ("input_ids", np.zeros(8, np.int64), ValueError, r"int64 \[8\]"),
        ("labels", np.zeros((1, 16), np.int64)[:, ::2], ValueError, r".*8\], not contiguous"),
        ("labels", read_only((1, 8)), ValueError, r"int64 \[1, 8\], read-only"),
        ("labels", misaligned((1, 8)), ValueError, r"int64 \[1, 8\], unaligned"),
        ("cu_seqlens", np.zeros(2, np.int32), ValueError, r"int32 \[2\]"),
        ("cu_seqlens", np.zeros(3, np.int64), TypeError, r"int64 \[3\]"),
        ("cu_seqlens", np.zeros((1, 3), np.int32), ValueError, r"int32 \[1, 3\]"),
    ],
)
def test_memory_that_cannot_be_written_is_refused_by_name(
    name: str, array: Any, kind: type[Exception], got: str
) -> None:
    wanted = r"int32 \[at least 3\]" if name == "cu_seqlens" else r"int64 \[1, 8\]"
    message = rf"^out.{name} is {got}, want a writeable, aligned, contiguous array of {wanted}$"
    with pytest.raises(kind, match=message):
        build_eight(out_with({name: array}))


@pytest.mark.parametrize(
    ("one", "other"), [("input_ids", "labels"), ("labels", "positions"), ("labels", "cu_seqlens")]
)
def test_memory_that_overlaps_is_refused_by_both_names(one: str, other: str) -> None:
    memory = np.zeros(16, np.int64)
    rest = memory[7:].view(np.int32)[:3] if other == "cu_seqlens" else memory[7:15].reshape(1, 8)
    with pytest.raises(ValueError, match=rf"^out.{other} shares memory with out.{one}$"):
        build_eight(out_with({one: memory[:8].reshape(1, 8), other: rest}))


@pytest.mark.parametrize("array", [[[0] * 8], torch.zeros(1, 8, dtype=torch.int64)])
def test_memory_that_is_no_array_is_refused_by_its_type(array: Any) -> None:
    kind = type(array).__name__
    with pytest.raises(TypeError, match=f"^out.input_ids is {kind}, want a writeable, aligned"):
        build_eight(out_with({"input_ids": array}), None)


def test_memory_of_another_dtype_than_asked_for_is_refused() -> None:
    with pytest.raises(TypeError, match=r"out.input_ids is int64 \[1, 8\], want .* of int32"):
        build_eight(out_with({}), np.int32)


# ---- our own ------------------------------------------------------------------------------------


def test_memory_is_used_again_when_its_arrays_are_gone(samples: Samples, packing: Packing) -> None:
    rows = build_rows(samples, packing, range(8))
    before = {address(getattr(rows, name)) for name in ARRAYS[:3]}
    expected = [getattr(rows, name).copy() for name in ARRAYS]
    del rows
    again = build_rows(samples, packing, range(8))
    assert {address(getattr(again, name)) for name in ARRAYS[:3]} == before
    assert all(np.array_equal(getattr(again, n), e) for n, e in zip(ARRAYS, expected, strict=True))


def test_memory_is_not_used_again_while_a_view_of_it_lives(
    samples: Samples, packing: Packing
) -> None:
    view = build_rows(samples, packing, range(8)).labels[3, 100:200]
    before = view.copy()
    for first in range(8, 80, 8):
        build_rows(samples, packing, range(first, first + 8))
    assert np.array_equal(view, before)


def test_memory_that_waits_is_bounded_in_blocks(samples: Samples, packing: Packing) -> None:
    batches = [build_rows(samples, packing, range(8)) for _ in range(_C.POOL_BLOCKS)]
    del batches
    blocks, size = _C.pool_state()
    assert blocks == _C.POOL_BLOCKS
    assert size >= blocks * 8 * LENGTH * 8


def test_memory_that_waits_is_bounded_in_bytes() -> None:
    samples = Samples.from_lists([[1]], [[True]])
    packing = pack([1], row_length=1 << 20)
    large = [build_rows(samples, packing, [0] * 3) for _ in range(4)]  # 288 MiB
    del large
    blocks, size = _C.pool_state()
    assert 0 < size <= _C.POOL_BYTES
    assert 0 < blocks < _C.POOL_BLOCKS


FORKS = """
import os, threading
import numpy as np
from hermes_core import Samples, build_rows, pack

samples = Samples.from_lists([np.arange(500)] * 400, [np.ones(500, bool)] * 400)
packing = pack(samples.lengths, row_length=1000)
expected = build_rows(samples, packing, range(40)).labels.copy()
stop = threading.Event()

def churn():
    while not stop.is_set():
        build_rows(samples, packing, range(40))

threads = [threading.Thread(target=churn) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(40):
    child = os.fork()
    if child == 0:
        same = all(np.array_equal(build_rows(samples, packing, range(40)).labels, expected)
                   for _ in range(5))
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
for thread in threads:
    thread.join()
print("the same in every child")
"""


def test_children_forked_at_any_moment_build_the_same_rows() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", FORKS],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout == "the same in every child\n", done.stderr


# ---- threads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [2, 3, 7, 1024])
@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_rows_are_the_same_for_any_number_of_threads(
    samples: Samples, packing: Packing, dtype: Any, threads: int
) -> None:
    assert packing.tokens > 4 * 131_072  # so many that several threads are used
    rows = range(packing.rows)
    expected = build_rows(samples, packing, rows, dtype=dtype)
    assert_same(build_rows(samples, packing, rows, dtype=dtype, threads=threads), expected)


def test_samples_of_one_long_row_are_shared_among_threads(samples: Samples) -> None:
    packing = pack(samples.lengths, row_length=1 << 20)
    assert packing.rows == 1
    expected = build_rows(samples, packing, [0])
    assert_same(build_rows(samples, packing, [0], threads=4), expected)


def test_large_id_is_found_by_whichever_thread(samples: Samples, packing: Packing) -> None:
    shard = samples.shards[0]
    at = int(shard.offsets[900])
    shard.tokens[at] += np.uint32(1 << 31)
    try:
        with pytest.raises(ValueError, match="sample 900 of shard 0 has the token id 2147"):
            build_rows(samples, packing, range(packing.rows), dtype=np.int32, threads=4)
    finally:
        shard.tokens[at] -= np.uint32(1 << 31)
