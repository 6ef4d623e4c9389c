"""`hermes4 evaluate` against a stub: the log, resumption, failures, settings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hermes_pipeline.config import load
from hermes_pipeline.errors import UserError
from hermes_pipeline.evaluation.benchmarks.chain import CHAIN
from hermes_pipeline.evaluation.recipe import Recipe
from hermes_pipeline.services.store_reader import count
from hermes_pipeline.stages.evaluate import run
from running import Hermes4

ANSWERS = {CHAIN.prompt(item).key: CHAIN.prompt(item).target for item in CHAIN.items()}


class Stub:
    """A server that knows every answer; what it says can be bent by a test."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.refused: set[str] = set()  # questions that are refused for good
        self.wrong: set[str] = set()
        self.status = 200
        self.answers = threading.Event()
        self.answers.set()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.bodies.append(body)
                stub.answers.wait(60)
                status, reply = stub.answer(body)
                data = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        question = body["messages"][0]["content"]
        if self.status != 200 or question in self.refused:
            status = self.status if self.status != 200 else 400
            return status, {"error": {"message": "the server says no"}}
        boxed = "none" if question in self.wrong else ANSWERS[question]
        text = f"<think>\nsum\n</think>\n\\boxed{{{boxed}}}"
        choice = {"message": {"content": text}, "finish_reason": "stop"}
        return 200, {"choices": [choice], "usage": {"completion_tokens": 7}}


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = Stub()
    yield stub
    stub.server.shutdown()
    stub.server.server_close()


def evaluate(stub: Stub, out: Path, **options: Any) -> dict[str, Any]:
    """Options by their keys in a recipe, `__` for the dot."""
    over = {
        "benchmark.name": "chain",
        "benchmark.limit": 10,
        "model.endpoint": stub.url,
        "model.name": "tiny",
        "requests.concurrency": 4,
        "run.out": str(out),
    }
    return run(
        load(
            Recipe,
            None,
            over=over | {key.replace("__", "."): value for key, value in options.items()},
        )
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def first_question() -> str:
    return next(iter(ANSWERS))


def test_every_answer_is_logged_with_all_that_made_it(stub: Stub, tmp_path: Path) -> None:
    evaluate(stub, tmp_path)
    log = lines(tmp_path / "answers.jsonl")
    assert len(log) == 10
    line = next(line for line in log if line["key"] == first_question())
    assert line["prompt"] == [{"role": "user", "content": first_question()}]
    assert line["text"].startswith("<think>")
    assert (line["thinking"], line["finish_reason"], line["tokens"]) == ("sum", "stop", 7)
    assert line["answer"] == f"\\boxed{{{line['target']}}}"
    assert line["verdict"]["passed"] is True
    assert line["seed"] == next(b["seed"] for b in stub.bodies if _asks(b, first_question()))


def _asks(body: dict[str, Any], question: str) -> bool:
    return bool(body["messages"][0]["content"] == question)


def test_the_scores_are_written(stub: Stub, tmp_path: Path) -> None:
    stub.wrong = set(list(ANSWERS)[:2])
    evaluate(stub, tmp_path)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["score"], scores["answers"], scores["failed"]) == (0.8, 10, 0)
    assert scores["settings"]["temperature"] == 0.6


def test_scores_are_a_line_of_json_where_asked_for(
    stub: Stub, tmp_path: Path, hermes4: Hermes4
) -> None:
    given = ("evaluate", "--benchmark", "chain", "--out", tmp_path / "out", "--limit", 10)
    ended = hermes4(*given, "--endpoint", stub.url, "--model", "tiny", "--json")
    assert (ended.code, ended.err) == (0, "")
    last = json.loads(ended.out.splitlines()[-1])
    assert (last["stage"], last["finished"], last["score"], last["items"]) == (
        "evaluate",
        True,
        1.0,
        10,
    )


def test_a_second_run_asks_nothing_and_scores_the_same(stub: Stub, tmp_path: Path) -> None:
    first = evaluate(stub, tmp_path)
    asked = len(stub.bodies)
    second = evaluate(stub, tmp_path)
    assert len(stub.bodies) == asked
    assert second["score"] == first["score"]


