"""Records out of files, folders and data sets on disk; tokenizers and templates by name."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models

from hermes_pipeline.chat import Refused, parse_json
from hermes_pipeline.errors import UserError
from hermes_pipeline.services.hub import (
    DataSource,
    load_template,
    load_tokenizer,
    tokenizer_fingerprint,
)
from hermes_pipeline.stages.tokenize import run as tokenize

CHATS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": f"Zürich {i}?"},
            {"role": "assistant", "content": "x"},
        ]
    }
    for i in range(5)
]
LINES = [json.dumps(chat).encode() + b"\n" for chat in CHATS]
KNOWN = r"known: \.jsonl, \.jsonl\.gz, \.json, \.json\.gz, \.parquet"


def read(data: Path, *, start: int = 0, max_bytes: int = 1 << 20, **options: Any) -> list[Any]:
    """Line number and content of each record; the words where there is none."""
    records = DataSource(str(data), **options).records(start=start, max_bytes=max_bytes)
    return [(r.line, r.error if r.error is not None else understood(r.data)) for r in records]


def understood(data: Any) -> Any:
    try:
        return parse_json(data) if isinstance(data, bytes) else data
    except Refused as error:
        return str(error)


def numbered(chats: list[Any], first: int = 1) -> list[Any]:
    return list(enumerate(chats, first))


def write_lines(path: Path) -> None:
    path.write_bytes(b"".join(LINES))


def write_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(b"".join(LINES)))


def write_two_gzips(path: Path) -> None:
    path.write_bytes(gzip.compress(LINES[0]) + gzip.compress(b"".join(LINES[1:])))


def write_list(path: Path) -> None:
    path.write_text(" \n" + json.dumps(CHATS, indent=1))


def write_gzip_list(path: Path) -> None:
    path.write_bytes(gzip.compress(json.dumps(CHATS).encode()))


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(CHATS), path, row_group_size=2)


FORMATS: dict[str, Callable[[Path], None]] = {
    "lines.jsonl": write_lines,
    "lines.JSONL": write_lines,
    "lines.json": write_lines,
    "lines.jsonl.gz": write_gzip,
    "lines.json.gz": write_gzip,
    "appended.jsonl.gz": write_two_gzips,
    "list.json": write_list,
    "list.json.gz": write_gzip_list,
    "table.parquet": write_parquet,
}


@pytest.fixture(params=FORMATS)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The same conversations in each kind of file."""
    path = tmp_path / request.param
    FORMATS[request.param](path)
    return path


# Files.


def test_every_kind_of_file_gives_the_same_records(file: Path) -> None:
    assert read(file) == numbered(CHATS)


def test_reading_goes_on_from_any_record(file: Path) -> None:
    for start in range(7):
        assert read(file, start=start) == numbered(CHATS)[start:]


def test_a_record_names_its_file_and_line(file: Path) -> None:
    sources = [record.source for record in DataSource(str(file)).records(start=3)]
    assert sources == [f"{file}:4", f"{file}:5"]


def test_the_share_that_is_read_rises_to_all(file: Path) -> None:
    source = DataSource(str(file))
    shares = [source.share_read() for _ in source.records()]
    assert shares == sorted(shares)
    assert source.share_read() == 1.0


def test_the_share_that_is_read_rises_within_a_parquet_file(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(CHATS * 100), tmp_path / "x.parquet")
    source = DataSource(str(tmp_path / "x.parquet"))
    shares = [source.share_read() for _ in source.records()]
    assert shares[0] == 0
    assert shares[300] == pytest.approx(0.5, abs=0.2)
    assert shares[499] == pytest.approx(0.9, abs=0.2)


def test_blank_lines_are_no_records_but_are_counted_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n \t\n" + LINES[0] + b"\r\n\n" + LINES[1].strip())
    assert read(path) == [(3, CHATS[0]), (6, CHATS[1])]
    assert read(path, start=1) == [(6, CHATS[1])]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_a_byte_order_mark_and_line_ends_of_windows_change_nothing(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + b"".join(LINES).replace(b"\n", b"\r\n"))
    assert read(path) == numbered(CHATS)


def test_a_list_with_a_byte_order_mark_is_a_list(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(CHATS).encode())
    assert read(path) == numbered(CHATS)


