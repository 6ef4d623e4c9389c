"""The two chat templates of Hermes 4, as text by hand, and messages to render."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chats import CALL

FUNCTION_CALLING = (
    "You are a function calling AI. You are provided with function signatures within "
    "<tools></tools> tags. You may call one or more functions to assist with the user query. For "
    "each call, return a JSON object with the name of the function and its arguments within "
    "<tool_call></tool_call> tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <arguments-object>}\n</tool_call>\n'
    "The results come back within <tool_response></tool_response> tags. Here are the available "
    "tools:\n<tools>\n"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
TOOL_TEXT = (
    '{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}'
)
CALL_TEXT = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'


@dataclass(frozen=True)
class Dialect:
    """What differs between the two templates."""

    name: str
    bos: str
    header: str  # of a turn, around its role
    end: str  # the end-of-turn token
    gap: str  # between two turns

    def open(self, role: str) -> str:
        return self.header.format(role)

    def turn(self, role: str, text: str) -> str:
        return self.open(role) + text + self.end + self.gap


CHATML = Dialect("hermes_chatml", "", "<|im_start|>{}\n", "<|im_end|>", "\n")
LLAMA3 = Dialect(
    "hermes_llama3",
    "<|begin_of_text|>",
    "<|start_header_id|>{}<|end_header_id|>\n\n",
    "<|eot_id|>",
    "",
)


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def response(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


THOUGHTFUL = [
    user("a"),
    answer("one", reasoning="first"),
    answer("<think>\nsecond\n</think>\n\ntwo"),
    user("b"),
    answer("", reasoning="third", tool_calls=[CALL]),
    response("21"),
    answer("<think>\nfourth\n</think>\n\nfour"),
]
