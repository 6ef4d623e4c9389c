"""`hermes4 complete` against a server that does as a script says: kills, faults, resumption."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.counting_server import CountingServer, key_of
from completing import await_answers, exported, lines, records, refused, start, words, write
from hermes_pipeline.services import endpoint, limits
from running import Ended, Hermes4, comes_true

pytestmark = pytest.mark.timeout(100)

RECORDS = 30


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FIRST_PAUSE_S", 0.01)


@pytest.fixture
def server() -> Iterator[CountingServer]:
    with CountingServer() as server:
        yield server


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "data.jsonl", *({"prompt": f"{i}?"} for i in range(RECORDS)))


# What is asked, and what comes of it.


def test_every_conversation_gets_its_draws(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4
) -> None:
    out = tmp_path / "out"
    ended = hermes4(*words(server, data, out, "--n", 3, "--max-tokens", 9, "--seed", 5))
    assert ended.code == 0
    assert ended.out == (
        f"30 read = 30 done + 0 set aside + 0 quarantined\n90 answers: hermes4 export {out}\n"
    )
    assert ended.err.splitlines()[-1].startswith("complete: 90/90 draws, ")
    assert len({body["seed"] for body in server.bodies}) == 90
    assert {(b["model"], b["n"], b["max_tokens"]) for b in server.bodies} == {("tiny", 1, 9)}
    found = records(out)
    assert [r["source"] for r in found] == [f"{data}:{i}" for i in range(1, RECORDS + 1)]
    assert [[a["draw"] for a in r["answers"]] for r in found] == [[0, 1, 2]] * RECORDS
    seeds = {b["seed"]: b["messages"] for b in server.bodies}
    assert all(seeds[a["seed"]] == r["messages"] for r in found for a in r["answers"])


USER, ANSWER = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}
SYSTEM = {"role": "system", "content": "Count."}
OWN_SYSTEM = {"role": "system", "content": "Add."}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


@pytest.mark.parametrize(
    ("record", "asked"),
    [
        ({"messages": [USER]}, [SYSTEM, USER]),
        ({"messages": [USER, ANSWER]}, [SYSTEM, USER]),
        ({"messages": [USER, ANSWER, USER, ANSWER]}, [SYSTEM, USER, ANSWER, USER]),
        (
            {"messages": [{**SYSTEM, "content": "Own."}, USER]},
            [{**SYSTEM, "content": "Own."}, USER],
        ),
        ({"conversations": [{"from": "human", "value": "1+1?"}]}, [SYSTEM, USER]),
        ({"question": "1+1?", "answer": "2"}, [SYSTEM, USER]),
        ({"prompt": "1+1?", "answer": "2"}, [SYSTEM, USER]),
    ],
)
def test_what_stands_before_the_last_answer_is_asked(
    server: CountingServer, tmp_path: Path, hermes4: Hermes4, record: Any, asked: Any
) -> None:
    data = write(tmp_path / "one.jsonl", record)
    hermes4(*words(server, data, tmp_path / "out", "--n", 1, "--system", "Count."))
    assert [body["messages"] for body in server.bodies] == [asked]


def test_tools_are_offered_and_calls_left_as_written(
    server: CountingServer, tmp_path: Path, hermes4: Hermes4
) -> None:
    data = write(tmp_path / "one.jsonl", {"messages": [USER], "tools": [TOOL]}, {"prompt": "x"})
    hermes4(*words(server, data, tmp_path / "out", "--n", 1))
    one, other = sorted(server.bodies, key=lambda body: "tools" not in body)
    assert (one["tools"], one["tool_choice"]) == ([TOOL], "none")
    assert "tool_choice" not in other
    assert records(tmp_path / "out")[0]["tools"] == [TOOL]


def test_a_choice_of_tools_that_is_given_stands_over_ours(
    server: CountingServer, tmp_path: Path, hermes4: Hermes4
) -> None:
    data = write(tmp_path / "one.jsonl", {"messages": [USER], "tools": [TOOL]})
    choice = 'sampling.extra={tool_choice="auto", tools=[]}'
    hermes4(*words(server, data, tmp_path / "out", "--n", 1, "--set", choice))
    (body,) = server.bodies
    assert (body["tools"], body["tool_choice"]) == ([TOOL], "auto")


def test_bad_records_go_to_quarantine_and_the_counts_add_up(
    server: CountingServer, tmp_path: Path, hermes4: Hermes4
) -> None:
    huge = (
        '{"messages": [{"role": "user", "content": "x"}], "tools": [{"a": 99999999999999999999}]}'
    )
    bad = ["{broken", {"text": "x"}, {"messages": [ANSWER]}, "[1]", {"messages": []}, huge]
    data = write(tmp_path / "data.jsonl", {"prompt": "a"}, *bad, {"prompt": "refuse me"})
    server.decide = lambda body, _: 400 if "refuse" in str(body) else "answer"
    out = tmp_path / "out"
    ended = hermes4(*words(server, data, out, "--n", 2))
    assert ended.out.startswith("8 read = 1 done + 1 set aside + 6 quarantined\n2 draws set aside")
    assert [entry["line"] for entry in lines(out / "quarantine.jsonl")] == [2, 3, 4, 5, 6, 7]
    assert "broken JSON" in lines(out / "quarantine.jsonl")[0]["reason"]
    assert [entry["draw"] for entry in lines(out / "set_aside.jsonl")] == [0, 1]
    assert "400: the test says 400" in lines(out / "set_aside.jsonl")[0]["error"]
    assert [(len(r["answers"]), r["set_aside"]) for r in records(out)] == [(2, []), (0, [0, 1])]


def test_json_lines_are_for_machines(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4
) -> None:
    ended = hermes4(*words(server, data, tmp_path / "out", "--json"))
    *_, last = map(json.loads, ended.out.splitlines())
    assert ended.err == ""
    counts = {"read": 30, "done": 30, "set_aside": 0, "quarantined": 0, "answers": 120}
    assert last == {"stage": "complete", "finished": True, **counts}
    assert json.loads((tmp_path / "out" / "counts.json").read_text()) == counts


@pytest.mark.parametrize("concurrency", [1, 40])
def test_the_order_of_answers_does_not_show(
    data: Path, tmp_path: Path, hermes4: Hermes4, concurrency: int
) -> None:
    found = []
    for delay_s, out in ((0, tmp_path / "a"), (0.002, tmp_path / "b")):
        with CountingServer(delay_s=delay_s) as server:
            rng = random.Random(concurrency)
            server.decide = lambda *_, rng=rng: "answer" if rng.random() < 0.9 else 503
            hermes4(*words(server, data, out, "--concurrency", 40 if delay_s else concurrency))
        found.append(exported(out))
    assert found[0] == found[1]


# Again.


def test_a_second_run_asks_nothing(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4
) -> None:
    out = tmp_path / "out"
    hermes4(*words(server, data, out))
    first, asked = exported(out), len(server.bodies)
    assert hermes4(*words(server, data, out)).code == 0
    assert (exported(out), len(server.bodies)) == (first, asked)


def test_more_draws_and_more_records_ask_for_the_new_alone(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4
) -> None:
    out = tmp_path / "out"
    for count, options in ((20, ("--n", 2)), (30, ("--n", 3)), (90, ())):
        hermes4(*words(server, data, out, *(options or ("--n", 3)), *_limit(count)))
        assert len(server.bodies) == count
    hermes4(*words(server, data, tmp_path / "straight", "--n", 3))
    assert exported(out) == exported(tmp_path / "straight")


def _limit(count: int) -> tuple[object, ...]:
    return () if count == 90 else ("--limit", 10)


def test_a_draw_that_was_set_aside_is_asked_for_again(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4
) -> None:
    out = tmp_path / "out"
    server.decide = lambda body, _: 400 if body["messages"][0]["content"] == "7?" else "answer"
    assert "1 set aside" in hermes4(*words(server, data, out, "--n", 2)).out
    server.decide = lambda *_: "answer"
    assert "0 set aside" in hermes4(*words(server, data, out, "--n", 2)).out
    assert not (out / "set_aside.jsonl").exists()
    hermes4(*words(server, data, tmp_path / "straight", "--n", 2))
    assert exported(out) == exported(tmp_path / "straight")


# Faults.


def test_under_faults_every_record_ends_done_or_set_aside(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4
) -> None:
    rng = random.Random(0)
    server.decide = lambda *_: rng.choices(["answer", 500, "cut", "hang"], [70, 20, 5, 5])[0]
    out = tmp_path / "out"
    ended = hermes4(*words(server, data, out, "--timeout-s", 0.5))
    counts = json.loads((out / "counts.json").read_text())
    assert ended.code == 0
    assert counts["read"] == RECORDS == counts["done"] + counts["set_aside"]
    assert [len(r["answers"]) + len(r["set_aside"]) for r in records(out)] == [4] * RECORDS
    assert len(server.asked) == 4 * RECORDS < len(server.bodies)


@pytest.mark.parametrize("status", [401, 404])
def test_a_hopeless_error_stops_the_run_in_one_line(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4, status: int
) -> None:
    server.decide = lambda *_: status
    ended = hermes4(*words(server, data, tmp_path / "out", "--concurrency", 4))
    assert f"{status}: the test says {status}" in refused(ended)
    assert len(server.bodies) <= 4


def test_a_server_that_is_gone_stops_the_run_and_costs_nothing(
    server: CountingServer,
    data: Path,
    tmp_path: Path,
    hermes4: Hermes4,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr(endpoint, "OUTAGE_S", 0.1)
    out = tmp_path / "out"
    server.decide = lambda *_: "answer" if len(server.bodies) <= 50 else 502
    said = refused(hermes4(*words(server, data, out, "--concurrency", 4)))
    assert "16 requests in a row failed; " in said
    assert said.endswith(f"50 answers are safe in {out}: run the same command again to go on")
    server.decide = lambda *_: "answer"
    assert hermes4(*words(server, data, out)).code == 0
    assert server.answered.total() == 4 * RECORDS


def test_no_answer_at_all_is_a_users_error(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4
) -> None:
    server.decide = lambda *_: 400
    said = refused(hermes4(*words(server, data, tmp_path / "out")))
    assert "no request was answered, most often: " in said


def test_a_file_whose_name_is_no_text_is_read_and_named(
    server: CountingServer, tmp_path: Path, hermes4: Hermes4
) -> None:
    data = write(tmp_path / "\udcffdata.jsonl", {"prompt": "a"}, "{broken")
    assert hermes4(*words(server, data, tmp_path / "out", "--n", 1)).code == 0
    (entry,) = lines(tmp_path / "out" / "quarantine.jsonl")
    assert entry["source"] == f"{tmp_path}/\\udcffdata.jsonl:2"
    assert [len(record["answers"]) for record in records(tmp_path / "out")] == [1]


@pytest.mark.parametrize(
    ("content", "message"),
    [([], "holds no records"), (["{"], "not one of 1 records can be used, most often: broken")],
)
def test_data_without_a_conversation_is_a_users_error(
    server: CountingServer, tmp_path: Path, hermes4: Hermes4, content: list[str], message: str
) -> None:
    data = write(tmp_path / "data.jsonl", *content)
    assert message in refused(hermes4(*words(server, data, tmp_path / "out")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --endpoint with --model, or --checkpoint, and not both"),
        (["--endpoint", "http://x/v1", "--checkpoint", "m"], "and not both"),
        (["--endpoint", "http://x/v1"], "--endpoint wants --model"),
        (["--checkpoint", "nowhere"], "--checkpoint nowhere is not a folder"),
        (["--checkpoint", "m", "--model", "m"], "--model is for --endpoint"),
        (
            ["--endpoint", "http://x/v1", "--model", "m", "--max-model-len", "99"],
            "--max-model-len is for a --checkpoint, which is served here; leave it out",
        ),
        (
            ["--endpoint", "http://x/v1", "--model", "m", "--set", "model.ready_s=9"],
            "model.ready_s is for a --checkpoint, which is served here; leave it out",
        ),
    ],
)
def test_one_model_must_be_named(
    data: Path, tmp_path: Path, hermes4: Hermes4, options: list[str], message: str
) -> None:
    fixed = ("complete", "--data", data, "--out", tmp_path / "out")
    assert message in refused(hermes4(*fixed, *options))
    assert not (tmp_path / "out").exists()


def test_a_folder_for_answers_inside_the_data_is_refused(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4
) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    for out in (tmp_path / "a" / "out", tmp_path / "link" / "out"):
        said = refused(hermes4(*words(server, tmp_path, out)))
        assert f"--out {out} lies in --data {tmp_path}, so results would be read" in said
    assert (server.bodies, sorted(tmp_path.iterdir())) == ([], [data, tmp_path / "link"])


def test_other_settings_in_the_folder_are_refused(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4
) -> None:
    hermes4(*words(server, data, tmp_path / "out", "--limit", 1))
    said = refused(hermes4(*words(server, data, tmp_path / "out", "--top-p", 1, "--seed", 3)))
    assert "seed was 0 and is 3; top_p was 0.95 and is 1.0. Choose another --out" in said


# Processes.


@pytest.mark.heavy
def test_kill_9_pays_twice_for_no_more_than_was_in_flight(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", *({"prompt": f"{i}?"} for i in range(150)))
    options = ("--n", 4, "--concurrency", 8)
    rng, kills = random.Random(0), 5
    with CountingServer(delay_s=0.01) as server:
        for _ in range(kills):
            with start(server, data, tmp_path / "out", *options) as process:
                await_answers(server, rng.randrange(1, 60))
                time.sleep(rng.uniform(0, 0.05))
                process.kill()
        with start(server, data, tmp_path / "out", *options) as process:
            assert process.wait(60) == 0
        assert len(server.answered) == 600
        assert server.answered.total() - 600 <= kills * 8
    with CountingServer() as server, start(server, data, tmp_path / "calm", *options) as process:
        assert process.wait(60) == 0
    assert exported(tmp_path / "out") == exported(tmp_path / "calm")


def test_ctrl_c_says_what_is_safe_and_how_to_go_on(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with CountingServer(delay_s=0.02) as server:
        with start(server, data, out, "--concurrency", 4) as process:
            await_answers(server, 20)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=30)
        safe = sum(len(record["answers"]) for record in records(out))
        assert process.returncode == 130
        assert said.splitlines()[-1] == (
            f"hermes4: interrupted; {safe} answers are safe in {out}: run the same command again "
            f"to go on"
        )
        assert server.answered.total() - 4 <= safe <= server.answered.total()
        paid = server.answered.total()
        with start(server, data, out, "--concurrency", 4) as process:
            assert process.wait(30) == 0
        assert server.answered.total() - paid == 4 * RECORDS - safe


def test_two_runs_in_one_folder_are_refused(data: Path, tmp_path: Path, hermes4: Hermes4) -> None:
    with CountingServer(lambda *_: "hang") as server:
        with start(server, data, tmp_path / "out") as process:
            try:
                assert comes_true(lambda: bool(server.bodies), 30)
                said = refused(hermes4(*words(server, data, tmp_path / "out")))
            finally:
                process.kill()
        assert f"is in use by process {process.pid} on " in said


def test_a_full_disk_is_one_line_and_nothing_is_paid_twice(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "hermes_pipeline", *words(server, data, out)]
    limited = ["bash", "-c", 'ulimit -f 160; exec "$@"', "bash", *command]  # KiB
    done = subprocess.run(limited, capture_output=True, text=True, timeout=60)
    said = refused(Ended(done.returncode, done.stdout, done.stderr))
    *progress, _ = done.stderr.splitlines()
    assert all(line.startswith("complete: ") for line in progress), done.stderr
    assert "records.sqlite cannot be read or written: " in said
    lost = server.answered.total() - sum(len(record["answers"]) for record in records(out))
    assert hermes4(*words(server, data, out)).code == 0
    assert server.answered.total() - 4 * RECORDS == lost <= 64
    hermes4(*words(server, data, tmp_path / "calm"))
    assert exported(out) == exported(tmp_path / "calm")


def test_keys_of_the_script_are_those_of_the_draws(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4
) -> None:
    hermes4(*words(server, data, tmp_path / "out"))
    assert {key_of(body) for body in server.bodies} == set(server.answered)
    assert set(server.answered.values()) == {1}
