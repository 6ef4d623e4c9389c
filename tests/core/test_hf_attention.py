"""transformers with attn_implementation="hermes": packed rows give what samples give alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hermes_core import hf, hf_attention

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

LENGTHS = (7, 1, 30, 12)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    import transformers

    config = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}[request.param](
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=64, max_position_embeddings=64,
        attn_implementation="sdpa",
    )  # fmt: skip
    hf.register()
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


def samples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 64, (n,), generator=generator) for n in LENGTHS]


def run(model: Any, implementation: str, **inputs: Tensor) -> Tensor:
    model.set_attn_implementation(implementation)
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


def gradients(model: nn.Module, logits: Tensor) -> list[Tensor]:
    """Of a loss that weighs every logit differently."""
    weight = torch.linspace(-1, 1, logits.numel()).view(logits.shape)
    return list(torch.autograd.grad((logits * weight).sum(), list(model.parameters())))


def alone(model: nn.Module) -> Tensor:
    return torch.cat([run(model, "sdpa", input_ids=ids[None])[0] for ids in samples()])


def check(model: nn.Module, packed: Tensor) -> None:
    wanted = alone(model)
    torch.testing.assert_close(packed, wanted, rtol=1e-4, atol=1e-5)
    for ours, right in zip(gradients(model, packed), gradients(model, wanted), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-3, atol=1e-4)


def test_packed_by_position_ids_equals_one_by_one(model: nn.Module) -> None:
    ids = torch.cat(samples())[None]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    check(model, run(model, "hermes", input_ids=ids, position_ids=positions)[0])


def test_packed_by_the_collator_of_transformers_equals_one_by_one(model: nn.Module) -> None:
    from transformers import DataCollatorWithFlattening

    collate = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": ids.tolist()} for ids in samples()])
    batch.pop("labels")
    assert "cu_seq_lens_q" in batch
    check(model, run(model, "hermes", **batch)[0])


def test_two_packed_rows_equal_one_by_one(model: nn.Module) -> None:
    rows = [(7, 1, 30, 12), (20, 30)]
    ids = torch.randint(0, 64, (2, 50), generator=torch.Generator().manual_seed(2))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    packed = run(model, "hermes", input_ids=ids, position_ids=positions)
    for row, lengths, got in zip(ids, rows, packed, strict=True):
        wanted = [run(model, "sdpa", input_ids=one[None])[0] for one in row.split(lengths)]
        torch.testing.assert_close(got, torch.cat(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_one_by_one(model: nn.Module, side: str) -> None:
    ids, mask = torch.zeros(4, 30, dtype=torch.long), torch.zeros(4, 30, dtype=torch.long)
    places = [slice(30 - n, 30) if side == "left" else slice(n) for n in LENGTHS]
    for row, place, sample in zip(range(4), places, samples(), strict=True):
        ids[row, place], mask[row, place] = sample, 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = run(model, "hermes", input_ids=ids, attention_mask=mask, position_ids=positions)
    kept = [logits[row, place] for row, place in enumerate(places)]
    torch.testing.assert_close(torch.cat(kept), alone(model), rtol=1e-4, atol=1e-5)


def test_generation_with_a_cache_equals_sdpa(model: Any) -> None:
    ids = samples()[2][None]
    texts = []
    for implementation in ("sdpa", "hermes"):
        model.set_attn_implementation(implementation)
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        texts.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options))
    assert torch.equal(*texts)


def test_segments_are_made_once_a_batch(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = hf_attention.segments_of_positions
    monkeypatch.setattr(
        hf_attention, "segments_of_positions", lambda *a: made.append(1) or original(*a)
    )
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    run(model, "hermes", input_ids=torch.cat(samples())[None], position_ids=positions)
    assert len(made) == 1
    positions[0, 20] = 0  # another packing in the same tensor
    run(model, "hermes", input_ids=torch.cat(samples())[None], position_ids=positions)
    assert len(made) == 2


def test_a_compiled_model_gives_the_same(model: nn.Module) -> None:
    ids = torch.cat(samples())[None]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    plain = run(model, "hermes", input_ids=ids, position_ids=positions)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits = compiled(input_ids=ids, position_ids=positions, use_cache=False).logits
    torch._dynamo.reset()
    torch.testing.assert_close(logits, plain)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dropout": 0.1}, "dropout of 0.1"),
        ({"sliding_window": 4}, "a sliding window of 4"),
        ({"softcap": 30.0}, "softcap"),
        ({"is_causal": False}, "not causal"),
    ],
)
def test_what_is_not_computed_is_refused(options: dict[str, Any], words: str) -> None:
    q = torch.zeros(1, 2, 8, 16)
    with pytest.raises(ValueError, match=words):
        hf_attention.attention_forward(nn.Module(), q, q, q, None, **options)
