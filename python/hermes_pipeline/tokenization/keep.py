"""Which characters of a turn are kept: less what a tool said, or only what a record asks for."""

from __future__ import annotations

import re

from hermes_pipeline.chat import Refused
from hermes_pipeline.records import Message, Span
from hermes_pipeline.tokenization.turns import Turn

_OPEN = "<tool_response>"
_CLOSE = "</tool_response>"
_INJECTED = re.compile(rf"{_OPEN}.*?{_CLOSE}", re.DOTALL)


def kept_spans(text: str, turn: Turn, message: Message) -> list[Span]:
    """Return the kept characters of ``turn`` in ``text``: disjoint, rising, none empty.

    A message with ``train_spans`` keeps those characters of its content. What follows the
    content, calls and end-of-turn token, is kept when the last span reaches the end of the
    content; what precedes it never.

    Raises:
        Refused: a tool response does not end, or spans cannot be placed exactly.
    """
    if message.train_spans is None:
        wanted = [(turn.start, turn.end)]
    else:
        wanted = _asked_for(text, turn, message)
    for start, end in _injected(text, turn, message):
        wanted = [piece for span in wanted for piece in _without(span, start, end)]
    return wanted


def _injected(text: str, turn: Turn, message: Message) -> list[Span]:
    if _OPEN not in message.content and _OPEN not in (message.reasoning or ""):
        return []
    found = [match.span() for match in _INJECTED.finditer(text, turn.start, turn.text_end)]
    last = found[-1][1] if found else turn.start
    if text.find(_OPEN, last, turn.text_end) >= 0:
        raise Refused(
            f"message {turn.message} (assistant): {_OPEN} is opened in its content and not "
            "closed, so what the tool said cannot be told from what the model said"
        )
    for tag in (_OPEN, _CLOSE):
        if text.count(tag, turn.start, turn.text_end) != len(found):
            raise Refused(
                f"message {turn.message} (assistant): {tag} stands in what a tool said, so that "
                "cannot be told from what the model said"
            )
    return found


def _asked_for(text: str, turn: Turn, message: Message) -> list[Span]:
    content, spans = message.content, message.train_spans or ()
    if not spans:
        return []
    visible = content.strip()
    lead = len(content) - len(content.lstrip())
    if turn.content is None or not visible:
        raise _not_verbatim(turn)
    start, end = turn.content
    base = start - max(0, content.find(text[start:end]))  # where character 0 would stand
    if not text.startswith(visible, max(0, base + lead)) or base + lead < 0:
        raise _not_verbatim(turn)
    # Edges of white space count where the template has not trimmed them.
    low = base if base >= turn.start and text.startswith(content[:lead], base) else base + lead
    high = base + lead + len(visible)
    if text.startswith(content[lead + len(visible) :], high):
        high = base + len(content)
    placed = [(max(base + s, low), min(base + e, high)) for s, e in spans]
    placed = [(s, e) for s, e in placed if s < e]
    if base + spans[-1][1] >= high:
        placed.append((high, turn.end))
    return _joined(placed, turn.start)


def _joined(spans: list[Span], start: int) -> list[Span]:
    """Join spans that touch and cut off what lies before the turn."""
    joined: list[Span] = []
    for low, high in spans:
        low = max(low, start)
        if low >= high:
            continue
        if joined and joined[-1][1] == low:
            joined[-1] = (joined[-1][0], high)
        else:
            joined.append((low, high))
    return joined


def _without(span: Span, start: int, end: int) -> list[Span]:
    pieces = [(span[0], min(span[1], start)), (max(span[0], end), span[1])]
    return [(low, high) for low, high in pieces if low < high]


def _not_verbatim(turn: Turn) -> Refused:
    return Refused(
        f"message {turn.message} (assistant): train_spans, but the template does not write its "
        "content as it is, so the spans cannot be placed"
    )
