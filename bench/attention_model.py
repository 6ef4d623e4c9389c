"""A rate predicted from machine code, calibrated on kernels whose rate is published.

One turn of the softmax loop on one multiprocessor takes

    cycles = tensor + overlap * issue

where ``tensor`` are the cycles of its matrix products at the chip's rate, ``issue`` those in which
the four schedulers issue what the warps of all roles execute, and ``overlap`` the share of these
that does not hide behind the products: the one free number, fitted for each architecture on a dense
causal rate of FlashAttention and tried on its rate for packed rows; our kernels in Triton have
their own (`attention_triton`), as their warps have no roles. No turn is faster than the
units that know exponentials allow. Turns are counted as the tiles lie, masked corners included, and
dealt to multiprocessors longest first, or as `launch.programs_of` has it. Our backward is three
kernels, one after another, of which the first is bound by memory. Everything told here is a
prediction.

Waits between roles are taken to hide as FlashAttention's do. That may be kind to pairs: Triton's
own Gluon example, of the same design, is published at about 1,326 TFLOP/s on a GB300 (its PR
10110), 0.78 of cuDNN's rate on a GB200.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from bench.attention import Shape
from hermes_core.backends import GLUON
from hermes_core.segments import segments
from hermes_kernels.launch import SHIFTED, TILE, parts_of, programs_of

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


def makespan(costs: np.ndarray, workers: int) -> float:
    """When the last worker ends, each taking the next cost as it comes free."""
    free = [0.0] * workers
    for cost in costs:
        heapq.heappush(free, heapq.heappop(free) + float(cost))
    return max(free)


def staying(costs: np.ndarray, workers: int) -> float:
    """The same where programs take several, as Hopper's do."""
    return makespan(dealt(costs, workers), workers)


def dealt(costs: np.ndarray, multiprocessors: int) -> np.ndarray:
    """Of each program in turn what its tiles cost, as `groups_sm90.tile_of` has them."""
    programs, stay = programs_of(len(costs), multiprocessors)
    rounds, place = np.divmod(np.arange(len(costs) - programs + stay), stay)
    programs_that_stay = np.where(rounds % 2 == 0, place, stay - 1 - place)
    kept = np.bincount(programs_that_stay, costs[: len(rounds)])
    return np.concatenate([kept, costs[len(rounds) :]])


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
    span: Callable[[np.ndarray, int], float] = makespan  # of all tiles, longest first

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
    """FlashAttention as its machine code is and as somebody measured it."""

    target: int
    turn: Turn
    dense_tflops: float  # one causal segment of 8,192
    packed_tflops: float | None  # a packed row of 16,384; None where nobody published it
    source: str
    unmasked_tflops: float | None = None  # a segment of 8,192 where all tokens see all


# Instructions: the interior block of FlashAttention-4's own machine code (flash-attn-4 4.0.0b36,
# compiled without a GPU, read by `MachineCode.hot_loops`), 128 x 128, H 128: on sm_90a two groups
# of four warps share a tile, on sm_100a each has its own, beside four warps that correct two tiles
# (187), one that multiplies (211) and one that loads (48). Its masks are taken to cost nothing.
# Rates: FlashAttention's PRs 1893 and 2150, and the bars of MagiAttention's benchmark of packed
# rows, +- 5.
CALIBRATION = (
    Published(
        90, Turn(128, 128, 4 * 128**3, 494, 8), 660, 545,
        "FA4's code for sm_90a, FA3's rates on H100",
    ),
    Published(
        100,
        Turn(128, 128, 4 * 128**3, 520, 4, others=(4 * 187 + 211 + 48) / 2, exponentials=113),
        1388, 1022,
        "FA4's code for sm_100a and its rates on B200",
    ),
)  # fmt: skip
# All five products in one kernel over key tiles; masks are computed at every block. On sm_100a two
# multiprocessors share their operands; beside eight warps that compute, four add to dq (125), one
# multiplies for both (269), one loads (65) and one tells the other (5). Compiled by
# `flash_attn.cute.interface._flash_attn_bwd` under FakeTensorMode with CUTE_DSL_ARCH=sm_100a and
# CUTE_DSL_KEEP_CUBIN=1, read by `MachineCode.loops(*HOT, "LDTM", "UTMALDG", "UBLKCP")`. On B200 its
# rate on packed rows was not published; on segments that see all (PR 2150) it was.
BACKWARD_CALIBRATION = (
    Published(
        90, Turn(64, 128, 10 * 64 * 128**2, 441, 8), 575, 376,
        "FA4's backward code for sm_90a, FA3's rates on H100",
    ),
    Published(
        100,
        Turn(
            128, 128, 10 * 128**3, 542, 8, others=4 * 125 + 269 + 65 + 5, exponentials=64,
        ),
        1081, None,
        "FA4's backward code for sm_100a and its rates on B200", unmasked_tflops=1201,
    ),
)  # fmt: skip


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
    return _seconds(cycles, chip, turn)


