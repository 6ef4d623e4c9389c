"""Softmax statistics and gradients of a chunk of logits, one program for each row.

A row z of logits with target y and weight w loses

    w * (lse - z[y] + z_loss * lse ** 2)           lse = log sum_v exp(z[v])

whose gradient, with p[v] = exp(z[v] - lse), is

    w * (1 + 2 * z_loss * lse) * p[v] - w * [v = y]

The first pass over the row keeps a running maximum and, in each lane, a sum of exponentials that
is scaled down when the maximum rises; the second pass writes the gradient over the logits. On
Hopper and Blackwell `cross_entropy_held` does this for 16-bit logits, and reads them once; here
they are read twice, since more rows are in work than the second level of cache has room for. A
soft cap replaces z by cap * tanh(z / cap) on the way in and multiplies by 1 - tanh ** 2 on the way
out.

`hermes_core.loss_rows` offers the same three functions in PyTorch; the plain twin is
`reference.token_statistics`.

Shapes: C rows of the chunk, V vocabulary (this rank's share of it), B = BLOCK columns at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hermes_kernels.launch import GLUON_SINCE, TRITON_VERSION, on

# Columns at a time, and warps: two 128-bit loads of bf16 for each thread, few enough registers for
# four programs on a multiprocessor. 16,384 columns with 32 warps were 8 % faster on an H100, but
# that is 0.4 % of a step, and the statistics would have too few registers.
BLOCK, WARPS = 4096, 8
WIDE_CAP = tl.constexpr(128.0)  # smaller ones, as models have, lose 1e-5 of a logit at most
PROGRAMS = 2048  # that scale a tensor: some for each multiprocessor, whatever the GPU
# Slices of longer vectors, which start anywhere: their alignment is no reason to compile again.
VECTORS = (
    *("columns", "weights", "lse_out", "target_out", "expected_out"),
    *("lses", "scales", "tilts", "targets"),
)


@triton.jit
def _cap(z, SOFTCAP: tl.constexpr):
    # tanh by the sigmoid: the interpreter knows no libdevice.
    capped = SOFTCAP * (2 * tl.sigmoid(2 * z / SOFTCAP) - 1)
    if SOFTCAP >= WIDE_CAP:  # whose rounding is that of the cap: a series where that counts
        square = (z / SOFTCAP) * (z / SOFTCAP)
        series = z - z * square * (1 / 3 - square * 2 / 15)
        capped = tl.where(square < 1 / 256, series, capped)
    return capped


@triton.jit
def _load_block(row, at, size, SOFTCAP: tl.constexpr):
    """Capped logits in fp32, -inf past the end; [B]."""
    z = tl.load(row + at, mask=at < size, other=-float("inf")).to(tl.float32)
    if SOFTCAP != 0:
        z = tl.where(at < size, _cap(z, SOFTCAP), -float("inf"))
    return z


@triton.jit
def _load_target(row, column, SOFTCAP: tl.constexpr):
    """The target's capped logit; 0 where it lies in another share."""
    z = tl.load(row + column, mask=column >= 0, other=0.0).to(tl.float32)
    if SOFTCAP != 0:
        z = _cap(z, SOFTCAP)
    return z


@triton.jit
def _rise(largest, z):
    """The maximum so far, 0 while there is none, so that no difference is -inf - -inf."""
    risen = tl.maximum(largest, tl.max(z, 0))
    return risen, tl.where(risen == -float("inf"), 0.0, risen)


