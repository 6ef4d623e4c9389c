"""`hermes4 tokenize`: the store does not tell how it was made; what is bad is counted and named."""

from __future__ import annotations

import errno
import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from hermes_core import open_store, store_writer
from hermes_pipeline.services.hub import DataSource
from hermes_pipeline.stages import tokenize as stage
from running import Ended, Hermes4, contents

pytestmark = pytest.mark.timeout(200)

PATIENCE_S = 120.0
MEGABYTE = 1_000_000


Tokenize = Callable[..., Ended]


def conversation(answer: str, ask: str = "What is it?") -> str:
    turns = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns})


def bad(number: int) -> str:
    role = {"messages": [{"role": "wizard", "content": "x"}]}
    kinds = ["{broken", "[]", json.dumps(role), json.dumps({"text": "x"})]
    return kinds[number % len(kinds)]


def mixed(count: int) -> list[str]:
    """Records of many lengths; each seventh is one to set aside."""
    return [
        bad(n // 7) if n % 7 == 3 else conversation(f"It is {n}. " * (n % 11 + 1), f"{n}?")
        for n in range(count)
    ]


def write_lines(path: Path, lines: Sequence[str | bytes]) -> Path:
    path.write_bytes(b"".join((x if isinstance(x, bytes) else x.encode()) + b"\n" for x in lines))
    return path


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("few") / "chats.jsonl", mixed(20))


