"""A router and the list of its workers: who is added, struck off or refused; addresses."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hermes_pipeline.errors import UserError
from hermes_pipeline.services import router as router_module
from hermes_pipeline.services.router import Place, Roster, Router, find_address, read_url
from running import comes_true, free_port, get

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(200)]


def test_who_is_gone_is_struck_off_and_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_module, "FORGET_S", 0.5)
    said: list[str] = []
    port = free_port()
    worker = f"http://127.0.0.1:{port}"

    def is_listed() -> bool:
        roster.look()
        return worker in get(f"{router.url}/list_workers")["urls"]

    with Router(log=tmp_path / "router.log") as router:
        roster = Roster(router.url, [worker], said.append)
        assert not is_listed()
        for _ in range(2):
            with answering_health(port):
                assert comes_true(is_listed, 10)
            assert comes_true(lambda: not is_listed(), 10)
    gone = ["0 of 1 workers answer", f"{worker} has not answered for 0 s: off the list"]
    assert said == ["1 of 1 workers answer", *gone, "0 of 0 workers answer"] * 2


@contextmanager
def answering_health(port: int) -> Iterator[None]:
    """A server that is well, whatever it is asked."""

    class Well(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Well) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def test_a_worker_says_once_when_the_router_cannot_reach_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(router_module.SETTINGS, "worker-startup-timeout-secs", 1)
    said: list[str] = []
    nowhere = f"http://127.0.0.1:{free_port()}"
    with Router(log=tmp_path / "router.log") as router:
        place = Place(router.url, nowhere, said.append)
        place.keep()
        place.keep()
    place.keep()
    assert len(said) == 2
    assert said[0].startswith(f"the router at {router.url} does not take {nowhere}: Timeout 1s")
    assert said[1] == f"no router answers at {router.url}: trying on"


def test_a_routers_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 cannot be used"):
            Router(port=port, log=tmp_path / "router.log")


def test_a_missing_router_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        Router(log=tmp_path / "router.log")


def test_a_router_that_dies_at_start_says_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(router_module.SETTINGS, "policy", "power_of_two")
    with (
        pytest.raises(UserError, match="requires at least 2 workers"),
        Router(log=tmp_path / "router.log"),
    ):
        pass


@pytest.mark.parametrize(
    ("host", "router", "found"),
    [
        ("127.0.0.1", "http://127.0.0.1:80", "http://127.0.0.1:9"),
        ("0.0.0.0", "http://127.0.0.1:80", "http://127.0.0.1:9"),
        ("localhost", "http://localhost", "http://localhost:9"),
    ],
)
def test_a_worker_knows_its_address(host: str, router: str, found: str) -> None:
    assert find_address(host, 9, router) == found


def test_addresses_are_read_with_and_without_v1() -> None:
    for url in ("http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/"):
        assert read_url(url) == "http://a:1"
    wrong = (
        "a:1",
        "ftp://a:1",
        "http://",
        "http://a:x",
        "http://[a",
        "http://a..b",
        "http://a:1/ü",
        "http://€:1",
        "http://a:1/ b",
        "http://a:1\n",
        "http://me:hush@a:1",
    )
    for url in wrong:
        with pytest.raises(UserError, match="wants the form") as caught:
            read_url(url)
        assert "hush" not in str(caught.value)
