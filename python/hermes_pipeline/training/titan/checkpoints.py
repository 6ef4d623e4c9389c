"""torchtitan's checkpoints, by the names and the step of the run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torchtitan.components.checkpointer import CheckpointManager

from hermes_pipeline.training.run_folder import saves


class Checkpoints(CheckpointManager):
    """Loads the step it is told; touches nothing beside ``step-<n>``.

    The parent looks for ``step-<n>`` anywhere in a name, so that it would load or delete what a
    user has set aside under another one.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        pass

    def _find_load_step(self, folder: str = "") -> int:
        """None: a run that goes on was told its step, any other begins with its start weights."""
        return -1

    def _purge_stale_checkpoints(self) -> None:
        if self._should_purge():
            found = saves(Path(self.folder))
            for step in sorted(found)[: -self.keep_latest_k]:
                self.purge_queue.put(str(found[step]))
