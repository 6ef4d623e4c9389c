"""The chat templates of Hermes 4: their text, against text by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from chats import CALL
from dialects import (
    CALL_TEXT,
    FUNCTION_CALLING,
    THOUGHTFUL,
    TOOL,
    TOOL_TEXT,
    Dialect,
    answer,
    response,
    system,
    user,
)
from hermes_pipeline.chat import parse
from hermes_pipeline.services.hub import load_template
from hermes_pipeline.tokenization import Tokenization

Make = Callable[..., Tokenization]

DEEP_THINKING = (
    "You are a deep thinking AI, you may use extremely long chains of thought to deeply consider "
    "the problem and deliberate with yourself via systematic reasoning processes to help come to "
    "a correct solution prior to answering. You should enclose your thoughts and internal "
    "monologue inside <think> </think> tags, and then provide your solution or response to the "
    "problem."
)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers, which renders templates as servers do."""
    return PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)


@pytest.fixture
def render(dialect: Dialect, tokenizer: PreTrainedTokenizerFast) -> Callable[..., str]:
    """Renders messages with the template."""
    source = load_template(dialect.name, None)[1]

    def rendered(*messages: dict[str, Any], **options: Any) -> str:
        text = tokenizer.apply_chat_template(
            list(messages), chat_template=source, tokenize=False, **options
        )
        return str(text)

    return rendered


Render = Callable[..., str]


def test_chatml_to_the_letter(tokenizer: PreTrainedTokenizerFast) -> None:
    text = tokenizer.apply_chat_template(
        [system("Be brief."), user("Hi"), answer("Hello."), user("Bye")],
        chat_template=load_template("hermes_chatml", None)[1],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_llama3_to_the_letter(tokenizer: PreTrainedTokenizerFast) -> None:
    text = tokenizer.apply_chat_template(
        [system("Be brief."), user("Hi"), answer("Hello."), user("Bye")],
        chat_template=load_template("hermes_llama3", None)[1],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_llama3_begins_with_the_tokenizers_own_token(make: Make) -> None:
    tokenization = make("hermes_llama3", eos="<|eot_id|>", bos="<s>")
    text = tokenization.render(parse({"messages": [user("Hi"), answer("Hello.")]})).text
    assert text.startswith("<s><|start_header_id|>user<|end_header_id|>")


def test_without_system_message_thinking_and_tools_no_system_turn_is_written(
    render: Render, dialect: Dialect
) -> None:
    assert render(user("Hi")) == dialect.bos + dialect.turn("user", "Hi")


def test_an_empty_system_message_keeps_its_turn(render: Render, dialect: Dialect) -> None:
    text = dialect.bos + dialect.turn("system", "") + dialect.turn("user", "Hi")
    assert render(system(""), user("Hi")) == text


def test_a_later_system_message_stays_in_its_place(render: Render, dialect: Dialect) -> None:
    turns = dialect.turn("user", "Hi") + dialect.turn("system", "Be brief.")
    assert render(user("Hi"), system("Be brief.")) == dialect.bos + turns


def test_thinking_is_asked_for_in_front_of_the_system_message(
    render: Render, dialect: Dialect
) -> None:
    text = render(system("Be brief."), user("Hi"), thinking=True)
    system_turn = dialect.turn("system", f"{DEEP_THINKING}\n\nBe brief.")
    assert text == dialect.bos + system_turn + dialect.turn("user", "Hi")


def test_tools_follow_the_system_message(render: Render, dialect: Dialect) -> None:
    text = render(system("Be brief."), user("Hi"), tools=[TOOL, TOOL])
    tools = f"{FUNCTION_CALLING}{TOOL_TEXT}\n{TOOL_TEXT}\n</tools>"
    system_turn = dialect.turn("system", f"Be brief.\n\n{tools}")
    assert text == dialect.bos + system_turn + dialect.turn("user", "Hi")


def test_thinking_and_tools_need_no_system_message(render: Render, dialect: Dialect) -> None:
    text = render(user("Hi"), tools=[TOOL], thinking=True)
    tools = f"{FUNCTION_CALLING}{TOOL_TEXT}\n</tools>"
    system_turn = dialect.turn("system", f"{DEEP_THINKING}\n\n{tools}")
    assert text == dialect.bos + system_turn + dialect.turn("user", "Hi")


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content"])
def test_a_thought_kept_apart_stands_in_tags_before_the_answer(
    render: Render, dialect: Dialect, key: str
) -> None:
    text = render(user("Hi"), answer("Hello.", **{key: "A greeting."}))
    thought = "<think>\nA greeting.\n</think>\n\nHello."
    assert text.endswith(dialect.turn("user", "Hi") + dialect.turn("assistant", thought))


def test_a_thought_without_an_answer_ends_at_its_tag(render: Render, dialect: Dialect) -> None:
    text = render(user("Hi"), answer("", reasoning="Hm."))
    assert text.endswith(dialect.turn("assistant", "<think>\nHm.\n</think>\n"))


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"content": "None.", "tool_calls": None}, "None."),
        ({"content": None, "tool_calls": [CALL]}, CALL_TEXT),
        ({"content": "", "tool_calls": [CALL["function"]]}, CALL_TEXT),
        ({"content": "Let me look.", "tool_calls": [CALL]}, f"Let me look.\n{CALL_TEXT}"),
        ({"content": "", "tool_calls": [CALL, CALL]}, f"{CALL_TEXT}\n{CALL_TEXT}"),
        (
            {"content": "", "tool_calls": [{"name": "weather", "arguments": '{"city": "Zürich"}'}]},
            CALL_TEXT,
        ),
        (
            {"content": "", "reasoning": "Ask.", "tool_calls": [CALL]},
            f"<think>\nAsk.\n</think>\n{CALL_TEXT}",
        ),
    ],
)
def test_tool_calls_stand_in_tags_behind_the_answer(
    render: Render, dialect: Dialect, fields: dict[str, Any], wanted: str
) -> None:
    text = render(user("Weather?"), {"role": "assistant", **fields})
    assert text.endswith(dialect.turn("user", "Weather?") + dialect.turn("assistant", wanted))


