"""Attention inside segments by others on a CUDA device, each called as its users call it.

Bounds and masks are made before, and are not timed.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from bench.attention import Shape, block_mask
from hermes_core.attention_peers import VARLEN

Call = Callable[[Tensor, Tensor, Tensor], Tensor]

FLEX = "FlexAttention, mask prebuilt"

# Each flash-attn's module. Their backward adds in any order, unless asked not to.
FLASH = {
    "FlashAttention-4": "flash_attn.cute",
    "FlashAttention-3": "flash_attn_interface",
    "FlashAttention-3 of fa3-fwd": "fa3_fwd_interface",
    "FlashAttention-2": "flash_attn",
}
FORWARD_ALONE = {"FlashAttention-3 of fa3-fwd"}  # its wheel holds no backward kernels
LATE = {"FlashAttention-4"}  # after all others: its first call never came back on an H100


def flashes() -> tuple[dict[str, Any], list[str]]:
    """Each flash-attn's function that is installed, by name; and why the others are not here."""
    here: dict[str, Any] = {}
    absent = []
    for name, module in FLASH.items():
        try:
            here[name] = importlib.import_module(module).flash_attn_varlen_func
        except Exception as problem:  # whatever a broken package raises
            absent.append(f"{name}: skipped: {told(problem)}")
    return here, absent


def peers(
    shape: Shape, device: torch.device, flashes: dict[str, Any]
) -> dict[str, Callable[[], Call]]:
    """What makes each peer's call, by the peer's name."""
    found: dict[str, Callable[[], Call]] = {}
    for name, make in (("PyTorch varlen_attn", torch_varlen), ("cuDNN", cudnn), (FLEX, flex)):
        found[name] = functools.partial(make, shape, device)
    return found | flash_calls(shape, device, flashes)


def flash_calls(
    shape: Shape, device: torch.device, flashes: dict[str, Any]
) -> dict[str, Callable[[], Call]]:
    """The same of each flash-attn, and of its deterministic form if it has one."""
    found: dict[str, Callable[[], Call]] = {}
    for name, run in flashes.items():
        found[name] = functools.partial(flash, run, shape, device, deterministic=False)
    for name, run in flashes.items():
        if name not in FORWARD_ALONE:
            found[f"{name}, deterministic"] = functools.partial(
                flash, run, shape, device, deterministic=True
            )
    return found


def told(problem: Exception) -> str:
    """An error in one line."""
    lines = [line for line in str(problem).splitlines() if line.strip()]
    return f"{type(problem).__name__}: {lines[0].strip() if lines else 'no message'}"


def bounds(shape: Shape, device: torch.device) -> Tensor:
    """``cu_seqlens``, on the device."""
    ends = np.cumsum(shape.lengths)
    return torch.tensor([0, *ends.tolist()], dtype=torch.int32, device=device)


def flash(run: Any, shape: Shape, device: torch.device, *, deterministic: bool) -> Call:
    """A flash-attn's variable-length attention; ``deterministic`` is its own option."""
    cu_seqlens, longest = bounds(shape, device), max(shape.lengths)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = run(
            q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=longest,
            max_seqlen_k=longest, softmax_scale=shape.size**-0.5, causal=True,
            deterministic=deterministic,
        )  # fmt: skip
        return cast(Tensor, found[0] if isinstance(found, tuple) else found)

    return call


def torch_varlen(shape: Shape, device: torch.device) -> Call:
    """PyTorch's own variable-length attention, which runs FlashAttention-2's kernels."""
    from torch.nn.attention.varlen import varlen_attn

    cu_seqlens, longest = bounds(shape, device), max(shape.lengths)
    options: dict[str, Any] = {"scale": shape.size**-0.5, "window_size": (-1, 0)}
    if "enable_gqa" in VARLEN:  # else taken without asking
        options["enable_gqa"] = True

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
        return cast(Tensor, found)

    return call


def cudnn(shape: Shape, device: torch.device) -> Call:
    """cuDNN's variable-length attention, called as PyTorch's `varlen_attn` would."""
    cu_seqlens, longest = bounds(shape, device), max(shape.lengths)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, *_ = torch.ops.aten._cudnn_attention_forward(
            q, k, v, None, cu_seqlens, cu_seqlens, longest, longest, True, 0.0, True, False,
            scale=shape.size**-0.5,
        )  # fmt: skip
        return cast(Tensor, out)

    return call


def flex(shape: Shape, device: torch.device) -> Call:
    """FlexAttention, compiled anew where the heads differ, and not where the mask does."""
    mask = block_mask(shape, str(device))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = compiled_flex()(*rows, block_mask=mask, enable_gqa=True)
        return cast(Tensor, out[0].transpose(0, 1))

    return call


@functools.cache
def compiled_flex() -> Callable[..., Any]:
    """One compiled function for all shapes, as a training run has."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def compiled_mask() -> Callable[..., Any]:
    """`create_block_mask` compiled, as its own warning and torchtitan do."""
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask, dynamic=False)
