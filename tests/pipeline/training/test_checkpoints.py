"""Which checkpoints a run leaves."""

from __future__ import annotations

import queue
from pathlib import Path

import pytest

from hermes_pipeline.training.run_folder import checkpoint_steps
from hermes_pipeline.training.titan.checkpoints import Checkpoints


def test_a_step_that_is_being_deleted_is_no_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (2, 4, 6, 8, 10):
        folder = tmp_path / "checkpoint" / f"step-{step}"
        folder.mkdir(parents=True)
        (folder / "__0_0.distcp").touch()
        if step != 10:  # which is still being written
            (folder / ".metadata").touch()
    monkeypatch.setattr(Checkpoints, "_should_purge", lambda self: True)
    checkpoints = object.__new__(Checkpoints)
    checkpoints.folder, checkpoints.keep_latest_k = str(tmp_path / "checkpoint"), 3
    checkpoints.purge_queue = queue.Queue()
    checkpoints._purge_stale_checkpoints()
    assert checkpoint_steps(tmp_path) == [6, 8]
    named = [Path(checkpoints.purge_queue.get_nowait() or "") for _ in range(2)]
    assert named == [tmp_path / "checkpoint" / f"step-{step}" for step in (2, 4)]
    assert all((path / "__0_0.distcp").is_file() for path in named)
