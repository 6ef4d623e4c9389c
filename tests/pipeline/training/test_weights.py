"""Model folders are written whole, where a link leads to, and killed writers leave nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hermes_pipeline.errors import UserError
from hermes_pipeline.training.weights import written_whole
from running import contents

KILLED = """
import os, signal, sys
from pathlib import Path
from hermes_pipeline.training import weights

replace = os.replace
def killed_at(source, target):
    if Path(source).name == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = killed_at
with weights.written_whole(Path(sys.argv[1]), marker={"made_by": "test"}) as folder:
    (folder / "text").write_text("killed")
"""


def write(out: Path, text: str) -> None:
    with written_whole(out, marker={"made_by": "test"}) as folder:
        (folder / "text").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk/model").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/model")
    for text in ("first", "second"):
        write(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "disk/model/text").read_text() == text
    assert names(tmp_path) == ["disk", "link"]
    assert names(tmp_path / "disk") == ["model"]


def test_the_current_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for out in (Path(), tmp_path):
        with pytest.raises(UserError, match=r"^--out \S+ is replaced as a whole, which"):
            write(out, "never")
    assert names(tmp_path) == []


@pytest.mark.parametrize("is_ours", [False, True])
def test_hidden_files_are_not_lost(tmp_path: Path, is_ours: bool) -> None:
    if is_ours:
        write(tmp_path / "model", "first")
    (tmp_path / "model/.git").mkdir(parents=True)
    with pytest.raises(UserError, match=r"is replaced as a whole, and holds \.git; choose another"):
        write(tmp_path / "model", "second")
    assert (tmp_path / "model/.git").is_dir()


def test_a_mount_point_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    with pytest.raises(UserError, match="mount points cannot be; give a folder inside it"):
        write(tmp_path, "never")
    write(tmp_path / "inside", "whole")


@pytest.mark.parametrize("moved_next", ["model", "new"])
def test_what_a_killed_call_leaves_is_removed_by_the_next(tmp_path: Path, moved_next: str) -> None:
    out = tmp_path / "model"
    write(out, "first")
    before = contents(out)
    words = [sys.executable, "-c", KILLED, str(out), moved_next]
    assert subprocess.run(words, check=False, timeout=60).returncode == -signal.SIGKILL
    assert out.exists() == (moved_next == "model")
    assert any(name.startswith(".model.") for name in names(tmp_path))
    with pytest.raises(UserError, match="wrote"), written_whole(out, marker={"made_by": "other"}):
        pass
    assert contents(out) == before
    assert names(tmp_path) == ["model"]


def test_folders_of_others_and_of_those_at_work_stay(tmp_path: Path) -> None:
    for name in (".model.12345678", ".model.12345678.old", ".model.backup", ".models.12345678"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").touch()
    (tmp_path / ".model.backup/hermes4.lock").touch()
    before = names(tmp_path)
    with written_whole(tmp_path / "model", marker={"made_by": "test"}) as slow:
        write(tmp_path / "model", "fast")
        (slow / "text").write_text("slow")
    assert (tmp_path / "model/text").read_text() == "slow"
    assert names(tmp_path) == [*before, "model"]
