"""A plan of whole samples in rows of one length: ids and offsets, never a copy of the tokens."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hermes_core import _C
from hermes_core.files import write_atomically
from hermes_core.samples import check_choice, check_integer

Strategy = Literal[
    "best", "exact_gap", "best_fit_decreasing", "first_fit_decreasing", "guided", "windowed"
]
TooLong = Literal["error", "drop", "truncate"]

FORMAT = "hermes4 packing"
VERSION = 2
WORTH_GUIDING = 1e-3  # of the lower bound; a plan that has more rows above it is told so


def counted(count: int, noun: str, ending: str = "s") -> str:
    """So many of it, in words: "1 row", "2 rows"."""
    return f"{count:,} {noun}{'' if count == 1 else ending}"


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """Which samples stand in which row.

    Attributes:
        samples: [P] int64, sample ids row after row; each packed sample once.
        row_offsets: [rows + 1] int64, where each row starts in ``samples``, then P.
        row_length: tokens in a row.
        tokens: packed tokens; a truncated sample counts ``row_length``.
        lower_bound: no plan of these samples has fewer rows (L2 of Martello and Toth; where
            `guided` had to look for more, the larger of that and of a linear programme).
        longest, shortest: tokens of the longest and the shortest packed sample.
        dropped, truncated: int64, ids of samples longer than a row, by ``too_long``.
        strategy: that made the plan; of those that `best` tries, the one that won, and so of
            `guided` where the others reach the lower bound.
        max_samples: that a row may hold; None for any number.
        fingerprint: of the store that the lengths came from; empty if unknown.
    """

    samples: NDArray[np.int64]
    row_offsets: NDArray[np.int64]
    row_length: int
    tokens: int
    lower_bound: int
    longest: int
    shortest: int
    dropped: NDArray[np.int64]
    truncated: NDArray[np.int64]
    strategy: Strategy
    too_long: TooLong
    seed: int | None
    max_samples: int | None
    fingerprint: str

    @property
    def rows(self) -> int:
        return len(self.row_offsets) - 1

    @property
    def fill(self) -> float:
        """Tokens of samples / (rows x row_length)."""
        return self.tokens / (self.rows * self.row_length)

    def report(self) -> str:
        """The plan in words and numbers, a few lines for a person."""
        above = self.rows - self.lower_bound
        full = self.tokens == self.rows * self.row_length
        fill = self.fill if full else min(self.fill, 0.999999)  # 100 % is said of full rows alone
        lines = [
            f"{counted(self.rows, 'row')} of {self.row_length:,} tokens by {self.strategy}",
            f"{counted(len(self.samples), 'sample')} of {self.shortest:,} to {self.longest:,} "
            f"tokens, {self.tokens:,} in all",
            f"fill {fill:.4%}; lower bound {counted(self.lower_bound, 'row')}, "
            + (f"{above:,} above it ({above / self.lower_bound:.4%})" if above else "reached"),
        ]
        if above > WORTH_GUIDING * self.lower_bound and self.strategy not in ("guided", "windowed"):
            lines.append(f'strategy "guided" may save up to {counted(above, "row")}')
        for ids, fate in ((self.dropped, "dropped"), (self.truncated, "truncated")):
            if len(ids):
                lines.append(f"{counted(len(ids), 'sample')} longer than a row {fate}")
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to one .npz file, whole or not at all: about five bytes a sample."""
        about = {name: getattr(self, name) for name in _SCALARS}
        header = json.dumps({"format": FORMAT, "version": VERSION, **about})
        row_sizes = np.diff(self.row_offsets)
        with write_atomically(Path(path)) as file:
            np.savez(
                file,
                header=np.frombuffer(header.encode(), np.uint8),
                samples=_narrow(self.samples),
                row_sizes=_narrow(row_sizes),
                dropped=_narrow(self.dropped),
                truncated=_narrow(self.truncated),
                allow_pickle=False,
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str], fingerprint: str | None = None) -> Packing:
        """The plan in ``path``; refused when it was made for another store than ``fingerprint``.

        Raises:
            ValueError: not a plan, damaged, of a newer version, or of another store.
        """
        with open(path, "rb") as opened:
            try:
                with np.load(opened, allow_pickle=False) as file:
                    header = dict(json.loads(bytes(file["header"])))
                    _check_format(path, header)
                    about = {name: header[name] for name in _SCALARS}
                    parts = [_ids(name, file[name]) for name in _ARRAYS]
                plan = _checked_plan(parts, about)
            except _OtherFormat:
                raise
            except _DAMAGE as error:
                raise ValueError(f"{path} is not a packing plan, or damaged: {error}") from error
        if fingerprint is not None and plan.fingerprint != fingerprint:
            raise ValueError(
                f"{path} was made for the store {plan.fingerprint or '(unknown)'}, "
                f"not for {fingerprint}; pack this store again"
            )
        return plan


