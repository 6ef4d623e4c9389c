"""Statistics and gradients of a chunk of logits in PyTorch, a block of rows in cache at a time.

The Triton kernels in `hermes_kernels.cross_entropy` offer the same three functions.

Shapes: C rows of the chunk, B rows of a block, V vocabulary (this rank's share of it).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Of a block in fp32: several passes over it find it in the second or third level of cache.
BLOCK_BYTES = 2**22


def statistics(logits_CV: Tensor, column_C: Tensor, softcap: float) -> Tensor:
    """Log-sum-exp, target logit and expected logit of each row; [3, C], at least fp32.

    ``column_C`` is the target's column, -1 where it is in another share: its logit is then 0.
    """
    out_3C = _empty(3, logits_CV)
    for at, scratch_BV in _blocks(logits_CV):
        z_BV = _capped(logits_CV[at], softcap, scratch_BV)
        largest_B1 = z_BV.amax(1, keepdim=True)
        p_BV = torch.softmax(z_BV, 1)
        largest_B = largest_B1.squeeze(1)
        lse_B = largest_B - p_BV.amax(1).log()  # its largest is 1 / sum
        # A share may be nothing but -inf, which pads a vocabulary: it counts as nothing.
        out_3C[0, at] = torch.where(largest_B == -math.inf, largest_B, lse_B)
        out_3C[1, at] = _pick(z_BV, column_C[at])
        out_3C[2, at] = p_BV.mul_(z_BV).nansum(1)  # 0 x -inf is 0
    return out_3C


def loss_and_gradient_(
    logits_CV: Tensor, column_C: Tensor, weight_C: Tensor, z_loss: float, softcap: float
) -> Tensor:
    """Overwrite logits by the gradient of ``weight * (lse - target + z_loss * lse ** 2)``.

    Returns:
        [2, C]: log-sum-exp and target logit.
    """
    out_2C = _empty(2, logits_CV)
    for at, scratch_BV in _blocks(logits_CV):
        logits_BV, weight_B1 = logits_CV[at], weight_C[at, None]
        z_BV = _capped(logits_BV, softcap, scratch_BV)
        slope_BV = _slope(z_BV, softcap)
        out_2C[1, at] = _pick(z_BV, column_C[at])
        largest_B1 = z_BV.amax(1, keepdim=True)
        p_BV = torch.softmax(z_BV, 1, out=z_BV)
        lse_B1 = largest_B1 - p_BV.amax(1, keepdim=True).log()
        out_2C[0, at] = lse_B1.squeeze(1)
        p_BV.mul_(weight_B1 if z_loss == 0 else weight_B1 * (1 + 2 * z_loss * lse_B1))
        _finish(logits_BV, p_BV, column_C[at], weight_B1, slope_BV)
    return out_2C


def gradient_(
    logits_CV: Tensor,
    column_C: Tensor,
    lse_C: Tensor,
    scale_C: Tensor,
    tilt_C: Tensor | None,
    target_C: Tensor,
    softcap: float,
) -> None:
    """Overwrite logits by ``p * (scale + tilt * log p) - target * [column]``, through the cap.

    ``lse_C`` is that of the whole vocabulary, of which these columns may be a share; no tilt is 0.
    """
    for at, scratch_BV in _blocks(logits_CV):
        z_BV = _capped(logits_CV[at], softcap, scratch_BV)
        slope_BV = _slope(z_BV, softcap)
        log_p_BV = z_BV.sub_(lse_C[at, None])
        factor_BV = scale_C[at, None]
        if tilt_C is not None:
            factor_BV = (log_p_BV * tilt_C[at, None]).nan_to_num_(0.0).add_(factor_BV)
        p_BV = log_p_BV.exp_().mul_(factor_BV)
        _finish(logits_CV[at], p_BV, column_C[at], target_C[at, None], slope_BV)


def _blocks(logits_CV: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Where each block lies, and memory for it in fp32 at least, the same for all."""
    rows, columns = logits_CV.shape
    step = max(1, BLOCK_BYTES // (4 * columns), torch.get_num_threads())
    if logits_CV.device.type != "cpu":
        step = max(1, rows)  # nothing to gain, and a launch for each block to lose
    wide = torch.promote_types(logits_CV.dtype, torch.float32)
    held = logits_CV.dtype == wide
    scratch = logits_CV if held else logits_CV.new_empty(min(step, rows), columns, dtype=wide)
    for start in range(0, rows, step):
        at = slice(start, min(start + step, rows))
        yield at, logits_CV[at] if held else scratch[: at.stop - start]


def _empty(count: int, logits_CV: Tensor) -> Tensor:
    wide = torch.promote_types(logits_CV.dtype, torch.float32)
    return torch.empty(count, len(logits_CV), dtype=wide, device=logits_CV.device)


def _capped(logits_BV: Tensor, softcap: float, scratch_BV: Tensor) -> Tensor:
    """The logits, at least fp32, through the cap; they themselves where nothing changes."""
    if softcap != 0:
        return torch.tanh(logits_BV.to(scratch_BV.dtype) / softcap).mul_(softcap)
    return logits_BV if logits_BV.dtype == scratch_BV.dtype else scratch_BV.copy_(logits_BV)


def _slope(z_BV: Tensor, softcap: float) -> Tensor | None:
    """Derivative of the cap, out of capped logits; None where there is no cap."""
    return None if softcap == 0 else (z_BV / softcap).square_().neg_().add_(1)


def _pick(z_BV: Tensor, column_B: Tensor) -> Tensor:
    picked_B = z_BV.gather(1, column_B.clamp(min=0)[:, None]).squeeze(1)
    return picked_B.masked_fill_(column_B < 0, 0.0)


def _finish(
    logits_BV: Tensor, p_BV: Tensor, column_B: Tensor, target_B1: Tensor, slope_BV: Tensor | None
) -> None:
    """Take off the target's part, go through the cap, and round once."""
    column_B1 = column_B[:, None]
    p_BV.scatter_add_(1, column_B1.clamp(min=0), -target_B1 * (column_B1 >= 0))
    if slope_BV is not None:
        p_BV.mul_(slope_BV)
    if p_BV.data_ptr() != logits_BV.data_ptr():
        logits_BV.copy_(p_BV)
