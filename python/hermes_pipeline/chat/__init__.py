"""Conversations in every common form, parsed into records; messages back out for templates.

No file is opened here and nothing is rendered: `services.hub` reads, `tokenization` renders.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hermes_pipeline.chat.calls import calls_in, tool_calls_of, tools_of
from hermes_pipeline.chat.values import Refused, checked_text, kind_of, shortened
from hermes_pipeline.records import Conversation, Message, Span

__all__ = ["Refused", "count_chars", "parse", "parse_json", "parse_prompt", "to_dict"]

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "claude": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool_results": "tool",
    "function_call": "call",
    "tool_call": "call",
}
_PAIRS = (
    ("question", "answer"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
)
_FORMS = (
    "messages, conversations, question and answer, prompt and response or completion, "
    "instruction and output"
)
_TURNS = ("messages", "conversations", "conversation")
_SWITCHES = ("train", "loss_weight", "weight")


def parse_json(line: bytes) -> Any:
    """Return what one line of JSON holds.

    Raises:
        Refused: the line is not UTF-8 or not JSON.
    """
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Refused(f"invalid UTF-8 at byte {error.start} of the line") from None
    except RecursionError:
        raise Refused("JSON nested too deeply") from None
    except ValueError as error:
        raise Refused(f"broken JSON: {error}") from None


def parse(record: object, source: str = "") -> Conversation:
    """Return the conversation in ``record``; extra keys are fine.

    Args:
        record: an object with ``messages`` (role and content), with ``conversations`` (ShareGPT:
            from and value), or with one of the pairs question/answer, prompt/response,
            prompt/completion, instruction/output; ``system`` and ``tools`` may stand beside.
            An assistant message may carry ``train`` (or ``loss_weight`` or ``weight``, 0 or 1)
            and ``train_spans``, [start, end) in characters of its content.

    Raises:
        Refused: no known form or two at once, an unknown role, or nothing to train.
    """
    messages, tools = _read(record, _turns)
    if not any(message.role == "assistant" for message in messages):
        raise Refused("nothing to train: no assistant message")
    if not any(message.train for message in messages):
        raise Refused("nothing to train: every assistant message is switched off")
    return Conversation(messages, tools, source)


def parse_prompt(record: object, source: str = "") -> Conversation:
    """Return what is to be answered: the conversation, without an assistant turn at its end.

    Takes what `parse` takes, and a question, prompt or instruction without its answer.

    Raises:
        Refused: no known form or two at once, an unknown role, or nothing to answer.
    """
    messages, tools = _read(record, _asked_turns)
    asked = messages[:-1] if messages[-1].role == "assistant" else messages
    if not asked:
        raise Refused("nothing to answer: an assistant message alone")
    return Conversation(asked, tools, source)


def count_chars(conversation: Conversation) -> int:
    """Return the characters of all messages: content, reasoning and calls."""
    total = 0
    for message in conversation.messages:
        total += len(message.content) + len(message.reasoning or "")
        if message.tool_calls:
            total += len(json.dumps(message.tool_calls, ensure_ascii=False))
    return total


def to_dict(message: Message, *, no_content: object = "") -> dict[str, Any]:
    """Return ``message`` as chat templates want it; absent fields have no key.

    A reasoning trace goes by the three names that templates look for. ``no_content`` stands for
    the content of a turn of tool calls that has none.
    """
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [dict(call) for call in message.tool_calls]
        if not message.content:
            turn["content"] = no_content
    if message.reasoning is not None:
        for key in ("reasoning", "reasoning_content", "thinking"):
            turn[key] = message.reasoning
    if message.name is not None:
        turn["name"] = message.name
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _read(
    record: object, find_turns: Callable[[Mapping[str, Any]], list[Any]]
) -> tuple[tuple[Message, ...], tuple[Mapping[str, Any], ...]]:
    if not isinstance(record, Mapping):
        raise Refused(f"a record must be a JSON object, not {kind_of(record)}")
    turns = find_turns(record)
    if not turns:
        raise Refused("the conversation is empty")
    messages = [_message(index, turn) for index, turn in enumerate(turns)]
    system = record.get("system")
    if system:
        if not isinstance(system, str):
            raise Refused(f"system must be a string, not {kind_of(system)}")
        if messages[0].role == "system":
            raise Refused("a system field and a system message: leave one out")
        messages.insert(0, Message("system", checked_text(system, "system")))
    return tuple(messages), tools_of(record.get("tools"))


def _asked_turns(record: Mapping[str, Any]) -> list[Any]:
    """The turns, where one of a pair may stand alone: its answer is not there yet."""
    there = {key for key, value in record.items() if value is not None}
    whole = there & set(_TURNS) or any(there >= set(pair) for pair in _PAIRS)
    for ask, answer in () if whole else _PAIRS:
        if ask in there:
            nothing = [] if isinstance(record[ask], list) else ""
            return _pair({**record, answer: nothing}, ask, answer)
    return _turns(record)


def _turns(record: Mapping[str, Any]) -> list[Any]:
    given = [key for key in _TURNS if record.get(key) is not None]
    if len(given) > 1:
        raise Refused(f"both {given[0]} and {given[1]}: leave one out")
    for key in given:
        turns = record[key]
        if not isinstance(turns, Sequence) or isinstance(turns, str | bytes):
            raise Refused(f"{key} must be a list of messages, not {kind_of(turns)}")
        return list(turns)
    for ask, answer in _PAIRS:
        if record.get(ask) is not None and record.get(answer) is not None:
            return _pair(record, ask, answer)
    keys = ", ".join(sorted(str(key) for key in record)) or "none"
    raise Refused(f"no known form; known: {_FORMS}; the record's keys: {keys[:200]}")


def _pair(record: Mapping[str, Any], ask: str, answer: str) -> list[Any]:
    first, second = record[ask], record[answer]
    if isinstance(first, list) and isinstance(second, list):
        # Messages on both sides: those of the prompt are given, not learnt.
        given = [{**turn, "train": False} if _is_assistant(turn) else turn for turn in first]
        return [*given, *second]
    has_input = ask == "instruction" and record.get("input")
    for key in (ask, answer, "input") if has_input else (ask, answer):
        if not isinstance(record[key], str):
            raise Refused(f"{key} must be a string, not {kind_of(record[key])}")
    if has_input:
        first = f"{first}\n\n{record['input']}"
    return [{"role": "user", "content": first}, {"role": "assistant", "content": second}]


def _is_assistant(turn: object) -> bool:
    return isinstance(turn, Mapping) and _role(_named(turn)) in ("assistant", "call")


def _named(turn: Mapping[str, Any]) -> object:
    return turn["role"] if turn.get("role") is not None else turn.get("from")


def _role(named: object) -> str | None:
    return _ROLES.get(named.strip().lower()) if isinstance(named, str) else None


def _message(index: int, turn: object) -> Message:
    if not isinstance(turn, Mapping):
        raise Refused(f"message {index}: must be an object, not {kind_of(turn)}")
    named = _named(turn)
    if named is None:
        raise Refused(f"message {index}: has neither role nor from")
    role = _role(named)
    if role is None:
        known = ", ".join(_ROLES)
        raise Refused(f"message {index}: role {shortened(named)} is not known; known: {known}")
    where = f"message {index} ({'assistant' if role == 'call' else role})"
    content = turn["content"] if turn.get("content") is not None else turn.get("value")
    text = _content(content, where)
    calls = tool_calls_of(turn.get("tool_calls"), where)
    if role == "assistant" and turn.get("function_call"):
        calls += tool_calls_of([turn["function_call"]], where)
    if role == "call":
        role, calls, text = "assistant", calls + calls_in(text, where), ""
    if calls and role != "assistant":
        raise Refused(f"{where}: only an assistant message has tool_calls")
    reasoning = _reasoning(turn, where) if role == "assistant" else None
    if content is None and not calls and reasoning is None:
        raise Refused(f"{where}: has neither content nor value")
    return Message(
        role=role,
        content=text,
        reasoning=reasoning,
        tool_calls=calls,
        name=_optional(turn, "name", where),
        tool_call_id=_optional(turn, "tool_call_id", where),
        train=_trained(turn, role, where),
        train_spans=_spans(turn.get("train_spans"), role, len(text), where),
    )


def _content(content: object, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return checked_text(content, where)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise Refused(
            f"{where}: content must be a string or a list of parts, not {kind_of(content)}"
        )
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, Mapping) else kind_of(part)
            raise Refused(f"{where}: a content part of type {kind!r}; only text is known")
    return checked_text("".join(texts), where)


def _reasoning(turn: Mapping[str, Any], where: str) -> str | None:
    for key in ("reasoning_content", "reasoning", "thinking"):
        value = _optional(turn, key, where)
        if value:
            return value
    return None


def _optional(turn: Mapping[str, Any], key: str, where: str) -> str | None:
    value = turn.get(key)
    if value is not None and not isinstance(value, str):
        raise Refused(f"{where}: {key} must be a string, not {kind_of(value)}")
    return None if value is None else checked_text(value, where)


def _trained(turn: Mapping[str, Any], role: str, where: str) -> bool:
    for key in _SWITCHES:
        value = turn.get(key)
        if value is None:
            continue
        if value not in (0, 1):
            raise Refused(
                f"{where}: {key} is {shortened(value)}; only 0, 1, true and false are known"
            )
        if value and role != "assistant":
            raise Refused(f"{where}: {key} is {value!r}, but only assistant messages are trained")
        return bool(value)
    return role == "assistant"


def _spans(spans: object, role: str, length: int, where: str) -> tuple[Span, ...] | None:
    if spans is None:
        return None
    if role != "assistant":
        raise Refused(f"{where}: train_spans, but only assistant messages are trained")
    if not isinstance(spans, Sequence) or isinstance(spans, str):
        raise Refused(f"{where}: train_spans must be a list of [start, end], not {kind_of(spans)}")
    parsed: list[Span] = []
    last = 0
    for span in spans:
        pair = list(span) if isinstance(span, Iterable) else []
        if len(pair) != 2 or not all(type(edge) is int for edge in pair):
            raise Refused(
                f"{where}: train_spans holds {shortened(span)}; want [start, end] in characters"
            )
        start, end = pair
        if not last <= start < end <= length:
            raise Refused(
                f"{where}: train_spans holds [{start}, {end}]; want rising, disjoint spans inside "
                f"the content of {length} characters"
            )
        parsed.append((start, end))
        last = end
    return tuple(parsed)
