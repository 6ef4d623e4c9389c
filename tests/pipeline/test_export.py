"""`hermes4 export` of answers: JSON Lines, Parquet, and a folder for `datasets`."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from hermes_pipeline.errors import UserError
from hermes_pipeline.services.hub import DataSource
from hermes_pipeline.services.store import Input, RunStore
from hermes_pipeline.stages import export as module
from running import Hermes4, contents

pytestmark = pytest.mark.timeout(60)

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "x"}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
MESSAGES = [
    {"role": "user", "content": "1+1? 日本"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "name": "add"},
]


def answer(number: int, draw: int) -> dict[str, Any]:
    """The second draw of the second input calls a tool."""
    called = {"tool_calls": [CALL]} if (number, draw) == (2, 1) else {}
    return {
        "seed": draw,
        "text": f"{number}.{draw}",
        "finish_reason": "stop",
        "prompt_tokens": 7,
        "tokens": 10 * number + draw,
        **called,
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three inputs of two draws; the second draw of the third was set aside."""
    folder = tmp_path / "run"

    async def fill(store: RunStore) -> None:
        for number in (3, 1, 2):
            about = {"source": f"data/x.jsonl:{number}", "messages": MESSAGES}
            given = Input.of(number, number, about | ({"tools": [TOOL]} if number == 1 else {}))
            await store.keep(given, 0, 0, answer(number, 0))
            if number == 3:
                await store.set_aside(given, 1, 0, "busy at 12:34")
            else:
                await store.keep(given, 1, 0, answer(number, 1))

    settings = {"model": "tiny", "temperature": 0.6}
    with RunStore(folder, stage="complete", settings=settings, seed=4) as store:
        asyncio.run(fill(store))
        store.write_counts({"quarantined": 7})
    return folder


def test_results_of_another_stage_are_refused_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "scores"
    with RunStore(folder, stage="evaluate", settings={}, seed=4):
        (folder / "answers.jsonl").write_text("theirs")
    with pytest.raises(UserError, match=r"holds results of `hermes4 evaluate`, not of"):
        module.export(folder)
    assert (folder / "answers.jsonl").read_text() == "theirs"


def test_json_lines_hold_one_record_for_each_input_in_order(hermes4: Hermes4, run: Path) -> None:
    ended = hermes4("export", run)
    path = run / "answers.jsonl"
    assert (ended.code, ended.err) == (0, f"export: 5 answers to 3 inputs in {path}\n")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["source"] for record in found] == [f"data/x.jsonl:{n}" for n in (1, 2, 3)]
    assert found[0] == {
        "id": Input.of(1, 1, {}).id,
        "source": "data/x.jsonl:1",
        "messages": MESSAGES,
        "tools": [TOOL],
        "answers": [{"draw": 0, **answer(1, 0)}, {"draw": 1, **answer(1, 1)}],
        "set_aside": [],
    }
    assert found[1]["answers"][1]["tool_calls"] == [CALL]
    assert [answers["draw"] for answers in found[2]["answers"]] == [0]
    assert found[2]["set_aside"] == [1]


def test_parquet_holds_the_same(hermes4: Hermes4, run: Path, tmp_path: Path) -> None:
    assert hermes4("export", run).code == 0
    assert hermes4("export", run, "--format", "parquet", "--out", tmp_path / "a.parquet").code == 0
    plain = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    rows = pq.read_table(tmp_path / "a.parquet").to_pylist()
    for row, record in zip(rows, plain, strict=True):
        for given, wanted in zip(row["answers"], record["answers"], strict=True):
            assert json.loads(given.pop("tool_calls") or "null") == wanted.pop("tool_calls", None)
            assert given == wanted
        assert [m["content"] for m in row["messages"]] == [m["content"] for m in MESSAGES]
        assert json.loads(row["messages"][1]["tool_calls"]) == [CALL]
        assert json.loads(row["tools"] or "null") == record.get("tools")
        assert (row["id"], row["set_aside"]) == (record["id"], record["set_aside"])


