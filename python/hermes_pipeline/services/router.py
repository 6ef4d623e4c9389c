"""One address for many workers: vllm-router, and a worker's place in its list.

Workers come and go: each puts itself on the router's list when it can answer, looks now and then
whether it still stands there, and may be killed at any time. The router asks each for its health
and repeats elsewhere what a dead one had in hand; what the router cannot repeat (it died itself,
or every worker did) our client repeats.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import compress
from pathlib import Path
from urllib.parse import quote, urlsplit

from hermes_pipeline.errors import UserError
from hermes_pipeline.services.guarded import LOOPBACK, WILDCARDS, Guarded, reserve_port, url_of
from hermes_pipeline.services.plain_http import ask

READY_S = 60.0
HEALTH_S = 5  # the router's patience with a worker that wants to join
FORGET_S = 20.0  # who was silent for so long is struck off the list
MOST_ASKED = 64  # for their health, at once
A_DAY_S = 86_400

SETTINGS = {
    # The least loaded worker once loads differ, else the one that knows the prompt's beginning. In
    # turn, a worker five times slower than two others makes the whole run take 1.6 times as long.
    # It costs a worker one more small request for each chat, to render it; vLLM refuses that one.
    "policy": "cache_aware",
    "balance-abs-threshold": 4,
    "balance-rel-threshold": 1.1,
    # With the router's own minute, who comes back on its old address gets nearly nothing to do.
    "cb-timeout-duration-secs": 3,
    "health-check-interval-secs": 2,
    "worker-startup-timeout-secs": HEALTH_S,
    "worker-startup-check-interval": 1,
    "request-timeout-secs": A_DAY_S,  # how long an answer may take is for the client to say
    "log-level": "info",
}


class Router(Guarded):
    """vllm-router on this machine, for the time of a `with` block; it starts without workers.

    Args:
        host: where it listens; 0.0.0.0 for other machines, which may then add workers, too.
        port: 0 for any free port.
        log: where its output goes; kept afterwards.

    Raises:
        UserError: it is not installed, the port is in use, it died or was late.
    """

    def __init__(self, *, host: str = LOOPBACK, port: int = 0, log: Path) -> None:
        if importlib.util.find_spec("vllm_router") is None:
            raise UserError(
                "vllm-router is not installed: pip install 'hermes4-core[serve]', or vllm-router"
            )
        self.host, self.port = host, reserve_port(host, port)
        self.url = url_of(WILDCARDS.get(host, host), self.port)
        settings = SETTINGS | {
            "host": host,
            "port": self.port,
            "prometheus-port": reserve_port(LOOPBACK, 0),  # its own, 29000, may be taken
        }
        flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        super().__init__(
            [sys.executable, "-P", "-m", "vllm_router.launch_router", *flags],
            called="the router",
            log=log,
            ready_s=READY_S,
            environment=os.environ | {"NO_COLOR": "1", "RUST_BACKTRACE": "0"},
        )

    def is_ready(self) -> bool:
        """Does it answer, be it without a worker?"""
        said = ask(f"{self.url}/liveness")
        return said is not None and said.status == 200


class Roster:
    """Who is on a router's list: adds those it was told of, strikes off those who are gone.

    vllm-router never forgets a worker, and asks for the health of one after another: each whose
    machine has vanished holds the others up for its five seconds. Who was struck off and is alive
    registers again by itself.

    Args:
        router: its address.
        told: workers that do not join by themselves.
        tell: is called with what has changed.
    """

    def __init__(self, router: str, told: Sequence[str], tell: Callable[[str], None]) -> None:
        self._router, self._told, self._tell = router, [read_url(worker) for worker in told], tell
        self._silent_since: dict[str, float] = {}
        self._counts = (0, 0)

    def look(self) -> None:
        """Ask every worker for its health, and do what follows from it."""
        listed = list_workers(self._router)
        if listed is None:
            return
        workers = list(dict.fromkeys([*listed, *self._told]))
        with ThreadPoolExecutor(MOST_ASKED) as pool:
            healthy = set(compress(workers, pool.map(_answers, workers)))
        now = time.monotonic()
        for worker in workers:
            if worker in healthy:
                self._silent_since.pop(worker, None)
                if worker not in listed and not add_worker(self._router, worker):
                    listed.append(worker)
            elif now - self._silent_since.setdefault(worker, now) > FORGET_S and worker in listed:
                self._tell(f"{worker} has not answered for {FORGET_S:.0f} s: off the list")
                remove_worker(self._router, worker)
                listed.remove(worker)
        counts = len(healthy.intersection(listed)), len(listed)
        if counts != self._counts:
            self._counts = counts
            self._tell(f"{counts[0]} of {counts[1]} workers answer")


class Place:
    """A worker's place in the list of a router, kept though either may be started anew.

    Args:
        router, worker: their addresses, with or without `/v1`; the worker's as the router has to
            call it.
        tell: is called with what has changed.

    Raises:
        UserError: an address is none.
    """

    def __init__(self, router: str, worker: str, tell: Callable[[str], None]) -> None:
        self.router, self.worker = read_url(router), read_url(worker)
        self._tell, self._told = tell, ""

    def keep(self) -> None:
        """Register the worker where it is not listed; returns when that was tried."""
        try:
            news = self._keep()
        except UserError as error:  # a proxy, while the router behind it starts anew
            news = f"{error}; trying on"
        if news != self._told:
            self._told = news
            self._tell(news)

    def leave(self) -> None:
        """Strike the worker off the list, if the router can be reached."""
        remove_worker(self.router, self.worker)

    def _keep(self) -> str:
        listed = list_workers(self.router)
        if listed is None:
            return f"no router answers at {self.router}: trying on"
        if self.worker not in listed and (problem := add_worker(self.router, self.worker)):
            return f"the router at {self.router} does not take {self.worker}: {problem}; trying on"
        return f"{self.worker} is on the list of the router at {self.router}"


def list_workers(router: str) -> list[str] | None:
    """The addresses that a router knows; None when there is no answer.

    Raises:
        UserError: it answers, and is no router.
    """
    said = ask(f"{router}/list_workers")
    if said is None or said.status >= 500:
        return None
    known = said.json()
    if said.status != 200 or not isinstance(known, dict) or "urls" not in known:
        raise UserError(f"{router} is no vllm-router: it answers /list_workers with {said.status}")
    return list(known["urls"])


def add_worker(router: str, worker: str) -> str:
    """Put a worker on a router's list; the reason where it was not, and nothing where it was."""
    url = f"{router}/add_worker?url={quote(worker, safe='')}"
    said = ask(url, method="POST", timeout_s=3 * HEALTH_S)
    if said is None:
        return "it does not answer"
    if said.status == 200 or "already exists" in said.text:
        return ""
    return said.text.partition(". Please set")[0]


