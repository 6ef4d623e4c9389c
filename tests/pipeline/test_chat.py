"""Every common form of a conversation becomes the same record; what cannot be one says why."""

from __future__ import annotations

import datetime
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hermes_pipeline.chat import Refused, count_chars, parse, parse_json, parse_prompt, to_dict
from hermes_pipeline.records import Conversation, Message

HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {}}}
DEEP = "[" * 100_000  # deeper than any parser follows
HALF = "\ud83d"  # half of a surrogate pair, as JSON can hold it


def message(**fields: Any) -> Message:
    """The last message of a conversation that ends with these fields."""
    return parse({"messages": [HI, fields]}).messages[-1]


def answer(**fields: Any) -> Message:
    """The record of an assistant message with these fields."""
    return message(role="assistant", **fields)


def refusal(record: Any) -> str:
    """Why a record is refused."""
    with pytest.raises(Refused) as caught:
        parse(record)
    return str(caught.value)


def refusal_of(**fields: Any) -> str:
    """Why an assistant message with these fields is refused."""
    return refusal({"messages": [HI, {"role": "assistant", **fields}]})


# Forms.


def test_messages_become_a_conversation() -> None:
    wanted = (Message("user", "Hi"), Message("assistant", "Hello.", train=True))
    assert parse({"messages": [HI, HELLO]}, "x.jsonl:3") == Conversation(wanted, (), "x.jsonl:3")


@pytest.mark.parametrize("key", ["conversations", "conversation", "messages"])
def test_sharegpt_becomes_the_same_conversation(key: str) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    assert parse({key: turns}) == parse({"messages": [HI, HELLO]})


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        ("question", "answer"),
        ("prompt", "response"),
        ("prompt", "completion"),
        ("instruction", "output"),
    ],
)
def test_a_pair_becomes_the_same_conversation(ask: str, told: str) -> None:
    assert parse({ask: "Hi", told: "Hello."}) == parse({"messages": [HI, HELLO]})


def test_the_input_of_an_instruction_follows_it() -> None:
    record = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert parse(record).messages[0].content == "Add.\n\n1 2"


def test_an_empty_input_of_an_instruction_adds_nothing() -> None:
    record = {"instruction": "Add 1 to 2.", "input": "", "output": "3"}
    assert parse(record).messages[0].content == "Add 1 to 2."


def test_messages_of_a_prompt_are_not_trained_and_those_of_a_completion_are() -> None:
    record = {"prompt": [HI, HELLO, HI], "completion": [HELLO]}
    assert [m.train for m in parse(record).messages] == [False, False, False, True]


@pytest.mark.parametrize(
    "given",
    [
        {"role": "Assistant ", "content": "Hello."},
        {"role": None, "from": "gpt", "value": "Hello."},
        {"from": "function_call", "value": '{"name": "weather"}'},
        HELLO | {"weight": 1},
    ],
)
def test_an_answer_in_a_prompt_is_not_trained_however_it_is_written(given: Any) -> None:
    record = {"prompt": [HI, given, HI], "completion": [HELLO]}
    assert [m.train for m in parse(record).messages] == [False, False, False, True]


def test_keys_that_are_null_count_as_absent() -> None:
    record = {"messages": None, "conversations": [HI, HELLO], "system": None, "tools": None}
    assert parse(record) == parse({"messages": [HI, HELLO]})


def test_other_keys_change_nothing() -> None:
    asked = HI | {"reasoning": "Hm.", "function_call": "auto"}
    record = {"id": 7, "prompt": "Hi", "score": None, "messages": [asked, HELLO | {"x": [1]}]}
    assert parse(record) == parse({"messages": [HI, HELLO]})


def test_an_input_beside_other_pairs_changes_nothing() -> None:
    record = {"prompt": "Hi", "response": "Hello.", "input": "x"}
    assert parse(record) == parse({"messages": [HI, HELLO]})


def test_a_system_field_becomes_the_first_message() -> None:
    conversation = parse({"system": "Be brief.", "messages": [HI, HELLO]})
    assert conversation.messages[0] == Message("system", "Be brief.")
    assert conversation.messages[1:] == parse({"messages": [HI, HELLO]}).messages


def test_text_parts_of_a_content_are_joined() -> None:
    parts = [{"type": "text", "text": "Hel"}, "lo", {"text": "."}]
    assert answer(content=parts).content == "Hello."


