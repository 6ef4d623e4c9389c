"""Hopper's kernels broken on purpose: the simulator, or what comes of it, tells each time."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import pytest
import torch
from torch import Tensor

from twins.gluon_machine import TOO_EARLY, Fault
from twins.simulated import Given, Sources, replaced
from twins.simulated_sm90 import (
    DKDV,
    DQ,
    FORWARD,
    attend,
    keeps_its_bits,
    of_keys,
    of_queries,
    opposed_heads,
)
from twins.torch_attention import inputs, truth

pytestmark = pytest.mark.timeout(120)

# What is taken out or put in its place, and what the simulator must say.
ANY = {
    "phase turned round": ("lap ^ 1)", "lap)", "deadlock"),
    "output stored without a fence": ("fence_async_shared()", "pass", "without a fence"),
    "output left to itself": ("    tma.store_wait(0)\n\n", "\n", "before its stores"),
}
RING = {
    "a block overwritten": (
        "    mbarrier.wait(free.index(slot), lap ^ 1)\n", "", TOO_EARLY + "|arrivals"),
    "fewer bytes expected": ("desc.block_type.nbytes)\n    tma", "32)\n    tma", "deadlock"),
    "freed by one group": ("barriers(STAGES, 2)", "barriers(STAGES, 1)", TOO_EARLY),
    "freed by three": ("barriers(STAGES, 2)", "barriers(STAGES, 3)", "deadlock"),
}  # fmt: skip
FORWARD_NOTE = (
    "            note(told.index(place), (row, head, first, after, rest, count, inner))\n"
)
FORWARD_FREE = "            mbarrier.wait(q_free.index(place), nth >> 1 & 1 ^ 1)\n"
COPY = """\
            mbarrier.expect(q_ready.index(place), q_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                q_desc, [row + x * HALF, head * H], q_ready.index(place), q.index(place)
            )
