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


def test_a_static_cache_shows_no_slot_that_is_empty(model: Any) -> None:
    from transformers import StaticCache

    steps = {}
    for implementation in ("sdpa", "hermes"):
        model.set_attn_implementation(implementation)
        cache = StaticCache(config=model.config, max_cache_len=9)
        ids, mask = samples()[0].repeat(2, 1), torch.ones(2, 7, dtype=torch.long)
        mask[1, 0] = 0
        with torch.no_grad():
            steps[implementation] = [
                model(
                    input_ids=ids[:, at : at + 1],
                    attention_mask=mask[:, : at + 1],
                    position_ids=torch.tensor([[at], [max(0, at - 1)]]),
                    past_key_values=cache,
                ).logits
                for at in range(7)
            ]
    ours, theirs = (torch.cat(steps[name][1:]) for name in ("hermes", "sdpa"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_autocast_computes_what_it_does_with_sdpa(model: Any) -> None:
    ids, losses = samples()[2][None], []
    for implementation in ("sdpa", "hermes"):
        with torch.autocast("cpu", torch.bfloat16):
            logits = run(model, implementation, input_ids=ids)
        assert logits.dtype == torch.bfloat16
        losses.append(nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:]))
        losses[-1].backward()
        model.zero_grad()
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-3, atol=0)


def test_tensors_of_inference_are_taken(model: Any) -> None:
    ids = torch.cat(samples())[None]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    with torch.inference_mode():
        inside = positions.clone()
        logits = run(model, "hermes", input_ids=ids, position_ids=inside)
    torch.testing.assert_close(logits[0], alone(model), rtol=1e-4, atol=1e-5)


def test_a_batch_is_left_as_it_was(model: nn.Module) -> None:
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    run(model, "hermes", input_ids=torch.cat(samples())[None], position_ids=positions)
    assert vars(positions) == {}


def test_heads_of_values_may_be_smaller() -> None:
    q, k = torch.randn(2, 1, 4, 8, 16).unbind()
    v = torch.randn(1, 4, 8, 10)
    out, _ = hf_attention.attention_forward(nn.Module(), q, k, v, None)
    right = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, right.transpose(1, 2), rtol=1e-4, atol=1e-5)


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
        ({"sliding_window": 4}, "sliding window of 4"),
        ({"softcap": 30.0}, "softcap"),
        ({"is_causal": False}, "not causal"),
    ],
)
def test_what_is_not_computed_is_refused(options: dict[str, Any], words: str) -> None:
    q = torch.zeros(1, 2, 8, 16)
    with pytest.raises(ValueError, match=words):
        hf_attention.attention_forward(nn.Module(), q, q, q, None, **options)


def test_a_mask_of_four_dimensions_is_refused(model: nn.Module) -> None:
    ids = samples()[0][None]
    mask = torch.ones(7, 7).tril().bool()[None, None]
    with pytest.raises(ValueError, match="has no mask of 4 dimensions; use 'flex_attention'"):
        run(model, "hermes", input_ids=ids, attention_mask=mask)


def small(name: str, **options: Any) -> Any:
    """A model of this family."""
    import transformers

    config = getattr(transformers, f"{name}Config")(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **options
    )
    hf.register()
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="hermes")


WINDOWS = [
    ("Llama4Text", {"attention_chunk_size": 6}, "chunk size of 6"),
    ("Phimoe", {"sliding_window": 6}, "sliding window of 6"),
    ("Qwen2", {"sliding_window": 6, "use_sliding_window": True}, "sliding window of 6"),
]


@pytest.mark.parametrize(("name", "options", "words"), WINDOWS)
def test_a_window_that_the_mask_alone_tells_is_refused(
    name: str, options: dict[str, Any], words: str
) -> None:
    sizes = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
    if name != "Qwen2":
        sizes |= {"num_local_experts": 2}
    model = small(name, **sizes, **options, max_window_layers=0)
    assert model(torch.arange(6)[None], use_cache=False).logits.isfinite().all()
    with pytest.raises(ValueError, match=f"has no {words}; use 'flex_attention'"):
        model(torch.arange(7)[None], use_cache=False)


def test_tokens_that_see_later_ones_are_refused() -> None:
    from transformers.masking_utils import create_causal_mask

    def first_three(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key < 3

    model = small("Llama", intermediate_size=48)
    embedded = torch.zeros(1, 7, 32)
    assert create_causal_mask(model.config, embedded, None, None) is None
    with pytest.raises(ValueError, match="has no mask by or_masks; use 'flex_attention'"):
        create_causal_mask(model.config, embedded, None, None, or_mask_function=first_three)


@pytest.mark.parametrize("name", ["Bloom", "GPTNeoXJapanese"])
def test_a_model_with_attention_of_its_own_is_refused(name: str) -> None:
    model = small(name)
    with pytest.raises(ValueError, match=rf"{name}Model computes attention by itself"):
        model(torch.arange(7)[None], use_cache=False)
