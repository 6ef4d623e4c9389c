"""Blackwell's kernels run by `gluon_simulator`: their own sources, tensors in, tensors out.

Shapes: T packed tokens, N query heads, K key heads, H head size, U = T rounded up to a tile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import hermes_kernels
from hermes_core.segments import Segments, segments
from hermes_kernels import reference
from hermes_kernels.launch import SHIFTED, TABLE, TILE
from twins.gluon_simulator import Box, Pointer, run
from twins.gluon_tensors import F32, I32, TYPES
from twins.gluon_tensors import Tensor as Scalar

Sources = Mapping[str, str]  # the text of each module by its name, those that others import first
FOLDER = Path(hermes_kernels.__file__).parent


def sources_of(*names: str) -> dict[str, str]:
    return {f"hermes_kernels.{name}": (FOLDER / f"{name}.py").read_text() for name in names}


FORWARD = sources_of("walk", "softmax_sm100", "forward_sm100")
DQ, DKDV = (FORWARD | sources_of("halves_sm100", name) for name in ("dq_sm100", "dkdv_sm100"))


def replaced(sources: Sources, *pairs: tuple[str, str]) -> Sources:
    """The sources with each first text of a pair turned into the second."""
    for wanted, instead in pairs:
        assert sum(text.count(wanted) for text in sources.values()) > 0
        sources = {name: text.replace(wanted, instead) for name, text in sources.items()}
    return sources


def where(lengths: list[int]) -> Segments:
    return segments(np.concatenate([[0], np.cumsum(lengths)]))


class Given:
    """Tensors as the kernels take them: q, k, v and, for the backward, the output's gradient."""

    def __init__(self, tensors: list[Tensor], lengths: list[int], scale: float) -> None:
        self.tensors, self.lengths, self.scale = tensors, lengths, scale
        self.places = where(lengths).places
        self.tokens, self.heads, self.size = tensors[0].shape
        self.kv_heads, self.room = tensors[1].shape[1], self.places.query_order.numel() * TILE
        self.dtype = TYPES[str(tensors[0].dtype).removeprefix("torch.")]

    @property
    def arguments(self) -> dict[str, object]:
        """Those of every kernel."""
        names = ("q_desc", "k_desc", "v_desc", "dout_desc")
        boxes = {
            name: Box(x.float().flatten(1).numpy(), [TILE, self.size], self.dtype)
            for name, x in zip(names, self.tensors, strict=False)
        }
        places = self.places._asdict()
        pointers = {
            name: Pointer(places[name].numpy()) for name in ("starts", "ends", "block_of", "blocks")
        }
        numbers = {
            "scale": Scalar(np.asarray(self.scale, np.float32), F32),
            "T": Scalar(np.asarray(self.tokens, np.int32), I32),
            "U": Scalar(np.asarray(self.room, np.int32), I32),
            "G": self.heads // self.kv_heads,
        }
        return {**boxes, **pointers, **numbers}

    def output(self, heads: int) -> Box:
        shape = (self.tokens, heads * self.size)
        found, written = np.full(shape, np.nan, np.float32), np.zeros(shape, np.int64)
        return Box(found, [TILE, self.size], self.dtype, written)

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Exponents and deltas, as `varlen_attention.statistics_kernel` lays them out."""
        q, k, v, dout = (x.double() for x in self.tensors)
        out = reference.varlen_attention(q, k, v, self.lengths, self.scale)
        lse = reference.varlen_lse(q, k, self.lengths, self.scale)
        delta = (out.to(self.tensors[0].dtype) * dout).sum(2).T
        # Exponents of tokens that are none must not matter.
        return self._vector(lse * -math.log2(math.e), math.nan), self._vector(delta, 0.0)

    def _vector(self, values_NT: Tensor, beyond: float) -> np.ndarray:
        pad = torch.nn.functional.pad
        values_NU = pad(values_NT.float(), (0, self.room - self.tokens), value=beyond)
        copies = [pad(values_NU[:, c:], (0, c)) for c in range(SHIFTED)]
        return torch.stack(copies, 1).flatten().numpy()


def once(box: Box) -> Tensor:
    """What was stored, each element once."""
    assert box.written is not None
    assert (box.written == 1).all()
    return torch.from_numpy(box.values)


def attend(
    tensors: list[Tensor], lengths: list[int], scale: float, *, seed: int = 0,
    sources: Sources = FORWARD, stages: int | None = None,
) -> list[Tensor]:  # fmt: skip
    """Output [T, N, H] and log-sum-exp [T, N] as the kernel leaves them."""
    known = Given(tensors[:3], lengths, scale)
    out, order = known.output(known.heads), known.places.query_order
    lse = np.full(known.heads * known.room, np.nan, np.float32)
    own = {
        "out_desc": out, "lse_ptr": Pointer(lse), "order": Pointer(order.numpy()),
        "STAGES": stages or TABLE[100, "pairs", known.size].stages,
    }  # fmt: skip
    grid = (known.kv_heads * -(-known.heads // known.kv_heads // 2), order.numel())
    run(sources, "pair_kernel", known.arguments | own, grid, seed)
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
    dq, order = known.output(known.heads), known.places.query_order
    exponents, deltas = map(Pointer, known.statistics())
    own = {
        "dq_desc": dq, "exponents_ptr": exponents, "deltas_ptr": deltas,
        "order": Pointer(order.numpy()),
        "STAGES": stages or TABLE[100, "dq_sm100", known.size].stages,
    }  # fmt: skip
    run(sources, "dq_kernel", known.arguments | own, (known.heads, order.numel()), seed)
    return [once(dq).view(tensors[0].shape)]


def of_keys(
    tensors: list[Tensor], lengths: list[int], scale: float, *, seed: int = 0,
    sources: Sources = DKDV, stages: int | None = None, parts: int = 1,
) -> list[Tensor]:  # fmt: skip
    """dk and dv [T, K, H] as the kernel leaves them."""
    known = Given(tensors, lengths, scale)
    programs, order = known.kv_heads * parts, known.places.key_order
    dk, dv = known.output(programs), known.output(programs)
    exponents, deltas = (Box(x, [TILE], F32) for x in known.statistics())
    own = {
        "dk_desc": dk, "dv_desc": dv, "exponents_desc": exponents, "deltas_desc": deltas,
        "order": Pointer(order.numpy()), "S": parts,
        "STAGES": stages or TABLE[100, "dkdv_sm100", known.size].stages,
    }  # fmt: skip
    run(sources, "dkdv_kernel", known.arguments | own, (programs, order.numel()), seed)
    shape = (known.tokens, known.kv_heads, parts, known.size)
    return [once(x).view(shape).sum(2) for x in (dk, dv)]
