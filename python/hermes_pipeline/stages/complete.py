"""`hermes4 complete`: n answers to each conversation of a data source.

The folder is that of `services.store`, and beside it:

    quarantine.jsonl  records that are no conversation: which, and why
    set_aside.jsonl   draws that failed for good: which, and why; a second run asks for them again
    server.log        what vLLM said, where we started it
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from hermes_core.files import write_atomically
from hermes_pipeline.chat import Refused, parse_json, parse_prompt
from hermes_pipeline.errors import UserError
from hermes_pipeline.records import Conversation, Message
from hermes_pipeline.sampling.draw import Draw, NobodyAnswers, Tally, as_input, plan
from hermes_pipeline.sampling.draw import run as run_draws
from hermes_pipeline.services.endpoint import Endpoint, EndpointError, Reply, Sampling
from hermes_pipeline.services.files import Record, quarantine_entry, without_numbers
from hermes_pipeline.services.hub import DataSource
from hermes_pipeline.services.progress import JsonLines, progress
from hermes_pipeline.services.serving import Address, at_address, fingerprint, first_of, watched
from hermes_pipeline.services.store import Input, RunStore
from hermes_pipeline.services.store_reader import count, is_stage, read_errors

INTERRUPTED = 130  # exit code after Ctrl-C
RATE_LOOKS = 20  # tokens/s are those of so many looks, half a second apart
# Calls of tools are wanted as the model wrote them; taken out by the server, they would be lost.
AS_WRITTEN = {"tool_choice": "none"}

Tell = Callable[[float, Mapping[str, float]], None]


@dataclass(frozen=True, slots=True)
class Where:
    """Which model answers: one at an address, or a folder that we serve."""

    endpoint: str | None = None  # up to and with /v1
    model: str | None = None  # its name there
    checkpoint: Path | None = None
    max_model_len: int | None = None  # context length, where we serve
    concurrency: int = 64  # requests in flight
    timeout_s: float = 600.0  # of one try


def run(
    source: DataSource,
    out: Path,
    where: Where,
    sampling: Sampling,
    *,
    draws: int = 4,
    seed: int = 0,
    system: str | None = None,
    limit: int | None = None,
    as_json: bool = False,
) -> None:
    """Have the draws answered that ``out`` does not hold yet.

    Args:
        draws: answers to each conversation.
        system: the system message of conversations that have none.
        limit: read only so many records.
        as_json: tell progress and counts as lines of JSON on standard output.

    Raises:
        UserError: no model, nothing to read, other settings in the folder, or no answer at all.
        SystemExit: interrupted; what is kept is safe.
    """
    settings = _settings(source, where, sampling, system)
    tally = Tally()
    try:
        with RunStore(out, stage="complete", settings=settings, seed=seed) as store:
            reading = _Reading(source, out / "quarantine.jsonl", limit, system)
            planned = plan(reading.inputs(), store.past, draws=draws, seed=seed)
            # A run that has nothing to ask starts no server.
            if first := next((draw for draw in planned if draw is not None), None):
                total = max(0, draws * _count(source, limit) - count(out).records)
                todo = chain([first], planned)
                with _address(where, out) as address, _telling(total, as_json) as tell:
                    show = _Show(tell, tally, lambda: draws * reading.quarantined)
                    asyncio.run(_ask(todo, where, address, sampling, store, tally, show))
            counts = reading.counts(tally) | {"answers": count(out).records}
            store.write_counts(counts)
            errors = _write_errors(out)
    except KeyboardInterrupt:
        if is_stage(out):
            sys.stderr.write(f"hermes4: interrupted; {_safe(out)}\n")
            raise SystemExit(INTERRUPTED) from None
        raise
    _check_useful(source, out, counts, reading.reasons, errors)
    _summarize(out, counts, errors, as_json)


async def _ask(
    draws: Iterable[Draw | None],
    where: Where,
    address: Address,
    sampling: Sampling,
    store: RunStore,
    tally: Tally,
    show: Callable[[], None],
) -> None:
    """Have the draws answered; stops at once when a server of ours is found dead."""

    async def ask(draw: Draw) -> Reply:
        tools = [dict(tool) for tool in draw.conversation.tools]
        how = replace(sampling, extra={"tools": tools, **AS_WRITTEN}) if tools else sampling
        return (await endpoint.chat(draw.conversation.messages, how, seed=draw.seed))[0]

    def look() -> None:
        address.check()
        show()

    concurrency = where.concurrency
    try:
        async with Endpoint(
            address.base_url, address.model, concurrency=concurrency, timeout_s=where.timeout_s
        ) as endpoint:
            await watched(run_draws(draws, ask, store, tally, concurrency=concurrency), look)
    except* NobodyAnswers as group:
        raise UserError(f"{first_of(group)}; {_safe(store.folder)}") from None
    except* BrokenPipeError as group:  # nobody reads our progress
        raise first_of(group) from None
    except* (EndpointError, UserError, OSError) as group:
        raise UserError(str(first_of(group))) from None
    finally:
        show()


class _Reading:
    """The conversations of a data source; what is none goes to quarantine."""

    def __init__(
        self, source: DataSource, quarantine: Path, limit: int | None, system: str | None
    ) -> None:
        self.read = self.quarantined = 0
        self.reasons: Counter[str] = Counter()
        self._source, self._quarantine, self._limit = source, quarantine, limit
        self._system = () if system is None else (Message("system", system),)

    def inputs(self) -> Iterator[tuple[Input, Conversation] | None]:
        """Every conversation, by its place; None for a record that is none."""
        self._quarantine.unlink(missing_ok=True)
        for record in islice(self._source.records(), self._limit):
            self.read += 1
            entry = None
            try:
                conversation = self._parse(record)
                entry = as_input(self.read, conversation), conversation
            except Refused as error:
                self._set_aside(record, str(error).encode("utf-8", "replace").decode())
            yield entry

    def counts(self, tally: Tally) -> dict[str, int]:
        """What has become of the records: read = done + set_aside + quarantined."""
        set_aside = len(tally.inputs_set_aside)
        return {
            "read": self.read,
            "done": self.read - set_aside - self.quarantined,
            "set_aside": set_aside,
            "quarantined": self.quarantined,
        }

    def _parse(self, record: Record) -> Conversation:
        if record.error is not None:
            raise Refused(record.error)
        data = parse_json(record.data) if isinstance(record.data, bytes) else record.data
        conversation = parse_prompt(data, record.source)
        if conversation.messages[0].role == "system":
            return conversation
        return replace(conversation, messages=self._system + conversation.messages)

    def _set_aside(self, record: Record, reason: str) -> None:
        self.quarantined += 1
        self.reasons[without_numbers(reason)] += 1
        with self._quarantine.open("a", encoding="utf-8") as file:
            file.write(json.dumps(quarantine_entry(record, reason), ensure_ascii=False) + "\n")


class _Show:
    """Tells what has become of the draws, whenever it is called."""

    def __init__(self, tell: Tell, tally: Tally, passed_over: Callable[[], int]) -> None:
        self._tell, self._tally, self._passed_over = tell, tally, passed_over
        self._shown = 0
        self._looks = deque([(time.monotonic(), 0)], maxlen=RATE_LOOKS)

    def __call__(self) -> None:
        tally = self._tally
        self._looks.append((time.monotonic(), tally.tokens))
        (then, before), (now, tokens) = self._looks[0], self._looks[-1]
        figures = {
            "set_aside": tally.set_aside,
            "in_flight": tally.in_flight,
            "tokens_per_s": round((tokens - before) / max(1e-3, now - then), 1),
        }
        done = tally.kept + tally.set_aside + self._passed_over()
        self._tell(done - self._shown, figures)
        self._shown = done


@contextmanager
def _telling(total: int, as_json: bool) -> Iterator[Tell]:
    if as_json:
        yield JsonLines("complete", total=total).advance
        return
    with progress("complete", total=total, unit="draws") as bar:
        yield lambda done, figures: bar.advance(done, _note(figures))


def _note(figures: Mapping[str, float]) -> str:
    failed = f"{figures['set_aside']:,} set aside, " if figures["set_aside"] else ""
    return f"{failed}{figures['in_flight']:,} in flight, {figures['tokens_per_s']:,.0f} tokens/s"


def _settings(
    source: DataSource, where: Where, sampling: Sampling, system: str | None
) -> dict[str, Any]:
    """What decides an answer; how many there are, and how fast they come, may change."""
    return {
        "model": _identity(where),
        "max_model_len": where.max_model_len,
        "data": source.identity(),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "system": system,
    }


def _identity(where: Where) -> str:
    """What tells this model from others."""
    if (where.endpoint is None) == (where.checkpoint is None):
        raise UserError("give --endpoint with --model, or --checkpoint, and not both")
    if where.checkpoint is None:
        if where.model is None:
            raise UserError("--endpoint wants --model, the name of a model there")
        return where.model
    if where.model is not None:
        raise UserError("--model is for --endpoint; a --checkpoint has its folder's name")
    if not where.checkpoint.is_dir():
        raise UserError(f"--checkpoint {where.checkpoint} is not a folder")
    return fingerprint(where.checkpoint)


def _address(where: Where, out: Path) -> AbstractContextManager[Address]:
    model = where.model or str(where.checkpoint)
    log = out / "server.log"
    return at_address(model, where.endpoint, max_model_len=where.max_model_len, log=log)


def _count(source: DataSource, limit: int | None) -> int:
    """How many records there are to read."""
    known = source.count()
    if known is None:
        return sum(1 for _ in islice(source.records(), limit))
    return known if limit is None else min(known, limit)


def _write_errors(out: Path) -> Counter[str]:
    """Write set_aside.jsonl; how often each error stands in it, equal but for numbers."""
    path = out / "set_aside.jsonl"
    errors: Counter[str] = Counter()
    shown: dict[str, str] = {}
    with write_atomically(path) as file:
        for entry in read_errors(out):
            errors[shown.setdefault(without_numbers(entry["error"]), entry["error"])] += 1
            file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
    if not errors:
        path.unlink()
    return errors


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
        _say(json.dumps({"stage": "complete", "finished": True, **counts}))
        return
    _say(
        f"{counts['read']:,} read = {counts['done']:,} done + {counts['set_aside']:,} set aside + "
        f"{counts['quarantined']:,} quarantined"
    )
    if errors:
        _say(f"{errors.total():,} draws set aside: {out / 'set_aside.jsonl'}; most often:")
        for error, times in errors.most_common(5):
            _say(f"{times:>9,}  {error}")
        _say("run the same command again to ask for them again")
    _say(f"{counts['answers']:,} answers: hermes4 export {out}")


def _safe(out: Path) -> str:
    return f"{count(out).records:,} answers are safe in {out}: run the same command again to go on"


def _say(line: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    sys.stdout.flush()
