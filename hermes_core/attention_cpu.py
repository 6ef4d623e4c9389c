"""Attention inside segments on a CPU: PyTorch's fused kernel, short segments batched together.

Long segments are slices of q, k and v as they lie. A call for each short one would cost more than
its arithmetic, so those of like length are gathered into lines of one width. Slicing one output in
a loop under autograd would also copy the whole gradient once a slice: here it is written by hand.

Shapes: T packed tokens, N query heads, K key heads, H head size, U room for T rounded up; P slots
of a bucket, its lines side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hermes_core.backends import HALF
from hermes_core.segments import lengths_of

LONGEST_GATHERED = 32  # tokens; beyond, a call costs less than gathering and padding

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Bucket:
    """``count`` lines of ``width`` tokens: segments of like length, the shorter ones padded.

    Causal attention lets nothing look at what comes later, so trailing slots harm nobody; they
    repeat their segment's last token, their gradient is taken as zero, and what they give is
    written to row T, which nobody reads.
    """

    count: int
    width: int
    first: int  # a line alone is the tokens from here on
    source: Tensor | None = None  # [P] int64, the token of each slot; None: a line alone
    target: Tensor | None = None  # [P] int64, the same, T for padding
    real: Tensor | None = None  # [P, 1, 1] bool; None: every slot is a token


def forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lse_NU: Tensor, scale: float
) -> Tensor:
    """Output [T, N, H]; the natural log-sum-exps of the scaled scores go to ``lse_NU``."""
    tokens = len(q)
    lse_NU[:, tokens:] = 0
    buckets = _buckets_of(starts)
    if len(buckets) == 1 and buckets[0].source is None:
        out, lse = _forward(*_lines(buckets[0], q, k, v), 0.0, True, scale=scale)
        lse_NU[:, :tokens] = lse[0]
        whole: Tensor = out[0].transpose(0, 1).contiguous()
        return whole
    out_T1 = q.new_empty(tokens + 1, *q.shape[1:])
    for bucket in buckets:
        out, lse = _forward(*_lines(bucket, q, k, v), 0.0, True, scale=scale)
        _write(bucket, out, out_T1)
        if bucket.target is None:
            lse_NU[:, bucket.first : bucket.first + bucket.width] = lse[0]
        else:  # a padded slot repeats a token that is written too, but not its statistics
            real = bucket.target < tokens
            lse_NU[:, bucket.target[real]] = lse.transpose(0, 1).flatten(1)[:, real]
    return out_T1[:tokens]


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    tokens = len(q)
    lse_TN = lse[:, :tokens].T
    buckets = _buckets_of(starts)
    grads = [x.new_empty(tokens + 1, *x.shape[1:]) for x in (q, k, v)]
    for bucket in buckets:
        lines = list(_lines(bucket, grad, q, k, v, out, lse_TN))
        if bucket.real is not None:  # a copy of ours: it was gathered
            lines[0].transpose(1, 2).flatten(0, 1).mul_(bucket.real)
        if bucket.source is not None and q.dtype in HALF:  # small products are faster in fp32
            lines = [x.float() for x in lines]
        for values, whole in zip(_gradients(*lines, scale=scale), grads, strict=True):
            _write(bucket, values, whole)
    dq, dk, dv = (whole[:tokens] for whole in grads)
    return dq, dk, dv


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of one bucket, all [lines, heads, width, H].

    Torch's kernel sums the heads that share a key in the inputs' dtype; in half precision that
    costs a bit of k's and v's gradient, so there each head gets its own and we sum in fp32.
    """
    group = q.shape[1] // k.shape[1]
    if group == 1 or q.dtype not in HALF:
        return _backward(grad, q, k, v, out, lse, 0.0, True, scale=scale)  # type: ignore[no-any-return]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    dq, dk, dv = _backward(grad, q, k, v, out, lse, 0.0, True, scale=scale)
    dk, dv = (x.unflatten(1, (-1, group)).sum(2, dtype=torch.float32) for x in (dk, dv))
    return dq, dk, dv


def _lines(bucket: Bucket, *tensors: Tensor) -> Iterator[Tensor]:
    """[lines, heads, width, ...] of each tensor [T, heads, ...]."""
    for x in tensors:
        if bucket.source is None:
            lines = x[bucket.first : bucket.first + bucket.width].unsqueeze(0)
        else:
            lines = x.index_select(0, bucket.source)
            lines = lines.view(bucket.count, bucket.width, *x.shape[1:])
        yield lines.transpose(1, 2)


def _write(bucket: Bucket, lines: Tensor, whole: Tensor) -> None:
    """Put [lines, heads, width, ...] to its tokens of [T + 1, heads, ...]."""
    lines = lines.transpose(1, 2)
    if bucket.target is None:
        whole[bucket.first : bucket.first + bucket.width] = lines[0]
    else:
        whole.index_copy_(0, bucket.target, lines.flatten(0, 1).to(whole.dtype))


def _buckets_of(starts: Tensor) -> tuple[Bucket, ...]:
    return _cached_buckets(starts.numpy().tobytes())


@lru_cache(maxsize=16)  # every layer of a batch asks for the same
def _cached_buckets(starts: bytes) -> tuple[Bucket, ...]:
    return buckets_of(lengths_of(torch.frombuffer(bytearray(starts), dtype=torch.int32)))


def padded_width(length: int) -> int:
    """The width a segment is padded to, so that few widths serve many short ones: powers of two."""
    if length > LONGEST_GATHERED:
        return length
    return max(8, 1 << (length - 1).bit_length())


def buckets_of(lengths: NDArray[np.int64]) -> tuple[Bucket, ...]:
    """Buckets of the segments of these lengths, [S], all at least 1."""
    starts = np.cumsum(lengths) - lengths
    tokens = int(lengths.sum())
    widths = np.array([padded_width(int(n)) for n in lengths], dtype=np.int64)
    buckets = []
    for width in np.unique(widths).tolist():
        members = np.flatnonzero(widths == width)
        if width > LONGEST_GATHERED or len(members) == 1:
            buckets += [Bucket(1, int(lengths[s]), int(starts[s])) for s in members]
            continue
        width = int(lengths[members].max())  # no wider than its longest
        place = np.arange(width)
        inside = place < lengths[members, None]
        source = starts[members, None] + np.minimum(place, lengths[members, None] - 1)
        target = np.where(inside, source, tokens)
        real = None if inside.all() else torch.from_numpy(inside.reshape(-1, 1, 1))
        slots, places = (torch.from_numpy(x.ravel()) for x in (source, target))
        buckets.append(Bucket(len(members), width, int(starts[members[0]]), slots, places, real))
    return tuple(buckets)
