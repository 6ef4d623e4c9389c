"""The shape of a Llama 3.1 or Qwen3 model, and how config.json writes it down."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hermes_pipeline.errors import UserError
from hermes_pipeline.training.recipes import Model

Family = Literal["llama3", "qwen3"]
MODEL_TYPES: dict[str, Family] = {"llama": "llama3", "qwen3": "qwen3"}
ARCHITECTURES = {"llama3": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3.1's stretching of long wavelengths."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class Shape:
    """Everything that decides what a model computes, apart from its weights."""

    family: Family
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    ffn_width: int
    vocab_size: int
    tied: bool
    norm_eps: float
    rope_theta: float
    max_positions: int
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads = {self.heads} is no multiple of kv_heads = {self.kv_heads}")
        if self.head_size % 2:
            raise ValueError(f"head_size = {self.head_size} is odd; RoPE turns pairs")

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor, as Hugging Face names them."""
        wide, query, key = self.width, self.heads * self.head_size, self.kv_heads * self.head_size
        tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, wide)}
        for layer in range(self.layers):
            name = f"model.layers.{layer}"
            tensors |= {
                f"{name}.input_layernorm.weight": (wide,),
                f"{name}.self_attn.q_proj.weight": (query, wide),
                f"{name}.self_attn.k_proj.weight": (key, wide),
                f"{name}.self_attn.v_proj.weight": (key, wide),
                f"{name}.self_attn.o_proj.weight": (wide, query),
                f"{name}.post_attention_layernorm.weight": (wide,),
                f"{name}.mlp.gate_proj.weight": (self.ffn_width, wide),
                f"{name}.mlp.up_proj.weight": (self.ffn_width, wide),
                f"{name}.mlp.down_proj.weight": (wide, self.ffn_width),
            }
            if self.family == "qwen3":
                tensors[f"{name}.self_attn.q_norm.weight"] = (self.head_size,)
                tensors[f"{name}.self_attn.k_norm.weight"] = (self.head_size,)
        tensors["model.norm.weight"] = (wide,)
        if not self.tied:
            tensors["lm_head.weight"] = (self.vocab_size, wide)
        return tensors

    def parameters(self) -> int:
        """How many numbers the weights are."""
        return sum(math.prod(size) for size in self.tensors().values())

    def training_flops(self) -> tuple[int, int]:
        """FLOPs of a segment, forward and backward: of each token, and of each square of a length.

        Six for each parameter and token; causal attention 6 * layers * model size * length².
        """
        return 6 * self.parameters(), 6 * self.layers * self.heads * self.head_size


LLAMA_31 = {
    "family": "llama3",
    "kv_heads": 8,
    "head_size": 128,
    "vocab_size": 128_256,
    "tied": False,
    "norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "max_positions": 131_072,
    "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8192),
}
# The report's base models, as their makers publish them.
BASES: dict[str, Shape] = {
    "qwen3_14b": Shape(
        family="qwen3",
        layers=40,
        width=5120,
        heads=40,
        kv_heads=8,
        head_size=128,
        ffn_width=17_408,
        vocab_size=151_936,
        tied=False,
        norm_eps=1e-6,
        rope_theta=1e6,
        max_positions=40_960,
    ),
    "llama3.1_70b": Shape(**LLAMA_31, layers=80, width=8192, heads=64, ffn_width=28_672),  # type: ignore[arg-type]
    "llama3.1_405b": Shape(**LLAMA_31, layers=126, width=16_384, heads=128, ffn_width=53_248),  # type: ignore[arg-type]
}


def recipe_shape(model: Model, vocab_size: int) -> Shape:
    """The shape that a recipe alone describes; ``vocab_size`` is taken where it gives none.

    Raises:
        UserError: the recipe leaves a part of the shape to the start weights.
    """
    if model.base is not None:
        return BASES[model.base]
    values: dict[str, Any] = {"vocab_size": vocab_size} | model.shape()
    missing = [key for key in _required() if key not in values]
    if missing:
        keys = ", ".join(f"model.{key}" for key in missing)
        raise UserError(
            f"the recipe leaves {keys} to the start weights; --set model.base=..., or these keys"
        )
    return _shape(values, "the recipe's [model]")


def _required() -> list[str]:
    return [name for name in Shape.__slots__ if name != "rope_scaling"]


def _shape(values: Mapping[str, Any], source: str) -> Shape:
    try:
        return Shape(**values)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None


def read_shape(folder: Path) -> Shape:
    """The shape in a model folder's config.json.

    Raises:
        UserError: no such file, or the model does something that training here would not.
    """
    config = read_config(folder)
    source = folder / "config.json"
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise UserError(f"{source}: model_type is {kind!r}, not one of {', '.join(MODEL_TYPES)}")
    _refuse_wrong_kinds(config, source)
    _refuse_what_differs(config, source)
    try:
        values = {
            "family": MODEL_TYPES[kind],
            "layers": config["num_hidden_layers"],
            "width": config["hidden_size"],
            "heads": config["num_attention_heads"],
            "kv_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
            "head_size": config.get("head_dim") or _default_head_size(config),
            "ffn_width": config["intermediate_size"],
            "vocab_size": config["vocab_size"],
            "tied": config.get("tie_word_embeddings", False),
            "norm_eps": config.get("rms_norm_eps", 1e-6),
            "max_positions": config["max_position_embeddings"],
        }
    except KeyError as error:
        raise UserError(f"{source}: {error} is missing") from None
    try:
        rope = _read_rope(config, MODEL_TYPES[kind], source)
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: RoPE cannot be read: {error}") from None
    return _shape(values | rope, str(source))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(
            f"no model folder {folder}; `hermes4 init` makes one with random weights, "
            f"`hf download NAME --local-dir {folder}` fetches one"
        )
    if not path.is_file():
        raise UserError(f"{folder} holds no config.json; give a folder in Hugging Face form")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no file.

    Raises:
        UserError: it is something else.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value


