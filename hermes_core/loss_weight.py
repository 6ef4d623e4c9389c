"""The weight's gradient out of the chunks', and the products it is made of.

Shapes: M kept tokens, C kept tokens of one chunk, E the first of all kept tokens, D model size, V
vocabulary (this rank's share of it), N some ids of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hermes_core import _C

IS_INTEL, MULTIPLIES_BF16, MULTIPLIES_FP16 = _C.this_cpu()
# Who multiplies fp32: MKL uses AVX-512 on Intel's alone, where oneDNN takes up to twice as long.
BY_ONEDNN = torch._C._has_mkldnn and not (IS_INTEL and torch._C.has_mkl)
# Halves that this CPU has no instructions to multiply: a product takes a quarter of the time, or
# less, where they are widened.
WIDENED = frozenset(
    dtype
    for dtype, multiplies in ((torch.bfloat16, MULTIPLIES_BF16), (torch.float16, MULTIPLIES_FP16))
    if not multiplies
)
WIDENED_TILE = 2**11  # rows and columns that are widened at a time
TILE = 2**12  # rows of a product that are added while they lie in cache
TILE_BYTES = 2**22  # of all tokens' gradients of logits, for some ids
LARGEST_POWER = 15  # of two, that fp16 has

# Overwrites logits [E, N] of the first kept tokens by their gradient; the ids start at the number.
Again = Callable[[Tensor, int], None]


class WeightGradient(Protocol):
    """Takes the gradient of each chunk's logits, gives that of the weight."""

    def add(self, at: slice, gradient_CV: Tensor, hidden_CD: Tensor) -> None: ...

    def value(self) -> tuple[Tensor, Tensor | None]:
        """The gradient, and what it is still to be multiplied by, where that is not 1."""


def weight_gradient(
    weight_VD: Tensor, chunks: list[slice], again_: Again | None, *, centred: bool = False
) -> WeightGradient:
    """One product over all chunks where ``again_`` is given, else their sum.

    The sum may be ``centred``: brought into the middle of fp16's range by a power of two.
    """
    if again_ is None or not chunks:
        return SumOfProducts(weight_VD, len(chunks), centred=centred)
    return OneProduct(weight_VD, chunks[-1], again_)


class SumOfProducts:
    """The sum of the chunks' gradients of the weight, in fp32 at least."""

    def __init__(self, weight_VD: Tensor, chunks: int, *, centred: bool) -> None:
        wide = torch.promote_types(weight_VD.dtype, torch.float32)
        # One chunk is one product, which sums in fp32 and rounds once whatever it returns.
        self.sum_dtype = weight_VD.dtype if chunks == 1 and not centred else wide
        self.sum_VD: Tensor | None = None
        self.weight_VD = weight_VD
        self.centred = centred

    def add(self, at: slice, gradient_CV: Tensor, hidden_CD: Tensor) -> None:
        if self.sum_VD is None:
            self.sum_VD = product_in(self.sum_dtype, gradient_CV.T, hidden_CD)
        else:
            add_product_(self.sum_VD, gradient_CV.T, hidden_CD)

    def value(self) -> tuple[Tensor, Tensor | None]:
        if self.sum_VD is None:
            return self.weight_VD.new_zeros(self.weight_VD.shape), None
        if not self.centred:
            return self.sum_VD.to(self.weight_VD.dtype), None
        largest = torch.linalg.vector_norm(self.sum_VD, float("inf"))
        shift = (LARGEST_POWER - torch.frexp(largest)[1]).clamp(max=2 * LARGEST_POWER)
        shift = shift.to(largest.dtype)
        factor, shrink = torch.exp2(shift), torch.exp2(-shift)
        if not self.sum_VD.is_cuda:
            return self.sum_VD.mul_(factor).to(self.weight_VD.dtype), shrink
        out_VD = torch.empty_like(self.sum_VD, dtype=self.weight_VD.dtype)
        return torch.mul(self.sum_VD, factor, out=out_VD), shrink


