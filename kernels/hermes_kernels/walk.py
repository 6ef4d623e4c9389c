"""The walks of attention kernels, in Triton or in Gluon: which tokens a tile meets, in one order.

A part is J tokens of a block of `places.Places`, counted from the block's first. The first parts of
a walk follow from the tile's first segment alone, which most tiles never leave; the rest are looked
up, by loads that nothing waits for where there is no rest. A part ends where its block does: what a
copy brings beyond is to be masked, for it is another part's.
"""

from __future__ import annotations

import triton
from triton import language as tl

from hermes_kernels.launch import SHIFTED, TILE

BLOCK = tl.constexpr(TILE)
SHIFTS = tl.constexpr(SHIFTED)


@triton.jit
def back(row, starts, ends, block_of, blocks, T, M, J: tl.constexpr):
    """Of a query tile of M tokens, to the keys that it sees, rising.

    Returns:
        What `part` wants: first, after and rest; how many parts; and how many of them, the
        first ones, every query sees whole. The last part is none of these, though a tile's only
        query may see it whole.
    """
    last = tl.minimum(row + M, T) - 1
    first, end = tl.load(starts + row), tl.load(ends + row)
    one = tl.load(starts + last) == first
    after = _after(row, first, end, one, block_of, blocks)
    own = tl.cdiv(tl.minimum(after, row + M) - first, J)
    rest, more = _beyond(after, last, block_of, blocks, J)
    count = own + more
    inner = tl.where(one, tl.minimum((row + 1 - first) // J, count - 1), 0)
    return first, after, rest - own, count, inner


@triton.jit
def on(row, starts, ends, block_of, blocks, T, J: tl.constexpr, M: tl.constexpr):
    """Of a key tile of J tokens, to the queries that see it, in parts of M, rising.

    Returns:
        What `part` wants: first, after and rest; how many parts; how many come before those
        that see every key whole, and how many these are.
    """
    last = tl.minimum(row + J, T) - 1
    start, end = tl.load(starts + row), tl.load(ends + last)
    first = row - (row - start) % M
    own_end = tl.load(ends + row)
    one = own_end == end
    after = _after(row, start, own_end, one, block_of, blocks)
    own = tl.cdiv(after - first, M)
    rest, more = _beyond(after, end - 1, block_of, blocks, M)
    count = own + more
    before = tl.where(one, tl.minimum(tl.cdiv(row + J - 1 - first, M), count), count)
    inner = tl.where(one, tl.maximum((end - first) // M - before, 0), 0)
    return first, after, rest - own, count, before, inner


@triton.jit
def part(i, first, after, rest, blocks, J: tl.constexpr):
    """Where the i-th part of a walk begins, and one past the last token that counts."""
    PARTS: tl.constexpr = BLOCK // J
    begin = first + i * J
    looked_up = begin >= after
    j = tl.maximum(rest + i, 0)
    block, down = blocks + j // PARTS, tl.where(looked_up, j % PARTS * J, 0)
    begin = tl.load(block, mask=looked_up, other=begin) + down
    return begin, tl.load(block + 1, mask=looked_up, other=after)


@triton.jit
def statistics_of(token, head, U):
    """Where the statistics of a head from a token on are, as `statistics_kernel` lays them out."""
    shift = token % SHIFTS
    return (head * SHIFTS + shift) * U + token - shift


@triton.jit
def _after(row, start, end, one, block_of, blocks):
    """Where the segment of a tile's first token ends, or the block that it shares with other single
    tokens, unless the tile has ``one`` segment."""
    alone = (end - start == 1) & (one == 0)
    block = tl.load(block_of + row, mask=alone, other=0)
    return tl.maximum(end, tl.load(blocks + block + 1, mask=alone, other=0))


@triton.jit
def _beyond(after, last, block_of, blocks, J: tl.constexpr):
    """Of all parts of all blocks, the one that ``after`` begins, and how many there are from it to
    that of the last token."""
    PARTS: tl.constexpr = BLOCK // J
    looked_up = after <= last
    rest = tl.load(block_of + after, mask=looked_up, other=0) * PARTS
    block = tl.load(block_of + last, mask=looked_up, other=0)
    down = last - tl.load(blocks + block, mask=looked_up, other=0)
    return rest, tl.where(looked_up, block * PARTS + down // J - rest + 1, 0)