class _OtherFormat(ValueError):
    pass


_SCALARS = (
    "row_length", "tokens", "lower_bound", "longest", "shortest", "strategy", "too_long", "seed",
    "max_samples", "fingerprint",
)  # fmt: skip
_ARRAYS = ("samples", "row_sizes", "dropped", "truncated")
# What zipfile, zlib, json and NumPy make of a file that is not theirs, or has a bit changed.
_DAMAGE = (
    zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError, TypeError, RuntimeError,
    OSError, MemoryError, AttributeError,
)  # fmt: skip


def _check_format(path: str | os.PathLike[str], header: Mapping[str, Any]) -> None:
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        raise _OtherFormat(
            f"{path} is {header.get('format')!r} version {header.get('version')!r}, "
            f"want {FORMAT!r} version {VERSION}; pack the store again"
        )


def _ids(name: str, array: NDArray[Any]) -> NDArray[np.int64]:
    if array.ndim != 1 or array.dtype.kind != "u":
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, want [n] unsigned integers")
    return array.astype(np.int64)


def _checked_plan(parts: list[NDArray[np.int64]], about: Mapping[str, Any]) -> Packing:
    """The plan in these parts of a file, where they are those of one."""
    samples, sizes, dropped, truncated = parts
    row_offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    if not sizes.size or sizes.min() < 1 or row_offsets[-1] != len(samples):
        raise ValueError("its rows do not hold its samples")
    count = len(samples) + len(dropped)
    there = np.zeros(count, np.bool_)
    for ids in (samples, dropped, truncated):
        if ids.size and not 0 <= ids.min() <= ids.max() < count:
            raise ValueError(f"it names a sample outside [0, {count})")
    there[samples] = there[dropped] = True
    if not there.all():
        raise ValueError("it does not name each sample once")
    row_length = check_integer("row_length", about["row_length"], 1, _C.MAX_ROW_LENGTH)
    check_integer("tokens", about["tokens"], len(samples), len(sizes) * row_length)
    check_integer("lower_bound", about["lower_bound"], 1, len(sizes))
    longest = check_integer("longest", about["longest"], 1, row_length)
    check_integer("shortest", about["shortest"], 1, longest)
    check_choice("strategy", about["strategy"], get_args(Strategy))
    check_choice("too_long", about["too_long"], get_args(TooLong))
    for name, high in (("seed", 1 << 128), ("max_samples", _C.MAX_SAMPLES)):
        if about[name] is not None:
            check_integer(name, about[name], 0, high)
    if not isinstance(about["fingerprint"], str):
        raise TypeError(f"fingerprint is {about['fingerprint']!r}, want a string")
    return Packing(samples, row_offsets, dropped=dropped, truncated=truncated, **about)


def _narrow(ids: NDArray[np.int64]) -> NDArray[np.unsignedinteger]:
    """The same numbers in the narrowest unsigned dtype."""
    return ids.astype(np.min_scalar_type(int(ids.max(initial=0))))


