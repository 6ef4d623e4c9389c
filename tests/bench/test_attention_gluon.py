"""What is reckoned about the Gluon kernels, on numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from bench.attention import Shape
from bench.attention_gluon import border_share, waits
from bench.attention_model import Turn

TURN = Turn(128, 128, 8 * 128**3, 300, 8, masking=100)


@pytest.mark.parametrize(
    ("lengths", "share"),
    [
        ((256,), 2 / 3),  # two diagonal blocks, and one that is seen whole
        ((100, 156), 1.0),  # the first tile is seen whole by no block
        ((512,), 4 / 10),
        ((500, 12), 8 / 11),  # each segment's last block has queries of another
    ],
)
def test_blocks_at_borders_are_those_of_the_diagonal_and_of_other_segments(
    lengths: tuple[int, ...], share: float
) -> None:
    shape = Shape("", lengths, (1, 1), 64, torch.bfloat16)
    assert border_share(shape, TURN) == pytest.approx(share)


def test_blocks_of_half_a_tile_have_two_on_the_diagonal() -> None:
    # 5 blocks of 64 queries for the first tile of keys, of which the last has another segment's,
    # as all of the last tile have.
    shape = Shape("", (300, 84), (1, 1), 64, torch.bfloat16)
    halves = Turn(64, 128, 8 * 64 * 128**2, 300, 8, masking=100)
    assert border_share(shape, halves) == pytest.approx(1 - (2 + 0 + 0) / (5 + 3 + 3))


@pytest.mark.parametrize(("kernel", "times"), [("forward", 2), ("dq", 3), ("dkdv", 4)])
def test_waits_for_products_are_counted_in_the_source(kernel: str, times: int) -> None:
    assert waits(f"{kernel}_sm90") == times  # type: ignore[arg-type]
