"""`hermes4 demo`: the whole job on a tiny model, from made-up problems to scores and a report.

Each step has a key: what it is made of, and the keys of the steps before it. `steps.json` says
which steps have begun under which key and which are finished. A second run skips what is finished,
goes on where one was interrupted, and makes anew what has another key.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hermes_core.files import write_atomically, write_text
from hermes_pipeline.config import LARGEST_SEED
from hermes_pipeline.errors import UserError
from hermes_pipeline.evaluation.recipe import Questions, Recipe, Run
from hermes_pipeline.exits import INTERRUPTED, STOPPED, say
from hermes_pipeline.services.endpoint import Sampling
from hermes_pipeline.services.folders import check_folder, writing
from hermes_pipeline.services.hub import DataSource
from hermes_pipeline.services.progress import progress
from hermes_pipeline.services.serving import Model
from hermes_pipeline.stages import evaluate, pack, report, tokenize, train
from hermes_pipeline.tasks.chain import build_tokenizer, conversations, tokenizer_config

RECIPE, TEMPLATE, ROW_LENGTH = "tiny", "hermes_chatml", 256
CONVERSATIONS = 27_000
PACKING = "best"
# The context of an answer with its question; training saw 256 tokens at most.
MAX_MODEL_LEN, TEMPERATURE, TOP_P = 384, 0.6, 1.0
ITEMS_BEFORE, ITEMS_AFTER = 100, 400


@dataclass(frozen=True, slots=True)
class Step:
    """One step: what it writes, how, and the command that does the same."""

    name: str
    makes: Sequence[str]  # files and folders under the demo's folder
    command: str  # with `version`, all that decides the result
    work: Callable[[], object]
    version: int = 1


def run(out: Path, *, seed: int = 0) -> None:
    """Run every step that is not finished, print the summary, and say where the report is.

    Raises:
        UserError: the seed is out of range, the folder cannot be used, or a step failed.
    """
    if not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"--seed is {seed}, want 0 to {LARGEST_SEED}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the model is too small to gain from more
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    start = time.monotonic()
    journal = Journal(out)
    steps = [*data_steps(out, seed), *model_steps(out, seed)]
    for number, step in enumerate(steps, 1):
        say(f"[{number}/{len(steps) + 1}] {step.name}")
        if journal.begin(step):
            say("  finished before")
            continue
        began = time.monotonic()
        step.work()
        journal.finish(step, time.monotonic() - began)
    say(f"[{len(steps) + 1}/{len(steps) + 1}] report")
    report.run(_material(out, steps, journal), out / "report.html")
    _print_summary(out, time.monotonic() - start)


def data_steps(out: Path, seed: int) -> list[Step]:
    """From nothing to packed rows."""
    data, tokenizer, store, plan = (
        out / name for name in ("chats.jsonl", "tokenizer", "store", "plan.npz")
    )

    def make_rows() -> None:
        pack.run(
            store, row_length=ROW_LENGTH, strategy=PACKING, too_long="drop", seed=seed, out=plan
        )

    return [
        Step(
            "make conversations and a tokenizer",
            ["chats.jsonl", "tokenizer"],
            _command("demo", out=out, seed=seed),
            lambda: write_data(data, tokenizer, seed=seed),
        ),
        Step(
            "tokenize",
            ["store"],
            _command("tokenize", data=data, tokenizer=tokenizer, template=TEMPLATE, out=store),
            lambda: tokenize.run(DataSource(str(data)), str(tokenizer), store, template=TEMPLATE),
        ),
        Step(
            "pack",
            ["plan.npz"],
            _command(*("pack", store), row_length=ROW_LENGTH, too_long="drop", seed=seed, out=plan),
            make_rows,
        ),
    ]


def model_steps(out: Path, seed: int) -> list[Step]:
    """From packed rows to a scored model."""
    store, start, trained, model = (out / name for name in ("store", "start", "run", "model"))
    tokenizer, setting = store / "tokenizer", f"data.seed={seed}"

    def learn() -> None:
        code = train.run(RECIPE, store=store, model=start, out=trained, settings=[setting])
        if code in (STOPPED, INTERRUPTED):
            say("hermes4: interrupted; run the same command again to go on")
            raise SystemExit(code)
        if code:
            raise UserError(f"training ended with {code}; its log is {trained / 'log.txt'}")

    return [
        Step(
            "make a model with random weights",
            ["start"],
            _command("init", recipe=RECIPE, tokenizer=tokenizer, out=start, seed=seed),
            lambda: train.init(RECIPE, tokenizer=str(tokenizer), out=start, seed=seed),
        ),
        _scoring("before", out, start, ITEMS_BEFORE, seed),
        Step(
            "train",
            ["run"],
            _command("train", recipe=RECIPE, store=store, model=start, out=trained, set=setting),
            learn,
        ),
        Step(
            "export",
            ["model"],
            _command("export", trained, out=model),
            lambda: train.export(trained, model),
        ),
        _scoring("after", out, model, ITEMS_AFTER, seed),
    ]


def _scoring(name: str, out: Path, model: Path, items: int, seed: int) -> Step:
    command = _command(
        "evaluate",
        benchmark="chain",
        checkpoint=model,
        max_model_len=MAX_MODEL_LEN,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        limit=items,
        seed=seed,
        out=out / name,
    )
    recipe = Recipe(
        Questions("chain", limit=items),
        Model(checkpoint=str(model), max_model_len=MAX_MODEL_LEN),
        Sampling(TEMPERATURE, TOP_P),
        run=Run(str(out / name), seed),
    )
    work = functools.partial(evaluate.run, recipe, label=f"score {name}")
    return Step(f"score {name} training", [name], command, work)


def _command(*words: object, **options: object) -> str:
    """A command line of `hermes4`."""
    given = ((f"--{name.replace('_', '-')}", value) for name, value in options.items())
    return shlex.join(["hermes4", *map(str, words), *map(str, chain.from_iterable(given))])


class Journal:
    """What of a demo's folder is finished, and under which keys: `steps.json`."""

    def __init__(self, out: Path) -> None:
        check_folder(out, "steps.json")
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        self._out, self._path = out, out / "steps.json"
        self._entries: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            try:
                self._entries = json.loads(self._path.read_text(encoding="utf-8"))
            except ValueError:
                raise UserError(f"{self._path} is damaged; move {out} away") from None
        self._key = f"hermes4-core {metadata.version('hermes4-core')}"

    def begin(self, step: Step) -> bool:
        """Is the step finished? If not: what another key has left of it is gone."""
        command = step.command.replace(str(self._out), "OUT")
        text = f"{self._key}|{step.name}|{command}|{step.version}"
        self._key = hashlib.sha256(text.encode()).hexdigest()[:16]
        entry = self._entries.get(step.name, {})
        paths = [self._out / name for name in step.makes]
        if entry.get("key") == self._key:
            if entry.get("seconds") is not None and all(p.exists() for p in paths):
                return True
        else:
            for path in paths:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        self._entries[step.name] = {"key": self._key, "seconds": None}
        self._write()
        return False

    def finish(self, step: Step, seconds: float) -> None:
        """Note that the step is finished."""
        self._entries[step.name]["seconds"] = seconds
        self._write()

    def seconds(self, step: Step) -> float:
        """How long a finished step took, in the run that finished it."""
        return float(self._entries[step.name]["seconds"])

    def _write(self) -> None:
        write_text(self._path, json.dumps(self._entries, indent=2) + "\n")


