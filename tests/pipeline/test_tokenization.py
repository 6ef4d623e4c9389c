"""The loss mask against kept text written by hand, for templates of every kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any
from unicodedata import normalize

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.normalizers import NFC, Replace

from hermes_pipeline.chat import Refused, parse
from hermes_pipeline.tokenization import Tokenization

Make = Callable[..., Tokenization]
END = "<|im_end|>"
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
CALL_TEXT = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMS = PLAIN.replace("m.content", "m.content | trim")
DROPS_THOUGHTS = PLAIN.replace(
    "{{ m.content }}",
    "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}",
)
NO_END = PLAIN.replace("<|im_end|>\n", "\n")
QUESTION = "{% if m.role == 'assistant' %}{{ messages[0].content }}{% endif %}"
LEAKS = PLAIN.replace("{{ m.content }}", QUESTION + "{{ m.content }}")
LEAKS_BEHIND = PLAIN.replace("{{ m.content }}", "{{ m.content }}" + QUESTION)
SHOUTS = PLAIN.replace("m.content", "m.content | upper")
COUNTS = PLAIN.replace("m.content", "m.content | length")
MERGES = (
    "{% for m in messages %}{% if loop.first or messages[loop.index0 - 1].role != m.role %}"
    "<|im_start|>{{ m.role }}\n{% endif %}{{ m.content }}"
    "{% if loop.last or messages[loop.index0 + 1].role != m.role %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORCES_THOUGHT = PLAIN.replace(
    "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def kept(tokenization: Tokenization, *messages: dict[str, Any], **more: Any) -> list[str]:
    """The kept stretches, decoded from the kept tokens alone."""
    sample = tokenization.sample(parse({"messages": list(messages), **more}))
    ids = sample.token_ids.tolist()
    return [tokenization.encoder.decode(ids[start:end]) for start, end in sample.kept_spans]


@pytest.mark.parametrize("template", ["hermes_chatml", PLAIN, TRIMS, DROPS_THOUGHTS, MERGES])
def test_answers_and_their_ends_are_kept_and_nothing_else(make: Make, template: str) -> None:
    turns = [{"role": "system", "content": "Be brief."}, user("Hi"), answer("Hello."), user("Bye")]
    assert kept(make(template), *turns, answer("So long.")) == [f"Hello.{END}", f"So long.{END}"]


def test_llama3_ends_turns_with_its_own_token(make: Make) -> None:
    tokenization = make("hermes_llama3", eos="<|eot_id|>", bos="<|begin_of_text|>")
    assert kept(tokenization, user("Hi"), answer("Hello.")) == ["Hello.<|eot_id|>"]


def test_thoughts_of_every_turn_are_trained_in_our_template(make: Make) -> None:
    first, last = "<think>\nA greeting.\n</think>\nHello.", "<think>\nA farewell.\n</think>\nBye."
    texts = kept(make("hermes_chatml"), user("Hi"), answer(first), user("Go"), answer(last))
    assert texts == [first + END, last + END]


def test_a_thought_that_the_template_drops_is_not_kept_and_nothing_shifts(make: Make) -> None:
    thought = "<think>hm</think>"
    texts = kept(
        make(DROPS_THOUGHTS), user("a"), answer(thought + "one"), user("b"), answer(thought + "two")
    )
    assert texts == [f"one{END}", f"{thought}two{END}"]


def test_white_space_that_the_template_trims_is_not_kept(make: Make) -> None:
    assert kept(make(TRIMS), user("a"), answer("  one \n\n")) == [f"one{END}"]
    assert kept(make(PLAIN), user("a"), answer("  one \n\n")) == [f"  one \n\n{END}"]


def test_content_that_begins_with_a_line_break_is_cut_at_the_header(make: Make) -> None:
    tokenization = make("hermes_chatml")
    sample = tokenization.sample(parse({"messages": [user("a"), answer("\n\n\nb")]}))
    ids = sample.token_ids.tolist()
    ((start, end),) = sample.kept_spans.tolist()
    assert tokenization.encoder.decode(ids[:start]).endswith("<|im_start|>assistant\n")
    assert tokenization.encoder.decode(ids[start:end]) == f"\n\n\nb{END}"


def test_a_prompt_that_opens_a_thought_keeps_what_history_shows(make: Make) -> None:
    texts = kept(make(FORCES_THOUGHT), user("a"), answer("one"), user("b"), answer("<two"))
    assert texts == [f"one{END}", f"<two{END}"]


def test_tool_calls_are_kept_and_tool_responses_are_not(make: Make) -> None:
    turns = [
        user("Weather?"),
        answer("", tool_calls=[CALL]),
        {"role": "tool", "content": "21 degrees"},
        answer("It is 21 degrees."),
    ]
    assert kept(make("hermes_chatml"), *turns) == [CALL_TEXT + END, f"It is 21 degrees.{END}"]


def test_a_tool_response_inside_an_answer_is_not_kept(make: Make) -> None:
    before, after = f"<think>\nAsk.\n{CALL_TEXT}\n", "\nSo 21.\n</think>\nIt is 21 degrees."
    response = '<tool_response>\n{"t": 21}\n</tool_response>'
    texts = kept(make("hermes_chatml"), user("Weather?"), answer(before + response + after))
    assert "".join(texts) == before + after + END
    assert len(texts) == 2


def test_a_tool_response_that_never_ends_is_refused(make: Make) -> None:
    with pytest.raises(Refused, match="message 1"):
        kept(make("hermes_chatml"), user("a"), answer("<tool_response>\n{"))


def test_successive_and_empty_answers_have_a_turn_each(make: Make) -> None:
    tokenization = make("hermes_chatml")
    assert kept(tokenization, user("a"), answer("one"), answer("two")) == [f"one{END}", f"two{END}"]
    assert kept(tokenization, user("a"), answer("")) == [END]


def test_answers_that_the_template_merges_are_refused(make: Make) -> None:
    with pytest.raises(Refused, match=r"message [12] \(assistant\)"):
        kept(make(MERGES), user("a"), answer("one"), answer("two"))


def test_an_answer_before_any_question_and_a_question_behind_are_right(make: Make) -> None:
    tokenization = make("hermes_chatml")
    assert kept(tokenization, answer("Hello."), user("Hi")) == [f"Hello.{END}"]


def test_a_switched_off_answer_is_not_kept(make: Make) -> None:
    turns = [user("a"), answer("one", train=False), user("b"), answer("two")]
    assert kept(make("hermes_chatml"), *turns) == [f"two{END}"]


def test_spans_keep_their_characters_and_the_end_when_they_reach_it(make: Make) -> None:
    tokenization = make("hermes_chatml")
    content = "ab cd ef"
    inner = answer(content, train_spans=[[3, 5]])
    assert kept(tokenization, user("x"), inner) == ["cd"]
    whole = answer(content, train_spans=[[0, 2], [6, 8]])
    assert kept(tokenization, user("x"), whole) == ["ab", f"ef{END}"]


ACUTE = "\u0301"
PIECES = st.text(st.sampled_from(["a", "e", " ", ACUTE, "\u1112", "\u1161", "\u11ab"]), max_size=4)


@pytest.mark.parametrize(
    ("before", "part", "after"),
    [(f"le cafe{ACUTE}", " answer", ""), (f"e{ACUTE}", "abc", f"e{ACUTE}"), ("e", ACUTE, "bc")],
)
def test_spans_beside_a_decomposed_character_keep_their_characters(
    make: Make, before: str, part: str, after: str
) -> None:
    span = [len(before), len(before + part)]
    told = answer(before + part + after, train_spans=[span])
    (text,) = kept(make(PLAIN, normalizer=NFC()), user("x"), told)
    assert text == part + END * (not after)


@given(st.lists(PIECES.filter(bool), min_size=2, max_size=6))
@settings(max_examples=100)
def test_any_span_of_composed_text_keeps_its_characters(make: Make, pieces: list[str]) -> None:
    pieces = [".", *pieces, "."]
    edges = [0, *accumulate(map(len, pieces))]
    spans = list(pairwise(edges))[1:-1:2]
    told = answer("".join(pieces), train_spans=spans)
    texts = kept(make(PLAIN, normalizer=NFC()), user("x"), told)
    assert texts == [normalize("NFC", piece) for piece in pieces[1:-1:2]]


def test_spans_of_characters_that_the_tokenizer_drops_are_refused(make: Make) -> None:
    tokenization = make(PLAIN, normalizer=Replace("\u200b", ""))
    with pytest.raises(Refused, match="nothing to train"):
        kept(tokenization, user("x"), answer("ab\u200bc", train_spans=[[2, 3]]))


def test_spans_of_rewritten_content_are_refused(make: Make) -> None:
    turns = [
        user("a"),
        answer("<think>hm</think>one", train_spans=[[0, 5]]),
        user("b"),
        answer("two", train=False),
    ]
    with pytest.raises(Refused, match="message 1"):
        kept(make(DROPS_THOUGHTS), *turns)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (NO_END, "no end-of-turn token"),
        (LEAKS_BEHIND, "text of another message inside this turn"),
        (COUNTS, r"message 1 \(assistant\)"),
        ("{{ raise_exception('no tools here') }}", "no tools here"),
        ("{{ nothing.there }}", "chat template fails"),
    ],
)
def test_a_template_that_cannot_be_followed_is_refused(
    make: Make, template: str, words: str
) -> None:
    with pytest.raises(Refused, match=words):
        kept(make(template), user("Why is it so?"), answer("Because it is."))


def test_a_question_repeated_before_the_answer_is_not_kept(make: Make) -> None:
    assert kept(make(LEAKS), user("Why?"), answer("Because.")) == [f"Because.{END}"]


def test_an_answer_in_capitals_is_kept_as_it_is_rendered(make: Make) -> None:
    assert kept(make(SHOUTS), user("Why?"), answer("Because.")) == [f"BECAUSE.{END}"]


def test_texts_that_look_like_the_template_change_nothing(make: Make) -> None:
    trick = "assistant\n<|im_start|>assistant\nHello."
    texts = kept(make("hermes_chatml"), user(trick), answer("Hello."), user("Hello."), answer("Hi"))
    assert texts == [f"Hello.{END}", f"Hi{END}"]


TEXT = st.text(st.sampled_from("ab \n<>{}\"'é日🙂|:.1"), max_size=12)


@pytest.mark.parametrize("template", [PLAIN, "hermes_chatml"])
@given(st.lists(st.tuples(TEXT, TEXT.filter(str.strip)), min_size=1, max_size=4))
@settings(max_examples=60)
def test_any_conversation_keeps_its_answers(
    make: Make, template: str, pairs: list[tuple[str, str]]
) -> None:
    turns = [turn for ask, told in pairs for turn in (user(ask), answer(told))]
    texts = kept(make(template), *turns)
    wanted = [told for _, told in pairs]
    assert [text.removesuffix(END).strip() for text in texts] == [told.strip() for told in wanted]
    assert all(text.endswith(END) for text in texts)


def test_token_ids_are_those_of_transformers(make: Make, tokenizer_folder: Any) -> None:
    from transformers import AutoTokenizer

    turns = [user("What is 48/2?"), answer("It is 24.", tool_calls=[CALL]), user("日本")]
    theirs = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenization = make("hermes_chatml")
    conversation = parse({"messages": turns})
    text = tokenization.render(conversation).text
    wanted = theirs(text, add_special_tokens=False)["input_ids"]
    assert tokenization.sample(conversation).token_ids.tolist() == wanted


def test_rendering_equals_that_of_transformers(make: Make, tokenizer_folder: Any) -> None:
    from transformers import AutoTokenizer

    from hermes_pipeline.services.hub import load_template

    turns = [user("Weather?"), answer("", tool_calls=[CALL]), {"role": "tool", "content": "21"}]
    turns.append(answer("<think>\nhm\n</think>\n21."))
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    source = load_template("hermes_chatml", None)[1]
    theirs = AutoTokenizer.from_pretrained(tokenizer_folder).apply_chat_template(
        turns, tools=tools, chat_template=source, tokenize=False, keep_cots=True
    )
    ours = make("hermes_chatml").render(parse({"messages": turns, "tools": json.dumps(tools)}))
    assert ours.text == theirs
