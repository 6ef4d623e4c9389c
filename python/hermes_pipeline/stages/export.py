"""`hermes4 export`: the checkpoint of a training run, or the answers of `hermes4 complete`.

Answers: one record for each input, in the order of the data, without anything that another run of
the same seed and the same answers would write differently.

    {"id", "source", "messages", "tools", "answers": [{"draw", "seed", "text", ...}], "set_aside"}
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from hermes_core.files import write_atomically
from hermes_pipeline.errors import UserError
from hermes_pipeline.services.folders import writing
from hermes_pipeline.services.store_reader import (
    Recorded,
    count,
    is_own,
    is_stage,
    read_about,
    read_counts,
    read_results,
)

FORMS = {"jsonl": "answers.jsonl", "parquet": "answers.parquet", "datasets": "dataset"}
GROUP_RECORDS = 1_000  # of a Parquet row group
SHARD_RECORDS = 100_000  # of a data set's file


def run(
    folder: Path,
    out: Path | None,
    *,
    form: str | None = None,
    licence: str | None = None,
    step: int | None = None,
    dtype: str | None = None,
) -> None:
    """Export what ``folder`` holds: answers, or else a checkpoint.

    Args:
        out: a folder for a checkpoint or a data set, else a file; beside the answers if None.
        form: of answers: jsonl, parquet or datasets; jsonl if None.
        licence: of a data set, for its card.
        step, dtype: of a checkpoint; see `train.export`.

    Raises:
        UserError: neither is there, an option is for the other, or ``out`` cannot be written.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    if not is_stage(folder):
        if form is not None or licence is not None:
            raise UserError(
                f"--format and --licence are for answers, and {folder} holds none: it has no "
                f"stage.json"
            )
        if not (folder / "run.json").is_file():
            raise UserError(
                f"{folder} holds neither answers (stage.json) nor a training run (run.json)"
            )
        if out is None:
            raise UserError("a checkpoint wants --out, a folder for the Hugging Face model")
        from hermes_pipeline.stages.train import export as export_checkpoint

        export_checkpoint(folder, out, step=step, dtype=dtype)
        return
    if step is not None or dtype is not None:
        raise UserError(f"--step and --dtype are for checkpoints, and {folder} holds answers")
    export(folder, out, form=form or "jsonl", licence=licence)


def export(
    folder: Path, out: Path | None = None, *, form: str = "jsonl", licence: str | None = None
) -> None:
    """Write answers as JSON Lines, as Parquet, or as a folder for `datasets` with its card.

    Raises:
        UserError: there are none, an option is unknown, or ``out`` cannot be written.
    """
    if form not in FORMS:
        raise UserError(f"--format {form!r} is not known; known: {', '.join(FORMS)}")
    if licence is not None and form != "datasets":
        raise UserError("--licence is for the card of --format datasets")
    if (stage := read_about(folder)["stage"]) != "complete":
        raise UserError(f"{folder} holds results of `hermes4 {stage}`, not of `hermes4 complete`")
    to = out or folder / FORMS[form]
    if form == "datasets":
        _write_data_set(folder, to, licence or "unknown")
    elif to.is_dir():
        raise UserError(f"--out {to} is a folder; --format {form} writes a file")
    elif to.resolve().parent == folder.resolve() and is_own(to.resolve().name):
        raise UserError(f"--out {to} is a file of the run itself; choose another name")
    else:
        with writing(to, goes_on="run the same command again"):
            to.parent.mkdir(parents=True, exist_ok=True)
            with write_atomically(to) as file:
                if form == "parquet":
                    _write_parquet(file, read_results(folder))
                else:
                    for recorded in read_results(folder):
                        file.write(orjson.dumps(_record(recorded)) + b"\n")
    inputs, answers = count(folder)
    sys.stderr.write(f"export: {answers:,} answers to {inputs:,} inputs in {to}\n")


def _record(recorded: Recorded) -> dict[str, Any]:
    """An input with its answers; draws without one by their numbers, for errors may differ."""
    answers = [{"draw": r.draw, **r.record} for r in recorded.results if r.record is not None]
    set_aside = [r.draw for r in recorded.results if r.record is None]
    return {"id": recorded.id, **recorded.about, "answers": answers, "set_aside": set_aside}


