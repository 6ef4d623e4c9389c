"""A rate on a B200 predicted for the attention kernels in Triton, by their own rates on an H100.

Their warps have no roles: what hides behind products are the other programs of a multiprocessor and
what the compiler moves. So each kernel has its own overlap (`attention_model`), with which the
model gives the rate that it was measured with. Two or three programs shared a multiprocessor of the
H100; where only one does, as on a B200 at heads of 128, the prediction may be kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from bench.attention import Shape, lognormal
from bench.attention_model import (
    BACKWARD_CALIBRATION,
    CALIBRATION,
    CHIPS,
    Chip,
    Published,
    Rate,
    Turn,
    backward_seconds,
    backward_tflops,
    fit,
    our_backward_tflops,
    tflops,
)
from hermes_kernels.launch import parts_of

Turns = Mapping[tuple[int, str, int], Turn]

# On an H100, TFLOP/s of each kernel's own products by head size and mean length of a segment, 64:8
# heads: `python -m bench attention --sweep`, Triton 3.6.0. The first is fitted to.
SWEPT = {
    "forward": {(128, 4096): 440, (128, 1024): 408, (64, 4096): 330, (64, 1024): 282},
    "dq": {(128, 4096): 505, (128, 1024): 477, (64, 4096): 466, (64, 1024): 398},
    "dkdv": {(128, 4096): 507, (128, 1024): 513, (64, 4096): 440, (64, 1024): 409},
}


def dq_tflops(turn: Turn, chip: Chip, overlap: float, shape: Shape) -> float:
    """Rate of the kernel that computes dq, by its three products."""
    return 1.5 * tflops(turn, chip, overlap, shape)


def dkdv_tflops(turn: Turn, chip: Chip, overlap: float, shape: Shape) -> float:
    """Rate of the kernel that computes dk and dv, by its four products."""
    heads, kv_heads = shape.heads
    programs = kv_heads * parts_of(kv_heads, heads // kv_heads)
    return 2 * shape.flops / backward_seconds(turn, chip, overlap, shape, programs=programs) / 1e12


RATES: dict[str, Rate] = {"forward": tflops, "dq": dq_tflops, "dkdv": dkdv_tflops}


def with_swept_overlaps(turns: Turns) -> dict[tuple[int, str, int], Turn]:
    """``turns``, those of ours in Triton with the overlap that each kernel had on an H100."""
    overlaps = {kernel: swept(turns, kernel)[0] for kernel in SWEPT}
    return {key: replace(turn, overlap=overlaps.get(key[1])) for key, turn in turns.items()}


def swept(turns: Turns, kernel: str) -> tuple[float, list[float]]:
    """The overlap of a kernel on an H100, and what the model then errs at the other rates of
    `SWEPT`, as shares of them.
    """
    chip, rate = CHIPS[0], RATES[kernel]
    bare = {size: replace(turns[90, kernel, size], overlap=None) for size in (64, 128)}
    (first, measured), *others = SWEPT[kernel].items()
    known = Published(90, bare[first[0]], measured, None, "ours on an H100")
    overlap = fit(chip, known, swept_shape(*first), rate)
    return overlap, [
        rate(bare[size], chip, overlap, swept_shape(size, mean)) / measured - 1
        for (size, mean), measured in others
    ]


def swept_shape(size: int, mean: int) -> Shape:
    """One of those that `attention_sweep` times."""
    return Shape(f"mean {mean:,}", lognormal(mean, 16_384), (64, 8), size, torch.bfloat16)


def predict_triton(turns: Turns, shapes: Sequence[Shape]) -> Iterator[str]:
    """Predictions at each shape, beside FlashAttention's; ``turns`` of `with_swept_overlaps`."""
    chip = next(c for c in CHIPS if c.target == 100)
    known, back = (
        next(k for k in calibration if k.target == 100)
        for calibration in (CALIBRATION, BACKWARD_CALIBRATION)
    )
    like = shapes[0]
    dense = Shape("dense", (8192,), like.heads, like.size, like.dtype)
    overlap, back_overlap = fit(chip, known, dense), fit(chip, back, dense, backward_tflops)
    yield f"\n{chip.name}, PREDICTED, not measured: triton's, calibrated on its rates on an H100"
    for kernel in SWEPT:
        share, errors = swept(turns, kernel)
        told = ", ".join(f"{error:+.0%}" for error in errors)
        yield f"{kernel}: share of issue slots not hidden {share:.2f}; errors at other rates {told}"
    ours, dq, dkdv = (turns[100, kernel, 128] for kernel in SWEPT)
    for shape in shapes:
        forward = tflops(ours, chip, overlap, shape)
        theirs = tflops(known.turn, chip, overlap, shape)
        backward = our_backward_tflops(dq, dkdv, chip, back_overlap, shape)
        best = backward_tflops(back.turn, chip, back_overlap, shape)
        yield (
            f"{shape!s:58} forward {forward:5,.0f}, {forward / theirs:.2f} of FlashAttention's "
            f"({theirs:,.0f}); backward {backward:5,.0f}, {backward / best:.2f} ({best:,.0f})"
        )
