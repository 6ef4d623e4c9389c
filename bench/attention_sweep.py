"""Every launch worth trying of the attention kernels in Triton, timed on the GPU that is here.

What wins belongs into `hermes_kernels.launch.TABLE`: nothing is tuned at a user's first step. Each
candidate is compiled and tried beforehand, as many at once as there are cores, in a process of its
own: after an illegal instruction a process can use its GPU no more. A candidate whose result is not
that of the table's launch is told as wrong and never timed.
"""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch
from torch import Tensor

from bench.attention import Shape, lognormal
from bench.attention_gpu import milliseconds
from bench.harness import Result
from bench.machine_code import SHARED_BYTES
from hermes_core.segments import segments
from hermes_kernels import launch, varlen_attention
from hermes_kernels.launch import Kernel, Launch

PRODUCTS: dict[Kernel, int] = {"forward": 2, "dq": 3, "dkdv": 4}
HEADS = (64, 8)
TOLERANCE = 1e-2  # between two launches of a kernel in bf16, as a share of the norm
TILES = {64: (64, 128), 128: (32, 64, 128), 256: (32, 64)}  # of what a program walks over
Job = tuple[Kernel, int, Launch]
Call = Callable[[Launch], list[Tensor]]


def candidates(kernel: Kernel, size: int) -> list[Launch]:
    """Tiles that shared memory has room for, by the warps that have registers for them on Hopper.

    Two groups of four warps compute a tile of 128 rows, one a tile of 64, where heads of 256 leave
    one too few.
    """
    found = []
    warps = {64: (4, 8) if size == 256 else (4,), 128: (8,)}
    for own, other, stages in itertools.product(warps, TILES[size], (1, 2, 3)):
        held = 1 if kernel == "forward" else 2
        if 2 * size * (held * own + 2 * stages * other) > SHARED_BYTES:
            continue
        queries, keys = (other, own) if kernel == "dkdv" else (own, other)
        found += [Launch(queries, keys, count, stages) for count in warps[own]]
    return found


def run() -> Iterator[Result | str]:
    """Milliseconds of each candidate at two packings of a row of 16,384."""
    if not torch.cuda.is_available():
        raise SystemExit("--sweep times launches, and there is no CUDA device; see --static")
    kinds = [(k, size) for size in TILES for k in PRODUCTS if in_table(k, size)]
    jobs = [(*kind, how) for kind in kinds for how in candidates(*kind)]
    at_once, context = min(16, os.cpu_count() or 1), get_context("spawn")
    with ProcessPoolExecutor(at_once, context, max_tasks_per_child=1) as pool:
        refused = dict(zip(jobs, pool.map(compile_job, jobs), strict=True))
    for mean, (kernel, size) in itertools.product((4096, 1024), kinds):
        shape = Shape(f"mean {mean:,}", lognormal(mean, 16_384), HEADS, size, torch.bfloat16)
        yield f"\n{kernel}, {shape}"
        call, found = call_of(kernel, shape), []
        for how in candidates(kernel, size):
            if why := refused[kernel, size, how] or fault(call, how, in_table(kernel, size)):
                yield f"{astuple(how)}: {why}"
            else:
                found.append((milliseconds(partial(partial, call, how)), how))
        for spent, how in sorted(found, key=lambda pair: statistics.median(pair[0])):
            yield result(shape, kernel, how, spent)


def in_table(kernel: Kernel, size: int) -> Launch | None:
    """The table's launch for the GPU that is here."""
    return launch.TABLE.get((launch.architecture(torch.device("cuda")), kernel, size))


def result(shape: Shape, kernel: Kernel, how: Launch, spent: list[float]) -> Result:
    middle = statistics.median(spent)
    speed = shape.flops * PRODUCTS[kernel] / 2 / middle / 1e9
    ours = ", in the table" if how == in_table(kernel, shape.size) else ""
    return Result(
        op=f"attention {kernel}",
        shape=str(shape),
        dtype="bfloat16",
        backend=f"{kernel} {astuple(how)}",
        unit="ms",
        value=middle,
        spread=(min(spent), max(spent)),
        runs=len(spent),
        notes=f"{speed:,.0f} TFLOP/s of its own products{ours}",
    )


def compile_job(job: Job) -> str:
    """Why a candidate does not run or is wrong; "" if neither, and it is in Triton's cache now."""
    kernel, size, how = job
    shape = Shape("two", (512, 512), HEADS, size, torch.bfloat16)
    return fault(call_of(kernel, shape), how, in_table(kernel, size))


def fault(call: Call, how: Launch, known: Launch | None) -> str:
    """Why a launch does not run, or how far it is from what the known one computes; "" if fine."""
    assert known is not None
    wanted = call(known)
    try:
        got = call(how)
        torch.cuda.synchronize()
    except Exception as problem:  # resources, or the compiler gave up: the next one is tried
        return f"{type(problem).__name__}: {problem}".partition("\n")[0][:100]
    offs = [float((x - y).norm() / y.norm()) for x, y in zip(got, wanted, strict=True)]
    if all(off <= TOLERANCE for off in offs):  # no NaN is
        return ""
    return f"WRONG: off by {', '.join(f'{off:.1e}' for off in offs)} from {astuple(known)}"


def call_of(kernel: Kernel, shape: Shape, device: str = "cuda") -> Call:
    """One kernel as `hermes_kernels.varlen_attention` launches it, by the launch it is given."""
    (heads, kv_heads), tokens, size = shape.heads, shape.tokens, shape.size
    q, k, v, dout = (
        torch.randn(tokens, n, size, device=device, dtype=shape.dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    at = segments(np.concatenate([[0], np.cumsum(shape.lengths)]), device=device)
    forward = (q, k, v, at.places, size**-0.5)
    out, lse = varlen_attention.forward(*forward)
    rest = (q, k, v, dout, *varlen_attention.statistics_of(out, dout, lse))
    calls: dict[Kernel, Callable[[], tuple[Tensor, ...]]] = {
        "forward": lambda: varlen_attention.forward(*forward),
        "dq": lambda: (varlen_attention.dq_of(*rest, at.places, size**-0.5),),
        "dkdv": lambda: varlen_attention.dkdv_of(*rest, at.places, size**-0.5),
    }

    def call(how: Launch) -> list[Tensor]:
        key = (launch.architecture(q.device), kernel, size)
        known, launch.TABLE[key] = launch.TABLE[key], how
        try:
            return list(calls[kernel]())
        finally:
            launch.TABLE[key] = known

    return call
