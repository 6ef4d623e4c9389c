"""The vocabulary-parallel loss over gloo: the shards of two and four processes equal the whole."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hermes_core.loss import linear_cross_entropy

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(180)]

TOKENS, VOCABULARY, SIZE, IGNORE = 60, 37, 8, -100  # 37: shards of unlike size


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(TOKENS, SIZE, generator=generator)
    weight = torch.randn(VOCABULARY, SIZE, generator=generator)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    labels[::3] = IGNORE
    return hidden, weight, labels


def check_equals_the_whole(rank: int, ranks: int) -> None:
    hidden, weight, labels = problem()
    wide = [x.double().requires_grad_() for x in (hidden, weight)]
    whole = linear_cross_entropy(*wide, labels, backend="reference").total
    whole.backward()
    wanted_hidden, wanted_weight = (x.grad for x in wide)

    hidden.requires_grad_()
    mine = weight.chunk(ranks)[rank].clone().requires_grad_()
    loss = linear_cross_entropy(
        hidden, mine, labels, group=dist.group.WORLD, vocab_size=VOCABULARY,
        chunk_bytes=4 * VOCABULARY * 7,
    ).total  # fmt: skip
    loss.backward()
    assert hidden.grad is not None
    assert mine.grad is not None
    dist.all_reduce(hidden.grad)  # each rank's is partial
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    close(loss.double(), whole)
    close(hidden.grad.double(), wanted_hidden)
    close(mine.grad.double(), wanted_weight.chunk(ranks)[rank])


def check_a_missing_shard_raises(rank: int, ranks: int) -> None:
    hidden, weight, labels = problem()
    mine = weight.chunk(ranks)[0]  # the same share everywhere: they do not add up
    with pytest.raises(ValueError, match=r"over the group, but vocab_size is 37"):
        linear_cross_entropy(hidden, mine, labels, group=dist.group.WORLD, vocab_size=VOCABULARY)


def run(check: str, ranks: int, store: Path) -> None:
    """Run ``check`` of this file in ``ranks`` processes that meet at the file ``store``."""
    processes = [
        subprocess.Popen([sys.executable, __file__, check, str(rank), str(ranks), str(store)])
        for rank in range(ranks)
    ]
    try:
        assert [p.wait(timeout=120) for p in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize("ranks", [2, 4])
def test_shards_equal_the_whole_vocabulary(ranks: int, tmp_path: Path) -> None:
    run("check_equals_the_whole", ranks, tmp_path / "store")


def test_shards_that_do_not_add_up_raise(tmp_path: Path) -> None:
    run("check_a_missing_shard_raises", 2, tmp_path / "store")


if __name__ == "__main__":
    check, rank, ranks, store = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    globals()[check](rank, ranks)
    dist.destroy_process_group()
