"""Blackwell's forward, its own source run by a simulator, against float64; and broken on purpose.

Shapes: T packed tokens, N query heads, K key heads, H head size, U = T rounded up to a tile.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import hermes_kernels
from hermes_core import backends
from hermes_core.backends import BackendError, choose
from hermes_core.segments import Segments, segments
from hermes_kernels import forward_sm100, reference
from hermes_kernels.launch import TABLE, TILE
from twins.gluon_machine import TOO_EARLY, Fault
from twins.gluon_simulator import Box, Pointer, run
from twins.gluon_tensors import F32, I32, TYPES
from twins.gluon_tensors import Tensor as Scalar

pytestmark = pytest.mark.timeout(120)

FOLDER = Path(hermes_kernels.__file__).parent
SOURCES = {
    f"hermes_kernels.{name}": (FOLDER / f"{name}.py").read_text()
    for name in ("walk", "softmax_sm100", "forward_sm100")
}


def where(lengths: list[int], tokens: int | None = None) -> Segments:
    return segments(np.concatenate([[0], np.cumsum(lengths)]), tokens)


def inputs(
    tokens: int, heads: tuple[int, int], size: int, dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    """q, k and v."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, n, size) for n in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def attend(
    tensors: list[Tensor], at: Segments, scale: float, *, seed: int = 0,
    sources: Mapping[str, str] = SOURCES, stages: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [T, N, H] and log-sum-exp [N, U] as the kernel leaves them."""
    q, k, _ = tensors
    tokens, heads, size = q.shape
    group, room = heads // k.shape[1], at.places.query_order.numel() * TILE
    kind = TYPES[str(q.dtype).removeprefix("torch.")]
    boxes = [Box(x.float().flatten(1).numpy(), [TILE, size], kind) for x in tensors]
    out = np.full((tokens, heads * size), np.nan, np.float32)
    written = np.zeros(out.shape, np.int64)
    lse = np.full(heads * room, np.nan, np.float32)
    arguments = {
        "q_desc": boxes[0], "k_desc": boxes[1], "v_desc": boxes[2],
        "out_desc": Box(out, [TILE, size], kind, written), "lse_ptr": Pointer(lse),
        "order": Pointer(at.places.query_order.numpy()),
        "scale": Scalar(np.asarray(scale, np.float32), F32),
        "T": Scalar(np.asarray(tokens, np.int32), I32),
        "U": Scalar(np.asarray(room, np.int32), I32),
        "G": group, "STAGES": stages or TABLE[100, "pairs", size].stages,
    }  # fmt: skip
    for name in ("starts", "ends", "block_of", "blocks"):
        arguments[name] = Pointer(getattr(at.places, name).numpy())
    grid = (k.shape[1] * -(-group // 2), at.places.query_order.numel())
    run(sources, "pair_kernel", arguments, grid, seed)
    assert (written == 1).all()
    return torch.from_numpy(out).view(q.shape), torch.from_numpy(lse).view(heads, room)


def torch_itself(tensors: list[Tensor], lengths: list[int], scale: float) -> Tensor:
    """PyTorch's fused attention in the inputs' dtype, one segment after the other."""
    parts = zip(*(x.split(lengths) for x in tensors), strict=True)
    return torch.cat([
        scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in one), is_causal=True, scale=scale, enable_gqa=True
        )[0].transpose(0, 1)
        for one in parts
    ])  # fmt: skip


def check(
    tensors: list[Tensor], lengths: list[int], scale: float, *, seed: int = 0,
    sources: Mapping[str, str] = SOURCES,
) -> None:  # fmt: skip
    """Every value is written, and errs no more than 1.5 times what PyTorch errs."""
    wide = [x.double() for x in tensors]
    right = reference.varlen_attention(*wide, lengths, scale)
    out, lse = attend(tensors, where(lengths), scale, seed=seed, sources=sources)
    allowed = (torch_itself(tensors, lengths, scale) - right).norm()
    assert (out - right).norm() <= 1.5 * allowed + 1e-6 * right.norm()
    wanted = reference.varlen_lse(*wide[:2], lengths, scale)
    assert lse.isfinite().all()
    torch.testing.assert_close(lse[:, : sum(lengths)].double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "lengths",
    [
        [1], [TILE - 1], [TILE, 1], [TILE + 1], [127, 1, 129, 128], [1] * 256, [640],
        [5, 250, 1, 3], [200, 55, 1, 1, 1, 100, 154, 20],
    ],
    ids=lambda x: f"{len(x)}-of-{sum(x)}",
)  # fmt: skip
@pytest.mark.parametrize("heads", [(2, 1), (1, 1)], ids=["two-heads", "two-tiles"])
def test_every_packing_errs_no_more_than_pytorch(
    lengths: list[int], heads: tuple[int, int]
) -> None:
    check(inputs(sum(lengths), heads, 64), lengths, 0.125)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=4), st.sampled_from([(2, 1), (1, 1)]))
@settings(max_examples=10, deadline=None)
def test_any_packing_in_any_order_of_events_is_right(
    lengths: list[int], heads: tuple[int, int]
) -> None:
    check(inputs(sum(lengths), heads, 64), lengths, 0.125, seed=sum(lengths))


@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (3, 1), (5, 1), (2, 2), (6, 2)])
def test_query_heads_share_a_key_head(heads: tuple[int, int]) -> None:
    check(inputs(150, heads, 64), [70, 80], 0.125)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_sizes_and_dtypes(size: int, dtype: torch.dtype) -> None:
    check(inputs(300, (2, 1), size, dtype), [30, 270], size**-0.5)


@pytest.mark.parametrize("scale", [1e-3, 4.0])
def test_maxima_that_hardly_move_and_that_leap(scale: float) -> None:
    check(inputs(384, (2, 1), 64), [384], scale)


@pytest.mark.parametrize("heads", [(2, 1), (1, 1)], ids=["two-heads", "two-tiles"])
def test_every_order_of_events_gives_the_same_bits(heads: tuple[int, int]) -> None:
    tensors, at = inputs(500, heads, 64), where([300, 90, 110])
    first = attend(tensors, at, 0.1)
    for seed in range(1, 12):
        for one, other in zip(first, attend(tensors, at, 0.1, seed=seed, stages=3), strict=True):
            assert torch.equal(one, other)


def test_what_stands_beside_a_segment_changes_no_bit() -> None:
    tensors = inputs(360, (2, 1), 64)
    changed = [x.clone() for x in tensors]
    mine = slice(90, 240)
    for x in changed:
        x[: mine.start] *= -7
        x[mine.stop :] *= 5
    before, _ = attend(tensors, where([90, 150, 120]), 0.1)
    after, _ = attend(changed, where([3, 1, 86, 150, 119, 1]), 0.1)
    assert torch.equal(before[mine], after[mine])
    assert not torch.equal(before, after)


def keeps_its_bits(
    before: list[int], length: int, heads: tuple[int, int], sources: Mapping[str, str] = SOURCES
) -> bool:
    """Whether a segment behind others comes out as it does alone."""
    place = sum(before)
    tensors = inputs(place + length + 9, heads, 64)
    mine = slice(place, place + length)
    packed, lse = attend(tensors, where([*before, length, 9]), 0.5, sources=sources)
    alone, lse_alone = attend([x[mine] for x in tensors], where([length]), 0.5, sources=sources)
    return torch.equal(packed[mine], alone) and torch.equal(lse[:, mine], lse_alone[:, :length])


@pytest.mark.parametrize("heads", [(2, 1), (1, 1)], ids=["two-heads", "two-tiles"])
@pytest.mark.parametrize(
    ("before", "length"),
    [([1], 190), ([37], 2 * TILE), ([63, 2], 40), ([1] * 70, 1), ([TILE], 190), ([129, 5], 256)],
    ids=lambda x: str(x) if isinstance(x, int) else f"after-{sum(x)}",
)
def test_a_segment_keeps_its_bits_wherever_it_stands(
    before: list[int], length: int, heads: tuple[int, int]
) -> None:
    assert keeps_its_bits(before, length, heads)


def test_tokens_after_the_last_segment_attend_to_themselves() -> None:
    q, k, v = inputs(200, (2, 2), 64)
    out, _ = attend([q, k, v], where([150], 200), 0.1)
    assert torch.equal(out[150:], v[150:].float())


@pytest.mark.parametrize("key", [3, 120], ids=["by-the-special-unit", "by-the-polynomial"])
def test_a_key_that_is_no_number_is_not_lost(key: int) -> None:
    tensors = inputs(128, (2, 1), 64)
    tensors[1][key] = torch.nan
    out, _ = attend(tensors, where([128]), 0.1)
    assert out[:key].isfinite().all()
    assert not out[key:].isfinite().any()


# What is taken out or put in its place, and what the simulator must say.
BROKEN = {
    "weights read too early": (
        "    mbarrier.wait(p_ready.index(2 * x), i & 1)\n", "", TOO_EARLY),
    "other half of the weights read too early": (
        "    mbarrier.wait(p_ready.index(2 * x + 1), i & 1)\n", "", TOO_EARLY),
    "output read too early": (
        "    mbarrier.wait(o_scaled.index(x), i & 1)\n", "", TOO_EARLY),
    "scores read too early": (
        "        mbarrier.wait(s_ready, i & 1)\n        strips", "        strips", TOO_EARLY),
    "keys read too early": (
        "        mbarrier.wait(kv_ready.index(after), (j + 1) // STAGES & 1)\n", "", TOO_EARLY),
    "queries read too early": (
        "    mbarrier.wait(q_ready.index(1), 0)\n", "", TOO_EARLY),
    "last output read too early": (
        "        mbarrier.wait(o_ready.index(x), (count & 1) ^ 1)\n", "", TOO_EARLY),
    "keys overwritten": (
        "    mbarrier.wait(kv_free.index(slot), lap ^ 1)\n", "", TOO_EARLY),
    "values freed by the first tile": (
        "i, [o_ready.index(0)])\n        mbarrier", "i, [o_ready.index(0), kv_free.index(here)])\n"
        "        mbarrier", TOO_EARLY),
    "shrinks overwritten": (
        "    mbarrier.wait(a_free, (i & 1) ^ 1)\n", "", TOO_EARLY),
    "phase turned round": ("index(slot), lap ^ 1)", "index(slot), lap)", "deadlock"),
    "phase of another lap": (
        "i // STAGES & 1", "i // (STAGES + 1) & 1", "waits for the same phase"),
    "phase that does not change": (
        "wait(o_scaled.index(x), i & 1)", "wait(o_scaled.index(x), 0)", "waits for the same phase"),
    "weights never told": ("    mbarrier.arrive(p_ready.index(2 * x + 1))\n", "", "deadlock"),
    "shrinks never freed": (
        "            mbarrier.arrive(a_free.index(x))\n", "", "deadlock"),
    "weights told twice": (
        "    mbarrier.arrive(p_ready.index(2 * x + 1))\n",
        "    mbarrier.arrive(p_ready.index(2 * x + 1))\n" * 2, TOO_EARLY),
    "more arrivals than counted": (
        "arrive(p_ready.index(2 * x))", "arrive(p_ready.index(2 * x), count=2)", "more arrivals"),
    "fewer bytes expected": (
        "desc.block_type.nbytes)\n    tma", "desc.block_type.nbytes // 2)\n    tma", "deadlock"),
    "output stored without a fence": ("        fence_async_shared()\n", "", "without a fence"),
    "output left to itself": ("    tma.store_wait(0)\n", "", "before its stores"),
}  # fmt: skip


def replaced(*pairs: tuple[str, str]) -> dict[str, str]:
    """The sources with each first text of a pair turned into the second."""
    sources = SOURCES
    for wanted, instead in pairs:
        assert sum(text.count(wanted) for text in sources.values()) > 0
        sources = {name: text.replace(wanted, instead) for name, text in sources.items()}
    return sources


@pytest.mark.parametrize(("wanted", "instead", "told"), BROKEN.values(), ids=BROKEN)
def test_a_broken_kernel_is_found_out(wanted: str, instead: str, told: str) -> None:
    broken = replaced((wanted, instead))
    tensors, at = inputs(384, (2, 1), 64), where([300, 84])
    for seed in range(3):  # whatever the order of events
        with pytest.raises(Fault, match=told):
            attend(tensors, at, 4.0, seed=seed, sources=broken, stages=3)


# Walks that go wrong, of which no fault tells: the output does.
ASTRAY = {
    "a part counted to the end of its box": ("gl.minimum(t, end - 1) - n", "t - n"),
    "a segment's last part left out": ("row + M) - first, J)", "row + M) - first, J) - 1"),
    "parts looked up one too far": ("j = rest + gl", "j = rest + 1 + gl"),
    "the rest left out": ("count = own + more", "count = own"),
    "one part too many without a mask": ("(begin + 1 - first) // J", "(begin + J - first) // J"),
    "another segment's keys without a mask": ("gl.where(last_start == first, ", "gl.where(True, "),
    "single tokens apart": ("block + 1, mask=alone", "block, mask=alone"),
    "the second tile's own keys left out": ("T, M + down, J", "T, M, J"),
}  # fmt: skip


@pytest.mark.parametrize("broken", ASTRAY.values(), ids=ASTRAY)
def test_a_walk_that_goes_astray_is_found_out(broken: tuple[str, str]) -> None:
    tensors, lengths = inputs(532, (1, 1), 64), [200, 55, 1, 1, 1, 100, 154, 20]
    with pytest.raises((AssertionError, Fault)):
        check(tensors, lengths, 0.5, sources=replaced(broken))


# Walks in other parts or another order: the output is right, its bits are not.
MOVED = {
    "parts from the batch's start": [("first = gl.load(starts + row)", "first = row * 0")],
    "the diagonal first": [
        ("n, _ = part(i,", "n, _ = part(gl.where(i == 0, count - 1, i - 1),"),
        ("n, end = part(i,", "n, end = part(gl.where(i == 0, count - 1, i - 1),"),
        ("gl.where(last_start == first, (begin + 1 - first) // J, 0)", "0"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("moved", MOVED.values(), ids=MOVED)
def test_another_walk_gives_other_bits(moved: list[tuple[str, str]]) -> None:
    tensors, lengths = inputs(337, (2, 1), 64), [37, 300]
    check(tensors, lengths, 0.5, sources=replaced(*moved))
    assert not keeps_its_bits([37], 300, (2, 1), replaced(*moved))


def test_blackwell_runs_it_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "architecture", lambda device: 100)
    gpu, half = torch.device("cuda"), torch.bfloat16
    assert choose("attention", "gluon", gpu, half, size=96) == "gluon"
    assert choose("attention", "auto", gpu, half) == "triton"
    with pytest.raises(BackendError, match="no tiles for head size 256"):
        choose("attention", "gluon", gpu, half, size=256)
    monkeypatch.setattr(backends, "architecture", lambda device: 80)
    with pytest.raises(BackendError, match=r"made for sm_90 and sm_100.*use backend='triton'"):
        choose("attention", "gluon", gpu, half)


def test_the_host_binds_its_arguments_and_compiles_it() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, __file__], env=environment, check=True, timeout=110)


def bind_and_compile() -> None:
    """`forward` as on a B200, up to the launch."""
    from twins.blackwell import compile_launches

    launched = compile_launches(forward_sm100, "pair_kernel")
    for tokens, heads in ((300, 8), (1, 5)):
        at = where([tokens])
        q, k, v = inputs(tokens, (heads, 1), 128)
        forward_sm100.forward(q, k, v, at.places, 0.1)
    grids, built = zip(*launched, strict=True)
    assert grids == ((4, 3), (3, 1))
    assert all(one.num_warps == 16 and one.shared <= 232_448 for one in built)


if __name__ == "__main__":
    bind_and_compile()
