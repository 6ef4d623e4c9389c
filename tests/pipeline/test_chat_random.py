"""Any record at random is a conversation or refused; what templates get parses back to itself."""

from __future__ import annotations

import datetime
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from chats import HALF, HELLO
from hermes_pipeline.chat import Refused, count_chars, parse, to_dict

TEXTS = st.sampled_from(["", " ", "a", "é🙂", "{", '{"name": "f"}', "<think>"])
ODD_TEXTS = TEXTS | st.sampled_from([HALF, "[]", "user", '[{"name": "f"}]'])
ODD_LEAVES = st.none() | st.booleans() | st.sampled_from([-1, 1, 0.5, float("nan"), 10**400])
KEYS = st.sampled_from(["name", "arguments", "function", "type", "text", "id", "city"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=2),
    max_leaves=4,
)
ODD = st.recursive(
    ODD_LEAVES | ODD_TEXTS | st.sampled_from([b"x", datetime.date(2025, 8, 25)]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.fixed_dictionaries(
    {"name": TEXTS, "arguments": st.dictionaries(KEYS, JSON, max_size=2)}, optional={"id": TEXTS}
)
ANSWERS = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": TEXTS},
    optional={
        "reasoning": TEXTS,
        "tool_calls": st.lists(CALLS, max_size=2),
        "train": st.booleans(),
        "train_spans": st.just([]),
    },
)
OTHERS = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "tool"]), "content": TEXTS},
    optional={"name": TEXTS, "tool_call_id": TEXTS},
)
FIELDS = ["content", "value", "from", "reasoning", "tool_calls", "function_call", "name", "train"]
ODD_TURNS = st.builds(
    lambda turn, odd: turn | odd,
    ANSWERS,
    st.dictionaries(st.sampled_from([*FIELDS, "train_spans", "role"]), ODD, max_size=2),
)
ODD_RECORDS = st.fixed_dictionaries(
    {"messages": st.lists(ANSWERS | OTHERS | ODD_TURNS, min_size=1, max_size=3)},
    optional=dict.fromkeys(("conversations", "system", "tools"), ODD),
)


@given(ODD_RECORDS | st.dictionaries(st.sampled_from(["messages", "prompt", "completion"]), ODD))
@settings(max_examples=300)
def test_any_record_is_a_conversation_or_refused(record: Any) -> None:
    try:
        conversation = parse(record)
    except Refused:
        return
    assert any(m.train and m.role == "assistant" for m in conversation.messages)
    assert count_chars(conversation) >= 0


@given(st.lists(ANSWERS | OTHERS, max_size=3))
@settings(max_examples=200)
def test_messages_for_templates_parse_back_to_themselves(turns: list[Any]) -> None:
    messages = parse({"messages": [*turns, HELLO]}).messages
    back = [to_dict(m) | {"train": m.train, "train_spans": m.train_spans} for m in messages]
    assert parse({"messages": back}).messages == messages
