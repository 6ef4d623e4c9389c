"""Attention and its gradients by PyTorch: in float64, and as it is computed in the inputs' dtype.

Shapes: T packed tokens, N query heads, K key heads, H head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hermes_kernels import reference


def inputs(
    tokens: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, n, size) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def truth(tensors: list[Tensor], lengths: list[int], scale: float) -> list[Tensor]:
    """The output and the gradients of q, k and v in float64."""
    q, k, v = (x.double().requires_grad_() for x in tensors[:3])
    out = reference.varlen_attention(q, k, v, lengths, scale)
    out.backward(tensors[3].double())
    return [out.detach(), *(x.grad for x in (q, k, v))]  # type: ignore[list-item]


def torch_itself(tensors: list[Tensor], lengths: list[int], scale: float) -> list[Tensor]:
    """The same by PyTorch's fused attention in the inputs' dtype, one segment after the other."""
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    parts = [
        scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in one), is_causal=True, scale=scale, enable_gqa=True
        )[0].transpose(0, 1)
        for one in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    ]
    out = torch.cat(parts)
    out.backward(tensors[3])
    return [out.detach(), *(x.grad for x in (q, k, v))]  # type: ignore[list-item]
