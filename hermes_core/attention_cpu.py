"""Attention inside segments on a CPU: our own C++, which reads the tensors where they lie.

Shapes: T packed tokens, N query heads, K key heads, H head size, U room for T rounded up.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from hermes_core import _C
from hermes_core.backends import HALF


def forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lse_NU: Tensor, scale: float
) -> Tensor:
    """Output [T, N, H]; the natural log-sum-exps of the scaled scores go to ``lse_NU``."""
    out = torch.empty_like(q)
    lse_NU[:, len(q) :] = 0
    _C.attend(*map(_array, (q, k, v, starts, out, lse_NU)), **_settings(q, scale))
    return out


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse_NU: Tensor, starts: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    given = (grad, q, k, v, out, lse_NU, starts, dq, dk, dv)
    _C.differentiate_attention(*map(_array, given), **_settings(q, scale))
    return dq, dk, dv


def _array(x: Tensor) -> NDArray[Any]:
    """The tensor's memory; NumPy knows no bfloat16, so the bits of half precision."""
    x = x.detach()
    return (x.view(torch.uint16) if x.dtype in HALF else x).numpy()


def _settings(q: Tensor, scale: float) -> dict[str, Any]:
    threads = min(torch.get_num_threads(), _C.MAX_THREADS)
    return {"dtype": str(q.dtype).removeprefix("torch."), "scale": scale, "threads": threads}
