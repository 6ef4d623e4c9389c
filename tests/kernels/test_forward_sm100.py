"""Blackwell's forward, its own source run by a simulator, against float64; and broken on purpose.

Shapes: T packed tokens, N query heads, K key heads, H head size, U = T rounded up to a tile.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hermes_core import backends
from hermes_core.backends import BackendError, choose
from hermes_core.segments import segments
from hermes_kernels import forward_sm100, reference
from hermes_kernels.launch import TILE
from twins.gluon_machine import TOO_EARLY, Fault
from twins.simulated import replaced, where
from twins.simulated_sm100 import FORWARD, attend

pytestmark = pytest.mark.timeout(120)


def inputs(
    tokens: int, heads: tuple[int, int], size: int, dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    """q, k and v."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, n, size) for n in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def torch_itself(tensors: list[Tensor], lengths: list[int], scale: float) -> Tensor:
    """PyTorch's fused attention in the inputs' dtype, one segment after the other."""
    parts = zip(*(x.split(lengths) for x in tensors), strict=True)
    return torch.cat([
        scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in one), is_causal=True, scale=scale, enable_gqa=True
        )[0].transpose(0, 1)
        for one in parts
    ])  # fmt: skip


def check(tensors: list[Tensor], lengths: list[int], scale: float, *, seed: int = 0) -> None:
    """Every value is written, and errs no more than 1.5 times what PyTorch errs."""
    wide = [x.double() for x in tensors]
    right = reference.varlen_attention(*wide, lengths, scale)
    out, lse = attend(tensors, lengths, scale, seed=seed)
    allowed = (torch_itself(tensors, lengths, scale) - right).norm()
    assert (out - right).norm() <= 1.5 * allowed + 1e-6 * right.norm()
    wanted = reference.varlen_lse(*wide[:2], lengths, scale)
    torch.testing.assert_close(lse.double(), wanted.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "lengths",
    [
        [1], [TILE - 1], [TILE, 1], [TILE + 1], [127, 1, 129, 128], [1] * 256, [640],
        [5, 250, 1, 3], [200, 55, 1, 1, 1, 100, 154, 20], [1, 256], [129, 128],
    ],
    ids=lambda x: f"{len(x)}-of-{sum(x)}",
)  # fmt: skip
@pytest.mark.parametrize("heads", [(2, 1), (1, 1)], ids=["two-heads", "two-tiles"])
def test_every_packing_errs_no_more_than_pytorch(
    lengths: list[int], heads: tuple[int, int]
) -> None:
    check(inputs(sum(lengths), heads, 64), lengths, 0.125)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=4), st.sampled_from([(2, 1), (1, 1)]))
@settings(max_examples=10)
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
    tensors, lengths = inputs(500, heads, 64), [300, 90, 110]
    first = attend(tensors, lengths, 0.1)
    for seed in range(1, 12):
        again = attend(tensors, lengths, 0.1, seed=seed, stages=3)
        for one, other in zip(first, again, strict=True):
            assert torch.equal(one, other)


def test_what_stands_beside_a_segment_changes_no_bit() -> None:
    tensors = inputs(360, (2, 1), 64)
    changed = [x.clone() for x in tensors]
    mine = slice(90, 240)
    for x in changed:
        x[: mine.start] *= -7
        x[mine.stop :] *= 5
    before, _ = attend(tensors, [90, 150, 120], 0.1)
    after, _ = attend(changed, [3, 1, 86, 150, 119, 1], 0.1)
    assert torch.equal(before[mine], after[mine])
    assert not torch.equal(before, after)


def test_tokens_after_the_last_segment_attend_to_themselves() -> None:
    q, k, v = inputs(200, (2, 2), 64)
    lengths = [150, *[1] * 50]
    for one, other in zip(
        segments(np.array([0, 150]), 200).places, where(lengths).places, strict=True
    ):
        assert torch.equal(one, other)
    out, _ = attend([q, k, v], lengths, 0.1)
    assert torch.equal(out[150:], v[150:].float())


@pytest.mark.parametrize("key", [3, 120], ids=["by-the-special-unit", "by-the-polynomial"])
def test_a_key_that_is_no_number_is_not_lost(key: int) -> None:
    tensors = inputs(128, (2, 1), 64)
    tensors[1][key] = torch.nan
    out, _ = attend(tensors, [128], 0.1)
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


@pytest.mark.parametrize(("wanted", "instead", "told"), BROKEN.values(), ids=BROKEN)
def test_a_broken_kernel_is_found_out(wanted: str, instead: str, told: str) -> None:
    broken, tensors = replaced(FORWARD, (wanted, instead)), inputs(384, (2, 1), 64)
    for seed in range(3):  # whatever the order of events
        with pytest.raises(Fault, match=told):
            attend(tensors, [300, 84], 4.0, seed=seed, sources=broken, stages=3)


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
