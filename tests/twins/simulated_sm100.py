"""Blackwell's kernels run by `gluon_simulator`: their own sources, tensors in, tensors out.

Shapes: T packed tokens, N query heads, K key heads, H head size, U = T rounded up to a tile.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hermes_kernels.launch import TABLE, TILE
from twins.gluon_simulator import Box, Pointer, run
from twins.gluon_tensors import F32
from twins.simulated import Given, Sources, once, sources_of

FORWARD = sources_of("walk", "softmax_sm100", "forward_sm100")
DQ, DKDV = (FORWARD | sources_of("halves_sm100", name) for name in ("dq_sm100", "dkdv_sm100"))


def _run(
    known: Given, kernel: str, sources: Sources, own: dict[str, object], order: Tensor,
    programs: int, seed: int,
) -> None:  # fmt: skip
    arguments = known.boxes(*[TILE] * 4) | known.rest(order) | own
    run(sources, kernel, arguments, (programs, order.numel()), seed)


def attend(
    tensors: list[Tensor], lengths: list[int], scale: float, *, seed: int = 0,
    sources: Sources = FORWARD, stages: int | None = None,
) -> list[Tensor]:  # fmt: skip
    """Output [T, N, H] and log-sum-exp [T, N] as the kernel leaves them."""
    known = Given(tensors[:3], lengths, scale)
    out, order = known.output(known.heads, TILE), known.at.places.query_order
    lse = np.full(known.heads * known.room, np.nan, np.float32)
    own = {
        "out_desc": out, "lse_ptr": Pointer(lse),
        "STAGES": stages or TABLE[100, "pairs", known.size].stages,
    }  # fmt: skip
    programs = known.kv_heads * -(-known.heads // known.kv_heads // 2)
    _run(known, "pair_kernel", sources, own, order, programs, seed)
    # After the last token too, for the backward reads it there.
    assert np.isfinite(lse).all() or not all(x.isfinite().all() for x in tensors)
    lse_NU = torch.from_numpy(lse).view(known.heads, known.room)
    return [once(out).view(tensors[0].shape), lse_NU[:, : known.tokens].T]


def of_queries(
    tensors: list[Tensor], lengths: list[int], scale: float, *, seed: int = 0,
    sources: Sources = DQ, stages: int | None = None,
) -> list[Tensor]:  # fmt: skip
    """dq [T, N, H] as the kernel leaves it."""
    known = Given(tensors, lengths, scale)
    dq, order = known.output(known.heads, TILE), known.at.places.query_order
    exponents, deltas = map(Pointer, known.statistics())
    own = {
        "dq_desc": dq, "exponents_ptr": exponents, "deltas_ptr": deltas,
        "STAGES": stages or TABLE[100, "dq_sm100", known.size].stages,
    }  # fmt: skip
    _run(known, "dq_kernel", sources, own, order, known.heads, seed)
    return [once(dq).view(tensors[0].shape)]


def of_keys(
    tensors: list[Tensor], lengths: list[int], scale: float, *, seed: int = 0,
    sources: Sources = DKDV, stages: int | None = None, parts: int = 1,
) -> list[Tensor]:  # fmt: skip
    """dk and dv [T, K, H] as the kernel leaves them."""
    known = Given(tensors, lengths, scale)
    programs, order = known.kv_heads * parts, known.at.places.key_order
    dk, dv = known.output(programs, TILE), known.output(programs, TILE)
    exponents, deltas = (Box(x, [TILE], F32) for x in known.statistics())
    own = {
        "dk_desc": dk, "dv_desc": dv, "exponents_desc": exponents, "deltas_desc": deltas,
        "S": parts,
        "STAGES": stages or TABLE[100, "dkdv_sm100", known.size].stages,
    }  # fmt: skip
    _run(known, "dkdv_kernel", sources, own, order, programs, seed)
    shape = (known.tokens, known.kv_heads, parts, known.size)
    return [once(x).view(shape).sum(2) for x in (dk, dv)]