def test_broken_lines_have_their_numbers_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    bad = [b'{"messages": [\n', b'{"a": "\xff"}\n']
    path.write_bytes(b"".join([LINES[0], bad[0], LINES[1], bad[1], LINES[2]]))
    assert read(path) == [
        (1, CHATS[0]),
        (2, "broken JSON: Expecting value: line 1 column 15 (char 14)"),
        (3, CHATS[1]),
        (4, "invalid UTF-8 at byte 7 of the line"),
        (5, CHATS[2]),
    ]


def test_broken_lines_go_to_the_quarantine_with_their_numbers(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "x.jsonl", tmp_path / "store"
    path.write_bytes(LINES[0] + b"{\n" + LINES[1] + b"\xff\n" + LINES[2])
    tokenize(DataSource(str(path)), str(tokenizer_folder), out, template="hermes_chatml", workers=1)
    quarantine = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [(bad["source"], bad["line"]) for bad in quarantine] == [
        (f"{path}:2", 2),
        (f"{path}:4", 4),
    ]
    assert "5 read = 3 stored + 2 quarantined" in capsys.readouterr().out


@pytest.mark.parametrize("last", [b"", b"\n"])
def test_a_line_that_is_too_long_is_passed_over(tmp_path: Path, last: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"[1]\n" + b"[" + b"2" * 2_000_000 + b"]\n[3]\n[4000]" + last)
    assert read(path, max_bytes=5) == [
        (1, [1]),
        (2, "the line of 2,000,003 bytes is longer than 5"),
        (3, [3]),
        (4, f"the line of {6 + len(last)} bytes is longer than 5"),
    ]
    assert read(path, max_bytes=6, start=2) == [(3, [3]), (4, [4000])]


def test_what_is_no_object_in_a_list_has_its_number_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps([CHATS[0], "Hi", CHATS[1], None]))
    assert read(path) == [
        (1, CHATS[0]),
        (2, "a record must be a JSON object, not str"),
        (3, CHATS[1]),
        (4, "a record must be a JSON object, not NoneType"),
    ]


def test_text_of_parquet_that_is_not_utf8_has_its_row_and_the_others_are_read(
    tmp_path: Path,
) -> None:
    raw = pa.array([b"good", b"a\xff", b"good"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"prompt": text}), path)
    good = {"prompt": "good"}
    assert read(path) == [(1, good), (2, "invalid UTF-8 at byte 1 of a text"), (3, good)]


def test_keys_that_parquet_fills_with_null_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    chats = [{"a": 1, "b": {"c": None, "d": [{"e": None}]}}, {"a": None, "b": {"c": 2}}]
    pq.write_table(pa.Table.from_pylist(chats), path)
    assert read(path) == [(1, {"a": 1, "b": {"d": [{}]}}), (2, {"b": {"c": 2}})]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.jsonl.gz", "x.json.gz"])
def test_an_empty_file_holds_no_records_and_is_read_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    source = DataSource(str(tmp_path / name))
    assert list(source.records()) == []
    assert source.share_read() == 1.0


def test_records_are_counted_where_the_file_tells(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    write_parquet(tmp_path / "b.parquet")
    assert DataSource(str(tmp_path)).count() == 10
    write_lines(tmp_path / "c.jsonl")
    assert DataSource(str(tmp_path)).count() is None


@pytest.mark.parametrize("name", ["no.jsonl", "no/such/file", "./no", "~/no.such.parquet", " "])
def test_a_file_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"^no such data file: .*{name.lstrip('./~')}$"):
        DataSource(name)


