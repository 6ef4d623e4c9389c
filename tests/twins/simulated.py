"""What kernels run by `gluon_simulator` share: their sources, tensors as they take them, what came
of it.

Shapes: T packed tokens, N query heads, K key heads, H head size, U = T rounded up to a tile.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import e, log2, nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

import hermes_kernels
from hermes_core.segments import Segments, segments
from hermes_kernels import reference
from hermes_kernels.launch import SHIFTED, TILE
from twins.gluon_simulator import Box, Pointer
from twins.gluon_tensors import F32, I32, TYPES
from twins.gluon_tensors import Tensor as Scalar

Sources = Mapping[str, str]  # the text of each module by its name, those that others import first
FOLDER = Path(hermes_kernels.__file__).parent


def sources_of(*names: str) -> dict[str, str]:
    return {f"hermes_kernels.{name}": (FOLDER / f"{name}.py").read_text() for name in names}


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
        self.at = where(lengths)
        self.tokens, self.heads, self.size = tensors[0].shape
        self.kv_heads, self.room = tensors[1].shape[1], self.at.places.query_order.numel() * TILE
        self.dtype = TYPES[str(tensors[0].dtype).removeprefix("torch.")]

    def boxes(self, *rows: int) -> dict[str, Box]:
        """q, k, v and dout, as many as there are, in boxes of so many tokens."""
        names = ("q_desc", "k_desc", "v_desc", "dout_desc")
        return {
            name: Box(x.float().flatten(1).numpy(), [n, self.size], self.dtype)
            for name, x, n in zip(names, self.tensors, rows, strict=False)
        }

    def output(self, heads: int, rows: int) -> Box:
        """[T, heads * H] in boxes of so many tokens, to be written once."""
        shape = (self.tokens, heads * self.size)
        found, written = np.full(shape, np.nan, np.float32), np.zeros(shape, np.int64)
        return Box(found, [rows, self.size], self.dtype, written)

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Exponents and deltas as `statistics_kernel` lays them out, [N * SHIFTED * U]; the
        exponents of tokens that are none must not matter."""
        q, k, v, dout = (x.double() for x in self.tensors)
        out = reference.varlen_attention(q, k, v, self.lengths, self.scale)
        lse = reference.varlen_lse(q, k, self.lengths, self.scale)
        delta = (out.to(self.tensors[0].dtype) * dout).sum(2).T
        return self._shifted(-log2(e) * lse, nan), self._shifted(delta, 0.0)

    def _shifted(self, x_NT: Tensor, beyond: float) -> np.ndarray:
        """Copies of each head's, the c-th from token c on, with zeros after the last."""
        x_NU = pad(x_NT.float(), (0, self.room - self.tokens), value=beyond)
        copies = [pad(x_NU[:, c:], (0, c)) for c in range(SHIFTED)]
        return torch.stack(copies, 1).flatten().numpy()

    def rest(self, order: Tensor) -> dict[str, Any]:
        """Places, sizes and the scale, for a kernel of tiles in this order."""
        names = ("starts", "ends", "block_of", "blocks")
        places = dict(zip(names, self.at.places[:4], strict=True)) | {"order": order}
        pointers = {name: Pointer(x.numpy()) for name, x in places.items()}
        sizes = {"T": self.tokens, "U": self.room}
        numbers = {name: Scalar(np.asarray(n, np.int32), I32) for name, n in sizes.items()}
        scale = Scalar(np.asarray(self.scale, np.float32), F32)
        return pointers | numbers | {"scale": scale, "G": self.heads // self.kv_heads}


def once(box: Box) -> Tensor:
    """What was stored, each element once."""
    assert box.written is not None
    assert (box.written == 1).all()
    return torch.from_numpy(box.values)
