"""The loss in transformers: equal to the model's own, whatever the accumulation, without logits."""

from __future__ import annotations

import copy
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
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)

from hermes_core import hf_loss
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


def wanted_loss(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """From logits computed anew with the weight that the model has now."""
    hidden = model.model(ids).last_hidden_state
    logits = hidden @ model.lm_head.weight.T
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_the_head_of_a_copy_is_the_one_trained() -> None:
    ids, labels = batch()
    model = llama()
    loss_of = compute_loss_func(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(3)
    loss = loss_of(other(ids), labels)
    loss.backward()
    torch.testing.assert_close(loss, wanted_loss(other, ids, labels))
    assert other.lm_head.weight.grad is not None
    assert model.lm_head.weight.grad is None


class Saved(nn.Module):
    """As PEFT's modules_to_save: a copy of the head runs in its place."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.original, self.copied = head, copy.deepcopy(head)

    @property
    def weight(self) -> Any:
        return self.copied.weight

    def forward(self, hidden: Tensor) -> Any:
        return self.copied(hidden)


def test_a_head_copied_into_a_wrapper_is_the_one_trained() -> None:
    ids, labels = batch()
    model = llama()
    loss_of = compute_loss_func(model)
    model.lm_head = Saved(model.lm_head)
    with torch.no_grad():
        model.lm_head.copied.weight.mul_(3)
    loss = loss_of(model(ids), labels)
    loss.backward()
    torch.testing.assert_close(loss, wanted_loss(model, ids, labels))
    assert model.lm_head.copied.weight.grad is not None
    assert model.lm_head.original.weight.grad is None


@pytest.mark.parametrize("vocabulary", [301, 32])  # 32: logits are as wide as hidden states
@pytest.mark.parametrize("training", [True, False])
def test_a_head_put_back_is_noticed(vocabulary: int, training: bool) -> None:
    ids, labels = (x.clamp(max=31) for x in batch())
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": vocabulary})).train(training)
    head = model.get_output_embeddings()
    loss_of = compute_loss_func(model)
    model.set_output_embeddings(head)
    with pytest.raises(ValueError, match="output head was replaced"):
        loss_of(model(ids), labels)


def test_a_second_loss_of_one_pass_is_refused_and_keeps_no_weight() -> None:
    ids, labels = batch()
    model = llama()
    loss_of = compute_loss_func(model)
    outputs = model(ids)
    loss_of(outputs, labels)
    assert model.lm_head.note.last is None
    with pytest.raises(ValueError, match="a second loss of one forward pass"):
        loss_of(outputs, labels)


def test_a_model_may_be_prepared_twice() -> None:
    ids, labels = batch()
    model = llama()
    first, second = compute_loss_func(model), compute_loss_func(model, z_loss=0.0)
    torch.testing.assert_close(first(model(ids), labels), second(model(ids), labels))


def test_adapters_of_linear_layers_do_not_take_the_head() -> None:
    model = llama()
    compute_loss_func(model)
    # PEFT then refuses LoRA on it; else LoRA would add its logits to hidden states.
    assert not isinstance(model.get_output_embeddings(), nn.Linear)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function:DeprecationWarning")  # dynamo's
def test_the_model_compiles_whole() -> None:
    ids, labels = batch()
    plain, model = llama(), llama()
    wanted = plain(ids, labels=labels).loss
    wanted.backward()
    loss_of = compute_loss_func(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = loss_of(compiled(ids, use_cache=False), labels)
    loss.backward()
    torch.testing.assert_close(loss, wanted)
    for a, b in zip(gradients(model), gradients(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("asked", "product"), [("bfloat16", "bfloat16"), ("float16", "float32")])
def test_the_product_is_in_the_type_of_the_forward_pass(
    asked: str, product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = dtypes_of_products(monkeypatch)
    ids, labels = batch()
    model = llama()
    loss_of = compute_loss_func(model)
    with torch.autocast("cpu", getattr(torch, asked)):
        outputs = model(ids)
    outputs.logits = outputs.logits.float()  # as accelerate does
    loss_of(outputs, labels).backward()
    assert seen == [(getattr(torch, product),) * 2]


def dtypes_of_products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, torch.dtype]]:
    """Of hidden states and weight, filled as losses are computed."""
    seen = []
    plain = hf_loss.linear_cross_entropy

    def spy(hidden: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Any:
        seen.append((hidden.dtype, weight.dtype))
        return plain(hidden, weight, *rest, **options)

    monkeypatch.setattr(hf_loss, "linear_cross_entropy", spy)
    return seen


def mixtral() -> Any:
    return MixtralForCausalLM(
        MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True,
                      router_aux_loss_coef=1.0)
    )  # fmt: skip


def qwen2_moe() -> Any:
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=16,
                       shared_expert_intermediate_size=16, output_router_logits=True,
                       router_aux_loss_coef=0.5)
    )  # fmt: skip


def granite_moe() -> Any:
    return GraniteMoeForCausalLM(
        GraniteMoeConfig(**SIZES, num_local_experts=4, output_router_logits=True,
                         router_aux_loss_coef=1.0)
    )  # fmt: skip


@pytest.mark.parametrize("make", [mixtral, qwen2_moe, granite_moe])
@pytest.mark.parametrize("training", [True, False])
def test_the_loss_of_routers_is_the_models_own(make: Any, training: bool) -> None:
    ids, labels = batch()
    model = make().train(training)
    wanted = model(ids, labels=labels).loss
    loss = compute_loss_func(model)(model(ids), labels)
    torch.testing.assert_close(loss, wanted)


def test_a_loss_of_routers_without_a_factor_is_refused() -> None:
    ids, labels = batch()
    model = llama()
    loss_of = compute_loss_func(model)
    outputs = model(ids)
    outputs.aux_loss = torch.ones(())
    with pytest.raises(ValueError, match="neither it nor its config has router_aux_loss_coef"):
        loss_of(outputs, labels)


def trained(folder: Path, *, rows: int, accumulation: int, bf16: bool = False) -> list[Tensor]:
    """Weights after two steps of eight rows each, with plain descent."""
    model = llama()
    ids, labels = batch()
    samples = [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]
    arguments = TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=rows, optim="sgd",
        gradient_accumulation_steps=accumulation, learning_rate=1.0, lr_scheduler_type="constant",
        max_grad_norm=0.0, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, bf16=bf16,
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_trainer_in_bf16_multiplies_in_bf16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = dtypes_of_products(monkeypatch)
    trained(tmp_path, rows=8, accumulation=1, bf16=True)
    assert seen == [(torch.bfloat16,) * 2] * 2


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
