"""Attention by others: PyTorch's varlen_attn, and whichever flash-attn is installed.

Both want the longest segment as a number on the host: known where `cu_seqlens` came from there,
else it waits for the device, once a batch.
"""

from __future__ import annotations

import importlib
import inspect
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

from torch import Tensor

from hermes_core.segments import Segments


def _newest_flash() -> str:
    """The module of the newest flash-attn that is installed, found without loading any; "" if none.

    FlashAttention-4, -3 and -2 each have a forward of the same arguments.
    """
    two = PathFinder.find_spec("flash_attn")
    inside = two.submodule_search_locations if two else None
    if inside and PathFinder.find_spec("flash_attn.cute", inside):
        return "flash_attn.cute"
    if PathFinder.find_spec("flash_attn_interface"):
        return "flash_attn_interface"
    return "flash_attn" if two else ""


def _parameters_of_varlen() -> frozenset[str]:
    """Of PyTorch's `varlen_attn`, which moved; empty where it cannot do what we ask of it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    known = frozenset(inspect.signature(varlen_attn).parameters)
    return known if {"scale", "window_size"} <= known else frozenset()


FLASH, VARLEN = _newest_flash(), _parameters_of_varlen()


def torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float
) -> tuple[Tensor, Tensor]:
    """PyTorch's own variable-length attention."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    bounds, longest = segments.cu_seqlens, segments.max_length
    grouped: dict[str, Any] = (
        {"enable_gqa": q.shape[1] != k.shape[1]} if "enable_gqa" in VARLEN else {}
    )
    out, lse = varlen_attn(
        q, k, v, bounds, bounds, longest, longest, return_aux=AuxRequest(lse=True),
        scale=scale, window_size=(-1, 0), **grouped,
    )  # fmt: skip
    return out, lse


def flash_varlen(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float
) -> tuple[Tensor, Tensor]:
    """flash-attn's variable-length attention; its backward adds with atomics."""
    module: ModuleType = importlib.import_module(FLASH)
    bounds, longest = segments.cu_seqlens, segments.max_length
    statistics = "return_lse" if module.__name__ == "flash_attn.cute" else "return_attn_probs"
    out, lse, *_ = module.flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=longest,
        max_seqlen_k=longest, softmax_scale=scale, causal=True, **{statistics: True},
    )  # fmt: skip
    return out, lse
