"""`hermes4 show`: conversations with their kept tokens coloured."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import date

from rich.console import Console
from rich.text import Text

from hermes_pipeline.chat import Refused, parse, parse_json
from hermes_pipeline.errors import UserError
from hermes_pipeline.records import Span
from hermes_pipeline.services.files import Record
from hermes_pipeline.services.hub import DataSource, load_template, load_tokenizer
from hermes_pipeline.tokenization import Tokenization, TokenizerState

KEPT = "bold green"
BRACKETS = ("⟦", "⟧")


def run(
    source: DataSource,
    tokenizer: str,
    *,
    tokenizer_revision: str | None = None,
    template: str | None = None,
    index: int = 0,
    count: int = 1,
    console: Console | None = None,
) -> None:
    """Print ``count`` conversations from number ``index`` on.

    Kept text is coloured; where the output has no colours or NO_COLOR is set it stands in
    brackets. A refused one is shown with the reason, in its place.

    Raises:
        UserError: no such data, tokenizer or template, or fewer conversations; or, at the end, one
            of them was refused.
    """
    loaded = load_tokenizer(tokenizer, tokenizer_revision)
    name, text = load_template(template, loaded)
    try:
        tokenization = Tokenization(TokenizerState.of(loaded), text, date=date.today().isoformat())
    except Refused as error:
        raise UserError(f"template {name!r}: {error}") from None
    if console is None:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    shown = refused = 0
    for number, record in enumerate(source.records(start=index), index):
        if shown == count:
            break
        try:
            told = describe(number, record, tokenization, marked=_is_plain(console))
        except Refused as error:
            told = _describe_refused(number, record, error)
            refused += 1
        console.print(told)
        shown += 1
    if shown == 0:
        raise UserError(f"--index {index}: {source.name} has no conversation of that number")
    if refused:
        raise UserError(
            f"{refused:,} of {shown:,} conversations shown cannot be used; the reasons are printed "
            f"with them"
        )


def describe(number: int, record: Record, tokenization: Tokenization, *, marked: bool) -> Text:
    """Return one conversation for people.

    Args:
        marked: put kept text in brackets, besides its colour.

    Raises:
        Refused: it cannot be used.
    """
    if record.error is not None:
        raise Refused(record.error)
    data = parse_json(record.data) if isinstance(record.data, bytes) else record.data
    conversation = parse(data, record.source)
    rendering = tokenization.render(conversation)
    sample = tokenization.tokens(rendering)
    total = len(sample.token_ids)
    kept = int((sample.kept_spans[:, 1] - sample.kept_spans[:, 0]).sum())
    counts = (
        f": {len(conversation.messages)} messages, {total:,} tokens, "
        f"{kept:,} kept ({kept / total:.1%})\n"
    )
    body = _coloured(rendering.text, rendering.kept, marked=marked)
    return Text.assemble((_title(number, record), "bold"), counts, body)


def _describe_refused(number: int, record: Record, error: Refused) -> Text:
    reason = _visible(" ".join(str(error).split()))
    start = "" if record.data is None else _visible(f"\n{_beginning(record.data)}")
    title = (_title(number, record), "bold")
    return Text.assemble(title, ": ", ("refused", "bold red"), f": {reason}{start}")


def _title(number: int, record: Record) -> str:
    return f"conversation {number} ({_visible(record.source)})"


def _coloured(text: str, kept: Sequence[Span], *, marked: bool) -> Text:
    opening, closing = BRACKETS if marked else ("", "")
    body = Text()
    last = 0
    for start, end in kept:
        body.append(_visible(text[last:start]))
        body.append(opening + _visible(text[start:end]) + closing, style=KEPT)
        last = end
    body.append(_visible(text[last:]))
    return body


def _visible(text: str) -> str:
    """Return ``text`` with what would move the cursor or hide itself as escapes."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char
        if char.isprintable() or char == "\n" or unicodedata.category(char) in ("Zs", "Co", "Cn")
        else char.encode("unicode_escape").decode()
        for char in text
    )


def _beginning(data: bytes | Mapping[str, object]) -> str:
    text = data[:400].decode("utf-8", "replace") if isinstance(data, bytes) else str(data)
    return text if len(text) <= 200 else text[:197] + "..."


def _is_plain(console: Console) -> bool:
    # No colour system: no terminal, or one that knows no colours (TERM=dumb).
    return console.color_system is None or console.no_color
