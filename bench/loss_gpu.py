"""The loss on a GPU, at the shape of a training step, against every peer that imports.

Shapes: M kept positions, D model size, V vocabulary.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.harness import Result
from bench.loss import IGNORE, Call, Peer, gate, ours, peers, problem

VOCABULARY, SIZE, POSITIONS = 128_256, 5_120, 16_384
KEPT = (0.3, 0.6, 1.0)
RUNS = 20

# Peers that are whole-logits or fp32 at this shape run in the CPU's table alone.
BUILT_IN = (
    "F.cross_entropy",
    "F.cross_entropy, torch.compile",
    "F.linear_cross_entropy, chunked",
    "kept rows, 8 chunks (torchtune)",
)


def liger(chunk_mem_const: int) -> Call:
    function = importlib.import_module("liger_kernel.ops").LigerFusedLinearCrossEntropyFunction

    def call(hidden: Tensor, weight: Tensor, labels: Tensor, kept: int) -> Tensor:
        arguments = (None, None, IGNORE, 0.0, 0.0, "sum", None, False, None, False, False, False)
        found = function.apply(hidden, weight, labels, *arguments, chunk_mem_const)
        return found[0] / kept if isinstance(found, tuple) else found / kept

    return call


def cce() -> Call:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy

    def call(hidden: Tensor, weight: Tensor, labels: Tensor, kept: int) -> Tensor:
        return function(hidden, weight, labels, reduction="sum") / kept  # type: ignore[no-any-return]

    return call


def quack() -> Call:
    function = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy

    def call(hidden: Tensor, weight: Tensor, labels: Tensor, kept: int) -> Tensor:
        return function(hidden, weight, labels, reduction="sum") / kept  # type: ignore[no-any-return]

    return call


OTHERS: dict[str, Callable[[], Call]] = {
    "Liger, chunk_mem_const 1": lambda: liger(1),
    "Liger, chunk_mem_const 16": lambda: liger(16),
    "CCE": cce,
    "quack": quack,
}


def run() -> Iterator[Result | str]:
    """Milliseconds, share of the products' floor at the rate measured here, and peak memory."""
    everyone = [peer for peer in peers() if peer.name in BUILT_IN]
    for name, load in OTHERS.items():
        try:
            everyone.append(Peer(name, load(), compacts=name == "CCE"))
        except (ImportError, AttributeError) as error:
            yield f"{name}: skipped, not importable ({error})"
    # A peer whose interface has moved, or whose result is wrong, is told and given no time.
    sound = []
    for peer in everyone:
        try:
            gate([peer], "cuda")
            sound.append(peer)
        except (SystemExit, TypeError, RuntimeError) as error:
            yield f"{peer.name}: skipped ({error})"
    gate([], "cuda")
    rate = matmul_rate()
    yield f"gate passed; {torch.cuda.get_device_name()}, bf16 products {rate / 1e12:.0f} TFLOP/s"
    for share in KEPT:
        given = problem(POSITIONS, VOCABULARY, SIZE, share, torch.bfloat16, "cuda")
        floor = 1e3 * 6 * given[3] * VOCABULARY * SIZE / rate
        mine = timed(ours, given)
        yield told("hermes_core", share, mine, f"{floor / mine[0][0]:.2f} of the floor")
        for peer in sound:
            try:
                theirs = timed(peer.call, given)
            except torch.cuda.OutOfMemoryError:
                yield f"{peer.name}: out of memory"
                continue
            yield told(peer.name, share, theirs, f"{theirs[0][0] / mine[0][0]:.2f} x our time")


def matmul_rate() -> float:
    """FLOP/s of one large bf16 product, the yardstick of this run."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    median, *_ = milliseconds(lambda: a @ a)
    return 2 * 8192**3 / (1e-3 * median)


def milliseconds(call: Callable[[], object]) -> tuple[float, float, float]:
    """Median, fastest and slowest by the device's clock; each call reads past every cache."""
    call()
    times = []
    for _ in range(RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()  # type: ignore[no-untyped-call]
        call()
        end.record()  # type: ignore[no-untyped-call]
        end.synchronize()
        times.append(float(start.elapsed_time(end)))
    return statistics.median(times), min(times), max(times)


def timed(
    call: Call, given: tuple[Tensor, Tensor, Tensor, int]
) -> tuple[tuple[float, float, float], float]:
    """Milliseconds of forward + backward, and peak GB beyond inputs and gradients."""
    hidden, weight, labels, kept = given

    def step() -> None:
        hidden.grad = weight.grad = None
        call(hidden, weight, labels, kept).backward()  # type: ignore[no-untyped-call]

    found = milliseconds(step)
    hidden.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated() - before - hidden.nbytes - weight.nbytes
    return found, peak / 1e9


def told(
    name: str, share: float, found: tuple[tuple[float, float, float], float], note: str
) -> Result:
    (median, low, high), peak = found
    note = f"{share:.0%} kept; {peak:.2f} GB beyond gradients; {note}"
    return Result(
        "loss", f"V {VOCABULARY}, D {SIZE}, {share:.0%} of {POSITIONS} kept", "bfloat16", name,
        "ms", median, (low, high), RUNS, note,
    )  # fmt: skip
