"""Folders for results: whose they are, and what is said where one cannot be written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hermes_pipeline.errors import UserError
from hermes_pipeline.services.folders import as_size, check_folder, check_room, explain, writing
from running import Hermes4


def test_a_folder_that_is_missing_empty_or_ours_passes(tmp_path: Path) -> None:
    for name, holds in (("empty", None), ("hidden", ".lock"), ("ours", "mark")):
        (tmp_path / name).mkdir()
        if holds:
            (tmp_path / name / holds).touch()
    (tmp_path / "ours" / "more").touch()
    for name in ("missing", "missing/below", "empty", "hidden", "ours"):
        check_folder(tmp_path / name, "mark", "other")


def test_a_folder_of_somebody_else_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    words = rf"^--out {tmp_path} holds notes.txt and no mark, so it is no folder of ours; choose"
    with pytest.raises(UserError, match=words):
        check_folder(tmp_path, "mark")
    with pytest.raises(UserError, match=r"notes.txt/a: .*notes.txt is a file; choose another"):
        check_folder(tmp_path / "notes.txt" / "a", "mark")


def test_a_link_that_leads_nowhere_is_refused_as_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for out in (tmp_path / "link", tmp_path / "link/below"):
        words = rf"^--out {out}: .*/link is a link to {tmp_path}/nowhere, which is not there; make"
        with pytest.raises(UserError, match=words):
            check_folder(out, "mark")
    with pytest.raises(UserError, match="which is not there"):
        check_folder(tmp_path / "loop", "mark")


def test_a_full_disk_names_the_folder_what_is_free_and_the_way_out(tmp_path: Path) -> None:
    out = tmp_path / "store"
    words = rf"^--out {out} cannot be written: No space left on device; [\d.,]+ .B are free there. "
    words += "Make room, and the same command goes on$"
    with pytest.raises(UserError, match=words), writing(out):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_temporary_name_is_not_shown(tmp_path: Path) -> None:
    out = tmp_path / "start"
    (tmp_path / "link").symlink_to(out)
    for name in (".start.a8f3", ".start.a8f3/new/config.json"):
        error = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / name))
        for given in (out, tmp_path / "link"):
            assert explain(error, given) == (
                f"--out {given} cannot be written: Permission denied; choose another --out, or "
                f"give the right to write"
            )


def test_a_copy_is_of_the_folder_that_it_fills(tmp_path: Path) -> None:
    out = tmp_path / "run"
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/model/a", None, str(out / "a"))
    with pytest.raises(UserError, match=rf"^--out {out} cannot be written: No space"), writing(out):
        raise error


def test_a_file_that_is_no_part_of_the_result_keeps_its_name(tmp_path: Path) -> None:
    error = PermissionError(errno.EACCES, "Permission denied", "/data/chats.jsonl")
    assert explain(error, tmp_path) == "/data/chats.jsonl: Permission denied"


def test_an_end_of_reading_stays_one(tmp_path: Path) -> None:
    with pytest.raises(BrokenPipeError), writing(tmp_path):
        raise BrokenPipeError


def test_too_small_a_disk_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hermes_pipeline.services.folders.room", lambda path: 3 * 10**9)
    check_room(tmp_path, 3 * 10**9)
    with pytest.raises(UserError, match=r"wants 59\.1 GB, and 3\.0 GB are free there; make room"):
        check_room(tmp_path, 59_100_000_000)


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (59_073_228_800, "59.1 GB")],
)
def test_sizes_in_words(size: int, words: str) -> None:
    assert as_size(size) == words


def test_train_takes_no_folder_of_another_command(hermes4: Hermes4, tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text("{}")
    ended = hermes4("train", "--recipe", "tiny", "--store", tmp_path, "--out", tmp_path)
    assert ended.code == 2
    assert f"--out {tmp_path} holds store.json and no run.json, so it is no folder" in ended.err


def test_what_a_socket_or_a_device_refuses_is_not_said_of_the_folder(tmp_path: Path) -> None:
    for code in (errno.ECONNRESET, errno.EADDRINUSE, errno.EIO, errno.ENOMEM):
        with pytest.raises(OSError, match=os.strerror(code)), writing(tmp_path):
            raise OSError(code, os.strerror(code))
    with pytest.raises(FileNotFoundError), writing(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "No such file", "/home/u/.triton/cache/x")
