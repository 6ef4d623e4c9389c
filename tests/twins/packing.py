"""Exact gap and windows in plain Python, one row at a time: what the compiled ones must equal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

MASK = (1 << 64) - 1


def xoshiro(words: Sequence[int]) -> Iterator[int]:
    """The numbers of xoshiro256**."""
    s = list(words)
    while True:
        product = s[1] * 5 & MASK
        yield ((product << 7 | product >> 57) & MASK) * 9 & MASK
        t = s[1] << 17 & MASK
        s[2] ^= s[0]
        s[3] ^= s[1]
        s[1] ^= s[2]
        s[0] ^= s[3]
        s[2] ^= t
        s[3] = (s[3] << 45 | s[3] >> 19) & MASK


def draw_below(bound: int, draws: int, numbers: Iterator[int]) -> list[int]:
    """Numbers below ``bound``, ``bound`` - 1, ... from one random number that favours none."""
    product = prod(range(bound, bound - draws, -1))
    while True:
        rest, picks = next(numbers), []
        for below in range(bound, bound - draws, -1):
            picks.append(rest * below >> 64)
            rest = rest * below & MASK
        if rest >= ((1 << 64) - product) % product:
            return picks


def shuffle(elements: list[Any], numbers: Iterator[int]) -> None:
    """Fisher and Yates from the last one down."""
    left = len(elements)
    while left > 1:
        draws = 2 if left > 1 << 16 else 4 if left > 4 else 1
        for pick in draw_below(left, draws, numbers):
            left -= 1
            elements[left], elements[pick] = elements[pick], elements[left]


def shuffle_rows(rows: list[Any], ids: int, numbers: Iterator[int]) -> list[Any]:
    """Each row in a bucket by chance, then each bucket shuffled; there are ``ids`` in all rows."""
    count = 1
    while count < 1024 and (len(rows) // count > 4096 or ids // count > 32_768):
        count *= 2
    buckets: list[list[Any]] = [[] for _ in range(count)]
    word = 0
    for i, row in enumerate(rows):
        word = word >> 16 if i % 4 else next(numbers) if count > 1 else 0
        buckets[word % count].append(row)
    for bucket in buckets:
        shuffle(bucket, numbers)
    return [row for bucket in buckets for row in bucket]


def seed_for(words: Sequence[int], number: int) -> list[int]:
    """Another seed for each number, by splitmix64."""
    mixed = []
    for word in words:
        number = number + 0x9E3779B97F4A7C15 & MASK
        z = word ^ number
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
        mixed.append(z ^ z >> 31)
    return [mixed[0] | 1, *mixed[1:]]


class ExactGap:
    """The bounded search for samples that fill a row to its last token."""

    def __init__(
        self, lengths: Sequence[int], row_length: int, max_samples: int, steps: int = 1 << 13
    ) -> None:
        self.left = Counter(lengths)
        self.row_length, self.max_samples, self.steps_of_row = row_length, max_samples, steps

    def falling(self, most: int) -> list[int]:
        return sorted((x for x, n in self.left.items() if n > 0 and x <= most), reverse=True)

    def row(self, begin: Sequence[int] = ()) -> list[int]:
        """The lengths of a row, falling, that has these or the longest one; takes none away."""
        self.shortest = self.falling(self.row_length)[-1]
        self.steps = self.steps_of_row
        row, most = list(begin), self.row_length
        parts = [(x, 1) for x in begin]
        self.left.subtract(row)
        while len(row) < self.max_samples:  # short samples beside the gap: many at once
            gap = self.row_length - sum(row)
            fitting = self.falling(min(gap, most))
            if not fitting or (row and gap // fitting[0] <= 4):
                break
            most = fitting[0]
            some = min(max(1, gap // most - 3), self.left[most], self.max_samples - len(row))
            self.left[most] -= some
            row += [most] * some
            parts.append((most, some))
        self.best = row
        gap = self.row_length - sum(row)
        found = gap == 0 or self.search(row, gap, most, 0)
        self.left.update(row)
        if not found and not self.mix(parts):
            self.fill_up()
        return sorted(self.best, reverse=True)

    def mix(self, parts: list[tuple[int, int]]) -> bool:
        """Other numbers of what was taken many at once, with another length and one sample."""
        tries = 1 << 12
        while parts:
            length, samples = parts.pop()
            row = [x for x, some in parts for _ in range(some)]
            left = self.left - Counter(row)
            gap, places = self.row_length - sum(row), self.max_samples - len(row)
            if samples == 1 or gap > places * length:
                continue
            for many in range(min(gap // length, left[length], places), 0, -1):
                rest = gap - many * length
                shorter = sorted((x for x in left if x < length), reverse=True)[:256]
                for a in shorter if rest >= self.shortest else ():
                    tries -= 1
                    if tries < 0:
                        return False
                    some = min((rest - self.shortest) // a, left[a])
                    mixed = [length] * many + [a] * some + [rest - some * a]
                    if len(mixed) <= places and Counter(mixed) <= left:
                        self.best = row + mixed
                        return True
        return False

    def fill_up(self) -> None:
        row = list(self.best)
        self.left.subtract(row)
        while len(row) < self.max_samples:
            fitting = self.falling(self.row_length - sum(row))
            if not fitting:
                break
            row.append(fitting[0])
            self.left[fitting[0]] -= 1
        self.left.update(row)
        self.best = row

    def keep(self, row: list[int]) -> bool:
        if sum(row) > sum(self.best):
            self.best = row
        return sum(row) == self.row_length

    def search(self, row: list[int], gap: int, most: int, depth: int) -> bool:
        fitting = self.falling(min(gap, most))
        places = self.max_samples - len(row)
        if not fitting or not places:
            return False
        if self.keep([*row, fitting[0]]):
            return True
        if gap < 2 * self.shortest or places < 2:
            return False
        start = self.falling(min(gap - self.shortest, most))
        for a in [x for x in start if 2 * x >= gap][:256]:
            self.steps -= 1
            if self.steps < 0:
                return False
            if self.left[gap - a] > (2 * a == gap):
                return self.keep([*row, a, gap - a])
        if depth == 4 or places < 3:
            return False
        for a in start[:16]:
            self.left[a] -= 1
            found = self.search([*row, a], gap - a, a, depth + 1)
            self.left[a] += 1
            self.steps -= not found
            if found or self.steps < 0:
                return found
        return False


def windows(
    lengths: Sequence[int], row_length: int, max_samples: int, window: int, words: Sequence[int]
) -> list[list[int]]:
    """The rows of `WindowedPacker` for all samples at once, as sample numbers.

    Whole windows first; the rest, perhaps nothing but what was carried, is the last one.
    """
    pool: list[tuple[int, int]] = []  # sample, windows that it has waited
    rows = []
    for number, start in enumerate(range(0, len(lengths) + 1, window)):
        pool += [(i, 0) for i in range(start, min(start + window, len(lengths)))]
        last = start + window > len(lengths)
        made, used = one_window(pool, lengths, row_length, max_samples, last)
        shuffle(made, xoshiro(seed_for(words, number)))
        rows += made
        pool = [(i, age + 1) for i, age in pool if i not in used]
    return rows


def one_window(
    pool: list[tuple[int, int]],
    lengths: Sequence[int],
    row_length: int,
    max_samples: int,
    last: bool,
) -> tuple[list[list[int]], set[int]]:
    search = ExactGap([lengths[i] for i, _ in pool], row_length, max_samples, 2048)
    queues: dict[int, list[int]] = {}
    for i, _ in pool:
        queues.setdefault(lengths[i], []).append(i)
    made: list[list[int]] = []
    used: set[int] = set()

    def take(row: list[int]) -> None:
        times = min(search.left[x] // n for x, n in Counter(row).items())
        for _ in range(times):
            search.left.subtract(row)
            made.append([queues[x].pop(0) for x in row])
            used.update(made[-1])

    old: list[int] = []
    by_length = sorted(pool, key=lambda one: (-lengths[one[0]], one[0]))
    for i, age in by_length if not last else ():
        if age < 2 or i in used:
            continue
        old.append(lengths[i])
        if 2 * (sum(old) + lengths[i]) > row_length or 2 * len(old) >= max_samples:
            take(search.row(old))
            old = []
    if old:
        take(search.row(old))
    misses = 0
    while search.falling(row_length):
        if not last and (len(pool) - len(used) <= 96 or misses > 16):
            break
        row = search.row()
        if sum(row) == row_length or last:
            take(row)
        else:
            search.left[row[0]] -= 1
            misses += 1
    return made, used
