"""The loss in transformers: equal to the model's own, whatever the accumulation, without logits."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)

from hermes_core.hf import compute_loss_func

SIZES: dict[str, Any] = {
    "vocab_size": 301, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def tied_qwen3() -> Any:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 301, (8, 16), generator=generator)
    labels = ids.clone()
    labels[torch.rand(8, 16, generator=generator) < 0.6] = -100
    return ids, labels


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("make", [llama, tied_qwen3])
@pytest.mark.parametrize("count", [None, 50])
def test_loss_and_gradients_are_those_of_the_model(make: Any, count: int | None) -> None:
    ids, labels = batch()
    plain, ours = make(), make()
    wanted = plain(ids, labels=labels, num_items_in_batch=count).loss
    wanted.backward()
    loss = compute_loss_func(ours)(ours(ids), labels, num_items_in_batch=count)
    loss.backward()
    torch.testing.assert_close(loss, wanted)
    assert len(gradients(ours)) == len(gradients(plain)) > 5
    for a, b in zip(gradients(ours), gradients(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_no_logit_of_a_masked_position_is_computed() -> None:
    ids, labels = batch()
    model = llama()
    loss_of = compute_loss_func(model)
    with torch.profiler.profile(record_shapes=True) as profile:
        loss_of(model(ids), labels).backward()
    shapes = [s for event in profile.events() for s in event.input_shapes if s[-1:] == [301]]
    assert max(torch.Size(s[:-1]).numel() for s in shapes) == int((labels[:, 1:] != -100).sum())


def test_names_and_ties_of_the_weights_stay() -> None:
    plain, model = tied_qwen3(), tied_qwen3()
    compute_loss_func(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_evaluation_gives_logits_and_the_same_loss() -> None:
    ids, labels = batch()
    model = llama()
    loss_of = compute_loss_func(model)
    training = loss_of(model(ids), labels)
    model.eval()
    outputs = model(ids)
    assert outputs.logits.shape == (8, 16, 301)
    torch.testing.assert_close(loss_of(outputs, labels), training)


def test_a_model_that_changes_its_logits_is_refused() -> None:
    model = llama()
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match=r"final_logit_softcapping is 30\.0"):
        compute_loss_func(model)


def test_a_head_put_back_is_noticed() -> None:
    ids, labels = batch()
    model = llama()
    head = model.get_output_embeddings()
    loss_of = compute_loss_func(model)
    model.set_output_embeddings(head)
    with pytest.raises(ValueError, match="output head was replaced"):
        loss_of(model(ids), labels)


def trained(folder: Path, *, rows: int, accumulation: int) -> list[Tensor]:
    """Weights after two steps of eight rows each, with plain descent."""
    model = llama()
    ids, labels = batch()
    samples = [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]
    arguments = TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=rows, optim="sgd",
        gradient_accumulation_steps=accumulation, learning_rate=1.0, lr_scheduler_type="constant",
        max_grad_norm=0.0, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    loss_of = compute_loss_func(model)
    Trainer(model, arguments, train_dataset=samples, compute_loss_func=loss_of).train()
    return [p.detach() for p in model.parameters()]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's and accelerate's own
def test_the_split_into_accumulation_steps_does_not_matter(tmp_path: Path) -> None:
    whole = trained(tmp_path, rows=8, accumulation=1)
    parts = trained(tmp_path, rows=2, accumulation=4)
    start = [p.detach() for p in llama().parameters()]
    assert max(float((a - b).abs().max()) for a, b in zip(whole, start, strict=True)) > 1e-2
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def trained_by_trl(folder: Path, *, ours: bool) -> tuple[float, list[Tensor]]:
    """The last loss and the weights after two steps of SFTTrainer, half of each sample kept."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = {"<eos>": 0} | {str(i): i for i in range(1, 301)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<eos>")),
        eos_token="<eos>", pad_token="<eos>",
    )  # fmt: skip
    model = llama()
    ids = batch()[0].tolist()
    samples = {"input_ids": ids, "completion_mask": [[0] * 8 + [1] * 8] * len(ids)}
    arguments = SFTConfig(
        str(folder), max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0,
        logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model, arguments, train_dataset=Dataset.from_dict(samples), processing_class=tokenizer,
        compute_loss_func=compute_loss_func(model) if ours else None,
    )  # fmt: skip
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses[-1], [p.detach() for p in model.parameters()]


@pytest.mark.filterwarnings("ignore")  # TRL's own, and that it wants another way from 2.0 on
def test_trl_trains_to_the_weights_of_its_own_loss(tmp_path: Path) -> None:
    loss, weights = trained_by_trl(tmp_path, ours=True)
    wanted, plain = trained_by_trl(tmp_path, ours=False)
    assert loss == pytest.approx(wanted, rel=1e-4)
    for a, b in zip(weights, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_example_learns(repository: Path) -> None:
    script = repository / "python" / "examples" / "trainer_loss.py"
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=200, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"loss ([\d.]+) -> ([\d.]+)", done.stdout)
    assert found is not None
    assert float(found[2]) < 0.9 * float(found[1])