@pytest.mark.parametrize(
    ("role", "names"),
    [
        ("system", ["system", "developer", " System"]),
        ("user", ["user", "human", "USER"]),
        ("assistant", ["assistant", "gpt", "chatgpt", "model", "bot", "bing", "bard", "claude"]),
        ("tool", ["tool", "function", "ipython", "observation"]),
        ("tool", ["function_response", "tool_response", "tool_results"]),
    ],
)
def test_roles_go_by_many_names(role: str, names: list[str]) -> None:
    turns = [{"role": name, "content": "x"} for name in names]
    assert {m.role for m in parse({"messages": [*turns, HELLO]}).messages[:-1]} == {role}


# Thinking.


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content", "thinking"])
def test_a_thought_kept_apart_is_the_reasoning(key: str) -> None:
    thought = answer(content="Hello.", **{key: "A greeting."})
    assert (thought.reasoning, thought.content) == ("A greeting.", "Hello.")


def test_a_thought_in_tags_stays_in_the_content() -> None:
    text = "<think>\nA greeting.\n</think>\nHello."
    assert answer(content=text) == Message("assistant", text, train=True)


def test_an_empty_thought_is_none() -> None:
    assert answer(content="Hello.", reasoning="").reasoning is None


def test_a_thought_without_an_answer_is_a_message() -> None:
    assert answer(content=None, reasoning="Hm.") == Message(
        "assistant", "", reasoning="Hm.", train=True
    )


# Tools.


@pytest.mark.parametrize(
    "fields",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL["function"]]},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
        {
            "role": "assistant",
            "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Zürich"}'}}],
        },
        {"role": "assistant", "content": None, "function_call": CALL["function"]},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "tool_call", "value": json.dumps([CALL])},
    ],
)
def test_a_tool_call_in_any_form_is_the_same(fields: Any) -> None:
    assert message(**fields) == Message("assistant", "", tool_calls=(CALL,), train=True)


def test_a_tool_call_keeps_its_id() -> None:
    assert answer(tool_calls=[CALL | {"id": "c1"}]).tool_calls == (CALL | {"id": "c1"},)


@pytest.mark.parametrize("arguments", [None, "", " ", "{}", {}])
def test_a_tool_call_without_arguments_has_none(arguments: Any) -> None:
    call = {"function": {"name": "now", "arguments": arguments}}
    wanted = {"type": "function", "function": {"name": "now", "arguments": {}}}
    assert answer(tool_calls=[call]).tool_calls == (wanted,)


@pytest.mark.parametrize("calls", [None, [], "", " "])
def test_no_tool_calls_in_any_form_are_none(calls: Any) -> None:
    assert answer(content="Hello.", tool_calls=calls).tool_calls == ()


def test_several_tool_calls_keep_their_order_beside_the_content() -> None:
    calls = [{"name": name, "arguments": {}} for name in ("b", "a")]
    told = answer(content="Let me look.", tool_calls=calls)
    assert told.content == "Let me look."
    assert [call["function"]["name"] for call in told.tool_calls] == ["b", "a"]


def test_a_tool_response_keeps_the_name_and_the_id_of_its_call() -> None:
    turn = {"role": "tool", "content": "21", "name": "weather", "tool_call_id": "c1"}
    response = parse({"messages": [HI, turn, HELLO]}).messages[1]
    assert response == Message("tool", "21", name="weather", tool_call_id="c1")


@pytest.mark.parametrize(
    "tools",
    [[WEATHER], json.dumps([WEATHER]), WEATHER, [WEATHER["function"]], WEATHER["function"]],
)
def test_tools_in_any_form_are_the_same(tools: Any) -> None:
    assert parse({"messages": [HI, HELLO], "tools": tools}).tools == (WEATHER,)


@pytest.mark.parametrize(
    "tool", [WEATHER | {"name": "x"}, {"type": "function", "name": "x"}, {"type": "web_search"}]
)
def test_tools_that_are_no_bare_signatures_stay_as_they_are(tool: Any) -> None:
    assert parse({"messages": [HI, HELLO], "tools": [tool]}).tools == (tool,)


@pytest.mark.parametrize("tools", ["", " ", "[]", [], None, {}])
def test_no_tools_in_any_form_are_none(tools: Any) -> None:
    assert parse({"messages": [HI, HELLO], "tools": tools}).tools == ()


# What is trained.


def test_only_assistant_messages_are_trained() -> None:
    turns = [{"role": "system", "content": "x"}, HI, HELLO, {"role": "tool", "content": "x"}, HELLO]
    assert [m.train for m in parse({"messages": turns}).messages] == [0, 0, 1, 0, 1]


