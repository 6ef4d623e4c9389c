"""The sandbox for other machines: `hermes4 sandbox` as a process, and the box that asks it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from attacks.programs import ATTACKS, REPRESENTATIVE
from attacks.world import PATIENT, Wait, World, attack, family_of, under_us
from hermes_pipeline.errors import UserError
from hermes_pipeline.services.sandbox import (
    Case,
    Job,
    Limits,
    Result,
    Sandbox,
    open_sandbox,
)
from hermes_pipeline.services.sandbox import remote as remote_box
from hermes_pipeline.services.sandbox.messages import TOKEN, read_job, write_job
from hermes_pipeline.services.sandbox.remote import Remote
from hermes_pipeline.services.sandbox.service import MOST, serving
from running import comes_true

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(60)]

SECRET = "a-token-nobody-may-read"
BAD_NAMES = (rb"a\u0000b", rb"\ud800", b"../a")


@contextmanager
def served(*words: str, token: str = "") -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address and the process of a server."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hermes_pipeline", "sandbox", "--workers", "1", *words],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, TOKEN: token},
    )
    assert process.stderr is not None
    with process:
        try:
            line = process.stderr.readline()
            found = re.search(r"http://\S+:\d+", line)
            assert found is not None, line
            yield found[0], process
        finally:
            process.terminate()
            words_left = process.stderr.read()
    if process.returncode != -signal.SIGKILL:
        assert (process.returncode, words_left) == (0, "stopped\n")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    before = set(under_us())
    with served("--port", "0") as (url, _):
        yield url
    assert comes_true(lambda: set(under_us()) <= before, 20)


@pytest.fixture(scope="module")
def remote(server: str, wait: Wait) -> Iterator[Sandbox]:
    """A sandbox with one box on the server."""
    sandbox = open_sandbox(server, workers=1, limits=PATIENT)
    wait(sandbox.__aenter__())
    yield sandbox
    wait(sandbox.__aexit__(None, None, None))


@pytest.mark.parametrize(
    "one", [one for one in ATTACKS if one.name in REPRESENTATIVE], ids=lambda one: one.name
)
def test_a_remote_box_contains_an_attack(
    one: Any, world: World, remote: Sandbox, wait: Wait
) -> None:
    assert attack(one, world, remote, wait) == []


def test_a_remote_run_is_like_one_here(
    remote: Sandbox, sandbox: Sandbox, server: str, wait: Wait
) -> None:
    jobs = [
        Job(PATIENT, "ü\n".encode(), "print(input())\nprint('\ud800')\nexit(3)"),
        Job(PATIENT, source="def f(*x): return x[0] + 1, x[1:]", function="f",
            arguments=[10**30, float("inf"), None, "日本"]),
        Job(PATIENT, b"\xff\x00", command=["sh", "-c", "cat a/b; cat"], files={"a/b": b"\xfe\n"}),
        Job(replace(PATIENT, wall_s=0.3), source="import time\ntime.sleep(9)"),
        Job(replace(PATIENT, output_bytes=9), source="print('x' * 99)"),
    ]  # fmt: skip
    for job in jobs:
        there, here = (wait(box.run_job(job)) for box in (remote, sandbox))
        assert there.box == f"{here.box}, at {server}"
        assert replace(there, cpu_s=0, wall_s=0, box="") == replace(here, cpu_s=0, wall_s=0, box="")


def test_more_jobs_than_the_server_takes_wait_their_turn(server: str, wait: Wait) -> None:
    async def use() -> list[Result]:
        async with open_sandbox(server, workers=12, limits=PATIENT) as sandbox:
            cases = [Case([n]) for n in range(24)]
            return await sandbox.run_cases("def f(n): return n", "f", cases)

    assert [result.value for result in wait(use())] == list(range(24))


def test_a_server_that_is_full_says_so(server: str, wait: Wait) -> None:
    slow = write_job(Job(PATIENT, source="import time\ntime.sleep(3)"))

    async def use() -> list[int]:
        return await asyncio.gather(*(asyncio.to_thread(post, server, slow) for _ in range(5)))

    assert sorted(wait(use())) == [200, 200, 200, 429, 429]


def post(url: str, body: bytes, token: str = "") -> int:
    headers = {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"{url}/v1/run", body, headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            reply.read()
            return int(reply.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"[]", b"[" * 9999, b'{"limits": {}}', b"\xff", b'{"limits": null}'),
        *(write_job(Job(PATIENT, files={"$": b""})).replace(b"$", x) for x in BAD_NAMES),
    ],
)
def test_what_is_no_job_is_refused(body: bytes, server: str) -> None:
    assert post(server, body) == 400


def test_limits_are_lowered_to_those_of_the_server() -> None:
    asked = Limits(1e9, float("inf"), 1 << 60, 1 << 20, 1 << 40, 1 << 40, 1 << 40)
    assert read_job(write_job(Job(asked)), MOST).limits == MOST
    assert read_job(write_job(Job(PATIENT)), MOST).limits == PATIENT
    given = json.loads(write_job(Job(PATIENT)))
    given["limits"]["wall_s"] = float("nan")
    assert read_job(json.dumps(given).encode(), MOST).limits.wall_s == MOST.wall_s
    given["limits"]["wall_s"] = -1
    with pytest.raises(ValueError, match=r"wall_s is -1\.0; it must be above 0"):
        read_job(json.dumps(given).encode(), MOST)


def test_a_job_that_is_too_large_is_refused(remote: Sandbox, wait: Wait) -> None:
    with pytest.raises(UserError, match=r"a job of [\d,]+ bytes is more than the sandbox at http"):
        wait(remote.run("", stdin=bytes(50 << 20)))
    assert wait(remote.run("print(1)")).stdout == "1\n"


# Ends of all kinds.


def test_a_job_ends_when_its_client_is_killed(server: str, remote: Sandbox, wait: Wait) -> None:
    wait(remote.run(""))
    before = set(under_us())
    client = subprocess.Popen([sys.executable, "-c", CLIENT, server])
    assert comes_true(lambda: len(set(under_us()) - before) > 2, 20)  # the client, and its job's
    client.kill()
    client.wait()
    assert comes_true(lambda: not set(under_us()) - before, 20)
    assert wait(remote.run("print(1)")).stdout == "1\n"


CLIENT = """
import asyncio, sys
from hermes_pipeline.services.sandbox import open_sandbox
async def main():
    async with open_sandbox(sys.argv[1], workers=1) as sandbox:
        await sandbox.run("import time\\ntime.sleep(60)")
