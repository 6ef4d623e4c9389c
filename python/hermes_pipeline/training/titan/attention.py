"""The library's attention as torchtitan's pluggable ``inner_attention``.

Shapes: B rows, L row length, N query heads, K key heads, H head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchtitan.models.common.attention import VarlenAttention
from torchtitan.protocols.module import Module

from hermes_core.attention import varlen_attention
from hermes_core.segments import Segments


class SegmentAttention(VarlenAttention):
    """Attention confined to segments, which the trainer hands to every layer as the mask.

    The names of the arguments are torchtitan's sharding contract. Under tensor parallelism the
    tensors are this rank's heads, plain and local.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(VarlenAttention.Config):
        pass

    def __init__(self, config: Config) -> None:
        Module.__init__(self)  # the parent's would load a CUDA kernel that is not used
        self.window_size = config.window_size

    def forward(
        self,
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: Segments,
        scale: float | None = None,
        **_: Any,
    ) -> Tensor:
        q_TNH, k_TKH, v_TKH = (x.flatten(0, 1) for x in (q_BLNH, k_BLNH, v_BLNH))
        out_TNH = varlen_attention(q_TNH, k_TKH, v_TKH, attention_masks, scale=scale)
        return out_TNH.view(q_BLNH.shape)