def _default_head_size(config: Mapping[str, Any]) -> int:
    """What transformers takes where config.json gives no head_dim."""
    if config["model_type"] == "qwen3":
        return 128
    return int(config["hidden_size"]) // int(config["num_attention_heads"])


COUNTS = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
COUNTS_OR_NULL = ("num_key_value_heads", "head_dim")
KINDS = {
    "rms_norm_eps": (float, int),
    "tie_word_embeddings": (bool,),
    "layer_types": (list, type(None)),
}


def _refuse_wrong_kinds(config: Mapping[str, Any], source: Path) -> None:
    given = [key for key in COUNTS_OR_NULL if config.get(key) is not None]
    given += [key for key in COUNTS if key in config]
    wrong = [key for key in given if type(config[key]) is not int or config[key] < 1]
    wrong += [
        key for key, kinds in KINDS.items() if key in config and not isinstance(config[key], kinds)
    ]
    if wrong:
        raise UserError(f"{source}: {wrong[0]} = {config[wrong[0]]!r} is not valid for a model")


# What torchtitan's Llama and Qwen3 have not; the value stands for "not used".
UNUSED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "attention_dropout": (0, 0.0, None),
    "quantization_config": (None,),
    "pretraining_tp": (1, None),
}


def _refuse_what_differs(config: Mapping[str, Any], source: Path) -> None:
    for key, allowed in UNUSED.items():
        if key in config and config[key] not in allowed:
            raise UserError(f"{source}: {key} = {config[key]!r} cannot be trained here")
    kinds = set(config.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise UserError(f"{source}: layer_types {sorted(kinds)} cannot be trained here")


def _read_rope(config: Mapping[str, Any], family: Family, source: Path) -> dict[str, Any]:
    """theta and scaling, in the form of transformers 5 (rope_parameters) or of 4."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": float(theta), "rope_scaling": None}
    if kind != "llama3" or family != "llama3":
        raise UserError(f"{source}: rope_type {kind!r} cannot be trained for {family} here")
    try:
        scaling = RopeScaling(
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    except KeyError as error:
        raise UserError(f"{source}: rope scaling without {error}") from None
    return {"rope_theta": float(theta), "rope_scaling": scaling}


def check_shape(model: Model, shape: Shape, folder: Path) -> None:
    """Compare a model folder's shape with what the recipe says about it.

    How many positions there are is left out: it changes no weight and no result.

    Raises:
        UserError: they differ; the message lists where.
    """
    base = BASES[model.base] if model.base else None
    wanted = model.shape()
    if base is not None:
        wanted = {name: getattr(base, name) for name in Shape.__slots__}
    wanted.pop("max_positions", None)
    differing = [
        f"{key} is {getattr(shape, key)}, the recipe says {value}"
        for key, value in wanted.items()
        if getattr(shape, key) != value
    ]
    if differing:
        raise UserError(
            f"{folder} is not the model of this recipe: {'; '.join(differing)}. Take another "
            f"model, or the recipe 'finetune', which takes any"
        )


def hugging_face_config(
    shape: Shape, *, dtype: str, token_ids: Mapping[str, Any]
) -> dict[str, Any]:
    """config.json for a shape; readable by transformers 4 and 5, and by vLLM.

    Args:
        token_ids: bos_token_id, eos_token_id, pad_token_id; None where there is none.
    """
    rope: dict[str, Any] = {"rope_type": "default"}
    if shape.rope_scaling is not None:
        rope = {
            "rope_type": "llama3",
            "factor": shape.rope_scaling.factor,
            "low_freq_factor": shape.rope_scaling.low_freq_factor,
            "high_freq_factor": shape.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": shape.rope_scaling.original_max_positions,
        }
    return {
        "architectures": [ARCHITECTURES[shape.family]],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": dtype,
        "head_dim": shape.head_size,
        "hidden_act": "silu",
        "hidden_size": shape.width,
        "initializer_range": 0.02,
        "intermediate_size": shape.ffn_width,
        "max_position_embeddings": shape.max_positions,
        "model_type": "llama" if shape.family == "llama3" else "qwen3",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": rope | {"rope_theta": shape.rope_theta},
        "rope_scaling": None if shape.rope_scaling is None else rope,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": dtype,
        # Whose form this is; without it transformers warns that a large tokenizer may be Mistral's.
        "transformers_version": "5.0.0",
        "use_cache": True,
        "vocab_size": shape.vocab_size,
        **token_ids,
    }
