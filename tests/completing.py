"""What tests of `hermes4 complete` share: data, its words, and what it leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.counting_server import CountingServer
from hermes_pipeline.stages.export import export
from running import Ended, comes_true


def write(path: Path, *records: Any) -> Path:
    lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def words(server: CountingServer, data: Path, out: Path, *options: object) -> list[str]:
    fixed = ["complete", "--data", data, "--out", out, "--endpoint", server.url, "--model", "tiny"]
    return [str(word) for word in (*fixed, *options)]


def exported(out: Path) -> bytes:
    export(out, out.with_suffix(".jsonl"))
    return out.with_suffix(".jsonl").read_bytes()


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in exported(out).splitlines()]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(ended: Ended) -> str:
    """The one line that a user's mistake is."""
    assert ended.code == 2
    *_, last = ended.err.splitlines()
    assert last.startswith("hermes4: error: ")
    return last


def start(server: CountingServer, data: Path, out: Path, *options: object) -> Any:
    command = [sys.executable, "-m", "hermes_pipeline", *words(server, data, out, *options)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes)


def await_answers(server: CountingServer, more: int) -> None:
    wanted = server.answered.total() + more
    assert comes_true(lambda: server.answered.total() >= wanted, 30)