@pytest.mark.parametrize("name", ["x.txt", "x.csv", "x", "x.jsonl.zip", "jsonl"])
def test_a_file_of_another_kind_names_the_known_ones(tmp_path: Path, name: str) -> None:
    write_lines(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name} is of no known kind; {KNOWN}$"):
        DataSource(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("~nobody-of-this-name/x.jsonl", "cannot be looked up: Could not determine home directory"),
        ("x" * 300, "'x{80}' cannot be looked up: File name too long$"),
    ],
)
def test_a_name_that_no_file_can_have_is_refused(name: str, words: str) -> None:
    for load in (DataSource, load_tokenizer, lambda name: load_template(name, None)):
        with pytest.raises(UserError, match=words):
            load(name)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("x.jsonl.gz", b"".join(LINES), r"is damaged: Not a gzipped file"),
        ("x.json.gz", b"[1]", r"is damaged: Not a gzipped file"),
        ("x.jsonl.gz", gzip.compress(LINES[0], mtime=0)[:-9], "is damaged: Compressed file ended"),
        (
            "x.jsonl.gz",
            gzip.compress(LINES[0], mtime=0)[:10] + b"\xff" * 40,
            "is damaged: Error -3 while decompressing",
        ),
        ("x.json", b"[{}", r"is not a JSON list: Expecting ',' delimiter"),
        ("x.json", b'["\xff"]', "is not a JSON list: 'utf-8' codec can't decode byte 0xff"),
        ("x.json", b"[" * 100_000, "is not a JSON list: maximum recursion depth"),
        ("x.json", b"[{}]\n[{}]\n", "is not a JSON list: Extra data"),
        ("x.parquet", b"", "is not a Parquet file, or damaged: Parquet file size is 0 bytes"),
        ("x.parquet", b"PAR1" * 20, "is not a Parquet file, or damaged"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name} {words}"):
        read(tmp_path / name)


def test_parquet_with_any_byte_changed_is_read_or_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet")
    whole = (tmp_path / "x.parquet").read_bytes()
    outcomes = set()
    for place in range(0, len(whole), 3):
        changed = bytearray(whole)
        changed[place] ^= 0xFF
        (tmp_path / "x.parquet").write_bytes(changed)
        try:
            source = DataSource(str(tmp_path / "x.parquet"))
            source.count()
            list(source.records())
            outcomes.add("read")
        except UserError as error:
            outcomes.add("damaged" if "x.parquet is " in str(error) else str(error))
    assert outcomes == {"read", "damaged"}


# Folders.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of several kinds, in two floors."""
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    write_parquet(folder / "a.parquet")
    write_gzip(folder / "b" / "part.jsonl.gz")
    (folder / "c.jsonl").write_bytes(b"\n" + LINES[0] + b"{\n")
    return folder


def test_the_files_of_a_folder_are_read_in_order(folder: Path) -> None:
    broken = (3, "broken JSON: Expecting property name enclosed in double quotes: line 1 column 2")
    *records, last = read(folder)
    assert records == [*numbered(CHATS), *numbered(CHATS), (2, CHATS[0])]
    assert (last[0], last[1][: len(broken[1])]) == broken


def test_reading_a_folder_goes_on_from_any_record(folder: Path) -> None:
    records = read(folder)
    assert len(records) == 12
    for start in range(14):
        assert read(folder, start=start) == records[start:]


