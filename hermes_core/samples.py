"""Samples: token ids and spans of kept tokens, in shards that are never copied."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hermes_core import _C

IGNORE_INDEX = -100  # a label that is not in the loss; PyTorch's default

Tokens = NDArray[np.uint16] | NDArray[np.uint32]
TokenDtype = np.dtype[np.uint16] | np.dtype[np.uint32]


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """N samples with T tokens and M kept spans, one behind another.

    Attributes:
        tokens: [T] uint16 or uint32.
        offsets: [N + 1] int64, where each sample starts in ``tokens``, then T.
        spans: [M, 2] uint32, kept [start, end) counted from the sample's first token; inside a
            sample disjoint and rising.
        span_offsets: [N + 1] int64, where each sample starts in ``spans``, then M.
    """

    tokens: Tokens
    offsets: NDArray[np.int64]
    spans: NDArray[np.uint32]
    span_offsets: NDArray[np.int64]

    def __post_init__(self) -> None:
        for name, array, dtypes, ndim in (
            ("tokens", self.tokens, (np.uint16, np.uint32), 1),
            ("offsets", self.offsets, (np.int64,), 1),
            ("spans", self.spans, (np.uint32,), 2),
            ("span_offsets", self.span_offsets, (np.int64,), 1),
        ):
            _check_array(name, array, dtypes, ndim)
        if self.spans.shape[1] != 2:
            raise ValueError(f"spans is {self.spans.shape}, want [spans, 2]")
        if len(self.offsets) == 0 or len(self.offsets) != len(self.span_offsets):
            raise ValueError(
                f"offsets has {len(self.offsets)} elements and span_offsets "
                f"{len(self.span_offsets)}, want one more than there are samples in both"
            )
        for name, offsets, end in (
            ("offsets", self.offsets, len(self.tokens)),
            ("span_offsets", self.span_offsets, len(self.spans)),
        ):
            if offsets[0] != 0 or offsets[-1] != end:
                raise ValueError(f"{name} runs from {offsets[0]} to {offsets[-1]}, want 0 to {end}")

    def __len__(self) -> int:
        return len(self.offsets) - 1


class Samples:
    """N samples in shards; a shard is loaded when it is first asked for, and never copied."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        shards = tuple(shards)
        self._set_up([len(shard) for shard in shards], shards.__getitem__)

    def _set_up(self, counts: Sequence[int], load: Callable[[int], Shard]) -> None:
        self.first_samples: NDArray[np.int64] = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=self.first_samples[1:])
        self.first_samples.flags.writeable = False
        self._load = load
        self._loaded: dict[int, Shard] = {}
        self._in_use = _C.Shards(self.first_samples)  # where build_rows finds them, once asked for

    @classmethod
    def from_lists(cls, token_ids: Sequence[ArrayLike], loss_masks: Sequence[ArrayLike]) -> Samples:
        """One shard of lists: token ids, and for each token whether it is kept."""
        if len(token_ids) != len(loss_masks):
            raise ValueError(
                f"token_ids has {len(token_ids)} samples but loss_masks has {len(loss_masks)}"
            )
        all_ids, all_spans = [], []
        for i, (ids, mask) in enumerate(zip(token_ids, loss_masks, strict=True)):
            kept = np.asarray(mask)
            all_ids.append(check_token_ids(f"token_ids[{i}]", ids, 1 << 32))
            if kept.shape != all_ids[-1].shape or (kept.size and kept.dtype != np.bool_):
                raise ValueError(
                    f"loss_masks[{i}] is {kept.dtype} {list(kept.shape)}, want a bool for each "
                    f"of the {len(all_ids[-1])} token ids"
                )
            all_spans.append(spans_of(kept.astype(np.bool_)))
        return cls([join(all_ids, all_spans, np.dtype(np.uint32))])

    @property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(self.shard(i) for i in range(len(self.first_samples) - 1))

    def shard(self, index: int) -> Shard:
        """Shard ``index``, loaded when first asked for."""
        if index not in self._loaded:
            self._loaded[index] = self._load(index)
        return self._loaded[index]

    def __len__(self) -> int:
        return int(self.first_samples[-1])

    def __getitem__(self, index: int) -> tuple[Tokens, NDArray[np.bool_]]:
        """Token ids [n], a view, and loss mask [n] of one sample."""
        try:
            index = operator.index(index)
        except TypeError:
            raise TypeError(f"samples[{index!r}]: want the number of one sample") from None
        sample = index + len(self) if index < 0 else index
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {index} is outside [0, {len(self)})")
        number = int(np.searchsorted(self.first_samples, sample, side="right")) - 1
        shard, local = self.shard(number), sample - int(self.first_samples[number])
        token_ids = shard.tokens[shard.offsets[local] : shard.offsets[local + 1]]
        loss_mask = np.zeros(len(token_ids), np.bool_)
        for start, end in shard.spans[shard.span_offsets[local] : shard.span_offsets[local + 1]]:
            loss_mask[start:end] = True
        return token_ids, loss_mask

    def __iter__(self) -> Iterator[tuple[Tokens, NDArray[np.bool_]]]:
        return (self[i] for i in range(len(self)))

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[N] tokens of each sample; read-only."""
        return self._measure()

    def _measure(self) -> NDArray[np.int64]:
        parts = [np.diff(shard.offsets) for shard in self.shards]
        lengths: NDArray[np.int64] = np.concatenate([*parts, np.zeros(0, np.int64)])
        lengths.flags.writeable = False
        return lengths

    @property
    def token_count(self) -> int:
        return sum(len(shard.tokens) for shard in self.shards)

    @cached_property
    def kept_count(self) -> int:
        """Kept tokens of all samples."""
        return sum(int(np.diff(shard.spans.astype(np.int64)).sum()) for shard in self.shards)


def join(
    token_ids: Sequence[NDArray[Any]], spans: Sequence[NDArray[np.uint32]], dtype: TokenDtype
) -> Shard:
    """One shard of single samples; their ids must fit ``dtype``."""
    offsets = np.zeros(len(token_ids) + 1, np.int64)
    span_offsets = np.zeros(len(token_ids) + 1, np.int64)
    np.cumsum([len(ids) for ids in token_ids], out=offsets[1:])
    np.cumsum([len(some) for some in spans], out=span_offsets[1:])
    tokens: Any = np.concatenate([np.zeros(0, dtype), *token_ids], dtype=dtype, casting="unsafe")
    return Shard(
        tokens,
        offsets,
        np.concatenate([np.zeros((0, 2), np.uint32), *spans]),
        span_offsets,
    )


def spans_of(loss_mask: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """[m, 2] the runs of True in a loss mask, as [start, end)."""
    edges = np.flatnonzero(np.diff(loss_mask, prepend=False, append=False))
    return edges.reshape(-1, 2).astype(np.uint32)


def check_integer(name: str, value: int, low: int, high: int) -> int:
    """``value`` as an int, where it is one inside [low, high]."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, want an integer") from None
    if not low <= number <= high:
        raise ValueError(f"{name} is {number}, outside [{low}, {high}]")
    return number


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse what is none of ``choices``."""
    if value not in choices:
        *others, last = map(repr, choices)
        raise ValueError(f"{name} is {value!r}, want {', '.join(others)} or {last}")


def check_token_ids(name: str, token_ids: ArrayLike, vocab_size: int) -> NDArray[np.integer]:
    """Token ids as [n] integers; at least one, each inside the vocabulary."""
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or ids.size == 0:
        raise ValueError(f"{name} has shape {list(ids.shape)}, want [n] with at least one token")
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{name} is {ids.dtype} ({ids[0]}, ...), want integers")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        index = int(np.argmin(ids)) if low < 0 else int(np.argmax(ids))
        raise ValueError(f"{name}[{index}] is {ids[index]}, outside [0, {vocab_size})")
    return ids


def check_spans(name: str, kept_spans: ArrayLike, length: int) -> NDArray[np.uint32]:
    """Kept spans as uint32 [m, 2]: not empty, disjoint, rising, inside ``length`` tokens."""
    spans = np.asarray(kept_spans)
    if spans.size == 0:
        return np.zeros((0, 2), np.uint32)
    if spans.ndim != 2 or spans.shape[1] != 2:
        raise ValueError(f"{name} has shape {list(spans.shape)}, want [spans, 2]")
    if spans.dtype.kind not in "iu":
        raise TypeError(f"{name} is {spans.dtype} ({spans[0, 0]}, ...), want integers")
    starts, ends = spans[:, 0], spans[:, 1]
    before = np.concatenate([np.zeros(1, spans.dtype), ends[:-1]])
    bad = np.flatnonzero((starts < before) | (ends <= starts) | (ends > length))
    if bad.size:
        i = int(bad[0])
        raise ValueError(
            f"{name}[{i}] is {spans[i].tolist()}, want start < end, not before {before[i]} and "
            f"inside {length} tokens"
        )
    return spans.astype(np.uint32)


def _check_array(name: str, array: object, dtypes: tuple[type, ...], ndim: int) -> None:
    wanted = " or ".join(dtype.__name__ for dtype in dtypes)
    if not isinstance(array, np.ndarray) or array.dtype not in dtypes:
        got = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise TypeError(f"{name} is {got}, want an array of {wanted}")
    if array.ndim != ndim or not array.flags.c_contiguous or not array.flags.aligned:
        raise ValueError(
            f"{name} is {array.ndim}-D with strides {array.strides}, want {ndim}-D and contiguous"
        )
