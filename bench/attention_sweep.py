"""Every launch worth trying of the attention kernels, timed on the GPU that is here.

What wins belongs into `hermes_kernels.launch.TABLE`: nothing is tuned at a user's first step. Each
candidate is compiled beforehand, as many at once as there are cores.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple
from multiprocessing import get_context

import numpy as np
import torch

from bench.attention import Shape, lognormal
from bench.harness import Result
from bench.machine_code import SHARED_BYTES
from hermes_core.segments import segments
from hermes_kernels import launch, varlen_attention
from hermes_kernels.launch import Kernel, Launch

RUNS, CYCLES_BEFORE = 15, 400_000  # a pause of the device in which the host queues what is timed
KERNELS: tuple[Kernel, ...] = ("forward", "dq", "dkdv")
HEADS = (64, 8)
TILES = {64: (64, 128), 128: (32, 64, 128), 256: (32, 64)}  # of what a program walks over
Job = tuple[Kernel, int, Launch]


def candidates(kernel: Kernel, size: int) -> list[Launch]:
    """Tiles that shared memory has room for, by the warps that have registers for them on Hopper.

    Two groups of warps compute a tile of 128 rows, one a tile of 64; where warps are specialised
    the compiler makes the second group itself.
    """
    found = []
    warps = {64: ((4, False), (4, True)), 128: ((8, False), (4, True))}
    for own, other, stages in itertools.product(warps, TILES[size], (1, 2, 3)):
        held = 1 if kernel == "forward" else 2
        if 2 * size * (held * own + 2 * stages * other) > SHARED_BYTES:
            continue
        queries, keys = (other, own) if kernel == "dkdv" else (own, other)
        found += [
            Launch(queries, keys, count, stages, specialize)
            for count, specialize in warps[own]
            if not (specialize and (stages == 1 or size == 256))
        ]
    return found


def run() -> Iterator[Result | str]:
    """Milliseconds of each candidate at two packings of a row of 16,384."""
    jobs = [(k, size, how) for size in TILES for k in KERNELS for how in candidates(k, size)]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        refused = dict(zip(jobs, pool.map(compile_job, jobs), strict=True))
    for mean, (size, kernel) in itertools.product((4096, 1024), itertools.product(TILES, KERNELS)):
        shape = Shape(f"mean {mean:,}", lognormal(mean, 16_384), HEADS, size, torch.bfloat16)
        yield f"\n{kernel}, {shape}"
        found = []
        for job in (job for job in jobs if job[:2] == (kernel, size)):
            if not refused[job]:
                found.append((milliseconds(call_of(job, shape)), job[2]))
            elif mean == 4096:
                yield f"{astuple(job[2])}: {refused[job]}"
        for spent, how in sorted(found, key=lambda pair: pair[0]):
            yield result(shape, kernel, how, spent)


def result(shape: Shape, kernel: Kernel, how: Launch, spent: tuple[float, float, float]) -> Result:
    products = {"forward": 2, "dq": 3, "dkdv": 4}[kernel]
    speed = shape.flops * products / 2 / spent[0] / 1e9
    in_table = how == launch.launch_of(
        launch.architecture(torch.device("cuda")), kernel, shape.size
    )
    return Result(
        op=f"attention {kernel}",
        shape=str(shape),
        dtype="bfloat16",
        backend=f"{kernel} {astuple(how)}",
        unit="ms",
        value=spent[0],
        spread=spent[1:],
        runs=RUNS,
        notes=f"{speed:,.0f} TFLOP/s of its own products" + (", in the table" if in_table else ""),
    )


def compile_job(job: Job) -> str:
    """Why a candidate does not run; "" if it does, and is in Triton's cache now."""
    shape = Shape("two", (512, 512), HEADS, job[1], torch.bfloat16)
    try:
        call_of(job, shape)()
        torch.cuda.synchronize()
    except Exception as problem:  # resources, or the compiler gave up: the next one is tried
        return f"{type(problem).__name__}: {problem}".partition("\n")[0][:100]
    return ""


def call_of(job: Job, shape: Shape) -> Callable[[], object]:
    """One kernel as `hermes_kernels.varlen_attention` launches it, but by this launch."""
    kernel, size, how = job
    (heads, kv_heads), tokens = shape.heads, shape.tokens
    q, k, v, dout = (
        torch.randn(tokens, n, size, device="cuda", dtype=shape.dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    at = segments(np.concatenate([[0], np.cumsum(shape.lengths)]), device="cuda")
    forward = (q, k, v, at.starts, at.query_order, size**-0.5)
    out, lse = varlen_attention.forward(*forward)
    rest = (q, k, v, dout, lse, varlen_attention.delta_of(out, dout, lse))
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: varlen_attention.forward(*forward),
        "dq": lambda: varlen_attention.dq_of(*rest, at.starts, at.query_order, size**-0.5),
        "dkdv": lambda: varlen_attention.dkdv_of(*rest, at.ends, at.key_order, size**-0.5),
    }

    def call() -> object:
        key = (launch.architecture(q.device), kernel, size)
        known, launch.TABLE[key] = launch.TABLE[key], how
        try:
            return calls[kernel]()
        finally:
            launch.TABLE[key] = known

    return call


def milliseconds(call: Callable[[], object]) -> tuple[float, float, float]:
    """Median, fastest and slowest by the device's clock."""
    spent = []
    for turn in range(RUNS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(CYCLES_BEFORE)
        start.record()  # type: ignore[no-untyped-call]
        call()
        end.record()  # type: ignore[no-untyped-call]
        end.synchronize()
        if turn >= 2:
            spent.append(float(start.elapsed_time(end)))
    spent.sort()
    return spent[len(spent) // 2], spent[0], spent[-1]
