"""What tells data from other data, and how they differ in words."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hermes_pipeline.errors import UserError
from hermes_pipeline.services import identity
from hermes_pipeline.services.hub import DataSource
from hermes_pipeline.services.identity import changed, identify
from tokenizing import mixed, write_lines


def test_the_identity_of_a_file_is_its_name_size_and_content(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", mixed(9))
    before = DataSource(str(path)).identity()
    os.utime(path, ns=(1, 2))
    assert DataSource(str(path)).identity() == DataSource(str(tmp_path)).identity() == before
    assert before["files"][0][:2] == [str(path), path.stat().st_size]


@pytest.mark.parametrize("count", [1, 17])
def test_the_identity_of_files_tells_edited_ones_apart(tmp_path: Path, count: int) -> None:
    for index in range(count):
        write_lines(tmp_path / f"{index}.jsonl", mixed(9))
    before = DataSource(str(tmp_path)).identity()
    assert DataSource(str(tmp_path)).identity() == before == json.loads(json.dumps(before))
    text = (tmp_path / "0.jsonl").read_bytes()
    (tmp_path / "0.jsonl").write_bytes(text[:-2] + b"!" + text[-1:])
    after = DataSource(str(tmp_path)).identity()
    assert after != before
    assert changed(before, after).endswith(" of other contents")


def test_a_large_file_is_read_in_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "SAMPLED", 1 << 18)
    path = tmp_path / "large"
    path.write_bytes(bytes(1 << 22))
    before = identify([path])
    for at in (0, (1 << 22) - 1):
        with path.open("r+b") as file:
            file.seek(at)
            file.write(b"x")
        assert identify([path]) != before
        before = identify([path])


def test_small_data_is_read_whole_whatever_else_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "SAMPLED", 1 << 20)
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(bytes((1 << 20) - 1))
    small.write_bytes(b"x")
    before = identify([large, small])
    with large.open("r+b") as file:
        file.seek(100_000)  # between the blocks that would be read of a larger one
        file.write(b"x")
    assert identify([large, small]) != before


A, B = ["/a", 10, "aa"], ["/b", 20, "bb"]
SET = {"data_set": "o/n", "revision": None, "split": "train", "subset": None, "records": 5}


@pytest.mark.parametrize(
    ("then", "now", "words"),
    [
        ({"files": [A]}, {"files": [B]}, "/a, not /b"),
        ({"files": [A, B]}, {"files": [A]}, "/b, which is not there any more"),
        ({"files": [A]}, {"files": [A, B]}, "less: /b is new"),
        ({"files": [A]}, {"files": [["/a", 1200, "x"]]}, "/a of 10 bytes, which has 1,200 now"),
        ({"files": [A]}, {"files": [["/a", 10, "x"]]}, "/a of other contents"),
        (
            {"files": "x", "count": 17, "bytes": 9000},
            {"files": "y", "count": 18, "bytes": 9500},
            "17 files of 9,000 bytes, not 18 files of 9,500 bytes",
        ),
        (SET, SET | {"split": "test"}, "split train, not test"),
        (SET, SET | {"data_set": "o/m"}, "o/n, not o/m"),
        (SET | {"files": "x"}, SET | {"files": "y"}, "o/n of other contents"),
        ({"files": [A]}, SET, "/a, not data set o/n"),
        (None, {"files": [A]}, "nobody knows which"),
        (
            {"files": [["/a", 10, 17]]},
            {"files": [A]},
            "/a by an earlier version, which did not look into it",
        ),
        (
            {"files": "x"},
            {"files": [A]},
            "files by an earlier version, which did not look into them, not /a",
        ),
        ({"files": [A, A]}, {"files": [A]}, "the same files, listed otherwise"),
    ],
)
def test_the_difference_in_words(then: object, now: dict[str, object], words: str) -> None:
    assert changed(then, now) == words


def test_what_cannot_be_read_twice_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "chats.jsonl")
    for data in ("-", str(tmp_path / "chats.jsonl"), "/dev/null"):
        with pytest.raises(UserError, match=rf"^--data {data} is a pipe or a device, which cannot"):
            DataSource(data)
