"""Every common form of a conversation becomes the same record, and goes back out to templates."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from chats import CALL, HELLO, HI
from hermes_pipeline.chat import count_chars, parse, parse_json, parse_prompt, to_dict
from hermes_pipeline.records import Conversation, Message

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def message(**fields: Any) -> Message:
    """The last message of a conversation that ends with these fields."""
    return parse({"messages": [HI, fields]}).messages[-1]


def answer(**fields: Any) -> Message:
    """The record of an assistant message with these fields."""
    return message(role="assistant", **fields)


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


def test_an_empty_thought_hides_no_other() -> None:
    thought = answer(content="Hello.", reasoning_content="", reasoning="Hm.")
    assert thought.reasoning == "Hm."


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


# One line of JSON.


def test_a_line_of_json_is_what_it_holds() -> None:
    assert parse_json('{"a": ["é", 1.5, null]}'.encode()) == {"a": ["é", 1.5, None]}


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
