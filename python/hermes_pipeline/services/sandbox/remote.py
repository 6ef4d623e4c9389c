"""A box on another machine: jobs go by HTTP to `hermes4 sandbox`, which is `service.py`."""

from __future__ import annotations

import asyncio
import io
import json
import random
import time
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from hermes_core import __version__
from hermes_pipeline.errors import UserError
from hermes_pipeline.services.limits import read_key
from hermes_pipeline.services.sandbox.jobs import BoxDied, Job, Result
from hermes_pipeline.services.sandbox.messages import (
    BUSY,
    PROTOCOL,
    RUN,
    TOKEN,
    authorization,
    read_result,
    write_job,
)

CONNECT_S = 10.0
SILENCE_S = 30.0  # of a server that has a job; it gives a sign of life every few seconds
BACK_S = 60.0  # until a server that was there must be there again
PAUSES_S = (0.05, 2.0)  # before a busy server is asked again: the first one, and the longest


class Remote:
    """One job at a time on a server's boxes, whose limits may be lower than ours.

    The token is read from HERMES4_SANDBOX_TOKEN and appears in no message.

    Args:
        url: of `hermes4 sandbox`.

    Raises:
        UserError: this is no address, or has a login in it; no header can carry the token.
    """

    def __init__(self, slot: int, *, url: str) -> None:
        del slot  # the server has its own
        if not _is_address(url):
            raise UserError(
                "the address of a sandbox is http://HOST:PORT, without path or login; "
                f"a token is read from {TOKEN}"
            )
        self._url = url.rstrip("/")
        self._headers = authorization(read_key(TOKEN))
        self._session: aiohttp.ClientSession | None = None
        self._was_there = False
        self._most_bytes = 0
        self._name = f"sandbox at {self._url}"

    @property
    def name(self) -> str:
        """The server's box, its version and that of the Python inside, and the address."""
        return self._name

    @property
    def is_ready(self) -> bool:
        """Has the server answered, and no job failed since?"""
        return self._session is not None

    async def start(self) -> None:
        """Ask the server who it is; one that was there before gets some time to come back.

        Raises:
            UserError: no server, not ours, another version, or another token.
        """
        await self.close()
        session = aiohttp.ClientSession(
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S),
        )
        try:
            about = await self._ask(session)
        except BaseException:
            await session.close()
            raise
        self._session, self._was_there = session, True
        self._most_bytes = about["most_bytes"]
        self._name = f"{about['box']}, at {self._url}"

    async def run(self, job: Job) -> Result:
        """Run a job, when the server has room for it; it ends there when this is cancelled.

        Raises:
            BoxDied: the server went away, or its boxes died.
            UserError: the server refuses the job or the token.
        """
        assert self._session is not None
        body = write_job(job)
        if len(body) > self._most_bytes:
            raise UserError(
                f"a job of {len(body):,} bytes is more than the sandbox at {self._url} takes: "
                f"{self._most_bytes:,}"
            )
        pause_s, longest_s = PAUSES_S
        while True:
            status, said = await self._post(self._session, body)
            if status != BUSY:
                break
            await asyncio.sleep(pause_s * random.uniform(0.5, 1))
            pause_s = min(2 * pause_s, longest_s)
        if status in (400, 401, 413):
            raise UserError(f"the sandbox at {self._url} refuses: {_words(said)}")
        if status != 200:
            raise BoxDied(f"the sandbox at {self._url} says {status}: {_words(said)}")
        try:
            answer = json.loads(said)
            if "died" in answer:
                raise BoxDied(answer["died"])
            return read_result(answer, self._url)
        except (ValueError, TypeError, KeyError):
            raise BoxDied(f"the sandbox at {self._url} broke off in its answer") from None

    async def close(self) -> None:
        """Close the connection, on which the server ends a job of ours."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _post(self, session: aiohttp.ClientSession, body: bytes) -> tuple[int, bytes]:
        try:
            async with session.post(self._url + RUN, data=io.BytesIO(body)) as reply:
                return reply.status, await reply.read()
        except (aiohttp.ClientError, OSError) as error:  # a time-out is one
            raise BoxDied(f"the sandbox at {self._url} went away: {_why(error)}") from None

    async def _ask(self, session: aiohttp.ClientSession) -> dict[str, Any]:
        deadline = time.monotonic() + (BACK_S if self._was_there else 0)
        while True:
            try:
                async with session.get(self._url) as reply:
                    return self._checked(reply.status, await reply.read())
            except (aiohttp.ClientError, OSError) as error:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"no sandbox at {self._url}: {_why(error)}; start one there with "
                        "`hermes4 sandbox`, and nothing is run without it"
                    ) from None
            await asyncio.sleep(PAUSES_S[1] / 4)

    def _checked(self, status: int, said: bytes) -> dict[str, Any]:
        """What a server says of itself, if it is one of ours that takes our jobs."""
        if status == 401:
            raise UserError(f"the sandbox at {self._url} refuses: {_words(said)}")
        try:
            about: dict[str, Any] = json.loads(said)
            protocol, version = about["protocol"], about["hermes4"]
        except (ValueError, TypeError, KeyError):
            raise UserError(f"what answers at {self._url} is no `hermes4 sandbox`") from None
        if protocol != PROTOCOL:
            raise UserError(
                f"the sandbox at {self._url} is of hermes4 {version} and does not understand "
                f"{__version__}; install the same version at both ends"
            )
        return about


def _is_address(url: str) -> bool:
    """Is this http://HOST:PORT, with a host that can be looked up and no login?"""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna")
        login = parts.username or parts.password
        return bool(host) and parts.port != 0 and not login and parts.path in ("", "/")
    except ValueError:
        return False


def _words(said: bytes) -> str:
    return " ".join(said[:300].decode(errors="replace").split()) or "nothing"


def _why(error: Exception) -> str:
    return str(error) or type(error).__name__
