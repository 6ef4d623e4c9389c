"""Bodies of requests and replies: every field in its place, both forms of logprobs, one error."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hermes_pipeline.records import Message
from hermes_pipeline.services.wire import (
    NOT_EXTRA,
    BrokenReply,
    Sampling,
    TokenLogprob,
    chat_body,
    completion_body,
    read_answer,
    read_refusal,
)

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def answer(*choices: dict[str, Any], **usage: object) -> bytes:
    return json.dumps({"choices": choices, "usage": usage or None}).encode()


def test_every_field_of_sampling_is_sent_and_none_that_is_not_set() -> None:
    sampling = Sampling(
        temperature=None, top_p=0.9, max_tokens=8, top_k=20, min_p=0.1, stop=("\n", "END"),
        extra={"repetition_penalty": 1.1},
    )  # fmt: skip
    assert completion_body("x", sampling) == {
        "prompt": "x",
        "top_p": 0.9,
        "max_tokens": 8,
        "top_k": 20,
        "min_p": 0.1,
        "stop": ("\n", "END"),
        "repetition_penalty": 1.1,
    }
    assert completion_body([1, 2], Sampling()) == {
        "prompt": [1, 2],
        "temperature": 0.6,
        "top_p": 0.95,
    }


def test_logprobs_are_asked_for_in_the_words_of_each_path() -> None:
    sampling = Sampling(None, None, logprobs=3)
    assert completion_body("x", sampling) == {"prompt": "x", "logprobs": 3}
    asked = chat_body((), sampling)
    assert (asked["logprobs"], asked["top_logprobs"]) == (True, 3)


def test_tools_calls_and_their_results_are_sent_as_servers_want_them() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = (
        Message("assistant", tool_calls=(call,)),
        Message("tool", "2", name="add", tool_call_id="c1"),
    )
    body = chat_body(messages, Sampling(None, None, extra={"tools": [TOOL]}))
    assert body["tools"] == [TOOL]
    assert body["messages"][0]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    ]
    assert body["messages"][1] == {
        "role": "tool",
        "content": "2",
        "name": "add",
        "tool_call_id": "c1",
    }


def test_a_reply_carries_tool_calls_and_why_it_ended() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{"}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    content = answer({"message": message, "finish_reason": "tool_calls"}, completion_tokens=9)
    (reply,) = read_answer(content).replies
    assert reply.text == ""
    assert reply.tool_calls == (call,)
    assert (reply.finish_reason, reply.completion_tokens) == ("tool_calls", 9)


def test_what_a_model_refuses_with_is_its_answer() -> None:
    message = {"role": "assistant", "content": None, "refusal": "I cannot."}
    (reply,) = read_answer(answer({"message": message, "finish_reason": "stop"})).replies
    assert reply.text == "I cannot."


@pytest.mark.parametrize(
    ("said", "count"),
    [(5, 5), ("5", 5), (5.0, 5), (0, 0), (None, None), ("five", None), (True, None), (-1, None),
     (2**63, None), (1e300, None), ([5], None)],
)  # fmt: skip
def test_counts_of_tokens_are_integers_whatever_they_were(said: object, count: int | None) -> None:
    got = read_answer(answer({"text": "a"}, prompt_tokens=said, completion_tokens=said))
    (reply,) = got.replies
    assert (reply.prompt_tokens, reply.completion_tokens) == (count, count)
    assert (got.prompt_tokens, got.tokens) == (count or 0, 2 * (count or 0))
    assert isinstance(reply.prompt_tokens, int | None)


@pytest.mark.parametrize("reason", [None, "", 1, ["stop"]])
def test_an_end_that_is_no_word_is_unknown(reason: object) -> None:
    (reply,) = read_answer(answer({"text": "a", "finish_reason": reason})).replies
    assert reply.finish_reason == "unknown"


@pytest.mark.parametrize("name", ["model", "n", "seed", "messages", "stream", "top_logprobs",
                                  "temperature", "max_tokens", "stop"])  # fmt: skip
def test_what_we_send_ourselves_is_no_extra(name: str) -> None:
    with pytest.raises(ValueError, match=f"extra must not hold '{name}': (give|the|answers) "):
        Sampling(extra={name: 1})


def test_nothing_that_a_request_holds_otherwise_can_be_an_extra() -> None:
    sampling = Sampling(0.5, 0.5, 5, 5, 0.5, ("x",), 5)
    bodies = chat_body((), sampling) | completion_body("x", sampling)
    assert bodies.keys() <= NOT_EXTRA.keys()


@pytest.mark.parametrize("inner", ["Hm.", [{"type": "text", "text": "Hm."}]])
def test_an_answer_in_parts_is_joined(inner: object) -> None:
    thought = {"type": "thinking", "thinking": inner}
    parts = [thought, {"type": "text", "text": "4"}, {"type": "text", "text": "2"}]
    content = answer({"message": {"content": parts}, "finish_reason": "stop"})
    assert read_answer(content).replies[0].text == "<think>Hm.</think>42"


def test_both_forms_of_logprobs_come_back_as_one() -> None:
    chat = {
        "message": {"content": "ab"},
        "logprobs": {
            "content": [
                {
                    "token": "a",
                    "logprob": -0.5,
                    "top_logprobs": [
                        {"token": "a", "logprob": -0.5},
                        {"token": "z", "logprob": -1.5},
                    ],
                },
                {"token": "b", "logprob": -0.1, "top_logprobs": []},
            ]
        },
    }
    completion = {
        "text": "ab",
        "logprobs": {
            "tokens": ["a", "b"],
            "token_logprobs": [-0.5, -0.1],
            "top_logprobs": [{"a": -0.5, "z": -1.5}, None],
            "text_offset": [0, 1],
        },
    }
    want = (TokenLogprob("a", -0.5, (("a", -0.5), ("z", -1.5))), TokenLogprob("b", -0.1, ()))
    assert read_answer(answer(chat)).replies[0].logprobs == want
    assert read_answer(answer(completion)).replies[0].logprobs == want


def test_the_logprobs_of_an_echoed_prompt_begin_with_none() -> None:
    columns = {"tokens": ["a", "b"], "token_logprobs": [None, -0.1], "top_logprobs": None}
    (reply,) = read_answer(answer({"text": "ab", "logprobs": columns})).replies
    assert reply.logprobs == (TokenLogprob("a", None, ()), TokenLogprob("b", -0.1, ()))


def test_answers_come_in_the_order_of_their_index_and_share_one_count() -> None:
    content = answer({"text": "1", "index": 1}, {"text": "0", "index": 0}, completion_tokens=4)
    got = read_answer(content)
    assert [reply.text for reply in got.replies] == ["0", "1"]
    assert [reply.completion_tokens for reply in got.replies] == [None, None]
    assert got.completion_tokens == 4


def test_an_empty_answer_and_one_that_met_its_length_are_answers() -> None:
    (reply,) = read_answer(answer({"text": "", "finish_reason": "length"})).replies
    assert (reply.text, reply.finish_reason) == ("", "length")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"choices": []}', b'{"choices": [{}]}', b"<html>", b"\xff",
     b'{"error": {"message": "upstream"}}', b'{"choices": [{"text": "a", "logprobs": {}}]}',
     answer({"text": "half", "finish_reason": "abort"}),
     answer({"text": None, "finish_reason": "stop"}),
     answer({"message": {"content": "", "tool_calls": {"id": "c1"}}, "finish_reason": "stop"}),
     answer({"message": {"content": 5}, "finish_reason": "stop"}),
     answer({"message": {"content": [{"type": "image"}]}, "finish_reason": "stop"}),
     answer({"text": "", "finish_reason": "stop"}, {"text": "", "finish_reason": "error"})],
)  # fmt: skip
def test_what_is_no_answer_is_a_broken_reply(content: bytes) -> None:
    with pytest.raises(BrokenReply, match="not whole"):
        read_answer(content)


@pytest.mark.parametrize(
    ("content", "said", "code"),
    [
        (b'{"error": {"message": "no\\n such  model", "code": "model_not_found"}}',
         "no such model", "model_not_found"),
        (b'{"error": {"message": "slow down", "type": "rate_limit_error", "code": null}}',
         "slow down", "rate_limit_error"),
        (b'{"object": "error", "message": "too long", "code": 400}', "too long", "400"),
        (b'{"detail": "Not Found"}', "Not Found", ""),
        (b'{"error": "down"}', "down", ""),
        (b"<html>\n502 Bad Gateway</html>", "<html> 502 Bad Gateway</html>", ""),
        (b"[1]", "[1]", ""),
        (b"", "no message", ""),
    ],
)  # fmt: skip
def test_an_error_is_one_line_whatever_its_form(content: bytes, said: str, code: str) -> None:
    assert read_refusal(content) == (said, code)
