"""Chat templates, rendered as transformers renders them, and followed while they render.

Painted containers stand for tool calls: wherever the template turns one into JSON, the whole
JSON text carries the paint, braces included. See `paint`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hermes_pipeline.chat import Refused

Messages = Sequence[Mapping[str, Any]]


class PaintedDict(dict[str, Any]):
    """A dict whose JSON text is painted."""

    plain: Mapping[str, Any]
    paint: Callable[[str], str]


class PaintedList(list[Any]):
    """A list whose JSON text is painted."""

    plain: Sequence[Any]
    paint: Callable[[str], str]


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` is known to templates; it changes nothing in the text."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_same")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _same(self, caller: jinja2.runtime.Macro) -> str:
        return caller()


class ChatTemplate:
    """A compiled chat template.

    Args:
        text: Jinja source.
        special_tokens: what the template may name, such as ``bos_token``.
        date: what ``strftime_now`` tells, so that the same data gives the same bytes later.
    """

    def __init__(self, text: str, *, special_tokens: Mapping[str, Any], date: datetime) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = date.strftime
        try:
            self._template = environment.from_string(text)
            tree = environment.parse(text)
        except jinja2.TemplateError as error:
            raise Refused(f"the chat template does not compile: {error}") from None
        self._special_tokens = dict(special_tokens)
        constants = {node.value for node in tree.find_all(jinja2.nodes.Const)}
        # Texts that the template may look for, longest first.
        self.constants = tuple(
            sorted(
                (text for text in constants if isinstance(text, str) and text.strip()),
                key=lambda text: (-len(text), text),
            )
        )

    def render(
        self, messages: Messages, tools: Sequence[Mapping[str, Any]], *, prompt: bool = False
    ) -> str:
        """Return the text of ``messages``, with the generation prompt when ``prompt``.

        Thoughts of earlier turns are kept where the template leaves that to ``keep_cots``.

        Raises:
            Refused: with the template's own words.
        """
        try:
            return self._template.render(
                messages=list(messages),
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=prompt,
                keep_cots=True,
                **self._special_tokens,
            )
        except _Raised as error:
            raise Refused(f"the chat template refuses: {error}") from None
        except MemoryError:
            raise
        except Exception as error:  # a template is a program of somebody else's
            raise Refused(f"the chat template fails: {type(error).__name__}: {error}") from None


class _Raised(jinja2.TemplateError):
    """The template called raise_exception."""


def _raise_exception(message: str) -> None:
    raise _Raised(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    painted = isinstance(value, PaintedDict | PaintedList)
    text = json.dumps(
        value.plain if painted else value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
    return value.paint(text) if painted else text
