"""Work on a Ray cluster of several nodes, one of which is lost on the way."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.counting_server import CountingServer
from completing import exported, words
from hermes_pipeline.errors import UserError
from hermes_pipeline.services import cluster
from hermes_pipeline.services.cluster import Cluster, ItemLost, WorkerBroken, on_ray
from nodes import Nodes
from running import Ended, comes_true, processes_of

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("default"),  # Ray's own
]

Opening = Callable[[int], Any]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with Nodes(3) as nodes:
        yield nodes


def work(nodes: Nodes, opening: Opening, items: list[Any], **options: Any) -> tuple[Any, list[str]]:
    """What workers make of the items, errors as values; and what was told."""
    told: list[str] = []
    in_flight = options.pop("in_flight", 4)
    settings = options.pop("cluster", Cluster(nodes.address, workers=2))
    fixed: dict[str, Any] = {"deadline_s": 30.0, "environment": {}, "tell": told.append}

    async def run() -> list[Any]:
        turns = asyncio.Semaphore(in_flight)
        async with on_ray(opening, settings, **fixed | options) as made:

            async def in_turn(item: Any) -> Any:
                async with turns:
                    return await made(item)

            return await asyncio.gather(*map(in_turn, items), return_exceptions=True)

    return asyncio.run(asyncio.wait_for(run(), 120)), told


def test_items_go_to_all_workers_and_errors_come_back_as_they_are(nodes: Nodes) -> None:
    @asynccontextmanager
    async def opening(workers: int) -> AsyncIterator[Callable[[int], Awaitable[Any]]]:
        async def made(item: int) -> Any:
            await asyncio.sleep(0.2)
            if item == 3:
                raise UserError("three")
            return item, workers, os.getpid(), os.environ["A_KEY"]

        yield made

    found, told = work(nodes, opening, list(range(80)), environment={"A_KEY": "secret"})
    assert isinstance(found[3], UserError)
    assert str(found.pop(3)) == "three"
    assert [(item, workers, key) for item, workers, _, key in found] == [
        (item, 2, "secret") for item in range(80) if item != 3
    ]
    assert len({pid for _, _, pid, _ in found}) == 2
    assert told == [f"{count} of 2 workers on Ray are ready" for count in (1, 2)]


def test_a_worker_that_dies_breaks_or_is_silent_is_replaced(nodes: Nodes, tmp_path: Path) -> None:
    folder = str(tmp_path)

    @asynccontextmanager
    async def opening(workers: int) -> AsyncIterator[Callable[[str], Awaitable[str]]]:
        async def made(item: str) -> str:
            seen = Path(folder, item)
            if item != "well" and not seen.exists():
                seen.touch()
                if item == "dies":
                    os._exit(1)
                if item == "breaks":
                    raise WorkerBroken("its server has ended")
                await asyncio.sleep(100)
            return item

        yield made

    for item in ("dies", "breaks", "silent"):
        found, told = work(nodes, opening, [item, "well"], deadline_s=8.0)
        assert found == [item, "well"]
        lost = [line for line in told if line.startswith("a worker on Ray was lost, and ")]
        assert len(lost) == 1


def test_an_item_that_kills_every_worker_is_given_up_and_none_that_was_beside_it(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "FIRST_PAUSE_S", 0.1)
    monkeypatch.setattr(cluster, "MOST_LOST", 3)

    @asynccontextmanager
    async def opening(workers: int) -> AsyncIterator[Callable[[Any], Awaitable[Any]]]:
        async def made(item: Any) -> Any:
            if item == "poison":
                await asyncio.sleep(0.3)
                os._exit(1)
            await asyncio.sleep(0.6)  # still there when the worker dies
            return item

        yield made

    items = [*range(6), "poison", *range(6, 12)]
    found, _ = work(nodes, opening, items, in_flight=13)
    poison = found.pop(6)
    assert isinstance(poison, ItemLost)
    assert str(poison).startswith("3 workers were lost under it, the last: ")
    assert found == list(range(12))


def test_workers_that_cannot_get_ready_are_a_users_error(nodes: Nodes) -> None:
    @asynccontextmanager
    async def opening(workers: int) -> AsyncIterator[Callable[[int], Awaitable[int]]]:
        raise UserError("no such model")
        yield

    (error,), _ = work(nodes, opening, [1])
    assert isinstance(error, UserError)
    assert str(error) == "no Ray worker became ready: no such model"


def test_one_replacement_that_fails_does_not_end_a_run_nor_one_that_is_slow(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "FIRST_PAUSE_S", 0.1)
    folder, go = tmp_path / "openings", tmp_path / "go"
    folder.mkdir()

    @asynccontextmanager
    async def opening(workers: int) -> AsyncIterator[Callable[[int], Awaitable[int]]]:
        number = len(list(folder.iterdir()))
        (folder / str(number)).touch()
        if number == 1:
            raise UserError("port in use, just once")
        while number == 2 and not go.exists():
            await asyncio.sleep(0.1)

        async def made(item: int) -> int:
            if number == 0:
                raise WorkerBroken("gone")
            return item

        yield made

    async def run() -> list[int]:
        settings = Cluster(nodes.address, workers=1)
        fixed: dict[str, Any] = {"deadline_s": 30.0, "environment": {}, "tell": print}
        async with on_ray(opening, settings, **fixed) as made:
            early = asyncio.create_task(made(7))
            while not (folder / "2").exists():
                await asyncio.sleep(0.1)
            # Only now, as the start of a worker's process may itself take long.
            monkeypatch.setattr(cluster, "PATIENCE_S", 1.0)
            late = asyncio.create_task(made(8))
            await asyncio.sleep(3)
            go.touch()
            return await asyncio.gather(early, late)

    assert asyncio.run(asyncio.wait_for(run(), 200)) == [7, 8]


def test_a_place_that_fails_again_and_again_does_not_end_what_another_begins(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "FIRST_PAUSE_S", 0.1)
    first = str(tmp_path / "first")

    @asynccontextmanager
    async def opening(workers: int) -> AsyncIterator[Callable[[int], Awaitable[int]]]:
        try:
            os.mkdir(first)
        except FileExistsError:
            raise UserError("no room on this node") from None
        await asyncio.sleep(6)

        async def made(item: int) -> int:
            return item

        yield made

    found, told = work(nodes, opening, [7])
    assert found == [7], told


def test_an_opening_that_cannot_be_sent_is_a_users_error(nodes: Nodes) -> None:
    lock = threading.Lock()

    def opening(workers: int) -> Any:
        return lock

    (error,), _ = work(nodes, opening, [1])
    assert "no Ray worker became ready: " in str(error)


def test_a_cluster_without_room_is_a_users_error(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "PATIENCE_S", 3.0)

    async def run() -> None:
        settings = Cluster(nodes.address, workers=1, cpus=50.0)
        fixed: dict[str, Any] = {"deadline_s": 9.0, "environment": {}, "tell": print}
        async with on_ray(lambda _: None, settings, **fixed) as made:  # type: ignore[arg-type]
            await made(1)

    with pytest.raises(UserError, match=r"no worker on Ray for 3 s: none has found room; free"):
        asyncio.run(run())


# The command.


def command(server: CountingServer, data: Path, out: Path, *options: object) -> list[str]:
    given = words(server, data, out, "--concurrency", 32, *options)
    return [sys.executable, "-m", "hermes_pipeline", *given]


def run(*given: str) -> Ended:
    done = subprocess.run(given, capture_output=True, text=True, timeout=120)
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f'{{"prompt": "{i}?"}}\n' for i in range(200)))
    return path


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nowhere"])
def test_no_cluster_is_one_line(data: Path, tmp_path: Path, address: str) -> None:
    began = time.monotonic()
    with CountingServer() as server:
        ended = run(*command(server, data, tmp_path / "out", "--ray", address))
    assert (ended.code, ended.out) == (2, "")
    assert f"error: no Ray cluster at {address}: " in ended.err.splitlines()[-1]
    assert time.monotonic() - began < 60


def test_what_is_no_ray_is_given_up_and_hears_ctrl_c(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "PROBE_S", 3.0)
    with CountingServer() as server:
        address = server.url.removeprefix("http://").removesuffix("/v1")

        async def connect() -> None:
            fixed: dict[str, Any] = {"deadline_s": 9.0, "environment": {}, "tell": print}
            async with on_ray(lambda _: None, Cluster(address), **fixed):  # type: ignore[arg-type]
                pass

        with pytest.raises(UserError, match=r"what is there is no Ray that answers in 3 s"):
            asyncio.run(connect())
        given = command(server, data, tmp_path / "out", "--ray", address)
        with subprocess.Popen(given, stderr=subprocess.PIPE, text=True) as process:
            assert comes_true(lambda: bool(processes_of("import logging, sys, ray")), 30)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=20)
        assert process.returncode == 130, said


def test_a_hopeless_error_stops_the_run_in_one_line(
    nodes: Nodes, data: Path, tmp_path: Path
) -> None:
    with CountingServer(lambda *_: 401) as server:
        ended = run(*command(server, data, tmp_path / "out", "--ray", nodes.address, "--json"))
    assert ended.code == 2
    assert all(json.loads(line)["done"] == 0 for line in ended.out.splitlines())
    *told, last = ended.err.splitlines()
    assert "401: the test says 401; 0 answers are safe in " in last
    assert all(line.endswith("workers on Ray are ready") for line in told), told


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_leaves_no_worker_behind(
    nodes: Nodes, data: Path, tmp_path: Path, number: int, code: int
) -> None:
    out = tmp_path / "out"
    with CountingServer(delay_s=0.5) as server:
        process_words = command(server, data, out, "--ray", nodes.address)
        with subprocess.Popen(process_words, stderr=subprocess.PIPE, text=True) as process:
            assert comes_true(lambda: server.answered.total() >= 40, 60)
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
        assert process.returncode == code
        assert said.splitlines()[-1].startswith("hermes4: interrupted; ")
        assert comes_true(lambda: not any(map(nodes.workers, range(3))), 20)
        asked = len(server.bodies)
        time.sleep(1)
        assert len(server.bodies) == asked


def test_each_worker_serves_a_checkpoint_with_a_real_engine(
    nodes: Nodes, model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = ["complete", "--data", data, "--limit", 20, "--out", out, "--checkpoint", model]
    given += ["--max-model-len", 128, "--max-tokens", 4, "--n", 2, "--ray", nodes.address]
    given += ["--set", "ray.workers=1"]
    ended = run(sys.executable, "-m", "hermes_pipeline", *map(str, given))
    assert ended.code == 0, ended.err
    assert ended.out.startswith("20 read = 20 done + 0 set aside + 0 quarantined\n40 answers")
    assert comes_true(lambda: not processes_of(str(model)), 20), processes_of(str(model))


def test_a_lost_node_costs_no_more_than_was_in_flight(
    nodes: Nodes, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with CountingServer(delay_s=0.5) as server:
        process_words = command(server, data, out, "--ray", nodes.address, "--seed", 3)
        with subprocess.Popen(process_words, stderr=subprocess.PIPE, text=True) as process:
            assert comes_true(lambda: server.answered.total() >= 150, 60)
            busy = next(number for number in (2, 1) if nodes.workers(number))
            nodes.kill(busy)
            _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
        assert "a worker on Ray was lost, and " in said
        assert len(server.answered) == 800
        assert server.answered.total() - 800 <= 32
    counts = json.loads((out / "counts.json").read_text())
    assert counts == {"read": 200, "done": 200, "set_aside": 0, "quarantined": 0, "answers": 800}
    with CountingServer() as server:
        assert run(*command(server, data, tmp_path / "calm", "--seed", 3)).code == 0
    assert exported(out) == exported(tmp_path / "calm")