asyncio.run(main())
"""


def test_a_job_that_is_cancelled_ends_on_the_server(
    server: str, remote: Sandbox, wait: Wait
) -> None:
    async def use() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await remote.run("import time\ntime.sleep(60)")

    wait(remote.run(""))
    before = len(under_us())
    wait(use())
    assert wait(remote.run("print(1)")).stdout == "1\n"
    assert len(under_us()) == before


def test_a_job_whose_server_dies_is_run_on_the_next_one(wait: Wait) -> None:
    async def use(url: str, first: subprocess.Popen[str]) -> Result:
        async with open_sandbox(url, workers=1, limits=PATIENT) as sandbox:
            await sandbox.run("")
            running = asyncio.create_task(sandbox.run("import time\ntime.sleep(1)\nprint(42)"))
            await asyncio.sleep(0.5)
            first.kill()
            with served("--port", url.rpartition(":")[2]):
                return await running

    before = set(under_us())
    with served("--port", "0") as (url, first):
        assert wait(use(url, first)).stdout == "42\n"
    assert comes_true(lambda: set(under_us()) <= before, 20)


def test_a_server_that_is_stopped_ends_its_jobs(wait: Wait) -> None:
    async def use(url: str, process: subprocess.Popen[str]) -> None:
        async with open_sandbox(url, workers=1, limits=PATIENT) as sandbox:
            running = asyncio.create_task(sandbox.run("import time\ntime.sleep(60)"))
            await asyncio.sleep(1)
            boxes = set(family_of(process.pid))
            process.send_signal(signal.SIGINT)
            await asyncio.to_thread(process.wait, 20)
            assert comes_true(lambda: not any(Path(f"/proc/{x}").exists() for x in boxes), 20)
            running.cancel()

    with served("--port", "0") as (url, process):
        wait(use(url, process))


# Who may ask, and whom.


def test_a_token_is_asked_for_and_never_shown(wait: Wait, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(url: str) -> str:
        async with open_sandbox(url, workers=1, limits=PATIENT) as sandbox:
            return (await sandbox.run("import os\nprint(os.environ)")).stdout

    with served("--port", "0", "--host", "0.0.0.0", token=f"{SECRET}\n") as (url, _):
        url = url.replace("0.0.0.0", "127.0.0.1")
        for token in ("another", "ü", SECRET + "ü"):
            assert post(url, write_job(Job(PATIENT)), token) == 401
        for token in ("", "another"):
            monkeypatch.setenv(TOKEN, token)
            with pytest.raises(UserError, match=f"refuses: {TOKEN} is missing or another") as error:
                wait(use(url))
            assert "another one" in str(error.value)
        monkeypatch.setenv(TOKEN, SECRET)
        said = wait(use(url))
        assert "PATH" in said
        assert SECRET not in said


def test_a_token_that_no_header_can_carry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "se\ncret")
    with pytest.raises(UserError, match=f"^{TOKEN} holds characters that no header can carry$"):
        Remote(0, url="http://host:1")


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ("<html>", "what answers at http://127.0.0.1:[0-9]+ is no `hermes4 sandbox`"),
        ("[]", "is no `hermes4 sandbox`"),
        ('{"protocol": 99, "hermes4": "9.0"}', "is of hermes4 9.0 .* the same version at both"),
    ],
)
def test_another_server_is_refused(about: str, said: str, wait: Wait) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=about)

    async def use() -> None:
        app = web.Application()
        app.router.add_get("/", answer)
        async with serving(app, "127.0.0.1", 0) as url:
            await Remote(0, url=url).start()

    with pytest.raises(UserError, match=said):
        wait(use())


async def garbage(request: web.Request) -> web.Response:
    await request.read()
    return web.Response(text='{"ended": "ok"}')


async def broken(request: web.Request) -> web.Response:
    await request.read()
    return web.Response(status=500, text="out of order")


async def cut(request: web.Request) -> web.StreamResponse:
    await request.read()
    reply = web.StreamResponse()
    await reply.prepare(request)
    await reply.write(b"\n")
    assert request.transport is not None
    request.transport.close()
    return reply


async def silent(request: web.Request) -> web.StreamResponse:
    await request.read()
    await asyncio.sleep(9)
    raise AssertionError


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (garbage, "broke off in its answer"),
        (broken, "says 500: out of order"),
        (cut, "went away: "),
        (silent, "went away: "),
    ],
)
def test_a_server_that_fails_is_a_box_that_died(
    fault: Any, said: str, wait: Wait, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def tell(_: web.Request) -> web.Response:
        about = {"protocol": 1, "hermes4": "1", "box": "b 1", "most_bytes": 1 << 20}
        return web.json_response(about)

    async def use() -> Result:
        app = web.Application()
        app.router.add_get("/", tell)
        app.router.add_post("/v1/run", fault)
        async with serving(app, "127.0.0.1", 0) as url, open_sandbox(url, workers=1) as sandbox:
            return await sandbox.run("print(1)")

    monkeypatch.setattr(remote_box, "SILENCE_S", 0.5)
    result = wait(use())
    assert result.ended == "box_error"
    assert said in result.reason


def test_no_server_is_refused_with_the_way_out(wait: Wait) -> None:
    with pytest.raises(UserError, match=r"no sandbox at http://127.0.0.1:9: .*`hermes4 sandbox`"):
        wait(Remote(0, url="http://127.0.0.1:9").start())


NO_ADDRESSES = [
    *("http://", "http://user:word@host", "https://host/path"),
    *("http://[::1", "http://[zz]:80", "http://a..b:80", "http://host:99999"),
]


@pytest.mark.parametrize("url", NO_ADDRESSES)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="the address of a sandbox is http://HOST:PORT") as error:
        Remote(0, url=url)
    assert "word@" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], f"others can reach 0.0.0.0: set {TOKEN} to a secret"),
        (["--box", "chroot"], "there is no box 'chroot'; choose bubblewrap, docker, podman"),
        (["--box", "http://[::1"], "the address of a sandbox is http://HOST:PORT"),
        (["--port", "TAKEN"], "cannot serve at 127.0.0.1:"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(
    words: list[str], said: str, server: str
) -> None:
    words = [word.replace("TAKEN", server.rpartition(":")[2]) for word in words]
    ran = subprocess.run(
        [sys.executable, "-m", "hermes_pipeline", "sandbox", *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, TOKEN: ""},
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith(f"hermes4: error: {said}")
    assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize("host", ["a..b", "nowhere.invalid"])
def test_a_host_that_is_not_ours_is_refused(host: str, wait: Wait) -> None:
    async def serve() -> None:
        async with serving(web.Application(), host, 0):
            pass

    with pytest.raises(UserError, match=f"host '{host}' is no address of this machine"):
        wait(serve())