@triton.jit
def _store_gradient(row, at, size, z, gradient, column, target, SOFTCAP: tl.constexpr):
    """Take off the target's part, go through the cap, and round once."""
    gradient -= tl.where(at == column, target, 0.0)
    if SOFTCAP != 0:
        bent = tl.where(at < size, z, 0.0) / SOFTCAP
        gradient *= 1 - bent * bent
    tl.store(row + at, gradient.to(row.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize_on_alignment=VECTORS)
def loss_and_gradient_kernel(
    logits,  # [C, V], overwritten
    columns,  # [C] int64, -1: in another share
    weights,  # [C] fp32
    lse_out,  # [C] fp32
    target_out,  # [C] fp32
    size,  # V
    stride,
    z_loss,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at_row = tl.program_id(0).to(tl.int64)
    row = logits + at_row * stride
    column = tl.load(columns + at_row).to(tl.int32)  # as the columns it is compared with
    weight = tl.load(weights + at_row)
    target = _load_target(row, column, SOFTCAP)  # before anything is overwritten

    largest = -float("inf")
    sums = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, size, BLOCK):
        z = _load_block(row, start + tl.arange(0, BLOCK), size, SOFTCAP)
        risen, base = _rise(largest, z)
        sums = sums * tl.exp(largest - base) + tl.exp(z - base)
        largest = risen
    lse = largest + tl.log(tl.sum(sums, 0))
    tl.store(lse_out + at_row, lse)
    tl.store(target_out + at_row, target)

    scale = weight * (1 + 2 * z_loss * lse)
    for start in tl.range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = _load_block(row, at, size, SOFTCAP)
        _store_gradient(row, at, size, z, tl.exp(z - lse) * scale, column, weight, SOFTCAP)


@triton.jit(do_not_specialize_on_alignment=VECTORS)
def statistics_kernel(
    logits,  # [C, V]
    columns,  # [C] int64, -1: in another share
    lse_out,  # [C] fp32
    target_out,  # [C] fp32
    expected_out,  # [C] fp32
    size,  # V
    stride,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at_row = tl.program_id(0).to(tl.int64)
    row = logits + at_row * stride
    tl.store(target_out + at_row, _load_target(row, tl.load(columns + at_row), SOFTCAP))

    largest = -float("inf")
    sums = tl.zeros([BLOCK], tl.float32)
    products = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, size, BLOCK):
        z = _load_block(row, start + tl.arange(0, BLOCK), size, SOFTCAP)
        risen, base = _rise(largest, z)
        shrink = tl.exp(largest - base)
        part = tl.exp(z - base)
        sums = sums * shrink + part
        products = products * shrink + part * tl.where(part > 0, z, 0.0)
        largest = risen
    total = tl.sum(sums, 0)
    # 0 in a share of nothing but -inf, which pads a vocabulary: it counts as nothing.
    total = tl.where(total == 0, 1.0, total)
    tl.store(lse_out + at_row, largest + tl.log(total))
    tl.store(expected_out + at_row, tl.sum(products, 0) / total)


@triton.jit(do_not_specialize_on_alignment=VECTORS)
def gradient_kernel(
    logits,  # [C, V], overwritten
    columns,  # [C] int64, -1: in another share
    lses,  # [C] fp32, of the whole vocabulary
    scales,  # [C] fp32
    tilts,  # [C] fp32
    targets,  # [C] fp32
    size,  # V
    stride,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at_row = tl.program_id(0).to(tl.int64)
    row = logits + at_row * stride
    column = tl.load(columns + at_row)
    lse = tl.load(lses + at_row)
    scale, tilt = tl.load(scales + at_row), tl.load(tilts + at_row)
    target = tl.load(targets + at_row)
    for start in tl.range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = _load_block(row, at, size, SOFTCAP)
        p = tl.exp(z - lse)
        gradient = p * (scale + tilt * tl.where(p > 0, z - lse, 0.0))
        _store_gradient(row, at, size, z, gradient, column, target, SOFTCAP)


@triton.jit
def scale_kernel(
    values,  # [size], overwritten
    factor,  # [1], at least fp32
    size,
    BLOCK: tl.constexpr,
):
    by = tl.load(factor)
    if by != 1:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in tl.range(tl.program_id(0).to(tl.int64) * BLOCK, size, step):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(values + at, mask=at < size)
            tl.store(values + at, (x * by).to(values.dtype.element_ty), mask=at < size)


def statistics(logits_CV: Tensor, column_C: Tensor, softcap: float) -> Tensor:
    """Log-sum-exp, target logit and expected logit of each row; [3, C] fp32."""
    out_3C = torch.empty(3, len(logits_CV), dtype=torch.float32, device=logits_CV.device)
    _launch(statistics_kernel, logits_CV, softcap, column_C, *out_3C)
    return out_3C


def loss_and_gradient_(
    logits_CV: Tensor, column_C: Tensor, weight_C: Tensor, z_loss: float, softcap: float
) -> Tensor:
    """Overwrite logits by the loss's gradient; [2, C] fp32: log-sum-exp and target logit."""
    if not triton.knobs.runtime.interpret and TRITON_VERSION >= GLUON_SINCE:
        from hermes_kernels import cross_entropy_held as held

        if held.takes(logits_CV):
            return held.loss_and_gradient_(logits_CV, column_C, weight_C, z_loss, softcap)
    out_2C = torch.empty(2, len(logits_CV), dtype=torch.float32, device=logits_CV.device)
    vectors = (column_C, weight_C.contiguous(), *out_2C)
    _launch(loss_and_gradient_kernel, logits_CV, softcap, *vectors, z_loss=float(z_loss))
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
    """Overwrite logits by ``p * (scale + tilt * log p) - target * [column]``, through the cap."""
    if tilt_C is None:
        tilt_C = torch.zeros_like(scale_C)
    vectors = (x.contiguous() for x in (column_C, lse_C, scale_C, tilt_C, target_C))
    _launch(gradient_kernel, logits_CV, softcap, *vectors)


def scale_(values: Tensor, factor: Tensor) -> None:
    """Multiply a contiguous tensor by a scalar, at least fp32, on its device; round once.

    Where it is 1, as where the loss itself is what is differentiated, nothing is read.
    """
    if values.numel() == 0:
        return
    programs = min(PROGRAMS, triton.cdiv(values.numel(), BLOCK))
    with on(values):
        scale_kernel[(programs,)](values, factor, values.numel(), BLOCK=BLOCK, num_warps=WARPS)


def _launch(
    kernel: Any, logits_CV: Tensor, softcap: float, *vectors: Tensor, **numbers: float
) -> None:
    """One program for each row, on the logits' device, whichever is the current one."""
    rows, columns = logits_CV.shape
    with on(logits_CV):
        kernel[(rows,)](
            logits_CV, *vectors, size=columns, stride=logits_CV.stride(0), **numbers,
            SOFTCAP=float(softcap), BLOCK=min(BLOCK, 1 << (columns - 1).bit_length()),
            num_warps=WARPS,
        )  # fmt: skip
