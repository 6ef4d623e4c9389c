"""Where a model answers: at given addresses, or behind a server that we start and watch."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import math
import os
import signal
import threading
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

from hermes_pipeline.config import Count, Range
from hermes_pipeline.errors import UserError
from hermes_pipeline.exits import STOPPING
from hermes_pipeline.records import Message
from hermes_pipeline.services.cluster import Cluster, ItemLost, WorkerBroken, on_ray
from hermes_pipeline.services.endpoint import Endpoint, EndpointError, Reply, Sampling
from hermes_pipeline.services.guarded import Guarded
from hermes_pipeline.services.limits import read_address
from hermes_pipeline.services.progress import waiting
from hermes_pipeline.services.server import READY_S, Server

WATCH_S = 0.5
SLACK_S = 60.0  # a node that is silent for so long after a request's time is up is given up
KEYS = ("OPENAI_API_KEY",)

Positive = Annotated[float, Range(above=0)]


@dataclass(frozen=True, slots=True)
class Model:
    """[model]: who answers: a model at one address or several, or a folder that we serve."""

    endpoint: tuple[str, ...] = ()  # up to and with /v1
    name: str | None = None  # its name there
    checkpoint: str | None = None  # model folder in Hugging Face form
    max_model_len: Count | None = None  # context length, where we serve
    ready_s: Positive = READY_S  # for the first answer of a server of ours

    def shown(self) -> list[str]:
        """The addresses as they may stand in a file: without a login."""
        return [read_address(url, "").shown for url in self.endpoint]

    def identity(self) -> str:
        """What tells this model from others.

        Raises:
            UserError: no model, or two, or what is for another kind.
        """
        if bool(self.endpoint) == (self.checkpoint is not None):
            raise UserError("give --endpoint with --model, or --checkpoint, and not both")
        if self.checkpoint is None:
            if self.name is None:
                raise UserError("--endpoint wants --model, the name of a model there")
            if self.max_model_len is not None:
                raise UserError(
                    "--max-model-len is for a --checkpoint, which is served here; leave it out: "
                    "the server at --endpoint has its own"
                )
            if self.ready_s != READY_S:
                raise UserError(
                    "model.ready_s is for a --checkpoint, which is served here; leave it out: the "
                    "server at --endpoint runs already"
                )
            return self.name
        if self.name is not None:
            raise UserError("--model is for --endpoint; a --checkpoint has its folder's name")
        if not Path(self.checkpoint).is_dir():
            raise UserError(f"--checkpoint {self.checkpoint} is not a folder")
        return fingerprint(Path(self.checkpoint))


@dataclass(frozen=True, slots=True)
class Requests:
    """[requests]: how many at once, how fast, and for how long; see `Endpoint`."""

    concurrency: Count = 64
    timeout_s: Positive = 600.0
    tries: Count = 6
    request_timeout_s: Positive = 3600.0
    run_timeout_s: Positive | None = None
    requests_per_s: Positive | None = None
    tokens_per_s: Positive | None = None


def what_decides(model: Model, sampling: Sampling) -> dict[str, Any]:
    """What decides an answer, besides what is asked and the seed; JSON values.

    Raises:
        UserError: no model, or two, or what is for another kind; log-probabilities, which neither
            `hermes4 complete` nor `evaluate` keeps.
    """
    if sampling.logprobs is not None:
        raise UserError(
            f"sampling.logprobs is {sampling.logprobs}, and this command keeps no "
            f"log-probabilities; leave it out: in Python, services.endpoint.Endpoint gives them"
        )
    return {
        "model": model.identity(),
        "max_model_len": model.max_model_len,
        **asdict(sampling),
        "stop": list(sampling.stop),
    }


class Address(NamedTuple):
    base_urls: Sequence[str]
    model: str  # the name it is known by there
    check: Callable[[], None]  # raises UserError when a server of ours has died


@dataclass(frozen=True, slots=True)
class Request:
    """What a model is asked."""

    messages: tuple[Message, ...]
    sampling: Sampling
    seed: int


Answering = Callable[[Request], Awaitable[Reply]]


class Answerer(NamedTuple):
    """A model that is ready to be asked, for the time of the block that `opened` is for."""

    opened: AbstractAsyncContextManager[Answering]
    check: Callable[[], None]  # raises UserError when a server of ours has died


@contextmanager
def answerer(
    model: Model, requests: Requests, cluster: Cluster, log: Path, tell: Callable[[str], object]
) -> Iterator[Answerer]:
    """Who answers, for the time of a block: from here, or by workers on a Ray cluster.

    Args:
        log: of a server that is started here.
        tell: takes what happens to workers and addresses, in a line.
    """
    if cluster.address is not None:
        yield Answerer(_on_ray(model, requests, cluster, tell), lambda: None)
        return
    with at_address(model, log) as address:
        yield Answerer(answering(address, requests, tell), address.check)


@contextmanager
def at_address(model: Model, log: Path) -> Iterator[Address]:
    """The address of a model, for the time of a block; a folder is served, and its log kept."""
    if model.checkpoint is None:
        assert model.name is not None
        yield Address(model.endpoint, model.name, lambda: None)
        return
    server = _server(model, log)
    with running(server):
        yield Address([server.base_url], server.name, server.check)


def _server(model: Model, log: Path) -> Server:
    assert model.checkpoint is not None
    length, ready_s = model.max_model_len, model.ready_s
    return Server(model.checkpoint, max_model_len=length, log=log, ready_s=ready_s)


@contextmanager
def running(program: Guarded) -> Iterator[None]:
    """The program, from its start to its end, with something to look at until it is ready."""
    try:
        with waiting(f"start {program.called} (log: {program.log})") as tick:
            program.start()
            program.wait_ready(tick)
        yield
    finally:
        program.stop()


@asynccontextmanager
async def answering(
    address: Address, requests: Requests, tell: Callable[[str], object] | None = None
) -> AsyncIterator[Answering]:
    """Has requests answered at an address, for the time of a block; `tell` as in `Endpoint`."""
    options = asdict(requests) | {"run_timeout_s": requests.run_timeout_s or math.inf}
    options["tell"] = tell
    async with Endpoint(address.base_urls, address.model, **options) as endpoint:

        async def answer(request: Request) -> Reply:
            replies = await endpoint.chat(request.messages, request.sampling, seed=request.seed)
            return replies[0]

        yield answer


@asynccontextmanager
async def serving(model: Model, requests: Requests) -> AsyncIterator[Answering]:
    """As `answering`, behind a server of our own on the machine where this is run."""
    assert model.checkpoint is not None
    with TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        server = _server(model, log)
        try:
            server.start()
            try:
                await asyncio.to_thread(server.wait_ready)
            except UserError as error:  # the log goes with this machine's folder
                raise UserError(str(error).replace(f"its log {log}", "its log")) from None
            address = Address([server.base_url], server.name, server.check)
            async with answering(address, requests) as answer:

                async def checked(request: Request) -> Reply:
                    try:
                        return await answer(request)
                    except EndpointError as error:
                        try:
                            server.check()
                        except UserError as end:
                            reason = str(end).replace(f"its log {log}", "its log")
                            raise WorkerBroken(reason) from error
                        raise

                yield checked
        finally:
            await asyncio.to_thread(server.stop)


@asynccontextmanager
async def _on_ray(
    model: Model, requests: Requests, cluster: Cluster, tell: Callable[[str], object]
) -> AsyncIterator[Answering]:
    """As `answering`, by workers on a Ray cluster; a folder is served by each of them."""
    gpus = 0.0 if model.checkpoint is None else 1.0
    opening = functools.partial(_on_a_node, model, requests)
    key = {name: os.environ[name] for name in KEYS if name in os.environ}
    deadline_s = requests.request_timeout_s + SLACK_S
    async with on_ray(
        opening, cluster, gpus=gpus, deadline_s=deadline_s, environment=key, tell=tell
    ) as answer:

        async def explained(request: Request) -> Reply:
            try:
                return await answer(request)
            except ItemLost as lost:
                raise EndpointError(f"on Ray: {lost}") from None

        yield explained


def _on_a_node(
    model: Model, requests: Requests, workers: int
) -> AbstractAsyncContextManager[Answering]:
    """One worker's share of all requests."""
    rates = requests.requests_per_s, requests.tokens_per_s
    requests_per_s, tokens_per_s = (rate and rate / workers for rate in rates)
    share = replace(requests, requests_per_s=requests_per_s, tokens_per_s=tokens_per_s)
    if model.checkpoint is not None:
        return serving(model, share)
    assert model.name is not None
    return answering(Address(model.endpoint, model.name, lambda: None), share)


