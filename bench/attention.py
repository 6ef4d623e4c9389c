"""Attention inside segments against what a user would otherwise run.

On a CPU: a dense block-diagonal mask, a loop over segments, compiled FlexAttention, by turns. On a
GPU: every flash-attn that is installed, PyTorch's varlen (FlashAttention-2), cuDNN, and compiled
FlexAttention, its mask made once a batch. All in one process, each checked before it is timed.

Shapes: T packed tokens, N query heads, K key heads, H head size.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.harness import Result, chosen
from hermes_core.attention import varlen_attention
from hermes_core.segments import segments
from hermes_kernels import reference

Call = Callable[[], Tensor]
SPIN_S = 0.03  # OpenMP's idle threads sleep well before


@dataclass(frozen=True)
class Shape:
    """One batch: what is in its row, and the heads."""

    name: str
    lengths: tuple[int, ...]
    heads: tuple[int, int]
    size: int
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def flops(self) -> float:
        """Of a forward, by the exact causal area: two products of H a score."""
        area = sum(n * (n + 1) / 2 for n in self.lengths)
        return 4 * area * self.size * self.heads[0]

    def __str__(self) -> str:
        n, k = self.heads
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.tokens} tokens, {self.name}, {n}:{k} heads of {self.size}, {kind}"


def lognormal(mean: int, tokens: int) -> tuple[int, ...]:
    """Segment lengths of sigma 1 that fill ``tokens``."""
    generator, lengths = torch.Generator().manual_seed(1), list[int]()
    while (room := tokens - sum(lengths)) > 0:
        draw = torch.empty(1).log_normal_(math.log(mean) - 0.5, 1.0, generator=generator)
        lengths.append(int(draw.clamp(1, room)))
    return tuple(lengths)


def cpu_shapes() -> list[Shape]:
    """A row of 4,096, 8:2 heads of 64."""
    packings = {
        "mean 256": lognormal(256, 4096),
        "mean 1,024": lognormal(1024, 4096),
        "one segment": (4096,),
        "256 of 1, 240 of 16": (1,) * 256 + (16,) * 240,
    }
    return [
        Shape(name, lengths, (8, 2), 64, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for name, lengths in packings.items()
    ]


def gpu_shapes() -> list[Shape]:
    """A row of 16,384 by the recipes of 70B and 14B, and one rank of eight under TP."""
    packings = {
        "mean 1,024": lognormal(1024, 16_384),
        "mean 4,096": lognormal(4096, 16_384),
        "one segment": (16_384,),
    }
    return [
        Shape(name, lengths, heads, 128, torch.bfloat16)
        for heads in ((64, 8), (40, 8), (8, 1))
        for name, lengths in packings.items()
    ]


def run(only: str = "") -> Iterator[Result | str]:
    """Forward, and forward with backward, at the shapes of the device that is here."""
    if torch.cuda.is_available():
        from bench.attention_gpu import run as run_gpu

        yield from run_gpu(chosen(gpu_shapes(), only))
        return
    yield f"no CUDA device: CPU shapes, {torch.get_num_threads()} threads, CPU time of all threads"
    for shape in chosen(cpu_shapes(), only):
        yield from on_cpu(shape)


def on_cpu(shape: Shape) -> Iterator[Result | str]:
    q, k, v, grad = inputs(shape)
    calls = peers(shape, q, k, v)
    check(shape, calls, q, k, v)
    yield f"\n{shape}"

    def backward(call: Call) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(), (q, k, v), grad)

    with torch.no_grad():
        yield from compare(shape, "forward", calls, runs=7)
    both = {name: backward(call) for name, call in calls.items() if name != "flex"}
    slow = sum(shape.lengths) / len(shape.lengths) < 32  # the loop's gradient is quadratic there
    yield from compare(shape, "forward + backward", both, runs=1 if slow else 3)


def inputs(shape: Shape, device: str = "cpu") -> list[Tensor]:
    """q, k, v, wanting gradients, and a gradient of the output."""
    generator = torch.Generator(device).manual_seed(0)
    n, k = shape.heads
    sizes = [(shape.tokens, heads, shape.size) for heads in (n, k, k, n)]
    drawn = [torch.randn(s, generator=generator, device=device).to(shape.dtype) for s in sizes]
    return [*(x.requires_grad_() for x in drawn[:3]), drawn[3]]


def peers(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    """What computes the same on a CPU; masks are made before, and not timed."""
    at = segments(np.concatenate([[0], np.cumsum(shape.lengths)]))
    owner = torch.repeat_interleave(torch.tensor(shape.lengths))
    mask = (owner[:, None] == owner) & torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    return {
        "hermes_core cpu": lambda: varlen_attention(q, k, v, at, backend="cpu"),
        "SDPA, dense mask": lambda: dense(q, k, v, mask),
        "SDPA, loop": lambda: loop(q, k, v, shape.lengths),
        "flex": flex(q, k, v, shape),
    }


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    rows = (x.transpose(0, 1)[None] for x in (q, k, v))
    return scaled_dot_product_attention(*rows, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


def loop(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Segment by segment into slices of one output."""
    out, start = torch.empty_like(q), 0
    for length in lengths:
        at = slice(start, start + length)
        rows = (x[at].transpose(0, 1)[None] for x in (q, k, v))
        one = scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)
        out[at] = one[0].transpose(0, 1)
        start += length
    return out


