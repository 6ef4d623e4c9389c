"""Packed rows for torchtitan's trainer, from the memory-mapped store.

Shapes: B rows of one forward pass, L row length, M kept tokens, S segments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer

from hermes_core import Rows, open_store
from hermes_core.packing import Strategy, TooLong
from hermes_pipeline.errors import UserError
from hermes_pipeline.training.order import Batch, Position, RowOrder


class NoTokenizer(BaseTokenizer):
    """Rows hold token ids already."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, *, tokenizer_path: str = "") -> None:
        super().__init__()

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        raise NotImplementedError("rows hold token ids already")

    def decode(self, *args: Any, **kwargs: Any) -> str:
        raise NotImplementedError("rows hold token ids already")

    def get_vocab_size(self) -> int:
        raise NotImplementedError("rows hold token ids already")


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The rows of one forward pass on one rank, on the host."""

    input_ids: Tensor  # [B, L]
    positions: Tensor  # [B, L]
    labels: Tensor  # [B, L]
    kept: Tensor  # [M]
    cu_seqlens: NDArray[np.int32]  # [S + 1]
    rows: tuple[int, ...]  # numbers [B], counted from the run's first row
    tokens: int  # of samples; padding left out


class PackedRows(BaseDataLoader):
    """This rank's share of the order of rows.

    A step of all ranks together is a run of consecutive rows, dealt to ranks and micro-batches so
    that they wait for each other least. The state is how many rows all ranks together have
    consumed in whole steps, so a run may go on with another number of ranks.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        store: str
        rows: int  # of one step, over all ranks
        packing: Strategy
        too_long: TooLong
        seed: int

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        seq_len: int,
        local_batch_size: int,
        **_: Any,
    ) -> None:
        self._rank, self._ranks, self._local_rows = dp_rank, dp_world_size, local_batch_size
        self._row_length = seq_len
        self._step_rows = config.rows
        self._micro_batches = config.rows // (dp_world_size * local_batch_size)
        store = open_store(config.store)
        self._vocab_size = store.vocab_size
        self.order = RowOrder(
            store,
            row_length=seq_len,
            packing=config.packing,
            too_long=config.too_long,
            seed=config.seed,
            fingerprint=store.fingerprint,
        )

    def __iter__(self) -> Iterator[MicroBatch]:
        while True:
            dealt = self.order.deal_step(
                ranks=self._ranks, micro_batches=self._micro_batches, local_rows=self._local_rows
            )
            *before, last = dealt[:, self._rank]  # one share for each micro-batch
            for rows in before:
                yield self._batch(rows)
            batch = self._batch(last)
            self.order.advance(self._step_rows)
            yield batch

    def _batch(self, rows: NDArray[np.int64]) -> MicroBatch:
        out = _pinned(len(rows), self._row_length) if torch.cuda.is_available() else None
        batch = self.order.batch(rows, out=out)
        self._check_ids(batch)
        return _tensors(batch)

    def _check_ids(self, batch: Batch) -> None:
        """Refuse what is no token before an embedding is looked up, which would kill a GPU."""
        largest = batch.rows.input_ids.max(axis=1)
        row = int(largest.argmax())
        if largest[row] >= self._vocab_size:
            raise UserError(
                f"the store is damaged: row {batch.numbers[row]} holds token id {largest[row]}, of "
                f"{self._vocab_size} that there are"
            )

    def state_dict(self) -> dict[str, Any]:
        position = self.order.position
        return {
            "rows": position.rows,
            "epoch": position.epoch,
            "epoch_start": position.epoch_start,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self.order.position = Position(**state_dict)


def _pinned(rows: int, row_length: int) -> Rows:
    """Memory for one batch that a GPU copies from by itself; torch keeps it for later batches."""
    shape = (rows, row_length)
    ids, labels, positions = (
        torch.empty(shape, dtype=torch.int64, pin_memory=True) for _ in range(3)
    )
    ends = np.empty(rows * row_length + 1, np.int32)
    return Rows(ids.numpy(), labels.numpy(), positions.numpy(), ends)


def _tensors(batch: Batch) -> MicroBatch:
    rows = batch.rows
    kept = torch.from_numpy(rows.kept)
    return MicroBatch(
        input_ids=torch.from_numpy(rows.input_ids),
        positions=torch.from_numpy(rows.positions),
        labels=torch.from_numpy(rows.labels),
        kept=kept.pin_memory() if torch.cuda.is_available() else kept,
        cu_seqlens=rows.cu_seqlens,
        rows=batch.numbers,
        tokens=batch.tokens,
    )
