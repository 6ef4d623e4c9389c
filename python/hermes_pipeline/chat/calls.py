"""Tool calls of a message and tools of a conversation, in every common form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hermes_pipeline.chat.values import Refused, check_json, checked_text, kind_of, shortened


def tool_calls_of(calls: object, where: str) -> tuple[Mapping[str, Any], ...]:
    """Return the calls of a message, each with a function's name and its arguments as an object."""
    if isinstance(calls, str):
        return calls_in(calls, where) if calls.strip() else ()
    if not calls:
        return ()
    if not isinstance(calls, Sequence):
        raise Refused(f"{where}: tool_calls must be a list, not {kind_of(calls)}")
    return tuple(_tool_call(call, where) for call in calls)


def calls_in(text: str, where: str) -> tuple[Mapping[str, Any], ...]:
    """Return the calls that a message's text is: one, or a list of them."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise Refused(f"{where}: a function call must be JSON, not {shortened(text)}") from None
    return tool_calls_of(value if isinstance(value, list) else [value], where)


def _tool_call(call: object, where: str) -> Mapping[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Refused(f"{where}: a tool call needs a function with a name and arguments")
    name = checked_text(function["name"], where)
    what = f"{where}: arguments of the call {shortened(name)}"
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            raise Refused(f"{what} are not JSON") from None
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise Refused(f"{what} must be an object, not {kind_of(arguments)}")
    check_json(arguments, what)
    parsed: dict[str, Any] = {"type": "function"}
    if isinstance(call, Mapping) and isinstance(call.get("id"), str):
        parsed["id"] = checked_text(call["id"], where)
    parsed["function"] = {"name": name, "arguments": dict(arguments)}
    return parsed


def tools_of(tools: object) -> tuple[Mapping[str, Any], ...]:
    """Return the tools that a conversation offers, each in the form of OpenAI's interface."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            raise Refused("tools must be a JSON list; the string is not JSON") from None
    if not tools:
        return ()
    if isinstance(tools, Mapping):
        tools = [tools]
    if not isinstance(tools, Sequence):
        raise Refused(f"tools must be a list, not {kind_of(tools)}")
    parsed = []
    for tool in tools:
        if not isinstance(tool, Mapping):
            raise Refused(f"a tool must be an object, not {kind_of(tool)}")
        # Bare signatures are wrapped, as the servers of OpenAI's interface hand them on.
        bare = "function" not in tool and "name" in tool and tool.get("type") != "function"
        parsed.append({"type": "function", "function": dict(tool)} if bare else dict(tool))
    check_json(parsed, "tools")
    return tuple(parsed)
