"""Where each sample's segment lies in a batch of packed rows: made once, shared by all layers.

Shapes: T packed tokens, S segments, P slots of the padded layout.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Bucket:
    """Segments of like length, side by side in the padded layout: ``count`` lines of ``width``."""

    start: int  # first slot
    count: int
    width: int


@dataclass(frozen=True)
class BucketPlan:
    """A layout in which segments of like length are padded to one width.

    Causal attention lets nothing look at what comes later, so trailing slots harm nobody; they
    repeat their segment's last token and their gradient is taken as zero.
    """

    buckets: tuple[Bucket, ...]
    token_of_slot: Tensor | None  # [P] int64; None: slots are the tokens in their order
    slot_of_token: Tensor | None  # [T] int64
    real_slots: Tensor | None  # [P, 1, 1] bool; None: every slot is a token


@dataclass(frozen=True)
class Segments:
    """Segments of a flat batch; segment s is tokens cu_seqlens[s] to cu_seqlens[s + 1]."""

    cu_seqlens: Tensor  # [S + 1] int32, on the device of the batch
    lengths: NDArray[np.int64] = field(repr=False)  # [S], on the host

    @property
    def tokens(self) -> int:
        """T, where the last segment ends."""
        return int(self.lengths.sum())

    @cached_property
    def max_length(self) -> int:
        """Tokens of the longest segment."""
        return int(self.lengths.max(initial=0))

    @cached_property
    def bucket_plan(self) -> BucketPlan:
        """The padded layout of the CPU backend; made at its first use."""
        return plan_buckets(self.lengths)

    def to(self, device: torch.device | str) -> Segments:
        """The same segments for tensors on ``device``."""
        return Segments(self.cu_seqlens.to(device, non_blocking=True), self.lengths)


def segments(
    cu_seqlens: Tensor | NDArray[np.integer], *, device: torch.device | str | None = None
) -> Segments:
    """Segments of a batch from ``cu_seqlens``, as `build_rows` gives it.

    Args:
        cu_seqlens: [S + 1], integer, rising from 0. Segments of no token are left out. Pass it
            from the host: a CUDA tensor is copied back, which waits for the device.
        device: where q, k and v will be; the device of ``cu_seqlens`` if None.

    Raises:
        TypeError: not integers. ValueError: not 1-D, does not start at 0, falls, or passes 2^31.
    """
    if isinstance(cu_seqlens, Tensor):
        device = cu_seqlens.device if device is None else device
        bounds = cu_seqlens.detach().cpu().numpy()
    else:
        bounds = np.asarray(cu_seqlens)
    if not np.issubdtype(bounds.dtype, np.integer):
        raise TypeError(f"cu_seqlens must hold integers, got {bounds.dtype}")
    if bounds.ndim != 1 or len(bounds) < 1:
        raise ValueError(f"cu_seqlens must be 1-D with at least one entry, got {bounds.shape}")
    bounds = bounds.astype(np.int64)
    lengths = np.diff(bounds)
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {bounds[0]}")
    if len(lengths) and lengths.min() < 0:
        at = int(lengths.argmin())
        raise ValueError(
            f"cu_seqlens falls from {bounds[at]} to {bounds[at + 1]} at entry {at + 1}"
        )
    if bounds[-1] > INT32_MAX:
        raise ValueError(f"cu_seqlens ends at {bounds[-1]}, beyond int32; use fewer rows a batch")
    lengths = lengths[lengths > 0]
    kept = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return Segments(torch.from_numpy(kept).to(device or "cpu", non_blocking=True), lengths)


def padded_width(length: int) -> int:
    """The width a segment is padded to, so that few widths serve many lengths.

    Attention costs the square of the width: short segments share powers of two, since their cost
    is that of the call; middle ones share multiples of 32; long ones are never padded.
    """
    if length > 256:
        return length
    if length > 64:
        return -(-length // 32) * 32
    return max(8, 1 << (length - 1).bit_length())


def plan_buckets(lengths: NDArray[np.int64]) -> BucketPlan:
    """The padded layout for segments of these lengths, [S], all at least 1."""
    starts = np.cumsum(lengths) - lengths
    widths = np.array([padded_width(int(n)) for n in lengths], dtype=np.int64)
    buckets, tokens, real, slot = [], [], [], 0
    for width in np.unique(widths).tolist():
        members = np.flatnonzero(widths == width)
        width = int(lengths[members].max())  # no wider than its longest
        place = np.arange(width)
        inside = place < lengths[members, None]
        last = starts[members, None] + lengths[members, None] - 1
        tokens.append(np.where(inside, starts[members, None] + place, last).ravel())
        real.append(inside.ravel())
        buckets.append(Bucket(slot, len(members), width))
        slot += len(members) * width
    if not buckets:
        return BucketPlan((), None, None, None)
    token_of_slot, is_real = np.concatenate(tokens), np.concatenate(real)
    total = int(lengths.sum())
    if slot == total and bool((token_of_slot == np.arange(total)).all()):
        return BucketPlan(tuple(buckets), None, None, None)
    slot_of_token = np.empty(total, dtype=np.int64)
    slot_of_token[token_of_slot[is_real]] = np.flatnonzero(is_real)
    mask = None if is_real.all() else torch.from_numpy(is_real)[:, None, None]
    return BucketPlan(
        tuple(buckets), torch.from_numpy(token_of_slot), torch.from_numpy(slot_of_token), mask
    )