def test_a_larger_limit_asks_the_new_items_alone(stub: Stub, tmp_path: Path) -> None:
    evaluate(stub, tmp_path, benchmark__limit=4)
    evaluate(stub, tmp_path, benchmark__limit=6)
    assert len(stub.bodies) == 6


def test_equal_seeds_make_equal_requests(stub: Stub, tmp_path: Path) -> None:
    evaluate(stub, tmp_path / "a", requests__concurrency=1)
    evaluate(stub, tmp_path / "b", requests__concurrency=1)
    evaluate(stub, tmp_path / "c", requests__concurrency=1, run__seed=1)
    a, b, c = stub.bodies[:10], stub.bodies[10:20], stub.bodies[20:]
    assert a == b
    assert a != c


def test_failures_lie_apart_and_are_asked_again(stub: Stub, tmp_path: Path) -> None:
    stub.refused = {first_question()}
    scores = evaluate(stub, tmp_path)
    assert (scores["answers"], scores["failed"], scores["score"]) == (9, 1, 1.0)
    failure = lines(tmp_path / "set_aside.jsonl")[0]
    assert failure["source"] == first_question()
    assert "the server says no" in failure["error"]
    stub.refused = set()
    assert evaluate(stub, tmp_path)["answers"] == 10
    assert not (tmp_path / "set_aside.jsonl").exists()


def test_no_answer_at_all_is_a_users_error(stub: Stub, tmp_path: Path) -> None:
    stub.status = 400
    with pytest.raises(UserError, match=r"no request was answered.*the server says no"):
        evaluate(stub, tmp_path)


def test_a_wrong_key_stops_with_the_servers_words(stub: Stub, tmp_path: Path) -> None:
    stub.status = 401
    with pytest.raises(UserError, match="the server says no"):
        evaluate(stub, tmp_path)
    assert len(stub.bodies) <= 4


def test_other_settings_in_the_folder_are_refused(stub: Stub, tmp_path: Path) -> None:
    evaluate(stub, tmp_path)
    with pytest.raises(UserError, match=r"temperature was 0\.6 and is 0\.7"):
        evaluate(stub, tmp_path, sampling__temperature=0.7)


def test_two_evaluations_in_one_folder_are_refused(stub: Stub, tmp_path: Path) -> None:
    stub.answers.clear()
    first = threading.Thread(target=evaluate, args=(stub, tmp_path))
    first.start()
    while not stub.bodies:
        time.sleep(0.01)
    with pytest.raises(UserError, match="is in use by process"):
        evaluate(stub, tmp_path)
    stub.answers.set()
    first.join()


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"model.name": "gpt-5"}, "give --endpoint with --model, or --checkpoint"),
        ({"model.checkpoint": "gpt-5"}, "--checkpoint gpt-5 is not a folder"),
    ],
)
def test_one_model_must_be_named(tmp_path: Path, over: dict[str, str], message: str) -> None:
    given = {"benchmark.name": "chain", "run.out": str(tmp_path / "out"), **over}
    with pytest.raises(UserError, match=message):
        run(load(Recipe, None, over=given))
    assert not (tmp_path / "out").exists()


def test_a_killed_evaluation_goes_on_where_it_stopped(stub: Stub, tmp_path: Path) -> None:
    stub.pause_s = 0.2
    command = [*(sys.executable, "-m", "hermes_pipeline", "evaluate"), *("--benchmark", "chain")]
    command += [*("--out", str(tmp_path), "--model", "tiny", "--endpoint", stub.url)]
    command += ["--limit", "10", "--concurrency", "1"]
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while len(stub.bodies) < 5 or count(tmp_path).records < 3:
        assert child.poll() is None
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    before = count(tmp_path).records
    assert 3 <= before < 10
    stub.pause_s = 0
    stub.bodies.clear()
    assert evaluate(stub, tmp_path)["answers"] == 10
    assert len(stub.bodies) == 10 - before


def test_the_command_explains_an_unknown_benchmark_in_one_line(tmp_path: Path) -> None:
    command = [*(sys.executable, "-m", "hermes_pipeline", "evaluate"), *("--benchmark", "chian")]
    command += ["--out", str(tmp_path), "--model", "tiny"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == (
        "hermes4: error: unknown benchmark 'chian'; did you mean 'chain'? known: chain\n"
    )
