"""`hermes4 complete`: n answers to each conversation of a data source.

The folder is that of `services.store`, and beside it:

    quarantine.jsonl  records that are no conversation: which, and why
    set_aside.jsonl   draws that failed for good: which, and why; a second run asks for them again
    server.log        what vLLM said, where we started it
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import asdict, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from hermes_pipeline.config import flatten
from hermes_pipeline.errors import UserError
from hermes_pipeline.exits import INTERRUPTED, say, tell
from hermes_pipeline.sampling.draw import Draw, NobodyAnswers, Tally, plan, take
from hermes_pipeline.sampling.draw import run as run_draws
from hermes_pipeline.sampling.reading import Reading
from hermes_pipeline.sampling.recipe import Data, Recipe
from hermes_pipeline.sampling.spending import Show, Spending, describe
from hermes_pipeline.services.endpoint import EndpointError, Reply
from hermes_pipeline.services.folders import writing
from hermes_pipeline.services.hub import DataSource
from hermes_pipeline.services.progress import Tell, telling
from hermes_pipeline.services.serving import (
    Answerer,
    Answering,
    Request,
    answerer,
    first_of,
    watched,
    what_decides,
)
from hermes_pipeline.services.store import RunStore
from hermes_pipeline.services.store_reader import (
    count,
    count_kept,
    is_stage,
    read_counts,
    read_usage,
)

FEW, FEW_LOOKS = 2, 1000  # draws that tell what one costs; and of records that may be none
# Calls of tools are wanted as the model wrote them, not taken out of its text by the server.
AS_WRITTEN = {"tool_choice": "none"}


def run(recipe: Recipe, *, pilot: int | None = None, as_json: bool = False) -> None:
    """Have the draws answered that the folder does not hold yet.

    Args:
        pilot: have so many of them answered, chosen at random, and say what the others will cost.
        as_json: tell progress and counts as lines of JSON on standard output.

    Raises:
        UserError: no data, folder or model, nothing to read, other settings in the folder, or no
            answer at all.
        SystemExit: interrupted; what is kept is safe.
    """
    if recipe.data.name is None:
        raise UserError("which conversations? give --data, or data.name in a recipe")
    if recipe.run.out is None:
        raise UserError("where shall the answers go? give --out, or run.out in a recipe")
    name, data, out, seed = recipe.data.name, recipe.data, Path(recipe.run.out), recipe.run.seed
    source = DataSource(name, revision=data.revision, split=data.split, subset=data.subset)
    source.check_apart(out)
    # A conversation decides, too: the store knows each by what it says.
    settings = what_decides(recipe.model, recipe.sampling) | {"system": data.system}
    told = flatten(recipe) | {"model.endpoint": recipe.model.shown()}
    try:
        with RunStore(out, stage="complete", settings=settings, seed=seed, recipe=told) as store:
            if pilot is None:
                _run_whole(recipe, source, store, as_json)
            else:
                _run_pilot(recipe, source, store, pilot, as_json)
    except KeyboardInterrupt:
        if is_stage(out):
            say(f"hermes4: interrupted; {_safe(out)}")
            raise SystemExit(INTERRUPTED) from None
        raise


def _run_whole(recipe: Recipe, source: DataSource, store: RunStore, as_json: bool) -> None:
    """Every draw of every conversation."""
    out, draws = store.folder, recipe.run.draws
    tally = Tally()
    with _reading(source, recipe.data, out) as reading:
        planned = plan(reading.inputs(), store.past, draws=draws, seed=recipe.run.seed)
        # A run that has nothing to ask starts no server, and reckons nothing.
        if first := next((draw for draw in planned if draw is not None), None):
            spending = Spending(recipe.prices, read_usage(out), tally)
            _ask_all(chain([first], planned), recipe, source, store, spending, reading, as_json)
            _check_money(spending, store)
    answers = count_kept(out, inputs=reading.read, draws=draws)
    counts = _counts(reading, tally) | {"answers": answers}
    store.write_counts(counts)
    errors = store.write_errors()
    _check_useful(source, out, counts, reading.reasons, errors)
    _summarize(out, counts, errors, as_json)


def _ask_all(
    planned: Iterator[Draw | None],
    recipe: Recipe,
    source: DataSource,
    store: RunStore,
    spending: Spending,
    reading: Reading,
    as_json: bool,
) -> None:
    """Have what is planned answered; says before what it will cost, and meanwhile how far it is."""
    out, draws = store.folder, recipe.run.draws
    records, before = _count(source, recipe.data.limit), read_counts(out)
    # As far as is known before the data is read.
    known = before["quarantined"] if before.get("read") == records else 0
    left = _left(recipe, records, out, known)
    _tell_forecast(spending, left, as_json)
    total = draws * (records - known)
    with _showing(recipe, out, total, as_json, done=total - left) as (tell, model):
        show = Show(tell, spending, left, lambda: draws * max(0, reading.quarantined - known))
        _ask(planned, recipe, model, store, show)


def _run_pilot(
    recipe: Recipe, source: DataSource, store: RunStore, wanted: int, as_json: bool
) -> None:
    """The first draws of some conversations, chosen at random; then what the others will cost."""
    out, seed = store.folder, recipe.run.seed
    there = _count(source, recipe.data.limit)
    chosen = set(random.Random(seed).sample(range(1, there + 1), min(wanted, there)))
    tally = Tally()
    spending = Spending(recipe.prices, read_usage(out), tally)
    with _reading(source, recipe.data, out) as reading:
        inputs = (each if each and each[0].number in chosen else None for each in reading.inputs())
        planned = plan(inputs, store.past, draws=1, seed=seed)
        if first := next((draw for draw in planned if draw is not None), None):
            with _showing(recipe, out, len(chosen), as_json) as (tell, model):
                show = Show(tell, spending, len(chosen), lambda: 0)
                _ask(chain([first], planned), recipe, model, store, show)
    _check_money(spending, store)
    answers = count(out).records
    left = _left(recipe, there, out, reading.quarantined)
    errors = store.write_errors()
    if answers < 2:
        why = f", most often: {errors.most_common(1)[0][0]}" if errors else ""
        raise UserError(f"{answers} answers, of which a forecast wants two{why}")
    _tell_forecast(spending, left, as_json)


def _ask(
    draws: Iterator[Draw | None], recipe: Recipe, model: Answerer, store: RunStore, show: Show
) -> None:
    """Have the draws answered; stops at once when a server of ours is found dead."""

    def look() -> None:
        model.check()
        show()

    try:
        asyncio.run(watched(_answer(draws, recipe, model.opened, store, show.spending), look))
    except* (NobodyAnswers, EndpointError, UserError, OSError) as group:
        error = first_of(group)
        if isinstance(error, BrokenPipeError):  # nobody reads our progress
            raise error from None
        raise UserError(f"{error}{_so_far(store)}") from None
    finally:
        show()


async def _answer(
    draws: Iterator[Draw | None],
    recipe: Recipe,
    opened: AbstractAsyncContextManager[Answering],
    store: RunStore,
    spending: Spending,
) -> None:
    async with opened as answer:

        async def ask(draw: Draw) -> Reply:
            tools = [dict(tool) for tool in draw.conversation.tools]
            how = recipe.sampling
            if tools:
                how = replace(how, extra={**AS_WRITTEN, **how.extra, "tools": tools})
            reply = await answer(Request(draw.conversation.messages, how, draw.seed))
            counts = reply.prompt_tokens, reply.completion_tokens
            if recipe.prices.are_given and None in counts:
                raise UserError("the server sends no counts of tokens; prices want them")
            return reply

        todo, concurrency = spending.keep_within(draws), recipe.requests.concurrency
        while spending.is_blind and (few := list(islice(take(todo, FEW), FEW_LOOKS))):
            await run_draws(few, ask, store, spending.tally, concurrency=FEW)
        await run_draws(todo, ask, store, spending.tally, concurrency=concurrency)


@contextmanager
def _showing(
    recipe: Recipe, out: Path, total: int, as_json: bool, done: int = 0
) -> Iterator[tuple[Tell, Answerer]]:
    """The model, and where progress is told once it is there."""
    log = out / "server.log"
    with (
        answerer(recipe.model, recipe.requests, recipe.ray, log, _warn) as model,
        telling(
            "complete", total=total, done=done, unit="draws", describe=describe, as_json=as_json
        ) as tell,
    ):
        yield tell, model


@contextmanager
def _reading(source: DataSource, data: Data, out: Path) -> Iterator[Reading]:
    """The conversations of the data; what is none goes to quarantine.jsonl.

    A pass to its end takes the place of what earlier ones found among the same records; one that
    ends early takes the place of nothing.
    """
    path = out / "quarantine.jsonl"
    new = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    with writing(out), new.open("w", encoding="utf-8") as file:
        try:

            def quarantine(entry: Mapping[str, Any]) -> None:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")

            reading = Reading(islice(source.records(), data.limit), quarantine, data.system)
            yield reading
            file.writelines(_quarantined_behind(path, reading.read))
            file.flush()
            if file.tell():
                new.replace(path)
            else:
                path.unlink(missing_ok=True)
        finally:
            if not path.exists() and file.tell():  # ended early, and there is none to keep
                new.replace(path)
            new.unlink(missing_ok=True)


def _quarantined_behind(path: Path, number: int) -> list[str]:
    """The lines of a quarantine on records behind that number."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", errors="replace") as file:
        return [line for line in file if _number_of(line) > number]