@pytest.mark.parametrize("key", ["train", "loss_weight", "weight"])
@pytest.mark.parametrize(("value", "wanted"), [(0, 0), (False, 0), (0.0, 0), (1, 1), (True, 1)])
def test_a_switch_turns_a_message_on_or_off(key: str, value: Any, wanted: bool) -> None:
    turns = [HI, HELLO | {key: value}, HI, HELLO]
    assert parse({"messages": turns}).messages[1].train is bool(wanted)


@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_a_message_of_another_role_may_be_switched_off(role: str) -> None:
    turn = {"role": role, "content": "x", "train": False}
    assert not parse({"messages": [turn, HELLO]}).messages[0].train


def test_spans_are_characters_of_the_content() -> None:
    told = answer(content="日本 ab🙂", train_spans=[[0, 2], (2, 3), [5, 6]])
    assert told.train_spans == ((0, 2), (2, 3), (5, 6))


def test_spans_may_be_none_at_all() -> None:
    assert answer(content="ab", train_spans=[]).train_spans == ()


# What is refused, and in which words.


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


# What is to be answered.

ASKED = (Message("user", "Hi"),)


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [HI]},
        {"messages": [HI, HELLO]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
        {"prompt": "Hi"},
        {"prompt": "Hi", "answer": "Hello."},
        {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go."},
        {"prompt": [HI]},
        {"prompt": [HI], "completion": [HELLO]},
        {"question": "Hi", "answer": "Hello."},
        {"instruction": "Hi", "input": "", "output": None},
        {"messages": [HI, HELLO | {"train": False}]},
    ],
)
def test_what_stands_before_the_last_answer_is_to_be_answered(record: Any) -> None:
    assert parse_prompt(record, "x:1") == Conversation(ASKED, (), "x:1")


def test_earlier_answers_and_tools_stay_in_a_prompt() -> None:
    record = {"messages": [HI, HELLO, HI, HELLO], "tools": [{"name": "weather"}]}
    found = parse_prompt(record)
    assert [m.role for m in found.messages] == ["user", "assistant", "user"]
    assert found.tools == parse(record).tools


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


# One line of JSON.


def test_a_line_of_json_is_what_it_holds() -> None:
    assert parse_json('{"a": ["é", 1.5, null]}'.encode()) == {"a": ["é", 1.5, None]}


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


# Back out.


def test_a_message_for_templates_has_the_keys_it_needs_alone() -> None:
    assert to_dict(Message("user", "Hi")) == {"role": "user", "content": "Hi"}


def test_a_thought_for_templates_goes_by_three_names() -> None:
    turn = to_dict(Message("assistant", "Hello.", reasoning="Hm."))
    thoughts = {"reasoning": "Hm.", "reasoning_content": "Hm.", "thinking": "Hm."}
    assert turn == {"role": "assistant", "content": "Hello.", **thoughts}


def test_calls_without_content_for_templates_have_the_content_asked_for() -> None:
    calls = Message("assistant", "", tool_calls=(CALL,))
    assert to_dict(calls)["content"] == ""
    assert to_dict(calls, no_content=None)["content"] is None
    assert to_dict(Message("assistant", ""), no_content=None)["content"] == ""


def test_characters_of_content_reasoning_and_calls_are_counted() -> None:
    calls = '[{"type": "function", "function": {"name": "now", "arguments": {"a": "é"}}}]'
    turn = {"role": "assistant", "content": "日本", "reasoning": "Hm.", "tool_calls": calls}
    assert count_chars(parse({"messages": [HI, turn]})) == 2 + 2 + 3 + len(calls)


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
@settings(max_examples=300, deadline=None)
def test_any_record_is_a_conversation_or_refused(record: Any) -> None:
    try:
        conversation = parse(record)
    except Refused:
        return
    assert any(m.train and m.role == "assistant" for m in conversation.messages)
    assert count_chars(conversation) >= 0


@given(st.lists(ANSWERS | OTHERS, max_size=3))
@settings(max_examples=200, deadline=None)
def test_messages_for_templates_parse_back_to_themselves(turns: list[Any]) -> None:
    messages = parse({"messages": [*turns, HELLO]}).messages
    back = [to_dict(m) | {"train": m.train, "train_spans": m.train_spans} for m in messages]
    assert parse({"messages": back}).messages == messages


def test_real_conversations_are_the_same_in_both_forms(shared_data: Path) -> None:
    forms = []
    for form in ("messages", "sharegpt"):
        path = shared_data / "conversations" / f"glaive_toolcall_en_first30.{form}.jsonl.gz"
        forms.append(
            [parse(parse_json(line)) for line in gzip.decompress(path.read_bytes()).splitlines()]
        )
    assert forms[0] == forms[1]
    assert len(forms[0]) == 30
    assert any(m.tool_calls for conversation in forms[0] for m in conversation.messages)
