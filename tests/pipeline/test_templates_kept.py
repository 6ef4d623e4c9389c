"""The chat templates of Hermes 4: which tokens are kept, against text by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chats import CALL
from dialects import (
    CALL_TEXT,
    CHATML,
    FUNCTION_CALLING,
    LLAMA3,
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
from hermes_pipeline.tokenization import Tokenization

Make = Callable[..., Tokenization]


@pytest.fixture
def tokenization(dialect: Dialect, make: Make) -> Tokenization:
    """The template with a tokenizer that knows its tokens."""
    return make(dialect.name, eos=dialect.end, bos=dialect.bos or "<s>")


def stretches(tokenization: Tokenization, *messages: dict[str, Any], **more: Any) -> list[str]:
    """The whole sample, decoded stretch by stretch: not kept, kept, not kept, ..."""
    sample = tokenization.sample(parse({"messages": list(messages), **more}))
    ids = sample.token_ids.tolist()
    edges = [0, *sample.kept_spans.flatten().tolist(), len(ids)]
    return [tokenization.encoder.decode(ids[start:end]) for start, end in pairwise(edges)]


def test_answers_and_their_ends_are_kept(tokenization: Tokenization, dialect: Dialect) -> None:
    asked = dialect.bos + dialect.turn("system", "Be brief.") + dialect.turn("user", "Hi")
    again = dialect.gap + dialect.turn("user", "Bye") + dialect.open("assistant")
    assert stretches(
        tokenization, system("Be brief."), user("Hi"), answer("Hello."), user("Bye"), answer("Ciao")
    ) == [
        asked + dialect.open("assistant"),
        f"Hello.{dialect.end}",
        again,
        f"Ciao{dialect.end}",
        dialect.gap,
    ]


def test_thoughts_and_calls_are_kept_and_tools_and_responses_are_not(
    tokenization: Tokenization, dialect: Dialect
) -> None:
    turns = [
        system("Be brief."),
        user("Weather in Zürich?"),
        answer("Let me look.", reasoning="Ask.", tool_calls=[CALL, CALL]),
        response("21 degrees"),
        response("sunny"),
        answer("<think>\nGood.\n</think>\n\nIt is 21 degrees."),
    ]
    tools = f"Be brief.\n\n{FUNCTION_CALLING}{TOOL_TEXT}\n</tools>"
    responses = (
        "<tool_response>\n21 degrees\n</tool_response>\n<tool_response>\nsunny\n</tool_response>"
    )
    assert stretches(tokenization, *turns, tools=[TOOL]) == [
        dialect.bos
        + dialect.turn("system", tools)
        + dialect.turn("user", "Weather in Zürich?")
        + dialect.open("assistant"),
        f"<think>\nAsk.\n</think>\n\nLet me look.\n{CALL_TEXT}\n{CALL_TEXT}{dialect.end}",
        dialect.gap + dialect.turn("tool", responses) + dialect.open("assistant"),
        f"<think>\nGood.\n</think>\n\nIt is 21 degrees.{dialect.end}",
        dialect.gap,
    ]


def test_thoughts_of_every_turn_are_kept(tokenization: Tokenization, dialect: Dialect) -> None:
    texts = stretches(tokenization, *THOUGHTFUL)[1::2]
    assert texts == [
        f"<think>\nfirst\n</think>\n\none{dialect.end}",
        f"<think>\nsecond\n</think>\n\ntwo{dialect.end}",
        f"<think>\nthird\n</think>\n{CALL_TEXT}{dialect.end}",
        f"<think>\nfourth\n</think>\n\nfour{dialect.end}",
    ]


def test_of_an_answer_with_spans_those_are_kept(
    tokenization: Tokenization, dialect: Dialect
) -> None:
    content = "<think>\nHm.\n</think>\n\nIt is 21."
    part = answer(content, train_spans=[[8, 11], [22, len(content)]])
    assert stretches(tokenization, user("x"), part, user("y"), answer("z", train=False)) == [
        dialect.bos + dialect.turn("user", "x") + dialect.open("assistant") + "<think>\n",
        "Hm.",
        "\n</think>\n\n",
        f"It is 21.{dialect.end}",
        dialect.gap + dialect.turn("user", "y") + dialect.turn("assistant", "z"),
    ]


def test_the_end_of_a_turn_is_that_of_the_template(
    tokenization: Tokenization, dialect: Dialect
) -> None:
    assert tokenization.end_tokens() == [dialect.end]


TEXT = st.text(st.sampled_from("ab \n<>{}\"'é日🙂|:.1"), min_size=1, max_size=10).filter(
    lambda text: bool(text.strip())
)
ANSWERS = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": TEXT},
    optional={
        "reasoning": TEXT,
        "tool_calls": st.lists(
            st.builds(lambda name, city: {"name": name, "arguments": {"city": city}}, TEXT, TEXT),
            max_size=2,
        ),
    },
)
OTHERS = st.builds(
    lambda role, text: {"role": role, "content": text}, st.sampled_from(["user", "tool"]), TEXT
)


def written(turn: dict[str, Any]) -> str:
    """What a model has to write for an assistant message, without the end of the turn."""
    thought = f"<think>\n{turn['reasoning']}\n</think>\n\n" if "reasoning" in turn else ""
    calls = [
        f'\n<tool_call>\n{{"name": {json.dumps(call["name"], ensure_ascii=False)}, "arguments": '
        f'{{"city": {json.dumps(call["arguments"]["city"], ensure_ascii=False)}}}}}\n</tool_call>'
        for call in turn.get("tool_calls", ())
    ]
    return thought + str(turn["content"]) + "".join(calls)


@pytest.mark.parametrize("dialect", [CHATML, LLAMA3], ids=lambda dialect: dialect.name)
@given(turns=st.lists(ANSWERS | OTHERS, max_size=5), last=ANSWERS)
@settings(max_examples=60)
def test_of_any_conversation_the_answers_are_kept(
    make: Make, dialect: Dialect, turns: list[dict[str, Any]], last: dict[str, Any]
) -> None:
    tokenization = make(dialect.name, eos=dialect.end, bos=dialect.bos or "<s>")
    kept = stretches(tokenization, *turns, last)[1::2]
    answers = [turn for turn in [*turns, last] if turn["role"] == "assistant"]
    assert kept == [written(turn) + dialect.end for turn in answers]
