"""The Triton kernels of attention, interpreted on the CPU, against float64.

Shapes: T packed tokens, N query heads, K key heads, H head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

from bench.attention import Shape
from bench.attention_sweep import call_of, fault
from hermes_core.segments import Segments, segments
from hermes_kernels import reference
from hermes_kernels import varlen_attention as kernels
from hermes_kernels.launch import SHIFTED, TABLE, TILE, Kernel, parts_of
from hermes_kernels.places import Places
from twins.interpreter import make_honest
from twins.torch_attention import inputs, torch_itself, truth

NAMES = ("out", "dq", "dk", "dv")


@pytest.fixture(scope="module", autouse=True)
def honest_machine() -> Iterator[None]:
    """The interpreter cured, and memory that nothing was written to full of NaN."""
    make_honest()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def where(lengths: list[int]) -> Segments:
    return segments(np.concatenate([[0], np.cumsum(lengths)]))


def run(tensors: list[Tensor], at: Segments, scale: float) -> list[Tensor]:
    """Output and gradients by the kernels."""
    q, k, v, grad = tensors
    out, lse = kernels.forward(q, k, v, at.places, scale)
    return [out, *kernels.backward(grad, q, k, v, out, lse, at.places, scale)]


def check(tensors: list[Tensor], lengths: list[int]) -> None:
    """Every value is written, and errs no more than 1.5 times what PyTorch errs."""
    at, scale = where(lengths), tensors[0].shape[-1] ** -0.5
    for name, ours, theirs, right in zip(
        NAMES, run(tensors, at, scale), torch_itself(tensors, lengths, scale),
        truth(tensors, lengths, scale), strict=True,
    ):  # fmt: skip
        assert ours.isfinite().all(), name
        error, allowed = ((x.double() - right).norm() for x in (ours, theirs))
        # What is 0 in truth, as dq of a segment of one token, is off by rounding in fp32.
        assert error <= 1.5 * allowed + 1e-6 * tensors[3].norm(), (name, error, allowed)


LENGTHS = [
    [1],
    [TILE - 1],
    [TILE, 1],
    [TILE + 1],
    [127, 1, 129, 128],
    [1] * 256,
    [384],
    [5, 250, 1, 3],
]


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: f"{len(x)}-of-{sum(x)}")
def test_every_packing_errs_no_more_than_pytorch(lengths: list[int]) -> None:
    check(inputs(sum(lengths), 4, 2, 64, torch.bfloat16), lengths)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=6))
@settings(max_examples=10)
def test_any_packing_errs_no_more_than_pytorch(lengths: list[int]) -> None:
    check(inputs(sum(lengths), 2, 1, 64, torch.bfloat16), lengths)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
def test_query_heads_share_a_key_head(group: int) -> None:
    check(inputs(150, 8 if group != 3 else 6, 8 // group, 64, torch.bfloat16), [70, 80])


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_query_heads_are_cut_into_parts(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "parts_of", lambda kv_heads, group: parts)
    check(inputs(150, 16, 2, 64, torch.bfloat16), [70, 80])


@pytest.mark.parametrize(
    ("kv_heads", "group", "parts"),
    [(8, 8, 1), (16, 1, 1), (4, 8, 2), (2, 8, 4), (1, 8, 8), (1, 5, 5), (1, 4, 4), (3, 6, 3)],
)
def test_a_key_tile_has_eight_programs_where_heads_allow(
    kv_heads: int, group: int, parts: int
) -> None:
    assert parts_of(kv_heads, group) == parts


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_sizes_and_dtypes(size: int, dtype: torch.dtype) -> None:
    check(inputs(200, 2, 1, size, dtype), [30, 170])


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_the_tiles_of_each_architecture(architecture: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "architecture", lambda device: architecture)
    check(inputs(300, 2, 1, 128, torch.bfloat16), [130, 1, 169])


def test_log_sum_exp_equals_the_plain_twin() -> None:
    lengths, (q, k, v, _) = [100, 1, 60], inputs(161, 4, 2, 64, torch.float16)
    at = where(lengths)
    _, lse = kernels.forward(q, k, v, at.places, 0.3)
    wanted = reference.varlen_lse(q.double(), k.double(), lengths, 0.3)
    torch.testing.assert_close(lse[:, :161].double(), wanted, rtol=1e-5, atol=1e-5)


def test_statistics_begin_with_each_of_four_tokens() -> None:
    """Every place is written: what no token has is 0."""
    out, dout = (torch.randn(200, 3, 64, generator=torch.Generator().manual_seed(0)) for _ in "ab")
    lse = torch.randn(3, 256)
    exponents, deltas = kernels.statistics_of(out.bfloat16(), dout.bfloat16(), lse)
    assert exponents.shape == deltas.shape == (3, SHIFTED, 256)
    delta = (out.bfloat16().float() * dout.bfloat16().float()).sum(2).T
    delta = torch.nn.functional.pad(delta, (0, 56))
    for c in range(SHIFTED):
        for found, all_of in ((exponents, -math.log2(math.e) * lse), (deltas, delta)):
            torch.testing.assert_close(found[:, c, : 256 - c], all_of[:, c:], atol=1e-5, rtol=1e-5)
            assert (found[:, c, 256 - c :] == 0).all()


def test_two_runs_give_the_same_bits() -> None:
    tensors, at = inputs(300, 4, 2, 64, torch.bfloat16), where([100, 200])
    for one, other in zip(run(tensors, at, 0.1), run(tensors, at, 0.1), strict=True):
        assert torch.equal(one, other)


def test_what_stands_beside_a_segment_changes_no_bit() -> None:
    tensors = inputs(360, 4, 2, 64, torch.bfloat16)
    changed = [x.clone() for x in tensors]
    mine = slice(90, 240)
    for x in changed:
        x[: mine.start] *= -7
        x[mine.stop :] *= 5
    before = run(tensors, where([90, 150, 120]), 0.1)
    after = run(changed, where([3, 1, 86, 150, 119, 1]), 0.1)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[mine], other[mine])
        assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("before", "length"),
    [([1], 190), ([37], 2 * TILE), ([63, 2], 40), ([1] * 70, 1), ([TILE], 190), ([129, 5], 256)],
    ids=lambda x: str(x) if isinstance(x, int) else f"after-{sum(x)}",
)
def test_a_segment_keeps_its_bits_wherever_it_stands(before: list[int], length: int) -> None:
    place = sum(before)
    tensors = inputs(place + length + 9, 4, 2, 64, torch.bfloat16)
    alone = [x[place : place + length] for x in tensors]
    packed = run(tensors, where([*before, length, 9]), 0.1)
    for one, other in zip(packed, run(alone, where([length]), 0.1), strict=True):
        assert torch.equal(one[place : place + length], other)


@pytest.mark.parametrize("kernel", ["forward", "dq", "dkdv"])
def test_the_sweep_calls_a_kernel_by_the_launch_it_is_given(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    call = call_of(kernel, Shape("", (100, 60), (2, 1), 64, torch.bfloat16), "cpu")
    known = TABLE[90, kernel, 64]
    assert fault(call, replace(known, queries=32, keys=32), known) == ""
    assert fault(call, replace(known, queries=48), known) != ""  # no power of two
    assert TABLE[90, kernel, 64] == known


def test_the_order_of_tiles_changes_no_bit() -> None:
    tensors, at = inputs(400, 2, 1, 64, torch.bfloat16), where([150, 250])
    *rest, query_order, key_order = at.places
    turned = Segments(Places(*rest, query_order.flip(0), key_order.flip(0)))
    for one, other in zip(run(tensors, at, 0.1), run(tensors, turned, 0.1), strict=True):
        assert torch.equal(one, other)


def test_tokens_after_the_last_segment_attend_to_themselves() -> None:
    q, k, v, _ = inputs(200, 2, 2, 64, torch.bfloat16)
    at = segments(np.array([0, 150]), 200)
    out, _ = kernels.forward(q, k, v, at.places, 0.1)
    assert torch.equal(out[150:], v[150:])


def test_addresses_past_two_to_the_31_elements_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """A last tile that starts after 2^31 elements, in memory of which little is ever touched."""
    # The interpreter would copy what it ran on back to where it came from: the same 4 GB.
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    size, rows = 128, 2**31 // 128 + TILE
    q, out = (torch.from_numpy(np.zeros((rows, 1, size), np.float16)) for _ in range(2))
    starts, lse = (torch.from_numpy(np.zeros(rows, kind)) for kind in (np.int32, np.float32))
    q[-TILE:] = torch.randn(TILE, 1, size, generator=torch.Generator().manual_seed(0))
    starts[-TILE:] = rows - TILE
    ends, block_of = (torch.from_numpy(np.zeros(rows, np.int32)) for _ in range(2))
    ends[-TILE:] = rows
    block_of[-TILE:] = 1
    blocks = torch.tensor([0, rows - TILE, rows], dtype=torch.int32)
    box, out_box = (kernels._boxes(x, TILE) for x in (q, out))
    last = torch.tensor([rows // TILE - 1], dtype=torch.int32)
    kernels.forward_kernel[1, 1](
        box, box, box, out_box, lse, starts, ends, block_of, blocks, last, 0.1, rows, rows, 1, size,
        TILE, TILE,
    )  # fmt: skip
    small, at = q[-TILE:].clone(), where([TILE])
    wanted, _ = kernels.forward(small, small, small, at.places, 0.1)
    assert torch.equal(out[-TILE:], wanted)
