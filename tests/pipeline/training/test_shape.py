"""The shape of a model, and what it says about the work of a step."""

from __future__ import annotations

from hermes_pipeline.training.shape import BASES, Shape


def test_training_flops_of_qwen3_14b_by_hand() -> None:
    attention = 5120 * (40 + 2 * 8) * 128 + 40 * 128 * 5120 + 2 * 128
    layer = attention + 3 * 5120 * 17_408 + 2 * 5120
    parameters = 40 * layer + 2 * 151_936 * 5120 + 5120
    assert parameters == 14_768_307_200
    assert BASES["qwen3_14b"].training_flops() == (6 * parameters, 6 * 40 * 5120)


def test_training_flops_count_heads_where_they_are_wider_than_the_model(qwen: Shape) -> None:
    assert qwen.heads * qwen.head_size == 128 != qwen.width
    assert qwen.training_flops()[1] == 6 * 2 * 128
