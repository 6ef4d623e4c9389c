"""A server that answers each request as a function says, and counts what it has answered."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

ANSWER_BYTES = 2_000

# What becomes of a request, by its body and how often it was asked before: "answer", "cut" (half
# of an answer), "hang", or an HTTP status.
Decide = Callable[[dict[str, Any], int], str | int]


def answer_all(body: dict[str, Any], before: int) -> str:
    """Without a fault."""
    return "answer"


class CountingServer:
    """The server, in a thread of its own for the time of a `with` block.

    Attributes:
        bodies: every request, as it came.
        answered: how often each (messages, seed) was answered as a whole.
        tokens: how many tokens each of those answers has.
        counts: which counts of tokens it says itself.
    """

    def __init__(self, decide: Decide = answer_all, *, delay_s: float = 0.0) -> None:
        self.decide, self.delay_s = decide, delay_s
        self.bodies: list[dict[str, Any]] = []
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.tokens: dict[str, int] = {}
        self.counts = {"prompt_tokens", "completion_tokens"}
        self.url = ""
        self._port = 0  # any; from then on the same
        self._connections: set[_Connection] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> CountingServer:
        self._thread.start()
        self.appear()
        return self

    def __exit__(self, *_: object) -> None:
        self.vanish()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def appear(self) -> None:
        """Listen, where it did before if it did."""
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    def vanish(self) -> None:
        """Cut every connection, and refuse new ones."""
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._connections)

    async def _start(self) -> None:
        self._server = await self._loop.create_server(
            lambda: _Connection(self), "127.0.0.1", self._port
        )
        self._port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}/v1"

    async def _stop(self) -> None:
        self._server.close()
        for connection in list(self._connections):
            connection.transport.abort()
        await asyncio.sleep(0)

    def joined(self, connection: _Connection) -> None:
        self._connections.add(connection)

    def left(self, connection: _Connection) -> None:
        self._connections.discard(connection)

    def respond(self, connection: _Connection, data: bytes) -> None:
        """Do with one request as was decided."""
        body = json.loads(data)
        self.bodies.append(body)
        key = key_of(body)
        what = self.decide(body, self.asked[key])
        self.asked[key] += 1
        self._loop.call_later(self.delay_s, self._write, connection, key, what)

    def _write(self, connection: _Connection, key: str, what: str | int) -> None:
        if what == "hang" or connection.transport.is_closing():
            return
        if isinstance(what, int):
            said = {"error": {"message": f"the test says {what}"}}
            connection.transport.write(_http(what, json.dumps(said).encode()))
            return
        text = _text(key)
        self.tokens[key] = len(text) // 4
        answer = _completion(text)
        answer["usage"] = {name: answer["usage"][name] for name in self.counts}
        whole = _http(200, json.dumps(answer).encode())
        if what == "cut":
            connection.transport.write(whole[: len(whole) // 2])
            connection.transport.close()
        else:
            self.answered[key] += 1
            connection.transport.write(whole)


class _Connection(asyncio.Protocol):
    """HTTP/1.1 as far as our client speaks it: requests one after another, with their length."""

    transport: asyncio.Transport

    def __init__(self, server: CountingServer) -> None:
        self._server, self._data = server, b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._server.joined(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._server.left(self)

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, ended, rest = self._data.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]
        if ended and len(rest) >= int(length):
            self._data = rest[int(length) :]
            self._server.respond(self, rest[: int(length)])


def key_of(body: dict[str, Any]) -> str:
    """What tells one draw from others, as the server sees it."""
    return json.dumps([body["messages"], body["seed"]])


def _text(key: str) -> str:
    """The answer to a request: long, and the same each time."""
    digest = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    return (digest * (ANSWER_BYTES // len(digest)))[: ANSWER_BYTES - int(digest[:2], 16)]


def _completion(text: str) -> dict[str, Any]:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 5, "completion_tokens": len(text) // 4}
    return {"choices": [choice], "usage": usage}


def _http(status: int, content: bytes) -> bytes:
    head = f"HTTP/1.1 {status} Test\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
