"""Models on which the loss in transformers would be wrong: refused, and left as they were."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    xLSTMConfig,
    xLSTMForCausalLM,
)

from hermes_core import hf_loss
from hermes_core.hf import compute_loss_func

SIZES: dict[str, Any] = {
    "vocab_size": 301, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def llama(kind: Any = LlamaForCausalLM) -> Any:
    return kind(LlamaConfig(**SIZES))


def recurrent_gemma() -> Any:
    config = RecurrentGemmaConfig(**SIZES | {"num_hidden_layers": 3}, lru_width=32, head_dim=8)
    return RecurrentGemmaForCausalLM(config)  # caps at 30


def xlstm() -> Any:
    config = xLSTMConfig(vocab_size=301, hidden_size=128, num_hidden_layers=1, num_heads=4)
    return xLSTMForCausalLM(config)  # caps at 30


def test_a_model_that_changes_its_logits_is_refused() -> None:
    model = llama()
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match=r"final_logit_softcapping is 30\.0"):
        compute_loss_func(model)


@pytest.mark.parametrize("make", [recurrent_gemma, xlstm])
def test_a_cap_is_refused_by_its_name(make: Any) -> None:
    with pytest.raises(ValueError, match=r"soft_cap is 30\.0"):
        compute_loss_func(make())


def test_a_decoder_whose_labels_are_not_shifted_is_refused() -> None:
    config = BartConfig(
        vocab_size=301, d_model=32, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=64
    )
    with pytest.raises(ValueError, match="BartForCausalLM compares its logits with the labels at"):
        compute_loss_func(BartForCausalLM(config))


class Capped(LlamaForCausalLM):
    def forward(self, *args: Any, **inputs: Any) -> Any:
        outputs = super().forward(*args, **inputs)
        outputs.logits = 900 * torch.tanh(outputs.logits / 900)
        return outputs


class Masked(LlamaForCausalLM):
    def forward(self, *args: Any, **inputs: Any) -> Any:
        outputs = super().forward(*args, **inputs)
        outputs.logits[:, :, 7:9] = torch.finfo(outputs.logits.dtype).min  # in place: Chameleon
        return outputs


class Cut(LlamaForCausalLM):
    def forward(self, *args: Any, **inputs: Any) -> Any:
        outputs = super().forward(*args, **inputs)
        outputs.logits = outputs.logits[..., :300]
        return outputs


@pytest.mark.parametrize("kind", [recurrent_gemma, xlstm, Capped, Masked, Cut])
def test_a_run_shows_what_no_name_tells(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_loss, "TRANSFORMS", {})
    model = llama(kind) if isinstance(kind, type) else kind()
    head = model.get_output_embeddings()
    with pytest.raises(ValueError, match="changes its logits after the output head"):
        compute_loss_func(model)
    assert model.get_output_embeddings() is head
    assert not head._forward_hooks


class Elsewhere(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        outputs = super().forward(input_ids, **inputs, logits_to_keep=1)
        outputs.logits = self.model(input_ids).last_hidden_state @ self.lm_head.weight.T
        return outputs


def test_a_model_whose_logits_are_not_its_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="changes its logits after the output head"):
        compute_loss_func(llama(Elsewhere))


class Busy(LlamaForCausalLM):
    """Leaves traces of each run."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("runs", torch.zeros(2))
        self.register_buffer("drawn", torch.zeros(2))

    def forward(self, *args: Any, **inputs: Any) -> Any:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.runs += 1
        self.drawn = torch.rand(2)
        return super().forward(*args, **inputs)


def test_the_run_leaves_no_trace() -> None:
    model = llama(Busy)
    model.model.layers[0].eval()
    flags = [(m, m.training) for m in model.modules() if m is not model.lm_head]
    drawn, state = model.drawn, torch.get_rng_state()
    compute_loss_func(model)
    assert all(module.training is flag for module, flag in flags)
    assert model.lm_head.training
    assert model.drawn is drawn
    assert model.runs.tolist() == model.drawn.tolist() == [0, 0]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_without_memory_is_checked_by_name_alone() -> None:
    with torch.device("meta"):
        model, capped = llama(), llama()
    capped.config.logit_scale = 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compute_loss_func(model)
    with pytest.raises(ValueError, match=r"logit_scale is 0\.5"):
        compute_loss_func(capped)


class Wanting(LlamaForCausalLM):
    def forward(self, pixels: Tensor, **inputs: Any) -> Any:
        return super().forward(**inputs)


def test_a_model_that_does_not_run_alone_is_taken_with_a_warning() -> None:
    model = llama(Wanting)
    with pytest.warns(UserWarning, match=r"did not run on two tokens \(TypeError: .*pixels"):
        compute_loss_func(model)
    assert isinstance(model.get_output_embeddings(), hf_loss.WaitingHead)
    assert model.training


class Scaling(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return 5 * super().forward(hidden)


def test_a_head_with_its_own_forward_is_refused() -> None:
    model = llama()
    model.lm_head = Scaling(32, 301, bias=False)
    with pytest.raises(ValueError, match=r"Scaling\(.*does more than nn.Linear"):
        compute_loss_func(model)


def test_a_head_with_a_computed_weight_is_refused() -> None:
    model = llama()
    nn.utils.parametrizations.weight_norm(model.lm_head)
    with pytest.raises(ValueError, match=r"(?s)weight.*does more than nn.Linear"):
        compute_loss_func(model)


def test_an_encoder_decoder_is_refused() -> None:
    config = T5Config(vocab_size=64, d_model=32, d_ff=64, d_kv=8, num_layers=1, num_heads=4)
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        compute_loss_func(T5ForConditionalGeneration(config))


def test_a_weight_that_is_sharded_away_after_the_forward_pass_is_named() -> None:
    model = llama().train()
    loss_of = compute_loss_func(model)
    ids_BL = torch.zeros(1, 4, dtype=torch.int64)
    outputs = model(ids_BL)
    model.lm_head.weight.data = torch.empty(0)  # as ZeRO-3 does
    with pytest.raises(ValueError, match=r"weight, \(0,\), is sharded away after the forward pass"):
        loss_of(outputs, ids_BL)
