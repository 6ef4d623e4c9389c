"""`hermes4 evaluate`: score a model on a benchmark.

The folder is that of `services.store`, and beside it:

    answers.jsonl    every answer with all that made it and its verdict, in order
    set_aside.jsonl  draws without a score: which, and why; a second run asks for them again
    scores.json      the figures
    server.log       what vLLM said, where we started it
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hermes_core.files import write_atomically, write_text
from hermes_pipeline.config import flatten
from hermes_pipeline.errors import UserError
from hermes_pipeline.evaluation.benchmark import Benchmark
from hermes_pipeline.evaluation.benchmarks import find_benchmark
from hermes_pipeline.evaluation.recipe import Recipe
from hermes_pipeline.evaluation.run import Draw, is_overlong, plan
from hermes_pipeline.evaluation.run import run as run_draws
from hermes_pipeline.evaluation.table import Figures, Graded, summarize
from hermes_pipeline.records import Message, Prompt, Score
from hermes_pipeline.services.endpoint import EndpointError, Reply
from hermes_pipeline.services.progress import Tell, telling
from hermes_pipeline.services.serving import (
    Answering,
    Request,
    answerer,
    first_of,
    watched,
    what_decides,
)
from hermes_pipeline.services.store import Input, Last, RunStore
from hermes_pipeline.services.store_reader import read_results


def run(recipe: Recipe, *, label: str | None = None, as_json: bool = False) -> dict[str, Any]:
    """Score a model on a benchmark; what an earlier run has answered is not asked again.

    Args:
        label: what the progress is called.
        as_json: tell progress and scores as lines of JSON on standard output.

    Returns:
        The content of scores.json.

    Raises:
        UserError: no benchmark or folder, other settings in the folder, no server, wrong key.
    """
    asked, seed = recipe.benchmark, recipe.run.seed
    if asked.name is None:
        raise UserError("which benchmark? give --benchmark, or benchmark.name in a recipe")
    if recipe.run.out is None:
        raise UserError("where shall the scores go? give --out, or run.out in a recipe")
    benchmark, out = find_benchmark(asked.name), Path(recipe.run.out)
    settings = {"benchmark": asked.name, **what_decides(recipe.model, recipe.sampling)}
    planned = list(plan(benchmark, seed=seed, limit=asked.limit, draws=asked.draws))
    start = time.monotonic()
    whole = flatten(recipe) | {"model.endpoint": recipe.model.shown()}
    with RunStore(out, stage="evaluate", settings=settings, seed=seed, recipe=whole) as store:
        answers = _Answers(store, planned)
        todo = [draw for draw in planned if not answers.hold(draw)]
        if todo:
            told = telling(
                "evaluate",
                total=len(planned),
                done=len(planned) - len(todo),
                unit="answers",
                describe=_note,
                as_json=as_json,
                label=label or f"evaluate {asked.name}",
            )
            _ask(benchmark, todo, recipe, answers, out, told)
        errors = store.write_errors()
        lines = _write_answers(out, planned)
        figures = summarize([_graded(line) for line in lines], failed=len(planned) - len(lines))
        seconds = time.monotonic() - start
        scores = asdict(figures) | {"settings": settings | {"seed": seed}, "seconds": seconds}
        write_text(out / "scores.json", json.dumps(scores, indent=2) + "\n")
    if as_json:
        sys.stdout.write(json.dumps({"stage": "evaluate", "finished": True, **scores}) + "\n")
    else:
        sys.stderr.write(describe(asked.name, figures) + "\n")
    if errors and not lines:
        raise UserError(f"no request was answered, most often: {errors.most_common(1)[0][0]}")
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


def _ask(
    benchmark: Benchmark[Any],
    draws: Sequence[Draw],
    recipe: Recipe,
    answers: _Answers,
    out: Path,
    told: AbstractContextManager[Tell],
) -> None:
    """Have the draws answered, scored and kept; stops at once when our server is found dead."""
    model = recipe.model
    count = None if model.checkpoint is None else _token_counter(Path(model.checkpoint))
    with (
        answerer(model, recipe.requests, recipe.ray, out / "server.log", _warn) as answering,
        told as tell,
    ):
        recorder = _Recorder(answers, tell, count)
        work = _answer(benchmark, draws, answering.opened, recipe, recorder)
        try:
            asyncio.run(watched(work, answering.check))
        except* (EndpointError, UserError, OSError) as group:
            error = first_of(group)
            if isinstance(error, BrokenPipeError):  # nobody reads our progress
                raise error from None
            raise UserError(str(error)) from None


async def _answer(
    benchmark: Benchmark[Any],
    draws: Sequence[Draw],
    opened: AbstractAsyncContextManager[Answering],
    recipe: Recipe,
    recorder: _Recorder,
) -> None:
    async with opened as answer:

        async def ask(messages: Sequence[Message], *, seed: int) -> Reply:
            return await answer(Request(tuple(messages), recipe.sampling, seed))

        concurrency = recipe.requests.concurrency
        await run_draws(benchmark, draws, ask, recorder.keep, concurrency=concurrency)


class _Answers:
    """The answers in the store, by prompt and draw."""

    def __init__(self, store: RunStore, planned: Sequence[Draw]) -> None:
        self._store = store
        self._inputs: dict[str, Input] = {}
        for draw in planned:
            if draw.prompt.key not in self._inputs:
                self._inputs[draw.prompt.key] = _input(len(self._inputs) + 1, draw.prompt)
        self._past = {key: store.past(given) for key, given in self._inputs.items()}

    def hold(self, draw: Draw) -> bool:
        """Is this draw there?"""
        last = self._last(draw)
        return last is not None and last.kept

    async def keep(self, draw: Draw, record: Mapping[str, Any]) -> None:
        await self._store.keep(*self._place(draw), record)

    async def set_aside(self, draw: Draw, error: str) -> None:
        await self._store.set_aside(*self._place(draw), error)

    def _last(self, draw: Draw) -> Last | None:
        return self._past[draw.prompt.key].get(draw.number)

    def _place(self, draw: Draw) -> tuple[Input, int, int]:
        last = self._last(draw)
        return self._inputs[draw.prompt.key], draw.number, 0 if last is None else last.attempt + 1


class _Recorder:
    """Keeps each answer with its score, or the error it has instead, and shows how it goes."""

    def __init__(self, answers: _Answers, tell: Tell, count: Callable[[str], int] | None) -> None:
        self._answers, self._tell, self._count = answers, tell, count
        self._passed = self._answered = self._failed = self._tokens = 0
        self._began = time.monotonic()

    async def keep(self, draw: Draw, score: Score) -> None:
        if score.error is not None:
            await self._answers.set_aside(draw, score.error)
            self._failed += 1
        else:
            count = self._count
            thinking_tokens = None if count is None else count(score.trace.thinking)
            await self._answers.keep(draw, _record(draw, score, thinking_tokens))
            self._answered += 1
            self._passed += score.verdict.passed
            self._tokens += score.trace.completion_tokens
        figures = {
            "right": self._passed / max(1, self._answered),
            "set_aside": self._failed,
            "tokens_per_s": round(self._tokens / max(1e-3, time.monotonic() - self._began), 1),
        }
        self._tell(1, figures)


def _note(figures: Mapping[str, float]) -> str:
    failed = f"{figures['set_aside']:,} set aside, " if figures["set_aside"] else ""
    right, rate = figures["right"], figures["tokens_per_s"]
    return f"{failed}{100 * right:.1f} % right, {rate:,.0f} tokens/s"


def _input(number: int, prompt: Prompt) -> Input:
    messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
    about = {
        "source": prompt.key,
        "messages": messages,
        "target": prompt.target,
        "meta": dict(prompt.meta),
    }
    return Input.of(number, [prompt.key, messages, prompt.target], about)


def _record(draw: Draw, score: Score, thinking_tokens: int | None) -> dict[str, Any]:
    return {
        "seed": draw.seed,
        "text": score.trace.text,
        "thinking": score.trace.thinking,
        "answer": score.trace.answer,
        "finish_reason": score.trace.finish_reason,
        "overlong": is_overlong(score.trace),
        "tokens": score.trace.completion_tokens,
        "thinking_tokens": thinking_tokens,
        "verdict": asdict(score.verdict),
    }


def _write_answers(out: Path, planned: Sequence[Draw]) -> list[dict[str, Any]]:
    """Write answers.jsonl; the lines of those that were planned."""
    wanted = {(draw.prompt.key, draw.number) for draw in planned}
    lines = []
    with write_atomically(out / "answers.jsonl") as file:
        for recorded in read_results(out):
            about = recorded.about
            for result in recorded.results:
                if result.record is None:
                    continue
                line = {
                    "key": about["source"],
                    "draw": result.draw,
                    "prompt": about["messages"],
                    **result.record,
                    "target": about["target"],
                    "meta": about["meta"],
                }
                file.write(json.dumps(line).encode() + b"\n")
                if (line["key"], line["draw"]) in wanted:
                    lines.append(line)
    return lines


def _graded(line: Mapping[str, Any]) -> Graded:
    return Graded(
        key=line["key"],
        score=line["verdict"]["score"],
        overlong=line["overlong"],
        completion_tokens=line["tokens"],
        thinking_tokens=line["thinking_tokens"],
    )


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
