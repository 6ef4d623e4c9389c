"""Attention by others: PyTorch's varlen_attn, and whichever flash-attn is installed.

Both want the longest segment as a number on the host: known where `cu_seqlens` came from there,
else it waits for the device. Not run on a GPU by us yet.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from hermes_core.segments import Segments

# The newest that is there: FlashAttention-4, -3, -2, each with a forward of the same arguments.
FLASH = ("flash_attn.cute", "flash_attn_interface", "flash_attn")


@cache
def flash() -> str:
    """The module of the newest flash-attn that is installed; "" where none is."""
    for name in FLASH:
        try:
            if find_spec(name) is not None:
                return name
        except ImportError:  # its parent package is missing or broken
            continue
    return ""


def torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float
) -> tuple[Tensor, Tensor]:
    """PyTorch's own variable-length attention."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    bounds, longest = _bounds(segments)
    out, lse = varlen_attn(
        q, k, v, bounds, bounds, longest, longest, return_aux=AuxRequest(lse=True),
        scale=scale, window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out, lse


def flash_varlen(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float
) -> tuple[Tensor, Tensor]:
    """flash-attn's variable-length attention; its backward adds with atomics."""
    module: ModuleType = importlib.import_module(flash())
    bounds, longest = _bounds(segments)
    statistics = "return_lse" if module.__name__ == "flash_attn.cute" else "return_attn_probs"
    out, lse, *_ = module.flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=longest,
        max_seqlen_k=longest, softmax_scale=scale, causal=True, **{statistics: True},
    )  # fmt: skip
    return out, lse


def _bounds(segments: Segments) -> tuple[Tensor, int]:
    """Segment bounds that cover every token, and the longest segment."""
    bounds = np.concatenate([[0], np.cumsum(segments.lengths)]).astype(np.int32)
    on = segments.starts.device
    return torch.from_numpy(bounds).to(on, non_blocking=True), segments.max_length
