"""Where each assistant turn lies in a rendered conversation, exactly or not at all.

A turn is what a model would have to write: from the end of the generation prompt to the
end-of-turn token. The characters of the messages are found by paint (see `paint`), the end of
the prompt by rendering what comes before the turn, the end of the turn by rendering up to it.
A template need not be prefix-stable: where it rewrites history, the stretch around the turn is
compared instead of the whole. What cannot be proved is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from hermes_pipeline.chat import Refused
from hermes_pipeline.records import Message, Span
from hermes_pipeline.tokenization.paint import (
    CALLS,
    CONTENT,
    TEMPLATE,
    Brush,
    Painting,
    brushes,
    characters,
)
from hermes_pipeline.tokenization.probe import Disagreement, Probe, PromptStyle, Tools, TooManyTurns
from hermes_pipeline.tokenization.specials import End, Specials
from hermes_pipeline.tokenization.template import ChatTemplate, Messages

_NO_END = (
    "the template writes no end-of-turn token after it that the tokenizer knows as a special "
    "token, so a model would never learn to stop; after its text comes "
)
_NO_TEXT = "it has no text of its own and the template rewrites what comes before it"


@dataclass(frozen=True, slots=True)
class Turn:
    """A trained assistant turn at characters [start, end) of the rendering."""

    message: int
    start: int  # after the generation prompt
    text_end: int  # after the last character that is the message's own
    end: int  # after the end-of-turn token
    end_token: str
    content: Span | None  # the rendered part of the content; None when there is none


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the first and the last character of a message's own lie."""

    first: int
    end: int
    is_empty: bool  # found by what surrounds it, since there is nothing to paint


