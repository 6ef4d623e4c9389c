"""Packing millions of samples, against a copy of their lengths and against other packers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from operator import attrgetter
from typing import Any

import numpy as np

from bench.harness import Result, Timing, measure, peak_bytes
from bench.lengths import ROW_LENGTH, Lengths, hard_sets, hermes_lengths, odd_sets
from hermes_core import pack
from hermes_core.packing import Strategy

Bins = list[list[int]]

TEXTBOOK: tuple[Strategy, ...] = ("best_fit_decreasing", "first_fit_decreasing")
STRATEGIES: tuple[Strategy, ...] = ("best", *TEXTBOOK, "exact_gap", "windowed")
SHARES = (0.2, 1.0)  # of Hermes 4's samples: about 1 M and 5 M
HARD_STRATEGIES: tuple[Strategy, ...] = ("best", "guided")
HARD_SAMPLES = 1_000_000  # of each set without short ones
ODD_SAMPLES = 5_000_000  # of each odd set


@dataclass(frozen=True, slots=True)
class Peer:
    """Another packer: what it takes, its call, which alone is timed, and its rows as ids.

    ``samples`` is the most that it is given, so that a run takes minutes and fits in memory.
    """

    name: str
    samples: int
    prepare: Callable[[Lengths], Any]
    pack: Callable[[Any], Any]
    bins: Callable[[Any], Bins]


def lightbinpack(lengths: list[int]) -> Bins:
    return importlib.import_module("lightbinpack").obfd(lengths, ROW_LENGTH)


def seqpacker(lengths: Lengths) -> Any:
    packer = importlib.import_module("seqpacker")
    return packer.pack_sequences(lengths, capacity=ROW_LENGTH, strategy="obfd")


def as_dataset(lengths: Lengths) -> Any:
    """A sample's tokens are its number, so that a row tells who is in it."""
    datasets = importlib.import_module("datasets")
    datasets.disable_progress_bars()
    ids = [np.full(length, i, np.int32) for i, length in enumerate(lengths)]
    return datasets.Dataset.from_dict({"input_ids": ids})


def trl(dataset: Any) -> Any:
    """The whole set at once, which fills rows best; its default is a thousand samples."""
    pack_dataset = importlib.import_module("trl.data_utils").pack_dataset
    return pack_dataset(dataset, ROW_LENGTH, "bfd", {"batch_size": len(dataset)})


def of_trl(packed: Any) -> Bins:
    rows = packed.with_format("numpy")["input_ids"]
    return [row[np.flatnonzero(np.diff(row, prepend=-1))].tolist() for row in rows]


def binpacking(lengths: dict[int, int]) -> Any:
    return importlib.import_module("binpacking").to_constant_volume(lengths, ROW_LENGTH)


PEERS = (
    Peer("lightbinpack", 6_000_000, lambda lengths: lengths.tolist(), lightbinpack, list),
    Peer("seqpacker", 6_000_000, np.ascontiguousarray, seqpacker, attrgetter("bins")),
    Peer(
        "binpacking",
        20_000,
        lambda lengths: dict(enumerate(lengths.tolist())),
        binpacking,
        lambda bins: [list(row) for row in bins],
    ),
    Peer("trl", 50_000, as_dataset, trl, of_trl),  # it copies every token, which is timed too
)


def run() -> Iterator[Result | str]:
    """Every strategy at 1 M and 5 M samples, beside the peers that are installed.

    Then sets without short samples, which leave holes that `guided` is for, and odd sets, on which
    `best` must be no worse than first fit.
    """
    gate()
    yield "gate passed: first and best fit equal the textbook, row by row; every plan is whole"
    for share in SHARES:
        lengths = hermes_lengths(share)
        bound = pack(lengths, row_length=ROW_LENGTH).lower_bound
        yield f"\n{len(lengths):,} samples, {lengths.sum():,} tokens, rows of {ROW_LENGTH:,}"
        yield f"lower bound {bound:,} rows"
        copy = np.empty_like(lengths)
        floor = measure(lambda lengths=lengths, copy=copy: np.copyto(copy, lengths))
        yield told("memcpy of the lengths", lengths, floor, "the floor")
        for strategy in STRATEGIES:
            yield ours(lengths, strategy, floor)
    for name, lengths in hard_sets(HARD_SAMPLES):
        yield from guided(name, lengths)
    yield f"\n{ODD_SAMPLES:,} samples of each odd set"
    for name, lengths, row_length in odd_sets(ODD_SAMPLES):
        yield odd(name, lengths, row_length)
    yield ""
    for peer in PEERS:
        yield from against(peer)


def ours(lengths: Lengths, strategy: Strategy, floor: Timing | None = None) -> Result:
    """What `pack` takes, how full its rows are, and how far that is from a bare copy."""
    packed = partial(pack, lengths, row_length=ROW_LENGTH, strategy=strategy)
    plan = packed()
    timing = measure(packed, runs=20 if floor is None or strategy in TEXTBOOK else 5)
    notes = f"{plan.rows - plan.lower_bound:+,} rows over the bound, fill {plan.fill:.4%}"
    if floor is not None:
        notes += f", {timing.cpu_s / floor.cpu_s:.1f} x memcpy"
        peak = peak_bytes(packed)
        if peak is not None:
            own = plan.samples.nbytes + plan.row_offsets.nbytes
            notes += f", {(peak - own) / 1e6:.0f} MB beside the plan's own {own / 1e6:.0f}"
    return told(f"hermes_core {strategy}", lengths, timing, notes)


