"""The walks of the kernels in Gluon over parts of blocks: which tokens a tile meets, in one order.

A part is J tokens of a block of `places.Places`, counted from the block's first. The first parts of
a walk follow from the tile's first segment alone, which most tiles never leave; the rest are looked
up, by loads that nothing waits for where there is no rest. A part ends where its block does: what a
copy brings beyond is to be masked, for it is another part's.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from hermes_kernels.launch import SHIFTED, TILE

BLOCK = gl.constexpr(TILE)
SHIFTS = gl.constexpr(SHIFTED)


@gluon.jit
def back(row, starts, ends, block_of, blocks, T, M, J: gl.constexpr):
    """Of a query tile of M tokens, to the keys that it sees, rising.

    Returns:
        What `part` wants: first, after, own and rest; how many parts; and how many of them, the
        first ones, every query sees whole.
    """
    last = gl.minimum(row + M, T) - 1
    first, end = gl.load(starts + row), gl.load(ends + row)
    one = gl.load(starts + last) == first
    after = _after(row, first, end, one, block_of, blocks)
    own = gl.cdiv(gl.minimum(after, row + M) - first, J)
    rest, more = _beyond(after, last, block_of, blocks, J)
    count = own + more
    inner = gl.where(one, (row + 1 - first) // J, 0)
    return first, after, own, rest, count, inner


@gluon.jit
def on(row, starts, ends, block_of, blocks, T, J: gl.constexpr, M: gl.constexpr):
    """Of a key tile of J tokens, to the queries that see it, in parts of M, rising.

    Returns:
        What `part` wants: first, after, own and rest; how many parts; how many come before those
        that see every key whole, and how many these are.
    """
    last = gl.minimum(row + J, T) - 1
    start, end = gl.load(starts + row), gl.load(ends + last)
    first = row - (row - start) % M
    own_end = gl.load(ends + row)
    one = own_end == end
    after = _after(row, start, own_end, one, block_of, blocks)
    own = gl.cdiv(after - first, M)
    rest, more = _beyond(after, end - 1, block_of, blocks, M)
    count = own + more
    before = gl.where(one, gl.minimum(gl.cdiv(row + J - 1 - first, M), count), count)
    inner = gl.where(one, gl.maximum((end - first) // M - before, 0), 0)
    return first, after, own, rest, count, before, inner


@gluon.jit
def part(i, first, after, own, rest, blocks, J: gl.constexpr):
    """Where the i-th part of a walk begins, and one past the last token that counts."""
    PARTS: gl.constexpr = BLOCK // J
    n = first + i * J
    looked_up = n >= after
    j = i + (rest - own)
    begin = gl.load(blocks + j // PARTS, mask=looked_up, other=0) + j % PARTS * J
    end = gl.load(blocks + j // PARTS + 1, mask=looked_up, other=0)
    return gl.where(looked_up, begin, n), gl.where(looked_up, end, after)


@gluon.jit
def statistics_of(token, head, U):
    """Where the statistics of a head from a token on are, as `statistics_kernel` lays them out."""
    shift = token % SHIFTS
    return (head * SHIFTS + shift) * U + token - shift


@gluon.jit
def _after(row, start, end, one, block_of, blocks):
    """Where the segment of a tile's first token ends, or the block that it shares with other single
    tokens, unless the tile has ``one`` segment."""
    alone = (end - start == 1) & (one == 0)
    block = gl.load(block_of + row, mask=alone, other=0)
    return gl.maximum(end, gl.load(blocks + block + 1, mask=alone, other=0))


@gluon.jit
def _beyond(after, last, block_of, blocks, J: gl.constexpr):
    """Of all parts of all blocks, the one that ``after`` begins, and how many there are from it to
    that of the last token."""
    PARTS: gl.constexpr = BLOCK // J
    looked_up = after <= last
    rest = gl.load(block_of + after, mask=looked_up, other=0) * PARTS
    block = gl.load(block_of + last, mask=looked_up, other=0)
    down = last - gl.load(blocks + block, mask=looked_up, other=0)
    return rest, gl.where(looked_up, block * PARTS + down // J - rest + 1, 0)
