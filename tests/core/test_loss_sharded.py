"""The vocabulary-parallel loss over gloo: the shards of two and four processes equal the whole."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from hermes_core.loss import linear_cross_entropy, token_nll
from hermes_core.loss_head import LossHead
from ranks import be_a_rank, run_ranks

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


def check_statistics_equal_the_whole(rank: int, ranks: int) -> None:
    hidden, weight, labels = (x.double() if x.is_floating_point() else x for x in problem())

    def gradients(
        weight: torch.Tensor, group: dist.ProcessGroup | None
    ) -> tuple[torch.Tensor, ...]:
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        found = token_nll(*leaves, labels, softcap=2.0, group=group, vocab_size=VOCABULARY)
        (found.nll_T * 2 - found.entropy_T).sum().backward()
        assert leaves[0].grad is not None
        assert leaves[1].grad is not None
        return found.nll_T.detach(), found.entropy_T.detach(), leaves[0].grad, leaves[1].grad

    *wanted, wanted_weight = gradients(weight, None)
    *found, found_weight = gradients(weight.chunk(ranks)[rank], dist.group.WORLD)
    dist.all_reduce(found[2])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(found_weight, wanted_weight.chunk(ranks)[rank])


def check_options_hold_over_shards(rank: int, ranks: int) -> None:
    hidden, weight, labels = problem()
    options = {"z_loss": 1e-2, "softcap": 2.0, "denominator": 7.0, "vocab_size": VOCABULARY}
    options["token_weights_T"] = torch.rand(TOKENS, generator=torch.Generator().manual_seed(1))
    whole = weight.clone().requires_grad_()
    linear_cross_entropy(hidden, whole, labels, **options).total.backward()
    assert whole.grad is not None
    mine = weight.chunk(ranks)[rank].clone().requires_grad_()
    linear_cross_entropy(hidden, mine, labels, group=dist.group.WORLD, **options).total.backward()
    torch.testing.assert_close(mine.grad, whole.grad.chunk(ranks)[rank], rtol=1e-4, atol=1e-6)


def check_halves_over_shards(rank: int, ranks: int) -> None:
    """Of 40 kept tokens 24 are computed again: with the whole group's log-sum-exps."""
    hidden, weight, labels = problem()
    halves = [x.bfloat16() for x in (hidden, weight)]
    options = {"z_loss": 1e-2, "denominator": 7.0, "vocab_size": VOCABULARY}
    options["chunk_bytes"] = 2 * -(-VOCABULARY // ranks) * 8

    def gradients(
        hidden: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup | None, backend: str
    ) -> tuple[torch.Tensor, ...]:
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = linear_cross_entropy(*leaves, labels, group=group, backend=backend, **options)
        return torch.autograd.grad(loss.total, leaves)

    wide = [x.double() for x in halves]
    right = gradients(*wide, None, "reference")
    plain = gradients(*halves, None, "reference")
    mine = halves[1].chunk(ranks)[rank]
    found = [x.float() for x in gradients(halves[0], mine, dist.group.WORLD, "torch")]
    dist.all_reduce(found[0])
    part = [right[0], right[1].chunk(ranks)[rank]], [plain[0], plain[1].chunk(ranks)[rank]]
    for ours, true, theirs in zip(found, *part, strict=True):
        error = (ours.double() - true).norm() / true.norm()
        assert error <= 1.2 * (theirs.double() - true).norm() / true.norm() + 2e-3


def head_and_gradient() -> tuple[LossHead, torch.Tensor]:
    """A head with the problem's weight, and the gradient that one process gives it."""
    hidden, weight, labels = problem()
    head = LossHead(SIZE, VOCABULARY)
    head.weight.data.copy_(weight)
    alone = weight.clone().requires_grad_()
    linear_cross_entropy(hidden, alone, labels, denominator=40).total.backward()
    assert alone.grad is not None
    return head, alone.grad


def check_head_under_fsdp(rank: int, ranks: int) -> None:
    head, wanted = head_and_gradient()
    fully_shard(head, mesh=init_device_mesh("cpu", (ranks,)))
    head.set_gradient_divide_factor(1.0)
    head.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
    hidden, _, labels = problem()
    hidden = hidden.chunk(ranks)[rank].clone().requires_grad_()
    mine = labels.chunk(ranks)[rank].clone()
    if rank == 0:
        labels[: len(mine)] = mine[:] = IGNORE  # no kept token here, and nobody hangs
        alone = head_and_gradient()[0]
        alone(problem()[0], labels, denominator=40).total.backward()
        wanted = alone.weight.grad
    head(hidden, mine, denominator=40).total.backward()
    found = head.weight.grad.full_tensor()
    if rank == 0:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def check_head_with_its_vocabulary_sharded(rank: int, ranks: int) -> None:
    head, wanted = head_and_gradient()
    mesh = init_device_mesh("cpu", (ranks,))
    head.weight = torch.nn.Parameter(distribute_tensor(head.weight.detach(), mesh, [Shard(0)]))
    hidden, _, labels = problem()
    head(hidden, labels, denominator=40).total.backward()
    torch.testing.assert_close(head.weight.grad.full_tensor(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ranks", [2, 4])
def test_shards_equal_the_whole_vocabulary(ranks: int, tmp_path: Path) -> None:
    run_ranks(__file__, "check_equals_the_whole", ranks, tmp_path / "store")


@pytest.mark.parametrize(
    "check",
    [
        "check_statistics_equal_the_whole",
        "check_options_hold_over_shards",
        "check_halves_over_shards",
        "check_head_under_fsdp",
        "check_head_with_its_vocabulary_sharded",
    ],
)
def test_two_processes_equal_one(check: str, tmp_path: Path) -> None:
    run_ranks(__file__, check, 2, tmp_path / "store")


def test_shards_that_do_not_add_up_raise(tmp_path: Path) -> None:
    run_ranks(__file__, "check_a_missing_shard_raises", 2, tmp_path / "store")


if __name__ == "__main__":
    be_a_rank(globals())
