"""What is reckoned about the Gluon kernels, on numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from bench.attention import Shape
from bench.attention_gluon import border_share
from bench.attention_model import Turn

TURN = Turn(128, 128, 8 * 128**3, 300, 8, masking=100)


@pytest.mark.parametrize(
    ("lengths", "share"),
    [
        ((256,), 2 / 3),  # two diagonal blocks, and one that is seen whole
        ((100, 156), 1.0),  # the first tile is seen whole by no block
        ((512,), 4 / 10),
        ((500, 12), 7 / 10),  # the last block of each tile has queries of another segment
    ],
)
def test_blocks_at_borders_are_those_of_the_diagonal_and_of_other_segments(
    lengths: tuple[int, ...], share: float
) -> None:
    shape = Shape("", lengths, (1, 1), 64, torch.bfloat16)
    assert border_share(shape, TURN) == pytest.approx(share)