def remove_worker(router: str, worker: str) -> None:
    """Strike a worker off a router's list; what it has in hand it may finish."""
    ask(f"{router}/remove_worker?url={quote(worker, safe='')}", method="POST")


def _answers(worker: str) -> bool:
    said = ask(f"{worker}/health")
    return said is not None and said.status == 200


def read_url(url: str) -> str:
    """The address of a router or worker, without the `/v1` that clients want.

    Raises:
        UserError: it is none.
    """
    try:
        parts = urlsplit(url)
        is_one = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        is_one = is_one and re.fullmatch("[!-~]+", url) is not None
        (parts.hostname or "").encode("idna")  # as whoever looks it up does
    except ValueError:
        is_one = False
    if not is_one or "@" in url:
        shown = url.rpartition("@")[2]  # what stands before it is a login
        raise UserError(
            f"address {shown!r} wants the form http://host:port, in ASCII and without a login"
        )
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def find_address(host: str, port: int, router: str) -> str:
    """The address by which a router calls what listens here.

    Args:
        host, port: where we listen.

    Raises:
        UserError: the router's name is unknown, or it cannot call us.
    """
    parts = urlsplit(router)
    try:
        family, _, _, _, there = socket.getaddrinfo(
            parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(there)  # sends nothing: it asks which of our addresses leads there
            ours = str(probe.getsockname()[0])
        listening = str(socket.getaddrinfo(host, port)[0][4][0])
    except OSError as error:
        raise UserError(f"the router at {router} cannot be found: {error}") from None
    if host in WILDCARDS:
        return url_of(ours, port)
    if ipaddress.ip_address(listening).is_loopback and ours not in (listening, there[0]):
        raise UserError(
            f"the router at {router} is on another machine, which {host} does not reach; give "
            f"--host 0.0.0.0, or --advertise with the address by which it does"
        )
    return url_of(host, port)
