"""Conversations to samples: token ids and the exact mask of what a model has to write."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from hermes_pipeline.chat import Refused, to_dict
from hermes_pipeline.records import Conversation, Message, Sample, Span
from hermes_pipeline.tokenization.encode import Encoder
from hermes_pipeline.tokenization.keep import kept_spans
from hermes_pipeline.tokenization.probe import PromptStyle
from hermes_pipeline.tokenization.specials import Specials
from hermes_pipeline.tokenization.template import ChatTemplate
from hermes_pipeline.tokenization.turns import Reader

__all__ = ["Rendering", "Tokenization", "TokenizerState", "template_fingerprint"]


_NOTHING = "nothing to train: no character is kept"
_USER = Message("user", "Why?")
_ANSWER = Message("assistant", "Because.", train=True)


@dataclass(frozen=True, slots=True)
class TokenizerState:
    """A fast tokenizer as plain data, cheap to hand to another process."""

    backend: str  # the `tokenizers` object as JSON
    named_tokens: Mapping[str, Any]  # bos_token, eos_token, ...: what templates may name
    special_tokens: tuple[str, ...]  # texts of the tokens that are special

    @classmethod
    def of(cls, tokenizer: Any) -> TokenizerState:
        """Return the state of a fast transformers tokenizer."""
        return cls(
            backend=tokenizer.backend_tokenizer.to_str(),
            named_tokens=dict(tokenizer.special_tokens_map),
            special_tokens=tuple(
                token.content for token in tokenizer.added_tokens_decoder.values() if token.special
            ),
        )


@dataclass(frozen=True, slots=True)
class Rendering:
    """A conversation as text, with the characters that are kept."""

    text: str
    kept: tuple[Span, ...]  # disjoint, rising
    ends: tuple[tuple[int, str], ...]  # place after each kept end-of-turn token, and the token


class Tokenization:
    """Renders and tokenizes conversations for one tokenizer and one chat template.

    Args:
        tokenizer: plain data of it, see `TokenizerState.of`.
        template: Jinja source of the chat template.
        date: the day that templates are told, YYYY-MM-DD.

    Raises:
        Refused: the template does not compile.
    """

    def __init__(self, tokenizer: TokenizerState, template: str, *, date: str) -> None:
        named = tokenizer.named_tokens
        self._template = ChatTemplate(
            template, special_tokens=named, date=datetime.fromisoformat(date)
        )
        texts = [token for token in named.values() if isinstance(token, str)]
        self._specials = Specials([*tokenizer.special_tokens, *texts], named.get("eos_token"))
        self._style = PromptStyle(self._template, self._specials)
        self.encoder = Encoder(tokenizer.backend)

    def end_tokens(self) -> list[str]:
        """Return the tokens that end a turn: the template's in a plain answer, then eos."""
        question = Conversation((_USER, _ANSWER))
        try:
            ends = [token for _, token in self.render(question).ends]
        except Refused:
            ends = []
        eos = self._specials.eos
        return list(dict.fromkeys([*ends, *([eos] if eos else [])]))

    def render(self, conversation: Conversation) -> Rendering:
        """Return the text of ``conversation`` and the exact characters to keep.

        Raises:
            Refused: they cannot be told exactly; the message names the message and the reason.
        """
        messages = conversation.messages
        first: Refused | None = None
        # Some templates want no content at all, rather than an empty one, beside tool calls.
        bare = any(message.tool_calls and not message.content for message in messages)
        for no_content in ("", None) if bare else ("",):
            dicts = [to_dict(message, no_content=no_content) for message in messages]
            try:
                reader = Reader(
                    self._template,
                    self._specials,
                    self._style,
                    messages,
                    dicts,
                    conversation.tools,
                )
                turns = reader.turns()
            except Refused as error:
                first = first or error
                continue
            kept: list[Span] = []
            ends: list[tuple[int, str]] = []
            for turn in turns:
                spans = kept_spans(reader.text, turn, messages[turn.message])
                kept += spans
                if spans and spans[-1][1] == turn.end:
                    ends.append((turn.end, turn.end_token))
            if not kept:
                raise Refused(_NOTHING)
            return Rendering(reader.text, tuple(kept), tuple(ends))
        raise first or Refused("nothing to render")

    def sample(self, conversation: Conversation) -> Sample:
        """Return the tokens of ``conversation`` and the spans of those to learn.

        Raises:
            Refused: as `render` and `tokens`.
        """
        return self.tokens(self.render(conversation))

    def tokens(self, rendering: Rendering) -> Sample:
        """Return the sample of a rendering.

        Raises:
            Refused: a token cannot be cut at the edge of a turn, or none is kept.
        """
        ids, spans = self.encoder.encode(rendering.text, rendering.kept, rendering.ends)
        if not len(spans):
            raise Refused(_NOTHING)
        return Sample(token_ids=ids, kept_spans=spans)


def template_fingerprint(template: str) -> str:
    """Return the sha256 of a template's text."""
    return hashlib.sha256(template.encode()).hexdigest()
