"""`hermes4 evaluate`: score a model on a benchmark.

The folder of an evaluation:

    settings.json   what every answer in the folder was drawn with
    answers.jsonl   one line for each answer, written as it arrives; what a second run skips
    failures.jsonl  requests that failed for good in the last run; a second run asks them again
    scores.json     the figures
    server.log      what vLLM said, where we started it
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hermes_core.files import write_text
from hermes_pipeline.errors import UserError
from hermes_pipeline.evaluation.benchmark import Benchmark
from hermes_pipeline.evaluation.benchmarks import find_benchmark
from hermes_pipeline.evaluation.recipe import Recipe
from hermes_pipeline.evaluation.run import Draw, is_overlong, plan
from hermes_pipeline.evaluation.run import run as run_draws
from hermes_pipeline.evaluation.table import Figures, Graded, summarize
from hermes_pipeline.records import Message, Score
from hermes_pipeline.services.endpoint import EndpointError, Reply
from hermes_pipeline.services.progress import Counter, progress
from hermes_pipeline.services.serving import Answering, Request, answerer, first_of, watched


def run(recipe: Recipe, *, label: str | None = None) -> dict[str, Any]:
    """Score a model on a benchmark; what an earlier run has answered is not asked again.

    Args:
        label: what the progress is called.

    Returns:
        The content of scores.json.

    Raises:
        UserError: no benchmark or folder, other settings in the folder, no server, wrong key.
    """
    asked, model, seed = recipe.benchmark, recipe.model, recipe.run.seed
    if asked.name is None:
        raise UserError("which benchmark? give --benchmark, or benchmark.name in a recipe")
    if recipe.run.out is None:
        raise UserError("where shall the scores go? give --out, or run.out in a recipe")
    chosen, out = find_benchmark(asked.name), Path(recipe.run.out)
    settings = {
        "benchmark": asked.name,
        "model": model.identity(),
        "max_model_len": model.max_model_len,
        **asdict(recipe.sampling),
        "stop": list(recipe.sampling.stop),
        "seed": seed,
    }
    with _locked(out):
        _keep_settings(out, settings)
        done = _read_answers(out)
        planned = list(plan(chosen, seed=seed, limit=asked.limit, draws=asked.draws))
        todo = [d for d in planned if (d.prompt.key, d.number) not in done]
        failures: list[dict[str, Any]] = []
        start = time.monotonic()
        if todo:
            count = None if model.checkpoint is None else _token_counter(Path(model.checkpoint))
            name = label or f"evaluate {asked.name}"
            with (
                answerer(
                    model, recipe.requests, recipe.ray, out / "server.log", _warn
                ) as answering,
                (out / "answers.jsonl").open("ab", buffering=0) as file,
                progress(name, total=len(todo), unit="answers") as bar,
            ):
                record = _Recorder(file.write, failures, bar, count)
                work = _answer(chosen, todo, answering.opened, recipe, record)
                asyncio.run(watched(work, answering.check))
        _write_lines(out / "failures.jsonl", failures)
        done = _read_answers(out)
        lines = [done[key] for d in planned if (key := (d.prompt.key, d.number)) in done]
        figures = summarize([_graded(line) for line in lines], failed=len(failures))
        scores = asdict(figures) | {"settings": settings, "seconds": time.monotonic() - start}
        write_text(out / "scores.json", json.dumps(scores, indent=2) + "\n")
    sys.stderr.write(describe(asked.name, figures) + "\n")
    if failures and not lines:
        raise UserError(f"no request was answered; the first failure: {failures[0]['error']}")
    return scores


def describe(benchmark: str, figures: Figures) -> str:
    """One line for people."""
    if figures.score is None:
        return f"{benchmark}: no answers, {figures.failed} failed"
    error = "" if figures.standard_error is None else f" ± {100 * figures.standard_error:.1f}"
    thinking = (
        ""
        if figures.thinking_tokens is None
        else f", {figures.thinking_tokens:.0f} tokens thinking"
    )
    failed = f", {figures.failed} requests failed" if figures.failed else ""
    return (
        f"{benchmark}: {100 * figures.score:.1f}{error} % of {figures.items} items, "
        f"{100 * (figures.overlong or 0):.1f} % overlong{thinking}{failed}"
    )


async def _answer(
    benchmark: Benchmark[Any],
    draws: Sequence[Draw],
    opened: AbstractAsyncContextManager[Answering],
    recipe: Recipe,
    record: Callable[[Draw, Score], None],
) -> None:
    """Have the draws answered and scored."""
    async with opened as answer:

        async def ask(messages: Sequence[Message], *, seed: int) -> Reply:
            return await answer(Request(tuple(messages), recipe.sampling, seed))

        try:
            concurrency = recipe.requests.concurrency
            await run_draws(benchmark, draws, ask, record, concurrency=concurrency)
        except* (EndpointError, UserError, OSError) as group:
            raise UserError(str(first_of(group))) from None


class _Recorder:
    """Writes each answer as one line, keeps the failures, and shows how it goes."""

    def __init__(
        self,
        write: Callable[[bytes], int],
        failures: list[dict[str, Any]],
        bar: Counter,
        count: Callable[[str], int] | None,
    ) -> None:
        self._write, self._failures, self._bar, self._count = write, failures, bar, count
        self._passed = self._answered = 0

    def __call__(self, draw: Draw, score: Score) -> None:
        line = _line(draw, score)
        if score.error is not None:
            self._failures.append(line)
        else:
            if self._count is not None:
                line["thinking_tokens"] = self._count(score.trace.thinking)
            self._write(json.dumps(line).encode() + b"\n")
            self._answered += 1
            self._passed += score.verdict.passed
        share = f"{100 * self._passed / max(1, self._answered):.1f} % right"
        failed = f", {len(self._failures)} failed" if self._failures else ""
        self._bar.advance(1, share + failed)


def _line(draw: Draw, score: Score) -> dict[str, Any]:
    return {
        "key": score.key,
        "draw": score.draw,
        "prompt": [{"role": m.role, "content": m.content} for m in draw.prompt.messages],
        "text": score.trace.text,
        "thinking": score.trace.thinking,
        "answer": score.trace.answer,
        "finish_reason": score.trace.finish_reason,
        "overlong": is_overlong(score.trace),
        "tokens": score.trace.completion_tokens,
        "thinking_tokens": None,
        "verdict": asdict(score.verdict),
        "target": score.target,
        "meta": dict(draw.prompt.meta),
        "seed": draw.seed,
        "error": score.error,
    }


def _graded(line: Mapping[str, Any]) -> Graded:
    return Graded(
        key=line["key"],
        score=line["verdict"]["score"],
        overlong=line["overlong"],
        completion_tokens=line["tokens"],
        thinking_tokens=line["thinking_tokens"],
    )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another evaluation writes to {out}; wait for it, or choose another --out"
            ) from None
        yield


def _keep_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings, or refuse a folder whose answers were drawn with others."""
    path = out / "settings.json"
    if path.exists() and (out / "answers.jsonl").exists():
        try:
            before = json.loads(path.read_text())
        except ValueError:
            raise UserError(f"{path} is damaged; move the folder away") from None
        changed = [
            f"{k} was {before.get(k)!r} and is {settings[k]!r}"
            for k in settings
            if before.get(k) != settings[k]
        ]
        if changed:
            raise UserError(
                f"{out} holds answers of another evaluation: {'; '.join(changed)}. "
                f"Choose another --out, or delete this one"
            )
    write_text(path, json.dumps(settings, indent=2) + "\n")


def _read_answers(out: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The answers so far; a last line that was cut off is cut away."""
    path = out / "answers.jsonl"
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    answers = {}
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            answer = json.loads(line)
            answers[answer["key"], answer["draw"]] = answer
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number} is damaged; move the folder away") from None
    return answers


def _token_counter(model: Path) -> Callable[[str], int] | None:
    """Counts tokens as the model does; None where the folder holds no tokenizer."""
    if not (model / "tokenizer.json").is_file():
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def _warn(line: str) -> None:
    sys.stderr.write(f"evaluate: {line}\n")
    sys.stderr.flush()


def _write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    if lines:
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    else:
        path.unlink(missing_ok=True)
