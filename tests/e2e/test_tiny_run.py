"""The whole job as a user runs it: real torchtitan, real vLLM, killed once on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from running import processes_of

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(1500)]


def start(out: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "hermes_pipeline", "demo", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "ab") as file:
        return subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, start_new_session=True
        )


def kill_when(process: subprocess.Popen[bytes], path: Path, timeout_s: float) -> None:
    """SIGKILL ``process`` once ``path`` exists."""
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert process.poll() is None, "the demo ended before it could be killed"
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()


def wait(process: subprocess.Popen[bytes], log: Path, timeout_s: float) -> None:
    try:
        code = process.wait(timeout=timeout_s)
    finally:
        process.kill()
        process.wait()
    assert code == 0, log.read_text(errors="replace")[-4000:]


def test_an_untrained_model_learns_the_task_through_the_whole_pipeline(tmp_path: Path) -> None:
    out, log = tmp_path / "demo", tmp_path / "demo.log"
    killed = start(out, log)
    kill_when(killed, out / "run" / "checkpoint" / "step-100" / ".metadata", 600)

    wait(start(out, log), log, 900)
    assert "going on from step 100" in log.read_text()
    before, after = (json.loads((out / n / "scores.json").read_text()) for n in ("before", "after"))
    assert before["score"] < 0.05
    assert after["score"] >= 0.8
    assert after["items"] == 400
    page = (out / "report.html").read_text()
    assert "</html>" in page
    assert "http://" not in page.replace("http://www.w3.org", "")

    steps = (out / "steps.json").read_text()
    wait(start(out, log), log, 120)  # everything is finished: nothing is made again
    assert (out / "steps.json").read_text() == steps
    assert processes_of(str(out)) == {}