def write_data(data: Path, tokenizer: Path, *, seed: int) -> None:
    """Write the conversations as JSON Lines, and the tokenizer as a folder of transformers."""
    write_tokenizer(tokenizer, seed=seed)
    with (
        write_atomically(data) as file,
        progress("make conversations", total=CONVERSATIONS, unit="conversations") as bar,
    ):
        for conversation in conversations(seed, CONVERSATIONS):
            messages = [{"role": m.role, "content": m.content} for m in conversation.messages]
            file.write(json.dumps({"messages": messages}).encode() + b"\n")
            bar.advance()


def write_tokenizer(folder: Path, *, seed: int) -> None:
    """Write the task's tokenizer so that transformers and vLLM can load it."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer(seed).save(str(folder / "tokenizer.json"))
    config = json.dumps(dict(tokenizer_config()), indent=2)
    (folder / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")


def _material(out: Path, steps: Sequence[Step], journal: Journal) -> report.Material:
    return report.Material(
        title="From conversations to a scored model",
        store=out / "store",
        plan=out / "plan.npz",
        run=out / "run",
        model=out / "model",
        before=out / "before",
        after=out / "after",
        steps=[report.Step(s.name, journal.seconds(s), s.command) for s in steps],
    )


def _print_summary(out: Path, seconds: float) -> None:
    before, after = (
        json.loads((out / name / "scores.json").read_text()) for name in ("before", "after")
    )
    table = Table(title="hermes4 demo", title_justify="left")
    for name, justify in (("", "left"), ("before training", "right"), ("after training", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, key, factor, unit in (
        ("unseen problems right", "score", 100, " %"),
        ("standard error", "standard_error", 100, " %"),
        ("overlong", "overlong", 100, " %"),
        ("tokens thinking, mean", "thinking_tokens", 1, ""),
        ("problems", "items", 1, ""),
    ):
        cells = (f"{factor * x[key]:.{1 if unit else 0}f}{unit}" for x in (before, after))
        table.add_row(name, *cells)
    console = Console()
    console.print(table)
    console.print(
        f"this run took {seconds:.0f} s; the report: {out / 'report.html'}", soft_wrap=True
    )
