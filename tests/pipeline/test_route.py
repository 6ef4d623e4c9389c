"""`hermes4 route` and `hermes4 serve --join`: a real router; workers that are killed and return.

But for one test, a scripted program stands in for vLLM, which would take a minute to start.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import scripted_vllm
from hermes_pipeline.errors import UserError
from hermes_pipeline.services.store_reader import read_results
from running import Hermes4, comes_true, free_port, get, processes_of

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(200)]

READY_S = 60


class Commands:
    """Commands `hermes4` of one test, each a process with its own log.

    Their folder holds a module that ends whoever imports it.
    """

    def __init__(self, folder: Path, model: Path, *python_path: Path) -> None:
        self.folder, self.model = folder, model
        paths = [*map(str, python_path), os.environ.get("PYTHONPATH", "")]
        self.mark = f"HERMES4_TEST_MARK={folder}"
        self._environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "HERMES4_TEST_MARK": str(folder),
        }
        self._started: list[subprocess.Popen[bytes]] = []
        self._routers: list[int] = []  # their ports

    def start(self, *words: object, **environment: str) -> tuple[subprocess.Popen[bytes], Path]:
        """The command, running in its own folder, and where its standard error goes."""
        number = len(self._started)
        log = self.folder / f"{number}.{words[0]}.err"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "hermes_pipeline", *map(str, words)],
                stdout=subprocess.DEVNULL,
                stderr=file,
                cwd=self.folder,
                env=self._environment | environment,
                start_new_session=True,
            )
        self._started.append(process)
        return process, log

    def route(self, port: int = 0, *workers: str) -> tuple[subprocess.Popen[bytes], str]:
        """A router, and its address."""
        log = self.folder / f"{len(self._started)}.log"
        process, said = self.start("route", *workers, "--port", port, "--log", log)
        url = find(r"router at (http://[^ ]+)/v1;", said)
        self._routers.append(int(url.rpartition(":")[2]))
        return process, url

    def serve(
        self, router: str, port: int = 0, **environment: str
    ) -> tuple[subprocess.Popen[bytes], Path]:
        """A worker that is to join."""
        log = self.folder / f"{len(self._started)}.log"
        fixed = ["serve", self.model, "--port", port, "--join", router, "--log", log]
        return self.start(*fixed, **environment)

    def complete(self, router: str, out: str, *words: object) -> subprocess.Popen[bytes]:
        name = self.model.name
        fixed = ["--endpoint", f"{router}/v1", "--model", name, "--concurrency", 16]
        data = self.folder / "data.jsonl"
        return self.start("complete", "--data", data, "--out", self.folder / out, *fixed, *words)[0]

    def has_answers(self, out: str, more_than: int, server: str = "") -> bool:
        """Are so many kept, of one server or of all?"""
        try:
            answers = self.answers(out)
        except UserError:  # nothing is there yet
            return False
        return (answers[server] if server else answers.total()) > more_than

    def answers(self, out: str) -> Counter[str]:
        """Who gave how many of the answers that are kept."""
        return Counter(
            result.record["text"]
            for recorded in read_results(self.folder / out)
            for result in recorded.results
            if result.record is not None
        )

    def counts(self, out: str) -> dict[str, int]:
        return dict(json.loads((self.folder / out / "counts.json").read_text()))

    def end(self) -> None:
        """Kill what still runs; no command may leave anything behind, killed as it is."""
        for process in self._started:
            process.kill()
            process.wait()
        assert comes_true(lambda: not processes_of(self.mark), 30), processes_of(self.mark)
        # vllm-router has overwritten its arguments and its environment.
        assert comes_true(lambda: not any(map(can_connect, self._routers)), 10)


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    """With a scripted vLLM before the real one."""
    scripted = tmp_path / "scripted"
    model = scripted_vllm.put(scripted)
    yield from ending(Commands(tmp_path, model, scripted, Path(scripted_vllm.__file__).parent))


@pytest.fixture
def real_commands(tmp_path: Path, model: Path) -> Iterator[Commands]:
    yield from ending(Commands(tmp_path, model))


def ending(commands: Commands) -> Iterator[Commands]:
    records = (json.dumps({"prompt": f"{i}?"}) for i in range(200))
    (commands.folder / "data.jsonl").write_text("\n".join(records))
    (commands.folder / "queue.py").write_text("raise SystemExit(9)")
    try:
        yield commands
    finally:
        commands.end()


def find(pattern: str, log: Path, timeout_s: float = READY_S) -> str:
    """What a command says sooner or later."""
    assert comes_true(lambda: bool(re.search(pattern, log.read_text())), timeout_s), log.read_text()
    found = re.search(pattern, log.read_text())
    assert found is not None
    return found[1]


def has_workers(router: str, count: int) -> bool:
    """Do so many workers answer?"""
    try:
        return bool(get(f"{router}/readiness")["healthy_workers"] == count)
    except OSError:
        return False


def can_connect(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def program_of(command: subprocess.Popen[bytes]) -> int:
    """The id of what a command runs: the child of its guard, who is its own."""
    number = command.pid
    for _ in range(2):
        (number,) = map(int, Path(f"/proc/{number}/task/{number}/children").read_text().split())
    return number


def test_workers_join_share_the_work_and_leave(commands: Commands) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    early, _ = commands.serve(url)  # before there is a router
    router, address = commands.route(port)
    assert address == url
    late, _ = commands.serve(f"{url}/v1")
    assert comes_true(lambda: has_workers(url, 2), READY_S)

    assert commands.complete(url, "out", "--n", 2).wait(60) == 0
    assert commands.counts("out")["answers"] == 400
    assert min(commands.answers("out").values()) >= 100
    assert len(commands.answers("out")) == 2

    early.send_signal(signal.SIGTERM)
    assert early.wait(15) == 0
    assert len(get(f"{url}/list_workers")["urls"]) == 1
    late.send_signal(signal.SIGINT)
    assert late.wait(15) == 0
    assert get(f"{url}/list_workers")["urls"] == []
    router.send_signal(signal.SIGTERM)
    assert router.wait(15) == 0


def test_a_killed_worker_loses_nothing_and_gets_work_again(commands: Commands) -> None:
    port = free_port()
    _, url = commands.route()
    commands.serve(url)
    worker, _ = commands.serve(url, port)
    assert comes_true(lambda: has_workers(url, 2), READY_S)
    server = program_of(worker)

    run = commands.complete(url, "out", "--n", 2)
    assert comes_true(lambda: commands.has_answers("out", 20, str(server)), 20)
    worker.kill()
    assert not commands.has_answers("out", 399)
    assert run.wait(60) == 0
    counts = commands.counts("out")
    assert (counts["answers"], counts["set_aside"]) == (400, 0)

    worker, said = commands.serve(url, port)
    find(r"(http.* is on the list of the router)", said)
    assert comes_true(lambda: has_workers(url, 2), READY_S)
    assert commands.complete(url, "again", "--n", 2).wait(60) == 0
    answers = commands.answers("again")
    assert answers.total() == 400
    assert answers[str(program_of(worker))] >= 40


def test_a_killed_router_returns_and_nothing_is_lost(commands: Commands) -> None:
    port = free_port()
    router, url = commands.route(port)
    for _ in range(2):
        commands.serve(url)
    assert comes_true(lambda: has_workers(url, 2), READY_S)
    run = commands.complete(url, "out", "--n", 4)

    assert comes_true(lambda: commands.has_answers("out", 100), 20)
    os.kill(program_of(router), signal.SIGKILL)  # the command starts another
    assert comes_true(lambda: not can_connect(port), 10)
    assert comes_true(lambda: has_workers(url, 2), READY_S)

    assert comes_true(lambda: commands.has_answers("out", 400), 20)
    router.kill()
    assert comes_true(lambda: not can_connect(port), 10)  # the guard has seen to it
    commands.route(port)
    assert comes_true(lambda: has_workers(url, 2), READY_S)

    assert run.wait(60) == 0
    counts = commands.counts("out")
    assert (counts["answers"], counts["set_aside"]) == (800, 0)


@pytest.mark.timeout(300)
def test_a_killed_engine_loses_nothing(real_commands: Commands) -> None:
    commands = real_commands
    _, url = commands.route()
    # Several processes of one server, as on a GPU; the other is faster to start.
    killed, joining = commands.serve(url, VLLM_ENABLE_V1_MULTIPROCESSING="1", OMP_NUM_THREADS="1")
    other, also_joining = commands.serve(url, OMP_NUM_THREADS="1")
    for said in (joining, also_joining):
        find(r"(http.* is on the list of the router)", said, 200)

    run = commands.complete(url, "out", "--n", 5, "--max-tokens", 100)
    assert comes_true(lambda: commands.has_answers("out", 100), 60)
    os.kill(program_of(killed), signal.SIGKILL)
    assert not commands.has_answers("out", 999)
    assert killed.wait(30) == 2
    assert run.wait(100) == 0
    counts = commands.counts("out")
    assert (counts["answers"], counts["set_aside"]) == (1000, 0)
    reasons = Counter(
        result.record["finish_reason"]
        for recorded in read_results(commands.folder / "out")
        for result in recorded.results
        if result.record is not None
    )
    assert set(reasons) <= {"stop", "length"}
    other.send_signal(signal.SIGTERM)
    assert other.wait(20) == 0


def test_a_router_adds_the_workers_it_was_told_of(commands: Commands) -> None:
    port = free_port()
    worker, missing = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{free_port()}"
    _, url = commands.route(0, f"{worker}/v1", missing)
    assert get(f"{url}/list_workers")["urls"] == []
    commands.start("serve", commands.model, "--port", port)
    assert comes_true(lambda: has_workers(url, 1), READY_S)
    assert get(f"{url}/list_workers")["urls"] == [worker]


def test_an_address_that_is_no_router_is_refused_before_the_model_loads(
    commands: Commands,
) -> None:
    _, said = commands.start("serve", commands.model, "--port", 0)
    worker = find(r"model tiny at (http://[^ ]+)/v1;", said)
    second, said = commands.start("serve", commands.model, "--port", 0, "--join", worker)
    assert second.wait(20) == 2
    error = f"hermes4: error: {worker} is no vllm-router: it answers /list_workers with 404"
    assert said.read_text().splitlines() == [error]


def test_a_key_is_read_without_the_space_around_it(commands: Commands) -> None:
    _, said = commands.start("serve", commands.model, "--port", 0, VLLM_API_KEY=" sk-secret\n")
    find(r"model tiny at (http://[^ ]+)/v1;", said)


@pytest.mark.parametrize("key", ["sk-sec\nret", "sk-secret€"])
def test_a_key_that_no_header_can_carry_is_refused_before_the_model_loads(
    commands: Commands, hermes4: Hermes4, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", key)
    said = "hermes4: error: VLLM_API_KEY holds characters that no header can carry\n"
    assert hermes4("serve", commands.model, "--port", 0) == (2, "", said)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--join", "router:8000"], "address 'router:8000' wants the form http://host:port"),
        (["--advertise", "http://a:1"], "--advertise says how a router calls the server"),
        (["--join", "http://nowhere.invalid:1"], "the router at http://nowhere.invalid:1 cannot"),
        (["--join", "http://a..b:1"], "address 'http://a..b:1' wants the form http://host:port"),
        (["--join", "http://127.0.0.1:9/ü"], "address 'http://127.0.0.1:9/ü' wants the form"),
        (["--host", "nowhere.invalid"], "host 'nowhere.invalid' is no address of this machine"),
        (["--host", "a..b"], "host 'a..b' is no address of this machine"),
        (["--host", "203.0.113.1"], "port 0 of 203.0.113.1 cannot be used"),
    ],
)
def test_a_wrong_address_is_explained(
    commands: Commands, hermes4: Hermes4, words: list[str], message: str
) -> None:
    ended = hermes4("serve", commands.model, "--port", 0, *words)
    assert ended.code == 2
    assert message in ended.err.splitlines()[-1]
