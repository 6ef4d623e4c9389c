"""Renderings beside the conversation's own, which show what a template would have done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hermes_pipeline.chat import Refused
from hermes_pipeline.tokenization.paint import TEMPLATE, Painting
from hermes_pipeline.tokenization.specials import Specials
from hermes_pipeline.tokenization.template import ChatTemplate, Messages

MARK = "\U0002fa1d"  # stands for an answer where only what surrounds it matters
QUESTION = ({"role": "user", "content": "x"},)
# Messages rendered for one conversation; a template that wants each turn looked at alone would
# take minutes for some thousand turns.
_MOST_MESSAGES = 2_000_000

Tools = Sequence[Mapping[str, Any]]


class Disagreement(Exception):
    """A painted rendering differs from the plain one."""


class TooManyTurns(Exception):
    """The conversation would take too long to follow turn by turn."""


class PromptStyle:
    """How a template opens an assistant turn for generation, found once."""

    def __init__(self, template: ChatTemplate, specials: Specials) -> None:
        self._template, self._specials = template, specials
        self._alone = self._added(())

    def prompt(self, tools: Tools) -> str:
        """Return what add_generation_prompt adds after a question; "" where nothing."""
        # Some templates render no conversation without tools.
        return (self._added(tools) if self._alone is None and tools else self._alone) or ""

    def _added(self, tools: Tools) -> str | None:
        try:
            closed = self._template.render(QUESTION, tools)
            opened = self._template.render(QUESTION, tools, prompt=True)
        except Refused:
            return None
        return opened[self._specials.common_prefix(opened, closed) :]


class Probe:
    """Renders parts and variants of one conversation, plain and painted.

    Args:
        dicts: the messages as the template takes them.
    """

    def __init__(self, template: ChatTemplate, dicts: Messages, tools: Tools) -> None:
        self._template, self._dicts, self._tools = template, dicts, tools
        self._rendered = 0
        self._prompts: dict[tuple[int, bool], str | None] = {}
        self.painting: Painting  # set before anything painted is asked for

    def whole(self) -> str:
        """Return the text of the conversation."""
        return self._render(self._dicts)

    def until(self, index: int) -> str:
        """Return the text when nothing follows message ``index``."""
        return self._render(self._dicts[: index + 1])

    def prompt(self, index: int, *, prompt: bool) -> str | None:
        """Return the text of what comes before message ``index``, or None if that fails."""
        key = (index, prompt)
        if key not in self._prompts:
            try:
                self._prompts[key] = self._render(self._dicts[:index], prompt=prompt)
            except Refused:
                self._prompts[key] = None
        return self._prompts[key]

    def owners(self, text: str, count: int, *, prompt: bool = False) -> NDArray[np.int32]:
        """Return who wrote each character of ``text``, the first ``count`` messages rendered.

        Raises:
            Disagreement: the template treats painted messages otherwise.
        """
        try:
            painted = self._render(self.painting.messages[:count], prompt=prompt)
        except Refused:
            raise Disagreement from None
        owners = self.painting.owners(text, painted)
        if owners is None:
            raise Disagreement
        return owners

    def tail_of_prompt(self, index: int, prompt: str) -> str:
        """Return the end of ``prompt`` after the last character of any message."""
        owners = self.owners(prompt, index, prompt=True)
        written = np.flatnonzero(owners[:, 0] != TEMPLATE)
        return prompt[written[-1] + 1 :] if len(written) else prompt

    def around_plain(self, index: int, *, followed: bool = False) -> tuple[str | None, str]:
        """Return the painted text before a plain answer as message ``index``, and what follows.

        The conversation ends there, or after one more question when ``followed``.
        """
        answer = {"role": "assistant", "content": MARK}
        messages = [*self.painting.messages[:index], answer, *(QUESTION if followed else ())]
        return self._around(messages)

    def in_place(self, index: int) -> tuple[str | None, str]:
        """Return the painted text before and after the content of message ``index``."""
        messages = list(self.painting.messages)
        messages[index] = {**messages[index], "content": MARK}
        return self._around(messages)

    def plain_gap(self, index: int, *, followed: bool = False) -> str | None:
        """Return what the template writes between other text and a plain answer, or None."""
        head = self.around_plain(index, followed=followed)[0]
        return None if head is None else head[self.painting.end_of_paint(head) :]

    def plain_header(self, index: int) -> str | None:
        """Return what the template adds between the prompt and a plain answer, or None."""
        prompt = self.prompt(index, prompt=True)
        gap = self.plain_gap(index)
        if prompt is None or gap is None:
            return None
        tail = self.tail_of_prompt(index, prompt)
        return gap[len(tail) :] if gap.startswith(tail) else None

    def _around(self, messages: Messages) -> tuple[str | None, str]:
        try:
            text = self._render(messages)
        except Refused:
            return None, ""
        head, found, tail = text.partition(MARK)
        return (head, tail) if found and MARK not in tail else (None, "")

    def _render(self, messages: Messages, *, prompt: bool = False) -> str:
        self._rendered += len(messages)
        if self._rendered > _MOST_MESSAGES:
            raise TooManyTurns
        return self._template.render(messages, self._tools, prompt=prompt)
