"""Files written whole or not at all: what stands in their place, and what links lead to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hermes_core.files import write_atomically, write_text


def test_a_file_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_text(path, "old")
    with pytest.raises(TypeError), write_atomically(path) as file:
        file.write("no bytes")  # type: ignore[arg-type]
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x", "old")]
    write_text(path, "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x", "new")]


def test_what_a_link_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(Path("there") / "x")
    for text in ("new", "newer"):
        write_text(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "there" / "x").read_text() == text
    assert len(list((tmp_path / "there").iterdir())) == 1


def test_what_is_no_regular_file_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "link", "folder"):
        with pytest.raises(FileExistsError, match=f"no regular file stands there: .*{name}'$"):
            write_text(tmp_path / name, "text")
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "link", "pipe"]
    with pytest.raises(FileExistsError):
        write_text(Path("/dev/null"), "text")