def _number_of(line: str) -> int:
    """The record's number; 0 where a line was cut off."""
    try:
        return int(json.loads(line).get("number", 0))
    except (ValueError, AttributeError, TypeError):
        return 0


def _counts(reading: Reading, tally: Tally) -> dict[str, int]:
    """What has become of the records: read = done + set_aside + quarantined."""
    set_aside = len(tally.inputs_set_aside)
    return {
        "read": reading.read,
        "done": reading.read - set_aside - reading.quarantined,
        "set_aside": set_aside,
        "quarantined": reading.quarantined,
    }


def _tell_forecast(spending: Spending, left: int, as_json: bool) -> None:
    told = spending.forecast(left)
    if told is None:
        return
    if not told.completion_tokens:
        _warn(f"{left:,} draws to go; the server counts no tokens, so nobody knows what they cost")
        return
    if as_json:
        tell(json.dumps({"stage": "complete", "forecast": asdict(told)}))
    else:
        _warn(f"{left:,} draws to go: {told}")


def _left(recipe: Recipe, records: int, out: Path, quarantined: int) -> int:
    """How many draws there are to be had, if so many records are no conversations."""
    draws = recipe.run.draws
    kept = count_kept(out, inputs=records, draws=draws)
    return max(0, draws * (records - quarantined) - kept)


