"""`hermes4 serve` and `hermes4 route`: a model behind an endpoint, and many behind one."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hermes_pipeline.errors import UserError
from hermes_pipeline.services.guarded import LOOPBACK, WILDCARDS, Guarded, url_of
from hermes_pipeline.services.limits import read_key
from hermes_pipeline.services.router import (
    Place,
    Roster,
    Router,
    find_address,
    list_workers,
    read_url,
)
from hermes_pipeline.services.server import READY_S, Server
from hermes_pipeline.services.serving import WATCH_S, running

LOOK_S = 2.0  # between two looks at the router's list


def serve(
    model: Path,
    *,
    host: str = LOOPBACK,
    port: int = 8000,
    max_model_len: int | None = None,
    ready_s: float = READY_S,
    log: Path | None = None,
    join: str | None = None,
    advertise: str | None = None,
) -> None:
    """Serve a model with vLLM until Ctrl-C.

    Args:
        join: a router, on whose list the server stands from its first answer to its end.
        advertise: the server's address as the router has to call it; found out if None.
    """
    if advertise is not None and join is None:
        raise UserError("--advertise says how a router calls the server; give --join, too")
    log = log or Path(f"{model.resolve().name}.server.log")
    key = read_key("VLLM_API_KEY")
    server = Server(
        model,
        host=host,
        port=port,
        max_model_len=max_model_len,
        log=log,
        ready_s=ready_s,
        key=key,
    )
    if host != LOOPBACK and not key:
        _say(f"whoever reaches port {server.port} can use the model; VLLM_API_KEY sets a key")
    with contextlib.ExitStack() as ending:
        # A wrong address shows before the model is loaded.
        place = None if join is None else _find_place(join, server, advertise)
        ending.enter_context(running(server))
        _say(f"model {server.name} at {_shown(host, server.port)}/v1; Ctrl-C stops it")
        if place is None:
            _watch(server, lambda: None)
        else:
            ending.callback(place.leave)  # before the server stops
            _watch(server, place.keep)
    _say("stopped")


def route(
    workers: Sequence[str], *, host: str = LOOPBACK, port: int = 8000, log: Path | None = None
) -> None:
    """Put one address before many workers, until Ctrl-C.

    Args:
        workers: addresses of servers that do not join by themselves; they may start later.
    """
    router = Router(host=host, port=port, log=log or Path("router.log"))
    shown = _shown(host, router.port)
    roster = Roster(router.url, workers, _say)
    with running(router):
        _say(f"router at {shown}/v1; Ctrl-C stops it; hermes4 serve MODEL --join {shown}")
        while True:
            try:
                _watch(router, roster.look)
                break
            except UserError as error:  # the workers join a new one by themselves
                _say(f"{error}\nstart it again")
                router.stop()
                router.start()
                router.wait_ready()
    _say("stopped")


def _find_place(join: str, server: Server, advertise: str | None) -> Place:
    router = read_url(join)
    worker = advertise or find_address(server.host, server.port, router)
    if list_workers(router) is None:
        _say(f"no router answers at {router} yet")
    return Place(router, worker, _say)


def _watch(program: Guarded, look: Callable[[], None]) -> None:
    """Look now and then, until Ctrl-C; ends by `UserError` when the program has ended."""
    next_look = 0.0
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            program.check()
            if time.monotonic() >= next_look:
                look()
                next_look = time.monotonic() + LOOK_S
            time.sleep(WATCH_S)


def _shown(host: str, port: int) -> str:
    """The address for people: of this machine, where we listen on all of its addresses."""
    return url_of(socket.gethostname() if host in WILDCARDS else host, port)


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
