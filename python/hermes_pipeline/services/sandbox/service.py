"""A sandbox for others: a small HTTP server in front of the boxes of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import socket
from collections.abc import AsyncIterator

from aiohttp import web

from hermes_core import __version__
from hermes_pipeline.errors import UserError
from hermes_pipeline.services.sandbox.jobs import Job, Limits
from hermes_pipeline.services.sandbox.messages import (
    BUSY,
    PROTOCOL,
    RUN,
    TOKEN,
    authorization,
    read_job,
    write_result,
)
from hermes_pipeline.services.sandbox.pool import Sandbox, SandboxBroken

# The most that a job may ask for, whatever its sender says.
MOST = Limits(
    wall_s=600.0,
    cpu_s=600.0,
    memory_bytes=4 << 30,
    processes=256,
    output_bytes=16 << 20,
    file_bytes=1 << 30,
    files=1 << 16,
)
MOST_BYTES = 64 << 20  # of a request
BODY_S = 60.0  # until a request must be here
SIGN_S = 5.0  # between two signs of life
WAITING = 2  # jobs that wait for each that can run; more are sent away for a while


class Service:
    """Answers requests: who is there, and jobs, each of which ends with its connection.

    Args:
        sandbox: runs the jobs.
        workers: how many of them at a time.
        box: the name of its boxes.
        token: asked of every request; "" for none.
    """

    def __init__(self, sandbox: Sandbox, *, workers: int, box: str, token: str) -> None:
        self._sandbox, self._box = sandbox, box
        self._most_jobs = workers * (1 + WAITING)
        self._jobs = 0
        self._asked = authorization(token).get("Authorization", "")

    def build(self) -> web.Application:
        """The application, for a server that cancels a handler when its client has gone."""
        app = web.Application(client_max_size=MOST_BYTES)
        app.router.add_get("/", self._tell)
        app.router.add_post(RUN, self._run)
        return app

    async def _tell(self, request: web.Request) -> web.Response:
        self._check(request)
        return web.json_response(
            {
                "hermes4": __version__,
                "protocol": PROTOCOL,
                "box": self._box,
                "most_bytes": MOST_BYTES,
            }
        )

    async def _run(self, request: web.Request) -> web.StreamResponse:
        self._check(request)
        if self._jobs >= self._most_jobs:
            return web.Response(status=BUSY, text="busy", headers={"Retry-After": "1"})
        self._jobs += 1
        try:
            try:
                async with asyncio.timeout(BODY_S):
                    job = read_job(await request.read(), MOST)
            except ValueError as error:
                return web.Response(status=400, text=str(error))
            except TimeoutError:
                return web.Response(status=408, text=f"no whole request in {BODY_S:g} s")
            reply = web.StreamResponse(headers={"Content-Type": "application/json"})
            await reply.prepare(request)
            await self._answer(job, reply)
            return reply
        finally:
            self._jobs -= 1

    async def _answer(self, job: Job, reply: web.StreamResponse) -> None:
        """Run a job and write how it ended, with signs of life until then."""
        running = asyncio.ensure_future(self._sandbox.run_job(job))
        try:
            while not (await asyncio.wait({running}, timeout=SIGN_S))[0]:
                await reply.write(b"\n")  # which JSON may begin with
            await reply.write(write_result(running.result()))
        except (SandboxBroken, UserError) as error:
            await reply.write(json.dumps({"died": str(error)}).encode())
        finally:
            running.cancel()
            await asyncio.wait({running})

    def _check(self, request: web.Request) -> None:
        shown = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        if self._asked and not hmac.compare_digest(shown, self._asked.encode()):
            raise web.HTTPUnauthorized(text=f"{TOKEN} is missing or another one")


@contextlib.asynccontextmanager
async def serving(app: web.Application, host: str, port: int) -> AsyncIterator[str]:
    """Serve an application for the time of a block; its address.

    Args:
        port: 0 for any free one.

    Raises:
        UserError: the host is not this machine's, or the port cannot be had.
    """
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except (socket.gaierror, UnicodeError) as error:
            raise UserError(f"host {host!r} is no address of this machine: {error}") from None
        except OSError as error:
            raise UserError(
                f"cannot serve at {host}:{port}: {error.strerror}; choose another --port"
            ) from None
        bound = runner.addresses[0]
        yield f"http://{f'[{host}]' if ':' in host else host}:{bound[1]}"
    finally:
        await runner.cleanup()


def check_token(host: str, token: str) -> None:
    """Refuse to serve others without a token.

    Raises:
        UserError: a host that others reach, and no token.
    """
    if not token and not _is_loopback(host):
        raise UserError(
            f"others can reach {host}: set {TOKEN} to a secret of your choice, here and where "
            "jobs come from; or serve this machine alone with --host 127.0.0.1"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