def guided(name: str, lengths: Lengths) -> Iterator[Result | str]:
    """What `best` and `guided` leave above the lower bound that `guided` finds."""
    bound = pack(lengths, row_length=ROW_LENGTH, strategy="guided").lower_bound
    yield f"\n{name}: {len(lengths):,} samples; lower bound {bound:,} rows"
    for strategy in HARD_STRATEGIES:
        plan = pack(lengths, row_length=ROW_LENGTH, strategy=strategy, seed=None)
        bounds = plan.row_offsets.tolist()
        samples = plan.samples.tolist()
        check([samples[a:b] for a, b in pairwise(bounds)], lengths)
        timing = measure(
            lambda strategy=strategy: pack(lengths, row_length=ROW_LENGTH, strategy=strategy),
            runs=5,
        )
        notes = f"{plan.rows / bound - 1:.4%} rows over the bound, fill {plan.fill:.4%}"
        yield told(f"hermes_core {strategy}", lengths, timing, notes)


def odd(name: str, lengths: Lengths, row_length: int) -> Result:
    """What `best` takes, and its rows beside those of first fit, which must not be fewer."""
    plan = pack(lengths, row_length=row_length)
    first = pack(lengths, row_length=row_length, strategy="first_fit_decreasing")
    if plan.rows > first.rows:
        raise SystemExit(f"{name}: best has {plan.rows} rows, first fit {first.rows}")
    timing = measure(lambda: pack(lengths, row_length=row_length), runs=3)
    notes = f"{plan.rows - first.rows:+,} rows beside first fit, by {plan.strategy}"
    return told(name, lengths, timing, notes, row_length)


def against(peer: Peer) -> Iterator[Result | str]:
    """The peer at each size that it is given, with ours in the same run as the yardstick."""
    try:
        importlib.import_module(peer.name)
    except ImportError as error:
        yield f"{peer.name}: skipped, not importable ({error})"
        return
    sets = [hermes_lengths(share) for share in SHARES]
    fitting = [lengths for lengths in sets if len(lengths) <= peer.samples]
    for lengths in fitting or [sets[0][: peer.samples]]:
        given = peer.prepare(lengths)
        bins = peer.bins(peer.pack(given))
        check(bins, lengths)  # no time for a wrong plan
        rows, bound = len(bins), pack(lengths, row_length=ROW_LENGTH).lower_bound
        timing = measure(lambda given=given: peer.pack(given), runs=5)
        fill = lengths.sum() / (rows * ROW_LENGTH)
        yield f"{len(lengths):,} samples"
        yield ours(lengths, TEXTBOOK[0])
        yield told(
            peer.name, lengths, timing, f"{rows - bound:+,} rows over the bound, fill {fill:.4%}"
        )


def told(
    backend: str, lengths: Lengths, timing: Timing, notes: str, row_length: int = ROW_LENGTH
) -> Result:
    spread = (1e3 * timing.fastest_s, 1e3 * timing.slowest_s)
    return Result(
        op="packing",
        shape=f"{len(lengths)} samples, rows of {row_length}",
        dtype=str(lengths.dtype),
        backend=backend,
        unit="ms",
        value=1e3 * timing.cpu_s,
        spread=spread,
        runs=timing.runs,
        notes=f"wall {1e3 * timing.wall_s:,.2f} ms; {notes}",
    )


def check(bins: Bins, lengths: Lengths) -> None:
    """Every sample is in one row, and no row is too long."""
    ids = np.fromiter(chain.from_iterable(bins), np.int64)
    row = np.repeat(np.arange(len(bins)), [len(some) for some in bins])
    if not np.array_equal(np.sort(ids), np.arange(len(lengths))):
        raise SystemExit("wrong plan: not every sample is in exactly one row")
    longest = int(np.bincount(row, lengths[ids]).max())
    if longest > ROW_LENGTH:
        raise SystemExit(f"wrong plan: a row holds {longest} tokens, want at most {ROW_LENGTH}")


def gate() -> None:
    """Stop unless first and best fit equal a loop over all rows for each sample."""
    lengths = hermes_lengths(1 / 2550)
    for strategy in STRATEGIES:
        plan = pack(lengths, row_length=ROW_LENGTH, strategy=strategy, seed=None)
        rows = [part.tolist() for part in np.split(plan.samples, plan.row_offsets[1:-1])]
        if strategy in TEXTBOOK and rows != textbook(lengths, strategy):
            raise SystemExit(f"{strategy} differs from the textbook on {len(lengths)} samples")
        check(rows, lengths)


def textbook(lengths: Lengths, strategy: Strategy) -> Bins:
    """Each sample, by falling length, into the first row with room, or the one with the least."""
    rows: Bins = []
    room = np.zeros(0, np.int64)
    for sample in np.argsort(-lengths, kind="stable").tolist():
        fitting = np.flatnonzero(room >= lengths[sample])
        if fitting.size == 0:
            rows.append([])
            room = np.append(room, ROW_LENGTH)
            fitting = np.array([len(rows) - 1])
        least = np.argmin(room[fitting]) if strategy == "best_fit_decreasing" else 0
        row = int(fitting[least])
        rows[row].append(sample)
        room[row] -= lengths[sample]
    return rows
