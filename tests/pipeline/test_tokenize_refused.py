"""What `hermes4 tokenize` cannot use is refused by name."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

from running import contents
from tokenizing import Tokenize, refused, write_lines

pytestmark = pytest.mark.timeout(200)


def test_nothing_usable_is_refused_with_the_commonest_reason(
    tokenize: Tokenize, tmp_path: Path
) -> None:
    data = write_lines(tmp_path / "chats.jsonl", ["{broken", "[]", "[]"])
    for _ in range(2):  # again when the store is finished already
        message = refused(tokenize(data, tmp_path / "store"))
        assert "not one of 3 records can be used, most often: a record must be" in message
        assert str(tmp_path / "store" / "quarantine.jsonl") in message


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.jsonl.gz", "chats.json", "chats.parquet"])
def test_data_without_records_is_refused_and_leaves_nothing(
    tokenize: Tokenize, tmp_path: Path, name: str
) -> None:
    data = tmp_path / name
    if name.endswith("parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"messages": pa.array([], pa.string())}), data)
    elif name.endswith("gz"):
        data.write_bytes(gzip.compress(b"\n  \n"))
    else:
        data.write_text("[]" if name.endswith("json") else "\n  \n")
    assert f"{data} holds no records" in refused(tokenize(data, tmp_path / "store"))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--data", "nowhere.jsonl", "no such data file: .*nowhere.jsonl"),
        ("--data", "nowhere", "no such data file: .*nowhere"),
        ("--data", "empty", "empty holds no data file"),
        ("--data", "file", "file has an unknown file type"),
        ("--tokenizer", "nowhere", "no such tokenizer: .*nowhere"),
        ("--tokenizer", "empty", "empty holds no tokenizer"),
        ("--tokenizer", "file", "file is not a tokenizer.json"),
        ("--template", "nowhere.jinja", "no template '.*nowhere.jinja': want one of hermes_chatml"),
        ("--template", "open.jinja", "template 'open.jinja': the chat template does not compile"),
        ("--out", "file", "--out .*file: .*file is a file; choose another folder"),
        ("--out", "file/store", "--out .*file/store: .*file is a file; choose another folder"),
    ],
)
def test_what_is_missing_or_of_another_kind_is_refused_by_name(
    tokenize: Tokenize, few: Path, tmp_path: Path, option: str, value: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "open.jinja").write_text("{% for")
    said = refused(tokenize(few, tmp_path / "store", option, tmp_path / value))
    assert re.search(message, said)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("option", ["--limit", "--max-chars"])
def test_a_number_that_nothing_can_count_is_refused(
    tokenize: Tokenize, few: Path, tmp_path: Path, option: str
) -> None:
    most = 1 << 59
    for number in (most + 1, 10**20):
        said = refused(tokenize(few, tmp_path / "store", option, number))
        assert said.endswith(f"{option} is {number}; it may be {most} at most")
    assert tokenize(few, tmp_path / "store", option, most).code == 0


def test_a_folder_that_holds_something_else_keeps_it(
    tokenize: Tokenize, few: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "notes.txt").write_text("mine")
    said = refused(tokenize(few, tmp_path))
    assert f"--out {tmp_path} holds tokenizer and no store.json, so it is no folder" in said
    assert contents(tmp_path) == {"tokenizer/notes.txt": b"mine"}


def test_a_store_inside_the_data_is_refused(tokenize: Tokenize, few: Path, tmp_path: Path) -> None:
    out = few.parent / "store"
    assert f"--out {out} lies in --data {few.parent}" in refused(tokenize(few.parent, out))
    assert not out.exists()


def test_a_cut_off_file_is_refused_by_name(tokenize: Tokenize, few: Path, tmp_path: Path) -> None:
    data = tmp_path / "chats.jsonl.gz"
    whole = gzip.compress(few.read_bytes())
    data.write_bytes(whole[: len(whole) // 2])
    assert f"{data} is damaged" in refused(tokenize(data, tmp_path / "store"))
    assert not (tmp_path / "store" / "store.json").exists()
