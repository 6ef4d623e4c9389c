"""Lengths and options that cannot be packed are refused, by name and value."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from hermes_core import pack


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([], ValueError, "lengths is empty: nothing to pack"),
        ([1, 0, 3], ValueError, r"lengths\[1\] is 0, outside \[1, 16\]; every sample needs"),
        ([1, 2, -5], ValueError, r"lengths\[2\] is -5, outside \[1, 16\]"),
        ([1, 2**62], ValueError, r"lengths\[1\] is 4611686018427387904, outside \[1, 16\]; set"),
        ([16, 17, 99], ValueError, r"lengths\[1\] is 17, outside \[1, 16\]; set too_long"),
        (np.array([1, 2**64 - 1], np.uint64), ValueError, r"lengths\[1\] is 18446744073709551615"),
        ([[1, 2]], ValueError, r"lengths is 2-D with shape \(1, 2\)"),
        (np.int64(3), ValueError, "lengths is 0-D"),
        ([1.0, 2.5], TypeError, r"lengths is float64 .*2\.5.*want integers"),
        ([float("nan")], TypeError, "lengths is float64 .*nan"),
        ([True, False], TypeError, "lengths is bool .*True"),
        (["a"], TypeError, "lengths is <U1"),
        ([2**70], TypeError, "lengths is object .*1180591620717411303424"),
        ([-(2**70), 3], TypeError, r"lengths\[0\] is -1180591620717411303424"),
        (np.array([1, None], object), TypeError, r"lengths is object \(lengths\[1\] is None\)"),
        (np.array([3, 5], object), TypeError, "lengths is object .*want integers of at most 64"),
        ([3.0, float("nan"), 5.0], TypeError, r"lengths is float64 \(lengths\[1\] is nan\)"),
        (np.ma.masked_array([3, 5], [0, 1]), TypeError, "lengths is a masked array; pass"),
        ([[1, 2], [3]], TypeError, "lengths is not a row of integers: "),
    ],
)  # fmt: skip
def test_wrong_lengths_are_refused_by_name_and_value(
    lengths: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pack(lengths, row_length=16)  # type: ignore[arg-type]


def test_zero_is_refused_under_every_policy() -> None:
    for too_long in ("error", "drop", "truncate"):
        with pytest.raises(ValueError, match=r"lengths\[0\] is 0, outside"):
            pack([0, 50], row_length=16, too_long=too_long)


def test_nothing_left_after_dropping_is_an_error() -> None:
    with pytest.raises(ValueError, match="all 2 samples are longer than row_length=16"):
        pack([17, 18], row_length=16, too_long="drop")


@pytest.mark.parametrize("row_length", [0, -1, (1 << 31) + 1])
def test_row_length_out_of_range_is_refused(row_length: int) -> None:
    with pytest.raises(ValueError, match=rf"row_length is {row_length}, outside \[1, 2147483648\]"):
        pack([1], row_length=row_length)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strategy": "worst_fit"}, ValueError, "strategy is 'worst_fit', want 'best', 'exact"),
        ({"too_long": "split"}, ValueError, "too_long is 'split', want 'error', 'drop' or"),
        ({"strategy": None}, ValueError, "strategy is None, want 'best'"),
        ({"too_long": b"drop"}, ValueError, "too_long is b'drop', want 'error', 'drop' or"),
        ({"max_samples": 0}, ValueError, r"max_samples is 0, outside \[1, 2147483647\]"),
        ({"max_samples": 2.0}, TypeError, r"max_samples is 2\.0, want an integer"),
        ({"seed": -1}, ValueError, r"seed is -1, outside \[0, "),
        ({"seed": 1.5}, TypeError, "seed is 1.5, want an integer"),
        ({"row_length": 1.5}, TypeError, "row_length is 1.5, want an integer"),
        ({"row_length": 1 << 80}, ValueError, "row_length is 1208925819614629174706176, outside"),
    ],
)
def test_wrong_options_are_refused_by_name_and_value(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pack([1], **{"row_length": 16, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("row_length", [1_000, 1 << 31], ids=["counted", "by digits"])
def test_lengths_that_change_while_they_are_read_are_refused_or_packed(row_length: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 1_000, 200_000)
    done = threading.Event()

    def change() -> None:
        while not done.is_set():
            lengths[:] = 1
            lengths[:] = 999

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(20):  # once it wrote past its memory within three
            try:
                plan = pack(lengths, row_length=row_length, strategy="best_fit_decreasing")
            except ValueError as error:
                assert "lengths changed while they were read" in str(error)  # noqa: PT017
            else:
                assert np.array_equal(np.sort(plan.samples), np.arange(len(lengths)))
    finally:
        done.set()
        thread.join()
