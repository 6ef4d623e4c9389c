"""`hermes4 tokenize` goes on where it stopped, and refuses other settings than it began with."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from hermes_core import store_writer
from hermes_pipeline.services.hub import DataSource
from hermes_pipeline.stages import tokenize as stage
from running import contents
from tokenizing import Tokenize, mixed, refused, write_lines

pytestmark = pytest.mark.timeout(200)


@pytest.fixture(scope="module")
def calm(few: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of ``few``, made without a stop."""
    out = tmp_path_factory.mktemp("calm") / "store"
    source = DataSource(str(few))
    stage.run(source, str(tokenizer_folder), out, template="hermes_chatml", workers=1)
    return out


@contextmanager
def interrupted_writing(*, at_line: int) -> Iterator[None]:
    """Ctrl-C at this line, counted from 1, of those that the store's writer executes."""
    left = at_line

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        code = frame.f_code
        # Closing counts as done: this process lives on and would find its own lock.
        if code.co_filename != store_writer.__file__ or code.co_name in ("close", "__exit__"):
            return None
        left -= event == "line"
        if left == 0:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def test_ctrl_c_at_any_line_of_the_writer_costs_no_byte(
    tokenize: Tokenize,
    few: Path,
    calm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store_writer, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the machine goes on
    struck = 0
    for at_line in random.Random(0).sample(range(1, 1500), 16):
        out = tmp_path / str(at_line)
        with interrupted_writing(at_line=at_line):
            ended = tokenize(few, out)
        if ended.code == 130:
            struck += 1
            assert ended.err.splitlines()[-1].startswith("hermes4: interrupted"), (at_line, ended)
        assert tokenize(few, out).code == 0, at_line
        assert contents(out) == contents(calm), at_line
    assert struck > 10


def test_ctrl_c_says_what_is_safe_and_how_to_go_on(
    tokenize: Tokenize, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_writer, "COMMIT_SECONDS", 0.0)
    with interrupted_writing(at_line=500):
        ended = tokenize(few, tmp_path)
    assert ended.code == 130
    progress, last = ended.err.splitlines()
    found = re.fullmatch(
        rf"hermes4: interrupted; (\d+) records are safe in {tmp_path}: run the same command again "
        "to go on",
        last,
    )
    assert progress.startswith("tokenize: ")
    assert found is not None
    assert f"going on after {found[1]} records\n" in tokenize(few, tmp_path).out


def test_ctrl_c_before_anything_is_written_says_how_to_go_on_too(
    tokenize: Tokenize, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "load_tokenizer", interrupted)
    ended = tokenize(few, tmp_path)
    assert ended.code == 130
    assert ended.err == "hermes4: interrupted; run the same command again to go on\n"


@pytest.mark.parametrize("writes", [0, 7, 15])
def test_a_full_disk_is_named_and_costs_no_byte(
    tokenize: Tokenize,
    few: Path,
    calm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    writes: int,
) -> None:
    monkeypatch.setattr(store_writer, "COMMIT_SECONDS", 0.0)
    room, write = writes, os.pwrite

    def pwrite(descriptor: int, piece: Any, at: int) -> int:
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, piece, at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        assert "No space left on device" in refused(tokenize(few, tmp_path))
    assert tokenize(few, tmp_path).code == 0
    assert contents(tmp_path) == contents(calm)


def test_a_later_day_changes_no_byte(
    tokenize: Tokenize, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "dated.jinja"
    template.write_text(
        "{{ strftime_now('%d %B') }}\n{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    monkeypatch.setattr(store_writer, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(stage, "date", day(2025, 8, 25))
    assert tokenize(few, tmp_path / "calm", "--template", template).code == 0
    with interrupted_writing(at_line=300):
        tokenize(few, tmp_path / "late", "--template", template)
    monkeypatch.setattr(stage, "date", day(2025, 8, 26))
    assert "going on after" in tokenize(few, tmp_path / "late", "--template", template).out
    assert contents(tmp_path / "late") == contents(tmp_path / "calm")


def day(*today: int) -> type[date]:
    class Day(date):
        @classmethod
        def today(cls) -> Day:
            return cls(*today)

    return Day


# Other settings than those of an earlier run.


@pytest.fixture
def other_tokenizer(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """The same tokens, less one merge of two of them."""
    folder = shutil.copytree(tokenizer_folder, tmp_path / "other")
    state = json.loads((folder / "tokenizer.json").read_text())
    state["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(state))
    return folder


@pytest.fixture
def other_data(few: Path, tmp_path: Path) -> Path:
    return write_lines(tmp_path / "others.jsonl", few.read_text().splitlines())


@pytest.mark.parametrize("begun", ["interrupted", "finished"])
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--data", "other_data", "--data /[^ ]*chats.jsonl, not /[^ ]*others.jsonl;"),
        ("--tokenizer", "other_tokenizer", "--tokenizer .*tokenizer\\d*, not .*other;"),
        ("--template", "hermes_llama3", "--template hermes_chatml, not hermes_llama3;"),
        ("--max-chars", "99", "--max-chars 4000000, not 99;"),
        ("--limit", "9", "--limit None, not 9;"),
    ],
)
def test_other_settings_are_refused_by_name(
    tokenize: Tokenize,
    few: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    option: str,
    value: str,
    message: str,
    begun: str,
) -> None:
    out = tmp_path / "store"
    with interrupted_writing(at_line=10_000 if begun == "finished" else 200):
        tokenize(few, out)
    assert (out / "store.json").exists() == (begun == "finished")
    before = contents(out)
    value = str(request.getfixturevalue(value)) if value.startswith("other") else value
    said = refused(tokenize(few, out, option, value))
    assert re.search(f"--out .*store was begun with {message}", said)
    assert said.endswith("; choose another folder, or remove this one")
    assert contents(out) == before


def test_changed_data_of_the_same_name_is_refused(tokenize: Tokenize, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "chats.jsonl", mixed(9))
    tokenize(data, tmp_path / "store")
    write_lines(data, mixed(10))
    said = refused(tokenize(data, tmp_path / "store"))
    assert re.search(rf"was begun with --data {data} of [\d,]+ bytes, which has [\d,]+ now; ", said)


@pytest.mark.parametrize("begun", ["interrupted", "finished"])
def test_data_that_was_touched_goes_on(
    tokenize: Tokenize, few: Path, calm: Path, tmp_path: Path, begun: str
) -> None:
    out = tmp_path / "store"
    before = few.stat()
    with interrupted_writing(at_line=10_000 if begun == "finished" else 200):
        tokenize(few, out)
    try:
        os.utime(few)
        assert tokenize(few, out).code == 0
    finally:
        os.utime(few, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert contents(out) == contents(calm)


def test_a_changed_template_of_the_same_name_is_refused(
    tokenize: Tokenize, few: Path, tmp_path: Path
) -> None:
    template = tmp_path / "mine.jinja"
    text = (resources.files("hermes_pipeline") / "templates" / "hermes_chatml.jinja").read_text()
    template.write_text(text)
    tokenize(few, tmp_path / "store", "--template", template)
    template.write_text(text + "{# new #}")
    said = refused(tokenize(few, tmp_path / "store", "--template", template))
    assert "was begun with --template mine.jinja of other contents" in said
