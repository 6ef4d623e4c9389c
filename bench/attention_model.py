"""A rate predicted from machine code, calibrated on kernels whose rate is published.

One turn of the softmax loop on one multiprocessor takes

    cycles = tensor + overlap * issue

where ``tensor`` are the cycles of its matrix products at the chip's rate, ``issue`` those in which
the four schedulers issue what the warps of all roles execute, and ``overlap`` the share of these
that does not hide behind the products: the one free number. For kernels whose warps have roles it
is fitted on a dense causal rate of FlashAttention and tried on another; for ours in Triton, whose
warps have none, on the rates of the same kernels on an H100. No turn is faster than the units that
know exponentials allow. Turns are counted as the tiles lie, masked corners included, and dealt to
multiprocessors longest first. Our backward is three kernels, one after another, of which the first
is bound by memory. Everything told here is a prediction, for a B200: an H100 was measured.

Waits between roles are taken to hide as FlashAttention's do. That may be kind to pairs: Triton's
own Gluon example, of the same design, is published at about 1,326 TFLOP/s on a GB300 (its PR
10110), 0.78 of cuDNN's rate on a GB200.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from bench.attention import Shape, lognormal
from hermes_kernels.launch import parts_of

BACKWARD = 2.5  # FLOPs of a backward for each of its forward


@dataclass(frozen=True)
class Chip:
    """What a multiprocessor does in a cycle, how many there are, and at which clock under load."""

    name: str
    target: int
    multiprocessors: int
    clock_hz: float
    flops: int  # dense bf16, a cycle and multiprocessor
    bytes_per_s: float


# Clocks: those at which the sheets' dense bf16 rates hold (989 TFLOP/s; 2,250 for B200).
CHIPS = (
    Chip("H100 and H200", 90, 132, 1.83e9, 4096, 3.35e12),
    Chip("B200", 100, 148, 1.86e9, 8192, 8.0e12),
)


@dataclass(frozen=True)
class Turn:
    """One turn of a kernel's loop: a block of queries against a block of keys."""

    queries: int
    keys: int
    flops: float
    instructions: int  # that each computing warp issues
    warps: int  # that compute
    others: float = 0.0  # instructions that the warps of other roles issue, together
    exponentials: int = 0  # of those of a computing warp
    masking: int = 0  # instructions more that it issues at a border, where only borders are masked
    heads: int = 1  # query heads that a turn is for
    overlap: float | None = None  # its own, where the kernel itself was measured

    def cycles(self, chip: Chip, overlap: float) -> float:
        overlap = overlap if self.overlap is None else self.overlap
        return max(self.flops / chip.flops + overlap * self.issue, self.special)

    @property
    def issue(self) -> float:
        return (self.instructions * self.warps + self.others) / 4

    @property
    def special(self) -> float:
        """Cycles of the units that know exponentials: four lanes of a warp at a time."""
        return self.exponentials * self.warps / 4 * 8


@dataclass(frozen=True)
class Published:
    """A kernel as its machine code is and as somebody measured it."""

    target: int
    turn: Turn
    dense_tflops: float  # FlashAttention's: one causal segment of 8,192
    packed_tflops: float | None  # a packed row of 16,384; None where nobody published it
    source: str
    unmasked_tflops: float | None = None  # a segment of 8,192 where all tokens see all


