"""vLLM, started and stopped for a tiny random model: the real engine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from hermes_pipeline.errors import UserError
from hermes_pipeline.services.endpoint import Sampling
from hermes_pipeline.services.hub import DataSource, load_template
from hermes_pipeline.services.server import Server
from hermes_pipeline.services.store_reader import read_results
from hermes_pipeline.stages import complete, demo, train
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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    demo.write_tokenizer(folder / "tokenizer", seed=0)
    train.init("tiny", tokenizer=str(folder / "tokenizer"), out=folder / "model", seed=0)
    template = folder / "model" / "chat_template.jinja"
    template.write_text(load_template(demo.TEMPLATE, None)[1])
    return folder / "model"


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
    where = complete.Where(endpoint=base_url, model=name)
    sampling = Sampling(max_tokens=4)
    complete.run(DataSource(str(data)), folder / "out", where, sampling, draws=2)
    return [
        [result.draw for result in recorded.results if result.record is not None]
        for recorded in read_results(folder / "out")
    ]


def test_a_killed_owner_leaves_no_server_behind(model: Path, tmp_path: Path) -> None:
    mark = f"HERMES4_TEST_MARK={tmp_path}"
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(model), str(tmp_path / "server.log")],
        stdout=subprocess.PIPE,
        env=os.environ | {"HERMES4_TEST_MARK": str(tmp_path)},
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
