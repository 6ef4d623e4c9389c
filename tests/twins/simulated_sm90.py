"""Hopper's kernels run by `gluon_simulator`: their own sources, tensors in, tensors out.

Shapes: T packed tokens, N query heads, K key heads, H head size, U = T rounded up to a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import e, log2
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hermes_kernels
from hermes_core.segments import Segments, segments
from hermes_kernels import reference
from hermes_kernels.launch import SHIFTED, TABLE, TILE, Kernel
from twins.gluon_simulator import Box, Pointer, run
from twins.gluon_tensors import F32, I32, TYPES
from twins.gluon_tensors import Tensor as Scalar
from twins.hopper import Hopper
from twins.torch_attention import inputs

FOLDER = Path(hermes_kernels.__file__).parent
ROWS = 64  # of a box that a group multiplies or stores


def sources_of(kernel: Kernel) -> dict[str, str]:
    """The text of each module by its name, that which the last imports first."""
    names = ("groups_sm90", "walk", kernel)
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
        """Exponents and deltas as `statistics_kernel` lays them out, [N * SHIFTED * U]; the
        exponents of tokens that are none must not matter."""
        q, k, v, dout = (x.double() for x in self.tensors)
        out = reference.varlen_attention(q, k, v, self.lengths, self.scale)
        lse = reference.varlen_lse(q, k, self.lengths, self.scale)
        delta = (out.to(self.tensors[0].dtype) * dout).sum(2).T
        padding = (0, self.room - self.tokens)
        exponents, deltas = (
            torch.nn.functional.pad(x.float(), padding, value=beyond)
            for x, beyond in ((-log2(e) * lse, torch.nan), (delta, 0.0))
        )
        return _shifted(exponents), _shifted(deltas)

    def run(
        self, kernel: Kernel, sources: Mapping[str, str], own: Mapping[str, Any], heads: int,
        *, seed: int, stages: int | None,
    ) -> None:  # fmt: skip
        places = self.at.places
        order = places.key_order if kernel == "dkdv_sm90" else places.query_order
        shared = {
            "starts": Pointer(places.starts.numpy()), "ends": Pointer(places.ends.numpy()),
            "block_of": Pointer(places.block_of.numpy()), "blocks": Pointer(places.blocks.numpy()),
            "order": Pointer(order.numpy()), "scale": Scalar(np.asarray(self.scale, "f4"), F32),
            "T": Scalar(np.asarray(self.tokens, np.int32), I32),
            "U": Scalar(np.asarray(self.room, np.int32), I32), "G": self.heads // self.kv_heads,
            "STAGES": stages or TABLE[90, kernel, self.size].stages,
        }  # fmt: skip
        grid = (heads, order.numel())
        name = f"{kernel.removesuffix('_sm90')}_kernel"
        run(sources, name, {**own, **shared}, grid, seed, Hopper)


def _shifted(x_NU: Tensor) -> np.ndarray:
    """Copies of each head's, the c-th from token c on, with zeros after the last."""
    copies = [torch.nn.functional.pad(x_NU[:, c:], (0, c)) for c in range(SHIFTED)]
    return torch.stack(copies, 1).flatten().numpy()


def attend(
    known: Given, *, seed: int = 0, sources: Mapping[str, str] = FORWARD, stages: int | None = None
) -> list[Tensor]:
    """Output [T, N, H] and log-sum-exp [N, U] as the kernel leaves them."""
    q, k, v = known.boxes(ROWS, TILE, TILE)
    out, lse = known.output(known.heads), np.full(known.heads * known.room, np.nan, np.float32)
    own = {"q_desc": q, "k_desc": k, "v_desc": v, "out_desc": out, "lse_ptr": Pointer(lse)}
    known.run("forward_sm90", sources, own, known.heads, seed=seed, stages=stages)
    found = once(out).view(known.tensors[0].shape)
    return [found, torch.from_numpy(lse).view(known.heads, known.room)]


def of_queries(
    known: Given, *, seed: int = 0, sources: Mapping[str, str] = DQ, stages: int | None = None
) -> list[Tensor]:
    """dq [T, N, H] as the kernel leaves it."""
    names = ("q_desc", "k_desc", "v_desc", "dout_desc")
    own: dict[str, Any] = dict(zip(names, known.boxes(*[ROWS] * 4), strict=True))
    exponents, deltas = map(Pointer, known.statistics())
    dq = known.output(known.heads)
    own |= {"dq_desc": dq, "exponents_ptr": exponents, "deltas_ptr": deltas}
    known.run("dq_sm90", sources, own, known.heads, seed=seed, stages=stages)
    return [once(dq).view(known.tensors[0].shape)]


def of_keys(
    known: Given, *, seed: int = 0, sources: Mapping[str, str] = DKDV, stages: int | None = None,
    parts: int = 1,
) -> list[Tensor]:  # fmt: skip
    """dk and dv [T, K, H] as the kernel leaves them."""
    names = ("q_desc", "k_desc", "v_desc", "dout_desc")
    own: dict[str, Any] = dict(zip(names, known.boxes(*[ROWS] * 4), strict=True))
    exponents, deltas = (Box(x, [ROWS], F32) for x in known.statistics())
    heads = known.kv_heads * parts
    dk, dv = known.output(heads), known.output(heads)
    own |= {"exponents_desc": exponents, "deltas_desc": deltas, "S": parts}
    own |= {"dk_desc": dk, "dv_desc": dv}
    known.run("dkdv_sm90", sources, own, heads, seed=seed, stages=stages)
    shape = (known.tokens, known.kv_heads, parts, known.size)
    return [once(x).view(shape).sum(2) for x in (dk, dv)]


def once(box: Box) -> Tensor:
    """What was stored, each element once."""
    assert box.written is not None
    assert (box.written == 1).all()
    return torch.from_numpy(box.values)


def opposed_heads(tokens: int) -> list[Tensor]:
    """q, k, v and dout of three heads, of which the first and the last cancel, so that what is left
    shows in which order they were added."""
    q, k, v, dout = inputs(tokens, 3, 1, 64, torch.float16)
    q[:] = q[:, :1].clone()
    dout[:, 0] *= 100
    dout[:, 2] = -dout[:, 0]
    return [q, k, v, dout]


def keeps_its_bits(
    find: Callable[..., list[Tensor]], length: int, **options: Mapping[str, str]
) -> bool:
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
