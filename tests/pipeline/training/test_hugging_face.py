"""Weights in and out: torchtitan's models compute what transformers computes.

Shapes: T packed tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hermes_core import Rows, Samples, build_rows, pack
from hermes_core.segments import segments
from hermes_pipeline.training.shape import Shape, read_shape

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

LENGTHS = (150, 3, 61, 300, 17)
ROW = 320


@dataclass(frozen=True)
class Pair:
    """One set of weights in torchtitan and in transformers."""

    shape: Shape
    ours: nn.Module
    adapter: Any
    theirs: nn.Module
    weights: dict[str, Tensor]


def torchtitan_model(shape: Shape, folder: Path) -> tuple[nn.Module, Any, dict[str, Tensor]]:
    from safetensors.torch import load_file

    from hermes_pipeline.training.recipes import load_recipe
    from hermes_pipeline.training.titan.engine import trainer_config

    config = trainer_config(
        load_recipe("finetune", [f"data.row_length={ROW}", "training.recompute=none"]),
        shape,
        local_rows=1,
        store=folder,
        model=folder,
        out=folder,
    )
    spec = config.model_spec
    spec.model.update_from_config(config=config)
    with torch.device("meta"):
        model = spec.model.build()
    model.to_empty(device="cpu")
    model.init_states(buffer_device=torch.device("cpu"))
    adapter = spec.state_dict_adapter(spec.model, None)
    weights = load_file(folder / "model.safetensors")
    result = model.load_state_dict(adapter.from_hf(dict(weights)), strict=False)
    assert not result.unexpected_keys
    assert not result.missing_keys
    return model, adapter, weights


@pytest.fixture(scope="module", params=["qwen", "qwen tied", "llama", "llama tied"])
def pair(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    qwen: Shape,
    llama: Shape,
) -> Pair:
    from transformers import AutoModelForCausalLM

    name = request.param
    shape = replace(qwen if "qwen" in name else llama, tied="tied" in name)
    folder = tmp_path_factory.mktemp("model")
    request.getfixturevalue("make_model")(folder, shape, seed=3)
    ours, adapter, weights = torchtitan_model(shape, folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Pair(shape, ours, adapter, theirs.eval(), weights)


@pytest.fixture(scope="module")
def samples() -> Samples:
    rng = np.random.default_rng(5)
    return Samples.from_lists(
        [rng.integers(0, 128, n).tolist() for n in LENGTHS],
        [(rng.random(n) < 0.6).tolist() for n in LENGTHS],
    )


@pytest.fixture(scope="module")
def rows(samples: Samples) -> Rows:
    packing = pack(samples.lengths, row_length=ROW, seed=0)
    assert packing.rows == 2
    return build_rows(samples, packing, range(2))


def packed_logits(model: nn.Module, rows: Rows) -> Tensor:
    logits = model(
        torch.from_numpy(rows.input_ids),
        torch.from_numpy(rows.positions),
        segments(rows.cu_seqlens),
    )
    return logits.flatten(0, 1)


def single_logits(model: nn.Module, rows: Rows) -> Tensor:
    """The same tokens, each segment alone in a batch of its own."""
    ids = torch.from_numpy(rows.input_ids).flatten()
    bounds = rows.cu_seqlens.tolist()
    parts = [model(ids[start:end][None]).logits[0] for start, end in itertools.pairwise(bounds)]
    return torch.cat(parts)


def loss(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits_TV, labels_T, ignore_index=-100)


def test_shape_survives_config_json(pair: Pair, tmp_path: Path) -> None:
    pair.theirs.config.save_pretrained(tmp_path)
    assert read_shape(tmp_path) == pair.shape


def test_packed_rows_give_the_logits_of_samples_one_by_one(pair: Pair, rows: Rows) -> None:
    with torch.no_grad():
        ours, theirs = packed_logits(pair.ours, rows), single_logits(pair.theirs, rows)
    assert theirs.abs().max() > 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_packed_rows_give_the_gradients_of_samples_one_by_one(pair: Pair, rows: Rows) -> None:
    labels = torch.from_numpy(rows.labels).flatten()
    pair.ours.zero_grad()
    pair.theirs.zero_grad()
    ours, theirs = packed_logits(pair.ours, rows), single_logits(pair.theirs, rows)
    loss(ours, labels).backward()
    loss(theirs, labels).backward()
    gradients = hugging_face_gradients(pair)
    for name, parameter in pair.theirs.named_parameters():
        assert parameter.grad is not None
        error = (gradients[name] - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-5, name


def hugging_face_gradients(pair: Pair) -> dict[str, Tensor]:
    """Gradients of torchtitan's parameters under the names and layouts of transformers."""
    gradients = {name: p.grad for name, p in pair.ours.named_parameters() if p.grad is not None}
    for number, layer in pair.ours.layers.items():  # type: ignore[operator, union-attr]
        prefix = f"layers.{number}.attention.qkv_linear."
        layer.attention.qkv_linear._split_qkv_on_save(
            layer.attention.qkv_linear, gradients, prefix, None
        )
    if pair.shape.tied:
        gradients["tok_embeddings.weight"] = pair.ours.tok_embeddings.weight.grad  # type: ignore[union-attr, assignment]
    return dict(pair.adapter.to_hf(gradients))


def test_labels_moved_by_one_are_noticed(pair: Pair, rows: Rows) -> None:
    labels = torch.from_numpy(rows.labels).flatten()
    with torch.no_grad():
        right = loss(single_logits(pair.theirs, rows), labels)
        wrong = loss(packed_logits(pair.ours, rows), labels.roll(1))
    assert abs(right - wrong) > 1e-3


def test_attention_across_samples_is_noticed(pair: Pair, rows: Rows) -> None:
    whole_rows = np.array([0, ROW, 2 * ROW], np.int32)
    with torch.no_grad():
        leaking = pair.ours(
            torch.from_numpy(rows.input_ids),
            torch.from_numpy(rows.positions),
            segments(whole_rows),
        ).flatten(0, 1)
        right = single_logits(pair.theirs, rows)
    assert (leaking - right).abs().max() > 1e-2


def test_names_and_layouts_go_there_and_back_bit_by_bit(pair: Pair) -> None:
    back = pair.adapter.to_hf(pair.ours.state_dict())
    assert back.keys() == pair.weights.keys()
    for name, tensor in pair.weights.items():
        assert torch.equal(back[name], tensor), name


def test_an_export_of_several_files_is_the_model(pair: Pair, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save
    from transformers import AutoModelForCausalLM

    from hermes_pipeline.training.titan.export import export_weights

    with pytest.warns(UserWarning, match="assuming the intent is to save in a single process"):
        save(pair.ours.state_dict(), checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    out = tmp_path / "model"
    pair.theirs.config.save_pretrained(out)  # type: ignore[operator, union-attr]
    most = 2 * max(tensor.nbytes for tensor in pair.weights.values())
    export_weights(tmp_path / "checkpoint", out, pair.shape, dtype="float32", shard_bytes=most)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < most + 10_000 for file in files)
    read = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    for name, tensor in pair.weights.items():
        assert torch.equal(read[name], tensor), name
