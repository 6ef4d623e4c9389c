"""Sets of lengths: like Hermes 4's, without short samples, and odd ones that a packer may dread."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Lengths = NDArray[np.int64]

ROW_LENGTH = 16_384  # the report's; longer samples were dropped
# Samples, mean tokens, sigma of a log-normal: Hermes 4's reasoning and other samples (report, 2).
MIXTURE = ((3_500_000, 4_974, 0.80), (1_600_000, 995, 0.95))
SHORTEST = 1_500  # of a set without short samples


def hermes_lengths(share: float, row_length: int = ROW_LENGTH) -> Lengths:
    """Shuffled lengths like Hermes 4's, a ``share`` of its 5.1 M samples, none over a row."""
    rng = np.random.default_rng(0)
    parts = [
        rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, round(count * share))
        for count, mean, sigma in MIXTURE
    ]
    lengths = np.maximum(np.concatenate(parts).astype(np.int64), 1)
    lengths = lengths[lengths <= row_length]
    rng.shuffle(lengths)
    return lengths


def hard_sets(count: int) -> Iterator[tuple[str, Lengths]]:
    """Sets without short samples; none longer than a row."""
    rng = np.random.default_rng(0)
    _, mean, sigma = MIXTURE[0]
    reasoning = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, 3 * count)
    heavy = SHORTEST * (1 + rng.pareto(1.0, 3 * count))
    for name, drawn in (("reasoning", reasoning), ("Pareto", heavy)):
        fitting = drawn[(drawn >= SHORTEST) & (drawn < ROW_LENGTH + 1)]
        yield f"{name} from {SHORTEST:,} tokens on", fitting.astype(np.int64)[:count]
    yield "a quarter to half a row", rng.integers(ROW_LENGTH // 4, ROW_LENGTH // 2 + 1, count)


def odd_sets(count: int) -> Iterator[tuple[str, Lengths, int]]:
    """Name, lengths and row length of sets with many ties, none, few classes or very many."""
    rng = np.random.default_rng(0)

    def drawn(low: int, high: int) -> Lengths:
        return rng.integers(low, high + 1, count)

    def of(values: list[int]) -> Lengths:
        return rng.choice(np.array(values), count)

    row = ROW_LENGTH
    few = -(-row // 101)  # the classic set for which first fit takes 11/9 of the rows it needs
    classic = [51 * few, 27 * few, 26 * few, 23 * few, 23 * few]
    sieve = np.ones(row + 1, bool)
    sieve[:2] = False
    for n in range(2, int(row**0.5) + 1):
        sieve[n * n :: n] = False
    yield "all of one token", of([1]), row
    yield "all a third of a row and one", of([row // 3 + 1]), row
    yield "powers of two", of([1 << n for n in range(15)]), row
    yield "primes", of(np.flatnonzero(sieve).tolist()), row
    yield "two lengths", of([100, 12_000]), row
    yield "11/9 of first fit", of(classic), 101 * few
    yield "any length", drawn(1, row), row
    yield "a quarter to half a row", drawn(row // 4, row // 2), row
    yield "near half a row", drawn(row // 2 - 64, row // 2 + 64), row
    yield "near a seventh of a row", drawn(row // 7 - 64, row // 7 + 64), row
    yield "one full row, else ones", np.append(of([1])[1:], row), row
    yield "rows of seven", drawn(1, 7), 7
    yield "any length, rows of 131,072", drawn(1, 1 << 17), 1 << 17
    yield "any length, rows of 2**31", drawn(1, 1 << 31), 1 << 31
    yield "up to a 100th, rows of 2**31", drawn(1, (1 << 31) // 100), 1 << 31
    yield "all different, rows of 2**31", 400 * np.arange(1, count + 1) + 1, 1 << 31
    for long in (65_536, 131_072):
        yield f"like Hermes 4's, rows of {long:,}", hermes_lengths(count / 5.1e6, long), long