async def watched(work: Coroutine[Any, Any, None], check: Callable[[], None]) -> None:
    """Have ``work`` done; end it at once by what ``check`` raises, now and then."""

    async def watch() -> None:
        while True:
            check()
            await asyncio.sleep(WATCH_S)

    with _signals_cancel():
        watching = asyncio.create_task(watch())
        working = asyncio.create_task(work)
        try:
            await asyncio.wait({watching, working}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                watching.result()
            await working
        finally:
            for task in (watching, working):
                task.cancel()
            await asyncio.gather(watching, working, return_exceptions=True)


@contextmanager
def _signals_cancel() -> Iterator[None]:
    """What would interrupt us cancels this task, once: another would leave others half ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, this, came = asyncio.get_running_loop(), asyncio.current_task(), list[int]()
    assert this is not None
    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in STOPPING}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}

    def hear(number: int, frame: types.FrameType | None) -> None:
        try:
            handlers[number](number, frame)
        except KeyboardInterrupt:
            came.append(number)
            if len(came) == 1:
                loop.call_soon_threadsafe(this.cancel)

    for number in handlers:
        signal.signal(number, hear)
    try:
        yield
    except asyncio.CancelledError:
        if came:
            raise KeyboardInterrupt from None
        raise
    finally:
        if not came:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def first_of(group: BaseExceptionGroup[Any]) -> BaseException:
    """The first of the errors that several tasks have ended with."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def fingerprint(model: Path) -> str:
    """The model folder with what tells one state of its files from another."""
    files = sorted(p for p in model.iterdir() if p.is_file())
    stamp = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return f"{model.resolve()} {hashlib.sha256(repr(stamp).encode()).hexdigest()[:16]}"
