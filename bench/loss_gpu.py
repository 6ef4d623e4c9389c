"""The loss on a GPU, at the shape of a training step, against every peer that imports.

Ours comes first at every share, then one peer after another, and each figure is told when it is
there: a run that is cut off has told what it found. Two to three minutes, half of them compiling.

Shapes: M kept positions, D model size, V vocabulary.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import loss
from bench.harness import Result
from bench.loss import IGNORE, Call, Peer, gate, mask, ours, problem
from hermes_core.loss import linear_cross_entropy

DEVICE = "cuda"
VOCABULARY, SIZE, POSITIONS = 128_256, 5_120, 16_384
KEPT = (0.3, 0.6, 1.0)
# Sizes that CCE and quack take; CCE drops no gradient at so few ids.
GATE_SHAPE = (512, 2_048, 256)
RUNS, LEAST_RUNS = 20, 7
ENOUGH_MS = 1_000  # of runs, once there are `LEAST_RUNS`
SLOW_MS = 600  # who takes longer is timed once

Given = tuple[Tensor, Tensor, Tensor, int]  # hidden, weight, labels, M


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    given: Given
    peaked: bool = False


@dataclass(frozen=True, slots=True)
class Timed:
    """Forward + backward; ``peak_gb`` counts from the inputs and gradients on."""

    ms: float
    fastest_ms: float
    slowest_ms: float
    runs: int
    peak_gb: float


def compiled() -> Call:
    # Sizes known to the compiler, and no count: a new one would compile again.
    whole = torch.compile(lambda h, w, y: F.cross_entropy(h @ w.T, y), dynamic=False)

    def call(hidden: Tensor, weight: Tensor, labels: Tensor, kept: int) -> Tensor:
        return whole(hidden, weight, labels)  # type: ignore[no-any-return]

    return call


def liger(chunk_mem_const: int) -> Call:
    function = importlib.import_module("liger_kernel.ops").LigerFusedLinearCrossEntropyFunction

    def call(hidden: Tensor, weight: Tensor, labels: Tensor, kept: int) -> Tensor:
        options = (None, None, IGNORE, 0.0, 0.0, "mean", None, False, None, False, False, False)
        # The mean's gradient is 1, which spares Liger a pass; None: its own kernels.
        found = function.apply(hidden, weight, labels, *options, None, None, chunk_mem_const)
        return found[0]  # type: ignore[no-any-return]

    return call


def cce() -> Call:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy

    def call(hidden: Tensor, weight: Tensor, labels: Tensor, kept: int) -> Tensor:
        return function(hidden, weight, labels)  # type: ignore[no-any-return]

    return call


def quack() -> Call:
    function = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy

    def call(hidden: Tensor, weight: Tensor, labels: Tensor, kept: int) -> Tensor:
        # Tuned, it compiles and times dozens of products for minutes.
        return function(hidden, weight, labels, tuned=False)  # type: ignore[no-any-return]

    return call


# What compiles longest comes last.
PEERS: dict[str, Callable[[], Call]] = {
    "F.cross_entropy": lambda: loss.eager,
    "Liger, chunk_mem_const 1": lambda: liger(1),
    "Liger, chunk_mem_const 16": lambda: liger(16),
    "CCE": cce,
    "kept rows, 8 chunks (torchtune)": lambda: loss.compacted,
    "F.linear_cross_entropy, chunked": lambda: loss.chunked_by_torch,
    "quack, not tuned": quack,
    "F.cross_entropy, torch.compile": compiled,
    "kept rows, 256 a chunk (TRL)": lambda: loss.chunked_nll,
}
ON_PEAKED = ("CCE", "Liger, chunk_mem_const 1")  # the one that skips small gradients, and one


def run() -> Iterator[Result | str]:
    """Milliseconds, share of the products' floor at the rate measured here, and peak memory."""
    gate([], DEVICE)
    rate = matmul_rate()
    yield f"gate passed; {torch.cuda.get_device_name()}, bf16 products {rate / 1e12:.0f} TFLOP/s"
    cases = make_cases()
    mine: list[Timed] = []
    for case in cases:
        mine.append(timed(ours, case.given))
        yield told("hermes_core", case, mine[-1], rate, mine[-1])
        yield told(
            "hermes_core, kept given", case, timed(given_kept(case), case.given), rate, mine[-1]
        )
    for name, load in PEERS.items():
        yield from of_peer(name, load, cases, mine, rate)
    # The machine as warm as it was for the last peer.
    last = len(KEPT) - 1
    again = timed(ours, cases[last].given)
    yield told("hermes_core, again", cases[last], again, rate, mine[last])


