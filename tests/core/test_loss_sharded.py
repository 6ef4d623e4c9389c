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

from hermes_core.loss import linear_cross_entropy, masked_cross_entropy, token_nll
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


def check_two_vocabularies_share_a_group(rank: int, ranks: int) -> None:
    """Rank 0 has two rows of both, rank 1 one and then two: both ask twice."""
    hidden, weight, labels = problem()
    for vocabulary in (3, 4, 3):
        for known in (vocabulary, None):
            kept = labels.where(labels < 0, labels % vocabulary)
            whole = linear_cross_entropy(hidden, weight[:vocabulary], kept).total
            mine = weight[:vocabulary].split(2)[rank]
            found = linear_cross_entropy(
                hidden, mine, kept, group=dist.group.WORLD, vocab_size=known
            ).total
            torch.testing.assert_close(found, whole)


def check_shards_that_change_raise(rank: int, ranks: int) -> None:
    hidden, weight, labels = problem()
    options = {"group": dist.group.WORLD, "vocab_size": VOCABULARY}
    linear_cross_entropy(hidden, weight.chunk(ranks)[rank], labels, **options)
    with pytest.raises(ValueError, match=r"rows here but had (19|18) when vocab_size was 37"):
        linear_cross_entropy(hidden, weight.split(20)[rank], labels, **options)


def check_padding_of_minus_infinity(rank: int, ranks: int) -> None:
    """The last rank's whole share is padding, and one logit of the first's."""
    hidden, weight, labels = problem()
    logits = hidden @ weight.T
    size = -(-VOCABULARY // ranks)
    logits[:, size * (ranks - 1) :] = -float("inf")
    logits[:, 5] = -float("inf")
    labels = labels.where(labels < 0, labels % 5)
    true = logits.double().requires_grad_()
    whole = torch.nn.functional.cross_entropy(true, labels, reduction="sum")
    whole.backward()
    for backend in ("torch", "triton"):
        mine = logits.split(size, 1)[rank].clone().requires_grad_()
        found = masked_cross_entropy(
            mine, labels, group=dist.group.WORLD, vocab_size=VOCABULARY, backend=backend
        ).total
        found.backward()
        torch.testing.assert_close(found.double(), whole)
        wanted = true.grad.split(size, 1)[rank]
        torch.testing.assert_close(mine.grad.double(), wanted, rtol=1e-5, atol=1e-6)


def check_the_compiler_takes_shards(rank: int, ranks: int) -> None:
    hidden, weight, labels = problem()
    head, wanted = head_and_gradient()
    mesh = init_device_mesh("cpu", (ranks,))
    head.weight = torch.nn.Parameter(distribute_tensor(head.weight.detach(), mesh, [Shard(0)]))

    def total(hidden: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(
            hidden, mine, labels, denominator=40, group=dist.group.WORLD, vocab_size=VOCABULARY
        ).total

    for dynamic in (False, None):
        mine = weight.chunk(ranks)[rank].clone().requires_grad_()
        compiled = torch.compile(total, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        compiled(hidden, mine).backward()
        close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-6)
        close(mine.grad, wanted.chunk(ranks)[rank])
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    compiled(hidden, labels, denominator=40).total.backward()
    close(head.weight.grad.full_tensor(), wanted)


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


def check_a_scattered_head_raises(rank: int, ranks: int) -> None:
    """FSDP2 wraps the whole model and the head is called outside: it looks like a vocabulary's."""
    hidden, _, labels = problem()
    model = torch.nn.Sequential(torch.nn.Linear(SIZE, SIZE), LossHead(SIZE, VOCABULARY))
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)), reshard_after_forward=True)
    with pytest.raises(ValueError, match="weight is scattered by FSDP2"):
        model[1](hidden, labels)


def check_head_sharded_twice(rank: int, ranks: int) -> None:
    """Two by two: over the vocabulary, and by FSDP2 over ranks that have unlike tokens."""
    hidden, _, labels = problem()
    head, wanted = head_and_gradient()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    share = distribute_tensor(head.weight.detach(), mesh["tp"], [Shard(0)])
    head.weight = torch.nn.Parameter(share)
    fully_shard(head, mesh=mesh["dp"])
    head.set_gradient_divide_factor(1.0)
    head.set_force_sum_reduction_for_comms(True)
    mine = slice(0, 7) if mesh["dp"].get_local_rank() == 0 else slice(7, TOKENS)
    head(hidden[mine], labels[mine], denominator=40).total.backward()
    torch.testing.assert_close(head.weight.grad.full_tensor(), wanted, rtol=1e-4, atol=1e-6)


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
        "check_two_vocabularies_share_a_group",
        "check_padding_of_minus_infinity",
        "check_the_compiler_takes_shards",
    ],
)
def test_two_processes_equal_one(check: str, tmp_path: Path) -> None:
    run_ranks(__file__, check, 2, tmp_path / "store")


def test_a_head_sharded_over_vocabulary_and_data_equals_one_process(tmp_path: Path) -> None:
    run_ranks(__file__, "check_head_sharded_twice", 4, tmp_path / "store")


@pytest.mark.parametrize(
    "check",
    [
        "check_a_missing_shard_raises",
        "check_shards_that_change_raise",
        "check_a_scattered_head_raises",
    ],
)
def test_shards_that_are_wrong_raise(check: str, tmp_path: Path) -> None:
    run_ranks(__file__, check, 2, tmp_path / "store")


if __name__ == "__main__":
    be_a_rank(globals())
