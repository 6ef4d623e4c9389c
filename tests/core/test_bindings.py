"""The compiled core takes what it names and refuses all else; nothing it is given crashes it.

That both functions give the same on every instruction set is in test_packing.py and test_rows.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hermes_core import _C, Rows, Samples, Shard, build_rows, pack

T = TypeVar("T")
PACK: dict[str, Any] = {
    "row_length": 8,
    "strategy": "best_fit_decreasing",
    "too_long": "error",
    "max_samples": 8,
    "seed_words": [],
}


def read_only(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array.flags.writeable = False
    return array


def misaligned(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    data = np.zeros(array.nbytes + 1, np.uint8)[1:]
    data[:] = array.reshape(-1).view(np.uint8)
    return data.view(array.dtype).reshape(array.shape)


PARTS = ("tokens", "offsets", "spans", "span_offsets")
PLAN = ("samples", "row_offsets", "rows")


def a_batch() -> dict[str, Any]:
    """Two samples of five and three tokens in one row of eight."""
    return {
        "tokens": np.arange(8, dtype=np.uint16),
        "offsets": np.array([0, 5, 8]),
        "spans": np.array([[1, 3], [0, 2]], np.uint32),
        "span_offsets": np.array([0, 1, 2]),
        "first_samples": np.array([0, 2]),
        "samples": np.array([0, 1]),
        "row_offsets": np.array([0, 2]),
        "rows": np.array([0]),
        "row_length": 8,
        "truncate": False,
        "pad_id": 0,
        "dtype": None,
        "out": None,
        "threads": 1,
    }


def build(batch: dict[str, Any]) -> Rows:
    shard = SimpleNamespace(**{part: batch[part] for part in PARTS})
    shards = _C.Shards(batch["first_samples"])
    load = batch.get("load", lambda _: shard)
    rest = [value for name, value in batch.items() if name not in (*PARTS, "first_samples", "load")]
    rows = _C.build_rows(Rows, shards, load, *rest)
    assert isinstance(rows, Rows)
    return rows


@pytest.mark.parametrize(
    "lengths",
    [
        np.array([1, 2], ">i8"),
        np.array([1, 2], "m8[s]"),
        np.array([1.0, 2.0]),
        np.array([np.nan]),
        np.array([True]),
        np.array([1, "a"], object),
        np.array(["1"]),
        [1, 2],
        None,
        3,
    ],
    ids=repr,
)
def test_pack_takes_no_other_dtype_and_no_list(lengths: Any) -> None:
    with pytest.raises(TypeError, match="lengths"):
        _C.pack(lengths, **PACK)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"lengths": np.ones((2, 2), np.int64)}, ValueError, "lengths is not one aligned row"),
        ({"lengths": np.array(3)}, ValueError, "lengths is not one aligned row"),
        ({"lengths": np.arange(8)[::2]}, ValueError, "lengths is not one aligned row"),
        ({"lengths": np.arange(8)[::-1]}, ValueError, "lengths is not one aligned row"),
        ({"lengths": misaligned(np.array([1]))}, ValueError, "lengths is not one aligned row"),
        ({"max_samples": 0}, ValueError, "max_samples is 0, outside"),
        ({"lengths": np.array([1, -5])}, ValueError, r"lengths\[1\] is -5, outside \[1, 8\]"),
        ({"lengths": np.array([1 << 62])}, ValueError, r"lengths\[0\] is 4611686018427387904"),
        ({"lengths": np.array([-(1 << 63)])}, ValueError, r"lengths\[0\] is -9223372036854775808"),
        ({"row_length": 0}, ValueError, "row_length is 0, outside"),
        ({"row_length": 1 << 62}, ValueError, "row_length is 4611686018427387904, outside"),
        ({"row_length": 1 << 70}, TypeError, "row_length: "),
        ({"row_length": 8.5}, TypeError, "row_length: "),
        ({"strategy": "worst"}, ValueError, "strategy is 'worst'"),
        ({"strategy": None}, TypeError, "strategy: "),
        ({"too_long": "\0"}, ValueError, "too_long is"),
        ({"seed_words": [1, 2]}, ValueError, "seed_words has 2 elements, want 4"),
        ({"seed_words": [-1, 2, 3, 4]}, TypeError, "seed_words: "),
        ({"seed_words": [1 << 64, 2, 3, 4]}, TypeError, "seed_words: "),
    ],
)
def test_pack_refuses_by_name_and_value(
    change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        _C.pack(**{"lengths": np.array([1, 2]), **PACK, **change})
    if "strategy" not in change:
        in_windows = {name: value for name, value in PACK.items() if name != "strategy"}
        with pytest.raises(kind, match=message):
            _C.pack_in_windows(**{"lengths": np.array([1, 2]), **in_windows, "window": 9, **change})


def test_windows_refuse_an_age_below_0() -> None:
    with pytest.raises(ValueError, match="ages is -1, outside"):
        _C.pack_windows(
            np.full(5, 3), np.array([0, -1]), window=2, row_length=9, max_samples=9, seed_words=[],
            first_window=0, finish=False,
        )  # fmt: skip


def test_read_only_arrays_are_taken_and_not_written() -> None:
    batch = a_batch()
    for name in (*PARTS, *PLAN, "first_samples"):
        read_only(batch[name])
    assert build(batch).input_ids.tolist() == [list(range(8))]
    assert _C.pack(read_only(np.array([3, 5])), **PACK).samples.tolist() == [1, 0]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (lambda array: array.astype(np.float64), TypeError),
        (lambda array: array.astype(np.int16), TypeError),
        (lambda array: array.astype(array.dtype.newbyteorder()), TypeError),
        (lambda array: array.astype(object), TypeError),
        (lambda array: np.repeat(array, 2, axis=0)[::2], TypeError),
        (lambda array: array.tolist(), TypeError),
        (lambda array: None, TypeError),
        (lambda array: array[None], ValueError),
        (misaligned, ValueError),
    ],
    ids=["float", "int16", "bytes", "object", "strided", "list", "none", "2-D", "unaligned"],
)
def test_wrong_array_of_a_shard_is_refused_by_name(
    part: str, spoil: Any, kind: type[Exception]
) -> None:
    batch = a_batch()
    batch[part] = spoil(batch[part])
    with pytest.raises(kind, match=rf"^{part} "):
        build(batch)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"first_samples": np.array([], np.int64)}, ValueError, "first_samples does not rise"),
        ({"first_samples": np.array([1, 2])}, ValueError, "first_samples does not rise from 0"),
        ({"first_samples": np.array([0, 2, 1])}, ValueError, "first_samples does not rise"),
        ({"first_samples": np.array([0, 3])}, ValueError, "shard 0 has 2 samples, want 3"),
        ({"first_samples": np.array([0])}, ValueError, "names sample 0 but there are 0: it was"),
        ({"load": None}, TypeError, "load: "),
        ({"load": lambda _: (1, 2)}, AttributeError, "no attribute 'tokens'"),
        ({"samples": np.array([0, 2])}, ValueError, "the plan names sample 2 but there are 2"),
        ({"samples": np.array([0, -1])}, ValueError, "the plan names sample -1 but there are 2"),
        ({"samples": np.array([1 << 62, 0])}, ValueError, "names sample 4611686018427387904 but"),
        ({"samples": np.array([0])}, ValueError, r"row 0 of the plan has samples \[0, 2\) of 1"),
        ({"samples": np.array([0.0, 1.0])}, TypeError, r"samples is float64 \[2\], want a contig"),
        ({"samples": [0, 1]}, TypeError, "samples is list, want a contiguous array of int64"),
        ({"samples": np.array([[0, 1]])}, ValueError, "samples is 2-D, want 1-D"),
        ({"row_offsets": np.array([], np.int64)}, ValueError, r"len\(row_offsets\) is 0"),
        (
            {"row_offsets": np.array([-1, 2])},
            ValueError,
            r"has samples \[-1, 2\) of 2: the plan is",
        ),
        ({"row_offsets": np.array([0, 3])}, ValueError, r"has samples \[0, 3\) of 2: the plan is"),
        ({"row_offsets": np.array([2, 1])}, ValueError, r"has samples \[2, 1\) of 2: the plan is"),
        ({"row_offsets": np.array([0, 2], np.int32)}, TypeError, "row_offsets is int32"),
        ({"rows": np.array([1])}, ValueError, r"rows\[0\] is 1, outside \[0, 1\)"),
        ({"rows": np.array([0, -1])}, ValueError, r"rows\[1\] is -1, outside \[0, 1\)"),
        ({"rows": [0]}, TypeError, "rows is list, want a contiguous array of int64"),
        ({"rows": np.arange(4)[::2]}, TypeError, r"rows is int64 \[2\], not contiguous, want"),
        ({"rows": range(-1, 1)}, ValueError, r"rows\[0\] is -1, outside \[0, 1\)"),
        ({"rows": range(3)}, ValueError, r"rows\[1\] is 1, outside \[0, 1\)"),
        ({"rows": range(0, -9, -4)}, ValueError, r"rows\[1\] is -4, outside \[0, 1\)"),
        ({"rows": range(10**30)}, ValueError, r"rows\[1\] is 1, outside \[0, 1\)"),
        ({"rows": range(10**30, 10**31)}, ValueError, rf"rows\[0\] is {10**30}, outside"),
        ({"row_length": 7}, ValueError, "sample 1 of shard 0 ends at token 8 of a row of 7"),
        ({"row_length": 1}, ValueError, "row 0 of the plan has 2 samples, more than the 1 tokens"),
        ({"row_length": 0}, ValueError, "row_length is 0, outside"),
        ({"row_length": -1}, ValueError, "row_length is -1, outside"),
        ({"row_length": 1 << 31}, ValueError, "1 rows of 2147483648 tokens are more than the 2"),
        ({"row_length": 1 << 62}, ValueError, "row_length is 4611686018427387904, outside"),
        ({"pad_id": 1 << 63}, ValueError, "pad_id is 9223372036854775808, outside"),
        ({"pad_id": 0.5}, TypeError, "pad_id is 0.5, want an integer"),
        ({"dtype": np.int16}, TypeError, "dtype is int16, want int64 or int32"),
        ({"dtype": "no"}, TypeError, "data type 'no' not understood"),
        ({"out": ()}, ValueError, "out has 0 elements, want 4"),
        ({"out": [1, 2, 3, 4]}, TypeError, "out: "),
    ],
)
def test_build_rows_refuses_by_name_and_value(
    change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        build({**a_batch(), **change})


def test_an_interrupt_is_no_type_error() -> None:
    class Slow:
        def __index__(self) -> int:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build({**a_batch(), "pad_id": Slow()})


def test_numbers_of_a_range_are_those_of_no_list() -> None:
    assert _C.range_numbers(range(7, -1, -3), 8).tolist() == [7, 4, 1]
    with pytest.raises(TypeError, match="rows is list, want a range"):
        _C.range_numbers([0, 5, 1], 8)


def test_error_of_a_loading_shard_comes_through() -> None:
    def load(_: int) -> Any:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        build({**a_batch(), "load": load})


def attempt(call: Callable[[], T]) -> T | str:
    """What it returns, or the words with which it refuses; any other error is a failure."""
    try:
        return call()
    except (TypeError, ValueError) as error:
        return str(error)


VALUES = st.one_of(
    st.integers(-2, 9), st.sampled_from([1 << 31, 1 << 32, 1 << 62, (1 << 63) - 1, -(1 << 63)])
)


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    """Mostly an int64 array; sometimes of another dtype, layout or no array at all."""
    values = draw(st.lists(VALUES, max_size=6))
    array = np.array(values, np.int64)
    kind = draw(st.integers(0, 12))
    others: dict[int, Any] = {
        0: array.astype(np.float64),
        1: np.append(array.astype(np.float64), np.nan),
        2: array.astype(object),
        3: np.stack([array, array]),
        4: np.repeat(array, 2)[::2],
        5: array.astype(">i8"),
        6: array.astype(np.uint32),
        7: values,
        8: array[::-1],
    }
    made = others.get(kind, array)
    return made if made is values else read_only(made)


def spoil(draw: st.DrawFn, array: np.ndarray[Any, Any]) -> Any:
    """The array with a few elements changed, cut, or as another kind of object."""
    if draw(st.integers(0, 9)) == 0:
        return draw(arrays())
    array = array[: draw(st.integers(max(0, len(array) - 1), len(array)))].copy()
    for _ in range(draw(st.integers(0, 2)) if array.size else 0):
        at = draw(st.integers(0, array.size - 1))
        low, high = np.iinfo(array.dtype).min, np.iinfo(array.dtype).max
        array.reshape(-1)[at] = min(max(draw(VALUES), low), high)
    return array


@st.composite
def outs(draw: st.DrawFn) -> Any:
    """Memory to write in: often right, often not."""
    rows, length = draw(st.sampled_from([(1, 8), (1, 8), (1, 9), (2, 8), (0, 8)]))
    made = Rows.empty(rows, length, dtype=draw(st.sampled_from([np.int64, np.int32])))
    out: list[Any] = [made.input_ids, made.labels, made.positions, made.cu_seqlens]
    if draw(st.integers(0, 3)) == 0:
        out[draw(st.integers(0, 3))] = draw(arrays())
    return tuple(out[: draw(st.sampled_from([4, 4, 4, 3]))])


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    batch = a_batch()
    spoiled = draw(st.sets(st.sampled_from((*PARTS, *PLAN, "first_samples")), max_size=2))
    for name in sorted(spoiled):
        batch[name] = spoil(draw, batch[name])
    batch["row_length"] = draw(st.sampled_from([8, 8, 9, 100, 8, 8, 9, 5, 0, -1, 1 << 62]))
    batch["truncate"] = draw(st.booleans())
    batch["dtype"] = draw(st.sampled_from([None, "i8", "i4", np.int32, ">i8", np.int16]))
    batch["pad_id"] = draw(st.sampled_from([0, 0, -1, 1 << 31, (1 << 63) - 1]))
    batch["threads"] = draw(st.sampled_from([1, 1, 2, 1000, 0, -1]))
    batch["out"] = draw(st.none() | outs())
    return batch


@settings(max_examples=1000)
@given(batch=batches())
def test_any_batch_is_built_or_refused(batch: dict[str, Any]) -> None:
    rows = attempt(lambda: build(batch))
    if isinstance(rows, str):
        assert rows
        return
    flat = rows.labels.reshape(-1)
    assert rows.input_ids.shape == (len(batch["rows"]), batch["row_length"])
    assert np.count_nonzero(flat != _C.IGNORE_INDEX) == rows.kept_count
    assert (np.diff(rows.cu_seqlens) > 0).all()
    assert rows.cu_seqlens[-1] == flat.size


@settings(max_examples=300)
@given(batch=batches())
def test_reading_ahead_of_any_batch_is_done_or_refused(batch: dict[str, Any]) -> None:
    shard = SimpleNamespace(**{part: batch[part] for part in PARTS})

    def ask() -> None:
        shards = _C.Shards(batch["first_samples"])
        plan = (batch[name] for name in PLAN)
        _C.read_ahead(shards, lambda _: shard, *plan, batch["row_length"])

    assert attempt(ask) != ""


@settings(max_examples=600)
@given(
    lengths=arrays(),
    row_length=st.sampled_from([1, 7, 9, 1 << 31, 0, -1, (1 << 31) + 1, 1 << 62, 1 << 70, 2.0]),
    too_long=st.sampled_from(["error", "drop", "truncate"]),
    seed=st.sampled_from([None, 0, -1, 1 << 62, 1 << 200, 0.5]),
)
def test_any_lengths_are_packed_or_refused(
    lengths: Any, row_length: Any, too_long: Any, seed: Any
) -> None:
    plan = attempt(lambda: pack(lengths, row_length=row_length, too_long=too_long, seed=seed))
    if isinstance(plan, str):
        assert any(name in plan for name in ("lengths", "row_length", "seed"))
        return
    packed = np.sort(np.concatenate([plan.samples, plan.dropped]))
    assert packed.tolist() == list(range(len(lengths)))
    assert plan.row_offsets[-1] == len(plan.samples)
    assert 0 < plan.tokens <= plan.rows * row_length


@settings(max_examples=300)
@given(rows=arrays())
def test_any_row_numbers_are_built_or_refused(rows: Any) -> None:
    samples = Samples([Shard(*(a_batch()[part] for part in PARTS))])
    plan = pack(samples.lengths, row_length=5)
    built = attempt(lambda: build_rows(samples, plan, rows))
    if isinstance(built, str):
        assert "rows" in built
        return
    assert built.input_ids.shape == (len(rows), 5)


def test_unknown_instruction_set_is_refused_by_value() -> None:
    code = "from hermes_core import _C; print(_C.active_isa())"
    command = [sys.executable, "-P", "-c", code]
    for isa, wanted in (("scalar", "scalar\n"), ("sse9", "HERMES_CORE_ISA is 'sse9'; want scalar")):
        done = subprocess.run(
            command, env={**os.environ, "HERMES_CORE_ISA": isa}, capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip
        assert wanted in done.stdout + done.stderr
