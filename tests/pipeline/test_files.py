"""Records out of files and folders; what cannot be read has its number or is named."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hermes_pipeline.errors import UserError
from hermes_pipeline.services.hub import DataSource, load_template, load_tokenizer
from hermes_pipeline.stages.tokenize import run as tokenize
from reading import CHATS, numbered, read

LINES = [json.dumps(chat).encode() + b"\n" for chat in CHATS]
KNOWN = r"known: \.jsonl, \.jsonl\.gz, \.json, \.json\.gz, \.parquet"


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
    "LINES.JSONL.GZ": write_gzip,
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
    with pytest.raises(UserError, match=rf"{name} has an unknown file type; {KNOWN}$"):
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


@pytest.mark.parametrize("read_me", [False, True])
def test_a_value_that_python_cannot_hold_is_its_records_own_fault(
    tmp_path: Path, read_me: bool, cache: None
) -> None:
    chats = [chat["messages"] for chat in CHATS[:3]]
    for number, column in enumerate(
        [
            pa.array([1, 10**8, None], pa.date32()),
            pa.array([1, 1 << 62, None], pa.duration("s")),
            pa.array([None, 1, None], pa.timestamp("us", tz="Mars/Phobos")),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        pq.write_table(pa.table({"messages": chats, "day": column}), folder / "x.parquet")
        if read_me:
            (folder / "README.md").write_text("Read by `datasets`.")
        first, (line, reason), last = read(folder)
        assert [first[1]["messages"], last[1]] == [chats[0], {"messages": chats[2]}]
        wanted = "it" if read_me else "column 'day'"
        assert (line, reason.partition(" cannot be read: ")[0]) == (2, wanted)


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


def test_a_folder_without_a_readme_is_a_data_set_where_a_subset_is_asked_for(
    folder: Path, cache: None
) -> None:
    with pytest.raises(UserError, match=r"subset 'no'\) cannot be loaded: .*Available: "):
        read(folder, subset="no")


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


def test_a_split_that_is_missing_names_those_found(tmp_path: Path) -> None:
    write_lines(tmp_path / "test.jsonl")
    write_lines(tmp_path / "dev.jsonl")
    with pytest.raises(UserError, match=r"has no file of split 'train'; found: test, validation$"):
        DataSource(str(tmp_path))
