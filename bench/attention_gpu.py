"""Attention on a CUDA device: ours and each peer, checked, then timed in the same run."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.attention import Shape, inputs, sees
from bench.attention_gpu_peers import (
    FLEX,
    FORWARD_ALONE,
    LATE,
    Call,
    bounds,
    compiled_mask,
    flash_calls,
    flashes,
    peers,
    told,
)
from bench.harness import Result
from hermes_core.attention import Backend, varlen_attention
from hermes_core.backends import obstacle
from hermes_core.segments import segments
from hermes_kernels import reference

Work = Callable[[], object]
Times = dict[str, dict[str, float]]  # milliseconds by name and pass

OURS: tuple[Backend, ...] = ("gluon", "triton")  # the first that runs is what ratios are to
RUNS, WARM_UPS = 20, 5
SETS = 4  # of inputs, taken in turn: together past any L2 cache
MATRIX = 8192
CLOCK_HZ = 2e9  # a data-centre GPU's is no faster, so that none spins for a shorter time
HOST_S = 5e-3  # the longest launch that is hidden


def run(shapes: Sequence[Shape]) -> Iterator[Result | str]:
    """Forward and backward of each peer, beside the matrix rate of this very run."""
    rate = matrix_rate()
    yield f"{torch.cuda.get_device_name()}: {rate:,.0f} TFLOP/s at {MATRIX} x {MATRIX}, bf16"
    yield "times are the device's, from a queue that the host has filled before"
    here, absent = flashes()
    yield from absent
    late = {name: here.pop(name) for name in LATE & here.keys()}
    device, known = torch.device("cuda"), list[Times]()
    for shape in shapes:
        known.append({})
        yield from at_shape(shape, device, rate, here, known[-1])
    for shape, times in zip(shapes if late else (), known, strict=False):
        yield f"\n{shape}"
        sets = [inputs(shape, str(device)) for _ in range(SETS)]
        loads, wanted = flash_calls(shape, device, late), truth(shape, sets[0])
        yield from others(shape, loads, sets, wanted, rate, times)


def at_shape(
    shape: Shape, device: torch.device, rate: float, flashes: dict[str, Any], times: Times
) -> Iterator[Result | str]:
    """Each that is right, ours first; stops where ours is wrong, goes on where a peer is."""
    yield f"\n{shape}"
    sets = [inputs(shape, str(device)) for _ in range(SETS)]
    wanted = truth(shape, sets[0])
    torch.cuda.empty_cache()
    for name, call in ours(shape, device).items():
        if wrong := error(call, sets[0], wanted):  # what ours raises ends the run, with its trace
            raise SystemExit(f"{name}: {wrong} at {shape}")
        yield from timed(shape, name, call, sets, rate, times)
    yield from others(shape, peers(shape, device, flashes), sets, wanted, rate, times)
    yield from once_a_batch(shape, device, times)


def others(
    shape: Shape, loads: dict[str, Callable[[], Call]], sets: list[list[Tensor]],
    wanted: list[Tensor], rate: float, times: Times,
) -> Iterator[Result | str]:  # fmt: skip
    """Each peer that can be had and is right."""
    for name, load in loads.items():
        torch.cuda.empty_cache()
        try:
            call = load()
        except Exception as problem:  # whatever a package of others raises
            yield f"{name}: skipped: {told(problem)}"
            continue
        forms = [(name, call), (f"{name}, forward", without_gradient(call))]
        for form, attempt in forms[name in FORWARD_ALONE :]:
            if not (wrong := fault(attempt, sets[0], wanted)):
                yield from timed(shape, form, attempt, sets, rate, times)
                break
            yield f"{form}: skipped: {wrong}"


def ours(shape: Shape, device: torch.device) -> dict[str, Call]:
    """Our kernels that can run here."""
    at = segments(np.concatenate([[0], np.cumsum(shape.lengths)]), device=device)
    calls: dict[str, Call] = {}
    why = {name: obstacle("attention", name, device, shape.dtype, shape.size) for name in OURS}
    for name in OURS:
        if not why[name]:
            calls[name] = functools.partial(varlen_attention, segments=at, backend=name)
    if not calls:
        raise SystemExit(f"ours cannot run here: {why}")
    return calls


def without_gradient(call: Call) -> Call:
    """The forward alone."""

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            return call(q, k, v)

    return forward


def truth(shape: Shape, one: list[Tensor]) -> list[Tensor]:
    """Output and gradients of the first key head and its query heads, in float64.

    One query head after the other: 16,384 tokens of one take some 10 GB on the way.
    """
    q, k, v, grad = one
    key, value = (x[:, :1].detach().double().requires_grad_() for x in (k, v))
    out, dq = [], []
    for head in range(shape.heads[0] // shape.heads[1]):
        query = q[:, head : head + 1].detach().double().requires_grad_()
        right = reference.varlen_attention(query, key, value, shape.lengths, shape.size**-0.5)
        right.backward(grad[:, head : head + 1].double())  # type: ignore[no-untyped-call]
        out.append(right.detach())
        dq.append(query.grad)
    return [torch.cat(out, 1), torch.cat(dq, 1), key.grad, value.grad]


def fault(call: Call, one: list[Tensor], wanted: list[Tensor]) -> str:
    """Why a peer is not timed: it refuses, or is wrong; "" if neither."""
    try:
        return error(call, one, wanted)
    except Exception as problem:  # compilers of others have errors of their own
        return told(problem)


def error(call: Call, one: list[Tensor], wanted: list[Tensor]) -> str:
    """What is off by more than bf16 rounds; "" if nothing."""
    q, k, v, grad = one
    out = call(q, k, v)
    got = [out]
    if out.requires_grad:
        got += torch.autograd.grad(out, (q, k, v), grad)
    for what, found, right in zip(("out", "dq", "dk", "dv"), got, wanted, strict=False):
        off = float((found.detach()[:, : right.shape[1]] - right).norm() / right.norm())
        if not off < 1e-2:
            return f"{what} is off by {off:.1e}"
    return ""


def timed(
    shape: Shape, name: str, call: Call, sets: list[list[Tensor]], rate: float, times: Times
) -> Iterator[Result | str]:
    """The passes of a call, which enter ``times``; those of the first name are ours."""
    turns = cycle(sets)

    def forward() -> Work:
        q, k, v, _ = next(turns)
        return lambda: call(q, k, v)

    def backward() -> Work:
        q, k, v, grad = next(turns)
        out = call(q, k, v)
        return lambda: torch.autograd.grad(out, (q, k, v), grad)

    passes = [("forward", forward, 1.0), ("backward", backward, 2.5)]
    if not call(*sets[0][:3]).requires_grad:
        passes.pop()
    for what, ready, flops in passes:
        try:
            spent, peak = milliseconds(ready), peak_bytes(ready)
        except Exception as problem:
            yield f"{name}: {what} skipped: {told(problem)}"
            return
        middle = statistics.median(spent)
        times.setdefault(name, {})[what] = middle
        base = next(iter(times.values())).get(what, math.nan)
        speed = flops * shape.flops / middle / 1e9
        notes = (
            f"{what}, {speed:,.0f} TFLOP/s, {speed / rate:.0%} of the matrix rate, "
            f"{middle / base:.2f} x ours, {peak / 2**20:,.0f} MiB more at its peak"
        )
        yield told_as(f"attention {what}", shape, name, spent, notes)


def once_a_batch(shape: Shape, device: torch.device, times: Times) -> Iterator[Result | str]:
    """What FlexAttention's mask takes, made of each token's segment; and our segments."""
    from torch.nn.attention.flex_attention import create_block_mask

    cu_seqlens, see, tokens = bounds(shape, device), sees(shape, str(device)), shape.tokens
    spent = milliseconds(lambda: lambda: segments(cu_seqlens, tokens))
    yield told_as("attention once a batch", shape, "our segments", spent, "once a batch")
    own = statistics.median(spent)
    for name, make in (("eager", create_block_mask), ("compiled", compiled_mask())):
        name = f"FlexAttention's mask, {name}"
        work = functools.partial(make, see, None, None, tokens, tokens, device=str(device))
        try:
            spent = milliseconds(lambda work=work: work)  # type: ignore[misc]
        except Exception as problem:
            yield f"{name}: skipped: {told(problem)}"
            continue
        mask = statistics.median(spent)
        base = next(iter(times.values()))
        notes = "once a batch"
        for what, theirs in times.get(FLEX, {}).items():
            ratio = (theirs + mask) / (base.get(what, math.nan) + own)
            notes += f"; with one {what} {ratio:.2f} x ours and our segments"
        yield told_as("attention once a batch", shape, name, spent, notes)


def told_as(op: str, shape: Shape, name: str, spent: list[float], notes: str) -> Result:
    return Result(
        op=op,
        shape=str(shape),
        dtype=str(shape.dtype).removeprefix("torch."),
        backend=name,
        unit="ms",
        value=statistics.median(spent),
        spread=(min(spent), max(spent)),
        runs=len(spent),
        notes=notes,
    )


def matrix_rate() -> float:
    """TFLOP/s of a large product in bf16, now and here, the clocks settled."""
    a, b = (torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(200):
        a @ b
    return 2 * MATRIX**3 / statistics.median(milliseconds(lambda: lambda: a @ b)) / 1e9


def milliseconds(ready: Callable[[], Work]) -> list[float]:
    """Of each of `RUNS` runs, on the device's clock, after some that are not counted.

    ``ready`` makes what is timed, itself untimed. The device spins until all of it is launched:
    it is the kernels that are timed, for all alike, and not how fast Python launches them.
    """
    spent, host_s = list[float](), math.inf
    for turn in range(WARM_UPS + RUNS):
        work = ready()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(CLOCK_HZ * 2 * min(host_s + 5e-4, HOST_S)))
        start.record()
        began = time.perf_counter()
        work()
        host_s = min(host_s, time.perf_counter() - began)
        end.record()
        torch.cuda.synchronize()
        if turn >= WARM_UPS:
            spent.append(start.elapsed_time(end))
    return spent


def peak_bytes(ready: Callable[[], Work]) -> int:
    """Memory that one run takes at its peak beyond what stood before it."""
    work = ready()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
