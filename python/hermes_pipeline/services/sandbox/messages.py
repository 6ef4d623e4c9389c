"""What goes between `hermes4 sandbox` and those who send it jobs: JSON, bytes in base64.

Not by orjson: arguments and values are Python's numbers, of any size.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, TypeVar

from hermes_pipeline.services.sandbox.jobs import Job, Limits, Result

PROTOCOL = 1  # a number more when an older end would misunderstand
RUN = f"/v{PROTOCOL}/run"
TOKEN = "HERMES4_SANDBOX_TOKEN"
BUSY = 429
# What reading something that is no job may raise.
_BROKEN = (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError)

T = TypeVar("T")


def authorization(token: str) -> dict[str, str]:
    """The header that shows a token, if there is one."""
    return {"Authorization": f"Bearer {token}"} if token else {}


def write_job(job: Job) -> bytes:
    """A job as the body of a request.

    Raises:
        TypeError: arguments that are no JSON.
    """
    return json.dumps(
        {
            "limits": asdict(job.limits),
            "stdin": _text(job.stdin),
            "source": job.source,
            "function": job.function,
            "arguments": list(job.arguments),
            "command": list(job.command),
            "files": {path: _text(content) for path, content in job.files.items()},
        }
    ).encode()


def read_job(body: bytes, most: Limits) -> Job:
    """A job out of the body of a request, its limits lowered to the most that are given.

    Raises:
        ValueError: it is none; the message says why.
    """
    try:
        given = json.loads(body)
        limits = {}
        for each in fields(Limits):
            value, highest = given["limits"][each.name], getattr(most, each.name)
            limits[each.name] = min(highest, type(highest)(value))  # NaN, too, is the highest
        return Job(
            Limits(**limits),
            base64.b64decode(given["stdin"], validate=True),
            _a(str, given["source"]),
            _a(str, given["function"]),
            _a(list, given["arguments"]),
            [_a(str, word) for word in given["command"]],
            {path: base64.b64decode(x, validate=True) for path, x in given["files"].items()},
        )
    except _BROKEN as error:
        raise ValueError(f"this is no job: {error!r}") from None


def write_result(result: Result) -> bytes:
    """A result as the body of an answer."""
    return json.dumps(asdict(result)).encode()


def read_result(answer: Mapping[str, Any], url: str) -> Result:
    """A result out of an answer; its box says where it ran.

    Raises:
        TypeError, KeyError: it is none.
    """
    return Result(**{**answer, "box": f"{answer['box']}, at {url}"})


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _a(kind: type[T], value: object) -> T:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r:.80} is no {kind.__name__}")
    return value