def pack(
    lengths: ArrayLike,
    *,
    row_length: int,
    strategy: Strategy = "best",
    too_long: TooLong = "error",
    max_samples: int | None = None,
    window: int = 1000,
    seed: int | None = 0,
    fingerprint: str = "",
) -> Packing:
    """A plan of all samples in as few rows as the strategy finds; deterministic.

    Args:
        lengths: [N] tokens of each sample, of any integer dtype; a contiguous array (NumPy, Arrow)
            is read where it lies.
        row_length: tokens in a row, up to 2**31.
        strategy: see below.
        too_long: what to do with a sample longer than a row: refuse, leave out, or cut.
        max_samples: that a row may hold; any number if None.
        window: samples that `windowed` looks at together.
        seed: shuffles the rows, which decreasing order leaves sorted by length, or the samples
            before `windowed`; the same on every platform. None leaves them in order.
        fingerprint: of the store, kept in the plan so that it is never used with another.

    Samples are taken by falling length, equal lengths by id, and ids inside a row keep this order;
    but for `windowed`.

    - `first_fit_decreasing`: each into the lowest-numbered row with room.
    - `best_fit_decreasing`: each into the row with the least sufficient room; of several, the
      lowest-numbered.
    - `exact_gap`: row by row, the longest sample left and those that fill the rest to the last
      token, found by a bounded search: single samples, then mixtures of two lengths.
    - `guided`: where the best of the others misses the lower bound, rows near the patterns of a
      linear programme, the last two samples of each such that they fill it. For samples of which
      none is short, or where `max_samples` is small. Tenths of a second; some seconds, and up to
      a quarter of a minute, where rows of 2**31 tokens hold thousands of different lengths.
    - `windowed`: nearly in the order of the samples, nobody waiting longer than three windows: see
      `WindowedPacker`, which packs a stream so.
    - `best`: best fit and, where it misses the lower bound, first fit and exact gap; the fewest
      rows win. Milliseconds for a million samples, up to two seconds for millions of different
      lengths in rows of 2**31; its report says where `guided` may save rows.

    Raises:
        TypeError: lengths are not integers.
        ValueError: no lengths, a length out of range, or an unknown option.
    """
    check_choice("strategy", strategy, get_args(Strategy))
    check_choice("too_long", too_long, get_args(TooLong))
    row_length = check_integer("row_length", row_length, 1, _C.MAX_ROW_LENGTH)
    values = check_lengths(lengths)
    if seed is not None:
        seed = check_integer("seed", seed, 0, 1 << 128)
    words = [] if seed is None else seed_words(seed)
    if max_samples is not None:
        max_samples = check_integer("max_samples", max_samples, 1, _C.MAX_SAMPLES)
    options: dict[str, Any] = {
        "row_length": row_length,
        "too_long": too_long,
        "max_samples": _C.MAX_SAMPLES if max_samples is None else max_samples,
        "seed_words": words,
    }
    if strategy == "windowed":
        window = check_integer("window", window, 1, _C.MAX_SAMPLES)
        made = _C.pack_in_windows(values, window=window, **options)
    else:
        made = _C.pack(values, strategy=strategy, **options)
    if len(made.samples) == 0:
        raise ValueError(
            f"all {len(values)} samples are longer than row_length={row_length} and were "
            f"dropped: nothing to pack"
        )
    none = np.zeros(0, np.int64)
    truncated = np.flatnonzero(values > row_length) if too_long == "truncate" else none
    made_by = cast(Strategy, made.strategy)
    if strategy == "guided" and len(made.row_offsets) - 1 > made.lower_bound:
        made_by = strategy  # it was tried, also where it found nothing better
    return Packing(
        made.samples, made.row_offsets, row_length, made.tokens, made.lower_bound, made.longest,
        made.shortest, made.dropped, truncated, made_by, too_long, seed, max_samples, fingerprint,
    )  # fmt: skip


def seed_words(seed: int) -> list[int]:
    """Four random words for the core, of which not all are zero."""
    seed = check_integer("seed", seed, 0, 1 << 128)
    words: list[int] = np.random.SeedSequence(seed).generate_state(4, np.uint64).tolist()
    return words


def _is_odd(value: object) -> bool:
    """Is this what keeps a row of numbers from being integers of 64 bits?"""
    if isinstance(value, int):
        return not -(1 << 63) <= value < 1 << 64
    return not (isinstance(value, float) and value.is_integer())


def check_lengths(lengths: ArrayLike) -> NDArray[np.integer]:
    """[N] as one row of memory, of its own integer dtype."""
    if isinstance(lengths, np.ma.MaskedArray):
        raise TypeError("lengths is a masked array; pass lengths.compressed(), or .data for all")
    try:
        values = np.asarray(lengths)
    except (ValueError, TypeError, RuntimeError) as error:
        raise TypeError(f"lengths is not a row of integers: {error}") from None
    if values.size == 0:
        raise ValueError("lengths is empty: nothing to pack")
    if values.ndim != 1:
        raise ValueError(f"lengths is {values.ndim}-D with shape {values.shape}, want [samples]")
    if values.dtype.kind not in "iu":
        given = values.tolist()
        i = next((i for i, value in enumerate(given) if _is_odd(value)), 0)
        raise TypeError(
            f"lengths is {values.dtype} (lengths[{i}] is {given[i]!r}), "
            "want integers of at most 64 bits"
        )
    return np.require(values, values.dtype.newbyteorder("="), ["C", "A"])
