"""Rows of a batch: samples of a plan, gathered from their shards into what a model takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hermes_core import _C
from hermes_core.packing import Packing
from hermes_core.samples import Samples, check_integer
from hermes_core.windows import PackedRows


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """R rows of L tokens, S segments (samples and padding), K kept labels.

    Attributes:
        input_ids: [R, L] int64.
        labels: [R, L] int64, the next token of the same segment where it is kept, else
            `IGNORE_INDEX`.
        positions: [R, L] int64, 0 at each segment's first token.
        cu_seqlens: [S + 1] int32, where each segment starts in the flat batch, then R * L; the
            padding behind a row's last sample is a segment.
        kept: [K] int64, flat indices of the labels that count, rising.
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    positions: NDArray[np.int64]
    cu_seqlens: NDArray[np.int32]
    kept: NDArray[np.int64]


def build_rows(
    samples: Samples,
    packing: Packing | PackedRows,
    rows: Sequence[int] | range | NDArray[np.integer],
    *,
    pad_id: int = 0,
) -> Rows:
    """The rows of a plan with these numbers, in this order.

    Args:
        samples: those that the plan was made from; only the shards in use are loaded.
        pad_id: input id behind a row's last sample; never in the loss.

    Raises:
        ValueError: a row number out of range, a plan of other samples, a corrupt store.
    """
    numbers = _check_rows(rows, packing.rows)
    pad_id = check_integer("pad_id", pad_id, 0, (1 << 63) - 1)
    if len(numbers) * packing.row_length >= 1 << 31:
        raise ValueError(
            f"{len(numbers)} rows of {packing.row_length} tokens are more than the 2**31 - 1 that "
            f"cu_seqlens can count; build fewer rows at once"
        )
    starts, ends = packing.row_offsets[numbers], packing.row_offsets[numbers + 1]
    row_starts = np.zeros(len(numbers) + 1, np.int64)
    np.cumsum(ends - starts, out=row_starts[1:])
    places = np.arange(row_starts[-1]) + np.repeat(starts - row_starts[:-1], ends - starts)
    ids = packing.samples[places]
    if ids.size and not 0 <= ids.min() <= ids.max() < len(samples):
        raise ValueError(
            f"the plan names sample {ids.max() if ids.min() >= 0 else ids.min()} but there are "
            f"{len(samples)}: it was made for other samples"
        )
    of_shard = np.searchsorted(samples.first_samples, ids, side="right") - 1
    touched, shard_indices = np.unique(of_shard, return_inverse=True)
    shards = [samples.shard(int(number)) for number in touched]
    built = _C.build_rows(
        [(s.tokens, s.offsets, s.spans, s.span_offsets) for s in shards],
        shard_indices.astype(np.int64, copy=False),
        ids - samples.first_samples[of_shard],
        row_starts,
        row_length=packing.row_length,
        pad_id=pad_id,
        truncate=packing.too_long == "truncate",
    )
    return Rows(built.input_ids, built.labels, built.positions, built.cu_seqlens, built.kept)


def _check_rows(rows: Sequence[int] | range | NDArray[np.integer], count: int) -> NDArray[np.int64]:
    if isinstance(rows, range):
        rows = np.arange(rows.start, rows.stop, rows.step)
    numbers = np.asarray(rows)
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise TypeError(f"rows is {numbers.dtype} {list(numbers.shape)}, want a list of integers")
    bad = np.flatnonzero((numbers < 0) | (numbers >= count))
    if bad.size:
        raise ValueError(f"rows[{bad[0]}] is {numbers[bad[0]]}, outside [0, {count})")
    return numbers.astype(np.int64)
