"""Building the rows of batches, against a bare copy and against a collator in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from bench.harness import ROW_LENGTH, Result, hermes_lengths, measure
from hermes_core import IGNORE_INDEX, Packing, Rows, Samples, Shard, build_rows, pack

ROWS = 1024  # 67 MB of token ids: past every cache
BATCH = 8
SLOW_ROWS = 64  # enough for a Python loop
VOCABULARY = 151_936  # Qwen3's: ids need 32 bits


def run() -> Iterator[Result | str]:
    """Tokens for each second of CPU time, a batch of eight rows at a time."""
    samples = hermes_samples(ROWS * ROW_LENGTH)
    packing = pack(samples.lengths, row_length=ROW_LENGTH)
    numbers = range(packing.rows)
    gate(samples, packing)
    yield "gate passed: every array of eight rows equals the collator's"
    yield f"{len(samples):,} samples in {packing.rows:,} rows, {BATCH} at a time; fresh outputs\n"

    tokens = samples.shard(0).tokens.view(np.int32)
    columns = (tokens, tokens.copy())
    width = BATCH * ROW_LENGTH

    def copy() -> None:
        for start in range(0, len(tokens), width):
            for column in columns:
                column[start : start + width].copy()

    def write() -> None:
        for _ in range(0, len(numbers), BATCH):
            tuple(np.full(width, value) for value in range(3))

    def batches(build: Callable[[range], Rows], rows: range) -> Callable[[], None]:
        def call() -> None:
            for start in range(0, len(rows), BATCH):
                build(rows[start : start + BATCH])

        return call

    floor = result("memcpy of two int32 columns", copy, len(tokens), "the floor")
    yield floor
    # malloc hands the floor's half megabytes back warm; a batch's outputs are new pages each time.
    outputs = result("three int64 columns, fresh", write, len(numbers) * ROW_LENGTH, "only written")
    yield outputs
    of_rows = int(packing.row_offsets[SLOW_ROWS])
    fewer = int(samples.lengths[packing.samples[:of_rows]].sum())
    ours = result(
        "hermes_core.build_rows",
        batches(lambda rows: build_rows(samples, packing, rows), numbers),
        packing.tokens,
        "three int64 columns, cu_seqlens, kept",
    )
    yield ours
    plain = result(
        "collator in NumPy",
        batches(lambda rows: collate(samples, packing, rows), numbers[:SLOW_ROWS]),
        fewer,
        f"the same arrays, {SLOW_ROWS} rows",
        runs=5,
    )
    yield plain
    yield (
        f"\nbuild_rows: {ours.value / floor.value:.2f} of memcpy, "
        f"{ours.value / outputs.value:.2f} of writing its outputs, "
        f"{ours.value / plain.value:.1f} x the collator"
    )


def result(
    backend: str, call: Callable[[], None], tokens: int, notes: str, *, runs: int = 20
) -> Result:
    timing = measure(call, runs=runs)
    return Result(
        op="rows",
        shape=f"batches of {BATCH} x {ROW_LENGTH}",
        dtype="uint32 ids in",
        backend=backend,
        unit="M tokens/CPU-s",
        value=tokens / timing.cpu_s / 1e6,
        spread=(tokens / timing.slowest_s / 1e6, tokens / timing.fastest_s / 1e6),
        runs=runs,
        notes=notes,
    )


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
    return Rows(input_ids, labels, positions, cu_seqlens, np.flatnonzero(labels != IGNORE_INDEX))


def gate(samples: Samples, packing: Packing) -> None:
    """Stop unless a batch equals the collator's in every array and dtype."""
    rows = range(packing.rows - BATCH, packing.rows)
    got, want = build_rows(samples, packing, rows), collate(samples, packing, rows)
    for name in Rows.__slots__:
        ours, theirs = getattr(got, name), getattr(want, name)
        if ours.dtype != theirs.dtype or not np.array_equal(ours, theirs):
            raise SystemExit(f"build_rows differs from the collator in {name}")
