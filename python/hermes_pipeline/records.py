"""What flows between the stages: frozen records, no behaviour, no files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Span = tuple[int, int]  # [start, end), in characters or in tokens as the field says


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str  # "system", "user", "assistant" or "tool"
    content: str = ""
    reasoning: str | None = None  # a thinking trace kept apart from the content
    tool_calls: tuple[Mapping[str, Any], ...] = ()  # {"type": "function", "function": {...}}
    name: str | None = None
    tool_call_id: str | None = None
    train: bool = False  # is this turn in the loss? True only for assistant turns
    train_spans: tuple[Span, ...] | None = None  # characters of `content` to train; None: all


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages worth learning, with where they came from."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    source: str = ""  # file and line, or data set and row


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation as token ids and loss mask."""

    token_ids: NDArray[np.uint32]  # [T]
    kept_spans: NDArray[np.uint32]  # [M, 2] disjoint, rising [start, end) of kept tokens


@dataclass(frozen=True, slots=True)
class Prompt:
    """Messages that ask for an answer, with the target its verifier will judge against."""

    key: str  # unique in its set
    messages: tuple[Message, ...]
    target: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Trace:
    """One generation of a model."""

    text: str  # everything the model wrote
    thinking: str  # between the thinking tags; all of it when they never close
    answer: str  # after the closing tag; "" when there is none
    finish_reason: str = "stop"
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Passed or not, a score in [0, 1], and the reason in words."""

    passed: bool
    score: float
    reason: str

    @classmethod
    def of(cls, passed: bool, reason: str) -> Verdict:
        """A verdict without shades: score 1 or 0."""
        return cls(passed, float(passed), reason)


@dataclass(frozen=True, slots=True)
class Score:
    """The result of one item of a benchmark."""

    key: str
    draw: int
    verdict: Verdict
    trace: Trace
    target: str
    error: str | None = None  # the request failed for good; not a wrong answer
