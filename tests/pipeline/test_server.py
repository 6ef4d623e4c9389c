"""vLLM, started and stopped for a tiny random model: the real engine."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import pytest

from hermes_pipeline.errors import UserError
from hermes_pipeline.records import Message
from hermes_pipeline.sampling.recipe import Data, Recipe, Run
from hermes_pipeline.services.endpoint import Endpoint, EndpointError, Sampling
from hermes_pipeline.services.server import Server
from hermes_pipeline.services.serving import Model
from hermes_pipeline.services.store_reader import read_results
from hermes_pipeline.stages import complete
from running import comes_true, processes_of

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(400)]

HOLD = """
import sys, time
from pathlib import Path
from hermes_pipeline.services.server import Server
with Server(Path(sys.argv[1]), log=Path(sys.argv[2]), max_model_len=128) as server:
    print("ready", server.base_url, flush=True)
    time.sleep(300)
"""


def ask(base_url: str, name: str) -> str:
    body = {"model": name, "prompt": "a = 4 ;", "max_tokens": 4}
    request = urllib.request.Request(
        f"{base_url}/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return str(json.load(reply)["choices"][0]["finish_reason"])


def draw_twice(base_url: str, name: str, folder: Path) -> list[list[int]]:
    """Which draws `hermes4 complete` keeps for each of two conversations."""
    data = folder / "data.jsonl"
    data.write_text('{"prompt": "a = 4 ;"}\n{"prompt": "b = 5 ;"}\n')
    recipe = Recipe(
        Data(str(data)),
        Model(endpoint=(base_url,), name=name),
        Sampling(max_tokens=4),
        run=Run(str(folder / "out"), draws=2),
    )
    complete.run(recipe)
    return [
        [result.draw for result in recorded.results if result.record is not None]
        for recorded in read_results(folder / "out")
    ]


def test_a_killed_owner_leaves_no_server_behind(model: Path, tmp_path: Path) -> None:
    mark = f"HERMES4_TEST_MARK={tmp_path}"
    temporary = Path(tempfile.mkdtemp())  # with a path that is short enough for sockets
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(model), str(tmp_path / "server.log")],
        stdout=subprocess.PIPE,
        env=os.environ | {"HERMES4_TEST_MARK": str(tmp_path), "TMPDIR": str(temporary)},
        text=True,
    )
    try:
        assert owner.stdout is not None
        word, base_url = owner.stdout.readline().split()
        assert word == "ready"
        assert ask(base_url, model.name) in {"length", "stop"}
        assert draw_twice(base_url, model.name, tmp_path) == [[0, 1], [0, 1]]
        assert len(processes_of(mark)) >= 3  # the owner, the guard, vLLM's own
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        owner.communicate()
    assert comes_true(lambda: not processes_of(mark), 30), processes_of(mark)
    shutil.rmtree(temporary / f"torchinductor_{os.getuid()}", ignore_errors=True)
    temporary.rmdir()  # which holds nothing any more


def test_a_server_that_dies_at_start_says_its_last_words(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in model.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))
    with (
        pytest.raises(UserError, match="NoSuchModel"),
        Server(broken, log=tmp_path / "server.log", max_model_len=128),
    ):
        pass
    assert comes_true(lambda: not processes_of(str(broken)), 20)


def test_a_port_in_use_is_named(model: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(UserError, match=str(port)),
            Server(model, port=port, log=tmp_path / "server.log", max_model_len=128),
        ):
            pass


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.json"):
        Server(tmp_path, log=tmp_path / "server.log", max_model_len=128)


def test_the_client_and_a_real_server_understand_each_other(model: Path, tmp_path: Path) -> None:
    async def converse(url: str, name: str) -> None:
        asked = (Message("user", "a = 4 ;"),)
        async with Endpoint(url, name, requests_per_s=1000, tokens_per_s=1e6) as endpoint:
            drawn = Sampling(1.0, 0.9, max_tokens=4, top_k=20, min_p=0.01, stop=("0",), logprobs=2)
            chats = await endpoint.chat(asked, drawn, n=3, seed=1)
            for replies in (
                chats,
                await endpoint.complete("a = 4 ;", drawn, n=3, seed=1),
                await endpoint.complete([5, 6, 7], drawn, n=3, seed=1),
            ):
                assert len(replies) == 3
                for reply in replies:
                    assert reply.finish_reason in ("stop", "length")
                    assert reply.logprobs
                    assert all(t.logprob is not None and t.logprob <= 0 for t in reply.logprobs)
            assert all(len(t.top) >= 2 for reply in chats for t in reply.logprobs or ())
            again = [await endpoint.chat(asked, drawn, n=3, seed=1) for _ in range(2)]
            assert [r.text for r in again[0]] == [r.text for r in again[1]]
            scored = Sampling(0.0, 1.0, max_tokens=1, logprobs=0, extra={"echo": True})
            (echo,) = await endpoint.complete([5, 6, 7], scored)
            assert echo.logprobs is not None
            assert [t.logprob is None for t in echo.logprobs] == [True, False, False, False]
            assert endpoint.usage.completion_tokens > 0
            with pytest.raises(EndpointError, match=r"400: .*maximum context length") as error:
                await endpoint.complete([5] * 500, drawn)
            assert not error.value.hopeless
            assert (endpoint.usage.requests, endpoint.usage.failed) == (6, 1)
        async with Endpoint(url, "another") as endpoint:
            with pytest.raises(EndpointError, match=r"404: .*another") as error:
                await endpoint.chat(asked, drawn)
            assert error.value.hopeless

    async def overflow_a_step(url: str, name: str) -> None:
        """Seeded prompts of 100 tokens at once, where a step of the engine takes 256."""
        drawn = Sampling(1.0, 1.0, max_tokens=4)
        async with Endpoint(url, name, requests_per_s=1000, tokens_per_s=1e6) as endpoint:
            prompts = [[5 + i % 3] * (90 + i) for i in range(30)]
            answered = await asyncio.gather(
                *(endpoint.complete(prompt, drawn, seed=1) for prompt in prompts)
            )
            assert all(reply.finish_reason in ("stop", "length") for (reply,) in answered)

    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    flags = ("--chat-template", str(template), "--max-num-batched-tokens", "256")
    log = tmp_path / "server.log"
    with Server(model, log=log, max_model_len=128, flags=flags) as server:
        for asked in (converse, overflow_a_step):
            asyncio.run(asyncio.wait_for(asked(server.base_url, server.name), 120))
