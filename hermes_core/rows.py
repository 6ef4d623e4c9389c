"""Rows of a batch: samples of a plan, gathered from their shards into what a model takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hermes_core import _C
from hermes_core.packing import Packing
from hermes_core.samples import IGNORE_INDEX, Samples
from hermes_core.windows import PackedRows

RowNumbers = Sequence[int] | range | NDArray[np.integer]
Column = NDArray[np.int64] | NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """R rows of L tokens, S segments (samples and padding).

    Attributes:
        input_ids: [R, L] int64 or int32; ``labels`` and ``positions`` are of the same dtype.
        labels: [R, L], the next token of the same segment where it is kept, else `IGNORE_INDEX`.
        positions: [R, L], 0 at each segment's first token.
        cu_seqlens: [S + 1] int32, where each segment starts in the flat batch, then R * L; the
            padding behind a row's last sample is a segment.
    """

    input_ids: Column
    labels: Column
    positions: Column
    cu_seqlens: NDArray[np.int32]
    _kept_count: int | None = None  # where whoever built the rows has counted

    @classmethod
    def empty(
        cls,
        rows: int,
        row_length: int,
        *,
        dtype: DTypeLike = np.int64,
    ) -> Rows:
        """Memory for `build_rows` to write in, batch after batch.

        There is room for a segment at each token, which is only touched as far as it is used.
        """
        shape, ids = (rows, row_length), _id_dtype(dtype)
        columns = [np.empty(shape, ids) for _ in range(3)]
        return cls(columns[0], columns[1], columns[2], np.empty(rows * row_length + 1, np.int32))

    @property
    def kept(self) -> NDArray[np.int64]:
        """[K] flat indices of the labels that count, rising; looked up at each call."""
        return np.flatnonzero(self.labels != IGNORE_INDEX)

    @property
    def kept_count(self) -> int:
        """How many labels count: as they were built, so count anew if you change ``labels``."""
        if self._kept_count is None:
            return int(np.count_nonzero(self.labels != IGNORE_INDEX))
        return self._kept_count


def build_rows(
    samples: Samples,
    packing: Packing | PackedRows,
    rows: RowNumbers,
    *,
    pad_id: int = 0,
    dtype: DTypeLike | None = None,
    out: Rows | None = None,
    threads: int = 1,
) -> Rows:
    """The rows of a plan with these numbers, in this order.

    Memory that held a batch is used again when its arrays are gone, up to 256 MiB of it, so a loop
    that lets go of a batch writes the next one to warm memory. With ``out`` the caller says where
    to write, for example to memory that a GPU reads by itself:

        tensors = [torch.empty(8, 16_384, dtype=torch.int64, pin_memory=True) for _ in range(3)]
        ends = torch.empty(8 * 16_384 + 1, dtype=torch.int32, pin_memory=True)
        out = Rows(*(tensor.numpy() for tensor in (*tensors, ends)))
        rows = build_rows(samples, packing, range(8), out=out)  # the same memory

    Args:
        samples: those that the plan was made from; only the shards in use are loaded.
        pad_id: input id behind a row's last sample; never in the loss.
        dtype: np.int64 or np.int32, of input ids, labels and positions; None for that of ``out``,
            or int64.
        out: its arrays, [rows, row_length], are written and returned; of cu_seqlens, which may
            have more room than is needed, the part in use. After an error they hold anything.
        threads: that write at once, where each has 131,072 tokens or more; the rows are the same
            for any number.

    Raises:
        TypeError: an argument or an array of ``out`` of another type.
        ValueError: row numbers of another shape or out of range, a plan of other samples where that
            shows (by its store's fingerprint, a sample that is not there, or is too long for its
            row), a corrupt store, an array of ``out`` that cannot be written so, a token id over
            int32.
    """
    _refuse_another_store(samples, packing)
    try:
        built: Rows = _C.build_rows(  # by place: names would cost a tenth of a small batch
            Rows,
            samples._in_use,
            samples.shard,
            packing.samples,
            packing.row_offsets,
            rows if isinstance(rows, range) else row_numbers(rows, packing.rows),
            packing.row_length,
            packing.too_long == "truncate",
            pad_id,
            dtype,
            None if out is None else (out.input_ids, out.labels, out.positions, out.cu_seqlens),
            threads,
        )
    except AttributeError:
        _refuse_others(samples, packing, out)
        raise
    if out is not None:  # its labels are these now, whatever it was made as
        object.__setattr__(out, "_kept_count", built._kept_count)
    return built


def row_numbers(rows: RowNumbers, count: int) -> NDArray[np.int64]:
    """Numbers of rows as an array; those of a range are inside [0, count), others are 64 bits."""
    if isinstance(rows, range):
        return _C.range_numbers(rows, count)
    numbers = np.asarray(rows)
    if numbers.ndim != 1:
        raise ValueError(f"rows has shape {list(numbers.shape)}, want [rows]")
    if numbers.size and numbers.dtype.kind not in "iu":
        raise TypeError(f"rows is {numbers.dtype}, want integers")
    if numbers.dtype == np.uint64:
        check_row_numbers(numbers, count)
    return np.ascontiguousarray(numbers, np.int64)


def _refuse_another_store(samples: object, packing: object) -> None:
    """A plan and samples that both know their store know the same."""
    planned, given = getattr(packing, "fingerprint", ""), getattr(samples, "fingerprint", "")
    if planned and given and planned != given:
        raise ValueError(
            f"packing was made for the store {planned}, not for samples of {given}; pack them again"
        )


def _refuse_others(samples: object, packing: object, out: object) -> None:
    """Name the first argument that is of another type."""
    for name, value, wanted, words in (
        ("samples", samples, Samples, "Samples"),
        ("packing", packing, Packing | PackedRows, "a Packing or PackedRows"),
        ("out", out, Rows | None, "Rows"),
    ):
        if not isinstance(value, wanted):
            raise TypeError(f"{name} is {type(value).__name__}, want {words}") from None


def check_row_numbers(numbers: NDArray[np.integer], count: int) -> None:
    """Refuse what is outside [0, count)."""
    bad = np.flatnonzero((numbers < 0) | (numbers >= count))
    if bad.size:
        raise ValueError(f"rows[{bad[0]}] is {numbers[bad[0]]}, outside [0, {count})")


def _id_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    ids = np.dtype(dtype)
    if ids not in (np.int64, np.int32):
        raise TypeError(f"dtype is {ids}, want int64 or int32")
    return ids
