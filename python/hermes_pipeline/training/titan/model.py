"""A shape as torchtitan's model, with the library's attention in every layer."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from torch import nn
from torchtitan.models import llama3, qwen3
from torchtitan.models.common import ComplexRoPE, CosSinRoPE, Embedding, Linear, RoPE
from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.nn_modules import RMSNorm
from torchtitan.models.common.param_init import skip_param_init
from torchtitan.models.llama3.model import Llama3TransformerBlock
from torchtitan.models.qwen3.model import Qwen3TransformerBlock
from torchtitan.protocols.model_spec import ModelSpec

from hermes_pipeline.training.shape import Shape
from hermes_pipeline.training.titan.attention import SegmentAttention

# Start weights always come from a folder, so this only has to be finite.
LINEAR = {"weight": partial(nn.init.normal_, std=0.02)}
NORM = {"weight": nn.init.ones_}
TIED = {"weight": skip_param_init}


def model_spec(shape: Shape) -> ModelSpec:
    """torchtitan's bundle for a shape: configuration, parallelism and weight names."""
    registry = {"llama3": llama3.model_registry, "qwen3": qwen3.model_registry}[shape.family]
    spec = registry("debugmodel", attn_backend="varlen")
    return dataclasses.replace(spec, flavor=f"{shape.layers}x{shape.width}", model=_model(shape))


def _model(shape: Shape) -> Decoder.Config:
    config = {"llama3": llama3.Llama3Model.Config, "qwen3": qwen3.Qwen3Model.Config}[shape.family]
    return config(
        dim=shape.width,
        vocab_size=shape.vocab_size,
        enable_weight_tying=shape.tied,
        tok_embeddings=Embedding.Config(
            num_embeddings=shape.vocab_size,
            embedding_dim=shape.width,
            param_init=TIED if shape.tied else LINEAR,
        ),
        norm=_norm(shape, shape.width),
        lm_head=Linear.Config(
            in_features=shape.width, out_features=shape.vocab_size, param_init=LINEAR
        ),
        layers=[_layer(shape) for _ in range(shape.layers)],
    )


def _layer(shape: Shape) -> Any:
    block = {"llama3": Llama3TransformerBlock, "qwen3": Qwen3TransformerBlock}[shape.family]
    return block.Config(
        attention_norm=_norm(shape, shape.width),
        ffn_norm=_norm(shape, shape.width),
        attention=make_gqa_config(
            dim=shape.width,
            n_heads=shape.heads,
            n_kv_heads=shape.kv_heads,
            head_dim=shape.head_size,
            wqkv_param_init=LINEAR,
            wo_param_init=LINEAR,
            inner_attention=SegmentAttention.Config(),
            fuse_qkv=True,
            rope=_rope(shape),
            qk_norm=_norm(shape, shape.head_size) if shape.family == "qwen3" else None,
        ),
        feed_forward=make_ffn_config(
            dim=shape.width,
            hidden_dim=shape.ffn_width,
            w1_param_init=LINEAR,
            w2w3_param_init=LINEAR,
        ),
    )


def _norm(shape: Shape, size: int) -> RMSNorm.Config:
    return RMSNorm.Config(normalized_shape=size, eps=shape.norm_eps, param_init=NORM)


def _rope(shape: Shape) -> RoPE.Config:
    common = {
        "dim": shape.head_size,
        "max_seq_len": shape.max_positions,
        "theta": shape.rope_theta,
    }
    if shape.family == "qwen3":
        return CosSinRoPE.Config(**common)
    if shape.rope_scaling is None:
        return ComplexRoPE.Config(**common)
    return ComplexRoPE.Config(
        **common,
        scaling="llama",
        scaling_factor=shape.rope_scaling.factor,
        low_freq_factor=shape.rope_scaling.low_freq_factor,
        high_freq_factor=shape.rope_scaling.high_freq_factor,
        original_max_position_embeddings=shape.rope_scaling.original_max_positions,
    )
