"""`hermes4 tokenize`: conversations to a token store, by many processes.

The store's bytes depend on the data, the tokenizer, the template and the settings in its meta,
never on the number of processes or on where a run was interrupted.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

from hermes_core import StoreError, StoreWriter, open_store
from hermes_pipeline.chat import Refused, count_chars, parse, parse_json
from hermes_pipeline.errors import UserError
from hermes_pipeline.exits import INTERRUPTED, say, tell
from hermes_pipeline.records import Sample
from hermes_pipeline.services.files import Record, quarantine_entry, without_numbers
from hermes_pipeline.services.folders import check_folder, writing
from hermes_pipeline.services.hub import (
    DataSource,
    load_template,
    load_tokenizer,
    tokenizer_fingerprint,
)
from hermes_pipeline.services.identity import changed
from hermes_pipeline.services.progress import progress
from hermes_pipeline.services.workers import WorkerDied, map_in_order
from hermes_pipeline.tokenization import Tokenization, TokenizerState, template_fingerprint

RULES = 2  # raised when the same data and settings give other bytes
BATCH_RECORDS, BATCH_BYTES = 64, 1 << 20
BYTES_A_CHAR = 12  # of JSON at most: \ud83d\ude00
MOST = 1 << 59  # of what --limit and --max-chars count; so many bytes still fit in 64 bits
# What a user chooses: its option, where the meta keeps it, and where its name.
CHOICES = (
    ("--data", "source", "source"),
    ("--tokenizer", "tokenizer", "tokenizer_name"),
    ("--template", "template", "template_name"),
    ("--max-chars", "max_chars", "max_chars"),
    ("--limit", "limit", "limit"),
)

Batch = Sequence[Record]
Result = Sample | str  # or why it is set aside


@contextmanager
def _telling_the_way_on() -> Iterator[None]:
    """Say at an interrupt that the same command goes on."""
    try:
        yield
    except KeyboardInterrupt:
        say("hermes4: interrupted; run the same command again to go on")
        raise SystemExit(INTERRUPTED) from None


@_telling_the_way_on()
def run(
    source: DataSource,
    tokenizer: str,
    out: Path,
    *,
    tokenizer_revision: str | None = None,
    template: str | None = None,
    workers: int = os.cpu_count() or 1,
    max_chars: int = 4_000_000,
    limit: int | None = None,
) -> None:
    """Write the store ``out``; goes on where an interrupted run of the same settings stopped.

    Args:
        workers: processes; 1 works in this one.
        max_chars: longer conversations are set aside.
        limit: read only so many records.

    Raises:
        UserError: nothing to read, no folder for a store, other settings than an earlier run's, or
            every record is bad.
        SystemExit: interrupted; what is written is safe.
    """
    for option, given in (("--limit", limit), ("--max-chars", max_chars)):
        if given is not None and given > MOST:
            raise UserError(f"{option} is {given}; it may be {MOST} at most")
    source.check_apart(out)
    check_folder(out, "store.json", "writing")
    loaded = load_tokenizer(tokenizer, tokenizer_revision)
    template_name, text = load_template(template, loaded)
    earlier = _recorded(out)
    day = _recorded_date(earlier) or date.today().isoformat()
    state = TokenizerState.of(loaded)
    try:
        tokenization = Tokenization(state, text, date=day)
    except Refused as error:
        raise UserError(f"template {template_name!r}: {error}") from None
    ends = tokenization.end_tokens()
    meta = {
        "rules": RULES,
        "source": source.identity(),
        "limit": limit,
        "max_chars": max_chars,
        "tokenizer": tokenizer_fingerprint(loaded),
        "tokenizer_name": _short_name(tokenizer),
        "named_tokens": {key: str(value) for key, value in state.named_tokens.items()},
        "template": template_fingerprint(text),
        "template_name": template_name,
        "date": day,
        "eos_token_ids": [tokenization.encoder.token_id(token) for token in ends],
        "pad_token_id": loaded.pad_token_id,
    }
    max_bytes = BYTES_A_CHAR * max_chars + (1 << 24)
    if next(source.records(max_bytes=max_bytes), None) is None:
        raise UserError(f"{source.name} holds no records")
    if earlier:
        _check_same(out, earlier, meta)
    try:
        with (
            writing(out),
            StoreWriter(out, meta=meta, vocab_size=tokenization.encoder.vocab_size) as writer,
        ):
            if writer.finished:
                tell(f"{out} is finished already, from the same data and settings")
            else:
                loaded.eos_token = ends[0] if ends else loaded.eos_token
                loaded.chat_template = text
                _save_tokenizer(loaded, out / "tokenizer")
                records = source.records(start=writer.records_done, max_bytes=max_bytes)
                left = None if limit is None else max(0, limit - writer.records_done)
                work = (state, text, day, max_chars)
                _write(writer, islice(records, left), source, work, workers, limit)
    except StoreError as error:
        raise UserError(str(error)) from None
    _summarize(out)


def _write(
    writer: StoreWriter,
    records: Iterator[Record],
    source: DataSource,
    work: tuple[TokenizerState, str, str, int],
    workers: int,
    limit: int | None,
) -> None:
    before = writer.records_done
    if before:
        tell(f"going on after {before:,} records")
    total = source.count() if limit is None else limit
    done = map_in_order(_tokenize, _batches(records), setup=_set_up, given=work, workers=workers)
    # Whatever ends this early costs what came after the last commit, as kill -9 does: where
    # Ctrl-C strikes between two steps of the writer, a commit would write half of a record.
    try:
        with (
            closing(done),
            progress("tokenize", total=total, unit="conversations", done=before) as counter,
        ):
            for batch, results in done:
                for record, result in zip(batch, results, strict=True):
                    if isinstance(result, str):
                        writer.quarantine(quarantine_entry(record, result))
                    else:
                        writer.append(result.token_ids, result.kept_spans)
                note = "" if total is not None else f"{source.share_read():.0%} of the data read"
                counter.advance(len(batch), note)
        writer.finish()
    except WorkerDied:
        raise UserError(
            f"a worker process died, perhaps for want of memory; {_safe(writer)} with fewer "
            "--workers, or begin another --out with a smaller --max-chars"
        ) from None
    except KeyboardInterrupt:
        say(f"hermes4: interrupted; {_safe(writer)} to go on")
        raise SystemExit(INTERRUPTED) from None


def _safe(writer: StoreWriter) -> str:
    safe = f"{writer.records_done:,} records are safe in {writer.folder}"
    return f"{safe}: run the same command again"


# In the workers.

_made: list[tuple[Tokenization, int]] = []


def _set_up(state: TokenizerState, template: str, day: str, max_chars: int) -> None:
    _made[:] = [(Tokenization(state, template, date=day), max_chars)]


def _tokenize(batch: Batch) -> list[Result]:
    tokenization, max_chars = _made[0]
    return [_one(record, tokenization, max_chars) for record in batch]


def _one(record: Record, tokenization: Tokenization, max_chars: int) -> Result:
    if record.error is not None:
        return record.error
    try:
        data = parse_json(record.data) if isinstance(record.data, bytes) else record.data
        conversation = parse(data, record.source)
        chars = count_chars(conversation)
        if chars > max_chars:
            return f"the conversation has {chars:,} characters, more than {max_chars:,}"
        return tokenization.sample(conversation)
    except Refused as error:
        return str(error).encode("utf-8", "replace").decode()


# Around the work.


def _batches(records: Iterator[Record]) -> Iterator[Batch]:
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.data) if isinstance(record.data, bytes) else 1 << 12
        if len(batch) == BATCH_RECORDS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _check_same(out: Path, earlier: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Refuse other settings than those of an earlier run, in the words of the command line."""
    for option, key, name in CHOICES:
        if earlier.get(key) != meta[key]:
            then, now = earlier.get(name), meta[name]
            if key == "source":
                words = changed(then, now)
            else:
                words = f"{then}, not {now}" if then != now else f"{now} of other contents"
            raise UserError(
                f"--out {out} was begun with {option} {words}; choose another folder, or remove "
                "this one"
            )


