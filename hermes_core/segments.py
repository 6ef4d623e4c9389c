"""Where each sample's segment lies in a batch of packed rows: made once, shared by all layers.

Shapes: T packed tokens, S segments.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hermes_kernels.launch import TILE
from hermes_kernels.places import Places

INT32_MAX = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Segments:
    """Segments of a flat batch, as every backend wants them; shapes follow from T alone."""

    places: Places = field(repr=False)
    known_lengths: NDArray[np.int64] | None = field(default=None, repr=False)  # see `lengths`

    @property
    def tokens(self) -> int:
        """T."""
        return self.places.starts.shape[0]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[S] of the segments that hold a token, on the host.

        Waits for the device, unless the segments were made from a ``cu_seqlens`` on the host.
        """
        return lengths_of(self.places.starts) if self.known_lengths is None else self.known_lengths

    @cached_property
    def max_length(self) -> int:
        """Tokens of the longest segment; waits as `lengths` does."""
        return int(self.lengths.max(initial=0))

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """[S + 1] int32 on the device, bounds of the segments that hold a token; waits as `lengths`
        does."""
        bounds = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)
        return torch.from_numpy(bounds).to(self.places.starts.device, non_blocking=True)

    def to(self, device: torch.device | str) -> Segments:
        """The same segments for tensors on ``device``."""
        moved = (x.to(device, non_blocking=True) for x in self.places)
        return replace(self, places=Places(*moved))


def segments(
    cu_seqlens: Tensor | NDArray[np.integer],
    tokens: int | None = None,
    *,
    device: torch.device | str | None = None,
) -> Segments:
    """Segments of a batch from ``cu_seqlens``, as `build_rows` gives it.

    Args:
        cu_seqlens: [S + 1], integer, rising from 0; segments of no token are allowed. On a CUDA
            device nothing waits for it and its values are taken on trust.
        tokens: T; where ``cu_seqlens`` ends if None, which waits for the device it is on. A token
            after the last segment is one of its own, so that padding costs next to nothing.
        device: where q, k and v will be; the device of ``cu_seqlens`` if None.

    Raises:
        TypeError: not integers.
        ValueError: not 1-D, does not start at 0, falls, ends beyond ``tokens``, or passes 2^31.
    """
    bounds = torch.as_tensor(cu_seqlens).detach()
    if bounds.dtype.is_floating_point or bounds.dtype.is_complex or bounds.dtype == torch.bool:
        raise TypeError(f"cu_seqlens must hold integers, got {bounds.dtype}")
    if bounds.ndim != 1 or len(bounds) < 1:
        raise ValueError(
            f"cu_seqlens must be 1-D with at least one entry, got {tuple(bounds.shape)}"
        )
    known = None
    if bounds.device.type == "cpu":
        known = _check(bounds.numpy(), tokens)
    if tokens is None:
        tokens = int(bounds[-1])
    bounds = bounds.to(device or bounds.device, torch.int32, non_blocking=True)
    return _of(bounds, tokens, known)


def _check(bounds: NDArray[np.integer], tokens: int | None) -> NDArray[np.int64]:
    """Lengths of the segments that hold a token."""
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {bounds[0]}")
    lengths = np.diff(bounds.astype(np.int64))
    if len(lengths) and lengths.min() < 0:
        at = int(lengths.argmin())
        raise ValueError(
            f"cu_seqlens falls from {bounds[at]} to {bounds[at + 1]} at entry {at + 1}"
        )
    if bounds[-1] > INT32_MAX:
        raise ValueError(f"cu_seqlens ends at {bounds[-1]}, beyond int32; use fewer rows a batch")
    if tokens is not None and bounds[-1] > tokens:
        raise ValueError(f"cu_seqlens ends at {bounds[-1]}, beyond the {tokens} tokens")
    tail = 0 if tokens is None else tokens - int(bounds[-1])
    return np.concatenate([lengths[lengths > 0], np.ones(tail, np.int64)])


def segments_of_positions(positions_BL: Tensor, mask_BL: Tensor | None = None) -> Segments:
    """Segments of B rows laid end to end: one begins where positions do not go on by one.

    Args:
        positions_BL: integer; 0, 1, 2 ... in each segment, as collators that pack give them.
        mask_BL: False at padding, each token of which is then a segment, and costs nothing.

    Nothing waits for the device.
    """
    goes_on = positions_BL[:, 1:] == positions_BL[:, :-1] + 1
    if mask_BL is not None:
        goes_on &= mask_BL[:, 1:].bool() & mask_BL[:, :-1].bool()
    begins = torch.nn.functional.pad(~goes_on, (1, 0), value=True).flatten()
    tokens = begins.shape[0]
    t = torch.arange(tokens, dtype=torch.int32, device=begins.device)
    starts = torch.where(begins, t, 0).cummax(0).values
    next_begin = torch.where(begins, t, tokens).flip(0).cummin(0).values.flip(0)
    ends = torch.nn.functional.pad(next_begin[1:], (0, 1), value=tokens)
    return _ordered(starts, ends, None)


def _of(cu_seqlens: Tensor, tokens: int, known: NDArray[np.int64] | None) -> Segments:
    """Bounds of each token, by operations that no host waits for."""
    t = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
    owner = torch.searchsorted(cu_seqlens, t, right=True)  # 1 for the first segment
    last = cu_seqlens.shape[0] - 1
    after = owner > last
    starts = torch.where(after, t, cu_seqlens[owner - 1])
    ends = torch.where(after, t + 1, cu_seqlens[owner.clamp(max=last)])
    return _ordered(starts, ends, known)


def _ordered(starts: Tensor, ends: Tensor, known: NDArray[np.int64] | None) -> Segments:
    """With blocks, and the orders of tiles: a query tile walks from its first token's start to its
    own last token, a key tile from its first token to its last token's end."""
    tokens = starts.shape[0]
    t = torch.arange(tokens + 1, dtype=torch.int32, device=starts.device)
    begins = _begins(starts, ends, t[:tokens])
    block_of = begins.cumsum(0) - 1
    # What begins no block has a place of its own, after those of blocks: no two write one.
    room = t.new_full((2 * tokens + 1,), tokens)
    places = torch.where(begins, block_of, t[:tokens] + (tokens + 1))
    blocks = room.scatter_(0, places, t[:tokens])[: tokens + 1]
    firsts = t[:tokens:TILE].long()
    lasts = (firsts + TILE).clamp(max=tokens) - 1
    walk_back = block_of[lasts] - block_of[starts[firsts].long()]
    walk_on = block_of[ends[lasts].long() - 1] - block_of[firsts]
    orders = (walk.argsort(descending=True, stable=True) for walk in (walk_back, walk_on))
    return Segments(Places(*(x.int() for x in (starts, ends, block_of, blocks, *orders))), known)


def _begins(starts: Tensor, ends: Tensor, t: Tensor) -> Tensor:
    """[T] bool, whether a block begins at each token."""
    alone = ends - starts == 1
    follows = torch.nn.functional.pad(alone[:-1], (1, 0), value=False) & alone
    return ((t - starts) % TILE == 0) & ~(follows & (t % TILE != 0))


def lengths_of(starts_T: Tensor) -> NDArray[np.int64]:
    """[S], the lengths of the segments whose first tokens ``starts_T`` tells."""
    starts = starts_T.detach().cpu().numpy()
    firsts = np.flatnonzero(starts == np.arange(len(starts)))
    return np.diff(firsts, append=len(starts)).astype(np.int64)