# Instructions: the interior block of FlashAttention-4's own machine code (flash-attn-4 4.0.0b36,
# compiled without a GPU, read by `MachineCode.hot_loops`), 128 x 128, H 128: each group of four
# warps has a tile, beside four that correct two tiles (187), one that multiplies (211) and one that
# loads (48). Its masks are taken to cost nothing. Rates: FlashAttention's PR 2150, and the bars of
# MagiAttention's benchmark of packed rows, +- 5.
CALIBRATION = (
    Published(
        100,
        Turn(128, 128, 4 * 128**3, 520, 4, others=(4 * 187 + 211 + 48) / 2, exponentials=113),
        1388, 1022,
        "FA4's code for sm_100a and its rates on B200",
    ),
)  # fmt: skip
# All five products in one kernel over key tiles; masks are computed at every block. Two
# multiprocessors share their operands; beside eight warps that compute, four add to dq (125), one
# multiplies for both (269), one loads (65) and one tells the other (5). Compiled by
# `flash_attn.cute.interface._flash_attn_bwd` under FakeTensorMode with CUTE_DSL_ARCH=sm_100a and
# CUTE_DSL_KEEP_CUBIN=1, read by `MachineCode.loops(*HOT, "LDTM", "UTMALDG", "UBLKCP")`. Its rate on
# packed rows was not published; on segments that see all (PR 2150) it was.
BACKWARD_CALIBRATION = (
    Published(
        100,
        Turn(
            128, 128, 10 * 128**3, 542, 8, others=4 * 125 + 269 + 65 + 5, exponentials=64,
        ),
        1081, None,
        "FA4's backward code for sm_100a and its rates on B200", unmasked_tflops=1201,
    ),
)  # fmt: skip
# Ours in Triton on an H100, TFLOP/s of each kernel's own products by head size and mean length of a
# segment, 64:8 heads: `python -m bench attention --sweep`, Triton 3.6.0. The first is fitted to.
SWEPT = {
    "forward": {(128, 4096): 440, (128, 1024): 408, (64, 4096): 330, (64, 1024): 282},
    "dq": {(128, 4096): 505, (128, 1024): 477, (64, 4096): 466, (64, 1024): 398},
    "dkdv": {(128, 4096): 507, (128, 1024): 513, (64, 4096): 440, (64, 1024): 409},
}


def lengths_of_magi() -> tuple[int, ...]:
    """Packed rows as MagiAttention's: 16,384 tokens in segments of at most a quarter."""
    drawn = np.random.default_rng(0).lognormal(np.log(2048) - 0.5, 1.0, 64)
    ends = np.minimum(np.cumsum(np.clip(drawn, 16, 4096).astype(int)), 16_384)
    return tuple(int(n) for n in np.diff(np.unique(ends), prepend=0))


