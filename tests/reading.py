"""What tests of reading share: five conversations, and what is read of data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hermes_pipeline.chat import Refused, parse_json
from hermes_pipeline.services.hub import DataSource

CHATS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": f"Zürich {i}?"},
            {"role": "assistant", "content": "x"},
        ]
    }
    for i in range(5)
]


def numbered(chats: list[Any], first: int = 1) -> list[Any]:
    return list(enumerate(chats, first))


def read(data: Path, *, start: int = 0, max_bytes: int = 1 << 20, **options: Any) -> list[Any]:
    """Line number and content of each record; the words where there is none."""
    records = DataSource(str(data), **options).records(start=start, max_bytes=max_bytes)
    return [(r.line, r.error if r.error is not None else understood(r.data)) for r in records]


def understood(data: Any) -> Any:
    try:
        return parse_json(data) if isinstance(data, bytes) else data
    except Refused as error:
        return str(error)
