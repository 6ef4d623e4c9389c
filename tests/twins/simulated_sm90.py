"""Hopper's kernels run by `gluon_simulator`: their own sources, tensors in, tensors out.

Shapes: T packed tokens, N query heads, K key heads, H head size, U = T rounded up to a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hermes_kernels.launch import TABLE, TILE, Kernel
from twins.gluon_simulator import Box, Pointer, run
from twins.gluon_tensors import F32, I32
from twins.gluon_tensors import Tensor as Scalar
from twins.hopper import Hopper
from twins.simulated import Given, Sources, once, sources_of
from twins.torch_attention import inputs

ROWS = 64  # of a box that a group multiplies or stores
FORWARD, DQ, DKDV = (
    sources_of("groups_sm90", "walk", name) for name in ("forward_sm90", "dq_sm90", "dkdv_sm90")
)


STAY = 2  # programs that take tile after tile; of an odd number the last has one of its own


def _run(
    known: Given, kernel: Kernel, sources: Sources, own: Mapping[str, Any], heads: int, *,
    seed: int, stages: int | None, stay: int,
) -> None:  # fmt: skip
    """Every tile of so many heads, or shares of them, by programs of which so many stay."""
    places = known.at.places
    order = places.key_order if kernel == "dkdv_sm90" else places.query_order
    stay = min(stay, heads * order.numel())
    own = {
        **own, "STAGES": stages or TABLE[90, kernel, known.size].stages,
        "N": Scalar(np.asarray(known.heads, np.int32), I32),
        "stay": Scalar(np.asarray(stay, np.int32), I32),
    }  # fmt: skip
    name = f"{kernel.removesuffix('_sm90')}_kernel"
    tiles = heads * order.numel()
    programs = tiles - (tiles // stay - 1) * stay
    run(sources, name, known.rest(order) | own, (programs,), seed, Hopper)


def attend(
    known: Given, *, seed: int = 0, sources: Sources = FORWARD, stages: int | None = None,
    stay: int = STAY,
) -> list[Tensor]:  # fmt: skip
    """Output [T, N, H] and log-sum-exp [N, U] as the kernel leaves them."""
    out, lse = (
        known.output(known.heads, ROWS),
        np.full(known.heads * known.room, np.nan, np.float32),
    )
    own = known.boxes(ROWS, TILE, TILE) | {"out_desc": out, "lse_ptr": Pointer(lse)}
    _run(
        known, "forward_sm90", sources, own, known.heads, seed=seed, stages=stages,
        stay=stay,
    )  # fmt: skip
    found = once(out).view(known.tensors[0].shape)
    return [found, torch.from_numpy(lse).view(known.heads, known.room)]


def of_queries(
    known: Given, *, seed: int = 0, sources: Sources = DQ, stages: int | None = None,
    stay: int = STAY,
) -> list[Tensor]:  # fmt: skip
    """dq [T, N, H] as the kernel leaves it."""
    exponents, deltas = (Box(x, [ROWS], F32) for x in known.statistics())
    dq = known.output(known.heads, ROWS)
    own = known.boxes(*[ROWS] * 4) | {
        "exponents_desc": exponents,
        "deltas_desc": deltas,
        "dq_desc": dq,
    }
    _run(known, "dq_sm90", sources, own, known.heads, seed=seed, stages=stages, stay=stay)
    return [once(dq).view(known.tensors[0].shape)]


def of_keys(
    known: Given, *, seed: int = 0, sources: Sources = DKDV, stages: int | None = None,
    parts: int = 1, stay: int = STAY,
) -> list[Tensor]:  # fmt: skip
    """dk and dv [T, K, H] as the kernel leaves them."""
    exponents, deltas = (Box(x, [ROWS], F32) for x in known.statistics())
    heads = known.kv_heads * parts
    dk, dv = known.output(heads, ROWS), known.output(heads, ROWS)
    own = known.boxes(*[ROWS] * 4) | {
        "exponents_desc": exponents, "deltas_desc": deltas, "dk_desc": dk, "dv_desc": dv,
        "S": parts,
    }  # fmt: skip
    _run(known, "dkdv_sm90", sources, own, heads, seed=seed, stages=stages, stay=stay)
    shape = (known.tokens, known.kv_heads, parts, known.size)
    return [once(x).view(shape).sum(2) for x in (dk, dv)]


def opposed_heads(tokens: int) -> list[Tensor]:
    """q, k, v and dout of three heads, of which the first and the last cancel, so that what is left
    shows in which order they were added."""
    q, k, v, dout = inputs(tokens, 3, 1, 64, torch.float16)
    q[:] = q[:, :1].clone()
    dout[:, 0] *= 100
    dout[:, 2] = -dout[:, 0]
    return [q, k, v, dout]


def keeps_its_bits(find: Callable[..., list[Tensor]], length: int, **options: Sources) -> bool:
    """Whether a segment alone and in five places of a batch gives the same."""
    lengths = [1, length, 36, length, *[1] * 65, length, TILE, length, 6, length]
    # Rounded to fp16, which hides less of a sum's order than bf16.
    alone, tensors = (inputs(n, 2, 1, 64, torch.float16) for n in (length, sum(lengths)))
    ends = np.cumsum(lengths)
    mine = [slice(end - n, end) for n, end in zip(lengths, ends, strict=True) if n == length]
    for at in mine:
        for x, one in zip(tensors, alone, strict=True):
            x[at] = one
    packed = find(Given(tensors, lengths, 0.1), seed=1, **options)
    single = find(Given(alone, [length], 0.1), **options)
    return all(
        torch.equal(_of_tokens(one, at), _of_tokens(other, slice(length)))
        for one, other in zip(packed, single, strict=True)
        for at in mine
    )


def _of_tokens(x: Tensor, at: slice) -> Tensor:
    """Of [T, ...], or of log-sum-exps, [N, U]."""
    return x[at] if x.ndim == 3 else x[:, at]
