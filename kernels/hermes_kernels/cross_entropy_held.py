"""`cross_entropy.loss_and_gradient_` with rows held in shared memory, in Gluon, for Hopper and
Blackwell: as far as a row fits, each 16-bit logit is read once and written once.

Without it the second pass over a row reads memory again: a GPU has more rows in work than its
second level of cache has room for. One program works on a row. Copies into shared memory run ahead
of the first pass. What there is no room for, from some 110,000 logits on, is read twice: last by
the first pass and first by the second, which may find it in cache.

In the first pass each thread keeps a maximum and a sum of its own, so that threads wait for one
another only at its end.

Shapes: C rows of the chunk, V vocabulary (this rank's share of it).
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from hermes_kernels.launch import architecture, on

WIDE = gl.constexpr(8)  # 128 bits of a 16-bit type
HELD_BYTES = 221_184  # of shared memory; a program has 227 KiB with what its reductions need
AHEAD = 8  # blocks that are being copied
ALIGNED = 16  # elements: what a row's first address and its stride must be multiples of
VECTORS = ("columns", "weights", "lse_out", "target_out")  # as in `cross_entropy`
LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
WIDE_CAP = gl.constexpr(128.0)  # as in `cross_entropy`
LEAST = gl.constexpr(-3e38)  # a first maximum that is finite, so that no difference is -inf - -inf


@gluon.jit
def _capped(z, SOFTCAP: gl.constexpr):
    """cap * tanh(z / cap)."""
    if SOFTCAP != 0:
        capped = SOFTCAP - 2 * SOFTCAP / (gl.exp2(2 * LOG2E / SOFTCAP * z) + 1)
        if SOFTCAP >= WIDE_CAP:
            square = (z / SOFTCAP) * (z / SOFTCAP)
            series = z - z * square * (1 / 3 - square * 2 / 15)
            capped = gl.where(square < 1 / 256, series, capped)
        z = capped
    return z


@gluon.jit
def _joined(z, top, sums, SOFTCAP: gl.constexpr):
    """Each thread's maximum in powers of two and its sum of exponentials under it, with a block's
    logits.

    The maximum is kept as it was rounded: where it does not rise, the sum is multiplied by just 1.
    """
    z = _capped(z, SOFTCAP)
    risen = gl.maximum(top, gl.max(z, 1) * LOG2E)
    part = gl.sum(gl.exp2(z * LOG2E - risen[:, None]), 1)
    return risen, sums * gl.exp2(top - risen) + part


@gluon.jit
def _gradient(z, at, column, lse, scale, target, SOFTCAP: gl.constexpr):
    """Of a block of logits, in fp32; ``lse`` in powers of two."""
    z = _capped(z, SOFTCAP)
    gradient = gl.exp2(z * LOG2E - lse) * scale - gl.where(at == column, target, 0.0)
    if SOFTCAP != 0:
        bent = z / SOFTCAP
        gradient *= 1 - bent * bent
    return gradient


@gluon.jit(do_not_specialize_on_alignment=VECTORS)
def held_kernel(
    logits,  # [C, V], overwritten
    columns,  # [C] int64, -1: in another share
    weights,  # [C] fp32
    lse_out,  # [C] fp32
    target_out,  # [C] fp32
    size,  # V
    stride,
    z_loss,
    SOFTCAP: gl.constexpr,
    HELD: gl.constexpr,  # whole blocks in shared memory
    AHEAD: gl.constexpr,  # of them that are being copied
    THREADS: gl.constexpr,
):
    layout: gl.constexpr = gl.BlockedLayout([1, WIDE], [32, 1], [THREADS // 32, 1], [1, 0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    STEP: gl.constexpr = THREADS * WIDE
    dtype: gl.constexpr = logits.dtype.element_ty
    held = gl.allocate_shared_memory(dtype, [HELD, THREADS, WIDE], plain)
    at_row = gl.program_id(0).to(gl.int64)
    row = logits + at_row * stride
    column = gl.load(columns + at_row).to(gl.int32)
    weight = gl.load(weights + at_row)
    threads = gl.arange(0, THREADS, gl.SliceLayout(1, layout))
    lanes = gl.arange(0, WIDE, gl.SliceLayout(0, layout))
    at = threads[:, None] * WIDE + lanes[None, :]

    for i in gl.static_range(AHEAD):
        if i < HELD:
            async_copy.async_copy_global_to_shared(held.index(i), row + i * STEP + at)
        async_copy.commit_group()
    target = _capped(gl.load(row + column, mask=column >= 0, other=0.0).to(gl.float32), SOFTCAP)

    top = gl.full([THREADS], LEAST, gl.float32, gl.SliceLayout(1, layout))
    sums = gl.full([THREADS], 0.0, gl.float32, gl.SliceLayout(1, layout))
    for i in range(HELD):
        async_copy.wait_group(AHEAD - 1)
        z = held.index(i).load(layout).to(gl.float32)
        if i + AHEAD < HELD:
            async_copy.async_copy_global_to_shared(
                held.index(i + AHEAD), row + (i + AHEAD) * STEP + at
            )
        async_copy.commit_group()
        top, sums = _joined(z, top, sums, SOFTCAP)
    for start in range(HELD * STEP, size, STEP):
        inside = start + at < size
        z = gl.load(row + start + at, mask=inside, other=-float("inf")).to(gl.float32)
        if SOFTCAP != 0:
            z = gl.where(inside, z, -float("inf"))
        top, sums = _joined(z, top, sums, SOFTCAP)
    largest = gl.max(top, 0)
    lse = largest + gl.log2(gl.sum(sums * gl.exp2(top - largest), 0))
    gl.store(lse_out + at_row, lse * LN2)
    gl.store(target_out + at_row, target)

    scale = weight * (1 + 2 * z_loss * (lse * LN2))
    for start in range(HELD * STEP, size, STEP):
        inside = start + at < size
        z = gl.load(row + start + at, mask=inside, other=0.0).to(gl.float32)
        gradient = _gradient(z, start + at, column, lse, scale, weight, SOFTCAP)
        gl.store(row + start + at, gradient.to(dtype), mask=inside)
    for i in range(HELD):
        z = held.index(i).load(layout).to(gl.float32)
        gradient = _gradient(z, i * STEP + at, column, lse, scale, weight, SOFTCAP)
        gl.store(row + i * STEP + at, gradient.to(dtype))


def constants(size: int) -> dict[str, int]:
    """Of the kernel, for rows of so many columns. Where a multiprocessor has no room for two rows
    its one program has 32 warps, 7 to 12 % faster than 16 on an H100 at V 128,256."""
    threads = 512 if 4 * size <= HELD_BYTES else 1024
    block = threads * WIDE.value
    held = min(size // block, HELD_BYTES // (2 * block))
    return {"HELD": held, "AHEAD": AHEAD, "THREADS": threads}


def takes(logits_CV: Tensor) -> bool:
    """Whether the kernel can work on them: 16 bits each, rows that start at whole vectors and have
    two blocks at least (Triton indexes no ring of one), on a GPU of sm_90 or sm_100."""
    return (
        logits_CV.is_cuda
        and logits_CV.dtype in (torch.bfloat16, torch.float16)
        and constants(logits_CV.shape[1])["HELD"] >= 2
        and logits_CV.stride(0) % ALIGNED == 0
        and logits_CV.data_ptr() % (2 * ALIGNED) == 0
        and architecture(logits_CV.device) in (90, 100)
    )


def loss_and_gradient_(
    logits_CV: Tensor, column_C: Tensor, weight_C: Tensor, z_loss: float, softcap: float
) -> Tensor:
    """As `cross_entropy.loss_and_gradient_`, for logits that it `takes`."""
    rows, size = logits_CV.shape
    of_row = constants(size)
    out_2C = torch.empty(2, rows, dtype=torch.float32, device=logits_CV.device)
    with on(logits_CV):
        held_kernel[(rows,)](
            logits_CV, column_C, weight_C.contiguous(), *out_2C, size, logits_CV.stride(0),
            float(z_loss), float(softcap), **of_row, num_warps=of_row["THREADS"] // 32,
        )  # fmt: skip
    return out_2C