class Reader:
    """Finds the turns of one rendered conversation.

    Args:
        messages: as records, for errors and switches.
        dicts: the same as the template takes them.
        trust: skip the renderings of a turn that stands in the same surroundings as one already
            placed; False is the slow twin.

    Raises:
        Refused: the template fails.
    """

    def __init__(
        self,
        template: ChatTemplate,
        specials: Specials,
        style: PromptStyle,
        messages: Sequence[Message],
        dicts: Messages,
        tools: Tools,
        *,
        trust: bool = True,
    ) -> None:
        self._template, self._specials, self._trust = template, specials, trust
        self._messages, self._dicts = messages, dicts
        self._header = style.prompt(tools)
        self._probe = Probe(template, dicts, tools)
        self.text = self._probe.whole()

    def turns(self) -> list[Turn]:
        """Return the trained turns in order.

        Raises:
            Refused: a turn cannot be placed exactly; the message says which and why.
        """
        avoid = characters(self.text)
        for brush in brushes(self._template.constants):
            try:
                return self._turns(brush, avoid)
            except Disagreement:
                continue
            except TooManyTurns:
                raise Refused(
                    f"{len(self._messages):,} messages are too many for a template that has to be "
                    "followed turn by turn"
                ) from None
        raise Refused(
            "the chat template rewrites the text of the messages (case, escapes or the like), "
            "so it cannot be followed"
        )

    def _turns(self, brush: Brush, avoid: NDArray[np.uint32]) -> list[Turn]:
        try:
            self._painting = Painting(self._dicts, brush, avoid)
        except ValueError as error:
            raise Refused(f"the conversation cannot be followed: {error}") from None
        self._probe.painting = self._painting
        self._owners = self._probe.owners(self.text, len(self._dicts))
        self._starts: dict[tuple[str, str, bool], int] = {}
        self._ends: dict[bool, tuple[str, str]] = {}
        # The last turn first: its end needs no other rendering.
        trained = [index for index, message in enumerate(self._messages) if message.train]
        turns = [self._turn(index) for index in reversed(trained)][::-1]
        for turn, after in pairwise(turns):
            if after.start < turn.end:
                self._refuse(after.message, f"its turn begins inside that of {turn.message}")
        return turns

    def _turn(self, index: int) -> Turn:
        place = self._place(index)
        start = self._start(index, place)
        stop = start if place is None else max(start, place.end)
        end = self._end(index, start, stop, place)
        inside = self._owners[start : end.end, 0]
        if ((inside != TEMPLATE) & (inside != index)).any():
            self._refuse(index, "the template writes text of another message inside this turn")
        self._check_complete(index, start, end.start)
        content = np.flatnonzero((self._owners[:, 0] == index) & (self._owners[:, 1] == CONTENT))
        return Turn(
            message=index,
            start=start,
            text_end=stop,
            end=end.end,
            end_token=end.token,
            content=(int(content[0]), int(content[-1]) + 1) if len(content) else None,
        )

    def _place(self, index: int) -> _Place | None:
        own = np.flatnonzero(self._owners[:, 0] == index)
        if len(own):
            return _Place(int(own[0]), int(own[-1]) + 1, is_empty=False)
        if self._messages[index].tool_calls:
            return None
        # Nothing to paint: see where a text would stand in its place.
        head, tail = self._probe.in_place(index)
        content = self._dicts[index]["content"] or ""
        if head is None:
            return None
        middle = self.text[len(head) : len(self.text) - len(tail)]
        variants = (content, content.strip(), content.lstrip(), content.rstrip())
        if len(head) + len(tail) > len(self.text) or middle not in variants:
            return None
        owners = self._painting.owners(self.text, head + middle + tail)
        if owners is None or not np.array_equal(owners, self._owners):
            return None
        return _Place(len(head), len(head) + len(middle), is_empty=True)

    # The start of a turn: the end of the generation prompt.

    def _start(self, index: int, place: _Place | None) -> int:
        if place is None:
            prompt = self._probe.prompt(index, prompt=True)
            if prompt is None or not self.text.startswith(prompt):
                self._refuse(index, _NO_TEXT)
            return len(prompt)
        before = self._end_of_others(place.first, index)
        follows = self._messages[index - 1].role if index else ""
        calls = bool(self._messages[index].tool_calls)
        key = (self.text[before : place.first], follows, calls)
        if self._trust and key in self._starts:
            return before + self._starts[key]
        start = self._find_start(index, before, place.first)
        if start <= place.first:
            self._starts[key] = start - before
        return start

    def _find_start(self, index: int, before: int, first: int) -> int:
        prompt = self._probe.prompt(index, prompt=True)
        if prompt is not None and self.text.startswith(prompt) and len(prompt) >= before:
            start = len(prompt)
        else:
            tail = None if prompt is None else self._probe.tail_of_prompt(index, prompt)
            if tail is None or not self.text.startswith(tail, before):
                return before + self._shared_header(index, self.text[before:first], tail)
            start = before + len(tail)
        rest = self.text[start:first]
        if not rest.strip() or self._opens_turn(index, prompt):
            return start
        return start + self._skip_header(index, rest)

    def _shared_header(self, index: int, gap: str, tail: str | None) -> int:
        """Return the length of the header in ``gap``, where history differs from the prompt."""
        if tail is not None:
            # The prompt may hold more than history does, such as an opening <think>.
            shared = self._specials.common_prefix(gap, tail)
            if not gap[shared:].strip():
                return shared
            # A call may begin where a plain answer has its text.
            for followed in (False, True):
                header = self._probe.plain_gap(index, followed=followed)
                if header and gap.startswith(header) and tail.startswith(header):
                    return len(header)
        if self._header and gap.count(self._header) == 1:
            return gap.index(self._header) + len(self._header)
        self._refuse(
            index,
            f"the template writes {_short(gap)} before it, but {_short(tail or '')} where it asks "
            "for an answer",
        )

    def _opens_turn(self, index: int, prompt: str | None) -> bool:
        """Does the prompt before message ``index`` open an assistant turn?"""
        closed = self._probe.prompt(index, prompt=False)
        if prompt is None or closed is None or prompt == closed:
            return False
        if self._header and prompt.endswith(self._header):
            return True
        follows_assistant = index > 0 and self._messages[index - 1].role == "assistant"
        return not follows_assistant and len(prompt) > self._specials.common_prefix(prompt, closed)

    def _skip_header(self, index: int, rest: str) -> int:
        """Return the length of a header in ``rest`` that stands there without being asked for."""
        header: str | None = self._header
        if header:
            if rest.count(header) == 1:
                return rest.index(header) + len(header)
        else:
            # Without generation prompts the header is what stands before a plain answer.
            header = self._probe.plain_header(index)
            if header is not None and not header.strip():
                return 0
            if header is not None and rest.startswith(header):
                return len(header)
        self._refuse(
            index,
            f"the template writes {_short(rest)} before it, which is neither its generation "
            f"prompt {_short(header or '')} nor text of the message",
        )

    # The end of a turn: the end-of-turn token.

    def _end(self, index: int, start: int, stop: int, place: _Place | None) -> End:
        calls = bool(self._messages[index].tool_calls)
        if self._trust and place is not None and not place.is_empty and calls in self._ends:
            token, text = self._ends[calls]
            if self.text.startswith(text, stop):
                return End(token, stop + len(text) - len(token), stop + len(text))
        tail = self._tail(index, stop, place)
        found = self._find_end(index, start, stop, tail, place)
        if found is None or self._is_header(found, tail):
            self._refuse(index, _NO_END + _short(tail))
        end = self._same_end(index, start, stop, tail, found)
        if place is not None and not place.is_empty:
            self._ends[calls] = (end.token, self.text[stop : end.end])
        return end

    def _tail(self, index: int, stop: int, place: _Place | None) -> str:
        """Return what the template writes after the turn's text when the conversation ends."""
        if index + 1 == len(self._dicts):
            return self.text[stop:]
        try:
            text = self._probe.until(index)
        except Refused as error:
            self._refuse(index, f"its end cannot be found: {error}")
        if text[:stop] == self.text[:stop] and not (place and place.is_empty):
            return text[stop:]
        if place is None:
            self._refuse(index, _NO_TEXT)
        if place.is_empty:
            return self._probe.around_plain(index)[1]
        owners = self._probe.owners(text, index + 1)
        own = np.flatnonzero(owners[:, 0] == index)
        if not len(own):
            self._refuse(index, "the template drops it when nothing follows")
        return text[own[-1] + 1 :]

    def _find_end(
        self, index: int, start: int, stop: int, tail: str, place: _Place | None
    ) -> End | None:
        """Return the end-of-turn token in ``tail``."""
        if place is None or self._messages[index].tool_calls:
            # Closing tags stand between the text and the end: look at a plain answer's end.
            plain = self._probe.around_plain(index)[1]
            end = self._specials.first_end(plain, "")
            if end is not None and tail.endswith(plain[end.start :]):
                shift = len(tail) - len(plain)
                return End(end.token, end.start + shift, end.end + shift)
            if place is None:
                return None
        return self._specials.first_end(tail, self._written(start, stop))

    def _same_end(self, index: int, start: int, stop: int, tail: str, found: End) -> End:
        """Return the end in the conversation's own text; only white space may differ."""
        wanted = tail[: found.end]
        if self.text.startswith(wanted, stop):
            return End(found.token, stop + found.start, stop + found.end)
        nearby = self.text[stop : stop + 2 * len(wanted) + 64]
        end = self._specials.first_end(nearby, self._written(start, stop))
        same = end is not None and _packed(nearby[: end.end]) == _packed(wanted)
        if end is None or not same or end.token != found.token:
            self._refuse(
                index,
                f"the template ends it with {_short(wanted)} when nothing follows, but with "
                f"{_short(nearby[: found.end])} in this conversation",
            )
        return End(end.token, stop + end.start, stop + end.end)

    def _written(self, start: int, stop: int) -> str:
        """Return what the template itself wrote at [start, stop)."""
        text = self.text[start:stop]
        places = np.flatnonzero(self._owners[start:stop, 0] == TEMPLATE)
        return "".join(text[place] for place in places)

    def _is_header(self, end: End, tail: str) -> bool:
        """Is this the next header's token rather than the turn's last?"""
        if end.token in self._specials.within(self._header):
            return True
        if self._header or self._specials.is_known_end(end.token):
            return False
        return bool(tail[end.end :].strip())

    def _check_complete(self, index: int, start: int, end: int) -> None:
        """Refuse a turn whose answer or calls the template leaves out; thoughts may go."""
        message = self._messages[index]
        parts = set(self._owners[start:end, 1][self._owners[start:end, 0] == index].tolist())
        painted = self._painting.messages[index]
        if painted["content"] != self._dicts[index]["content"] and CONTENT not in parts:
            self._refuse(index, "the template does not write its content")
        text = self.text[start:end]
        names = [call["function"]["name"] for call in message.tool_calls]
        for number, call in enumerate(message.tool_calls):
            name = names[number]
            if CALLS + number not in parts and text.count(name) < names.count(name):
                self._refuse(index, f"the template does not write its call of {name!r}")
            if _has_text(call["function"]["arguments"]) and max(parts, default=0) < CALLS:
                self._refuse(index, f"the template does not write the arguments of {name!r}")

    def _end_of_others(self, first: int, index: int) -> int:
        """Return the end of the last text of other messages before the turn's own."""
        others = (self._owners[:first, 0] != TEMPLATE) & (self._owners[:first, 0] != index)
        places = np.flatnonzero(others)
        return int(places[-1]) + 1 if len(places) else 0

    def _refuse(self, index: int, reason: str) -> NoReturn:
        raise Refused(f"message {index} ({self._messages[index].role}): {reason}")


def _has_text(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, Mapping):
        return any(_has_text(item) for item in value.values())
    return isinstance(value, list) and any(_has_text(item) for item in value)


def _packed(text: str) -> str:
    return "".join(text.split())


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
