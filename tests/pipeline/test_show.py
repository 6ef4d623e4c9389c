"""`hermes4 show`: which conversation it prints, how kept text is marked, and how it fails."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from hermes_pipeline.cli import main

COLOURED = re.compile(r"\x1b\[1;32m(.*?)\x1b\[0m", re.DOTALL)
ESCAPES = re.compile(r"\x1b\[[\d;]*m")

Show = Callable[..., int]


def chat(ask: str, told: str, **more: Any) -> dict[str, Any]:
    answer = {"role": "assistant", "content": told, **more}
    return {"messages": [{"role": "user", "content": ask}, answer]}


CHATS = [
    chat("Hi", "Hello."),
    chat("Why?", "ab cd ef", train_spans=[[0, 2], [6, 8]]),
    {"messages": [{"role": "user", "content": "x"}, {"role": "assistnt", "content": "y"}]},
    chat("Zürich?", "日本 🙂"),
]
HELLO = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n\n"


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def hermes4(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["hermes4", *words])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Four conversations, the third of them bad."""
    return write(tmp_path / "chats.jsonl", CHATS)


@pytest.fixture
def show(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Show:
    """Runs `hermes4 show` in this process, with the environment of a plain terminal."""
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE", "HERMES4_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def run(data: Path | str, *options: str) -> int:
        given = {"--data": str(data), "--tokenizer": str(tokenizer_folder)}
        given |= {"--template": "hermes_chatml"}
        given |= dict(zip(options[::2], options[1::2], strict=True))
        return hermes4(monkeypatch, "show", *(word for pair in given.items() for word in pair))

    return run


@pytest.fixture
def on_terminal(show: Show, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs the command on a real pseudo-terminal; returns what it wrote there."""

    def run(data: Path, *options: str, **environment: str) -> str:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        here, there = os.openpty()
        with open(there, "w", encoding="utf-8") as terminal, open(here, "rb") as reader:
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stdout", terminal)
                assert show(data, *options) == 0
            terminal.flush()
            written = reader.read1(1 << 16)
        return written.decode().replace("\r\n", "\n")

    return run


# Kept text is marked.


def test_kept_text_stands_in_brackets_where_there_is_no_terminal(
    show: Show, chats: Path, backend: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show(chats) == 0
    title, text = capsys.readouterr().out.split("\n", 1)
    assert text == HELLO
    whole = HELLO.replace("⟦", "").replace("⟧\n", "")
    total = len(backend.encode(whole).ids)
    kept = len(backend.encode("Hello.<|im_end|>").ids)
    counts = f"2 messages, {total} tokens, {kept} kept ({kept / total:.1%})"
    assert title == f"conversation 0 ({chats}:1): {counts}"


def test_kept_text_is_coloured_on_a_terminal(on_terminal: Any, chats: Path) -> None:
    written = on_terminal(chats)
    assert COLOURED.findall(written) == ["Hello.<|im_end|>"]
    plain = ESCAPES.sub("", written).split("\n", 1)[1]
    assert plain == HELLO.replace("⟦", "").replace("⟧", "")


def test_kept_text_stands_in_brackets_without_colour_under_no_color(
    on_terminal: Any, chats: Path
) -> None:
    written = on_terminal(chats, NO_COLOR="1")
    assert "\x1b[1m⟦Hello.<|im_end|>⟧\x1b[0m" in written
    assert set(ESCAPES.findall(written)) == {"\x1b[1m", "\x1b[0m"}  # bold is no colour
    assert ESCAPES.sub("", written).split("\n", 1)[1] == HELLO


def test_an_empty_no_color_is_none(on_terminal: Any, chats: Path) -> None:
    assert COLOURED.findall(on_terminal(chats, NO_COLOR="")) == ["Hello.<|im_end|>"]


def test_kept_text_stands_in_brackets_on_a_terminal_without_colours(
    on_terminal: Any, chats: Path
) -> None:
    written = on_terminal(chats, TERM="dumb")
    assert "\x1b" not in written
    assert written.split("\n", 1)[1] == HELLO


def test_kept_text_is_coloured_in_a_pipe_where_that_is_asked_for(
    show: Show,
    chats: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    show(chats)
    assert COLOURED.findall(capsys.readouterr().out) == ["Hello.<|im_end|>"]


def test_each_kept_stretch_is_marked(
    show: Show, on_terminal: Any, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show(chats, "--index", "1")
    assert "assistant\n⟦ab⟧ cd ⟦ef<|im_end|>⟧\n" in capsys.readouterr().out
    assert COLOURED.findall(on_terminal(chats, "--index", "1")) == ["ab", "ef<|im_end|>"]


# Text is shown as it is.


def test_what_would_move_the_cursor_or_hide_is_shown_as_an_escape(
    show: Show, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "x.jsonl", [chat("a\x1b[31m\rb\tc", "\u202eé\u00a0日🙂\x00\n!")])
    show(path)
    text = capsys.readouterr().out
    assert r"a\x1b[31m\rb\tc<|im_end|>" in text
    assert "⟦\\u202eé\u00a0日🙂\\x00\n!<|im_end|>⟧" in text


def test_markup_and_long_lines_are_left_alone(
    show: Show, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "[bold]x[/bold] :smile: " + "word " * 100 + "."
    show(write(tmp_path / "x.jsonl", [chat("Hi", told)]))
    assert f"⟦{told}<|im_end|>⟧" in capsys.readouterr().out


def test_characters_that_the_output_cannot_hold_become_escapes(
    show: Show, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert show(chats, "--index", "3") == 0
    sys.stdout.flush()
    assert rb"\u27e6\u65e5\u672c \U0001f642<|im_end|>\u27e7" in written.getvalue()


# Which conversation.


def titles(text: str) -> list[str]:
    return re.findall(r"^conversation (\d+ \(.*?\))", text, re.MULTILINE)


def test_index_and_count_choose_the_conversations(
    show: Show, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show(chats, "--index", "1", "--count", "2")
    assert titles(capsys.readouterr().out) == [f"1 ({chats}:2)", f"2 ({chats}:3)"]


def test_fewer_conversations_than_asked_for_are_shown(
    show: Show, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show(chats, "--index", "3", "--count", "9") == 0
    assert titles(capsys.readouterr().out) == [f"3 ({chats}:4)"]


def test_the_title_tells_the_line_where_blank_ones_stand_between(
    show: Show, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(f"\n{json.dumps(CHATS[0])}\n\n{json.dumps(CHATS[0])}\n")
    show(path, "--index", "1")
    assert titles(capsys.readouterr().out) == [f"1 ({path}:4)"]


def test_a_split_is_chosen(show: Show, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "train.jsonl", CHATS)
    write(tmp_path / "test.jsonl", CHATS[3:])
    show(tmp_path, "--split", "test")
    assert titles(capsys.readouterr().out) == [f"0 ({tmp_path / 'test.jsonl'}:1)"]


# Which template.


def test_a_template_is_chosen(show: Show, chats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(chats, "--template", "hermes_llama3")
    assert "<|end_header_id|>\n\n⟦Hello.<|eot_id|>⟧\n" in capsys.readouterr().out


def test_without_a_template_that_of_the_tokenizer_is_used(
    tokenizer_folder: Path,
    chats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    hermes4(monkeypatch, "show", "--data", str(chats), "--tokenizer", str(folder))
    assert "\nuser: Hi<|im_end|>assistant: ⟦Hello.<|im_end|>⟧\n" in capsys.readouterr().out


# What is refused.


def test_a_refused_record_says_why_in_one_line_and_the_next_is_shown(
    show: Show, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show(chats, "--index", "2", "--count", "2") == 2
    out, err = capsys.readouterr()
    assert err == (
        "hermes4: error: 1 of 2 conversations shown cannot be used; the reasons are printed with "
        "them\n"
    )
    refused, record, title, *_ = out.splitlines()
    assert refused.startswith(
        f"conversation 2 ({chats}:3): refused: message 1: role 'assistnt' is not known; known: "
    )
    assert record == json.dumps(CHATS[2])
    assert title.startswith(f"conversation 3 ({chats}:4): 2 messages, ")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "broken JSON: Expecting property name enclosed in double quotes: line 1 column 2"),
        ("[1]", "a record must be a JSON object, not a list"),
        (json.dumps({"two\nlines": 1}), "no known form; "),
        (json.dumps(chat("Hi", "<tool_response>")), "message 1 (assistant): <tool_response> is "),
        (
            json.dumps(chat("Hi", "<tool_response><tool_response>b</tool_response> c")),
            "message 1 (assistant): <tool_response> stands in what a tool said",
        ),
        (
            json.dumps(chat("Hi", "<tool_response>a</tool_response> b</tool_response> c")),
            "message 1 (assistant): </tool_response> stands in what a tool said",
        ),
    ],
)
def test_every_refusal_is_one_line_above_the_record(
    show: Show, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, reason: str
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(line)
    assert show(path) == 2
    refused, record = capsys.readouterr().out.splitlines()
    assert refused.startswith(f"conversation 0 ({path}:1): refused: {reason}")
    assert record == line


@pytest.mark.parametrize(("letters", "dots"), [(9, ""), (10, "...")])
def test_of_a_long_refused_record_the_beginning_is_shown(
    show: Show,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    letters: int,
    dots: str,
) -> None:
    line = json.dumps({"a" * 183: "b" * letters})  # 191 characters and the letters
    (tmp_path / "x.jsonl").write_text(line)
    show(tmp_path / "x.jsonl")
    _, record = capsys.readouterr().out.splitlines()
    assert record == (line[:197] + dots if dots else line)


def test_records_of_a_list_are_shown_and_refused_alike(
    show: Show, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps([CHATS[0], {"a": 1}]))
    show(path, "--count", "2")
    _, text = capsys.readouterr().out.split("\n", 1)
    shown, refused = text.split("conversation 1 ")
    assert shown == HELLO
    assert refused.startswith(f"({path}:2): refused: no known form; ")
    assert refused.endswith("keys: a\n{'a': 1}\n")


def test_a_record_that_cannot_be_read_has_its_reason_alone(
    show: Show, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = pa.array([b"a\xff"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 1, raw.buffers())
    pq.write_table(pa.table({"prompt": text}), tmp_path / "x.parquet")
    show(tmp_path / "x.parquet")
    reason = "refused: invalid UTF-8 at byte 1 of a text"
    assert capsys.readouterr().out == f"conversation 0 ({tmp_path / 'x.parquet'}:1): {reason}\n"


def test_a_template_that_refuses_says_so_in_one_line(
    show: Show, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.jinja").write_text("{{ raise_exception('no\\nmore') }}")
    assert show(chats, "--template", str(tmp_path / "x.jinja")) == 2
    refused = capsys.readouterr().out.splitlines()[0]
    assert refused.endswith("refused: the chat template refuses: no more")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "no/such.jsonl"], "no such data file: no/such.jsonl"),
        (["--index", "4"], "--index 4: .*chats.jsonl has no conversation of that number"),
        (["--tokenizer", "./no"], "no such tokenizer: ./no"),
        (["--template", "no"], "no template 'no': want one of hermes_chatml, hermes_llama3, or "),
    ],
)
def test_a_mistake_ends_in_one_line(
    show: Show,
    chats: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    words: str,
) -> None:
    assert show(chats, *options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(f"hermes4: error: {words}.*\n", err)


def test_a_template_that_does_not_compile_ends_in_one_line(
    show: Show, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.jinja").write_text("{% if %}")
    assert show(chats, "--template", str(tmp_path / "x.jinja")) == 2
    words = r"hermes4: error: template 'x\.jinja': the chat template does not compile: .*\n"
    assert re.fullmatch(words, capsys.readouterr().err)


def test_the_installed_command_shows_a_refused_record_without_a_traceback(
    chats: Path, tokenizer_folder: Path
) -> None:
    words = ["--data", str(chats), "--tokenizer", str(tokenizer_folder), "--index", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "hermes_pipeline", "show", *words, "--template", "hermes_chatml"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "refused: message 1: role 'assistnt' is not known" in done.stdout
