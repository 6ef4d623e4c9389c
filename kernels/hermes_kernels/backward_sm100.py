"""The backward of `varlen_attention` for Blackwell (sm_100): statistics, then two kernels in Gluon.

Each output has one writer, so that equal inputs give equal bits: `dq_sm100` walks over the keys of
a query tile, `dkdv_sm100` over the queries of a key tile. Seven products, where five would do with
sums that programs share: FlashAttention-4 (arXiv 2603.05451) adds dq up so, in any order.

Shapes: T packed tokens, N query heads, K key heads, H head size, U = T rounded up to TILE.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.blackwell import TensorDescriptor

from hermes_kernels.dkdv_sm100 import dkdv_kernel
from hermes_kernels.dq_sm100 import dq_kernel
from hermes_kernels.forward_sm100 import _boxes
from hermes_kernels.halves_sm100 import REGISTERS, WARPS
from hermes_kernels.launch import TILE, launch_of, on, parts_of, sum_of_parts
from hermes_kernels.places import Places
from hermes_kernels.varlen_attention import statistics_of


def backward(
    dout_TNH: Tensor, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, out_TNH: Tensor, lse_NU: Tensor,
    places: Places, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `varlen_attention.backward`, for head sizes of 64 and 128, on a GPU of sm_100."""
    tokens, heads, size = q_TNH.shape
    kv_heads, room = k_TKH.shape[1], lse_NU.shape[1]
    group = heads // kv_heads
    parts = parts_of(kv_heads, group)
    exponents, deltas = statistics_of(out_TNH, dout_TNH, lse_NU)
    dq = torch.empty_like(q_TNH)
    dk, dv = (x.new_empty(tokens, kv_heads * parts, size) for x in (k_TKH, v_TKH))
    boxes = [_boxes(x) for x in (q_TNH, k_TKH, v_TKH, dout_TNH)]
    with on(q_TNH):
        dq_kernel[heads, places.query_order.numel()](
            *boxes, _boxes(dq), exponents, deltas, *places[:4], places.query_order, scale, tokens,
            room, group, launch_of(100, "dq_sm100", size).stages,
            num_warps=WARPS, maxnreg=REGISTERS,
        )  # fmt: skip
        dkdv_kernel[kv_heads * parts, places.key_order.numel()](
            *boxes, _vectors(exponents), _vectors(deltas), _boxes(dk), _boxes(dv), *places[:4],
            places.key_order, scale, tokens, room, group, parts,
            launch_of(100, "dkdv_sm100", size).stages, num_warps=WARPS, maxnreg=REGISTERS,
        )  # fmt: skip
    return dq, sum_of_parts(dk, parts), sum_of_parts(dv, parts)


def _vectors(x_NSU: Tensor) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for([TILE], gl.float32)
    return TensorDescriptor.from_tensor(x_NSU.view(-1), [TILE], layout)
