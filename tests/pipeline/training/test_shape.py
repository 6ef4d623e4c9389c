"""The shape of a model, and what it says about the work of a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hermes_pipeline.errors import UserError
from hermes_pipeline.training.shape import BASES, Shape, hugging_face_config, read_shape


def test_training_flops_of_qwen3_14b_by_hand() -> None:
    attention = 5120 * (40 + 2 * 8) * 128 + 40 * 128 * 5120 + 2 * 128
    layer = attention + 3 * 5120 * 17_408 + 2 * 5120
    parameters = 40 * layer + 2 * 151_936 * 5120 + 5120
    assert parameters == 14_768_307_200
    assert BASES["qwen3_14b"].training_flops() == (6 * parameters, 6 * 40 * 5120)


def test_training_flops_count_heads_where_they_are_wider_than_the_model(qwen: Shape) -> None:
    assert qwen.heads * qwen.head_size == 128 != qwen.width
    assert qwen.training_flops()[1] == 6 * 2 * 128


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", "2", r"num_hidden_layers = '2' is not valid for a model"),
        ("num_attention_heads", 0, r"num_attention_heads = 0 is not valid for a model"),
        ("hidden_size", None, r"hidden_size = None is not valid for a model"),
        ("vocab_size", 1e3, r"vocab_size = 1000\.0 is not valid for a model"),
        ("head_dim", True, r"head_dim = True is not valid for a model"),
        (
            "max_position_embeddings",
            "inf",
            r"max_position_embeddings = 'inf' is not valid for a model",
        ),
        ("rms_norm_eps", "x", r"rms_norm_eps = 'x' is not valid for a model"),
        ("tie_word_embeddings", "no", r"tie_word_embeddings = 'no' is not valid for a model"),
        ("layer_types", 5, r"layer_types = 5 is not valid for a model"),
        ("rope_parameters", [1], r"RoPE cannot be read"),
        ("rope_parameters", {"rope_theta": "x"}, r"RoPE cannot be read: could not convert"),
    ],
)
def test_config_of_a_wrong_kind_is_refused(
    tmp_path: Path, qwen: Shape, key: str, value: Any, message: str
) -> None:
    config = hugging_face_config(qwen, dtype="float32", token_ids={})
    nothing = {"num_key_value_heads": None, "head_dim": 32, "layer_types": None}
    (tmp_path / "config.json").write_text(json.dumps(config | nothing))
    assert read_shape(tmp_path).kv_heads == qwen.heads
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=rf"config\.json: {message}"):
        read_shape(tmp_path)
