"""Packing a stream: rows while samples arrive, in their order but for a few that wait."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hermes_core import _C
from hermes_core.packing import TooLong, check_lengths, seed_words
from hermes_core.samples import check_choice, check_integer


@dataclass(frozen=True, slots=True, eq=False)
class PackedRows:
    """Rows that are complete; `build_rows` takes them as it takes a `Packing`.

    Attributes:
        samples: [P] int64, sample numbers row after row, counted from the first that was added.
        row_offsets: [rows + 1] int64, where each row starts in ``samples``, then P.
    """

    samples: NDArray[np.int64]
    row_offsets: NDArray[np.int64]
    row_length: int
    too_long: TooLong

    @property
    def rows(self) -> int:
        return len(self.row_offsets) - 1

    def split(self) -> list[NDArray[np.int64]]:
        """The sample numbers of each row, views of ``samples``."""
        return np.split(self.samples, self.row_offsets[1:-1]) if self.rows else []

    def in_order(self) -> PackedRows:
        """The same rows for samples that stand in the order of ``samples``."""
        return replace(self, samples=np.arange(len(self.samples)))


class WindowedPacker:
    """Packs samples as they come, a window of them at a time.

    From a window, and what earlier ones left over, it makes rows that are full to the last token;
    the rest is carried on: about a hundred samples where lengths are many, up to all of them where
    few fill a row together. Nobody waits longer than three windows, so
    the data keeps its order but for that, and rows do not drift from long samples to short ones.

    Args:
        row_length: tokens in a row.
        window: samples that are looked at together.
        too_long: what to do with a sample longer than a row: refuse, leave out, or cut.
        max_samples: that a row may hold; any number if None.
        seed: of the order of a window's rows.

    Attributes:
        added: samples so far. dropped, truncated: how many of them were longer than a row.
    """

    def __init__(
        self,
        *,
        row_length: int,
        window: int = 1000,
        too_long: TooLong = "error",
        max_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        check_choice("too_long", too_long, get_args(TooLong))
        self._settings = {
            "row_length": check_integer("row_length", row_length, 1, _C.MAX_ROW_LENGTH),
            "window": check_integer("window", window, 1, _C.MAX_SAMPLES),
            "max_samples": check_integer(
                "max_samples",
                _C.MAX_SAMPLES if max_samples is None else max_samples,
                1,
                _C.MAX_SAMPLES,
            ),
        }
        self._too_long: TooLong = too_long
        self._seed = check_integer("seed", seed, 0, 1 << 128)
        self._words = seed_words(self._seed)
        self._numbers = self._lengths = self._ages = np.zeros(0, np.int64)
        self._windows = 0
        self.added = self.dropped = self.truncated = 0

    def add(self, lengths: ArrayLike) -> PackedRows:
        """The rows that these samples complete; often none, while a window is not full.

        Args:
            lengths: [N] tokens of each new sample, of any integer dtype.

        Raises:
            TypeError, ValueError: as `pack` does; then nothing was added.
        """
        given = check_lengths(lengths)
        row_length = self._settings["row_length"]
        long = np.asarray(given > row_length)
        wrong = (given < 1) | (long if self._too_long == "error" else False)
        if wrong.any():
            i = int(np.argmax(wrong))
            way_out = "set too_long to 'drop' or 'truncate', or a longer row"
            raise ValueError(
                f"lengths[{i}] is {given[i]}, outside [1, {row_length}]; "
                f"{way_out if given[i] > 0 else 'every sample needs at least one token'}"
            )
        numbers, count = self.added + np.arange(len(given)), len(given)
        if self._too_long == "drop":
            given, numbers = given[~long], numbers[~long]
        given = np.where(given > row_length, row_length, given.astype(np.int64))
        numbers = np.concatenate([self._numbers, numbers])
        held = np.concatenate([self._lengths, given])
        # All at once: what fails above leaves no sample counted that is not there.
        self._numbers, self._lengths, self.added = numbers, held, self.added + count
        if self._too_long == "drop":
            self.dropped += int(long.sum())
        else:
            self.truncated += int(long.sum())
        carried, window = len(self._ages), self._settings["window"]
        whole = (len(self._lengths) - carried) // window * window
        return self._pack(carried + whole)

    def finish(self) -> PackedRows:
        """The rows of all that still waits, the last of them not full."""
        return self._pack(len(self._lengths), finish=True)

    def _pack(self, count: int, *, finish: bool = False) -> PackedRows:
        made = _C.pack_windows(
            self._lengths[:count],
            self._ages,
            **self._settings,
            seed_words=self._words,
            first_window=self._windows,
            finish=finish,
        )
        rows = PackedRows(
            self._numbers[made.samples],
            made.row_offsets,
            self._settings["row_length"],
            self._too_long,
        )
        self._windows += -(-(count - len(self._ages)) // self._settings["window"])
        left = np.concatenate([made.carried, np.arange(count, len(self._lengths))])
        self._numbers, self._lengths = self._numbers[left], self._lengths[left]
        self._ages = made.ages
        return rows

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on here: a few windows' numbers, as plain lists."""
        return {
            "settings": self._all_settings(),
            "numbers": self._numbers.tolist(),
            "lengths": self._lengths.tolist(),
            "ages": self._ages.tolist(),
            "windows": self._windows,
            "added": self.added,
            "dropped": self.dropped,
            "truncated": self.truncated,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken.

        Raises:
            TypeError: the state is no dict.
            ValueError: the state is of a packer with other settings, or damaged.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"the state is {state!r}, want what state_dict gave")
        if state.get("settings") != self._all_settings():
            raise ValueError(
                f"the state is of a packer with {state.get('settings')}, this one has "
                f"{self._all_settings()}"
            )
        try:
            added = check_integer("added", state["added"], 0, 1 << 62)
            windows, dropped, truncated = (  # a window has a new sample at least
                check_integer(name, state[name], 0, added)
                for name in ("windows", "dropped", "truncated")
            )
            numbers, lengths, ages = (
                _listed(name, state[name], low, high)
                for name, low, high in (
                    ("numbers", 0, added - 1),
                    ("lengths", 1, self._settings["row_length"]),
                    ("ages", 0, windows),
                )
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"the state is damaged: {type(error).__name__}: {error}") from None
        if len(np.unique(numbers)) < len(numbers):
            raise ValueError("the state is damaged: a sample is in it twice")
        if not len(ages) <= len(lengths) == len(numbers):
            raise ValueError(
                f"the state is damaged: {len(numbers)} numbers, {len(lengths)} lengths, "
                f"{len(ages)} ages"
            )
        self._numbers, self._lengths, self._ages = numbers, lengths, ages
        self._windows, self.added = windows, added
        self.dropped, self.truncated = dropped, truncated

    def _all_settings(self) -> dict[str, Any]:
        return self._settings | {"too_long": self._too_long, "seed": self._seed}


def _listed(name: str, values: object, low: int, high: int) -> NDArray[np.int64]:
    """A list of integers inside [low, high] as an array."""
    if not isinstance(values, list):
        raise TypeError(f"{name} is {values!r}, want a list")
    return np.array([check_integer(name, value, low, high) for value in values], np.int64)
