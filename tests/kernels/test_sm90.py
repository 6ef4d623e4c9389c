"""Hopper's kernels, their own source run by a simulator, against float64; and broken on purpose.

Shapes: T packed tokens, N query heads, K key heads, H head size, U = T rounded up to a tile.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hermes_kernels
from hermes_core.segments import Segments, segments
from hermes_kernels import reference
from hermes_kernels.launch import TABLE, TILE, Kernel
from twins.gluon_machine import TOO_EARLY, Fault
from twins.gluon_simulator import Box, Pointer, run
from twins.gluon_tensors import F32, I32, TYPES
from twins.gluon_tensors import Tensor as Scalar
from twins.hopper import Hopper
from twins.torch_attention import inputs, torch_itself, truth

pytestmark = pytest.mark.timeout(120)

FOLDER = Path(hermes_kernels.__file__).parent
ROWS = 64  # of a box that a group multiplies or stores
GRADIENTS = ("dq", "dk", "dv")


def sources_of(kernel: Kernel) -> dict[str, str]:
    """The text of each module by its name, that which the last imports first."""
    names = ("groups_sm90", kernel)
    return {f"hermes_kernels.{name}": (FOLDER / f"{name}.py").read_text() for name in names}


FORWARD, DQ, DKDV = map(sources_of, ("forward_sm90", "dq_sm90", "dkdv_sm90"))


class Given:
    """Tensors as the kernels take them, and what came of it."""

    def __init__(self, tensors: list[Tensor], lengths: list[int], scale: float) -> None:
        self.tensors, self.lengths, self.scale = tensors, lengths, scale
        self.at: Segments = segments(np.concatenate([[0], np.cumsum(lengths)]))
        self.tokens, self.heads, self.size = tensors[0].shape
        self.kv_heads, self.room = tensors[1].shape[1], self.at.places.query_order.numel() * TILE
        self.dtype = TYPES[str(tensors[0].dtype).removeprefix("torch.")]

    def boxes(self, *rows: int) -> list[Box]:
        """q, k, v and dout in boxes of so many tokens."""
        pairs = zip(self.tensors, rows, strict=False)
        return [Box(x.float().flatten(1).numpy(), [n, self.size], self.dtype) for x, n in pairs]

    def output(self, heads: int) -> Box:
        shape = (self.tokens, heads * self.size)
        found, written = np.full(shape, np.nan, np.float32), np.zeros(shape, np.int64)
        return Box(found, [ROWS, self.size], self.dtype, written)

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """lse and delta of all heads; that of tokens that are none must not matter."""
        q, k, v, dout = (x.double() for x in self.tensors)
        out = reference.varlen_attention(q, k, v, self.lengths, self.scale)
        lse = reference.varlen_lse(q, k, self.lengths, self.scale)
        delta = (out.to(self.tensors[0].dtype) * dout).sum(2).T
        padding = (0, self.room - self.tokens)
        lse, delta = (
            torch.nn.functional.pad(x.float(), padding, value=beyond).flatten()
            for x, beyond in ((lse, torch.nan), (delta, 0.0))
        )
        return lse.numpy(), delta.numpy()

    def run(
        self, kernel: Kernel, sources: Mapping[str, str], own: Mapping[str, Any], heads: int,
        *, seed: int, stages: int | None,
    ) -> None:  # fmt: skip
        order = self.at.places.key_order if kernel == "dkdv_sm90" else self.at.places.query_order
        shared = {
            "order": Pointer(order.numpy()), "scale": Scalar(np.asarray(self.scale, "f4"), F32),
            "T": Scalar(np.asarray(self.tokens, np.int32), I32),
            "U": Scalar(np.asarray(self.room, np.int32), I32), "G": self.heads // self.kv_heads,
            "STAGES": stages or TABLE[90, kernel, self.size].stages,
        }  # fmt: skip
        grid = (heads, order.numel())
        name = f"{kernel.removesuffix('_sm90')}_kernel"
        run(sources, name, {**own, **shared}, grid, seed, Hopper)


def attend(
    known: Given, *, seed: int = 0, sources: Mapping[str, str] = FORWARD, stages: int | None = None
) -> list[Tensor]:
    """Output [T, N, H] and log-sum-exp [N, U] as the kernel leaves them."""
    q, k, v = known.boxes(ROWS, TILE, TILE)
    out, lse = known.output(known.heads), np.full(known.heads * known.room, np.nan, np.float32)
    own = {"q_desc": q, "k_desc": k, "v_desc": v, "out_desc": out, "lse_ptr": Pointer(lse)}
    own["starts"] = Pointer(known.at.places.starts.numpy())
    known.run("forward_sm90", sources, own, known.heads, seed=seed, stages=stages)
    found = once(out).view(known.tensors[0].shape)
    return [found, torch.from_numpy(lse).view(known.heads, known.room)]


def of_queries(
    known: Given, *, seed: int = 0, sources: Mapping[str, str] = DQ, stages: int | None = None
) -> list[Tensor]:
    """dq [T, N, H] as the kernel leaves it."""
    names = ("q_desc", "k_desc", "v_desc", "dout_desc")
    own: dict[str, Any] = dict(zip(names, known.boxes(*[ROWS] * 4), strict=True))
    lse, delta = map(Pointer, known.statistics())
    dq = known.output(known.heads)
    own |= {"dq_desc": dq, "lse_ptr": lse, "delta_ptr": delta}
    own["starts"] = Pointer(known.at.places.starts.numpy())
    known.run("dq_sm90", sources, own, known.heads, seed=seed, stages=stages)
    return [once(dq).view(known.tensors[0].shape)]


def of_keys(
    known: Given, *, seed: int = 0, sources: Mapping[str, str] = DKDV, stages: int | None = None,
    parts: int = 1,
) -> list[Tensor]:  # fmt: skip
    """dk and dv [T, K, H] as the kernel leaves them."""
    names = ("q_desc", "k_desc", "v_desc", "dout_desc")
    own: dict[str, Any] = dict(zip(names, known.boxes(*[ROWS] * 4), strict=True))
    lse, delta = (Box(x, [ROWS], F32) for x in known.statistics())
    heads = known.kv_heads * parts
    dk, dv = known.output(heads), known.output(heads)
    own |= {"lse_desc": lse, "delta_desc": delta, "dk_desc": dk, "dv_desc": dv, "S": parts}
    own["ends"] = Pointer(known.at.places.ends.numpy())
    known.run("dkdv_sm90", sources, own, heads, seed=seed, stages=stages)
    shape = (known.tokens, known.kv_heads, parts, known.size)
    return [once(x).view(shape).sum(2) for x in (dk, dv)]


def once(box: Box) -> Tensor:
    """What was stored, each element once."""
    assert box.written is not None
    assert (box.written == 1).all()
    return torch.from_numpy(box.values)


def check(
    tensors: list[Tensor], lengths: list[int], scale: float, *, seed: int = 0, parts: int = 1
) -> None:
    """Every value is written, and errs no more than 1.5 times what PyTorch errs."""
    known = Given(tensors, lengths, scale)
    out, lse = attend(known, seed=seed)
    ours = [out, *of_queries(known, seed=seed), *of_keys(known, seed=seed, parts=parts)]
    theirs, wanted = (find(tensors, lengths, scale) for find in (torch_itself, truth))
    for name, one, other, right in zip(("out", *GRADIENTS), ours, theirs, wanted, strict=True):
        error, allowed = ((x.double() - right).norm() for x in (one, other))
        # What is 0 in truth, as dq of a segment of one token, is off by rounding in fp32.
        assert error <= 1.5 * allowed + 1e-6 * tensors[3].norm(), (name, error, allowed)
    right = reference.varlen_lse(*(x.double() for x in tensors[:2]), lengths, scale)
    assert lse.isfinite().all()
    torch.testing.assert_close(lse[:, : sum(lengths)].double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "lengths",
    [[1], [TILE - 1], [TILE, 1], [TILE + 1], [127, 1, 129, 128], [1] * 200, [640], [5, 250, 1, 3]],
    ids=lambda x: f"{len(x)}-of-{sum(x)}",
)
def test_every_packing_errs_no_more_than_pytorch(lengths: list[int]) -> None:
    check(inputs(sum(lengths), 2, 1, 64), lengths, 0.125, seed=sum(lengths))


@given(st.lists(st.integers(1, 400), min_size=1, max_size=4), st.sampled_from([(2, 1), (1, 1)]))
@settings(max_examples=10, deadline=None)
def test_any_packing_in_any_order_of_events_is_right(
    lengths: list[int], heads: tuple[int, int]
) -> None:
    check(inputs(sum(lengths), *heads, 64), lengths, 0.125, seed=sum(lengths))


@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (2, 2), (5, 1)])
def test_query_heads_share_a_key_head(heads: tuple[int, int]) -> None:
    check(inputs(150, *heads, 64), [70, 80], 0.125)


@pytest.mark.parametrize("parts", [2, 4])
def test_query_heads_are_cut_into_parts(parts: int) -> None:
    check(inputs(300, 8, 2, 64), [270, 30], 0.125, parts=parts)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_sizes_and_dtypes(size: int, dtype: torch.dtype) -> None:
    check(inputs(300, 2, 1, size, dtype), [30, 270], size**-0.5)


@pytest.mark.parametrize("scale", [1e-3, 4.0])
def test_maxima_that_hardly_move_and_that_leap(scale: float) -> None:
    check(inputs(384, 2, 1, 64), [384], scale)


@pytest.mark.parametrize("find", [attend, of_queries, of_keys])
def test_every_order_of_events_gives_the_same_bits(find: Callable[..., list[Tensor]]) -> None:
    known = Given(inputs(500, 2, 1, 64), [300, 90, 110], 0.1)
    first = find(known)
    for seed in range(1, 5):
        for one, other in zip(first, find(known, seed=seed, stages=2), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("find", [attend, of_queries, of_keys])
def test_what_stands_beside_a_segment_changes_no_bit(find: Callable[..., list[Tensor]]) -> None:
    tensors, mine = inputs(360, 2, 1, 64), slice(90, 240)
    changed = [x.clone() for x in tensors]
    for x in changed:
        x[: mine.start] *= -7
        x[mine.stop :] *= 5
    before = find(Given(tensors, [90, 150, 120], 0.1))
    after = find(Given(changed, [3, 1, 86, 150, 119, 1], 0.1))
    for one, other in zip(before, after, strict=True):
        if one.shape[0] == 360:
            assert torch.equal(one[mine], other[mine])
            assert not torch.equal(one, other)


# What is taken out or put in its place, and what the simulator must say.
ANY = {
    "phase turned round": ("lap ^ 1)", "lap)", "deadlock"),
    "output stored without a fence": ("    fence_async_shared()\n", "", "without a fence"),
    "output left to itself": ("    tma.store_wait(0)\n", "", "before its stores"),
}
RING = {
    "a block overwritten": ("    mbarrier.wait(free.index(slot), lap ^ 1)\n", "", TOO_EARLY),
    "fewer bytes expected": ("desc.block_type.nbytes)\n    tma", "32)\n    tma", "deadlock"),
    "freed by one group": ("barriers(STAGES, 2)", "barriers(STAGES, 1)", TOO_EARLY),
    "freed by three": ("barriers(STAGES, 2)", "barriers(STAGES, 3)", "deadlock"),
    "keys read too early": (
        "    mbarrier.wait(k_ready.index(slot), i // STAGES & 1)\n", "", TOO_EARLY),
    "phase of another lap": (
        "k_ready.index(slot), i // STAGES & 1", "k_ready.index(slot), i // (STAGES + 1) & 1",
        "waits for the same phase"),
    "queries read too early": ("    mbarrier.wait(q_ready.index(x), 0)\n", "", TOO_EARLY),
}  # fmt: skip
BROKEN_FORWARD = ANY | RING | {
    "scores read too early": ("wait(1, [s])", "wait(2, [s])", TOO_EARLY),
    "scores read beside the wait": (
        "    s = warpgroup_mma_wait(1, [s])\n", "    warpgroup_mma_wait(1, [s])\n", TOO_EARLY),
    "first scores not awaited": ("    s = warpgroup_mma_wait(0, [s])\n", "", TOO_EARLY),
    "output read too early": ("wait(0, [acc, p])", "wait(1, [acc, p])", TOO_EARLY),
    "last output read too early": ("warpgroup_mma_wait(0, [acc])", "acc", TOO_EARLY),
    "values freed before the output has them": (
        "    acc, p = warpgroup_mma_wait(0, [acc, p])\n    mbarrier.arrive(v_free.index(before))\n",
        "    mbarrier.arrive(v_free.index(before))\n    acc, p = warpgroup_mma_wait(0, [acc, p])\n",
        TOO_EARLY),
    "values read too early": (
        "    mbarrier.wait(v_ready.index(before), (i - 1) // STAGES & 1)\n", "", TOO_EARLY),
    "keys never freed": ("    mbarrier.arrive(k_free.index(slot))\n", "", "deadlock"),
    "output over queries that are multiplied": (
        "    i = blocks - 1\n", "    i = blocks - 1\n    q.index(1 - x).store(acc.to(q.dtype))\n",
        TOO_EARLY),
}  # fmt: skip
BROKEN_DQ = ANY | RING | {
    "scores read too early": ("wait(2, [s])", "wait(3, [s])", TOO_EARLY),
    "replies read too early": ("wait(1, [r])", "wait(2, [r])", TOO_EARLY),
    "sums read too early": ("warpgroup_mma_wait(0, [dq]) * scale", "dq * scale", TOO_EARLY),
    "values read too early": (
        "    mbarrier.wait(v_ready.index(slot), i // STAGES & 1)\n", "", TOO_EARLY),
    "keys freed before dq has them": (
        "k_free.index(before)", "k_free.index(slot)", TOO_EARLY + "|deadlock"),
    "dout not expected": ("2 * q_desc.block_type", "q_desc.block_type", TOO_EARLY),
}  # fmt: skip
BROKEN_DKDV = ANY | {
    "scores read too early": ("wait(1, [s])", "wait(2, [s])", TOO_EARLY),
    "replies read too early": ("wait(1, [r])", "wait(2, [r])", TOO_EARLY),
    "sums read too early": ("dk = warpgroup_mma_wait(0, [dk])", "pass", TOO_EARLY),
    "queries read too early": ("    mbarrier.wait(q_ready.index(slot), lap)\n", "", TOO_EARLY),
    "statistics read too early": (
        "    mbarrier.wait(dout_ready.index(slot), lap)\n", "", TOO_EARLY),
    "keys read too early": ("    mbarrier.wait(kv_ready.index(x), 0)\n", "", TOO_EARLY),
    "dout freed before dv has it": ("wait(1, [dv])", "wait(2, [dv])", TOO_EARLY),
    "queries freed before dk has them": (
        "    mbarrier.arrive(dout_free.index(slot))\n",
        "    mbarrier.arrive(dout_free.index(slot))\n    mbarrier.arrive(q_free.index(slot))\n",
        TOO_EARLY + "|more arrivals"),
    "queries overwritten": (
        "        mbarrier.wait(q_free.index(slot), lap ^ 1)\n", "", TOO_EARLY),
    "lap that does not change": ("gl.where(last, lap ^ 1, lap)", "lap", "the same phase"),
    "a slot passed over": ("slot == STAGES - 1", "slot == STAGES - 2", "the same phase|deadlock"),
    "vectors not expected": (
        "q_desc.block_type.nbytes + lse_desc.block_type.nbytes", "q_desc.block_type.nbytes",
        TOO_EARLY + "|deadlock"),
}  # fmt: skip


def broken(sources: Mapping[str, str], wanted: str, instead: str) -> dict[str, str]:
    assert sum(text.count(wanted) for text in sources.values()) > 0
    return {name: text.replace(wanted, instead) for name, text in sources.items()}


def told(find: Callable[..., object], sources: Mapping[str, str], message: str) -> None:
    """Whatever the order of events, the simulator says what is wrong."""
    known = Given(inputs(640, 1, 1, 64), [556, 84], 4.0)
    for seed in range(3):
        with pytest.raises(Fault, match=message):
            find(known, seed=seed, sources=sources, stages=2)


@pytest.mark.parametrize(
    ("wanted", "instead", "message"), BROKEN_FORWARD.values(), ids=BROKEN_FORWARD
)
def test_a_broken_forward_is_found_out(wanted: str, instead: str, message: str) -> None:
    told(attend, broken(FORWARD, wanted, instead), message)


@pytest.mark.parametrize(("wanted", "instead", "message"), BROKEN_DQ.values(), ids=BROKEN_DQ)
def test_a_broken_dq_is_found_out(wanted: str, instead: str, message: str) -> None:
    told(of_queries, broken(DQ, wanted, instead), message)


@pytest.mark.parametrize(("wanted", "instead", "message"), BROKEN_DKDV.values(), ids=BROKEN_DKDV)
def test_a_broken_dkdv_is_found_out(wanted: str, instead: str, message: str) -> None:
    told(of_keys, broken(DKDV, wanted, instead), message)


@pytest.mark.parametrize(
    ("find", "sources", "wanted", "instead"),
    [
        (attend, FORWARD, "c[None, :] <= (t", "c[None, :] < (t"),
        (attend, FORWARD, "c[None, :] >= (start", "c[None, :] > (start"),
        (attend, FORWARD, "borders = 1 + gl.minimum", "borders = 1 + 0 * gl.minimum"),
        (attend, FORWARD, "_shrunk(acc, shrink), top", "acc, top"),
        (of_queries, DQ, "c[None, :] <= (t", "c[None, :] < (t"),
        (of_queries, DQ, "c[None, :] >= (start", "c[None, :] >= (start - 1"),
        (of_queries, DQ, "borders = diagonal +", "borders = diagonal + 0 *"),
        (of_keys, DKDV, "c[None, :] >= j", "c[None, :] > j"),
        (of_keys, DKDV, "c[None, :] < end", "c[None, :] <= end"),
        (of_keys, DKDV, "gl.where(at < diagonal, at, at + inner) * M", "at * M"),
        (of_keys, DKDV, "gl.where(at + 1 < borders, at + 1, 0)", "at + 1"),
    ],
)  # fmt: skip
def test_a_wrong_border_is_seen_in_what_comes_of_it(
    find: Callable[..., list[Tensor]], sources: Mapping[str, str], wanted: str, instead: str
) -> None:
    tensors, lengths = inputs(800, 2, 1, 64), [410, 190, 200]
    known = Given(tensors, lengths, 0.125)
    out, dq, *rest = truth(tensors, lengths, 0.125)
    rights = {attend: [out], of_queries: [dq], of_keys: rest}[find]

    def error(ours: list[Tensor]) -> float:
        pairs = zip(ours, rights, strict=False)
        return max(float((one.double() - x).norm() / x.norm()) for one, x in pairs)

    assert error(find(known)) < 5e-3
    worse = error(find(known, sources=broken(sources, wanted, instead)))
    assert not worse < 2e-2


def test_the_host_binds_its_arguments_and_compiles_them() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, __file__], env=environment, check=True, timeout=110)


def bind_and_compile() -> None:
    """`forward` and `backward` as on an H100, up to each launch."""
    from hermes_kernels import backward_sm90, dkdv_sm90, dq_sm90, forward_sm90, varlen_attention
    from twins.blackwell import compile_launches

    modules = {
        "forward": forward_sm90, "statistics": varlen_attention, "dq": dq_sm90, "dkdv": dkdv_sm90
    }  # fmt: skip
    launched = [
        compile_launches(module, f"{name}_kernel", target=90) for name, module in modules.items()
    ]
    for tokens, heads in ((300, (16, 8)), (1, (5, 1))):
        at = segments(np.array([0, tokens]))
        q, k, v, dout = inputs(tokens, *heads, 128)
        out, lse = forward_sm90.forward(q, k, v, at.places, 0.1)
        gradients = backward_sm90.backward(dout, q, k, v, out, lse, at.places, 0.1)
        assert [x.shape for x in (out, *gradients)] == [q.shape, q.shape, k.shape, v.shape]
    grids = [[grid for grid, _ in one] for one in launched]
    assert grids == [[(16, 3), (5, 1)], [(16, 12), (5, 4)], [(16, 3), (5, 1)], [(8, 3), (5, 1)]]
    assert [[made.num_warps for _, made in one] for one in launched] == [[12] * 2, [4] * 2] + [
        [12] * 2
    ] * 2
    assert all(made.shared <= 232_448 for one in launched for _, made in one)


if __name__ == "__main__":
    bind_and_compile()
