"""Building the rows of batches: against a bare copy, a collator in NumPy, peers and a cold disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bench.harness import Result, by_turns, row_result
from bench.lengths import ROW_LENGTH, hermes_lengths
from bench.row_peers import against_peers
from bench.row_store import from_a_cold_store
from hermes_core import IGNORE_INDEX, Packing, Rows, Samples, Shard, build_rows, pack

ROWS = 1024  # 67 MB of token ids: past every cache
BATCHES = (1, 8, 64)  # rows at a time: int64 columns of 0.4, 3.1 and 25 MB
BATCH = 8  # rows at a time of the slow loop and the cold store
THREADS_FROM = 64  # rows that two threads share
RUNS = 20
SLOW_ROWS = 64  # enough for a Python loop
VOCABULARY = 151_936  # Qwen3's: ids need 32 bits
ARRAYS = ("input_ids", "labels", "positions", "cu_seqlens")

Build = Callable[[Samples, Packing, range], Rows]


def run() -> Iterator[Result | str]:
    """Tokens for each second of CPU time; who is compared goes by turns."""
    samples = hermes_samples(ROWS * ROW_LENGTH)
    packing = pack(samples.lengths, row_length=ROW_LENGTH)
    for batch in BATCHES:
        gate(samples, packing, batch)
    yield f"gate passed: every array equals the collator's, {BATCHES} rows at a time"
    yield f"{len(samples):,} samples in {packing.rows:,} rows"
    for batch in BATCHES:
        yield f"\n{batch} at a time"
        yield from against_a_copy(samples, packing, batch)
    ours = {batch: batches(built(), samples, packing, packing.rows, batch) for batch in BATCHES[:2]}
    slow, slow_tokens = batches(collate, samples, packing, SLOW_ROWS, BATCH)
    mine, plain = by_turns([ours[BATCH][0], slow], runs=5)
    times = plain.times(mine) * ours[BATCH][1] / slow_tokens
    yield f"\n{BATCH} at a time"
    yield row_result(
        "collator in NumPy", BATCH, plain, slow_tokens, f"build_rows int64 is {times:.0f} x"
    )
    yield from against_peers(samples, packing, ours)
    yield ""
    yield from from_a_cold_store(samples, packing, BATCH)


def against_a_copy(samples: Samples, packing: Packing, batch: int) -> Iterator[Result | str]:
    """So many rows at a time, beside a bare copy of two of their columns."""
    made = {
        name: batches(build, samples, packing, packing.rows, batch)
        for name, build in ways(batch).items()
    }
    calls = [copying(samples, batch), *(call for call, _ in made.values())]
    copy, *ours = by_turns(calls, runs=RUNS)
    yield row_result("memcpy of two int32 columns", batch, copy, samples.token_count)
    for (name, (_, tokens)), timing in zip(made.items(), ours, strict=True):
        share = copy.times(timing) * tokens / samples.token_count
        note = f"{share:.2f} of the memcpy"
        yield row_result(f"build_rows {name}", batch, timing, tokens, note)


def ways(batch: int) -> dict[str, Build]:
    """Three columns and cu_seqlens: in memory that is used again, or in the caller's."""
    threads = {"int64, threads=2": built(threads=2)} if batch >= THREADS_FROM else {}
    return {
        "int64": built(),
        "int64, out=": built(out=Rows.empty(batch, ROW_LENGTH)),
        "int32": built(dtype=np.int32),
        "int32, out=": built(out=Rows.empty(batch, ROW_LENGTH, dtype=np.int32)),
        **threads,
    }


def built(**options: Any) -> Build:
    return lambda samples, packing, rows: build_rows(samples, packing, rows, **options)


def batches(
    build: Build, samples: Samples, packing: Packing, rows: int, batch: int
) -> tuple[Callable[[], None], int]:
    """All whole batches of so many rows, one after another, and the tokens in them."""
    starts = range(0, rows // batch * batch, batch)

    def call() -> None:
        for start in starts:
            build(samples, packing, range(start, start + batch))

    end = packing.row_offsets[starts[-1] + batch]
    return call, int(samples.lengths[packing.samples[:end]].sum())


def copying(samples: Samples, batch: int) -> Callable[[], None]:
    """Two columns, a batch at a time, each to the same place."""
    tokens = samples.shard(0).tokens.view(np.int32)
    width = batch * ROW_LENGTH
    columns = [(tokens, np.empty(width, np.int32)), (tokens.copy(), np.empty(width, np.int32))]

    def call() -> None:
        for start in range(0, len(tokens), width):
            for column, to in columns:
                part = column[start : start + width]
                np.copyto(to[: len(part)], part)

    return call


def hermes_samples(tokens: int) -> Samples:
    """About so many tokens of Hermes-like samples; a fifth of each is the prompt, not kept."""
    lengths = hermes_lengths(0.005)
    lengths = lengths[: np.searchsorted(np.cumsum(lengths), tokens)]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.random.default_rng(1).integers(0, VOCABULARY, offsets[-1], np.uint32)
    spans = np.stack([lengths // 5, lengths], axis=1).astype(np.uint32)
    return Samples([Shard(ids, offsets, spans, np.arange(len(lengths) + 1))])


def collate(samples: Samples, packing: Packing, rows: range) -> Rows:
    """What a data loader does in NumPy: sample by sample into the rows of a batch."""
    shape = (len(rows), packing.row_length)
    input_ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORE_INDEX, np.int64)
    starts = []
    for r, row in enumerate(rows):
        at = 0
        for sample in packing.samples[packing.row_offsets[row] : packing.row_offsets[row + 1]]:
            ids, mask = samples[int(sample)]
            end = at + len(ids)
            starts.append(r * packing.row_length + at)
            input_ids[r, at:end] = ids
            positions[r, at:end] = np.arange(len(ids))
            labels[r, at : end - 1] = np.where(mask[1:], ids[1:].astype(np.int64), IGNORE_INDEX)
            at = end
        if at < packing.row_length:
            starts.append(r * packing.row_length + at)
            positions[r, at:] = np.arange(packing.row_length - at)
    cu_seqlens = np.array([*starts, input_ids.size], np.int32)
    return Rows(input_ids, labels, positions, cu_seqlens)


def gate(samples: Samples, packing: Packing, batch: int) -> None:
    """Stop unless a batch equals the collator's in every array, whichever way it is built."""
    rows = range(packing.rows - batch, packing.rows)
    want = collate(samples, packing, rows)
    for way, build in ways(batch).items():
        got = build(samples, packing, rows)
        for name in ARRAYS:
            if not np.array_equal(getattr(got, name), getattr(want, name)):
                raise SystemExit(f"build_rows {way}, {batch} rows, differs in {name}")
        if got.kept_count != want.kept_count:
            raise SystemExit(f"build_rows {way} counts {got.kept_count}, not {want.kept_count}")