def test_datasets_loads_the_folder_and_its_card_says_what_is_in_it(
    hermes4: Hermes4, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(module, "SHARD_RECORDS", 2)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    out = tmp_path / "set"
    words = ("--format", "datasets", "--licence", "cc-by-4.0", "--out", out)
    assert hermes4("export", run, *words).code == 0
    loaded = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert [row["source"] for row in loaded] == [f"data/x.jsonl:{n}" for n in (1, 2, 3)]
    assert len(list(DataSource(str(out)).records())) == 3
    assert len(list(out.glob("*.parquet"))) == 2
    card = (out / "README.md").read_text()
    assert card.startswith('---\nlicense: "cc-by-4.0"\n')
    assert "5 answers of tiny to 3 inputs, one input a record; 92 tokens." in card
    assert "1 draws failed and were set aside; 7 records of the source were no conv" in card
    assert "| 8 to 15 | 2 |\n| 16 to 31 | 3 |" in card
    assert "| data/x.jsonl | 3 |" in card
    assert '"temperature": 0.6' in card
    assert "files" not in card.partition("## Recipe")[2]  # their times differ from run to run


def test_an_export_is_the_same_bytes_each_time(hermes4: Hermes4, run: Path, tmp_path: Path) -> None:
    for form in ("jsonl", "parquet", "datasets"):
        for copy in ("a", "b"):
            (tmp_path / copy).mkdir(exist_ok=True)
            hermes4("export", run, "--format", form, "--out", tmp_path / copy / form)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_copy_that_may_not_be_written_is_exported_all_the_same(
    hermes4: Hermes4, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, how: how != os.W_OK and allowed(path, how))
    assert hermes4("export", copy, "--out", tmp_path / "a.jsonl").code == 0
    assert not list(copy.glob("*-shm"))
    hermes4("export", run)
    assert (tmp_path / "a.jsonl").read_bytes() == (run / "answers.jsonl").read_bytes()


def refused(hermes4: Hermes4, *words: object) -> str:
    ended = hermes4("export", *words)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    return ended.err


def test_options_of_the_other_kind_are_refused(hermes4: Hermes4, run: Path, tmp_path: Path) -> None:
    assert "--step and --dtype are for checkpoints" in refused(hermes4, run, "--step", 3)
    said = refused(hermes4, tmp_path, "--format", "jsonl")
    assert "--format and --licence are for answers" in said
    assert "--licence is for the card" in refused(hermes4, run, "--licence", "mit")
    assert "'csv' is not known; known: jsonl" in refused(hermes4, run, "--format", "csv")
    assert "is a folder; --format jsonl writes a file" in refused(hermes4, run, "--out", tmp_path)


def test_a_folder_that_holds_nothing_to_export_is_refused(hermes4: Hermes4, tmp_path: Path) -> None:
    for words in ((), ("--out", tmp_path / "x")):
        assert "holds neither answers" in refused(hermes4, tmp_path, *words)
        assert f"no such folder: {tmp_path}/no\n" in refused(hermes4, tmp_path / "no", *words)
    (tmp_path / "run.json").write_text("{}")
    assert "a checkpoint wants --out" in refused(hermes4, tmp_path)


@pytest.mark.parametrize("form", ["jsonl", "parquet", "datasets"])
def test_what_a_link_leads_to_is_written(
    hermes4: Hermes4, run: Path, tmp_path: Path, form: str
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    if form == "datasets":  # no folder is made where a link leads nowhere
        assert "make that folder" in refused(
            hermes4, run, "--format", form, "--out", tmp_path / "link"
        )
        (tmp_path / "real").mkdir()
    for _ in range(2):
        assert hermes4("export", run, "--format", form, "--out", tmp_path / "link").code == 0
        assert (tmp_path / "link").is_symlink()
        assert sorted(tmp_path.iterdir()) == [tmp_path / "link", tmp_path / "real", run]


def test_a_pipe_or_a_file_of_the_run_is_not_replaced(
    hermes4: Hermes4, run: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    said = refused(hermes4, run, "--out", tmp_path / "pipe")
    assert f"--out {tmp_path / 'pipe'} cannot be written: no regular file stands there" in said
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "link").symlink_to(run / "records.sqlite")
    before = contents(run)
    for out in (run / "records.sqlite", run / "stage.json", run / "set_aside.jsonl", "link"):
        said = refused(hermes4, run, "--out", tmp_path / out)
        assert f"--out {tmp_path / out} is a file of the run itself" in said
    assert contents(run) == before


def test_a_folder_without_records_is_refused(hermes4: Hermes4, run: Path) -> None:
    (run / "records.sqlite").unlink()
    assert "holds no records.sqlite" in refused(hermes4, run)
