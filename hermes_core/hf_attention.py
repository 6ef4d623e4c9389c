"""Attention inside samples in transformers: `register()`, then attn_implementation="hermes".

Shapes: B rows, L row length, N query heads, K key heads, H head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hermes_core.attention import varlen_attention
from hermes_core.segments import Segments, segments, segments_of_positions

UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # a module that gives one is refused


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

    Raises:
        ValueError: the model wants what is not computed here.
    """
    _check(module, query, key, dropout, sliding_window, kwargs)
    if query.shape[2] != key.shape[2]:
        seen = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        out = scaled_dot_product_attention(
            query, key, value, seen, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.transpose(1, 2), None
    where = _segments_of(
        query, attention_mask, kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    )
    q_TNH, k_TKH, v_TKH = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = varlen_attention(q_TNH, k_TKH, v_TKH, where, scale=scaling)
    return out.view(query.shape[0], query.shape[2], *out.shape[1:]), None


def _check(
    module: torch.nn.Module, query: Tensor, key: Tensor, dropout: float,
    sliding_window: int | None, kwargs: dict[str, Any],
) -> None:  # fmt: skip
    asked = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if dropout:
        asked.append(f"dropout of {dropout}")
    if sliding_window is not None and sliding_window < key.shape[2]:
        asked.append(f"a sliding window of {sliding_window}")
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        asked.append("attention that is not causal")
    if query.shape[2] != key.shape[2] and query.shape[2] != 1:
        asked.append(f"{query.shape[2]} new tokens after a cache, not one")
    if asked:
        raise ValueError(
            f"attn_implementation='hermes' has no {', '.join(asked)}; use 'flex_attention'"
        )


def _segments_of(
    query: Tensor, mask: Tensor | None, bounds: Tensor | None, positions: Tensor | None
) -> Segments:
    """Segments of a batch: made by the first layer, and kept with the tensor that tells them."""
    rows, length = query.shape[0], query.shape[2]
    if positions is None:
        positions = torch.arange(length, device=query.device)[None]
    if positions.ndim != 2:
        raise ValueError(f"position_ids must be [rows, tokens], got {tuple(positions.shape)}")
    teller = positions if bounds is None else bounds
    compiling = torch.compiler.is_compiling()  # a graph cannot keep a thing with its input
    kept = None if compiling else getattr(teller, "_hermes_segments", None)
    made_from = (rows, length, None if compiling else teller._version)
    where: Segments
    if kept is not None and kept[0] == made_from and kept[1] is mask:
        where = kept[2]
        return where
    if bounds is not None:
        where = segments(bounds, rows * length, device=query.device)
    else:
        where = segments_of_positions(positions.expand(rows, length), mask)
    if not compiling:
        teller._hermes_segments = (made_from, mask, where)  # type: ignore[attr-defined]
    return where


def _padding_mask(
    batch_size: int, q_length: int, kv_length: int, *_: Any,
    attention_mask: Tensor | None = None, **__: Any,
) -> Tensor | None:  # fmt: skip
    """What transformers hands to each layer as the mask: the one of padding, [B, L], or none."""
    return None if attention_mask is None else attention_mask[:, -kv_length:]
