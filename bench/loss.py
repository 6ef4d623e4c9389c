"""The masked loss against what a user would otherwise run: time and memory, forward + backward.

Shapes: T positions, M kept, D model size, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Result, Timing, by_turns, chosen, measure
from hermes_core.loss import linear_cross_entropy

POSITIONS = 2048
SHAPES = ((32_768, 1_024), (128_256, 512))
KEPT = (0.1, 0.3, 0.6, 1.0)
IGNORE = -100
RUNS = 3
SLOW_S = 20  # who takes longer is timed once: the whole is to end within an hour

Call = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # hidden, weight, labels, M -> mean loss
Found = tuple[Timing, float]  # and MB at the peak beyond inputs and gradients


def ours(hidden: Tensor, weight: Tensor, labels: Tensor, kept: int) -> Tensor:
    return linear_cross_entropy(hidden, weight, labels, denominator=max(kept, 1)).total


def eager(hidden: Tensor, weight: Tensor, labels: Tensor, kept: int) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, labels, reduction="sum") / kept


def chunked_by_torch(hidden: Tensor, weight: Tensor, labels: Tensor, kept: int) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    loss = F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options)
    return loss / kept


def compacted(hidden: Tensor, weight: Tensor, labels: Tensor, kept: int) -> Tensor:
    """torchtune's way: kept rows by hand, then eight chunks by autograd."""
    at = (labels != IGNORE).nonzero().squeeze(1)
    chunks = zip(hidden[at].chunk(8), labels[at].chunk(8), strict=True)
    parts = [F.cross_entropy((h @ weight.T).float(), y, reduction="sum") for h, y in chunks]
    return torch.stack(parts).sum() / kept


def compacted_whole(hidden: Tensor, weight: Tensor, labels: Tensor, kept: int) -> Tensor:
    at = (labels != IGNORE).nonzero().squeeze(1)
    return F.cross_entropy(hidden[at] @ weight.T, labels[at], reduction="sum") / kept


