"""Launch files for clusters: their own tools, the CLI and signals do with them what they say."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from hermes_pipeline.cli import app
from running import comes_true

pytestmark = pytest.mark.timeout(60)

# What stands in for commands of ours and of Slurm: it writes down what it was given, and `hermes4`
# runs until SIGTERM, or fails once both run.
STAND_IN = """#!/bin/bash
name=$(basename "$0")
trap 'trap "" TERM; sleep 0.3; echo "$name $1 ended" >> calls; exit 0' TERM
echo "$name $*" >> calls
[[ $name == scontrol ]] && exit
if [[ $1 == serve && -e fails ]]; then
  until grep -q "^hermes4 route" calls; do sleep 0.05; done
  exit 2
fi
while true; do sleep 0.05; done
"""


@pytest.fixture
def folder(repository: Path) -> Path:
    return repository / "python" / "examples" / "cluster"


@pytest.fixture
def submit(folder: Path, tmp_path: Path) -> Any:
    """Runs a script as a job would, with stand-ins for what it calls."""
    for name in ("hermes4", "scontrol"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "SLURM_JOB_ID": "7"}
    started = []

    def start(script: str) -> subprocess.Popen[bytes]:
        words = ["bash", str(folder / script), "/models/tiny"]
        job = subprocess.Popen(words, cwd=tmp_path, env=environment, start_new_session=True)
        started.append(job)
        return job

    yield start
    for job in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def calls(folder: Path, count: int) -> list[str]:
    """So many lines of what was called, in the order of the alphabet."""
    path = folder / "calls"
    assert comes_true(lambda: path.exists() and path.read_text().count("\n") >= count, 30)
    return sorted(path.read_text().splitlines())


def read_by_cli(words: list[str]) -> dict[str, Any]:
    """What the CLI reads out of a command; it raises what a user would see as an error."""
    name, command, *rest = words
    assert name == "hermes4"
    return dict(typer.main.get_command(app).commands[command].make_context(command, rest).params)


def test_every_script_passes_bash_and_shellcheck(folder: Path) -> None:
    scripts = sorted(map(str, folder.glob("*.sbatch")))
    assert len(scripts) == 2
    subprocess.run(["bash", "-n", *scripts], check=True)
    checker = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [checker, *scripts],
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.stdout == ""


def test_every_resource_is_one_of_kubernetes(folder: Path) -> None:
    checker = Path(sys.executable).with_name("kubernetes-validate")
    done = subprocess.run(
        [checker, "--strict", folder / "kubernetes.yaml"],
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("passed for resource") == 6


def test_resources_find_each_other(folder: Path) -> None:
    found = list(yaml.safe_load_all((folder / "kubernetes.yaml").read_text()))
    by_name = {(each["kind"], each["metadata"]["name"]): each for each in found}
    pods = {
        name: each["spec"]["template"]
        for (kind, name), each in by_name.items()
        if kind == "Deployment"
    }
    commands = {name: pod["spec"]["containers"][0]["command"] for name, pod in pods.items()}
    router = read_by_cli(commands.pop("hermes4-router"))
    service = by_name["Service", "hermes4-router"]["spec"]
    assert service["selector"].items() <= pods["hermes4-router"]["metadata"]["labels"].items()
    port = service["ports"][0]["port"]
    for pod in pods.values():
        (container,) = pod["spec"]["containers"]
        assert container["ports"][0]["containerPort"] == read_by_cli(container["command"])["port"]
        assert pod["metadata"]["labels"]["part-of"] == "hermes4"
    assert router["host"] == "0.0.0.0"
    fixed, spare = (read_by_cli(command) for command in commands.values())
    assert fixed == spare
    assert fixed["join"] == f"http://hermes4-router:{port}"
    assert fixed["host"] == "0.0.0.0"


def test_the_routers_job_runs_both_and_ends_both(submit: Any, tmp_path: Path) -> None:
    job = submit("router.sbatch")
    route, serve = (read_by_cli(shlex.split(line)) for line in calls(tmp_path, 2))
    address = (tmp_path / "router.address").read_text().strip()
    assert address.endswith(f":{route['port']}")
    assert serve["join"] == address
    assert (route["host"], serve["host"], serve["port"]) == ("0.0.0.0", "0.0.0.0", 0)
    job.send_signal(signal.SIGTERM)
    job.wait(30)
    ended = (tmp_path / "calls").read_text().splitlines()[2:]
    assert sorted(ended) == ["hermes4 route ended", "hermes4 serve ended"]


def test_the_routers_job_fails_when_one_of_both_does(submit: Any, tmp_path: Path) -> None:
    (tmp_path / "fails").touch()
    job = submit("router.sbatch")
    assert job.wait(30) == 2
    assert "hermes4 route ended" in calls(tmp_path, 3)


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 1)])
def test_a_workers_job_ends_and_goes_back_into_the_queue_when_its_time_is_up(
    submit: Any, tmp_path: Path, number: signal.Signals, requeued: int
) -> None:
    (tmp_path / "router.address").write_text("http://node1:8000\n")
    job = submit("workers.sbatch")
    (line,) = calls(tmp_path, 1)
    serve = read_by_cli(shlex.split(line))
    assert (serve["join"], serve["port"], serve["host"]) == ("http://node1:8000", 0, "0.0.0.0")
    job.send_signal(number)
    assert job.wait(30) == 0
    after = (tmp_path / "calls").read_text().splitlines()[1:]
    assert after == ["hermes4 serve ended", *["scontrol requeue 7"] * requeued]
