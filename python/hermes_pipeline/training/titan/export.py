"""From a checkpoint to Hugging Face safetensors, a file at a time, in one process."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from hermes_pipeline.errors import UserError
from hermes_pipeline.training.shape import Shape
from hermes_pipeline.training.titan.checkpoints import reason
from hermes_pipeline.training.titan.model import model_spec
from hermes_pipeline.training.weights import SHARD_BYTES, write_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_weights(
    checkpoint: Path, out: Path, shape: Shape, *, dtype: str, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a checkpoint's weights as model*.safetensors, with an index where there are several.

    Never more than one file's tensors are in memory, whatever the topology that trained them.

    Raises:
        UserError: the checkpoint is not whole, or is of another shape.
    """
    adapter = model_spec(shape).state_dict_adapter(model_spec(shape).model, None)
    sizes = _stored_tensors(checkpoint)
    groups = list(_groups(sizes, shard_bytes, DTYPES[dtype].itemsize))
    index: dict[str, str] = {}
    missing, total = dict(shape.tensors()), 0
    for number, names in enumerate(groups, start=1):
        state = {name: torch.empty(sizes[name].size, dtype=_dtype(sizes[name])) for name in names}
        with warnings.catch_warnings():  # one process is what is wanted
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            _load(state, checkpoint)
        tensors = {
            name: tensor.to(DTYPES[dtype]).contiguous()
            for name, tensor in adapter.to_hf(state).items()
        }
        file = _file_name(number, len(groups))
        for name, tensor in tensors.items():
            if missing.pop(name, None) != tuple(tensor.shape):
                raise UserError(f"checkpoint {checkpoint}: {name} is {list(tensor.shape)}")
            index[name], total = file, total + tensor.nbytes
        save_file(tensors, out / file, metadata={"format": "pt"})
    if missing:
        raise UserError(f"checkpoint {checkpoint} lacks {next(iter(missing))}")
    if len(groups) > 1:
        write_json(
            out / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": index},
        )


def _stored_tensors(checkpoint: Path) -> dict[str, TensorStorageMetadata]:
    """The model's tensors in a checkpoint, by torchtitan's names."""
    try:
        metadata = FileSystemReader(checkpoint).read_metadata()
    except Exception as error:  # a cut-off pickle raises nearly anything
        raise UserError(f"checkpoint {checkpoint} cannot be read: {error}") from None
    beside = ("optimizer.", "lr_scheduler.", "dataloader.", "train_state.")
    return {
        name: entry
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith(beside)
    }


def _load(state: dict[str, torch.Tensor], checkpoint: Path) -> None:
    try:
        load(state, storage_reader=FileSystemReader(checkpoint), no_dist=True)
    except CheckpointException as error:
        raise UserError(
            f"checkpoint {checkpoint} cannot be read: {reason(error)}; if it is damaged, give the "
            f"--step of another"
        ) from None


def _dtype(entry: TensorStorageMetadata) -> torch.dtype:
    return entry.properties.dtype


def _groups(
    sizes: Mapping[str, TensorStorageMetadata], shard_bytes: int, item: int
) -> Iterator[list[str]]:
    """Names of the tensors of each file."""
    group: list[str] = []
    filled = 0
    for name, entry in sizes.items():
        size = entry.size.numel() * item
        if group and filled + size > shard_bytes:
            yield group
            group, filled = [], 0
        group.append(name)
        filled += size
    if group:
        yield group


def _file_name(number: int, files: int) -> str:
    return "model.safetensors" if files == 1 else f"model-{number:05d}-of-{files:05d}.safetensors"
