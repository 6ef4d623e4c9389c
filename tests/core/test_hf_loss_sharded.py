"""The loss in transformers under DDP over gloo: two processes train as one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from hermes_core.hf import compute_loss_func
from ranks import be_a_rank, run_ranks

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(180)]


def check_gradients_are_those_of_the_whole(rank: int, ranks: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4,
    )  # fmt: skip
    model, plain = LlamaForCausalLM(config), LlamaForCausalLM(config)
    plain.load_state_dict(model.state_dict())
    ids = torch.randint(0, 61, (4, 16))
    labels = ids.where(torch.rand(4, 16) < 0.5, -100)
    labels[:, 1] = ids[:, 1]
    kept = int((labels[:, 1:] != -100).sum())
    plain(ids, labels=labels).loss.backward()

    loss_of = compute_loss_func(model)
    # Trainer's default for transformers' models.
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    for _ in range(2):  # DDP reports a parameter that it missed in the next step
        model.zero_grad()
        mine = slice(rank, None, ranks)
        loss = ranks * loss_of(parallel(ids[mine]), labels[mine], num_items_in_batch=kept)
        loss.backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def check_a_head_that_is_sharded_again_is_refused(rank: int, ranks: int) -> None:
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4,
    )  # fmt: skip
    ids = torch.randint(0, 61, (2, 16))
    for keeps in (True, False):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        loss_of = compute_loss_func(model)
        fully_shard(model.lm_head, reshard_after_forward=not keeps)
        fully_shard(model)
        if keeps:
            loss_of(model(ids), ids).backward()
        else:
            with pytest.raises(ValueError, match="give the head reshard_after_forward=False"):
                loss_of(model(ids), ids)


def test_a_head_that_is_sharded_again_is_refused(tmp_path: Path) -> None:
    run_ranks(__file__, "check_a_head_that_is_sharded_again_is_refused", 2, tmp_path / "store")


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    run_ranks(__file__, "check_gradients_are_those_of_the_whole", 2, tmp_path / "store")


if __name__ == "__main__":
    be_a_rank(globals())
