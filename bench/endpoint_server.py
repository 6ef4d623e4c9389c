"""A server in its own process that answers every chat request at once with the same 2 kB."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection

TEXT = "the same answer again " * 80
ANSWER_BYTES = 2000


@contextmanager
def serving() -> Iterator[tuple[str, Connection]]:
    """Its base URL, and a line that tells on request what it has seen: see `_serve`."""
    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=_run, args=(theirs,), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}/v1", ours
    finally:
        process.terminate()
        process.join()


def ask_counts(line: Connection) -> tuple[int, int]:
    """Requests answered and the most connections at once, since it was asked last."""
    line.send(None)
    requests, connections = line.recv()
    return requests, connections


class _Seen:
    requests = connections = most_connections = 0


class _Http(asyncio.Protocol):
    """No more HTTP than the clients of this benchmark speak."""

    def __init__(self, seen: _Seen, answer: bytes) -> None:
        self._seen, self._answer, self._read = seen, answer, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._seen.connections += 1
        self._seen.most_connections = max(self._seen.most_connections, self._seen.connections)

    def connection_lost(self, exc: Exception | None) -> None:
        self._seen.connections -= 1

    def data_received(self, data: bytes) -> None:
        self._read += data
        while (end := self._read.find(b"\r\n\r\n") + 4) > 3:
            head = self._read[:end].lower()
            size = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            if len(self._read) < end + size:
                return
            self._read = self._read[end + size :]
            self._seen.requests += 1
            self._transport.write(self._answer)


def _run(line: Connection) -> None:
    asyncio.run(_serve(line))


async def _serve(line: Connection) -> None:
    seen, answer, loop = _Seen(), _answer(), asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Http(seen, answer), "127.0.0.1", 0, backlog=4096)
    line.send(server.sockets[0].getsockname()[1])

    def tell() -> None:
        line.recv()
        line.send((seen.requests, seen.most_connections))
        seen.requests, seen.most_connections = 0, seen.connections

    loop.add_reader(line.fileno(), tell)
    await server.serve_forever()


def _answer() -> bytes:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": TEXT},
        "logprobs": None,
        "finish_reason": "stop",
    }
    body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "tiny",
        "choices": [choice],
        "usage": {"prompt_tokens": 250, "completion_tokens": 320, "total_tokens": 570},
    }
    content = json.dumps(body).encode()
    content += b" " * (ANSWER_BYTES - len(content))
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
    return head.encode() + b"\r\n\r\n" + content