def test_the_share_that_is_read_counts_every_file_of_a_folder(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl")
    write_lines(tmp_path / "b.jsonl")
    source = DataSource(str(tmp_path))
    assert [source.share_read() for _ in source.records()] == [0.5] * 5 + [1.0] * 5


def test_files_of_other_kinds_and_hidden_ones_are_left_out(folder: Path) -> None:
    wanted = read(folder)
    (folder / "notes.txt").write_text("x")
    write_lines(folder / ".hidden.jsonl")
    (folder / ".cache").mkdir()
    write_lines(folder / ".cache" / "x.jsonl")
    (folder / "empty.jsonl").mkdir()
    assert read(folder) == wanted


def test_a_folder_without_data_names_the_known_kinds(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(UserError, match=f"holds no data file; {KNOWN}$"):
        DataSource(str(tmp_path))


@pytest.mark.parametrize(
    ("split", "row"),
    [("train", 0), ("training", 0), ("test", 1), ("validation", 2), ("val", 2), ("dev", 2)],
)
def test_a_split_takes_the_files_that_are_named_for_it(
    tmp_path: Path, split: str, row: int
) -> None:
    names = ["chats-TRAIN-00000-of-00001.jsonl", "test/chats.jsonl", "valid.jsonl", "chats.jsonl"]
    (tmp_path / "test").mkdir()
    for name, line in zip(names, LINES[:4], strict=True):
        (tmp_path / name).write_bytes(line)
    assert read(tmp_path, split=split) == [(1, CHATS[row])]


def test_a_split_takes_every_file_where_no_name_tells(folder: Path) -> None:
    assert len(read(folder, split="test")) == 12


def test_a_split_that_is_missing_names_those_found(tmp_path: Path) -> None:
    write_lines(tmp_path / "test.jsonl")
    write_lines(tmp_path / "dev.jsonl")
    with pytest.raises(UserError, match=r"has no file of split 'train'; found: test, validation$"):
        DataSource(str(tmp_path))


def test_the_identity_of_files_is_their_names_sizes_and_times(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    write_lines(path)
    os.utime(path, ns=(1, 2))
    wanted = {"files": [[str(path), path.stat().st_size, 2]]}
    assert DataSource(str(path)).identity() == DataSource(str(tmp_path)).identity() == wanted


@pytest.mark.parametrize("count", [1, 17])
def test_the_identity_of_files_tells_edited_ones_apart(tmp_path: Path, count: int) -> None:
    for index in range(count):
        write_lines(tmp_path / f"{index}.jsonl")
    before = DataSource(str(tmp_path)).identity()
    assert DataSource(str(tmp_path)).identity() == before == json.loads(json.dumps(before))
    os.utime(tmp_path / "0.jsonl", ns=(1, 1))
    assert DataSource(str(tmp_path)).identity() != before


# Data sets.


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`datasets` keeps what it makes in this test's folder, and in silence."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def data_set(tmp_path: Path, cache: None) -> Path:
    """A data set with two configurations, as its README.md tells."""
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "README.md").write_text(
        "---\n"
        "configs:\n"
        "- config_name: chats\n"
        "  default: true\n"
        "  data_files:\n"
        "  - {split: train, path: first.parquet}\n"
        "  - {split: test, path: second.parquet}\n"
        "- config_name: others\n"
        "  data_files: third.parquet\n"
        "---\n"
    )
    write_rows(folder / "first.parquet", CHATS)
    write_rows(folder / "second.parquet", CHATS[:2])
    write_rows(folder / "third.parquet", CHATS[2:])
    return folder


def write_rows(path: Path, rows: list[Any]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_a_data_set_gives_its_rows(data_set: Path) -> None:
    assert read(data_set) == numbered(CHATS)
    assert DataSource(str(data_set)).count() == 5


def test_a_row_names_its_data_set(data_set: Path) -> None:
    assert [r.source for r in DataSource(str(data_set)).records(start=4)] == [f"{data_set}:5"]


def test_reading_a_data_set_goes_on_from_any_row(data_set: Path) -> None:
    source = DataSource(str(data_set))
    for start in range(7):
        assert [r.line for r in source.records(start=start)] == list(range(start + 1, 6))


def test_a_data_set_has_splits_and_subsets(data_set: Path) -> None:
    assert read(data_set, split="test") == numbered(CHATS[:2])
    assert read(data_set, split="train[1:3]") == numbered(CHATS[1:3])
    assert read(data_set, subset="others") == numbered(CHATS[2:])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "dev"}, r"\(split 'dev'\) cannot be loaded: .*\['train', 'test'\]"),
        (
            {"subset": "no"},
            r"\(split 'train', subset 'no'\) cannot .*\['chats', 'others'\]",
        ),
    ],
)
def test_a_split_or_subset_that_is_missing_names_those_there(
    data_set: Path, options: dict[str, str], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        read(data_set, **options)


def test_an_edited_file_of_a_data_set_is_read_anew(data_set: Path) -> None:
    assert read(data_set) == numbered(CHATS)
    write_rows(data_set / "first.parquet", CHATS[1:])
    assert read(data_set) == numbered(CHATS[1:])


def test_the_identity_of_a_data_set_tells_edited_files_apart(data_set: Path) -> None:
    before = DataSource(str(data_set)).identity()
    assert DataSource(str(data_set)).identity() == before == json.loads(json.dumps(before))
    write_rows(data_set / "first.parquet", CHATS[::-1])
    after = DataSource(str(data_set)).identity()
    assert after["records"] == before["records"]
    assert after != before


def test_keys_that_a_data_set_fills_with_null_are_left_out(data_set: Path) -> None:
    rows = [CHATS[0] | {"system": "x"}, CHATS[1]]
    write_rows(data_set / "first.parquet", rows)
    assert read(data_set) == numbered(rows)


def test_a_folder_without_a_readme_is_a_data_set_where_a_subset_is_asked_for(
    folder: Path, cache: None
) -> None:
    with pytest.raises(UserError, match=r"subset 'no'\) cannot be loaded: .*Available: "):
        read(folder, subset="no")


def test_a_data_set_that_cannot_be_built_says_why(data_set: Path) -> None:
    (data_set / "README.md").write_text("Files that do not go together.")
    write_rows(data_set / "first.parquet", [{"n": 1}])
    write_rows(data_set / "second.parquet", [{"n": "x"}])
    with pytest.raises(UserError, match=r"\(split 'train'\) cannot be loaded: .*'x'.* int64$"):
        read(data_set)


def test_a_saved_data_set_gives_its_rows(tmp_path: Path, cache: None) -> None:
    import datasets

    datasets.Dataset.from_list(CHATS).save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved", start=3) == numbered(CHATS[3:], 4)


def test_a_saved_data_set_has_splits(tmp_path: Path, cache: None) -> None:
    import datasets

    splits = {"train": CHATS, "test": CHATS[:1]}
    sets = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    datasets.DatasetDict(sets).save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved", split="test") == numbered(CHATS[:1])
    with pytest.raises(UserError, match=r"\(split 'dev'\) cannot be .*; found: train, test$"):
        read(tmp_path / "saved", split="dev")


def test_files_on_this_machine_have_no_revision(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text("{}")
    for data in (file, tmp_path):
        with pytest.raises(UserError, match=r"lies on this machine and has no revision 'v1'"):
            DataSource(str(data), revision="v1")


def test_a_data_set_that_cannot_be_reached_is_named_with_what_was_asked_for(
    cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    source = DataSource("nobody/nothing", revision="v1", split="test", subset="chats")
    words = r"^data set 'nobody/nothing' \(split 'test', subset 'chats', revision 'v1'\) cannot be "
    with pytest.raises(UserError, match=words):
        source.count()


# Tokenizers.


@pytest.fixture
def alone(backend: Tokenizer, tmp_path: Path) -> Path:
    """A folder with tokenizer.json alone."""
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write_gzipped(folder: Path) -> Path:
    path = folder / "tokenizer.json.gz"
    path.write_bytes(gzip.compress((folder / "tokenizer.json").read_bytes()))
    return path


TEXT = "<|im_start|>user\nZürich 日本 🙂<|im_end|>\n"


def test_a_tokenizer_in_any_form_gives_the_same_ids(
    backend: Tokenizer, tokenizer_folder: Path, alone: Path
) -> None:
    gzipped = write_gzipped(alone)
    for path in (tokenizer_folder, alone, alone / "tokenizer.json", gzipped):
        ids = load_tokenizer(str(path))(TEXT, add_special_tokens=False)["input_ids"]
        assert ids == backend.encode(TEXT, add_special_tokens=False).ids


def test_the_fingerprint_does_not_depend_on_the_form(tokenizer_folder: Path, alone: Path) -> None:
    paths = (tokenizer_folder, alone, write_gzipped(alone))
    assert len({tokenizer_fingerprint(load_tokenizer(str(path))) for path in paths}) == 1


def test_the_fingerprint_does_not_depend_on_where_an_added_token_stands(
    backend: Tokenizer, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_str(backend.to_str())
    tokenizer.add_special_tokens(["<another>"])
    state = json.loads(tokenizer.to_str())
    (tmp_path / "a.json").write_text(json.dumps(state))
    state["model"]["vocab"]["<another>"] = tokenizer.token_to_id("<another>")
    state["model"]["vocab"] = dict(reversed(state["model"]["vocab"].items()))
    (tmp_path / "b.json").write_text(json.dumps(state))
    first, second = (load_tokenizer(str(tmp_path / name)) for name in ("a.json", "b.json"))
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(second)


def test_the_fingerprint_knows_vocabularies_with_scores(tmp_path: Path) -> None:
    prints = set()
    for score in (-1.0, -2.0):
        model = models.Unigram([("<unk>", 0.0), ("a", score)], unk_id=0)
        Tokenizer(model).save(str(tmp_path / "x.json"))
        prints.add(tokenizer_fingerprint(load_tokenizer(str(tmp_path / "x.json"))))
    assert len(prints) == 2


def test_the_fingerprint_tells_another_token(alone: Path) -> None:
    tokenizer = load_tokenizer(str(alone))
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.add_tokens(["<another>"])
    assert tokenizer_fingerprint(tokenizer) != before


def test_a_folder_of_transformers_names_its_tokens(tokenizer_folder: Path) -> None:
    for path in (tokenizer_folder, tokenizer_folder / "tokenizer.json"):
        tokenizer = load_tokenizer(str(path))
        assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", None)


def test_a_file_of_another_name_in_such_a_folder_stands_for_itself(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    shutil.copy(tokenizer_folder / "tokenizer_config.json", tmp_path)
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path / "mine.json")
    assert load_tokenizer(str(tmp_path / "mine.json")).bos_token == "<|begin_of_text|>"


def test_a_file_alone_has_the_likeliest_tokens_named(alone: Path) -> None:
    write_gzipped(alone)
    for path in (alone, alone / "tokenizer.json", alone / "tokenizer.json.gz"):
        tokenizer = load_tokenizer(str(path))
        assert tokenizer.bos_token == "<|begin_of_text|>"
        assert tokenizer.eos_token == "<|im_end|>"
        assert tokenizer.pad_token == "<|endoftext|>"


def test_a_folder_with_a_gzipped_tokenizer_is_one(alone: Path) -> None:
    write_gzipped(alone)
    (alone / "tokenizer.json").unlink()
    assert load_tokenizer(str(alone)).eos_token == "<|im_end|>"


@pytest.mark.parametrize("name", ["no/such/folder", "./no", "no.json"])
def test_a_tokenizer_that_is_missing_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"^no such tokenizer: {name}$"):
        load_tokenizer(name)


def test_a_folder_without_a_tokenizer_names_the_files_wanted(tmp_path: Path) -> None:
    wanted = r"tokenizer\.json, tokenizer_config\.json, tokenizer\.json\.gz$"
    with pytest.raises(UserError, match=f"holds no tokenizer: none of {wanted}"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b'{"a": 1}'),
        ("tokenizer.json", b"\xff"),
        ("tokenizer.json.gz", b"{}"),
        ("tokenizer.json.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9]),
    ],
)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=rf"{name} is not a tokenizer\.json: ."):
            load_tokenizer(str(path))


def test_a_folder_whose_tokenizer_is_broken_is_named(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tokenizer_folder, folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"^tokenizer '.*broken' cannot be loaded: ."):
        load_tokenizer(str(folder))


def test_a_tokenizer_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^tokenizer 'nobody/nothing' cannot be loaded: ."):
        load_tokenizer("nobody/nothing", "v1")


@pytest.mark.parametrize(
    ("name", "size"), [("gpt2", 50_257), ("qwen", 151_669), ("deepseek", 129_280)]
)
def test_released_tokenizers_are_loaded(shared_data: Path, name: str, size: int) -> None:
    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / name))
    assert len(tokenizer) == size
    assert tokenizer.decode(tokenizer(TEXT, add_special_tokens=False)["input_ids"]) == TEXT


