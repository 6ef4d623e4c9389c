"""Attention of DTensors over gloo: the heads of two and four ranks equal those of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hermes_core.attention import varlen_attention
from hermes_core.segments import Segments, segments
from ranks import be_a_rank, run_ranks

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(180)]

TOKENS, HEADS, KV_HEADS, SIZE = 40, 8, 4, 16


def problem() -> tuple[list[Tensor], Segments]:
    generator = torch.Generator().manual_seed(2)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    tensors = [torch.randn(TOKENS, n, SIZE, generator=generator) for n in heads]
    return tensors, segments(torch.tensor([0, 7, 24, TOKENS]))


def check_heads_equal_the_whole(rank: int, ranks: int) -> None:
    tensors, where = problem()
    plain = [x.clone().requires_grad_() for x in tensors]
    wanted, wanted_lse = varlen_attention(*plain, where, return_lse=True)
    wanted.square().sum().backward()
    mesh = init_device_mesh("cpu", (ranks,))
    own = [distribute_tensor(x, mesh, [Shard(1)]).requires_grad_() for x in tensors]
    out, lse = varlen_attention(*own, where, return_lse=True)
    assert isinstance(out, DTensor)
    assert out.placements == (Shard(1),)
    out.square().sum().backward()
    torch.testing.assert_close(out.full_tensor(), wanted)
    torch.testing.assert_close(lse.full_tensor(), wanted_lse)
    for x, whole in zip(own, plain, strict=True):
        torch.testing.assert_close(x.grad.full_tensor(), whole.grad)


def check_what_is_not_heads_is_refused(rank: int, ranks: int) -> None:
    (q, k, v), where = problem()
    mesh = init_device_mesh("cpu", (ranks,))
    by_heads = [distribute_tensor(x, mesh, [Shard(1)]) for x in (q, k, v)]
    whole = distribute_tensor(k, mesh, [Replicate()])
    with pytest.raises(ValueError, match=r"q is .*Shard.* but k is .*Replicate"):
        varlen_attention(by_heads[0], whole, by_heads[2], where)
    with pytest.raises(ValueError, match=r"^v is a plain tensor"):
        varlen_attention(by_heads[0], by_heads[1], v, where)
    by_tokens = [distribute_tensor(x, mesh, [Shard(0)]) for x in (q, k, v)]
    with pytest.raises(ValueError, match=r"over heads \(dimension 1\), got "):
        varlen_attention(*by_tokens, where)
    uneven = [distribute_tensor(x[:, :3].contiguous(), mesh, [Shard(1)]) for x in (q, k, v)]
    with pytest.raises(ValueError, match=r"q has 3 heads, not a multiple of 2 ranks"):
        varlen_attention(*uneven, where)


@pytest.mark.parametrize("ranks", [2, 4])
def test_heads_of_all_ranks_equal_the_whole(ranks: int, tmp_path: Path) -> None:
    run_ranks(__file__, "check_heads_equal_the_whole", ranks, tmp_path / "store")


def test_what_is_not_sharded_by_heads_is_refused(tmp_path: Path) -> None:
    run_ranks(__file__, "check_what_is_not_heads_is_refused", 2, tmp_path / "store")


if __name__ == "__main__":
    be_a_rank(globals())
