"""Blackwell's backward, its own source run by a simulator, against float64; and broken on purpose.

Shapes: T packed tokens, N query heads, K key heads, H head size, U = T rounded up to a tile.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hermes_kernels.launch import TILE
from twins.gluon_machine import TOO_EARLY, Fault
from twins.simulated import Sources, replaced, where
from twins.simulated_sm100 import DKDV, DQ, of_keys, of_queries
from twins.torch_attention import inputs, torch_itself, truth

pytestmark = pytest.mark.timeout(120)

GRADIENTS = ("dq", "dk", "dv")


def check(
    tensors: list[Tensor], lengths: list[int], scale: float, *, seed: int = 0, parts: int = 1
) -> None:
    """Every value is written, and errs no more than 1.5 times what PyTorch errs."""
    ours = [
        *of_queries(tensors, lengths, scale, seed=seed),
        *of_keys(tensors, lengths, scale, seed=seed, parts=parts),
    ]
    theirs, wanted = (find(tensors, lengths, scale)[1:] for find in (torch_itself, truth))
    for name, one, other, right in zip(GRADIENTS, ours, theirs, wanted, strict=True):
        error, allowed = ((x.double() - right).norm() for x in (one, other))
        # What is 0 in truth, as dq of a segment of one token, is off by rounding in fp32.
        assert error <= 1.5 * allowed + 1e-6 * tensors[3].norm(), (name, error, allowed)


@pytest.mark.parametrize(
    "lengths",
    [
        [1], [TILE - 1], [TILE, 1], [TILE + 1], [127, 1, 129, 128], [1] * 256, [640],
        [5, 250, 1, 3], [200, 55, 1, 1, 1, 100, 154, 20],
    ],
    ids=lambda x: f"{len(x)}-of-{sum(x)}",
)  # fmt: skip
def test_every_packing_errs_no_more_than_pytorch(lengths: list[int]) -> None:
    check(inputs(sum(lengths), 2, 1, 64), lengths, 0.125)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=4), st.sampled_from([(2, 1), (1, 1)]))
@settings(max_examples=8)
def test_any_packing_in_any_order_of_events_is_right(
    lengths: list[int], heads: tuple[int, int]
) -> None:
    check(inputs(sum(lengths), *heads, 64), lengths, 0.125, seed=sum(lengths))


@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (3, 1), (2, 2), (8, 1)])
def test_query_heads_share_a_key_head(heads: tuple[int, int]) -> None:
    check(inputs(150, *heads, 64), [70, 80], 0.125)


@pytest.mark.parametrize("parts", [2, 4])
def test_query_heads_are_cut_into_parts(parts: int) -> None:
    check(inputs(150, 8, 2, 64), [70, 80], 0.125, parts=parts)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_sizes_and_dtypes(size: int, dtype: torch.dtype) -> None:
    check(inputs(300, 2, 1, size, dtype), [30, 270], size**-0.5)


def test_every_order_of_events_gives_the_same_bits() -> None:
    tensors, lengths = inputs(500, 2, 1, 64), [300, 90, 110]

    def gradients(**options: int) -> list[Tensor]:
        dq = of_queries(tensors, lengths, 0.1, **options)
        return [*dq, *of_keys(tensors, lengths, 0.1, **options)]

    first = gradients()
    for seed in range(1, 7):
        for one, other in zip(first, gradients(seed=seed, stages=3), strict=True):
            assert torch.equal(one, other)


def test_what_stands_beside_a_segment_changes_no_bit() -> None:
    tensors = inputs(360, 2, 1, 64)
    changed = [x.clone() for x in tensors]
    mine = slice(90, 240)
    for x in changed:
        x[: mine.start] *= -7
        x[mine.stop :] *= 5
    before, after = (
        [
            *of_queries(given, lengths, 0.1),
            *of_keys(given, lengths, 0.1),
        ]
        for given, lengths in ((tensors, [90, 150, 120]), (changed, [3, 1, 86, 150, 119, 1]))
    )
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[mine], other[mine])
        assert not torch.equal(one, other)


def test_a_ring_that_is_even_is_refused() -> None:
    with pytest.raises(Fault, match="must be odd"):
        of_keys(inputs(1, 1, 1, 64), [1], 0.1, stages=4)


# What is taken out or put in its place, and what the simulator must say.
BROKEN_KEYS = {
    "weights read too early": (
        "            mbarrier.wait(p_ready.index(STRIPS * x + c), i & 1)\n", "", TOO_EARLY),
    "differences read too early": (
        "    mbarrier.wait(z_ready.index(1), i & 1)\n", "", TOO_EARLY),
    "scores read too early": ("    mbarrier.wait(scored.index(0), i & 1)\n", "", TOO_EARLY),
    "replies read too early": ("    mbarrier.wait(scored.index(1), i & 1)\n", "", TOO_EARLY),
    "statistics read too early": (
        "    mbarrier.wait(vectors_ready.index(i % TURNS), i // TURNS & 1)\n", "", TOO_EARLY),
    "keys read too early": ("    mbarrier.wait(kv_ready.index(0), 0)\n", "", TOO_EARLY),
    "queries read too early": (
        "    mbarrier.wait(ready.index(j % STAGES), j // STAGES & 1)\n", "", TOO_EARLY),
    "sums read too early": ("    mbarrier.wait(done.index(x), 0)\n", "", TOO_EARLY),
    "a block overwritten": ("    mbarrier.wait(kv_free.index(slot), lap ^ 1)\n", "", TOO_EARLY),
    "scores of the next turn over weights": (
        "        _add_to_dv(s, ring, dv, p_ready, i, free.index((j + 1) % STAGES))\n"
        "        score(kv.index(0), ring, s, ready, j + 2, [scored.index(0)])\n",
        "        score(kv.index(0), ring, s, ready, j + 2, [scored.index(0)])\n"
        "        _add_to_dv(s, ring, dv, p_ready, i, free.index((j + 1) % STAGES))\n", TOO_EARLY),
    "queries freed before dk has them": (
        "p_ready, i, free.index((j + 1) % STAGES)", "p_ready, i, free.index(j % STAGES)",
        TOO_EARLY + "|more arrivals"),
    "phase turned round": ("index(slot), lap ^ 1)", "index(slot), lap)", "deadlock"),
    "phase of another lap": (
        "j // STAGES & 1", "j // (STAGES + 1) & 1", "waits for the same phase"),
    "phase that does not change": (
        "wait(z_ready.index(0), i & 1)", "wait(z_ready.index(0), 0)", "waits for the same phase"),
    "differences never told": ("    mbarrier.arrive(z_ready.index(x))\n", "", "deadlock"),
    "weights told twice": (
        "        mbarrier.arrive(p_ready.index(len(exponents) * x + c))\n",
        "        mbarrier.arrive(p_ready.index(len(exponents) * x + c))\n" * 2, TOO_EARLY),
    "a vector's bytes not expected": (
        "exponents_desc.block_type.nbytes + deltas_desc", "deltas_desc",
        "deadlock|may still"),
    "output stored without a fence": ("    fence_async_shared()\n", "", "without a fence"),
    "output left to itself": ("    tma.store_wait(0)\n", "", "before its stores"),
}  # fmt: skip
BROKEN_QUERIES = {
    "queries moved too early": ("    mbarrier.wait(own_ready.index(x), 0)\n", "", TOO_EARLY),
    "queries multiplied too early": (
        "    mbarrier.wait(own_moved.index(1), 0)\n", "", TOO_EARLY),
    "scores overwritten": (
        "            mbarrier.wait(s_free.index(x), i & 1)\n", "            pass\n", TOO_EARLY),
    "scores freed before they are read": (
        "    scores = strips_of(s, x)\n    mbarrier.arrive(s_free.index(x))\n",
        "    mbarrier.arrive(s_free.index(x))\n    scores = strips_of(s, x)\n", TOO_EARLY),
    "replies of the next block over differences": (
        "        add_differences(r, kv, dq, z_ready, i, free.index(j % STAGES))\n"
        "        told = [scored.index(1), free.index((j + 3) % STAGES)]\n"
        "        score(dout, kv, r, ready, j + 3, told)\n",
        "        told = [scored.index(1), free.index((j + 3) % STAGES)]\n"
        "        score(dout, kv, r, ready, j + 3, told)\n"
        "        add_differences(r, kv, dq, z_ready, i, free.index(j % STAGES))\n",
        TOO_EARLY + "|deadlock"),
    "keys freed before dq has them": (
        "ready, j + 2, [scored.index(0)])",
        "ready, j + 2, [scored.index(0), free.index((j + 2) % STAGES)])",
        TOO_EARLY + "|more arrivals"),
    "values never freed": ("[scored.index(1), free.index(1)]", "[scored.index(1)]", "deadlock"),
    "scores never freed": ("    mbarrier.arrive(s_free.index(x))\n", "", "deadlock"),
    "sums read too early": ("    mbarrier.wait(dq_ready.index(0), 0)\n", "", TOO_EARLY),
    "half of the output not awaited": (
        "        mbarrier.wait(out_ready.index(0), 0)\n", "", TOO_EARLY + "|without a fence"),
    "output stored without a fence": ("    fence_async_shared()\n", "", "without a fence"),
}  # fmt: skip


def told(find: Callable[..., object], sources: Sources, broken: tuple[str, ...]) -> None:
    """Whatever the order of events, the simulator says what is wrong."""
    wanted, instead, message = broken
    sources = replaced(sources, (wanted, instead))
    tensors, lengths = inputs(384, 2, 1, 128), [300, 84]
    for seed in range(3):
        with pytest.raises(Fault, match=message):
            find(tensors, lengths, 4.0, seed=seed, sources=sources, stages=3)


@pytest.mark.parametrize("broken", BROKEN_KEYS.values(), ids=BROKEN_KEYS)
def test_a_broken_dkdv_is_found_out(broken: tuple[str, ...]) -> None:
    told(of_keys, DKDV, broken)


@pytest.mark.parametrize("broken", BROKEN_QUERIES.values(), ids=BROKEN_QUERIES)
def test_a_broken_dq_is_found_out(broken: tuple[str, ...]) -> None:
    told(of_queries, DQ, broken)


def test_the_host_binds_its_arguments_and_compiles_both() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, __file__], env=environment, check=True, timeout=110)


def bind_and_compile() -> None:
    """`backward` as on a B200, up to each launch."""
    from hermes_kernels import backward_sm100, varlen_attention
    from twins.blackwell import compile_launches

    statistics = compile_launches(varlen_attention, "statistics_kernel")
    launched = compile_launches(backward_sm100, "dq_kernel", "dkdv_kernel")
    for tokens, heads in ((300, (16, 8)), (1, (5, 1))):
        at = where([tokens])
        q, k, v, dout = inputs(tokens, *heads, 128)
        lse = torch.zeros(heads[0], at.places.query_order.numel() * TILE)
        gradients = backward_sm100.backward(dout, q, k, v, q, lse, at.places, 0.1)
        assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]
    grids, built = zip(*statistics, *launched, strict=True)
    assert grids == ((16, 12), (5, 4), (16, 3), (8, 3), (5, 1), (5, 1))
    assert [one.num_warps for one in built] == [4] * 2 + [12] * 4
    assert all(one.shared <= 232_448 for one in built)


if __name__ == "__main__":
    bind_and_compile()
