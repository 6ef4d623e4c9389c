"""A rate on a B200 predicted for the attention kernels in Triton, by their own rates on an H100.

Their warps have no roles: what hides behind products are the other programs of a multiprocessor and
what the compiler moves. So each kernel has its own overlap (`attention_model`), with which the
model gives the rate that it was measured with. Two programs shared a multiprocessor of the H100;
where only one does, as on a B200 at heads of 128, the prediction may be kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from bench.attention import Shape
from bench.attention_model import (
    BACKWARD_CALIBRATION,
    CALIBRATION,
    CHIPS,
    Turn,
    backward_tflops,
    fit,
    our_backward_tflops,
    tflops,
)

Turns = Mapping[tuple[int, str, int], Turn]

# Share of issue slots that do not hide behind products. Fitted, with the machine code of Triton
# 3.6.0, to what the launches of the table did on an H100 in a sweep at commit 68aca0e
# (`bench.attention_sweep`): 410, 514 and 483 TFLOP/s of a kernel's own products, with 64:8 heads of
# 128 and segments of mean 4,096. At mean 1,024 (385, 478 and 462) the model errs by +2 %, +6 % and
# 0 %. With heads of 64 it was not tried.
OVERLAPS = {"forward": 1.71, "dq": 1.01, "dkdv": 1.18}


def with_overlaps(turns: Turns) -> dict[tuple[int, str, int], Turn]:
    """``turns``, those of ours in Triton with the overlap that each kernel had on an H100."""
    return {key: replace(turn, overlap=OVERLAPS.get(key[1])) for key, turn in turns.items()}


def predict_triton(turns: Turns, shapes: Sequence[Shape]) -> Iterator[str]:
    """Predictions at each shape, beside FlashAttention's; ``turns`` of `with_overlaps`."""
    chip = next(c for c in CHIPS if c.target == 100)
    known, back = (
        next(k for k in calibration if k.target == 100)
        for calibration in (CALIBRATION, BACKWARD_CALIBRATION)
    )
    like = shapes[0]
    dense = Shape("dense", (8192,), like.heads, like.size, like.dtype)
    overlap, back_overlap = fit(chip, known, dense), fit(chip, back, dense, backward_tflops)
    yield f"\n{chip.name}, PREDICTED, not measured: triton's, calibrated on its rates on an H100"
    told = ", ".join(f"{kernel} {overlap:.2f}" for kernel, overlap in OVERLAPS.items())
    yield f"share of issue slots not hidden: {told}"
    ours, dq, dkdv = (turns[100, kernel, 128] for kernel in OVERLAPS)
    for shape in shapes:
        forward = tflops(ours, chip, overlap, shape)
        theirs = tflops(known.turn, chip, overlap, shape)
        backward = our_backward_tflops(dq, dkdv, chip, back_overlap, shape)
        best = backward_tflops(back.turn, chip, back_overlap, shape)
        yield (
            f"{shape!s:58} forward {forward:5,.0f}, {forward / theirs:.2f} of FlashAttention's "
            f"({theirs:,.0f}); backward {backward:5,.0f}, {backward / best:.2f} ({best:,.0f})"
        )
