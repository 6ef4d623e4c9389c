"""How the ranks of a machine are started, and waited for."""

from __future__ import annotations

from pathlib import Path

import pytest

from hermes_pipeline.training.launch import launch

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(60)]


def test_ranks_take_no_module_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "queue.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    assert launch(["--help"], 1) == 0
