"""The backward of `varlen_attention` for Hopper (sm_90): statistics, then two kernels in Gluon.

Each output has one writer, so that equal inputs give equal bits.
"""

from __future__ import annotations

from torch import Tensor

from hermes_kernels.dkdv_sm90 import dkdv_of
from hermes_kernels.dq_sm90 import dq_of
from hermes_kernels.places import Places
from hermes_kernels.varlen_attention import statistics_of


def backward(
    dout_TNH: Tensor, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, out_TNH: Tensor, lse_NU: Tensor,
    places: Places, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `varlen_attention.backward`, for head sizes of 64 and 128, on a GPU of sm_90."""
    rest = (dout_TNH, *statistics_of(out_TNH, dout_TNH, lse_NU), places, scale)
    return dq_of(q_TNH, k_TKH, v_TKH, *rest), *dkdv_of(q_TNH, k_TKH, v_TKH, *rest)