def forward_seconds(turn: Turn, chip: Chip, overlap: float, shape: Shape) -> float:
    """Of a kernel over query tiles, each dealt longest first.

    Of two heads to a turn, the last of an odd group has two tiles in its place.
    """
    heads, kv_heads = shape.heads
    group = heads // kv_heads
    cycles = np.repeat(_cycles(turn, chip, overlap, shape), kv_heads * (group // turn.heads))
    if group % turn.heads:
        alone = replace(turn, queries=2 * turn.queries)
        last = np.repeat(_cycles(alone, chip, overlap, shape), kv_heads)
        cycles = np.concatenate([cycles, last])
    return _seconds(cycles, chip)


def _cycles(turn: Turn, chip: Chip, overlap: float, shape: Shape) -> np.ndarray:
    """Of each query tile, in one head or in those of a turn."""
    lengths = np.array(shape.lengths)
    ends = np.cumsum(lengths)
    starts = np.repeat(ends - lengths, lengths)
    tiles = np.arange(0, shape.tokens, turn.queries)
    firsts = starts[tiles] // turn.keys * turn.keys
    cycles = np.ceil((tiles + turn.queries - firsts) / turn.keys) * turn.cycles(chip, overlap)
    if turn.masking:
        last_starts = starts[np.minimum(tiles + turn.queries, shape.tokens) - 1]
        past = np.minimum(np.ceil((last_starts - firsts) / turn.keys), (tiles - firsts) / turn.keys)
        borders = turn.queries // turn.keys + past
        cycles += borders * overlap * turn.masking * turn.warps / 4
    return cycles


def backward_seconds(
    turn: Turn, chip: Chip, overlap: float, shape: Shape, *, programs: int
) -> float:
    """Of a kernel over key tiles, so many programs each that share the query heads."""
    ends = np.repeat(np.cumsum(shape.lengths), shape.lengths)
    tiles = np.arange(0, shape.tokens, turn.keys)
    last = ends[np.minimum(tiles + turn.keys, shape.tokens) - 1]
    turns = np.ceil((last - tiles) / turn.queries) * (shape.heads[0] // programs)
    return _seconds(np.repeat(turns, programs) * turn.cycles(chip, overlap), chip)


def _seconds(cycles: np.ndarray, chip: Chip) -> float:
    return makespan(np.sort(cycles)[::-1], chip.multiprocessors) / chip.clock_hz


def tflops(turn: Turn, chip: Chip, overlap: float, shape: Shape) -> float:
    """Rate of a forward by exact causal area."""
    return shape.flops / forward_seconds(turn, chip, overlap, shape) / 1e12


def backward_tflops(turn: Turn, chip: Chip, overlap: float, shape: Shape) -> float:
    """Rate of a backward that is one kernel, one program for each query head and key tile."""
    seconds = backward_seconds(turn, chip, overlap, shape, programs=shape.heads[0])
    return BACKWARD * shape.flops / seconds / 1e12


def unmasked_backward_tflops(turn: Turn, chip: Chip, overlap: float, shape: Shape) -> float:
    """The same where every key is seen by every query of the one segment."""
    tokens, (heads, _) = shape.tokens, shape.heads
    tiles, turns = tokens // turn.keys, tokens // turn.queries
    cycles = np.full(tiles * heads, turns * turn.cycles(chip, overlap))
    return BACKWARD * 4 * tokens**2 * heads * shape.size / _seconds(cycles, chip) / 1e12


def our_backward_tflops(dq: Turn, dkdv: Turn, chip: Chip, overlap: float, shape: Shape) -> float:
    """Rate of delta, dq and dkdv, one after another."""
    heads, kv_heads = shape.heads
    parts = parts_of(kv_heads, heads // kv_heads)
    # out and dout once; the parts of dk and dv, if any, written and read.
    moved_bytes = 2 * 2 * shape.tokens * heads * shape.size
    moved_bytes += 2 * 2 * 2 * shape.tokens * kv_heads * parts * shape.size if parts > 1 else 0
    seconds = (
        moved_bytes / chip.bytes_per_s
        + forward_seconds(dq, chip, overlap, shape)
        + backward_seconds(dkdv, chip, overlap, shape, programs=kv_heads * parts)
    )
    return BACKWARD * shape.flops / seconds / 1e12


def dq_tflops(turn: Turn, chip: Chip, overlap: float, shape: Shape) -> float:
    """Rate of the kernel that computes dq alone, by its own three products."""
    return 1.5 * tflops(turn, chip, overlap, shape)


def dkdv_tflops(turn: Turn, chip: Chip, overlap: float, shape: Shape) -> float:
    """Rate of the kernel that computes dk and dv, by its own four products."""
    heads, kv_heads = shape.heads
    programs = kv_heads * parts_of(kv_heads, heads // kv_heads)
    return 2 * shape.flops / backward_seconds(turn, chip, overlap, shape, programs=programs) / 1e12


Turns = Mapping[tuple[int, str, int], Turn]
Rate = Callable[[Turn, Chip, float, Shape], float]
RATES: dict[str, Rate] = {"forward": tflops, "dq": dq_tflops, "dkdv": dkdv_tflops}


def makespan(costs: np.ndarray, workers: int) -> float:
    """When the last worker ends, each taking the next cost as it comes free."""
    free = [0.0] * workers
    for cost in costs:
        heapq.heappush(free, heapq.heappop(free) + float(cost))
    return max(free)


def fit(chip: Chip, known: Published, shape: Shape, rate: Rate = tflops) -> float:
    """The overlap with which the model gives the published dense rate."""
    ideal = rate(known.turn, chip, 0.0, shape)
    tensor = known.turn.flops / chip.flops
    return (ideal / known.dense_tflops - 1) * tensor / known.turn.issue


def with_swept_overlaps(turns: Turns) -> dict[tuple[int, str, int], Turn]:
    """``turns``, those of ours in Triton on sm_100 with the overlap that each had on an H100."""
    overlaps = {kernel: swept(turns, kernel)[0] for kernel in SWEPT}
    return {
        (target, kernel, size): replace(turn, overlap=overlaps.get(kernel))
        if target == 100
        else turn
        for (target, kernel, size), turn in turns.items()
    }


def swept(turns: Turns, kernel: str) -> tuple[float, list[float]]:
    """The overlap of one of ours in Triton on an H100, and what the model errs at the other rates
    of `SWEPT`, as shares of them.
    """
    chip, rate = CHIPS[0], RATES[kernel]
    (first, measured), *others = SWEPT[kernel].items()
    known = Published(90, turns[90, kernel, first[0]], measured, None, "ours on an H100")
    overlap = fit(chip, known, swept_shape(*first), rate)
    return overlap, [
        rate(turns[90, kernel, size], chip, overlap, swept_shape(size, mean)) / measured - 1
        for (size, mean), measured in others
    ]


def swept_shape(size: int, mean: int) -> Shape:
    """One of those that `attention_sweep` times."""
    return Shape(f"mean {mean:,}", lognormal(mean, 16_384), (64, 8), size, torch.bfloat16)


def predict(turns: Turns, shapes: Sequence[Shape]) -> Iterator[str]:
    """Predictions for ours and the calibration kernels at each shape, with the model's error.

    ``turns`` are those of `with_swept_overlaps`.
    """
    chip, known, back = CHIPS[1], CALIBRATION[0], BACKWARD_CALIBRATION[0]
    like = shapes[0]
    dense = Shape("dense", (8192,), like.heads, like.size, like.dtype)
    packed = Shape("packed", lengths_of_magi(), like.heads, like.size, like.dtype)
    overlap = fit(chip, known, dense)
    assert known.packed_tflops
    error = tflops(known.turn, chip, overlap, packed) / known.packed_tflops - 1
    pairs, ours = turns[100, "pairs", 128], [turns[100, name, 128] for name in RATES]
    yield (
        f"\n{chip.name}, PREDICTED, not measured; calibrated on {known.source}: share of issue "
        f"slots not hidden {overlap:.2f}; the model's error on packed rows {error:+.0%}"
    )
    yield resources("pairs, two tiles against a block", pairs, chip, 1)
    yield resources("FlashAttention-4", known.turn, chip, 2)
    back_overlap = fit(chip, back, dense, backward_tflops)
    yield f"backward: on {back.source}: {back_overlap:.2f}; {tried(back, chip, dense)}"
    for name in RATES:
        share, errors = swept(turns, name)
        told = ", ".join(f"{error:+.0%}" for error in errors)
        yield f"triton's {name}: on its rate on an H100: {share:.2f}; errors at others {told}"
    for shape in shapes:
        forward = tflops(ours[0], chip, overlap, shape)
        theirs = tflops(known.turn, chip, overlap, shape)
        gluon = tflops(pairs, chip, overlap, shape)
        backward = our_backward_tflops(ours[1], ours[2], chip, back_overlap, shape)
        best = backward_tflops(back.turn, chip, back_overlap, shape)
        yield (
            f"{shape!s:58} forward {forward:5,.0f} TFLOP/s predicted, "
            f"{forward / theirs:.2f} of FlashAttention's prediction ({theirs:,.0f}), "
            f"gluon's {gluon:,.0f}, {gluon / theirs:.2f}; backward {backward:5,.0f}, "
            f"{backward / best:.2f} of FlashAttention's ({best:,.0f})"
        )


def tried(back: Published, chip: Chip, dense: Shape) -> str:
    """The model's error on the published rate of a backward to which it was not fitted."""
    overlap = fit(chip, back, dense, backward_tflops)
    assert back.unmasked_tflops
    error = unmasked_backward_tflops(back.turn, chip, overlap, dense) / back.unmasked_tflops - 1
    return f"error without a mask {error:+.0%}, on packed rows unknown"


def resources(name: str, turn: Turn, chip: Chip, times: int) -> str:
    """What of a multiprocessor's cycles a turn takes: whichever is most is what binds."""
    return (
        f"{name}: {times * turn.flops / chip.flops:,.0f} cycles of tensor cores, "
        f"{times * turn.special:,.0f} of exponentials, {times * turn.issue:,.0f} of issue slots"
    )