def _count(source: DataSource, limit: int | None) -> int:
    """How many records there are to read."""
    known = source.count()
    if known is None:
        return sum(1 for _ in islice(source.records(), limit))
    return known if limit is None else min(known, limit)


def _so_far(store: RunStore) -> str:
    """What is safe of a run that cannot go on; nothing where the store itself is the reason."""
    try:
        store.write_errors()
        return f"; {_safe(store.folder)}"
    except (UserError, OSError):
        return ""


def _check_money(spending: Spending, store: RunStore) -> None:
    """End a run that has come to its max_cost."""
    if spending.used_up:
        store.write_errors()
        raise UserError(
            f"max_cost is reached: {count(store.folder).records:,} answers have cost "
            f"{spending.cost:,.2f} and are safe in {store.folder}; raise it to go on"
        )


def _check_useful(
    source: DataSource,
    out: Path,
    counts: Mapping[str, int],
    reasons: Counter[str],
    errors: Counter[str],
) -> None:
    """Refuse a run that came to nothing."""
    if counts["read"] == 0:
        raise UserError(f"{source.name} holds no records")
    if counts["quarantined"] == counts["read"]:
        raise UserError(
            f"not one of {counts['read']:,} records can be used, most often: "
            f"{reasons.most_common(1)[0][0]}; see {out / 'quarantine.jsonl'}"
        )
    if counts["answers"] == 0:
        raise UserError(
            f"no request was answered, most often: {errors.most_common(1)[0][0]}; see "
            f"{out / 'set_aside.jsonl'}"
        )


def _summarize(out: Path, counts: Mapping[str, int], errors: Counter[str], as_json: bool) -> None:
    if as_json:
        tell(json.dumps({"stage": "complete", "finished": True, **counts}))
        return
    tell(
        f"{counts['read']:,} read = {counts['done']:,} done + {counts['set_aside']:,} set aside + "
        f"{counts['quarantined']:,} quarantined"
    )
    if errors:
        tell(f"{errors.total():,} draws set aside: {out / 'set_aside.jsonl'}; most often:")
        for error, times in errors.most_common(5):
            tell(f"{times:>9,}  {error}")
        tell("run the same command again to ask for them again")
    all_of_them = count(out).records
    more = "" if all_of_them == counts["answers"] else f" of {all_of_them:,} in the folder"
    tell(f"{counts['answers']:,} answers{more}: hermes4 export {out}")


def _safe(out: Path) -> str:
    return f"{count(out).records:,} answers are safe in {out}: run the same command again to go on"


def _warn(line: str) -> None:
    sys.stderr.write(f"complete: {line}\n")
    sys.stderr.flush()
