"""Values of a conversation: what is wrong with one, in words, and what JSON can hold."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

_MAX_DEPTH = 64  # of arguments and tools; whoever follows a template recurses into them


class Refused(ValueError):
    """A record or a conversation that cannot be used; the message says which part and why."""


def checked_text(text: str, where: str) -> str:
    """Return ``text`` where it can be written as UTF-8."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Refused(f"{where}: half a surrogate pair at character {error.start}") from None
    return text


def check_json(value: object, what: str) -> None:
    """Refuse what a template cannot write as JSON: Parquet holds dates and bytes too."""
    if _is_deeper(value, _MAX_DEPTH):
        raise Refused(f"{what} are nested more than {_MAX_DEPTH} deep")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise Refused(f"{what} are not JSON: {error}") from None
    checked_text(text, what)


def _is_deeper(value: object, depth: int) -> bool:
    items = value.values() if isinstance(value, Mapping) else value
    if not isinstance(items, Iterable) or isinstance(items, str | bytes):
        return False
    return depth == 0 or any(_is_deeper(item, depth - 1) for item in items)


def shortened(value: object) -> str:
    """Return the value for a message, in 80 characters."""
    try:
        text = repr(value)
    except RecursionError:
        return kind_of(value)
    return text if len(text) <= 80 else text[:77] + "..."


def kind_of(value: object) -> str:
    """Return what JSON calls such a value."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)
