"""What is reckoned about the Triton kernels from their rates on an H100."""

from __future__ import annotations

import torch

from bench.attention import Shape
from bench.attention_model import Turn
from bench.attention_triton import OVERLAPS, predict_triton, with_overlaps

TURNS = {(100, kernel, 128): Turn(64, 128, 4 * 128**3, 700, 4) for kernel in (*OVERLAPS, "pairs")}


def test_ours_in_triton_alone_have_overlaps_of_their_own() -> None:
    found = with_overlaps(TURNS)
    assert found[100, "pairs", 128].overlap is None
    for kernel, overlap in OVERLAPS.items():
        assert found[100, kernel, 128].overlap == overlap


def test_each_shape_is_predicted_and_more_overlap_is_faster() -> None:
    shape = Shape("here", (4096,), (8, 1), 128, torch.bfloat16)
    *_, mine = predict_triton(with_overlaps(TURNS), [shape])
    *_, freer = predict_triton(TURNS, [shape])  # as the kernels with roles hide
    assert "here" in mine
    slow, fast = (float(line.split("forward")[1].split(",")[0]) for line in (mine, freer))
    assert slow < fast
