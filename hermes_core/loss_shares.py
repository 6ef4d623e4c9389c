"""Who has which part of a vocabulary that is sharded over a group."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch._C._distributed_c10d import _resolve_process_group


def shard_of(
    size: int, device: torch.device, group: dist.ProcessGroup | None, vocab_size: int | None
) -> list[int]:
    """This rank's part of the vocabulary: its first id, the whole size, the largest part."""
    if group is None or dist.get_world_size(group) == 1:
        _check_shares([size], size, vocab_size)
        return [0, size, size]
    rank = dist.get_rank(group)
    if vocab_size is None:
        sizes = _ask(group, size, device.type)
        _check_shares(sizes, size, None)
    else:
        sizes = _sizes_in(group.group_name, size, device.type, vocab_size)
    if sizes[rank] != size:
        raise ValueError(
            f"weight has {size} rows here but had {sizes[rank]} when vocab_size was {vocab_size} "
            "before; shards of one vocabulary and group must stay as they are"
        )
    return [sum(sizes[:rank]), sum(sizes), max(sizes)]


@dataclass(frozen=True, slots=True)
class _Question:
    """Equal on all ranks of a group, so that either all of them ask or none does."""

    group: dist.ProcessGroup
    device: str
    vocab_size: int
    size: int = field(compare=False)


@cache  # ranks in unlike groups would forget unlike answers
def _answer(question: _Question) -> list[int]:
    sizes = _ask(question.group, question.size, question.device)
    _check_shares(sizes, question.size, question.vocab_size)  # what is refused is not remembered
    return sizes


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # never traced
def _sizes_in(group: str, size: int, device: str, vocab_size: int) -> list[int]:
    """Every rank's share of a vocabulary; asked once, since shards do not change.

    The compiler knows a group by its name alone.
    """
    found = _resolve_process_group(c10d.GroupName(group))
    return _answer(_Question(found, device, vocab_size, size))


def _ask(group: dist.ProcessGroup, size: int, device: str) -> list[int]:
    mine = torch.tensor([size], device=device)
    sizes = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, mine, group=group)
    return [int(s) for s in sizes]


def _check_shares(sizes: list[int], size: int, vocab_size: int | None) -> None:
    """The same on every rank, so that none waits for one that was refused."""
    if vocab_size is not None and sum(sizes) != vocab_size:
        raise ValueError(
            f"weight has {size} rows here and {sum(sizes)} over the group, but vocab_size is "
            f"{vocab_size}; pass the group over which the vocabulary is sharded"
        )
    if min(sizes) == 0:
        raise ValueError(
            f"weight has 0 rows on rank {sizes.index(0)}; give every rank of the group a share"
        )