"""
BROKEN_FORWARD = ANY | RING | {
    "queries read too early": ("mbarrier.wait(q_ready.index(x), 0)", "pass", TOO_EARLY),
    "next queries read too early": (
        "mbarrier.wait(q_ready.index(place_then), ahead >> 1 & 1, pred=more)", "pass", TOO_EARLY),
    "queries of another lap": ("ahead >> 1 & 1", "ahead & 1", TOO_EARLY + "|the same phase"),
    "queries overwritten": (FORWARD_FREE, "", TOO_EARLY),
    "queries never overwritten": ("nth >> 1 & 1 ^ 1", "nth >> 1 & 1", "deadlock"),
    "queries never freed": ("mbarrier.arrive(q_free.index(place))", "pass", "deadlock"),
    "queries freed before they are multiplied": (
        "acc = gl.full(", "mbarrier.arrive(q_free.index(place))\n        acc = gl.full(",
        TOO_EARLY + "|arrivals"),
    "the next queries freed": (
        "arrive(q_free.index(place))", "arrive(q_free.index(place_then))",
        TOO_EARLY + "|arrivals|deadlock"),
    "notes where the last ones are": ("told.index(place)", "told.index(x)", TOO_EARLY),
    "notes after q was asked for": (FORWARD_NOTE + COPY, COPY + FORWARD_NOTE, TOO_EARLY),
    "notes never written": (FORWARD_NOTE, "", TOO_EARLY),
    "notes of the other group": ("_noted(told.index(x))", "_noted(told.index(1 - x))", TOO_EARLY),
    "blocks of tiles before not counted": (
        "        done += count\n", "", "the same phase|deadlock"),
    "values of tiles before not counted": (
        "(done - 1) // STAGES & 1", "(count - 1) // STAGES & 1", "the same phase"),
    "an output over the one before": ("        tma.store_wait(0)\n", "", TOO_EARLY),
    "an output over the next queries": (" out.index(x)", " q.index(place_then)", TOO_EARLY),
    "keys read too early": (
        "    mbarrier.wait(k_ready.index(slot), i // STAGES & 1)\n", "", TOO_EARLY),
    "next keys read too early": (
        "mbarrier.wait(k_ready.index(slot), then // STAGES & 1, pred=more)", "pass", TOO_EARLY),
    "phase of another lap": (
        "k_ready.index(slot), i // STAGES & 1", "k_ready.index(slot), i // (STAGES + 1) & 1",
        "waits for the same phase"),
    "scores read too early": ("wait(1, [s])", "wait(2, [s])", TOO_EARLY),
    "scores read beside the wait": (
        "    s = warpgroup_mma_wait(1, [s])\n", "    warpgroup_mma_wait(1, [s])\n", TOO_EARLY),
    "first scores not awaited": (
        "    s = warpgroup_mma_wait(0, [s])\n    mbarrier", "    mbarrier", TOO_EARLY),
    "next scores not awaited": ("        s = warpgroup_mma_wait(0, [s])\n", "", TOO_EARLY),
    "output read too early": ("wait(0, [acc, p])", "wait(1, [acc, p])", TOO_EARLY),
    "last output read too early": ("wait(1, [acc])", "wait(2, [acc])", TOO_EARLY),
    "values freed before the output has them": (
        "    acc, p = warpgroup_mma_wait(0, [acc, p])\n    mbarrier.arrive(v_free.index(before))\n",
        "    mbarrier.arrive(v_free.index(before))\n    acc, p = warpgroup_mma_wait(0, [acc, p])\n",
        TOO_EARLY),
    "last values freed before the output has them": (
        "acc = warpgroup_mma_wait(1, [acc])\n        mbarrier.arrive(v_free.index(before))\n",
        "mbarrier.arrive(v_free.index(before))\n        acc = warpgroup_mma_wait(1, [acc])\n",
        TOO_EARLY),
    "values read too early": (
        "    mbarrier.wait(v_ready.index(before), (i - 1) // STAGES & 1)\n", "", TOO_EARLY),
    "keys never freed": ("mbarrier.arrive(k_free.index(slot))", "pass", "deadlock"),
    "first keys of a tile never freed": (
        "mbarrier.arrive(k_free.index(slot), pred=more)", "pass", "deadlock"),
    "next keys freed before the scores are there": (
        "        s = warpgroup_mma_wait(0, [s])\n        mbarrier.arrive(q_free.index(place))\n"
        "        mbarrier.arrive(k_free.index(slot), pred=more)\n",
        "        mbarrier.arrive(k_free.index(slot), pred=more)\n"
        "        s = warpgroup_mma_wait(0, [s])\n        mbarrier.arrive(q_free.index(place))\n",
        TOO_EARLY),
}  # fmt: skip
NOTE = "            note(told.index(x), (row, head, first, after, rest, count, inner))\n"
QUERIES_FREE = "            mbarrier.wait(q_free.index(x), nth & 1 ^ 1)\n"
LAP = ("gl.where(last, lap ^ 1, lap)", "lap", "the same phase")
BROKEN_DQ = ANY | RING | {
    "queries read too early": ("mbarrier.wait(q_ready.index(x), nth & 1)", "pass", TOO_EARLY),
    "queries of the first tile awaited again": (
        "q_ready.index(x), nth & 1", "q_ready.index(x), 0", "waits for the same phase"),
    "queries overwritten": (QUERIES_FREE, "", TOO_EARLY),
    "queries never overwritten": ("nth & 1 ^ 1", "nth & 1", "deadlock"),
    "queries freed by the first block": ("pred=count == 1", "pred=True", TOO_EARLY + "|arrivals"),
    "blocks of tiles before not counted": (
        "        done += count\n", "", "the same phase|deadlock"),
    "an output over the one before": ("        tma.store_wait(0)\n", "", TOO_EARLY),
    "an output over the next queries": (" out.index(x)", " q.index(x)", TOO_EARLY),
    "notes of the next tile": (QUERIES_FREE + NOTE, NOTE + QUERIES_FREE, TOO_EARLY),
    "notes never written": (NOTE, "", TOO_EARLY),
    "notes of the other group": ("place = told.index(x)", "place = told.index(1 - x)", TOO_EARLY),
    "queries never freed": ("pred=last", "pred=False", "deadlock"),
    "queries freed before the replies are there": (
        "    r = warpgroup_mma_wait(1, [r])\n    mbarrier.arrive(v_free.index(slot))\n"
        "    if border:\n        mbarrier.arrive(q_free, pred=last)\n",
        "    if border:\n        mbarrier.arrive(q_free, pred=last)\n"
        "    r = warpgroup_mma_wait(1, [r])\n    mbarrier.arrive(v_free.index(slot))\n", TOO_EARLY),
    "last keys never freed": (
        "* scale\n        mbarrier.arrive(k_free.index(before))\n", "* scale\n", "deadlock"),
    "last keys freed before dq has them": (
        "        dq = warpgroup_mma_wait(0, [dq]) * scale\n"
        "        mbarrier.arrive(k_free.index(before))\n",
        "        mbarrier.arrive(k_free.index(before))\n"
        "        dq = warpgroup_mma_wait(0, [dq]) * scale\n", TOO_EARLY),
    "lap that does not change": LAP,
    "a slot passed over": ("slot == STAGES - 1", "slot == STAGES - 2", "the same phase|deadlock"),
    "keys read too early": ("mbarrier.wait(k_ready.index(slot), lap)", "pass", TOO_EARLY),
    "scores read too early": ("wait(2, [s])", "wait(3, [s])", TOO_EARLY),
    "replies read too early": ("wait(1, [r])", "wait(2, [r])", TOO_EARLY),
    "sums read too early": ("warpgroup_mma_wait(0, [dq]) * scale", "dq * scale", TOO_EARLY),
    "values read too early": ("mbarrier.wait(v_ready.index(slot), lap)", "pass", TOO_EARLY),
    "keys freed before dq has them": (
        "k_free.index(before)", "k_free.index(slot)", TOO_EARLY + "|deadlock"),
    "dout not expected": ("ready, 2 * bytes", "ready, bytes", TOO_EARLY + "|deadlock"),
    "vectors not expected": (
        "q_desc.block_type.nbytes + deltas_desc.block_type.nbytes", "q_desc.block_type.nbytes",
        TOO_EARLY + "|deadlock"),
}  # fmt: skip
KEYS_FREE = "            mbarrier.wait(kv_free.index(x), nth & 1 ^ 1)\n"
BROKEN_DKDV = ANY | {
    "lap that does not change": LAP,
    "another slot": ("slot, lap, True", "0, lap, True", "the same phase|deadlock"),
    "scores read too early": ("wait(1, [s])", "wait(2, [s])", TOO_EARLY),
    "replies read too early": ("wait(1, [r])", "wait(2, [r])", TOO_EARLY),
    "sums read too early": ("dk = warpgroup_mma_wait(0, [dk])", "pass", TOO_EARLY),
    "queries read too early": ("    mbarrier.wait(q_ready.index(slot), lap)\n", "", TOO_EARLY),
    "statistics read too early": (
        "    mbarrier.wait(dout_ready.index(slot), lap)\n", "", TOO_EARLY),
    "keys read too early": ("mbarrier.wait(kv_ready.index(x), nth & 1)", "pass", TOO_EARLY),
    "keys of the first tile awaited again": (
        "kv_ready.index(x), nth & 1", "kv_ready.index(x), 0", "waits for the same phase"),
    "keys overwritten": (KEYS_FREE, "", TOO_EARLY),
    "keys never overwritten": ("nth & 1 ^ 1", "nth & 1", "deadlock"),
    "keys never freed": ("(at == -1)", "(at == 0)", "deadlock"),
    "keys freed before the replies are there": (
        "    r = warpgroup_mma_wait(1, [r])\n    if border:\n"
        "        mbarrier.arrive(kv_free, pred=last)\n",
        "    if border:\n        mbarrier.arrive(kv_free, pred=last)\n"
        "    r = warpgroup_mma_wait(1, [r])\n", TOO_EARLY),
    "keys freed twice": ("pred=count == before + inner", "pred=True", TOO_EARLY + "|arrivals"),
    "laps of tiles before not counted": (
        "in range(mine):\n", "in range(mine):\n        slot, lap = 0, 0\n",
        "the same phase|deadlock"),
    "an output over the one before": ("        tma.store_wait(0)\n", "", TOO_EARLY),
    "an output over the next keys": ("made_dk.index(x)", "k.index(x)", TOO_EARLY),
    "notes of the tile after the next": ("2 * (nth & 1) + x", "x", TOO_EARLY),
    "notes never written": (
        "note(place, (row, share, first, after, rest, count, before, inner))", "pass", TOO_EARLY),
    "dout freed before dv has it": ("wait(1, [dv])", "wait(2, [dv])", TOO_EARLY),
    "queries freed before dk has them": (
        "    mbarrier.arrive(dout_free.index(slot))\n",
        "    mbarrier.arrive(dout_free.index(slot))\n    mbarrier.arrive(q_free.index(slot))\n",
        TOO_EARLY + "|more arrivals"),
    "queries overwritten": ("    mbarrier.wait(q_free.index(slot), lap ^ 1)\n", "", TOO_EARLY),
    "vectors not expected": (
        "q_desc.block_type.nbytes + deltas_desc.block_type.nbytes", "q_desc.block_type.nbytes",
        TOO_EARLY + "|deadlock"),
}  # fmt: skip


def told(
    find: Callable[..., object],
    sources: Sources,
    message: str,
    *,
    stages: int = 2,
    stay: int = 2,
) -> None:
    """Whatever the order of events, the simulator says what is wrong."""
    known = Given(inputs(896, 1, 1, 64), [428, 84, 128, 128, 128], 4.0)
    for seed in range(3):
        with pytest.raises(Fault, match=message):
            find(known, seed=seed, sources=sources, stages=stages, stay=stay)


@pytest.mark.parametrize(
    ("wanted", "instead", "message"), BROKEN_FORWARD.values(), ids=BROKEN_FORWARD
)
def test_a_broken_forward_is_found_out(wanted: str, instead: str, message: str) -> None:
    told(attend, replaced(FORWARD, (wanted, instead)), message, stay=1)


@pytest.mark.parametrize(("wanted", "instead", "message"), BROKEN_DQ.values(), ids=BROKEN_DQ)
def test_a_broken_dq_is_found_out(wanted: str, instead: str, message: str) -> None:
    told(of_queries, replaced(DQ, (wanted, instead)), message, stages=3)


@pytest.mark.parametrize(("wanted", "instead", "message"), BROKEN_DKDV.values(), ids=BROKEN_DKDV)
def test_a_broken_dkdv_is_found_out(wanted: str, instead: str, message: str) -> None:
    told(of_keys, replaced(DKDV, (wanted, instead)), message)


def test_a_last_block_taken_as_seen_whole_is_found_out_by_the_tile_alone() -> None:
    known = Given(inputs(129, 1, 1, 64), [1, 128], 4.0)
    wrong = replaced(
        DQ, ("tl.minimum((row + 1 - first) // J, count - 1)", "(row + 1 - first) // J")
    )
    with pytest.raises(Fault, match="with one tile more"):
        of_queries(known, sources=wrong, stay=2)


# What is put in place of what, in the kernel or in its walk.
WRONG_WALK = {
    "own parts one too few": ("    rest, more", "    own -= 1\n    rest, more"),
    "own parts falling": ("first + i * J", "first + ((after - 1 - first) // J - i) * J"),
    "a part too few": ("block * PARTS + down // J - rest + 1", "block * PARTS + down // J - rest"),
    "parts looked up one too far": ("tl.maximum(rest + i, 0)", "tl.maximum(rest + i + 1, 0)"),
    "parts where others begin": ("j % PARTS * J, 0", "j % PARTS * J + 1, 0"),
    "columns of the next eight": ("(c & -8)[None, :]", "(c & -8)[None, :] + 8"),
    "no column where all are": ("gl.maximum(high - low, 0)", "(high - low)"),
}
WRONG_BACK = WRONG_WALK | {
    "a key too few": ("gl.minimum(t + 1, end) - n", "gl.minimum(t, end) - n"),
    "a key of the segment before": ("start - n", "start - 1 - n"),
    "keys of the next part": ("gl.minimum(t + 1, end) - n", "t + 1 - n"),
    "a block too many unmasked": ("(row + 1 - first) // J", "(row + J - first) // J"),
    "a border unmasked": ("tl.load(starts + last) == first", "tl.load(starts + last) >= first"),
    "a first block unmasked": ("if inner == 0", "if inner < 0"),
}  # fmt: skip
WRONG_FORWARD = WRONG_BACK | {
    "notes of this tile for the next": ("told.index(place_then)", "told.index(place)"),
    "what came before not shrunk": ("_shrunk(acc, shrink), top", "acc, top"),
}
WRONG_DQ = WRONG_BACK | {
    "statistics of another token": ("SHIFTS * U + t", "SHIFTS * U + t + 4"),
    "statistics at no place of TMA's": ("SHIFTS * U + t", "SHIFTS * U + t + 1"),
    "statistics of another head": ("SHIFTS * U + t", "U + t"),
}
WRONG_DKDV = WRONG_WALK | {
    "a query too few": ("j - n, gl", "j + 1 - n, gl"),
    "queries of the next part": ("gl.minimum(end, stop) - n", "end - n"),
    "a query of the next segment": ("gl.minimum(end, stop) - n", "gl.minimum(end + 1, stop) - n"),
    "a diagonal unmasked": ("tl.cdiv(row + J - 1 - first, M)", "(row - first) // M"),
    "a last block unmasked": ("(end - first) // M - before", "tl.cdiv(end - first, M) - before"),
    "a border unmasked": ("one = own_end == end", "one = own_end <= end"),
    "the last blocks before the first": ("at + count, at)", "-1 - at, at)"),
    "statistics at no place of TMA's": ("shift = token % SHIFTS", "shift = token * 0"),
    "statistics of another shift": ("SHIFTS + shift) * U", "SHIFTS + shift * 0) * U"),
    "statistics of another head": ("(head * SHIFTS + shift)", "(head + shift)"),
}  # fmt: skip


def error(find: Callable[..., list[Tensor]], sources: Sources) -> float:
    """Of the whole, or infinite where the simulator says what is wrong."""
    tensors, lengths = inputs(500, 2, 1, 64), [50, 350, 7, 93]
    out, dq, *rest = truth(tensors, lengths, 0.125)
    rights = {attend: [out], of_queries: [dq], of_keys: rest}[find]
    try:
        ours = find(Given(tensors, lengths, 0.125), sources=sources)
    except Fault:
        return inf
    pairs = zip(ours, rights, strict=False)
    return max(float((one.double() - x).norm() / x.norm()) for one, x in pairs)


CORRECT = [(attend, FORWARD), (of_queries, DQ), (of_keys, DKDV)]


@pytest.mark.parametrize(("find", "sources"), CORRECT)
def test_nothing_is_wrong_with_what_is_broken_next(
    find: Callable[..., list[Tensor]], sources: Sources
) -> None:
    assert error(find, sources) < 5e-3


@pytest.mark.parametrize(("wanted", "instead"), WRONG_FORWARD.values(), ids=WRONG_FORWARD)
def test_a_wrong_forward_is_seen_in_what_comes_of_it(wanted: str, instead: str) -> None:
    assert not error(attend, replaced(FORWARD, (wanted, instead))) < 2e-2


@pytest.mark.parametrize(("wanted", "instead"), WRONG_DQ.values(), ids=WRONG_DQ)
def test_a_wrong_dq_is_seen_in_what_comes_of_it(wanted: str, instead: str) -> None:
    assert not error(of_queries, replaced(DQ, (wanted, instead))) < 2e-2


@pytest.mark.parametrize(("wanted", "instead"), WRONG_DKDV.values(), ids=WRONG_DKDV)
def test_a_wrong_dkdv_is_seen_in_what_comes_of_it(wanted: str, instead: str) -> None:
    assert not error(of_keys, replaced(DKDV, (wanted, instead))) < 2e-2


@pytest.mark.parametrize(
    ("find", "sources", "wanted", "instead"),
    [
        (attend, FORWARD, "end = tl.load(starts + row)", "end = tl.load(starts + row) // J * J"),
        (of_queries, DQ, "end = tl.load(starts + row)", "end = tl.load(starts + row) // J * J"),
        (of_keys, DKDV, "first = row - (row - start) % M", "first = row"),
    ],
)  # fmt: skip
def test_blocks_of_the_batch_are_seen_in_the_bits(
    find: Callable[..., list[Tensor]], sources: Sources, wanted: str, instead: str
) -> None:
    assert not keeps_its_bits(find, 190, sources=replaced(sources, (wanted, instead)))


def test_another_order_of_heads_is_seen_in_the_bits() -> None:
    known = Given(opposed_heads(200), [150, 50], 0.125)
    falling = replaced(DKDV, ("share * heads + h", "share * heads + heads - 1 - h"))
    for one, other in zip(of_keys(known), of_keys(known, sources=falling), strict=True):
        assert not torch.equal(one, other)
