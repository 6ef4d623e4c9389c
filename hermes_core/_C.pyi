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
    "MAX_THREADS",
    "POOL_BLOCKS",
    "POOL_BYTES",
    "Packed",
    "Shards",
    "Windows",
    "active_isa",
    "attend",
    "build_rows",
    "differentiate_attention",
    "map_file",
    "pack",
    "pack_in_windows",
    "pack_windows",
    "pool_state",
    "range_numbers",
    "read_ahead",
    "this_cpu",
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

class Shards:
    """
    Shards in use of samples that are numbered through.
    """
    def __getstate__(self) -> numpy.typing.NDArray[numpy.int64]: ...
    def __init__(self, first_samples: numpy.typing.NDArray[numpy.int64]) -> None: ...
    def __setstate__(self, arg0: typing.Annotated[numpy.typing.ArrayLike, numpy.int64]) -> None: ...

def active_isa() -> str:
    """
    Instruction set in use: 'scalar', 'avx2' or 'avx512'.
    """

def attend(
    q: numpy.ndarray,
    k: numpy.ndarray,
    v: numpy.ndarray,
    starts: numpy.ndarray,
    out: numpy.ndarray,
    lse: numpy.ndarray,
    *,
    dtype: str,
    scale: typing.SupportsFloat | typing.SupportsIndex,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Causal attention inside segments, written to `out`, and its log-sum-exps to `lse`.
    """

def build_rows(
    rows_type: type,
    shards: Shards,
    load: collections.abc.Callable[[int], typing.Any],
    samples: typing.Any,
    row_offsets: typing.Any,
    rows: typing.Any,
    row_length: typing.SupportsInt | typing.SupportsIndex,
    truncate: bool,
    pad_id: typing.Any,
    dtype: typing.Any,
    out: tuple[
        numpy.ndarray,
        numpy.ndarray,
        numpy.ndarray,
        typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
    ]
    | None,
    threads: typing.Any,
) -> typing.Any:
    """
    These rows of a plan, as a `Rows`; rows: a range, or an array of int64.
    """

def differentiate_attention(
    grad: numpy.ndarray,
    q: numpy.ndarray,
    k: numpy.ndarray,
    v: numpy.ndarray,
    out: numpy.ndarray,
    lse: numpy.ndarray,
    starts: numpy.ndarray,
    dq: numpy.ndarray,
    dk: numpy.ndarray,
    dv: numpy.ndarray,
    *,
    dtype: str,
    scale: typing.SupportsFloat | typing.SupportsIndex,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Gradients of q, k and v for a gradient of attention's output, written to the last three.
    """

def map_file(path: bytes) -> numpy.typing.NDArray[numpy.uint8]:
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

def pack_in_windows(
    lengths: numpy.ndarray,
    *,
    row_length: typing.SupportsInt | typing.SupportsIndex,
    too_long: str,
    max_samples: typing.SupportsInt | typing.SupportsIndex,
    seed_words: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    window: typing.SupportsInt | typing.SupportsIndex,
) -> Packed:
    """
    The same, a window of samples at a time, which the words shuffle before.
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

def pool_state() -> tuple[int, int]:
    """
    Blocks and bytes that wait to be used again.
    """

def range_numbers(
    range: typing.Any, count: typing.SupportsInt | typing.SupportsIndex
) -> numpy.typing.NDArray[numpy.int64]:
    """
    The numbers of a range, each inside [0, count).
    """

def read_ahead(
    shards: Shards,
    load: collections.abc.Callable[[int], typing.Any],
    samples: typing.Any,
    row_offsets: typing.Any,
    rows: typing.Any,
    row_length: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Ask the kernel to read what these rows will need, and do not wait for it.
    """

def this_cpu() -> tuple[bool, bool, bool]:
    """
    Is it Intel's; has it instructions to multiply bf16, and fp16?
    """

IGNORE_INDEX: int = -100
MAX_ROW_LENGTH: int = 2147483648
MAX_SAMPLES: int = 2147483647
MAX_THREADS: int = 1024
POOL_BLOCKS: int = 32
POOL_BYTES: int = 268435456
