"""Attention inside samples in transformers: `register()`, then attn_implementation="hermes".

Shapes: B rows, L row length, N query heads, K key heads, H head size.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from hermes_core.attention import varlen_attention
from hermes_core.segments import Segments, segments, segments_of_positions

UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # a module that gives one is refused
REFUSED = "attn_implementation='hermes' has no {}; use 'flex_attention'"


def register() -> None:
    """Make attn_implementation="hermes" known to transformers.

    Rows may be packed: segments follow from ``cu_seq_lens_q``, else from ``position_ids``, as the
    collators of transformers and TRL give them; they are made once a batch, not once a layer.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("hermes", attention_forward)
    AttentionMaskInterface.register("hermes", _padding_mask)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: [B, N, L, H] in, [B, L, N, H] out.

    A row's new tokens may follow a cache of earlier ones only one at a time, as in generation.
    Under autocast it computes in its dtype, as PyTorch's own attention does.

    Args:
        value: its heads may be smaller than those of query and key, and are in the result, too.

    Raises:
        ValueError: the model wants what is not computed here.
    """
    _check(module, query, key, attention_mask, dropout, sliding_window, kwargs)
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.shape[2] != key.shape[2]:
        seen = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        out = scaled_dot_product_attention(
            query, key, value, seen, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.transpose(1, 2), None
    where = _segments_of(
        query, attention_mask, kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    )
    size = value.shape[3]
    value = pad(value, (0, max(0, query.shape[3] - size)))
    q_TNH, k_TKH, v_TKH = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = varlen_attention(q_TNH, k_TKH, v_TKH, where, scale=scaling)[..., :size]
    return out.view(query.shape[0], query.shape[2], *out.shape[1:]), None


def _check(
    module: torch.nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, dropout: float,
    sliding_window: int | None, kwargs: dict[str, Any],
) -> None:  # fmt: skip
    asked = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if mask is not None and mask.ndim != 2:
        asked.append(f"mask of {mask.ndim} dimensions")
    if dropout:
        asked.append(f"dropout of {dropout}")
    if sliding_window is not None and sliding_window < key.shape[2]:
        asked.append(f"sliding window of {sliding_window}")
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        asked.append("attention that is not causal")
    if query.shape[2] != key.shape[2] and query.shape[2] != 1:
        asked.append(f"{query.shape[2]} new tokens after a cache, not one")
    if asked:
        raise ValueError(REFUSED.format(", ".join(asked)))


class _Made(NamedTuple):
    """Segments, and what they were made from."""

    teller: weakref.ref[Tensor]  # positions or bounds
    version: int  # a write to it counts one up
    mask: weakref.ref[Tensor] | None
    rows: int
    length: int
    where: Segments

    def is_of(self, teller: Tensor, mask: Tensor | None, rows: int, length: int) -> bool:
        of_mask = None if self.mask is None else self.mask()
        is_same = self.teller() is teller and of_mask is mask and self.version == teller._version
        return is_same and (self.rows, self.length) == (rows, length)


_last: _Made | None = None  # of the batch that was seen last, whose other layers come next


def _segments_of(
    query: Tensor, mask: Tensor | None, bounds: Tensor | None, positions: Tensor | None
) -> Segments:
    """Segments of a batch, made by the first layer."""
    global _last
    rows, length = query.shape[0], query.shape[2]
    if positions is None:
        positions = torch.arange(length, device=query.device)[None]
    if positions.ndim != 2:
        raise ValueError(f"position_ids must be [rows, tokens], got {tuple(positions.shape)}")
    teller = positions if bounds is None else bounds
    # A graph cannot keep a thing between calls; nobody counts the writes to inference tensors.
    keeps = not torch.compiler.is_compiling() and not teller.is_inference()
    last = _last if keeps else None
    if last is not None and last.is_of(teller, mask, rows, length):
        return last.where
    if bounds is not None:
        where = segments(bounds, rows * length, device=query.device)
    else:
        where = segments_of_positions(positions.expand(rows, length), mask)
    if keeps:
        of_mask = None if mask is None else weakref.ref(mask)
        _last = _Made(weakref.ref(teller), teller._version, of_mask, rows, length, where)
    return where


def _padding_mask(
    batch_size: int, q_length: int, kv_length: int, *, q_offset: int | Tensor = 0,
    kv_offset: int = 0, mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None, config: Any = None, device: Any = None, **_: Any,
) -> Tensor | None:  # fmt: skip
    """What transformers hands to each layer as the mask: of what may be seen, [B, L], or none.

    Raises:
        ValueError: the model attends to more or less than earlier tokens of the same sample, or
            asks no attention function and would see later ones.
    """
    if not torch.compiler.is_compiling():
        kind: Any = type(config)
        _check_model(kind)
        if mask_function is not None and (more := _beyond_causal(mask_function, kv_length)):
            raise ValueError(REFUSED.format(more))
    filled = q_offset + q_length - kv_offset
    if q_length > 1 or (isinstance(filled, int) and filled >= kv_length):
        return None if attention_mask is None else attention_mask[:, -kv_length:]
    seen = (torch.arange(kv_length, device=device) < filled).expand(batch_size, kv_length)
    if attention_mask is None:
        return seen
    missing = max(0, kv_offset + kv_length - attention_mask.shape[1])
    return seen & pad(attention_mask, (0, missing))[:, kv_offset : kv_offset + kv_length].bool()


@functools.cache
def _check_model(config: type) -> None:
    """Refuse models with attention of their own, which without a mask is not causal."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    model: Any = MODEL_MAPPING.get(config, None)
    if getattr(model, "_supports_attention_backend", True):  # None, or several: nothing is known
        return
    if not hasattr(sys.modules[model.__module__], "ALL_ATTENTION_FUNCTIONS"):
        raise ValueError(
            f"{model.__name__} computes attention by itself, so attn_implementation='hermes' "
            f"cannot take its place; use 'eager'"
        )


def _beyond_causal(mask: Callable[..., Any], length: int) -> str | None:
    """What a mask function of transformers asks for beside causality and packing, if anything."""
    kind = mask.__qualname__.partition(".")[0]
    inside = {
        name: cell.cell_contents
        for name, cell in zip(mask.__code__.co_freevars, mask.__closure__ or (), strict=True)
    }
    if kind == "and_masks":
        found = (_beyond_causal(part, length) for part in inside["mask_functions"])
        return next((more for more in found if more), None)
    if kind in ("causal_mask_function", "packed_sequence_mask_function"):
        return None
    windows = {"sliding_window_overlay": "sliding_window", "chunked_overlay": "chunk_size"}
    if kind not in windows:
        return f"mask by {kind}"
    size = inside[windows[kind]]
    return f"{windows[kind].replace('_', ' ')} of {size}" if size < length else None