def flex(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Call:
    """Compiled FlexAttention, its mask prebuilt; forward alone on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled, mask = torch.compile(flex_attention), block_mask(shape, "cpu")

    def call() -> Tensor:
        rows = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
        with torch.no_grad():
            return compiled(*rows, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)  # type: ignore[no-any-return]

    return call


def block_mask(shape: Shape, device: str) -> object:
    """FlexAttention's mask of causal segments."""
    from torch.nn.attention.flex_attention import create_block_mask

    see = sees(shape, device)
    return create_block_mask(see, None, None, shape.tokens, shape.tokens, device=device)


def sees(shape: Shape, device: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether query i sees key j, as FlexAttention asks it: by the segment of each token."""
    owner = torch.repeat_interleave(torch.tensor(shape.lengths, device=device))

    def together(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (owner[i] == owner[j]) & (i >= j)

    return together


def check(shape: Shape, calls: dict[str, Call], q: Tensor, k: Tensor, v: Tensor) -> None:
    """Stop unless each errs no more than ten times what PyTorch's loop errs against float64."""
    wide = [x.detach().double() for x in (q, k, v)]
    with torch.no_grad():
        right = reference.varlen_attention(*wide, shape.lengths, shape.size**-0.5)
        allowed = (loop(q, k, v, shape.lengths) - right).norm()
        for name, call in calls.items():
            error = (call() - right).norm()
            if not error <= 10 * allowed:
                raise SystemExit(f"{name} is off by {error:.2e} at {shape}; {allowed:.2e} allowed")


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU time of all threads."""
    time.sleep(SPIN_S)
    gc.collect()
    gc.disable()
    try:
        started = time.process_time()
        call()
        return time.process_time() - started
    finally:
        gc.enable()


def compare(
    shape: Shape, what: str, calls: dict[str, Callable[[], object]], *, runs: int
) -> Iterator[Result]:
    """Times by turns, so that what else the machine does disturbs all alike.

    What one call leaves behind is not the next one's time: OpenMP's threads, which spin for some
    milliseconds, and garbage, whose collection takes 0.3 s once FlexAttention has been compiled.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(runs + 1):
        for name, call in calls.items():
            spent = cpu_seconds(call)
            if turn:  # the first warms up
                times[name].append(1e3 * spent)
    ours = statistics.median(next(iter(times.values())))
    for name, spent in times.items():
        middle = statistics.median(spent)
        yield Result(
            op=f"attention {what}",
            shape=str(shape),
            dtype=str(shape.dtype).removeprefix("torch."),
            backend=name,
            unit="ms",
            value=middle,
            spread=(min(spent), max(spent)),
            runs=runs,
            notes=f"{what}, {middle / ours:.2f} x ours",
        )
