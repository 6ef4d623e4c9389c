"""The throughput model, on numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.attention import Shape, gpu_shapes
from bench.attention_model import (
    BACKWARD_CALIBRATION,
    CALIBRATION,
    CHIPS,
    Chip,
    Published,
    Turn,
    backward_seconds,
    backward_tflops,
    dealt,
    fit,
    forward_seconds,
    makespan,
    our_backward_tflops,
    staying,
    tflops,
    tried,
    unmasked_backward_tflops,
    walk_back,
    walk_on,
)
from hermes_kernels.launch import parts_of, programs_of
from twins.gluon_simulator import run
from twins.gluon_tensors import I32
from twins.gluon_tensors import Tensor as Scalar
from twins.hopper import Hopper
from twins.simulated import sources_of

SHAPE = Shape("one", (256,), (1, 1), 64, torch.bfloat16)
TURN = Turn(128, 128, 4 * 128 * 128 * 64, 100, 8)
DEAL = sources_of("groups_sm90") | {
    "deal": """
from triton.experimental.gluon import language as gl
from hermes_kernels.groups_sm90 import tile_of, tiles_of

def deal_kernel(found, tiles, stay):
    for nth in range(tiles_of(tiles, stay)):
        found.append((int(gl.program_id(0)), int(tile_of(nth, tiles, stay))))
