"""What goes over the wire to an OpenAI-compatible server, and what its replies say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import orjson

from hermes_pipeline.config import Range
from hermes_pipeline.records import Message

CHAT, COMPLETIONS = "/chat/completions", "/completions"
# A server that is stopped says "abort", with status 200 and half of an answer: vLLM at SIGTERM.
CUT = frozenset({"abort", "error"})
READ = 4_000  # characters of a server's message; fewer are shown, once the key is out of them
# Fields of a request that are not for `Sampling.extra`, and why.
_OWN = ("temperature", "top_p", "max_tokens", "top_k", "min_p", "stop", "logprobs")
NOT_EXTRA = {name: f"give sampling.{name}" for name in _OWN} | {
    "top_logprobs": "give sampling.logprobs",
    "model": "give model.name",
    "n": "give run.draws, or benchmark.draws",
    "seed": "give run.seed",
    "messages": "the data has them",
    "prompt": "the data has it",
    "stream": "answers are read whole",
}


class BrokenReply(Exception):
    """A reply that was cut, or is something else than an answer."""


Share = Annotated[float, Range(low=0, high=1)]


@dataclass(frozen=True, slots=True)
class Sampling:
    """[sampling]: how a model draws its answers; None leaves the choice to the server."""

    temperature: Annotated[float, Range(low=0)] | None = 0.6
    top_p: Share | None = 0.95
    max_tokens: Annotated[int, Range(low=1)] | None = None  # of one answer
    # vLLM and SGLang take these two; hosted services refuse them.
    top_k: Annotated[int, Range(low=-1)] | None = None
    min_p: Share | None = None
    stop: tuple[str, ...] = ()
    # How many likely tokens beside each chosen one; 0: that one alone.
    logprobs: Annotated[int, Range(low=0)] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)  # sent as it stands

    def __post_init__(self) -> None:
        for name in self.extra:
            if name in NOT_EXTRA:
                raise ValueError(f"extra must not hold {name!r}: {NOT_EXTRA[name]}")
        try:
            orjson.dumps(dict(self.extra), option=orjson.OPT_PASSTHROUGH_DATETIME)
        except TypeError as error:
            raise ValueError(f"extra cannot be written as JSON: {error}") from None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token of an answer and its logarithmic probability, base e."""

    token: str
    logprob: float | None  # None for the first token of an echoed prompt
    top: tuple[tuple[str, float], ...]  # likely tokens there; different ones may read the same


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer of a model."""

    text: str
    finish_reason: str  # "stop", "length", "tool_calls", ...
    completion_tokens: int | None = None  # None when several answers share one count
    prompt_tokens: int | None = None  # of the request, which several answers share
    tries: int = 1  # how often the request was sent
    tool_calls: tuple[Mapping[str, Any], ...] = ()  # as the server parsed them
    logprobs: tuple[TokenLogprob, ...] | None = None  # where asked for


@dataclass(frozen=True, slots=True)
class Answer:
    """All answers to one request, and the tokens it cost."""

    replies: list[Reply]
    prompt_tokens: int
    completion_tokens: int

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def after(self, failures: int) -> Answer:
        """The answer, had by as many tries more."""
        if not failures:
            return self
        replies = [replace(reply, tries=failures + 1) for reply in self.replies]
        return replace(self, replies=replies)


def chat_body(messages: Sequence[Message], sampling: Sampling) -> dict[str, Any]:
    """The fields of a chat request that its messages and sampling decide."""
    body: dict[str, Any] = {"messages": [_message(message) for message in messages]}
    if sampling.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": sampling.logprobs}
    return body | _sampling_fields(sampling)


def completion_body(prompt: str | Sequence[int], sampling: Sampling) -> dict[str, Any]:
    """The fields of a request for raw continuations."""
    body: dict[str, Any] = {"prompt": prompt if isinstance(prompt, str) else list(prompt)}
    if sampling.logprobs is not None:
        body["logprobs"] = sampling.logprobs
    return body | _sampling_fields(sampling)


def read_answer(content: bytes) -> Answer:
    """The answers in a reply's body, in the order of their index.

    Raises:
        BrokenReply: it was cut, or is something else.
    """
    try:
        reply = orjson.loads(content)
        choices = reply["choices"]
        usage = reply.get("usage") or {}
        prompt, tokens = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
        if len(choices) > 1:
            choices = sorted(choices, key=lambda choice: choice.get("index") or 0)
        each = tokens if len(choices) == 1 else None
        replies = [_reply(choice, prompt, each) for choice in choices]
        if replies and not any(reply.finish_reason in CUT for reply in replies):
            return Answer(replies, prompt or 0, tokens or 0)
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise BrokenReply(f"a reply that is not whole: {_read(content)}")


def read_refusal(content: bytes) -> tuple[str, str]:
    """What a server says about an error, in one line, and its code; in the forms servers say it."""
    try:
        reply = orjson.loads(content)
        error = reply.get("error") or reply
        if not isinstance(error, dict):
            return _line(str(error)), ""
        said = error.get("message") or error.get("detail") or reply
        return _line(str(said)), str(error.get("code") or error.get("type") or "")
    except (ValueError, AttributeError):
        return _read(content) or "no message", ""


def _sampling_fields(sampling: Sampling) -> dict[str, Any]:
    fields = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "stop": sampling.stop or None,
    }
    return {name: value for name, value in fields.items() if value is not None} | dict(
        sampling.extra
    )


def _message(message: Message) -> dict[str, Any]:
    wire: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        wire["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    if message.name is not None:
        wire["name"] = message.name
    if message.tool_call_id is not None:
        wire["tool_call_id"] = message.tool_call_id
    return wire


def _tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call with its arguments as a string of JSON, as servers want them back."""
    function = dict(call["function"])
    if not isinstance(function.get("arguments"), str):
        function["arguments"] = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
    return dict(call) | {"function": function}


