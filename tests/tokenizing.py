"""What tests of `hermes4 tokenize` share: data good and bad, its words, how it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from running import Ended

Tokenize = Callable[..., Ended]


def conversation(answer: str, ask: str = "What is it?") -> str:
    turns = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns})


def bad(number: int) -> str:
    role = {"messages": [{"role": "wizard", "content": "x"}]}
    kinds = ["{broken", "[]", json.dumps(role), json.dumps({"text": "x"})]
    return kinds[number % len(kinds)]


def mixed(count: int) -> list[str]:
    """Records of many lengths; each seventh is one to set aside."""
    return [
        bad(n // 7) if n % 7 == 3 else conversation(f"It is {n}. " * (n % 11 + 1), f"{n}?")
        for n in range(count)
    ]


def write_lines(path: Path, lines: Sequence[str | bytes]) -> Path:
    path.write_bytes(b"".join((x if isinstance(x, bytes) else x.encode()) + b"\n" for x in lines))
    return path


def arguments(data: Path, out: Path, tokenizer: Path, *, workers: int) -> list[str]:
    words = ["tokenize", "--data", str(data), "--out", str(out), "--workers", str(workers)]
    return [*words, "--tokenizer", str(tokenizer), "--template", "hermes_chatml"]


def refused(ended: Ended) -> str:
    """The last line on standard error: a user's mistake, without a traceback."""
    assert ended.code == 2, ended
    assert "Traceback" not in ended.err
    last = ended.err.splitlines()[-1]
    assert last.startswith("hermes4: error: ")
    return last
