"""How the ranks of a machine are started, and waited for."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from hermes_pipeline.training.launch import GRACE_S, launch
from hermes_pipeline.training.run_folder import read_metrics
from running import comes_true

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(200)]


def test_ranks_take_no_module_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "queue.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    assert launch(["--help"], 1) == 0


# Removing a checkpoint takes longer than ranks have once one has ended.
SLOW = f"""
import shutil, time
remove = shutil.rmtree
def slow(path, *given, **named):
    if "/checkpoint/step-" in str(path):
        time.sleep({GRACE_S + 2})
    remove(path, *given, **named)
shutil.rmtree = slow
"""


def test_ranks_wait_for_the_one_that_deletes_a_checkpoint(
    tmp_path: Path,
    make_store: Callable[..., Path],
    make_model: Callable[..., Path],
    train_command: Callable[..., list[str]],
    any_recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow/sitecustomize.py").write_text(SLOW)
    paths = filter(None, [str(tmp_path / "slow"), os.environ.get("PYTHONPATH")])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    run = tmp_path / "run"
    words = train_command(
        str(any_recipe),
        run,
        processes=2,
        settings=("training.steps=100000", "checkpoint.every=100000"),
        store=make_store(tmp_path / "store"),
        model=make_model(tmp_path / "model"),
    )
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert comes_true(lambda: len(read_metrics(run)) > 1, 60)
            for step in (0, 1):  # with the one to come, one more than are kept
                (run / f"checkpoint/step-{step}").mkdir(parents=True)
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 75, said
    assert "stopped after step" in said
    assert not (run / "checkpoint/step-0").exists()