def chunked_nll(hidden: Tensor, weight: Tensor, labels: Tensor, kept: int) -> Tensor:
    """TRL's way: kept rows, 256 at a time, products in fp32, computed again in backward."""
    at = (labels != IGNORE).nonzero().squeeze(1)

    def part(h: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(h.float() @ weight.float().T, y, reduction="sum")

    chunks = zip(hidden[at].split(256), labels[at].split(256), strict=True)
    parts = [torch.utils.checkpoint.checkpoint(part, h, y, use_reentrant=False) for h, y in chunks]
    return torch.stack(parts).sum() / kept


class LigerInTorch(torch.autograd.Function):
    """Liger's algorithm: every row, chunks of about T * D / V, gradients in the forward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, kept):  # type: ignore[no-untyped-def]
        rows = 1 << (max(1, hidden.numel() // len(weight)) - 1).bit_length()
        d_hidden, d_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        total = torch.zeros(())
        for at in range(0, len(hidden), rows):
            part, targets = hidden[at : at + rows], labels[at : at + rows]
            logits = part @ weight.T
            with torch.enable_grad():
                leaf = logits.detach().requires_grad_()
                loss = F.cross_entropy(leaf.float(), targets, reduction="sum") / kept
                (gradient,) = torch.autograd.grad(loss, leaf)
            total += loss.detach()
            d_hidden[at : at + rows] = gradient @ weight
            d_weight += gradient.T @ part  # in the weight's dtype, its default
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grad.to(d_hidden.dtype), d_weight * grad.to(d_weight.dtype), None, None


def liger_in_torch(hidden: Tensor, weight: Tensor, labels: Tensor, kept: int) -> Tensor:
    return LigerInTorch.apply(hidden, weight, labels, kept)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Peer:
    name: str
    call: Call
    compacts: bool  # its time depends on the kept share


def peers() -> list[Peer]:
    return [
        Peer("F.cross_entropy", eager, False),
        Peer("F.cross_entropy, torch.compile", torch.compile(eager), False),
        Peer("F.linear_cross_entropy, chunked", chunked_by_torch, False),
        Peer("Liger's algorithm in PyTorch", liger_in_torch, False),
        Peer("kept rows, F.cross_entropy", compacted_whole, True),
        Peer("kept rows, 8 chunks (torchtune)", compacted, True),
        Peer("kept rows, 256 a chunk (TRL)", chunked_nll, True),
    ]


def problem(
    tokens: int, vocabulary: int, size: int, share: float, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, int]:
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, size, generator=generator, device=device).to(dtype)
    weight = torch.randn(vocabulary, size, generator=generator, device=device).mul_(0.02).to(dtype)
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator, device=device)
    return hidden.requires_grad_(), weight.requires_grad_(), *mask(labels, share)


def mask(labels: Tensor, share: float) -> tuple[Tensor, int]:
    """Labels of which about ``share`` are kept, and how many are."""
    generator = torch.Generator(labels.device).manual_seed(1)
    drawn = torch.rand(len(labels), generator=generator, device=labels.device)
    labels = labels.masked_fill(drawn >= share, IGNORE)
    return labels, int((labels != IGNORE).sum())


def run(only: str = "") -> Iterator[Result | str]:
    """The table of the GPU that is here, else the CPU's, of shapes with ``only`` in their name."""
    if torch.cuda.is_available():
        if only:
            raise SystemExit("--only is for the loss on a CPU, and here is a GPU")
        from bench import loss_gpu

        yield from loss_gpu.run()
        return
    shapes = cpu_shapes()
    names = chosen(list(shapes), only)
    everyone = peers()
    gate(everyone)
    yield f"gate passed: ours and {len(everyone)} peers are near float64"
    yield f"{torch.get_num_threads()} thread(s)"
    for name in names:
        yield f"\n{name}"
        yield from at_shape(*shapes[name], everyone)


def cpu_shapes() -> dict[str, tuple[int, int, torch.dtype]]:
    return {
        f"V {vocabulary:,}, D {size:,}, {POSITIONS:,} positions, {dtype}": (vocabulary, size, dtype)
        for vocabulary, size in SHAPES
        for dtype in (torch.float32, torch.bfloat16)
    }


def at_shape(
    vocabulary: int, size: int, dtype: torch.dtype, everyone: list[Peer]
) -> Iterator[Result | str]:
    """Ours and all peers, by turns; who is slow and computes every row at the first share alone."""
    torch.compiler.reset()  # or its code would be for any shape, as the gate has others
    shape = f"V {vocabulary}, D {size}, {POSITIONS} positions"
    slow: dict[str, Found] = {}
    for share in KEPT:
        given = problem(POSITIONS, vocabulary, size, share, dtype)
        mine = Step("hermes_core", ours, given)
        steps = [Step(peer.name, peer.call, given) for peer in everyone if peer.name not in slow]
        found = timed(mine, steps)
        timing, memory = found[mine.name]
        yield told(mine.name, shape, share, dtype, found[mine.name], "")
        for peer in everyone:
            theirs, peak = found.get(peer.name) or slow[peer.name]
            times, memories = theirs.times(timing), peak / max(memory, 1.0)
            note = f"{times:.2f} x our time, {memories:.1f} x our memory"
            if peer.name in slow:
                note += f", as timed at {KEPT[0]:.0%}"
            elif theirs.runs == 1 and not peer.compacts:
                slow[peer.name] = theirs, peak
            yield told(peer.name, shape, share, dtype, (theirs, peak), note)


@dataclass(frozen=True, slots=True)
class Step:
    """Forward + backward of a problem."""

    name: str
    call: Call
    given: tuple[Tensor, Tensor, Tensor, int]

    def __call__(self) -> None:
        hidden, weight, labels, kept = self.given
        self.forget()
        self.call(hidden, weight, labels, kept).backward()  # type: ignore[no-untyped-call]

    def forget(self) -> None:
        hidden, weight, *_ = self.given
        hidden.grad = weight.grad = None

    def peak_mb(self) -> float:
        """Peak memory of a run beyond inputs and gradients."""
        hidden, weight, *_ = self.given
        self.forget()
        before = _resident_mb("VmRSS", forget=True)
        self()
        peak = _resident_mb("VmHWM") - before - (hidden.nbytes + weight.nbytes) / 1e6
        self.forget()
        return peak


def timed(mine: Step, steps: list[Step]) -> dict[str, Found]:
    """CPU time and peak memory of ours and of each step, by its name."""
    timings = {step.name: measure(step, runs=1) for step in steps}  # the first run may compile
    quick = [mine, *(step for step in steps if timings[step.name].cpu_s < SLOW_S)]
    timings |= dict(zip((step.name for step in quick), by_turns(quick, runs=RUNS), strict=True))
    return {step.name: (timings[step.name], step.peak_mb()) for step in (mine, *steps)}


def _resident_mb(key: str, *, forget: bool = False) -> float:
    """Resident memory now or at its peak; ``forget`` what was freed, and the peak so far."""
    if forget:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(key)) * 1.024e-3


def told(
    name: str, shape: str, share: float, dtype: torch.dtype, found: Found, note: str
) -> Result:
    timing, peak = found
    return Result(
        op="loss",
        shape=f"{shape}, {share:.0%} kept",
        dtype=str(dtype).removeprefix("torch."),
        backend=name,
        unit="ms",
        value=1e3 * timing.cpu_s,
        spread=(1e3 * timing.fastest_s, 1e3 * timing.slowest_s),
        runs=timing.runs,
        notes=f"{share:.0%} kept; {peak:,.0f} MB beyond gradients" + (f"; {note}" if note else ""),
    )


def gate(
    everyone: list[Peer], device: str = "cpu",
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
    shape: tuple[int, int, int] = (200, 1_001, 64),
) -> None:  # fmt: skip
    """Stop unless every gradient is near float64's, ours no further off than eager's."""
    for dtype in dtypes:
        given = problem(*shape, 0.6, dtype, device)
        hidden, weight, labels, kept = given
        wide = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
        right = torch.autograd.grad(eager(*wide, labels, kept), wide)
        bound = [2 * error + 1e-5 for error in errors(eager, given, right)]
        for peer in (Peer("hermes_core", ours, True), *everyone):
            found = errors(peer.call, given, right)
            slack = 1.0 if peer.call is ours else 4.0  # Liger adds up in bf16
            if not all(error <= slack * most for error, most in zip(found, bound, strict=True)):
                raise SystemExit(
                    f"{peer.name} is wrong in {dtype}: errors {found}, at most {bound}"
                )


def errors(
    call: Call, given: tuple[Tensor, Tensor, Tensor, int], right: tuple[Tensor, ...]
) -> list[float]:
    """Relative error of the gradients of hidden and weight."""
    hidden, weight, labels, kept = given
    found = torch.autograd.grad(call(hidden, weight, labels, kept), (hidden, weight))
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, right, strict=True)]
