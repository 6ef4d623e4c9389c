"""
Compiled core of hermes_core. Private: call it through hermes_core.
"""

from __future__ import annotations

import collections.abc
import typing

import numpy
import numpy.typing

__all__: list[str] = [
    "IGNORE_INDEX",
    "MAX_ROW_LENGTH",
    "MAX_SAMPLES",
    "Packed",
    "RowArrays",
    "Windows",
    "active_isa",
    "build_rows",
    "map_file",
    "pack",
    "pack_windows",
    "shuffle",
]

class Packed:
    """
    What `pack` returns: a plan, and what it was measured by.
    """
    @property
    def dropped(self) -> numpy.typing.NDArray[numpy.int64]: ...
    @property
    def longest(self) -> int: ...
    @property
    def lower_bound(self) -> int: ...
    @property
    def row_offsets(self) -> numpy.typing.NDArray[numpy.int64]: ...
    @property
    def samples(self) -> numpy.typing.NDArray[numpy.int64]: ...
    @property
    def shortest(self) -> int: ...
    @property
    def strategy(self) -> str: ...
    @property
    def tokens(self) -> int: ...

class Windows:
    """
    What `pack_windows` returns: rows, and who waits.
    """
    @property
    def ages(self) -> numpy.typing.NDArray[numpy.int64]: ...
    @property
    def carried(self) -> numpy.typing.NDArray[numpy.int64]: ...
    @property
    def row_offsets(self) -> numpy.typing.NDArray[numpy.int64]: ...
    @property
    def samples(self) -> numpy.typing.NDArray[numpy.int64]: ...

class RowArrays:
    """
    What `build_rows` returns: the arrays of one batch.
    """
    @property
    def cu_seqlens(self) -> numpy.typing.NDArray[numpy.int32]: ...
    @property
    def input_ids(self) -> numpy.typing.NDArray[numpy.int64]: ...
    @property
    def kept(self) -> numpy.typing.NDArray[numpy.int64]: ...
    @property
    def labels(self) -> numpy.typing.NDArray[numpy.int64]: ...
    @property
    def positions(self) -> numpy.typing.NDArray[numpy.int64]: ...

def active_isa() -> str:
    """
    Instruction set in use: 'scalar', 'avx2' or 'avx512'.
    """

def build_rows(
    shards: list[
        tuple[
            numpy.ndarray,
            typing.Annotated[numpy.typing.ArrayLike, numpy.int64],
            typing.Annotated[numpy.typing.ArrayLike, numpy.uint32],
            typing.Annotated[numpy.typing.ArrayLike, numpy.int64],
        ]
    ],
    shard_indices: numpy.typing.NDArray[numpy.int64],
    sample_indices: numpy.typing.NDArray[numpy.int64],
    row_starts: numpy.typing.NDArray[numpy.int64],
    *,
    row_length: typing.SupportsInt | typing.SupportsIndex,
    pad_id: typing.SupportsInt | typing.SupportsIndex,
    truncate: bool,
) -> RowArrays:
    """
    Rows row_starts[r]:row_starts[r + 1] of (shard index, sample index) pairs.
    """

def map_file(path: str) -> numpy.typing.NDArray[numpy.uint8]:
    """
    The bytes of a file, mapped read-only; holds no file descriptor.
    """

def pack(
    lengths: numpy.ndarray,
    *,
    row_length: typing.SupportsInt | typing.SupportsIndex,
    strategy: str,
    too_long: str,
    max_samples: typing.SupportsInt | typing.SupportsIndex,
    seed_words: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
) -> Packed:
    """
    Plan of whole samples in rows; four random words shuffle them, none leave them.
    """

def pack_windows(
    lengths: numpy.typing.NDArray[numpy.int64],
    ages: numpy.typing.NDArray[numpy.int64],
    *,
    window: typing.SupportsInt | typing.SupportsIndex,
    row_length: typing.SupportsInt | typing.SupportsIndex,
    max_samples: typing.SupportsInt | typing.SupportsIndex,
    seed_words: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    first_window: typing.SupportsInt | typing.SupportsIndex,
    finish: bool,
) -> Windows:
    """
    Full rows, a window of samples at a time; those with ages have waited so long.
    """

def shuffle(
    count: typing.SupportsInt | typing.SupportsIndex,
    *,
    seed_words: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
) -> numpy.typing.NDArray[numpy.int64]:
    """
    The numbers below count in an order that four random words decide.
    """

IGNORE_INDEX: int = -100
MAX_ROW_LENGTH: int = 2147483648
MAX_SAMPLES: int = 2147483647
