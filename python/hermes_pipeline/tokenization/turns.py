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
from hermes_pipeline.tokenization.specials import End, Specials
from hermes_pipeline.tokenization.template import ChatTemplate, Messages

_QUESTION = ({"role": "user", "content": "x"},)
_MARK = "\U0002fa1d"  # stands for an answer where only what surrounds it matters


@dataclass(frozen=True, slots=True)
class Turn:
    """A trained assistant turn at characters [start, end) of the rendering."""

    message: int
    start: int  # after the generation prompt
    text_end: int  # after the last character that is the message's own
    end: int  # after the end-of-turn token
    end_token: str
    content: Span | None  # the rendered part of the content; None when there is none


class _Disagreement(Exception):
    """The painted rendering differs from the plain one."""


class PromptStyle:
    """How a template opens an assistant turn for generation, found once."""

    def __init__(self, template: ChatTemplate, specials: Specials) -> None:
        self._template, self._specials = template, specials
        self._alone = self._added(())

    def prompt(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """Return what add_generation_prompt adds after a question; "" where nothing."""
        # Some templates render no conversation without tools.
        return (self._added(tools) if self._alone is None and tools else self._alone) or ""

    def _added(self, tools: Sequence[Mapping[str, Any]]) -> str | None:
        try:
            closed = self._template.render(_QUESTION, tools)
            opened = self._template.render(_QUESTION, tools, prompt=True)
        except Refused:
            return None
        return opened[self._specials.common_prefix(opened, closed) :]


class Reader:
    """Finds the turns of one rendered conversation.

    Args:
        messages: as records, for errors and switches.
        dicts: the same as the template takes them.

    Raises:
        Refused: the template fails, or its text cannot be followed.
    """

    def __init__(
        self,
        template: ChatTemplate,
        specials: Specials,
        style: PromptStyle,
        messages: Sequence[Message],
        dicts: Messages,
        tools: Sequence[Mapping[str, Any]],
    ) -> None:
        self._template, self._specials = template, specials
        self._header = style.prompt(tools)
        self._messages, self._dicts, self._tools = messages, dicts, tools
        self.text = template.render(dicts, tools)
        self._avoid = characters(self.text)

    def turns(self) -> list[Turn]:
        """Return the trained turns in order.

        Raises:
            Refused: a turn cannot be placed exactly; the message says which and why.
        """
        for brush in brushes(self._template.constants):
            try:
                return self._turns(brush)
            except _Disagreement:
                continue
        raise Refused(
            "the chat template rewrites the text of the messages (case, escapes or the like), "
            "so it cannot be followed"
        )

    def _turns(self, brush: Brush) -> list[Turn]:
        try:
            self._painting = Painting(self._dicts, brush, self._avoid)
        except ValueError as error:
            raise Refused(f"the conversation cannot be followed: {error}") from None
        self._owners = self._follow(self.text, self._painting.messages)
        turns: list[Turn] = []
        for index, message in enumerate(self._messages):
            if not message.train:
                continue
            turn = self._turn(index)
            if turns and turn.start < turns[-1].end:
                self._refuse(index, f"its turn begins inside that of message {turns[-1].message}")
            turns.append(turn)
        return turns

    def _follow(
        self, text: str, painted: Sequence[Mapping[str, Any]], *, prompt: bool = False
    ) -> NDArray[np.int32]:
        try:
            rendered = self._template.render(painted, self._tools, prompt=prompt)
        except Refused:
            raise _Disagreement from None
        owners = self._painting.owners(text, rendered)
        if owners is None:
            raise _Disagreement
        return owners

    def _turn(self, index: int) -> Turn:
        own = np.flatnonzero(self._owners[:, 0] == index)
        first = int(own[0]) if len(own) else None
        start = self._start(index, first)
        stop = max(start, int(own[-1]) + 1) if first is not None else start
        end = self._end(index, start, stop, has_text=first is not None)
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

    # The start of a turn: the end of the generation prompt.

    def _start(self, index: int, first: int | None) -> int:
        prompt = self._prompt(index, prompt=True)
        before = self._end_of_others(first, index)
        if prompt is not None and self.text.startswith(prompt) and len(prompt) >= before:
            start = len(prompt)
        elif first is None:
            self._refuse(
                index, "it has no text of its own and the template rewrites what comes before it"
            )
        else:
            tail = None if prompt is None else self._tail_after_text(index, prompt)
            start, whole = self._start_nearby(index, before, first, tail)
            if not whole:
                return start
        rest = self.text[start:first] if first is not None else ""
        if not rest.strip() or self._opens_turn(index, prompt):
            return start
        return self._start_past_header(index, start, rest)

    def _start_nearby(
        self, index: int, before: int, first: int, tail: str | None
    ) -> tuple[int, bool]:
        """Find the prompt in the template's text before the turn; is it there as a whole?"""
        gap = self.text[before:first]
        if tail is not None:
            if self.text.startswith(tail, before):
                return before + len(tail), True
            # The prompt may hold more than history does, such as an opening <think>.
            shared = self._specials.common_prefix(gap, tail)
            if not gap[shared:].strip():
                return before + shared, False
            # A call may begin where a plain answer has its text.
            for followed in (False, True):
                header = self._plain_gap(index, followed=followed)
                if header and gap.startswith(header) and tail.startswith(header):
                    return before + len(header), False
        if self._header and gap.count(self._header) == 1:
            end = gap.index(self._header) + len(self._header)
            return before + end, False
        self._refuse(
            index,
            f"the template writes {_short(gap)} before it, but {_short(tail or '')} where it asks "
            "for an answer",
        )

    def _opens_turn(self, index: int, prompt: str | None) -> bool:
        """Does the prompt before message ``index`` open an assistant turn?"""
        closed = self._prompt(index, prompt=False)
        if prompt is None or closed is None or prompt == closed:
            return False
        if self._header and prompt.endswith(self._header):
            return True
        follows_assistant = index > 0 and self._messages[index - 1].role == "assistant"
        return not follows_assistant and len(prompt) > self._specials.common_prefix(prompt, closed)

    def _start_past_header(self, index: int, start: int, rest: str) -> int:
        """Skip a header in ``rest``, which the template writes where nobody asked for it."""
        header: str | None = self._header
        if header:
            if rest.count(header) == 1:
                return start + rest.index(header) + len(header)
        else:
            # Without generation prompts the header is what stands before a plain answer.
            header = self._plain_header(index)
            if header is not None and not header.strip():
                return start
            if header is not None and rest.startswith(header):
                return start + len(header)
        self._refuse(
            index,
            f"the template writes {_short(rest)} before it, which is neither its generation "
            f"prompt {_short(header or '')} nor text of the message",
        )

    # The end of a turn: the end-of-turn token.

    def _end(self, index: int, start: int, stop: int, *, has_text: bool) -> End:
        tail = self._tail_of_turn(index, stop, has_text)
        end = self._find_end(index, start, stop, tail, has_text)
        if end is None or self._is_header(end, tail):
            self._refuse(
                index,
                "the template writes no end-of-turn token after it that the tokenizer knows as a "
                f"special token, so a model would never learn to stop; after its text comes "
                f"{_short(tail)}",
            )
        if not self.text.startswith(tail[: end.end], stop):
            self._refuse(
                index,
                f"the template ends it with {_short(tail[: end.end])} when nothing follows, but "
                f"with {_short(self.text[stop : stop + end.end])} in this conversation",
            )
        return End(end.token, stop + end.start, stop + end.end)

    def _tail_of_turn(self, index: int, stop: int, has_text: bool) -> str:
        """Return what the template writes after the turn's text when the conversation ends."""
        if index + 1 == len(self._dicts):
            return self.text[stop:]
        dicts = self._dicts[: index + 1]
        try:
            text = self._template.render(dicts, self._tools)
        except Refused as error:
            self._refuse(index, f"its end cannot be found: {error}")
        if text[:stop] == self.text[:stop]:
            return text[stop:]
        if not has_text:
            self._refuse(
                index, "it has no text of its own and the template rewrites what comes before it"
            )
        owners = self._follow(text, self._painting.messages[: index + 1])
        own = np.flatnonzero(owners[:, 0] == index)
        if not len(own):
            self._refuse(index, "the template drops it when nothing follows")
        return text[own[-1] + 1 :]

    def _find_end(self, index: int, start: int, stop: int, tail: str, has_text: bool) -> End | None:
        if not has_text or self._messages[index].tool_calls:
            # Closing tags stand between the text and the end: look at a plain answer's end.
            plain = self._around_plain(index)[1]
            end = self._specials.first_end(plain, "")
            if end is not None and tail.endswith(plain[end.start :]):
                shift = len(tail) - len(plain)
                return End(end.token, end.start + shift, end.end + shift)
            if not has_text:
                return None
        written = self._owners[start:stop, 0] == TEMPLATE
        text = self.text[start:stop]
        before = "".join(text[place] for place in np.flatnonzero(written))
        return self._specials.first_end(tail, before)

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
        for number, call in enumerate(message.tool_calls):
            name = call["function"]["name"]
            calls = [other["function"]["name"] for other in message.tool_calls]
            if CALLS + number not in parts and text.count(name) < calls.count(name):
                self._refuse(index, f"the template does not write its call of {name!r}")
            if _has_text(call["function"]["arguments"]) and max(parts, default=0) < CALLS:
                self._refuse(index, f"the template does not write the arguments of {name!r}")

    # Renderings around a turn.

    def _prompt(self, index: int, *, prompt: bool) -> str | None:
        """Return the rendering of what comes before message ``index``, or None if it fails."""
        try:
            return self._template.render(self._dicts[:index], self._tools, prompt=prompt)
        except Refused:
            return None

    def _tail_after_text(self, index: int, prompt: str) -> str:
        """Return the end of ``prompt`` after the last character of any message."""
        owners = self._follow(prompt, self._painting.messages[:index], prompt=True)
        written = np.flatnonzero(owners[:, 0] != TEMPLATE)
        return prompt[written[-1] + 1 :] if len(written) else prompt

    def _end_of_others(self, first: int | None, index: int) -> int:
        """Return the end of the last text of other messages before the turn's own."""
        if first is None:
            return 0
        others = (self._owners[:first, 0] != TEMPLATE) & (self._owners[:first, 0] != index)
        places = np.flatnonzero(others)
        return int(places[-1]) + 1 if len(places) else 0

    def _plain_header(self, index: int) -> str | None:
        """Return what the template adds between the prompt and a plain answer, or None."""
        prompt = self._prompt(index, prompt=True)
        gap = self._plain_gap(index)
        if prompt is None or gap is None:
            return None
        tail = self._tail_after_text(index, prompt)
        return gap[len(tail) :] if gap.startswith(tail) else None

    def _plain_gap(self, index: int, *, followed: bool = False) -> str | None:
        """Return what the template writes between other text and a plain answer, or None."""
        head = self._around_plain(index, followed=followed)[0]
        return None if head is None else head[self._painting.end_of_paint(head) :]

    def _around_plain(self, index: int, *, followed: bool = False) -> tuple[str | None, str]:
        """Return the painted text before a plain answer in this place, and what comes after."""
        plain = [*self._painting.messages[:index], {"role": "assistant", "content": _MARK}]
        try:
            text = self._template.render([*plain, *_QUESTION] if followed else plain, self._tools)
        except Refused:
            return None, ""
        head, found, tail = text.partition(_MARK)
        return (head, tail) if found and _MARK not in tail else (None, "")

    def _refuse(self, index: int, reason: str) -> NoReturn:
        raise Refused(f"message {index} ({self._messages[index].role}): {reason}")


def _has_text(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, Mapping):
        return any(_has_text(item) for item in value.values())
    return isinstance(value, list) and any(_has_text(item) for item in value)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
