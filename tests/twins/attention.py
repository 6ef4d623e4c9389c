"""Attention inside segments in NumPy, float64, a head and a segment at a time.

Shapes: T packed tokens, N query heads, K key heads, H head size.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def attend(q: Array, k: Array, v: Array, lengths: list[int], scale: float) -> tuple[Array, Array]:
    """Output [T, N, H] and log-sum-exps [N, T]."""
    out, lse = np.empty(q.shape), np.empty(q.shape[1::-1])
    for at, n, key_head in _parts(q, k, lengths):
        scores = _scores(q[at, n], k[at, key_head], scale)
        largest = scores.max(1, keepdims=True)
        weights = np.exp(scores - largest)
        out[at, n] = weights @ v[at, key_head] / weights.sum(1, keepdims=True)
        lse[n, at] = largest[:, 0] + np.log(weights.sum(1))
    return out, lse


def differentiate(
    grad: Array, q: Array, k: Array, v: Array, lengths: list[int], scale: float
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v."""
    dq, dk, dv = (np.zeros(x.shape) for x in (q, k, v))
    out, lse = attend(q, k, v, lengths, scale)
    for at, n, key_head in _parts(q, k, lengths):
        weights = np.exp(_scores(q[at, n], k[at, key_head], scale) - lse[n, at, None])
        delta = (grad[at, n] * out[at, n]).sum(1, keepdims=True)
        of_scores = scale * weights * (grad[at, n] @ v[at, key_head].T - delta)
        dv[at, key_head] += weights.T @ grad[at, n]
        dk[at, key_head] += of_scores.T @ q[at, n]
        dq[at, n] = of_scores @ k[at, key_head]
    return dq, dk, dv


def _parts(q: Array, k: Array, lengths: list[int]) -> Iterator[tuple[slice, int, int]]:
    """The tokens of each segment, each query head, and the key head that it looks at."""
    ends = np.cumsum(lengths)
    for start, end in zip(ends - lengths, ends, strict=True):
        for n in range(q.shape[1]):
            yield slice(start, end), n, n * k.shape[1] // q.shape[1]


def _scores(q: Array, k: Array, scale: float) -> Array:
    later = np.triu(np.ones((len(q), len(q)), dtype=bool), 1)
    scores: Array = np.where(later, -np.inf, scale * (q @ k.T))
    return scores
