"""`hermes4 tokenize`: the store does not tell how it was made; what is bad is counted and named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hermes_core import open_store
from running import contents
from tokenizing import Tokenize, arguments, conversation, mixed, write_lines

pytestmark = pytest.mark.timeout(200)

PATIENCE_S = 120.0
MEGABYTE = 1_000_000


def quarantine(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]


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