def _write_parquet(file: BinaryIO, results: Iterable[Recorded]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(pa)
    left = iter(results)
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        while rows := [_flat(_record(r)) for r in islice(left, GROUP_RECORDS)]:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def _schema(pa: Any) -> Any:
    text, number = pa.string(), pa.int64()
    names = ("role", "content", "reasoning", "tool_calls", "name", "tool_call_id")
    answer = {
        "draw": number,
        "seed": number,
        "text": text,
        "finish_reason": text,
        "prompt_tokens": number,
        "tokens": number,
        "tool_calls": text,
    }
    return pa.schema(
        {
            "id": text,
            "source": text,
            "messages": pa.list_(pa.struct({name: text for name in names})),
            "tools": text,
            "answers": pa.list_(pa.struct(answer)),
            "set_aside": pa.list_(number),
        }
    )


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with what has no fixed form, calls and tools, as JSON in a string."""

    def as_text(values: Mapping[str, Any], key: str) -> dict[str, Any]:
        given = values.get(key)
        return {**values, key: None if given is None else orjson.dumps(given).decode()}

    messages = [as_text(message, "tool_calls") for message in record["messages"]]
    answers = [as_text(answer, "tool_calls") for answer in record["answers"]]
    return as_text({**record, "messages": messages, "answers": answers}, "tools")


def _write_data_set(folder: Path, out: Path, licence: str) -> None:
    """A folder that `datasets.load_dataset` reads: Parquet files and a card."""
    from hermes_pipeline.training.weights import written_whole

    shards = max(1, -(-count(folder).inputs // SHARD_RECORDS))
    card = _Card()
    marker = {"made_by": "hermes4 export", "answers": str(folder.resolve())}
    with written_whole(out, marker=marker) as temporary:
        seen = card.seeing(read_results(folder))
        for shard in range(shards):
            name = f"train-{shard:05}-of-{shards:05}.parquet"
            # What a run has added meanwhile goes into the last one.
            most = None if shard == shards - 1 else SHARD_RECORDS
            with (temporary / name).open("wb") as file:
                _write_parquet(file, islice(seen, most))
        text = card.text(out.name, licence, read_about(folder), read_counts(folder))
        (temporary / "README.md").write_text(text, encoding="utf-8")


class _Card:
    """A data set's card: what went into it, counted on the way."""

    def __init__(self) -> None:
        self._sources: Counter[str] = Counter()
        self._ends: Counter[str] = Counter()
        self._lengths: Counter[int] = Counter()  # by bits of the number of tokens
        self._tokens = self._set_aside = 0

    def seeing(self, results: Iterable[Recorded]) -> Iterator[Recorded]:
        for recorded in results:
            self._sources[str(recorded.about["source"]).rpartition(":")[0]] += 1
            for result in recorded.results:
                if result.record is None:
                    self._set_aside += 1
                    continue
                tokens = result.record["tokens"] or 0
                self._tokens += tokens
                self._lengths[tokens.bit_length()] += 1
                self._ends[result.record["finish_reason"]] += 1
            yield recorded

    def text(
        self, name: str, licence: str, about: Mapping[str, Any], counts: Mapping[str, int]
    ) -> str:
        recipe = {"stage": about["stage"], "seed": about["seed"], **about["settings"]}
        inputs, answers = self._sources.total(), self._ends.total()
        ends = ", ".join(f"{self._ends[end]:,} {end}" for end in sorted(self._ends))
        lengths = [
            f"{1 << bits >> 1:,} to {(1 << bits) - 1:,} | {self._lengths[bits]:,}"
            for bits in sorted(self._lengths)
        ]
        sources = [f"{source} | {self._sources[source]:,}" for source in sorted(self._sources)]
        quarantined = counts.get("quarantined", 0)
        return "\n".join(
            [
                *("---", f"license: {json.dumps(licence)}", "configs:", "- config_name: default"),
                *("  data_files:", "  - split: train", '    path: "*.parquet"', "---", ""),
                *(f"# {name}", ""),
                f"{answers:,} answers of {recipe['model']} to {inputs:,} inputs, one input a "
                f"record; {self._tokens:,} tokens.",
                f"{self._set_aside:,} draws failed and were set aside; {quarantined:,} records of "
                f"the source were no conversation.",
                f"How they ended: {ends or 'none has'}.",
                *("", "## Lengths of answers", "", "| tokens | answers |", "|---|---|"),
                *(f"| {line} |" for line in lengths),
                *("", "## Sources", "", "| source | inputs |", "|---|---|"),
                *(f"| {line} |" for line in sources),
                *("", "## Licence", "", licence),
                *("", "## Recipe", "", "```json", json.dumps(recipe, indent=2), "```", ""),
            ]
        )