class OneProduct:
    """The weight's gradient as one product over every kept token, summed in fp32, rounded once.

    Made for some ids at a time. The gradient of the last chunk's logits is still there. That of as
    many tokens before it as the model is wide lies where the weight's gradient will be, in the
    memory of the same ids. That of the tokens before them is computed again, by a fourth product.
    A sum in fp32 would take twice the gradient's memory, and on a CPU two products for each chunk:
    one of halves returns halves.
    """

    def __init__(self, weight_VD: Tensor, last: slice, again_: Again) -> None:
        self.weight_VD = weight_VD
        self.again_ = again_
        self.kept, self.last = last.stop, last.start  # the last chunk's first token
        self.stored = max(0, self.last - weight_VD.shape[1])  # the first token that is
        self.columns = tile_columns(self.kept * weight_VD.element_size())
        self.d_weight_VD = room(len(weight_VD), weight_VD.shape[1], weight_VD)
        self.hidden_MD = room(self.kept, weight_VD.shape[1], weight_VD)
        self.last_CV = weight_VD

    def add(self, at: slice, gradient_CV: Tensor, hidden_CD: Tensor) -> None:
        self.hidden_MD[at] = hidden_CD
        self.last_CV = gradient_CV
        if self.stored < at.stop <= self.last:
            first = max(at.start, self.stored)
            for ids in self.tiles():
                here_CN = self.stored_tile(ids)[first - self.stored : at.stop - self.stored]
                here_CN.copy_(gradient_CV[first - at.start :, ids])

    def value(self) -> tuple[Tensor, Tensor | None]:
        if self.last == 0:
            return product(self.last_CV.T, self.hidden_MD, self.d_weight_VD), None
        memory = room(self.kept, self.columns, self.weight_VD).flatten()  # of one tile
        for ids in self.tiles():
            weight_ND = self.weight_VD[ids]
            tile_MN = memory[: self.kept * len(weight_ND)].view(self.kept, -1)
            if self.stored > 0:
                logits_EN = tile_MN[: self.stored]
                product(self.hidden_MD[: self.stored], weight_ND.T, logits_EN)
                self.again_(logits_EN, ids.start)
            tile_MN[self.stored : self.last] = self.stored_tile(ids)
            tile_MN[self.last :] = self.last_CV[:, ids]
            product(tile_MN.T, self.hidden_MD, self.d_weight_VD[ids])
        return self.d_weight_VD, None

    def tiles(self) -> Iterator[slice]:
        size = len(self.weight_VD)
        return (slice(v, min(v + self.columns, size)) for v in range(0, size, self.columns))

    def stored_tile(self, ids: slice) -> Tensor:
        """Stored tokens' gradients of some logits, in the memory of the same ids' rows."""
        rows_ND = self.d_weight_VD[ids]
        stored = self.last - self.stored
        return rows_ND.flatten()[: stored * len(rows_ND)].view(stored, -1)


def tile_columns(column_bytes: int) -> int:
    """A power of two: oneDNN loses a tenth where rows of a tile start anywhere in a cache line."""
    return 1 << (max(64, min(1024, TILE_BYTES // column_bytes)).bit_length() - 1)


def room(rows: int, columns: int, like: Tensor) -> Tensor:
    """Uncleared memory for a matrix; on a CPU in huge pages, where there are any.

    The first touch of 4 KiB pages costs a fifth of the product that is written to them.
    """
    if like.device.type != "cpu":
        return like.new_empty(rows, columns)
    count = rows * columns
    memory = np.empty(count * like.element_size() + 64, np.uint8)  # NumPy asks for huge pages
    elements = torch.frombuffer(
        memory, dtype=like.dtype, count=count, offset=-memory.ctypes.data % 64
    )
    return elements.view(rows, columns)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in their dtype, whatever autocast says; in ``out`` where that can be."""
    if a.device.type != "cpu":
        return torch.mm(a, b, out=out)
    if a.dtype == torch.float32 and BY_ONEDNN:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
        return found
    out = room(len(a), b.shape[1], a) if out is None else out
    return widened_product(a, b, out) if a.dtype in WIDENED else torch.mm(a, b, out=out)


def widened_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b of halves by products in fp32, a tile at a time, rounded once."""
    (rows, inner), columns = a.shape, b.shape[1]
    for r in range(0, rows, WIDENED_TILE):
        for c in range(0, columns, WIDENED_TILE):
            tile = out[r : r + WIDENED_TILE, c : c + WIDENED_TILE]
            sum_ = torch.zeros(tile.shape, dtype=torch.float32)
            for k in range(0, inner, WIDENED_TILE):
                at = slice(k, k + WIDENED_TILE)
                add_product_(sum_, a[r : r + WIDENED_TILE, at], b[at, c : c + WIDENED_TILE])
            tile.copy_(sum_)
    return out


def product_in(dtype: torch.dtype, a: Tensor, b: Tensor) -> Tensor:
    """a @ b summed in fp32 at least and returned in ``dtype``."""
    if a.dtype == dtype:
        return product(a, b)
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=dtype)
    sum_ = torch.zeros(len(a), b.shape[1], dtype=dtype)
    add_product_(sum_, a, b)
    return sum_


def add_product_(sum_: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to ``sum_``, whose dtype is theirs or wider."""
    if a.dtype == sum_.dtype:
        sum_.addmm_(a, b)
    elif a.device.type == "cuda":
        torch.ops.aten.addmm.dtype_out(sum_, a, b, sum_.dtype, out=sum_)
    else:
        wide_b = b.to(sum_.dtype)
        for at in range(0, len(a), TILE):
            sum_[at : at + TILE].addmm_(a[at : at + TILE].to(sum_.dtype), wide_b)