"""
}


def test_costs_go_to_whoever_is_free_first() -> None:
    assert makespan(np.array([5, 4, 3, 3]), 2) == 8
    assert makespan(np.array([3, 3, 4, 5]), 2) == 8
    assert makespan(np.array([4, 1, 1, 1, 1]), 2) == 4


def test_programs_that_stay_take_forth_and_back_and_the_shortest_are_dealt_last() -> None:
    assert programs_of(8192, 132) == (8192 - 7 * 7 * 132, 7 * 132)
    assert programs_of(5120, 132) == (5120 - 4 * 7 * 132, 7 * 132)
    assert programs_of(1024, 132) == (1024 - 2 * 132, 2 * 132)
    assert programs_of(924, 132) == (924, 4 * 132)
    assert programs_of(5, 132) == (5, 5)
    # Two each, 17 and 6, 16 and 7, and so on to 12 and 11; then one each.
    assert dealt(np.arange(17, 0, -1), 2).tolist() == [23] * 6 + [5, 4, 3, 2, 1]
    assert staying(np.arange(17, 0, -1), 2) == 3 * 23 + 4 + 3 + 1


def tiles_of_hopper(shape: Shape) -> Iterator[np.ndarray]:
    """Costs of forward's, dq's and dkdv's, falling: 11 a block, where a program's start and end
    take some 15."""
    heads, kv_heads = shape.heads
    shares = kv_heads * parts_of(kv_heads, heads // kv_heads)
    walks = ((walk_back, 128, heads), (walk_back, 64, heads), (walk_on, 64, shares))
    for walk, size, each in walks:
        parts, masked = walk(shape, 128, size)
        yield np.sort(np.repeat((11 * parts + 2 * masked) * (heads // each), each))[::-1]


@pytest.mark.parametrize("shape", gpu_shapes(), ids=str)
def test_programs_that_stay_end_nearly_as_if_each_tile_went_to_whoever_is_free(
    shape: Shape,
) -> None:
    for costs in tiles_of_hopper(shape):
        assert staying(costs, 132) <= 1.02 * makespan(costs, 132)
        assert makespan(dealt(costs, 132) + 15, 132) <= 1.003 * makespan(costs + 15, 132)


@pytest.mark.parametrize("shape", gpu_shapes(), ids=str)
@pytest.mark.parametrize(("free", "times"), [(131, 1.15), (124, 1.15), (116, 1.2)])
def test_multiprocessors_that_are_busy_cost_little_more_than_they_are(
    shape: Shape, free: int, times: float
) -> None:
    for costs in tiles_of_hopper(shape):
        programs = dealt(costs, 132) + 15
        assert makespan(programs, free) <= times * makespan(programs, 132)


@pytest.mark.parametrize("tiles", [5, 16, 17, 50, 155])
def test_the_kernels_deal_each_tile_once_and_as_it_is_counted(tiles: int) -> None:
    programs, stay = programs_of(tiles, 2)
    found: list[tuple[int, int]] = []
    given = {"tiles": tiles, "stay": stay}
    numbers = {name: Scalar(np.asarray(n, np.int32), I32) for name, n in given.items()}
    run(DEAL, "deal_kernel", {"found": found, **numbers}, (programs,), 0, Hopper)
    assert sorted(tile for _, tile in found) == list(range(tiles))
    costs = np.arange(tiles, 0, -1) ** 2
    mine = np.bincount(*np.array([(me, costs[tile]) for me, tile in found]).T)
    assert mine.tolist() == dealt(costs, 2).tolist()


def test_a_turn_takes_its_products_and_what_does_not_hide() -> None:
    assert TURN.issue == 200
    assert TURN.cycles(CHIPS[0], 0) == 1024
    assert TURN.cycles(CHIPS[0], 0.5) == 1124


def test_other_roles_issue_too_and_exponentials_are_never_faster_than_their_unit() -> None:
    turn = replace(TURN, others=80, exponentials=64)
    assert turn.issue == 220
    assert turn.special == 64 * 8 * 2
    assert turn.cycles(CHIPS[0], 0.5) == 1134
    assert replace(turn, exponentials=128).cycles(CHIPS[0], 0.5) == 128 * 8 * 2


def test_a_kernel_that_was_measured_has_an_overlap_of_its_own() -> None:
    assert replace(TURN, overlap=1.5).cycles(CHIPS[0], 0.5) == 1324


def test_two_heads_share_a_turn_and_borders_cost_their_masks() -> None:
    chip = CHIPS[0]
    two = Shape("", (256,), (2, 1), 64, torch.bfloat16)
    turn = replace(TURN, heads=2, masking=50)
    # Two tiles of one and two turns; the diagonal block of each is masked.
    border = 50 * 8 / 4
    assert forward_seconds(turn, chip, 0.5, two) == pytest.approx(
        (2 * 1124 + 0.5 * border) / chip.clock_hz
    )
    # Each segment's keys are blocks of their own: both tiles have two, and all are masked.
    split = Shape("", (100, 156), (2, 1), 64, torch.bfloat16)
    assert forward_seconds(turn, chip, 0.5, split) == pytest.approx(
        (2 * 1124 + 0.5 * 2 * border) / chip.clock_hz
    )


def test_the_last_head_of_an_odd_group_has_two_tiles_a_turn() -> None:
    three = Shape("", (256,), (3, 1), 64, torch.bfloat16)
    turn = replace(TURN, heads=2)
    # Two heads: tiles of one and two turns; one head: both tiles in two turns.
    assert forward_seconds(turn, CHIPS[0], 0.5, three) == pytest.approx(
        2 * 1124 / CHIPS[0].clock_hz
    )
    one = replace(CHIPS[0], multiprocessors=1)
    assert forward_seconds(turn, one, 0.5, three) == pytest.approx(
        (1 + 2 + 2) * 1124 / one.clock_hz
    )


def test_the_rate_counts_the_exact_area_over_the_longest_worker() -> None:
    chip = CHIPS[0]  # two tiles of one and two turns, on two of its multiprocessors
    seconds = 2 * 1024 / chip.clock_hz
    area = 256 * 257 / 2
    assert tflops(TURN, chip, 0, SHAPE) == pytest.approx(4 * area * 64 / seconds / 1e12)


def test_the_fit_gives_the_rate_that_it_was_fitted_to() -> None:
    chip, known = CHIPS[0], CALIBRATION[0]
    dense = Shape("dense", (8192,), (64, 8), 128, torch.bfloat16)
    overlap = fit(chip, known, dense)
    assert tflops(known.turn, chip, overlap, dense) == pytest.approx(known.dense_tflops)


def test_a_backward_walks_over_the_queries_that_see_a_key_tile() -> None:
    chip = CHIPS[0]  # the first of two key tiles is seen by two query tiles, the second by one
    one, two = (Shape("", (256,), heads, 64, torch.bfloat16) for heads in ((1, 1), (8, 1)))
    turn_s = 1024 / chip.clock_hz
    assert backward_seconds(TURN, chip, 0, one, programs=1) == pytest.approx(2 * turn_s)
    assert backward_seconds(TURN, chip, 0, two, programs=1) == pytest.approx(16 * turn_s)
    assert backward_seconds(TURN, chip, 0, two, programs=8) == pytest.approx(2 * turn_s)
    split = Shape("", (128, 128), (1, 1), 64, torch.bfloat16)
    assert backward_seconds(TURN, chip, 0, split, programs=1) == pytest.approx(turn_s)


def test_our_backward_is_its_kernels_one_after_another() -> None:
    chip = CHIPS[0]
    turns_s = (2 + 2) * 1024 / chip.clock_hz
    moved_s = (2 * 2 * 64 + 2 * 4 * 4) * 256 / chip.bytes_per_s
    area = 256 * 257 / 2
    wanted = 2.5 * 4 * area * 64 / (turns_s + moved_s) / 1e12
    assert our_backward_tflops(TURN, TURN, chip, 0, SHAPE) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("chip", "known"),
    list(zip(CHIPS, BACKWARD_CALIBRATION, strict=True)),
    ids=lambda x: getattr(x, "name", ""),
)
def test_the_fit_of_the_backward_gives_the_rate_that_it_was_fitted_to(
    chip: Chip, known: Published
) -> None:
    assert chip.target == known.target
    dense = Shape("dense", (8192,), (64, 8), 128, torch.bfloat16)
    overlap = fit(chip, known, dense, backward_tflops)
    found = backward_tflops(known.turn, chip, overlap, dense)
    assert found == pytest.approx(known.dense_tflops)


def test_without_a_mask_every_key_tile_walks_over_all_queries() -> None:
    chip = CHIPS[0]  # two key tiles of two turns each, on two multiprocessors
    seconds = 2 * 1024 / chip.clock_hz
    found = unmasked_backward_tflops(TURN, chip, 0, SHAPE)
    assert found == pytest.approx(2.5 * 4 * 256**2 * 64 / seconds / 1e12)


def test_the_error_told_is_that_on_a_rate_it_was_not_fitted_to() -> None:
    dense = Shape("dense", (8192,), (64, 8), 128, torch.bfloat16)
    hopper, blackwell = BACKWARD_CALIBRATION
    packed = replace(hopper, packed_tflops=hopper.dense_tflops)
    assert tried(packed, CHIPS[0], dense, dense) == "error on packed rows +0%"
    assert tried(blackwell, CHIPS[1], dense, dense).endswith("on packed rows unknown")