def _recorded(out: Path) -> dict[str, Any]:
    """Return the meta of an earlier run on ``out``; empty where there is none."""
    for path in (out / "store.json", out / "writing" / "progress.json"):
        try:
            return dict(json.loads(path.read_bytes())["meta"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {}


def _recorded_date(earlier: Mapping[str, Any]) -> str | None:
    """Return the date that an earlier run told its template."""
    try:
        return date.fromisoformat(earlier["date"]).isoformat()
    except (ValueError, KeyError, TypeError):
        return None


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    temporary = folder.with_name(folder.name + ".new")
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _short_name(tokenizer: str) -> str:
    """Return a name that does not depend on where this machine keeps its files."""
    path = Path(tokenizer).expanduser()
    return "/".join(path.resolve().parts[-2:]) if path.exists() else tokenizer


def _summarize(out: Path) -> None:
    store = open_store(out)
    tell(f"{store.read:,} read = {store.stored:,} stored + {store.quarantined:,} quarantined")
    reasons = Counter(_reasons(out)).most_common(5) if store.quarantined else []
    if store.stored == 0:
        raise UserError(
            f"not one of {store.read:,} records can be used, most often: {reasons[0][0]}; see "
            f"{out / 'quarantine.jsonl'}"
        )
    tokens, kept = store.token_count, store.kept_count
    tell(
        f"{tokens:,} tokens, {tokens / store.stored:,.0f} a conversation; {kept:,} of them kept "
        f"({kept / tokens:.1%})"
    )
    if reasons:
        tell(f"quarantine: {out / 'quarantine.jsonl'}; most often:")
        for reason, count in reasons:
            tell(f"{count:>9,}  {reason}")
    tell(f"store: {out}")


def _reasons(out: Path) -> Iterator[str]:
    """Yield the reason of each quarantined record, with its numbers left out."""
    with (out / "quarantine.jsonl").open("rb") as file:
        for line in file:
            yield without_numbers(json.loads(line)["reason"])
