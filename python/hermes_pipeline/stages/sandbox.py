"""`hermes4 sandbox`: run model-written code for other machines."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from hermes_pipeline.errors import UserError
from hermes_pipeline.exits import say
from hermes_pipeline.services.limits import read_key
from hermes_pipeline.services.sandbox import open_sandbox
from hermes_pipeline.services.sandbox.messages import TOKEN
from hermes_pipeline.services.sandbox.service import Service, check_token, serving


def run(*, host: str, port: int, workers: int | None, box: str) -> None:
    """Serve jobs until interrupted.

    Raises:
        UserError: no isolation; no token where one is needed, or one that no header can carry; the
            port is taken.
    """
    asyncio.run(_run(host, port, workers or len(os.sched_getaffinity(0)), box))
    say("stopped")


async def _run(host: str, port: int, workers: int, box: str) -> None:
    token = read_key(TOKEN)
    check_token(host, token)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with open_sandbox(box, workers=workers) as sandbox:
        first = await sandbox.run("print('runs')")
        if first.stdout != "runs\n":
            raise UserError(f"the sandbox does not work: {first.reason or first.stderr}")
        app = Service(sandbox, workers=workers, box=first.box, token=token).build()
        async with serving(app, host, port) as url:
            sys.stderr.write(
                f"sandbox at {url}: {first.box}; {workers} at a time; Ctrl-C stops it\n"
            )
            sys.stderr.flush()
            await stop.wait()
