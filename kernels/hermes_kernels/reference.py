"""Each kernel in plain PyTorch, for any device and float: the truth that tests compare with.

Shapes: T packed tokens, N query heads, K key and value heads, H head size, D model size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def varlen_attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, lengths: Sequence[int], scale: float
) -> Tensor:
    """Causal attention inside each segment, one segment after the other; [T, N, H].

    ``lengths`` are the segments' tokens in order and add up to T. Statistics are at least fp32.
    """
    group = q_TNH.shape[1] // k_TKH.shape[1]
    parts = []
    for q, k, v in zip(*(x.split(list(lengths)) for x in (q_TNH, k_TKH, v_TKH)), strict=True):
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("qnh,knh->nqk", q, k).to(_at_least_float32(q.dtype)) * scale
        later = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1).to(v.dtype)
        parts.append(torch.einsum("nqk,knh->qnh", weights, v))
    return torch.cat(parts) if parts else q_TNH.clone()


def varlen_lse(q_TNH: Tensor, k_TKH: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """Natural log-sum-exp of the scaled scores that each query sees, [N, T], at least fp32."""
    group = q_TNH.shape[1] // k_TKH.shape[1]
    parts = [q_TNH.new_empty(q_TNH.shape[1], 0, dtype=_at_least_float32(q_TNH.dtype))]
    for q, k in zip(*(x.split(list(lengths)) for x in (q_TNH, k_TKH)), strict=True):
        k = k.repeat_interleave(group, dim=1)
        scores = torch.einsum("qnh,knh->nqk", q, k).to(parts[0].dtype) * scale
        later = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).triu(1)
        parts.append(scores.masked_fill(later, float("-inf")).logsumexp(-1))
    return torch.cat(parts, dim=1)


def token_statistics(
    logits_TV: Tensor, labels_T: Tensor, kept_T: Tensor, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """-log softmax(logits)[label], entropy and log-sum-exp of each token; 0 where it is not kept.

    Every logit counts, at least in fp32; what nobody asked for is thrown away.
    """
    logits_TV = logits_TV.to(_at_least_float32(logits_TV.dtype))
    if softcap != 0:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    log_probability_TV = logits_TV.log_softmax(-1)
    chosen_T = log_probability_TV.gather(1, labels_T.clamp(min=0)[:, None]).squeeze(1)
    entropy_T = -(log_probability_TV.exp() * log_probability_TV).sum(-1)
    found = (-chosen_T, entropy_T, logits_TV.logsumexp(-1))
    nll_T, entropy_T, lse_T = (x.masked_fill(~kept_T, 0.0) for x in found)
    return nll_T, entropy_T, lse_T


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