def _reply(choice: Mapping[str, Any], prompt_tokens: int | None, tokens: int | None) -> Reply:
    message = choice.get("message")
    logprobs, reason = choice.get("logprobs"), choice.get("finish_reason")
    return Reply(
        text=_content(choice["text"])[0] if message is None else _text(message),
        finish_reason=reason if isinstance(reason, str) and reason else "unknown",
        completion_tokens=tokens,
        prompt_tokens=prompt_tokens,
        tool_calls=() if message is None else _calls(message),
        logprobs=None if logprobs is None else _logprobs(logprobs),
    )


def _text(message: Mapping[str, Any]) -> str:
    """All a model wrote, also where a server has put its thinking or its refusal apart."""
    content, apart = _content(message.get("content") or message.get("refusal") or "")
    thinking = message.get("reasoning_content") or message.get("reasoning") or apart
    if not thinking:
        return content
    return f"<think>{thinking}" + (f"</think>{content}" if content else "")


def _count(value: object) -> int | None:
    """A number of tokens, in whatever type a server writes it; None where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        count = int(value)
    except (ValueError, OverflowError):
        return None
    return count if 0 <= count < 2**63 else None


def _calls(message: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    calls = tuple(message.get("tool_calls") or ())
    if not all(isinstance(call, dict) for call in calls):
        raise TypeError("a tool call is no object")
    return calls


def _content(content: object) -> tuple[str, str]:
    """What was said and what was thought: a string, or parts of these kinds."""
    if isinstance(content, str):
        return content, ""
    if not isinstance(content, list):
        raise TypeError(f"content is {type(content).__name__}")
    said, thought = "", ""
    for part in content:
        if part["type"] == "thinking":
            inner = part["thinking"]
            thought += inner if isinstance(inner, str) else "".join(each["text"] for each in inner)
        else:
            said += part["text"]
    return said, thought


def _logprobs(logprobs: Mapping[str, Any]) -> tuple[TokenLogprob, ...]:
    """One form for both: chat sends a list of objects, completions send columns."""
    if "tokens" not in logprobs:
        return tuple(
            TokenLogprob(
                each["token"],
                each["logprob"],
                tuple((top["token"], top["logprob"]) for top in each.get("top_logprobs") or ()),
            )
            for each in logprobs["content"] or ()
        )
    tokens = logprobs["tokens"]
    tops = logprobs.get("top_logprobs") or [None] * len(tokens)
    columns = zip(tokens, logprobs["token_logprobs"], tops, strict=True)
    return tuple(
        TokenLogprob(token, logprob, tuple((top or {}).items())) for token, logprob, top in columns
    )


def _read(content: bytes) -> str:
    return _line(content[:READ].decode(errors="replace"))


def _line(text: str) -> str:
    return " ".join(text.split())[:READ]
