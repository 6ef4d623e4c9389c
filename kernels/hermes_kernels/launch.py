"""Tiles, warps and stages of each attention kernel, by architecture and head size: one table.

No kernel is tuned at a user's first step: a choice is made here, once, and written down with where
it comes from. Loads no Triton.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch
from torch import Tensor

Kernel = Literal[
    "forward", "statistics", "dq", "dkdv",
    "forward_sm90", "dq_sm90", "dkdv_sm90",
    "pairs", "dq_sm100", "dkdv_sm100",
]  # fmt: skip

TILE = 128  # the tiles that are ranked by length; every tile size divides it
# Copies of each head's statistics, from token 0, 1, 2 and 3 on: a walk's boxes begin anywhere, and
# the places that TMA takes them from lie 16 bytes apart.
SHIFTED = 4
KEPT = 8  # tiles of a program, at most
TAIL = 3  # rounds of tiles, with which those that ended early catch up
PROGRAMS = 8  # of a key tile, if there are query heads for it; the bits follow from heads alone


@dataclass(frozen=True, slots=True)
class Launch:
    """How one kernel is compiled and launched."""

    queries: int  # tokens of a query tile
    keys: int  # tokens of a key tile
    warps: int
    stages: int


GRID = 65_535  # programs that CUDA has in the second dimension of a grid
STATISTICS = Launch(32, 0, 4, 1)  # bound by memory: small enough to keep a tile in registers

# Triton's of 90 are by sweeps on an H100 (`bench.attention_sweep`, Triton 3.6.0). Those at 128 were
# swept at commit 68aca0e, 19 launches: dq's is the fastest; the forward's is at mean 1,024, and
# within 2 % at 4,096; dkdv's is the fastest that spills nothing, as (64, 64, 4, 2), which took 0.9
# of its time, does. Those at 64 and 256 were the fastest before walks were in blocks, and have not
# been swept since. Of 100 nothing was timed: rows of 128 where they fit, as fewer take the tensor
# cores as long, and tiles of which a multiprocessor holds two where that was found, by the machine
# code (`python -m bench attention --static`). 80 stands for every other GPU, only compiled.
# "pairs" is the forward of `forward_sm100`. Stages of kernels in Gluon are blocks, as many as
# shared memory has room for.
TABLE: dict[tuple[int, Kernel, int], Launch] = {
    (90, "forward", 64): Launch(64, 128, 4, 2),
    (90, "forward", 128): Launch(64, 128, 4, 1),
    (90, "forward", 256): Launch(128, 64, 8, 2),
    (90, "dq", 64): Launch(64, 64, 4, 2),
    (90, "dq", 128): Launch(64, 32, 4, 3),
    (90, "dq", 256): Launch(128, 32, 8, 3),
    (90, "dkdv", 64): Launch(64, 64, 4, 3),
    (90, "dkdv", 128): Launch(32, 64, 4, 3),
    (90, "dkdv", 256): Launch(32, 64, 8, 2),
    (90, "forward_sm90", 64): Launch(128, 128, 4, 4),
    (90, "forward_sm90", 128): Launch(128, 128, 4, 2),
    (90, "dq_sm90", 64): Launch(128, 64, 4, 4),
    (90, "dq_sm90", 128): Launch(128, 64, 4, 3),
    (90, "dkdv_sm90", 64): Launch(64, 128, 4, 4),
    (90, "dkdv_sm90", 128): Launch(64, 128, 4, 3),
    (100, "forward", 64): Launch(128, 64, 8, 2),
    (100, "forward", 128): Launch(128, 128, 8, 2),
    (100, "forward", 256): Launch(128, 64, 8, 2),
    (100, "pairs", 64): Launch(128, 128, 4, 8),
    (100, "pairs", 128): Launch(128, 128, 4, 5),
    (100, "dq", 64): Launch(128, 64, 8, 2),
    (100, "dq", 128): Launch(128, 128, 8, 2),
    (100, "dq", 256): Launch(128, 32, 8, 2),
    (100, "dkdv", 64): Launch(64, 128, 8, 2),
    (100, "dkdv", 128): Launch(64, 128, 8, 2),
    (100, "dkdv", 256): Launch(64, 64, 8, 1),
    (100, "dq_sm100", 64): Launch(128, 128, 4, 8),
    (100, "dq_sm100", 128): Launch(128, 128, 4, 5),
    (100, "dkdv_sm100", 64): Launch(128, 128, 4, 9),
    (100, "dkdv_sm100", 128): Launch(128, 128, 4, 5),
    (80, "forward", 64): Launch(128, 32, 8, 2),
    (80, "forward", 128): Launch(64, 32, 8, 2),
    (80, "dq", 64): Launch(128, 32, 8, 2),
    (80, "dq", 128): Launch(64, 32, 4, 2),
    (80, "dkdv", 64): Launch(32, 64, 4, 2),
    (80, "dkdv", 128): Launch(32, 64, 8, 1),
}


def _triton_version() -> tuple[int, ...]:
    """Major and minor; (0,) for a build that does not say."""
    try:
        return tuple(int(part) for part in version("triton").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return (0,)


TRITON_VERSION = _triton_version()
GLUON_SINCE = (3, 6)  # of Triton; before, its warps were specialised by other words


def architecture(device: torch.device) -> int:
    """The row of the table for ``device``: 100 or 90, or 80 for whatever has no entry."""
    if device.type != "cuda":
        return 90  # the interpreter runs what a Hopper would
    if torch.version.hip is not None:  # whose numbers mean other GPUs
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return {(9, 0): 90, (10, 0): 100, (10, 3): 100}.get((major, minor), 80)


def on(x: Tensor) -> AbstractContextManager[object]:
    """The device of ``x`` current, as Triton wants it; nothing where it is interpreted."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU: as many programs run at once that leave no room for another beside them."""
    if device.type != "cuda":
        return 132  # a Hopper's
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs_of(tiles: int, multiprocessors: int) -> tuple[int, int]:
    """How many programs take so many tiles, and how many of them, the first, stay for several.

    A program of several tiles starts and ends once for all of them, but nothing else fits on its
    multiprocessor meanwhile, and where another kernel has one, as NCCL's beside attention, the
    programs meant for it come after all others. So each has about an eighth of a multiprocessor's
    tiles, at most `KEPT`: one that comes late adds that much. They are a multiple of the
    multiprocessors, of equal work; the shortest tiles, of the last `TAIL` rounds or more, have
    programs of their own. The longest come first, and the GPU deals them to whoever is free.
    """
    rounds = -(-tiles // multiprocessors)
    kept = min(1 + rounds // 8, KEPT)
    stay = min(tiles, max((rounds - TAIL) // kept, 1) * multiprocessors)
    return tiles - (kept - 1) * stay, stay


def parts_of(kv_heads: int, group: int) -> int:
    """Into how many parts dkdv cuts the query heads of a key head: the fewest by which at least
    `PROGRAMS` work on a tile. With one key head, as tensor parallelism leaves, a row of 16,384 has
    no more tiles than a GPU multiprocessors, and the longest would be waited for by all.
    """
    known = (parts for parts in range(1, group + 1) if group % parts == 0)
    return next((parts for parts in known if kv_heads * parts >= PROGRAMS), group)


def sum_of_parts(x_TPH: Tensor, parts: int) -> Tensor:
    """[T, K, H] of each key head, of [T, K * parts, H]."""
    return x_TPH if parts == 1 else x_TPH.unflatten(1, (-1, parts)).sum(2)


def launch_of(architecture: int, kernel: Kernel, size: int) -> Launch:
    """The entry for a kernel and a head size that `padded_size` gave."""
    if kernel == "statistics":
        return STATISTICS
    return TABLE[architecture, kernel, size]


def padded_size(size: int) -> int:
    """The head size whose kernels compute heads of ``size``; 0 where there are none.

    96 and 192 run as 128 and 256 with zeros: Triton's tiles are powers of two.
    """
    return next((known for known in (64, 128, 256) if size <= known), 0)


def room_for(heads: int, tokens: int, tiles: int) -> int:
    """U, the room that so many tiles have for tokens, checked.

    Raises:
        ValueError: statistics of all heads, `SHIFTED` times, are one vector, whose places are
            int32; and a grid has no place for so many of the smallest tiles.
    """
    room = tiles * TILE
    if heads * room >= 2**29:
        raise ValueError(f"{heads} heads x {tokens} tokens pass 2^29; use fewer rows a batch")
    if room > GRID * STATISTICS.queries:
        raise ValueError(
            f"{tokens} tokens, at most {GRID * STATISTICS.queries} a batch; use fewer rows a batch"
        )
    return room