def make_cases() -> list[Case]:
    """One for each share, and one whose logits are peaked as a trained model's."""
    shape = (POSITIONS, VOCABULARY, SIZE)
    hidden, weight, labels, _ = problem(*shape, 1.0, torch.bfloat16, DEVICE)
    with torch.no_grad():  # logits of 16 and hardly any: p of the label is 0.99
        peaked = (8 * weight[labels]).add_(hidden, alpha=0.1).requires_grad_()
    lowest, *_ = masked = [mask(labels, share) for share in KEPT]
    at_shares = [
        Case(f"{share:.0%}", (hidden, weight, *found))
        for share, found in zip(KEPT, masked, strict=True)
    ]
    return [*at_shares, Case(f"{KEPT[0]:.0%}, peaked", (peaked, weight, *lowest), peaked=True)]


def given_kept(case: Case) -> Call:
    """Ours, told what is kept: the host waits for nothing."""
    kept_M = (case.given[2] != IGNORE).nonzero().squeeze(1)

    def call(hidden: Tensor, weight: Tensor, labels: Tensor, kept: int) -> Tensor:
        found = linear_cross_entropy(hidden, weight, labels, kept=kept_M, denominator=kept)
        return found.total

    return call


def of_peer(
    name: str, load: Callable[[], Call], cases: Sequence[Case], mine: Sequence[Timed], rate: float
) -> Iterator[Result | str]:
    """A peer's figures; whatever it raises is told and ends them, and no wrong one is timed."""
    try:
        call = load()
        gate([Peer(name, call, compacts=False)], DEVICE, (torch.bfloat16,), GATE_SHAPE)
        for case, our in zip(cases, mine, strict=True):
            if not case.peaked or name in ON_PEAKED:
                yield told(name, case, timed(call, case.given), rate, our)
    except (Exception, SystemExit) as error:  # peers raise what they like
        first = str(error).strip().partition("\n")[0]
        yield f"{name}: skipped ({type(error).__name__}: {first})"


def matmul_rate() -> float:
    """FLOP/s of one large bf16 product, the yardstick of this run."""
    a = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    spent = [milliseconds(lambda: a @ a) for _ in range(RUNS)]
    return 2 * 8192**3 / (1e-3 * statistics.median(spent))


def milliseconds(call: Callable[[], object]) -> float:
    """Of one call, by the device's clock; every step reads far past its caches."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def timed(call: Call, given: Given) -> Timed:
    """Of forward + backward: the median, after a run that compiles and one that is measured."""
    hidden, weight, labels, kept = given

    def step() -> None:
        hidden.grad = weight.grad = None
        call(hidden, weight, labels, kept).backward()

    step()
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() + hidden.nbytes + weight.nbytes
    spent = [milliseconds(step)]
    peak_gb = (torch.cuda.max_memory_allocated() - before) / 1e9
    if spent[0] <= SLOW_MS:
        runs = min(RUNS, max(LEAST_RUNS, int(ENOUGH_MS / spent[0])))
        spent = [milliseconds(step) for _ in range(runs)]
    hidden.grad = weight.grad = None
    return Timed(statistics.median(spent), min(spent), max(spent), len(spent), peak_gb)


def told(name: str, case: Case, found: Timed, rate: float, our: Timed) -> Result:
    floor_ms = 1e3 * 6 * case.given[3] * VOCABULARY * SIZE / rate
    note = (
        f"{case.name} kept; {found.peak_gb:.2f} GB beyond gradients; "
        f"{floor_ms / found.ms:.2f} of the floor; {found.ms / our.ms:.2f} x our time"
    )
    return Result(
        "loss", f"V {VOCABULARY}, D {SIZE}, {case.name} of {POSITIONS} kept", "bfloat16", name,
        "ms", found.ms, (found.fastest_ms, found.slowest_ms), found.runs, note,
    )  # fmt: skip
