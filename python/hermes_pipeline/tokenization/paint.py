"""Who wrote each character of a rendered conversation.

A template is a program; what it does to a message is found out by running it a second time on
painted messages. Every character of a message is replaced by one character that stands for that
message and occurs nowhere else, and the two renderings are laid side by side. Where both show
the same character the template wrote it; where the second shows paint, that message did. The
second counts only when it equals the first in length and in every character of the template's,
so a template that takes another path for painted text is noticed.

Three strengths of paint are tried: all characters; all but white space and what JSON escapes,
for templates that trim or write JSON; letters and digits outside texts the template may look
for, for templates that split at tags, raise on words or escape.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hermes_pipeline.tokenization.template import Messages, PaintedDict, PaintedList

TEMPLATE, FOREIGN = -1, -2  # owners that are no assistant message
CONTENT, REASONING, CALLS = 0, 1, 2  # parts; call number k is CALLS + k

# Printable, caseless letters that conversations hardly use: CJK extensions B, G and F, Tangut.
_BLOCKS = ((0x20000, 42_720), (0x30000, 4_939), (0x2CEB0, 7_473), (0x17000, 6_136))

Brush = Callable[[str, str], str]  # text and paint to painted text


def _solid(text: str, paint: str) -> str:
    return paint * len(text)


_NO_SPACE = re.compile(r'[^\s"\\\x00-\x1f\x7f]+')


def _spaced(text: str, paint: str) -> str:
    return _NO_SPACE.sub(lambda found: paint * len(found[0]), text)


def _words(constants: Sequence[str]) -> Brush:
    kept = "|".join(re.escape(text) for text in constants if len(text) <= 64)
    pattern = re.compile(f"({kept})|\\w" if kept else r"(?!)()|\w")

    def brush(text: str, paint: str) -> str:
        return pattern.sub(lambda found: found[1] or paint, text)

    return brush


def brushes(constants: Sequence[str]) -> tuple[Brush, ...]:
    """Return the strengths of paint in the order to try them."""
    return _solid, _spaced, _words(constants)


def characters(text: str) -> NDArray[np.uint32]:
    """Return the code points of ``text``."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


class Painting:
    """Messages with every text replaced by paint.

    Each assistant message and each of its parts has a paint of its own. Other messages share
    one where their role and text agree, since templates ask whether two messages are equal.

    Args:
        messages: as the template takes them.
        brush: strength of the paint.
        avoid: code points that cannot be paint, since the real text has them.

    Raises:
        ValueError: no block of paint is free or large enough.
    """

    def __init__(self, messages: Messages, brush: Brush, avoid: NDArray[np.uint32]) -> None:
        self._brush = brush
        self._json_brush = _solid if brush is _solid else _spaced
        self._owners: list[tuple[int, int]] = []
        self._shared: dict[tuple[str, str], str] = {}
        # Two paints and the calls for an assistant message, one for another.
        wanted = sum(3 + len(message.get("tool_calls", ())) for message in messages)
        for base, size in _BLOCKS:
            if wanted <= size and not ((avoid >= base) & (avoid < base + size)).any():
                self._base = base
                break
        else:
            raise ValueError("no characters are left to paint with")
        self.messages = [self._message(index, turn) for index, turn in enumerate(messages)]

    def owners(self, text: str, painted: str) -> NDArray[np.int32] | None:
        """Return [T, 2] owner and part of each character, or None where the two disagree."""
        if len(text) != len(painted):
            return None
        plain, codes = characters(text), characters(painted)
        paints = np.asarray(self._owners, dtype=np.int32).reshape(-1, 2)
        by_message = (codes >= self._base) & (codes < self._base + len(paints))
        if not np.array_equal(plain[~by_message], codes[~by_message]):
            return None
        if ((plain >= self._base) & (plain < self._base + len(paints))).any():
            return None
        owners = np.full((len(text), 2), TEMPLATE, dtype=np.int32)
        owners[by_message] = paints[codes[by_message] - self._base]
        return owners

    def end_of_paint(self, painted: str) -> int:
        """Return the place after the last paint in ``painted``; 0 where there is none."""
        codes = characters(painted)
        places = np.flatnonzero((codes >= self._base) & (codes < self._base + len(self._owners)))
        return int(places[-1]) + 1 if len(places) else 0

    def _paint(self, owner: int, part: int) -> str:
        self._owners.append((owner, part))
        return chr(self._base + len(self._owners) - 1)

    def _message(self, index: int, turn: Mapping[str, Any]) -> dict[str, Any]:
        painted = dict(turn)
        content = turn["content"]
        if turn["role"] != "assistant":
            key = (turn["role"], content)
            if key not in self._shared:
                self._shared[key] = self._paint(FOREIGN, CONTENT)
            painted["content"] = self._brush(content, self._shared[key])
            return painted
        if content is not None:
            painted["content"] = self._brush(content, self._paint(index, CONTENT))
        if "reasoning" in turn:
            reasoning = self._brush(turn["reasoning"], self._paint(index, REASONING))
            painted |= dict.fromkeys(("reasoning", "reasoning_content", "thinking"), reasoning)
        if "tool_calls" in turn:
            calls = turn["tool_calls"]
            paints = [self._paint(index, CALLS + number) for number in range(len(calls))]
            painted["tool_calls"] = PaintedList(
                self._value(call, paint, depth=0) for call, paint in zip(calls, paints, strict=True)
            )
            painted["tool_calls"].plain = calls
            painted["tool_calls"].paint = partial(self._json_brush, paint=paints[0])
        return painted

    def _value(self, value: Any, paint: str, *, depth: int) -> Any:
        """Paint the texts of a call's arguments, and whatever becomes JSON as a whole."""
        painted: Any
        if isinstance(value, Mapping):
            painted = PaintedDict(
                (key, self._value(item, paint, depth=depth + 1)) for key, item in value.items()
            )
        elif isinstance(value, list):
            painted = PaintedList(self._value(item, paint, depth=depth + 1) for item in value)
        else:
            # Depth 1 is type and id, depth 2 the function's name: templates look at those.
            return self._brush(value, paint) if isinstance(value, str) and depth > 2 else value
        painted.plain, painted.paint = value, partial(self._json_brush, paint=paint)
        return painted
