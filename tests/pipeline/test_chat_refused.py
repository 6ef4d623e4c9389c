"""What is no conversation, no prompt or no line of JSON is refused, in words that say why."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pytest

from chats import CALL, HALF, HELLO, HI
from hermes_pipeline.chat import Refused, parse, parse_json, parse_prompt

DEEP = "[" * 100_000  # deeper than any parser follows


def refusal(record: Any) -> str:
    """Why a record is refused."""
    with pytest.raises(Refused) as caught:
        parse(record)
    return str(caught.value)


def refusal_of(**fields: Any) -> str:
    """Why an assistant message with these fields is refused."""
    return refusal({"messages": [HI, {"role": "assistant", **fields}]})


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (["Hi"], "a record must be a JSON object, not a list"),
        ("Hi", "a record must be a JSON object, not a string"),
        (3, "a record must be a JSON object, not a number"),
        (None, "a record must be a JSON object, not null"),
        ({"messages": []}, "the conversation is empty"),
        ({"prompt": [], "completion": []}, "the conversation is empty"),
        ({"messages": "Hi"}, "messages must be a list of messages, not a string"),
        (
            {"conversations": {"from": ["human"]}},
            "conversations must be a list of messages, not an object",
        ),
        (
            {"messages": [HI, HELLO], "conversations": [HI, HELLO]},
            "both messages and conversations: leave one out",
        ),
        (
            {"messages": [], "conversation": [HI, HELLO]},
            "both messages and conversation: leave one out",
        ),
        ({"question": "Hi", "answer": 3}, "answer must be a string, not a number"),
        ({"prompt": [HI], "completion": "Hello."}, "prompt must be a string, not a list"),
        ({"prompt": "Hi", "completion": [HELLO]}, "completion must be a string, not a list"),
        (
            {"instruction": "Add.", "input": [1, 2], "output": "3"},
            "input must be a string, not a list",
        ),
        ({"messages": [HI]}, "nothing to train: no assistant message"),
        (
            {"messages": [HI, HELLO | {"train": 0}]},
            "nothing to train: every assistant message is switched off",
        ),
        ({"messages": [HI, HELLO], "system": 5}, "system must be a string, not a number"),
        (
            {"messages": [{"role": "developer", "content": "x"}, HELLO], "system": "x"},
            "a system field and a system message: leave one out",
        ),
        (
            {"messages": [HI, HELLO], "system": f"x{HALF}"},
            "system: half a surrogate pair at character 1",
        ),
        ({"messages": [HI, "Hello."]}, "message 1: must be an object, not a string"),
        ({"prompt": [HI, 5], "completion": [HELLO]}, "message 1: must be an object, not a number"),
        ({"messages": [HI, {"content": "x"}]}, "message 1: has neither role nor from"),
        (
            {"messages": [{"role": "user"}, HELLO]},
            "message 0 (user): has neither content nor value",
        ),
        (
            {"messages": [HI, {"role": "tool", "content": "21", "tool_calls": [CALL]}]},
            "message 1 (tool): only an assistant message has tool_calls",
        ),
        (
            {"messages": [HI | {"train": True}, HELLO]},
            "message 0 (user): train is True, but only assistant messages are trained",
        ),
        (
            {"messages": [HI | {"train_spans": [[0, 1]]}, HELLO]},
            "message 0 (user): train_spans, but only assistant messages are trained",
        ),
        (
            {"messages": [HI | {"name": ["x"]}, HELLO]},
            "message 0 (user): name must be a string, not a list",
        ),
        ({"messages": [HI, HELLO], "tools": "{"}, "tools must be a JSON list; the string is not"),
        ({"messages": [HI, HELLO], "tools": DEEP}, "tools must be a JSON list; the string is not"),
        ({"messages": [HI, HELLO], "tools": 5}, "tools must be a list, not a number"),
        ({"messages": [HI, HELLO], "tools": ["x"]}, "a tool must be an object, not a string"),
        (
            {"messages": [HI, HELLO], "tools": [{"name": "x", "since": datetime.date.today()}]},
            "tools are not JSON: Object of type date is not JSON serializable",
        ),
        (
            {"messages": [HI, HELLO], "tools": [{"name": HALF}]},
            "tools: half a surrogate pair at character ",
        ),
    ],
)
def test_a_bad_record_is_refused(record: Any, words: str) -> None:
    assert refusal(record).startswith(words)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"content": None}, "has neither content nor value"),
        ({"text": "Hello."}, "has neither content nor value"),
        ({"content": 5}, "content must be a string or a list of parts, not a number"),
        ({"content": {"text": "x"}}, "content must be a string or a list of parts, not an object"),
        ({"content": b"x"}, "content must be a string or a list of parts, not bytes"),
        ({"content": [{"type": "image"}]}, "a content part of type 'image'; only text is known"),
        ({"content": [{"type": "text", "text": 5}]}, "a content part of type 'text'; only text"),
        ({"content": ["x", 5]}, "a content part of type 'a number'; only text is known"),
        ({"content": f"ab{HALF}"}, "half a surrogate pair at character 2"),
        ({"content": "x", "reasoning": 5}, "reasoning must be a string, not a number"),
        ({"content": "x", "thinking": HALF}, "half a surrogate pair at character 0"),
        ({"content": "x", "tool_call_id": 5}, "tool_call_id must be a string, not a number"),
        ({"tool_calls": 5}, "tool_calls must be a list, not a number"),
        ({"tool_calls": CALL}, "tool_calls must be a list, not an object"),
        ({"tool_calls": "weather()"}, "a function call must be JSON, not 'weather()'"),
        ({"tool_calls": DEEP}, "a function call must be JSON, not '[[[["),
        ({"tool_calls": ["weather"]}, "a tool call needs a function with a name and arguments"),
        ({"tool_calls": [{"name": 5}]}, "a tool call needs a function with a name and arguments"),
        ({"function_call": "weather"}, "a tool call needs a function with a name and arguments"),
        (
            {"tool_calls": [{"name": "x", "arguments": "{"}]},
            "arguments of the call 'x' are not JSON",
        ),
        (
            {"tool_calls": [{"name": "x", "arguments": DEEP}]},
            "arguments of the call 'x' are not JSON",
        ),
        (
            {"tool_calls": [{"name": "x", "arguments": [1]}]},
            "arguments of the call 'x' must be an object, not a list",
        ),
        (
            {"tool_calls": [{"name": "x", "arguments": {"a": datetime.date.today()}}]},
            "arguments of the call 'x' are not JSON: Object of type date is not JSON serializable",
        ),
        (
            {"tool_calls": [{"name": "x", "arguments": {"a": float("nan")}}]},
            "arguments of the call 'x' are not JSON: Out of range float values",
        ),
        (
            {"tool_calls": [{"name": "x", "arguments": {"a": HALF}}]},
            "arguments of the call 'x': half a surrogate pair at character ",
        ),
        ({"tool_calls": [CALL | {"id": HALF}]}, "half a surrogate pair at character 0"),
        ({"content": "x", "train": 0.5}, "train is 0.5; only 0, 1, true and false are known"),
        ({"content": "x", "weight": "1"}, "weight is '1'; only 0, 1, true and false are known"),
        ({"content": "x", "loss_weight": [1]}, "loss_weight is [1]; only 0, 1, true and false"),
    ],
)
def test_a_bad_message_is_refused_by_its_number(fields: Any, words: str) -> None:
    assert refusal_of(**fields).startswith(f"message 1 (assistant): {words}")


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ("ab", "train_spans must be a list of [start, end], not a string"),
        ({"0": 1}, "train_spans must be a list of [start, end], not an object"),
        ([5], "train_spans holds 5; want [start, end] in characters"),
        (["ab"], "train_spans holds 'ab'; want [start, end] in characters"),
        ([[0, 1, 2]], "train_spans holds [0, 1, 2]; want [start, end] in characters"),
        ([[0, True]], "train_spans holds [0, True]; want [start, end] in characters"),
        ([[0, 1.0]], "train_spans holds [0, 1.0]; want [start, end] in characters"),
        ([[0, 6]], "train_spans holds [0, 6]; want rising, disjoint spans inside the content of 5"),
        ([[-1, 2]], "train_spans holds [-1, 2]; want rising, disjoint spans"),
        ([[2, 2]], "train_spans holds [2, 2]; want rising, disjoint spans"),
        ([[3, 1]], "train_spans holds [3, 1]; want rising, disjoint spans"),
        ([[0, 3], [2, 4]], "train_spans holds [2, 4]; want rising, disjoint spans"),
        ([[3, 4], [0, 1]], "train_spans holds [0, 1]; want rising, disjoint spans"),
    ],
)
def test_bad_spans_are_refused(spans: Any, words: str) -> None:
    assert refusal_of(content="abcde", train_spans=spans).startswith(
        f"message 1 (assistant): {words}"
    )


def test_an_unknown_role_is_named_beside_the_known_ones() -> None:
    words = refusal({"messages": [HI, {"role": "assistnt", "content": "x"}]})
    assert words.startswith("message 1: role 'assistnt' is not known; known: system, developer,")


@pytest.mark.parametrize("value", ["x" * 1000, [1] * 1000, json.loads("[" * 900 + "]" * 900)])
def test_a_huge_value_is_named_in_a_short_reason(value: Any) -> None:
    assert len(refusal({"messages": [HI, {"role": value, "content": "x"}]})) < 400
    assert len(refusal_of(content="x", train=value)) < 200
    assert len(refusal_of(content="x", train_spans=[value])) < 200


def test_no_known_form_names_the_known_ones_and_the_keys() -> None:
    assert refusal({"text": "Hi", "id": 3}) == (
        "no known form; known: messages, conversations, question and answer, prompt and response "
        "or completion, instruction and output; the record's keys: id, text"
    )
    assert refusal({}).endswith("the record's keys: none")


@pytest.mark.parametrize("depth", [65, 900])
def test_what_is_nested_too_deeply_to_follow_is_refused(depth: int) -> None:
    deep = json.loads('{"a": ' * depth + "1" + "}" * depth)
    call = {"name": "x", "arguments": deep}
    assert refusal_of(tool_calls=[call]).endswith("are nested more than 64 deep")
    assert refusal({"messages": [HI, HELLO], "tools": deep}) == "tools are nested more than 64 deep"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [HELLO]}, "nothing to answer: an assistant message alone"),
        ({"messages": []}, "the conversation is empty"),
        ({"text": "Hi"}, "no known form"),
        ({"prompt": 3}, "prompt must be a string, not a number"),
        ({"messages": [HI], "conversations": [HI]}, "both messages and conversations"),
        ([HI], "a record must be a JSON object"),
    ],
)
def test_what_cannot_be_answered_is_refused(record: Any, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        parse_prompt(record)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"a": "\xff"}', "invalid UTF-8 at byte 7 of the line"),
        (b'{"a": "\xf0\x9f\x99', "invalid UTF-8 at byte 7 of the line"),
        (b'{"a": 1', "broken JSON: Expecting ',' delimiter: line 1 column 8 (char 7)"),
        (b"", "broken JSON: Expecting value: line 1 column 1 (char 0)"),
        (b'{"a": 1} {"a": 2}', "broken JSON: Extra data"),
        (b'{"a": ' + b"9" * 5000 + b"}", "broken JSON: Exceeds the limit"),
        (b"[" * 100_000, "JSON nested too deeply"),
    ],
)
def test_a_broken_line_is_refused(line: bytes, words: str) -> None:
    with pytest.raises(Refused) as caught:
        parse_json(line)
    assert str(caught.value).startswith(words)
