"""Blackwell's kernels walk over each segment from its own start: the same bits wherever it stands.
Their own sources, run by a simulator, and led astray on purpose.

Shapes: T packed tokens, N query heads, K key heads, H head size.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hermes_kernels import reference
from hermes_kernels.launch import TILE
from twins.gluon_machine import Fault
from twins.simulated import replaced
from twins.simulated_sm100 import DKDV, DQ, FORWARD, attend, of_keys, of_queries
from twins.torch_attention import inputs, torch_itself, truth

pytestmark = pytest.mark.timeout(120)

Find = Callable[..., list[Tensor]]
Change = tuple[str, str]  # of a text in the sources into another
FINDS = [attend, of_queries, of_keys]
SOURCES = {attend: FORWARD, of_queries: DQ, of_keys: DKDV}


def keeps_its_bits(
    find: Find, before: list[int], length: int, *changes: Change, heads: tuple[int, int] = (2, 1)
) -> bool:
    """Whether a segment behind others comes out as it does alone."""
    place, sources = sum(before), replaced(SOURCES[find], *changes)
    mine = slice(place, place + length)
    tensors = inputs(place + length + 9, *heads, 64, torch.float16)  # bf16 would hide more
    packed = find(tensors, [*before, length, 9], 0.05, sources=sources)
    alone = find([x[mine] for x in tensors], [length], 0.05, sources=sources)
    return all(torch.equal(one[mine], other) for one, other in zip(packed, alone, strict=True))


def check(find: Find, tensors: list[Tensor], lengths: list[int], *changes: Change) -> None:
    """What it finds errs no more than 1.5 times what PyTorch errs."""
    ours = find(tensors, lengths, 0.5, sources=replaced(SOURCES[find], *changes))
    names = {attend: slice(1), of_queries: slice(1, 2), of_keys: slice(2, 4)}[find]
    theirs, wanted = (compute(tensors, lengths, 0.5)[names] for compute in (torch_itself, truth))
    if find is attend:
        lse = reference.varlen_lse(*(x.double() for x in tensors[:2]), lengths, 0.5)
        torch.testing.assert_close(ours.pop().double(), lse.T, rtol=1e-5, atol=1e-5)
    for one, other, right in zip(ours, theirs, wanted, strict=True):
        error, allowed = ((x.double() - right).norm() for x in (one, other))
        assert error <= 1.5 * allowed + 1e-6 * right.norm()


@pytest.mark.parametrize(
    ("before", "length"),
    [([1], 190), ([37], 2 * TILE), ([63, 2], 40), ([1] * 70, 1), ([TILE], 190), ([129, 5], 256)],
    ids=lambda x: str(x) if isinstance(x, int) else f"after-{sum(x)}",
)
@pytest.mark.parametrize("find", FINDS)
def test_a_segment_keeps_its_bits_wherever_it_stands(
    find: Find, before: list[int], length: int
) -> None:
    assert keeps_its_bits(find, before, length)
    if find is attend:  # two tiles that follow one another, where above there are two heads
        assert keeps_its_bits(find, before, length, heads=(1, 1))


# Walks that go wrong, of which no fault need tell: the result does.
ANY = {
    "parts looked up one too far": ("tl.maximum(rest + i, 0)", "tl.maximum(rest + i + 1, 0)"),
    "the rest left out": ("count = own + more", "count = own"),
}
BACK = ANY | {
    "a part counted to the end of its box": ("gl.minimum(t, end - 1) - n", "t - n"),
    "a segment's last part left out": ("row + M) - first, J)", "row + M) - first, J) - 1"),
}
ASTRAY_FORWARD = BACK | {
    "single tokens twice": ("block + 1, mask=alone", "block, mask=alone"),
    "a diagonal without a mask": ("(begin + 1 - first) // J", "(begin + J - first) // J"),
    "others' keys without a mask": ("gl.where(last_start == first, ", "gl.where(True, "),
    "the second tile's own keys left out": ("T, M + down, J", "T, M, J"),
}
ASTRAY_DQ = BACK | {
    "a diagonal without a mask": ("tl.minimum((row + 1 - first) // J, count - 1)", "count"),
    "others' keys without a mask": ("tl.where(one, tl.min", "tl.where(True, tl.min"),
    "the other half's mask": ("begin + x * (J // 2)", "begin + (1 - x) * (J // 2)"),
    "statistics of another head": ("head.to(gl.int64) * SHIFTS * U", "head.to(gl.int64) * U"),
}
ASTRAY_DKDV = ANY | {
    "single tokens twice": ("block + 1, mask=alone", "block, mask=alone"),
    "a part counted to the end of its box": ("gl.minimum(end, stop) - 1", "end - 1"),
    "a segment's last part left out": ("cdiv(after - first, M)", "cdiv(after - first, M) - 1"),
    "a diagonal without a mask": ("tl.cdiv(row + J - 1 - first, M)", "tl.cdiv(row - first, M)"),
    "a last part without a mask": ("(end - first) // M", "tl.cdiv(end - first, M)"),
    "last parts of a head passed over": ("before + inner - count, 0)", "0, 0)"),
    "parts of the next head": ("gl.where(i < begin, i + count, i) - begin", "i - begin"),
    "statistics of another copy": ("(head * SHIFTS + shift) * U", "head * SHIFTS * U"),
    "statistics not shifted": ("shift = token % SHIFTS", "shift = 0"),
    "statistics of another head": ("statistics_of(n, head, U)", "statistics_of(n, 0, U)"),
}
ASTRAY = [
    pytest.param(find, change, id=f"{find.__name__}-{name}")
    for find, changes in zip(FINDS, (ASTRAY_FORWARD, ASTRAY_DQ, ASTRAY_DKDV), strict=True)
    for name, change in changes.items()
]


@pytest.mark.parametrize(("find", "change"), ASTRAY)
def test_a_walk_that_goes_astray_is_found_out(find: Find, change: Change) -> None:
    # Tiles of one segment alone, of which the first is single, and that borders cross.
    lengths = [140, 115, 1, 1, 1, 60, 30]
    tensors = inputs(sum(lengths), *((1, 1) if find is attend else (2, 1)), 64)
    with pytest.raises((AssertionError, Fault)):
        check(find, tensors, lengths, change)


# Walks in other parts or another order: the result is right, its bits are not.
MOVED = {
    "parts from the batch's start": (
        attend, ("first, end = tl.load(starts + row),", "first, end = row * 0,")),
    "the diagonal first": (
        attend, ("n, _ = part(i,", "n, _ = part(gl.where(i == 0, count - 1, i - 1),"),
        ("n, end = part(i,", "n, end = part(gl.where(i == 0, count - 1, i - 1),"),
        ("gl.minimum((begin + 1 - first) // J, count)", "0")),
    "parts from the batch's start in dq": (
        of_queries, ("first, end = tl.load(starts + row),", "first, end = row * 0,")),
    "the diagonal first in dq": (
        of_queries, ("n, _ = part(i,", "n, _ = part(gl.where(i == 0, count - 1, i - 1),"),
        ("begin, end = part(i,", "begin, end = part(gl.where(i == 0, count - 1, i - 1),"),
        ("tl.where(one, tl.minimum((row + 1 - first) // J, count - 1), 0)", "0")),
    "parts from the tile's start in dkdv": (
        of_keys, ("first = row - (row - start) % M", "first = row * 1")),
    "the first part last in dkdv": (
        of_keys, ("n, _ = part(j,", "n, _ = part((j + 1) % count,"),
        ("gl.where(i < begin, i + count, i) - begin", "(i - begin + 1) % count"),
        ("before = tl.where(one, ", "before = tl.where(row < 0, "),
        ("inner = tl.where(one, tl", "inner = tl.where(row < 0, tl")),
}  # fmt: skip


@pytest.mark.parametrize(("find", "changes"), [(f, c) for f, *c in MOVED.values()], ids=MOVED)
def test_another_walk_gives_other_bits(find: Find, changes: list[Change]) -> None:
    check(find, inputs(337, 2, 1, 64), [37, 300], *changes)
    assert not keeps_its_bits(find, [37], 400, *changes)
