"""The report: made of small data, complete, escaped, and in need of nothing beside it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hermes_core import StoreWriter, open_store, pack
from hermes_pipeline.stages import figures, report
from hermes_pipeline.tasks.chain import build_tokenizer, conversations

EVIL = "</script><script>alert('x')</script>&<b>"


def write_store(folder: Path) -> None:
    tokenizer = build_tokenizer(texts=200)
    with StoreWriter(folder, meta={}, vocab_size=512) as writer:
        for conversation in conversations(0, 60):
            user, assistant = conversation.messages
            prompt = f"<|im_start|>user\n{user.content}<|im_end|>\n<|im_start|>assistant\n"
            head = tokenizer.encode(prompt).ids
            ids = [*head, *tokenizer.encode(f"{assistant.content}<|im_end|>\n").ids]
            writer.append(ids, [(len(head), len(ids) - 1)])
        writer.quarantine({"source": "x", "line": 1, "reason": "bad"})
        writer.finish()
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))


def write_evaluation(folder: Path, *, passed: int, question: str = "a=1; b=a+1; a b?") -> None:
    folder.mkdir()
    lines = [
        {
            "key": str(i),
            "draw": 0,
            "prompt": [{"role": "user", "content": question}],
            "thinking": f"thought {i}",
            "answer": f"\\boxed{{{i}}}",
            "overlong": i == 9,
            "tokens": 30 + i,
            "verdict": {"passed": i < passed, "score": float(i < passed), "reason": f"got {i}"},
            "target": "7 8",
            "meta": {"steps": 2 + i % 2},
        }
        for i in range(10)
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = {
        "items": 10,
        "answers": 10,
        "failed": 0,
        "score": passed / 10,
        "standard_error": 0.012,
        "overlong": 0.1,
        "completion_tokens": 34.5,
        "thinking_tokens": 28.0,
        "settings": {"temperature": 0.6, "top_p": 1.0, "max_model_len": 384},
    }
    (folder / "scores.json").write_text(json.dumps(scores))


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> report.Material:
    out = tmp_path_factory.mktemp("demo")
    write_store(out / "store")
    store = open_store(out / "store")
    plan = pack(store.lengths, row_length=256, fingerprint=store.fingerprint)
    plan.save(out / "plan.npz")
    (out / "run").mkdir()
    step = {"grad_norm": 1.0, "lr": 0.01, "kept_tokens": 50, "tokens": 100, "seconds": 0.5}
    metrics = [{"step": i + 1, "loss": 5 / (i + 1), **step} for i in range(40)]
    (out / "run" / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    (out / "run" / "run.json").write_text(json.dumps({"recipe": {"training.steps": 40}}))
    (out / "model").mkdir()
    header = json.dumps({"w": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(48)
    (out / "model" / "model.safetensors").write_bytes(data)
    write_evaluation(out / "before", passed=0)
    write_evaluation(out / "after", passed=8, question=EVIL)
    return report.Material(
        title="A small report",
        store=out / "store",
        plan=out / "plan.npz",
        run=out / "run",
        model=out / "model",
        before=out / "before",
        after=out / "after",
        steps=[report.Step("train", 12.3, "hermes4 train --recipe tiny")],
    )


@pytest.fixture(scope="module")
def page(material: report.Material, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "report.html"
    report.run(material, out)
    return out.read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Collects tags, what they link to, and the text; complains about tags that do not close."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)


@pytest.fixture(scope="module")
def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    return reader


def text_of(reader: Reader) -> str:
    return " ".join(" ".join(reader.texts).split())


def test_every_tag_is_closed(read: Reader) -> None:
    assert read.open == []


def test_the_page_asks_for_nothing_beside_it(page: str, read: Reader) -> None:
    assert read.links == []
    assert not {"script", "link", "iframe", "img"} & set(read.tags)
    assert not re.search(r"https?://|url\(|@import", page)


def test_scores_before_and_after_stand_in_it_with_their_errors(read: Reader) -> None:
    text = text_of(read)
    assert "0.0 % → 80.0 %" in text
    assert "1.2 %" in text


def test_counts_of_the_store_add_up(read: Reader) -> None:
    assert "61 read = 60 stored + 1 set aside" in text_of(read)


def test_packing_figures_are_those_of_the_plan(material: report.Material, read: Reader) -> None:
    context = report.collect(material)["packing"]
    assert f"{round(100 * context['fill'], 2)} %" in text_of(read)
    assert f"{context['rows']} rows of 256 tokens" in text_of(read)


def test_the_loss_curve_and_the_parameters_are_shown(read: Reader) -> None:
    text = text_of(read)
    assert "12 parameters, 40 steps" in text
    assert "loss 5.0 at first" in text


def test_answers_right_and_wrong_are_shown_with_their_targets(read: Reader) -> None:
    text = text_of(read)
    assert "thought 0" in text
    assert "target 7 8" in text
    assert "overlong" in text


def test_data_is_escaped(page: str) -> None:
    assert "<script>" not in page
    assert "&lt;script&gt;alert(" in page


def test_the_command_of_each_step_is_shown(read: Reader) -> None:
    assert "hermes4 train --recipe tiny" in text_of(read)


def test_the_shown_row_is_whole_and_its_kept_tokens_are_the_stores(
    material: report.Material,
) -> None:
    store = open_store(material.store)
    row = report.collect(material)["row"]
    plan = pack(store.lengths, row_length=256, fingerprint=store.fingerprint)
    start, end = plan.row_offsets[row["index"]], plan.row_offsets[row["index"] + 1]
    for segment, sample in zip(row["segments"], plan.samples[start:end], strict=True):
        token_ids, loss_mask = store[int(sample)]
        assert len(segment) == len(token_ids)
        assert [token["kept"] for token in segment] == loss_mask.tolist()
    assert sum(map(len, row["segments"])) + row["padding"] == 256


def test_ticks_are_round_and_inside() -> None:
    assert figures.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert figures.ticks(3, 103) == [20, 40, 60, 80, 100]
    assert figures.ticks(5, 5) == [5]


def test_a_histogram_has_a_bar_for_each_bin_and_counts_all() -> None:
    values = np.array([1, 1, 2, 9], dtype=np.int64)
    svg = figures.histogram(values, bins=3, x_label="x", y_label="y")
    counts = [int(n) for n in re.findall(r": (\d+)</title>", svg)]
    assert counts == [3, 0, 1]


def test_figures_escape_their_labels() -> None:
    assert "<b>" not in figures.curve([1], [1], x_label="<b>", y_label="<b>")


@pytest.mark.heavy
def test_a_browser_lays_the_page_out_without_sideways_scrolling(page: str, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here")
    probe = "<script>document.title = `${document.documentElement.scrollWidth}`</script></body>"
    (tmp_path / "page.html").write_text(page.replace("</body>", probe), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,3000", "--dump-dom"]
    done: Any = subprocess.run(
        [browser, *flags, (tmp_path / "page.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    width = re.search(r"<title>(\d+)</title>", done.stdout)
    assert width is not None
    assert int(width.group(1)) <= 500