# Templates.


@pytest.mark.parametrize("name", ["hermes_chatml", "hermes_llama3"])
def test_a_template_of_ours_is_found_by_name(name: str) -> None:
    assert load_template(name, None)[0] == name
    assert "add_generation_prompt" in load_template(name, None)[1]


def test_a_template_is_found_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{{ messages }} é", encoding="utf-8")
    assert load_template(str(path), None) == ("mine.jinja", "{{ messages }} é")


@pytest.mark.parametrize("own", ["{{ messages }}", {"default": "{{ messages }}", "tools": "x"}])
def test_without_a_name_the_template_is_that_of_the_tokenizer(alone: Path, own: Any) -> None:
    tokenizer = load_tokenizer(str(alone))
    tokenizer.chat_template = own
    assert load_template(None, tokenizer) == ("the tokenizer's own", "{{ messages }}")


@pytest.mark.parametrize("own", [None, {"tools": "x"}])
def test_a_tokenizer_without_a_template_names_ours(alone: Path, own: Any) -> None:
    tokenizer = load_tokenizer(str(alone))
    tokenizer.chat_template = own
    words = "give --template: one of hermes_chatml, hermes_llama3, or a .jinja file$"
    with pytest.raises(UserError, match=words):
        load_template(None, tokenizer)


@pytest.mark.parametrize("name", ["hermes", "no/such.jinja", "", "report.html"])
def test_an_unknown_template_names_ours(name: str) -> None:
    words = f"^no template '{name}': want one of hermes_chatml, hermes_llama3, or a .jinja file$"
    with pytest.raises(UserError, match=words):
        load_template(name, None)


def test_a_template_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jinja").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match=r"x\.jinja is not UTF-8: byte 2$"):
        load_template(str(tmp_path / "x.jinja"), None)