@pytest.fixture(scope="module")
def calm(few: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of ``few``, made without a stop."""
    out = tmp_path_factory.mktemp("calm") / "store"
    source = DataSource(str(few))
    stage.run(source, str(tokenizer_folder), out, template="hermes_chatml", workers=1)
    return out


@pytest.fixture
def tokenize(hermes4: Hermes4, tokenizer_folder: Path) -> Tokenize:
    """Runs `hermes4 tokenize` in this process; the last of equal options counts."""

    def run(data: Path, out: Path, *more: object, workers: int = 1) -> Ended:
        return hermes4(*arguments(data, out, tokenizer_folder, workers=workers), *more)

    return run


def arguments(data: Path, out: Path, tokenizer: Path, *, workers: int) -> list[str]:
    words = ["tokenize", "--data", str(data), "--out", str(out), "--workers", str(workers)]
    return [*words, "--tokenizer", str(tokenizer), "--template", "hermes_chatml"]


def quarantine(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]


def refused(ended: Ended) -> str:
    """The last line on standard error: a user's mistake, without a traceback."""
    assert ended.code == 2, ended
    assert "Traceback" not in ended.err
    last = ended.err.splitlines()[-1]
    assert last.startswith("hermes4: error: ")
    return last


# The same bytes.


def test_the_number_of_workers_changes_no_byte(tokenize: Tokenize, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "chats.jsonl", mixed(900))  # more batches than are under way
    for workers in (1, 3):
        assert tokenize(data, tmp_path / str(workers), workers=workers).code == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_a_finished_store_is_not_made_again(tokenize: Tokenize, few: Path, tmp_path: Path) -> None:
    first = tokenize(few, tmp_path)
    before = written(tmp_path)
    again = tokenize(few, tmp_path)
    assert again.out.startswith(f"{tmp_path} is finished already")
    assert again.out.endswith(first.out)
    assert written(tmp_path) == before


def written(folder: Path) -> dict[Path, tuple[int, int]]:
    """Which file each is, and when it was written last."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*")}


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


# Counts and quarantine.


def test_read_is_stored_plus_quarantined(tokenize: Tokenize, few: Path, tmp_path: Path) -> None:
    ended = tokenize(few, tmp_path)
    store = open_store(tmp_path)
    assert (store.read, store.stored, store.quarantined) == (20, 17, 3)
    assert "20 read = 17 stored + 3 quarantined\n" in ended.out
    assert len(quarantine(tmp_path)) == 3


def test_a_limit_reads_so_many_records(tokenize: Tokenize, few: Path, tmp_path: Path) -> None:
    assert "5 read = 4 stored + 1 quarantined\n" in tokenize(few, tmp_path, "--limit", 5).out


LINES: list[tuple[int, str | bytes, str]] = [
    (2, b'{"messages": "\xff"}', "invalid UTF-8 at byte 14 of the line"),
    (4, '{"messages": [', "broken JSON"),
    (6, '{"messages": [{"role": "wizard", "content": "x"}]}', "message 0: role 'wizard' is not"),
    (7, "[]", "a record must be a JSON object, not a list"),
    (9, '{"messages": []}', "the conversation is empty"),
    (10, '{"text": "x"}', "no known form"),
    (11, '{"messages": [{"role": "user", "content": "x"}]}', "nothing to train"),
    (12, '{"a": ' * 5000 + "1" + "}" * 5000, "JSON nested too deeply"),
    (13, conversation("\ud83d"), "half a surrogate pair"),
    (14, conversation("a" * 40), "the conversation has 51 characters, more than 50"),
]


def test_every_bad_line_is_named_with_its_number_and_reason(
    tokenize: Tokenize, tmp_path: Path
) -> None:
    lines: list[str | bytes] = [conversation("Yes.")] * 15
    lines[4] = "  "  # no record, but a line
    for number, line, _ in LINES:
        lines[number - 1] = line
    data = write_lines(tmp_path / "chats.jsonl", lines)
    ended = tokenize(data, tmp_path / "store", "--max-chars", 50)
    assert "14 read = 4 stored + 10 quarantined\n" in ended.out
    for entry, (number, line, reason) in zip(quarantine(tmp_path / "store"), LINES, strict=True):
        assert (entry["line"], entry["source"]) == (number, f"{data}:{number}")
        assert reason in entry["reason"]
        if number != 12:  # a small record stands beside its reason
            text = line.decode("utf-8", "replace") if isinstance(line, bytes) else line
            assert entry["record"] == text


def test_the_commonest_reasons_are_printed_without_their_numbers(
    tokenize: Tokenize, tmp_path: Path
) -> None:
    lines = [conversation("Yes."), "[]", conversation("a" * 60), conversation("a" * 70)]
    data = write_lines(tmp_path / "chats.jsonl", lines)
    ended = tokenize(data, tmp_path / "store", "--max-chars", 50)
    assert "        2  the conversation has N characters, more than N\n" in ended.out
    assert "        1  a record must be a JSON object, not a list\n" in ended.out


def test_a_message_of_100_megabytes_is_set_aside_alone(tokenize: Tokenize, tmp_path: Path) -> None:
    lines = [conversation("Yes."), conversation("It is. " * (100 * MEGABYTE // 7))]
    data = write_lines(tmp_path / "chats.jsonl", [*lines, conversation("No.")])
    ended = tokenize(data, tmp_path / "store")
    assert "3 read = 2 stored + 1 quarantined\n" in ended.out
    (entry,) = quarantine(tmp_path / "store")
    assert entry["line"] == 2
    assert "bytes is longer than" in entry["reason"]
    assert "record" not in entry


# What cannot be tokenized.


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
        ("--data", "file", "file is of no known kind"),
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


def test_a_folder_that_holds_something_else_keeps_it(
    tokenize: Tokenize, few: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "notes.txt").write_text("mine")
    said = refused(tokenize(few, tmp_path))
    assert f"--out {tmp_path} holds a tokenizer and no store" in said
    assert contents(tmp_path) == {"tokenizer/notes.txt": b"mine"}


def test_a_cut_off_file_is_refused_by_name(tokenize: Tokenize, few: Path, tmp_path: Path) -> None:
    data = tmp_path / "chats.jsonl.gz"
    whole = gzip.compress(few.read_bytes())
    data.write_bytes(whole[: len(whole) // 2])
    assert f"{data} is damaged" in refused(tokenize(data, tmp_path / "store"))
    assert not (tmp_path / "store" / "store.json").exists()


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
        ("--data", "other_data", "--data {'files': .*chats.jsonl.*, not .*others.jsonl"),
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
    assert "was begun with --data {" in refused(tokenize(data, tmp_path / "store"))


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


# Ctrl-C and faults, in this process.


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


# Time and memory.

# Says its greatest memory last, as "VmHWM: 1234 kB".
MEASURED = """
from pathlib import Path
from hermes_pipeline.cli import main
try:
    main()
finally:
    status = Path("/proc/self/status").read_text()
    print(next(line for line in status.splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("letters", "times", "stored", "most_mb"),
    [
        ("a", 100 * MEGABYTE, 2, 1000),  # a longer line than any that is read
        ("a", 60 * MEGABYTE, 2, 1000),  # read, and then more than --max-chars
        ("It is a word. ", 285_000, 3, 3000),  # all that --max-chars allows
        ("a", 3_990_000, 3, 3000),  # and in one word
    ],
)
def test_a_huge_message_takes_bounded_time_and_memory(
    tokenizer_folder: Path, tmp_path: Path, letters: str, times: int, stored: int, most_mb: int
) -> None:
    lines = [conversation("Yes."), conversation(letters * times), conversation("No.")]
    data = write_lines(tmp_path / "chats.jsonl", lines)
    words = [sys.executable, "-c", MEASURED]
    words += arguments(data, tmp_path / "store", tokenizer_folder, workers=1)
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert open_store(tmp_path / "store").stored == stored
    assert int(done.stdout.split()[-2]) < most_mb * 1000
