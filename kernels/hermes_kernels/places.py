"""Where segments lie in a batch, as every attention kernel is told. Loads no Triton.

A segment is cut into blocks of `launch.TILE` tokens from its own first token on, the last one
shorter. Kernels walk over blocks, or over parts of them, so that a segment's sums are added in one
order wherever it stands. Tokens that are segments of their own have nothing to add: those that
follow one another share a block, and padding costs next to nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Places(NamedTuple):
    """Of T tokens; all int32, on the device of what is attended to."""

    starts: Tensor  # [T], first token of each token's segment
    ends: Tensor  # [T], one past its last
    block_of: Tensor  # [T], the block that each token is in
    blocks: Tensor  # [T + 1], first token of each block, then T
    query_order: Tensor  # [ceil(T / TILE)], query tiles, the longest walk first
    key_order: Tensor  # the same of key tiles
