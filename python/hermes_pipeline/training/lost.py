"""What samples longer than a row cost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hermes_core import Store
from hermes_core.packing import TooLong
from hermes_pipeline.errors import UserError


@dataclass(frozen=True, slots=True)
class Lost:
    """What of a store no row holds, because samples are longer than a row."""

    samples: int
    tokens: int
    kept: int  # of the tokens


def lost_to_rows(store: Store, *, row_length: int, too_long: TooLong) -> Lost:
    """Return what `drop` or `truncate` takes away; reads the spans, not the tokens.

    Raises:
        UserError: the store is damaged.
    """
    long = store.lengths > row_length
    if not long.any():
        return Lost(0, 0, 0)
    cut = row_length if too_long == "truncate" else 0  # what comes before it stays
    kept = 0
    for first, shard in zip(store.first_samples.tolist(), store.shards, strict=False):
        spans_of_each = np.diff(shard.span_offsets)
        if spans_of_each.min(initial=0) < 0:
            raise UserError(f"the store {store.folder} is damaged; copy it again")
        spans = shard.spans[np.repeat(long[first : first + len(shard)], spans_of_each)]
        kept += int(np.diff(np.maximum(spans.astype(np.int64), cut)).sum())
    return Lost(int(long.sum()), int((store.lengths[long] - cut).sum()), kept)
