"""Attention on a CUDA device: every peer that imports, checked, then timed in the same run.

Not run by us yet: there was no GPU.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import cast

import numpy as np
import torch
from torch import Tensor

from bench.attention import Shape, block_mask, flex_attention, inputs
from bench.harness import Result
from hermes_core.attention import Backend, varlen_attention
from hermes_core.backends import obstacle
from hermes_core.segments import segments
from hermes_kernels import reference

Call = Callable[[Tensor, Tensor, Tensor], Tensor]

RUNS = 20
SETS = 4  # of inputs, taken in turn: together past any L2 cache
MATRIX = 8192


def run(shapes: Sequence[Shape]) -> Iterator[Result | str]:
    """Forward and backward of each peer, beside the matrix rate of this very run."""
    device = torch.device("cuda")
    rate = matrix_rate()
    yield f"{torch.cuda.get_device_name()}: {rate:,.0f} TFLOP/s at {MATRIX} x {MATRIX}, bf16"
    for shape in shapes:
        sets = [inputs(shape, "cuda") for _ in range(SETS)]
        calls = peers(shape, sets, device)
        yield f"\n{shape}"
        wanted = truth(shape, sets[0])
        for name, call in calls.items():
            if wrong := fault(call, sets[0], wanted):
                raise SystemExit(f"{name}: {wrong} at {shape}")
        whole = cudnn(shape)
        for name, call in (("cudnn", whole), ("cudnn, forward", without_gradient(whole))):
            if not (wrong := fault(call, sets[0], wanted)):
                calls[name] = call
                break
            yield f"{name}: skipped: {wrong}"
        ours: dict[str, float] = {}
        for name, make in calls.items():
            yield from timed(shape, name, make, sets, rate, ours)
        yield from mask_creation(shape, device)


def peers(shape: Shape, sets: list[list[Tensor]], device: torch.device) -> dict[str, Call]:
    """What can run here, ours first."""
    at = segments(np.concatenate([[0], np.cumsum(shape.lengths)]), device=device)
    calls: dict[str, Call] = {}
    names: tuple[Backend, ...] = ("triton", "gluon", "torch", "flash")
    for name in names:
        if not obstacle("attention", name, device, shape.dtype, shape.size):
            calls[name] = functools.partial(varlen_attention, segments=at, backend=name)
    calls["flex, mask prebuilt"] = flex_attention(block_mask(shape, str(device)))
    return calls


def cudnn(shape: Shape) -> Call:
    """cuDNN's variable-length attention, called as PyTorch's `varlen_attn` would."""
    bounds = torch.tensor([0, *np.cumsum(shape.lengths)], dtype=torch.int32, device="cuda")
    longest = max(shape.lengths)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, *_ = torch.ops.aten._cudnn_attention_forward(
            q, k, v, None, bounds, bounds, longest, longest, True, 0.0, True, False,
            scale=shape.size**-0.5,
        )  # fmt: skip
        return cast(Tensor, out)

    return call


def without_gradient(call: Call) -> Call:
    """The forward alone."""

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            return call(q, k, v)

    return forward


def truth(shape: Shape, one: list[Tensor]) -> list[Tensor]:
    """Output and gradients of the first key head and its query heads, in float64."""
    q, k, v, grad = one
    group, lengths = shape.heads[0] // shape.heads[1], shape.lengths
    wide = [x[:, :n].detach().double().requires_grad_() for x, n in ((q, group), (k, 1), (v, 1))]
    right = reference.varlen_attention(*wide, lengths, shape.size**-0.5)
    return [right.detach(), *torch.autograd.grad(right, wide, grad[:, :group].double())]


def fault(call: Call, one: list[Tensor], wanted: list[Tensor]) -> str:
    """Why a peer is not timed: it refuses, or is off by more than bf16 rounds; "" if neither."""
    q, k, v, grad = one
    try:
        out = call(q, k, v)
        got = [out]
        if out.requires_grad:
            got += torch.autograd.grad(out, (q, k, v), grad)
    except RuntimeError as problem:
        return str(problem).partition("\n")[0]
    for what, ours, right in zip(("out", "dq", "dk", "dv"), got, wanted, strict=False):
        error = (ours[:, : right.shape[1]] - right).norm() / right.norm()
        if not error < 1e-2:
            return f"{what} is off by {error:.1e}"
    return ""


def timed(
    shape: Shape, name: str, call: Call,
    sets: list[list[Tensor]], rate: float, ours: dict[str, float],
) -> Iterator[Result]:  # fmt: skip
    torch.cuda.reset_peak_memory_stats()
    turns = cycle(sets)

    def forward() -> Tensor:
        q, k, v, _ = next(turns)
        with torch.no_grad():
            return call(q, k, v)

    saved = [(call(*one[:3]), one) for one in sets]
    grads = cycle(saved)
    differentiable = saved[0][0].requires_grad

    def backward() -> tuple[Tensor, ...]:
        out, (q, k, v, grad) = next(grads)
        return torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)

    passes = (("forward", forward, 1.0), ("backward", backward, 2.5))
    for what, work, flops in passes[: 1 + differentiable]:
        spent = milliseconds(work)
        middle = statistics.median(spent)
        speed = flops * shape.flops / middle / 1e9
        ratio = middle / ours.setdefault(what, middle)
        memory = torch.cuda.max_memory_allocated() / 2**30
        yield Result(
            op=f"attention {what}",
            shape=str(shape),
            dtype="bfloat16",
            backend=name,
            unit="ms",
            value=middle,
            spread=(min(spent), max(spent)),
            runs=RUNS,
            notes=f"{what}, {speed:,.0f} TFLOP/s, {speed / rate:.0%} of the matrix rate, "
            f"{ratio:.2f} x ours, peak {memory:.1f} GiB",
        )


def mask_creation(shape: Shape, device: torch.device) -> Iterator[Result]:
    """What FlexAttention pays once a batch, beside what our segments cost."""
    bounds = torch.tensor([0, *np.cumsum(shape.lengths)], dtype=torch.int32, device=device)
    makers: dict[str, Callable[[], object]] = {
        "flex, its mask": lambda: block_mask(shape, str(device)),
        "triton, its segments": lambda: segments(bounds, shape.tokens),
    }
    for name, make in makers.items():
        spent = milliseconds(make)
        yield Result(
            op="attention once a batch",
            shape=str(shape),
            dtype="int32",
            backend=name,
            unit="ms",
            value=statistics.median(spent),
            spread=(min(spent), max(spent)),
            runs=RUNS,
            notes="once a batch",
        )


def matrix_rate() -> float:
    """TFLOP/s of a large product in bf16, now and here."""
    a, b = (torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * MATRIX**3 / statistics.median(milliseconds(lambda: a @ b)) / 1e9


def milliseconds(work: Callable[[], object]) -> list[float]:
    """Of each of `RUNS` runs, on the device's clock, after three that are not counted."""
    spent = []
    for turn in range(RUNS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if turn >= 3:
            spent.append(start.elapsed_time(end))
    return spent