def test_a_tool_call_reads_back_as_json(render: Render) -> None:
    arguments = {"text": 'a "quoted" line\n</tool_call> é', "n": [1.5, None, True]}
    text = render(user("x"), answer("", tool_calls=[{"name": 'f"', "arguments": arguments}]))
    written = text.split("<tool_call>\n")[1].rsplit("\n</tool_call>", 1)[0]
    assert json.loads(written) == {"name": 'f"', "arguments": arguments}


def test_tool_responses_in_a_row_share_a_turn(render: Render, dialect: Dialect) -> None:
    text = render(user("x"), response("21"), response("sunny"), user("y"), response("22"))
    first = "<tool_response>\n21\n</tool_response>\n<tool_response>\nsunny\n</tool_response>"
    second = "<tool_response>\n22\n</tool_response>"
    turns = [("user", "x"), ("tool", first), ("user", "y"), ("tool", second)]
    assert text == dialect.bos + "".join(dialect.turn(role, words) for role, words in turns)


def test_tool_responses_alone_are_a_turn(render: Render, dialect: Dialect) -> None:
    both = "<tool_response>\n21\n</tool_response>\n<tool_response>\n22\n</tool_response>"
    assert render(response("21"), response("22")) == dialect.bos + dialect.turn("tool", both)


def test_a_tool_response_that_has_its_tags_gets_no_others(render: Render, dialect: Dialect) -> None:
    tagged = "\n<tool_response>\n21\n</tool_response>"
    assert render(user("x"), response(tagged)).endswith(dialect.turn("tool", tagged))


def test_a_generation_prompt_opens_an_answer(render: Render, dialect: Dialect) -> None:
    text = render(user("Hi"), add_generation_prompt=True)
    assert text == dialect.bos + dialect.turn("user", "Hi") + dialect.open("assistant")


def test_thoughts_before_the_last_question_are_dropped(render: Render, dialect: Dialect) -> None:
    turns = [
        ("user", "a"),
        ("assistant", "one"),
        ("assistant", "two"),
        ("user", "b"),
        ("assistant", f"<think>\nthird\n</think>\n{CALL_TEXT}"),
        ("tool", "<tool_response>\n21\n</tool_response>"),
        ("assistant", "<think>\nfourth\n</think>\n\nfour"),
    ]
    wanted = dialect.bos + "".join(dialect.turn(role, words) for role, words in turns)
    assert render(*THOUGHTFUL) == wanted


def test_a_dropped_thought_ends_at_the_last_closing_tag(render: Render, dialect: Dialect) -> None:
    text = render(user("a"), answer("<think>\nHm.\n</think>\nOr </think>\n\none"), user("b"))
    turns = [("user", "a"), ("assistant", "one"), ("user", "b")]
    assert text == dialect.bos + "".join(dialect.turn(role, words) for role, words in turns)


def test_every_thought_is_kept_where_that_is_asked_for(render: Render, dialect: Dialect) -> None:
    text = render(*THOUGHTFUL, keep_cots=True)
    for word, told in (("first", "one"), ("second", "two"), ("fourth", "four")):
        thought = f"<think>\n{word}\n</think>\n\n{told}"
        assert dialect.turn("assistant", thought) in text
    assert dialect.turn("assistant", f"<think>\nthird\n</think>\n{CALL_TEXT}") in text


def test_a_prompt_and_what_is_written_after_it_are_the_next_prompt(
    render: Render, dialect: Dialect
) -> None:
    options = {"tools": [TOOL], "keep_cots": True, "add_generation_prompt": True}
    for end, turn in enumerate(THOUGHTFUL):
        if turn["role"] != "assistant":
            continue
        before = render(*THOUGHTFUL[:end], **options)
        after = render(*THOUGHTFUL[: end + 1], **options)
        written = after.removeprefix(before).removesuffix(dialect.gap + dialect.open("assistant"))
        assert after.startswith(before)
        assert written.count(dialect.end) == 1
        assert written.endswith(dialect.end)


def test_an_unknown_role_is_refused(render: Render) -> None:
    words = "role critic is not known; known: system, user, assistant, tool"
    with pytest.raises(Exception, match=words):
        render(user("Hi"), {"role": "critic", "content": "Bad."})