def _cycles(turn: Turn, chip: Chip, overlap: float, shape: Shape) -> np.ndarray:
    """Of each query tile, in one head or in those of a turn."""
    parts, masked = walk_back(shape, turn.queries, turn.keys)
    at_borders = overlap * turn.masking * turn.warps / 4
    return parts * turn.cycles(chip, overlap) + masked * at_borders


def walk_back(shape: Shape, queries: int, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Parts of keys that each query tile walks over, and how many are masked.

    As `hermes_kernels.walk.back` has them, counted plainly.
    """
    starts, _, after, part_of = _parts(shape, keys)
    rows = np.arange(0, shape.tokens, queries)
    last = np.minimum(rows + queries, shape.tokens) - 1
    own = -((starts[rows] - np.minimum(after[rows], rows + queries)) // keys)
    parts = own + _beyond(after[rows], last, part_of)
    whole = np.minimum((rows + 1 - starts[rows]) // keys, parts - 1)  # the last one is masked
    return parts, parts - np.where(starts[last] == starts[rows], whole, 0)


def walk_on(shape: Shape, keys: int, queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Parts of queries that each key tile walks over, and how many are masked, as `walk.on` has
    them."""
    starts, ends, after, part_of = _parts(shape, queries)
    rows = np.arange(0, shape.tokens, keys)
    last = np.minimum(rows + keys, shape.tokens) - 1
    first = rows - (rows - starts[rows]) % queries
    own = -((first - after[rows]) // queries)
    parts = own + _beyond(after[rows], ends[last] - 1, part_of)
    before = -((first - rows - keys + 1) // queries)  # parts that begin before the last key
    whole = np.maximum((ends[rows] - first) // queries - before, 0)
    return parts, parts - np.where(starts[last] == starts[rows], whole, 0)


@cache
def _parts(shape: Shape, size: int) -> tuple[np.ndarray, ...]:
    """Of each token: its segment's start and end, where that or the block that it shares with other
    single tokens ends, and the part of a block that it is in."""
    places = segments(np.concatenate([[0], np.cumsum(shape.lengths)])).places
    starts, ends, block_of, blocks = (x.numpy().astype(np.int64) for x in places[:4])
    down = np.arange(shape.tokens) - blocks[block_of]
    after = np.maximum(ends, blocks[block_of + 1])
    return starts, ends, after, block_of * (TILE // size) + down // size


def _beyond(after: np.ndarray, last: np.ndarray, part_of: np.ndarray) -> np.ndarray:
    """Parts from the first after a tile's first segment to that of a last token."""
    return np.where(after <= last, part_of[last] - part_of[np.minimum(after, last)] + 1, 0)


def backward_seconds(
    turn: Turn, chip: Chip, overlap: float, shape: Shape, *, programs: int
) -> float:
    """Of a kernel over key tiles, so many programs each that share the query heads."""
    turns = walk_on(shape, turn.keys, turn.queries)[0] * (shape.heads[0] // programs)
    return _seconds(np.repeat(turns, programs) * turn.cycles(chip, overlap), chip, turn)


def _seconds(cycles: np.ndarray, chip: Chip, turn: Turn) -> float:
    return turn.span(np.sort(cycles)[::-1], chip.multiprocessors) / chip.clock_hz


def tflops(turn: Turn, chip: Chip, overlap: float, shape: Shape) -> float:
    """Rate of a forward by exact causal area."""
    return shape.flops / forward_seconds(turn, chip, overlap, shape) / 1e12


def backward_tflops(turn: Turn, chip: Chip, overlap: float, shape: Shape) -> float:
    """Rate of a backward that is one kernel, one program for each query head and key tile, which
    begins with the tile's own first query, as FlashAttention's does."""
    ends = np.repeat(np.cumsum(shape.lengths), shape.lengths)
    tiles = np.arange(0, shape.tokens, turn.keys)
    last = ends[np.minimum(tiles + turn.keys, shape.tokens) - 1]
    cycles = np.ceil((last - tiles) / turn.queries) * turn.cycles(chip, overlap)
    seconds = _seconds(np.repeat(cycles, shape.heads[0]), chip, turn)
    return BACKWARD * shape.flops / seconds / 1e12


def unmasked_backward_tflops(turn: Turn, chip: Chip, overlap: float, shape: Shape) -> float:
    """The same where every key is seen by every query of the one segment."""
    tokens, (heads, _) = shape.tokens, shape.heads
    tiles, turns = tokens // turn.keys, tokens // turn.queries
    cycles = np.full(tiles * heads, turns * turn.cycles(chip, overlap))
    return BACKWARD * 4 * tokens**2 * heads * shape.size / _seconds(cycles, chip, turn) / 1e12


def our_backward_tflops(dq: Turn, dkdv: Turn, chip: Chip, overlap: float, shape: Shape) -> float:
    """Rate of statistics, dq and dkdv, one after another."""
    heads, kv_heads = shape.heads
    parts = parts_of(kv_heads, heads // kv_heads)
    # out and dout once, statistics in copies; the parts of dk and dv, if any, written and read.
    moved_bytes = (2 * 2 * shape.size + 2 * 4 * SHIFTED) * shape.tokens * heads
    moved_bytes += 2 * 2 * 2 * shape.tokens * kv_heads * parts * shape.size if parts > 1 else 0
    seconds = (
        moved_bytes / chip.bytes_per_s
        + forward_seconds(dq, chip, overlap, shape)
        + backward_seconds(dkdv, chip, overlap, shape, programs=kv_heads * parts)
    )
    return BACKWARD * shape.flops / seconds / 1e12


Rate = Callable[[Turn, Chip, float, Shape], float]


def fit(chip: Chip, known: Published, shape: Shape, rate: Rate = tflops) -> float:
    """The overlap with which the model gives the published dense rate."""
    ideal = rate(known.turn, chip, 0.0, shape)
    tensor = known.turn.flops / chip.flops
    return (ideal / known.dense_tflops - 1) * tensor / known.turn.issue


def predict(turns: Mapping[tuple[int, str, int], Turn], shapes: Sequence[Shape]) -> Iterator[str]:
    """Predictions for ours in Gluon and the calibration kernels at each shape, with the error."""
    for chip in CHIPS:
        known = next(k for k in CALIBRATION if k.target == chip.target)
        like = shapes[0]
        dense = Shape("dense", (8192,), like.heads, like.size, like.dtype)
        packed = Shape("packed", lengths_of_magi(), like.heads, like.size, like.dtype)
        overlap = fit(chip, known, dense)
        error = tflops(known.turn, chip, overlap, packed) / known.packed_tflops - 1
        yield (
            f"\n{chip.name}, PREDICTED, not measured; calibrated on {known.source}: share of issue "
            f"slots not hidden {overlap:.2f}; the model's error on packed rows {error:+.0%}"
        )
        if gluons := turns.get((chip.target, GLUON[chip.target], 128)):
            yield resources("gluon, a turn", gluons, chip, 1)
            yield resources("FlashAttention's code for as much", known.turn, chip, gluons.heads)
        back = next(k for k in BACKWARD_CALIBRATION if k.target == chip.target)
        back_overlap = fit(chip, back, dense, backward_tflops)
        yield f"backward: on {back.source}: {back_overlap:.2f}; {tried(back, chip, dense, packed)}"
        for shape in shapes:
            theirs = tflops(known.turn, chip, overlap, shape)
            best = backward_tflops(back.turn, chip, back_overlap, shape)
            gluon = ""
            if gluons:
                other = tflops(gluons, chip, overlap, shape)
                gluon = f", gluon's {other:,.0f}, {other / theirs:.2f}"
            yield (
                f"{shape!s:58} FlashAttention's forward {theirs:5,.0f} TFLOP/s predicted{gluon}; "
                f"its backward {best:5,.0f}"
            )


def tried(back: Published, chip: Chip, dense: Shape, packed: Shape) -> str:
    """The model's error on the published rates of a backward to which it was not fitted."""
    overlap = fit(chip, back, dense, backward_tflops)
    if back.packed_tflops:
        error = backward_tflops(back.turn, chip, overlap, packed) / back.packed_tflops - 1
        return f"error on packed rows {error:+.0%}"
    assert back.unmasked_tflops
    error = unmasked_backward_tflops(back.turn, chip, overlap, dense) / back.unmasked_tflops - 1
    return f"error without a mask {error:+.0%}, on packed rows unknown"


def resources(name: str, turn: Turn, chip: Chip, times: int) -> str:
    """What of a multiprocessor's cycles a turn takes: whichever is most is what binds."""
    return (
        f"{name}: {times * turn.flops / chip.flops:,.0f} cycles of tensor cores, "
        f"{times * turn.special:,.0f} of exponentials, {times * turn.issue:,.0f} of issue slots"
    )
