"""torchtitan's checkpoints, by the names and the step of the run folder."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.checkpointer import AsyncMode, CheckpointManager

from hermes_pipeline.errors import UserError
from hermes_pipeline.services.folders import as_size, room
from hermes_pipeline.training.run_folder import checkpoint_steps, saves

logger = logging.getLogger(__name__)


def reason(error: CheckpointException) -> str:
    """Why the first of the ranks that failed could not save or load, in one line."""
    cause, _ = error.failures[min(error.failures)]
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__


class Checkpoints(CheckpointManager):
    """Loads the step it is told; touches nothing beside ``step-<n>``.

    The parent looks for ``step-<n>`` anywhere in a name, so that it would load or delete what a
    user has set aside under another one. What a disk does to a save or a load is a ``UserError``,
    on all ranks alike; its traceback is logged.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        pass

    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: AsyncMode,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Any:
        self._last_save = checkpoint_id
        with _saving(checkpoint_id):
            return super().dcp_save(
                state_dict, checkpoint_id, async_mode, enable_garbage_collection, to_hf
            )

    def _wait_for_saving(self) -> None:
        with _saving(self._last_save):
            super()._wait_for_saving()

    def dcp_load(
        self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool
    ) -> None:
        with _loading(checkpoint_id):
            super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)

    def _find_load_step(self, folder: str = "") -> int:
        """None: a run that goes on was told its step, any other begins with its start weights."""
        return -1

    def _save_last_step(self, curr_step: int) -> None:
        """Leave no more than ``keep`` here, too; `close` waits until they are deleted."""
        super()._save_last_step(curr_step)
        self._purge_stale_checkpoints()

    def _purge_stale_checkpoints(self) -> None:
        if self._should_purge():
            found = saves(Path(self.folder))
            for step in sorted(found)[: -self.keep_latest_k]:
                # First what says that it is whole: the rest may be cut off.
                with contextlib.suppress(OSError):
                    (found[step] / ".metadata").unlink(missing_ok=True)
                self.purge_queue.put(str(found[step]))


@contextlib.contextmanager
def _saving(checkpoint: str) -> Iterator[None]:
    try:
        yield
    except CheckpointException as error:
        logger.exception("The save failed.")
        raise UserError(
            f"checkpoint {checkpoint} cannot be saved: {reason(error)}; "
            f"{as_size(room(Path(checkpoint)))} are free there. Make room, and the same command "
            f"goes on"
        ) from None


@contextlib.contextmanager
def _loading(checkpoint: str) -> Iterator[None]:
    try:
        yield
    except CheckpointException as error:
        logger.exception("The load failed.")
        found = {str(path): step for step, path in saves(Path(checkpoint).parent).items()}
        if checkpoint not in found:  # start weights
            raise UserError(f"{checkpoint} cannot be loaded: {reason(error)}") from None
        whole = checkpoint_steps(Path(checkpoint).parent.parent)
        earlier = [step for step in whole if step < found[checkpoint]]
        way_out = f"go on from step {earlier[-1]}" if earlier else "begin anew"
        raise UserError(
            f"checkpoint {checkpoint} cannot be loaded: {reason(error)}; if it is damaged, remove "
            f"that folder to {way_out}"
        ) from None
