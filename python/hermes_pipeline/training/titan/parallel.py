"""How processes share a model: torchtitan's own way, with what gloo and torch's version ask for."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.config import ParallelismConfig
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools import utils as titan_utils

from hermes_pipeline.training.recipes import Parallel


def spmd_backend() -> Literal["partial_dtensor", "spmd_types"]:
    """The sharding backend that this torch can run; both give the same numbers.

    TODO: always "spmd_types" once torch >= 2.14 is required.
    """
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return "spmd_types" if (major, minor) >= (2, 14) else "partial_dtensor"


def parallelism(parallel: Parallel) -> ParallelismConfig:
    """[parallel] of a recipe in torchtitan's words."""
    return ParallelismConfig(
        tensor_parallel_degree=parallel.tensor,
        data_parallel_replicate_degree=parallel.replicate,
        data_parallel_shard_degree=parallel.shard,
        spmd_backend=spmd_backend(),
    )


def portable(spec: ModelSpec) -> ModelSpec:
    """The same model, whose gradients gloo can reduce where there is no accelerator."""
    if titan_utils.device_type != "cpu":
        return spec
    upstream = spec.parallelize_fn

    def parallelize(model: nn.Module, **options: Any) -> nn.Module:
        model = upstream(model, **options)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # torchtitan's divide factor of 1 becomes PREMUL_SUM, which gloo lacks; a plain
                # SUM is the same.
                module.set_force_sum_reduction_for_comms(True)
        return model

    return dataclasses.replace(spec, parallelize_fn=parallelize)
