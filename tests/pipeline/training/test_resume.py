"""A run that was stopped or killed ends with the bits of one that was not."""

from __future__ import annotations

import os
import pty
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hermes_pipeline.errors import UserError
from hermes_pipeline.training.run_folder import checkpoint_steps, read_metrics, saves

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

STEPS = 12
PATIENCE_S = 120.0
COMMON = (f"training.steps={STEPS}", "data.local_rows=2")
EACH_STEP = (*COMMON, "checkpoint.every=1")
ENDLESS = ("training.steps=10000", "data.local_rows=2", "checkpoint.every=10000")


@dataclass(frozen=True)
class Bench:
    """A store, start weights, and ways to run them."""

    folder: Path
    train: Callable[..., Any]
    command: Callable[..., list[str]]
    recipe: str

    @property
    def paths(self) -> dict[str, Path]:
        return {"store": self.folder / "store", "model": self.folder / "model"}

    def run(self, name: str, *, processes: int = 1, settings: tuple[str, ...] = COMMON) -> Any:
        return self.train(
            self.folder / name,
            processes=processes,
            settings=settings,
            recipe=self.recipe,
            **self.paths,
        )

    @contextmanager
    def started(
        self, name: str, *, processes: int = 1, settings: tuple[str, ...] = EACH_STEP, **how: Any
    ) -> Iterator[subprocess.Popen[str]]:
        """A run in the background, which does not outlive the test."""
        words = self.command(
            self.recipe, self.folder / name, processes=processes, settings=settings, **self.paths
        )
        with subprocess.Popen(words, text=True, **{"stderr": subprocess.PIPE} | how) as process:
            try:
                yield process
            finally:
                process.kill()

    def wait_for(self, name: str, step: int, process: subprocess.Popen[str]) -> None:
        """Until the run has made so many steps; 0: until it holds its folder."""
        folder, deadline = self.folder / name, time.monotonic() + PATIENCE_S
        while not (folder / ".lock").is_file() or len(read_metrics(folder)) < step:
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline, f"no step {step} in {PATIENCE_S} s"
            time.sleep(0.005)


@pytest.fixture(scope="module")
def bench(
    tmp_path_factory: pytest.TempPathFactory,
    make_store: Callable[..., Path],
    make_model: Callable[..., Path],
    train: Callable[..., Any],
    train_command: Callable[..., list[str]],
    any_recipe: Path,
) -> Bench:
    folder = tmp_path_factory.mktemp("resume")
    make_store(folder / "store", samples=90)
    make_model(folder / "model")
    return Bench(folder, train, train_command, str(any_recipe))


@pytest.fixture(scope="module")
def straight(bench: Bench) -> Path:
    """A run from the first step to the last, without a stop."""
    ended = bench.run("straight", settings=(*COMMON, "checkpoint.every=5"))
    assert ended.code == 0, ended.said
    return Path(ended.folder)


@dataclass(frozen=True)
class Stopped:
    """A run that was asked to stop, and a second job that met it in its folder."""

    folder: Path
    code: int
    said: str
    second: Any


@pytest.fixture(scope="module")
def stopped(bench: Bench) -> Stopped:
    settings = (*COMMON, "checkpoint.every=100")  # only the stop saves
    with bench.started("stopped", settings=settings) as process:
        bench.wait_for("stopped", 0, process)
        second = bench.run("stopped", settings=settings)
        bench.wait_for("stopped", 3, process)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=PATIENCE_S)
    return Stopped(bench.folder / "stopped", process.returncode, said, second)


def figures(folder: Path) -> list[dict[str, Any]]:
    """All of metrics.jsonl but the times."""
    return [
        {key: value for key, value in line.items() if key != "seconds"}
        for line in read_metrics(folder)
    ]


def saved(folder: Path) -> dict[str, Any]:
    """The last checkpoint: weights, moments of the optimizer, positions."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    assert checkpoint_steps(folder)[-1] == STEPS
    whole = folder / "whole.pt"
    dcp_to_torch_save(folder / "checkpoint" / f"step-{STEPS}", whole)
    return flat(torch.load(whole, weights_only=False))


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """A tree of dicts as one dict of its leaves."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, part in value.items() for k, v in flat(part, f"{name}/{key}").items()}


def assert_same_bits(folder: Path, expected: Path) -> None:
    assert [line["step"] for line in figures(expected)] == list(range(1, STEPS + 1))
    assert figures(folder) == figures(expected)
    ours, theirs = saved(folder), saved(expected)
    assert ours.keys() == theirs.keys()
    assert sum(isinstance(leaf, torch.Tensor) for leaf in ours.values()) > 50
    for name, leaf in theirs.items():
        if isinstance(leaf, torch.Tensor):
            assert torch.equal(ours[name], leaf), name
        else:
            assert ours[name] == leaf, name


def test_stopped_run_saves_its_step_and_says_so(stopped: Stopped) -> None:
    assert stopped.code == 75, stopped.said
    (step,) = checkpoint_steps(stopped.folder)
    assert 3 <= step < STEPS
    assert len(figures(stopped.folder)) == step
    assert f"stopped after step {step}; the same command goes on" in stopped.said


def test_second_job_on_a_folder_is_refused_with_one_line(stopped: Stopped) -> None:
    assert stopped.second.code == 2
    loading, refused = stopped.second.said.splitlines()
    assert loading == "train: loading ..."
    assert "is in use by process" in refused


@pytest.mark.parametrize("after_s", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_interrupt_before_the_first_step_is_said(
    bench: Bench, number: int, code: int, after_s: float
) -> None:
    name = f"early{number}-{after_s}"
    with bench.started(name) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "train: loading ...\n"
        time.sleep(after_s)
        process.send_signal(number)
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code, said
    assert said.splitlines()[-1] in (
        "hermes4: interrupted",
        "train: interrupted before a step was taken; run the same command again to go on",
    )
    assert read_metrics(bench.folder / name) == []


@pytest.mark.parametrize(("gap_s", "saves_it"), [(0.05, True), (3.2, False)])
def test_second_signal_stops_at_once_unless_it_is_the_same_one(
    bench: Bench, gap_s: float, saves_it: bool
) -> None:
    name = f"twice-{gap_s}"
    rows = 12 if saves_it else 4000  # some of which take longer than the gap
    with bench.started(name, settings=(*ENDLESS, f"data.rows={rows}")) as process:
        while not (bench.folder / name / "metrics.jsonl").is_file():
            time.sleep(0.05)
        time.sleep(0.5)  # in the midst of training
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(gap_s)
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, said
    words = "stopped after step" if saves_it else "stopped at once; the same command goes on from"
    assert said.splitlines()[-1].startswith(f"train: {words}")
    assert bool(checkpoint_steps(bench.folder / name)) == saves_it


def test_run_that_nobody_reads_of_ends_with_its_steps_saved(bench: Bench) -> None:
    with bench.started("unread", settings=ENDLESS) as process:
        bench.wait_for("unread", 1, process)
        assert process.stderr is not None
        process.stderr.close()
        assert process.wait(PATIENCE_S) == 141
    assert checkpoint_steps(bench.folder / "unread") == [len(figures(bench.folder / "unread"))]


def test_run_whose_terminal_closes_ends_with_its_steps_saved(bench: Bench) -> None:
    ours, theirs = pty.openpty()
    with bench.started("hung", settings=ENDLESS, preexec_fn=lambda: os.login_tty(theirs)) as run:
        os.close(theirs)
        bench.wait_for("hung", 1, run)
        os.close(ours)
        assert run.wait(PATIENCE_S) == 75
    assert checkpoint_steps(bench.folder / "hung") == [len(figures(bench.folder / "hung"))]


@pytest.fixture(scope="module")
def resumed(bench: Bench, stopped: Stopped) -> Any:
    """The stopped run, gone on to its end."""
    shutil.copytree(stopped.folder, bench.folder / "resumed")
    ended = bench.run("resumed")
    assert ended.code == 0, ended.said
    return ended


def test_stopped_run_goes_on_where_it_stopped(stopped: Stopped, resumed: Any) -> None:
    (step,) = checkpoint_steps(stopped.folder)
    assert f"going on from step {step} of {STEPS}" in resumed.said


def test_stopped_run_ends_with_the_same_bits(resumed: Any, straight: Path) -> None:
    assert_same_bits(resumed.folder, straight)


@pytest.mark.parametrize("processes", [1, 2])
def test_damaged_checkpoint_is_named_once_with_the_way_out(
    bench: Bench, stopped: Stopped, processes: int
) -> None:
    from hermes_pipeline.stages.train import export

    folder = bench.folder / f"damaged{processes}"
    shutil.copytree(stopped.folder, folder)
    (step,) = checkpoint_steps(folder)
    checkpoint = folder / f"checkpoint/step-{step}"
    shutil.copytree(checkpoint, folder / "checkpoint/step-1")
    data = checkpoint / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:1000])

    ended = bench.run(folder.name, processes=processes)

    assert ended.code == 2, ended.said
    loading, error = ended.said.splitlines()
    assert loading == "train: loading ..."
    assert error.startswith(f"hermes4: error: checkpoint {checkpoint} cannot be loaded: ")
    assert error.endswith("remove that folder to go on from step 1")
    with pytest.raises(UserError, match=rf"step-{step} cannot be read: .*--step of another"):
        export(folder, folder / "exported")


def test_checkpoint_under_another_name_is_neither_loaded_nor_removed(
    bench: Bench, stopped: Stopped
) -> None:
    folder = bench.folder / "aside"
    shutil.copytree(stopped.folder, folder)
    (step,) = checkpoint_steps(folder)
    aside = folder / f"checkpoint/bad-step-{step}"
    (folder / f"checkpoint/step-{step}").rename(aside)
    best = shutil.copytree(aside, folder / "checkpoint/step-1-best")
    ended = bench.run("aside", settings=(*COMMON, "checkpoint.every=5"))
    assert ended.code == 0, ended.said
    assert "train: beginning anew: the run has no checkpoint\n" in ended.said
    assert (aside / ".metadata").is_file()
    assert (best / ".metadata").is_file()


def test_stopped_run_goes_on_with_more_processes(
    bench: Bench, stopped: Stopped, straight: Path
) -> None:
    folder = bench.folder / "wider"
    shutil.copytree(stopped.folder, folder)
    ended = bench.run("wider", processes=2)
    assert ended.code == 0, ended.said
    ours, theirs = figures(folder), figures(straight)
    for key in ("step", "tokens", "kept_tokens", "lr"):
        assert [line[key] for line in ours] == [line[key] for line in theirs]
    assert [line["loss"] for line in ours] == pytest.approx(
        [line["loss"] for line in theirs], abs=5e-6, rel=0
    )


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_killed_run_leaves_no_process_and_ends_with_the_same_bits(
    bench: Bench, straight: Path
) -> None:
    folder, chance, steps = bench.folder / "killed", random.Random(11), []
    for at_least in (1, 4, 8):
        with bench.started("killed") as process:
            bench.wait_for("killed", at_least, process)
            time.sleep(chance.uniform(0, 0.1))  # in the middle of a step or of a save
            ranks = children(process.pid)
            assert ranks
            process.send_signal(signal.SIGKILL)
            process.wait(timeout=PATIENCE_S)
        deadline = time.monotonic() + 10
        while any(running(pid) for pid in ranks):
            assert time.monotonic() < deadline, f"{ranks} outlive their launcher"
            time.sleep(0.02)
        steps.append(len(read_metrics(folder)))
    assert steps[-1] < STEPS
    ended = bench.run("killed", settings=EACH_STEP)
    assert ended.code == 0, ended.said
    assert_same_bits(folder, straight)


def test_exported_weights_are_the_same_bytes(bench: Bench, resumed: Any, straight: Path) -> None:
    from hermes_pipeline.stages.train import export

    for run in (straight, resumed.folder):
        export(run, run / "exported")
    ours, theirs = (
        (run / "exported/model.safetensors").read_bytes() for run in (resumed.folder, straight)
    )
    assert ours == theirs
    assert ours != (bench.folder / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize("background", ["true", "false"])
def test_last_save_leaves_no_more_checkpoints_than_the_recipe_keeps(
    bench: Bench, background: str
) -> None:
    name = f"kept-{background}"
    folder = bench.folder / name
    settings = (*EACH_STEP, "checkpoint.keep=2", f"checkpoint.background={background}")
    with bench.started(name, settings=settings) as process:
        bench.wait_for(name, 4, process)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 75, said
    step = len(read_metrics(folder))
    assert set(saves(folder / "checkpoint")) == {step - 1, step}
    assert step < STEPS - 1
    for last in (step + 1, STEPS):
        ended = bench.run(
            name,
            settings=(*settings, f"training.steps={last}", f"training.schedule_steps={STEPS}"),
        )
        assert ended.code == 0, ended.said
        assert set(saves(folder / "checkpoint")) == {last - 1, last}


def test_complete_run_started_again_says_so(bench: Bench, straight: Path) -> None:
    before = (straight / "metrics.jsonl").read_bytes()
    ended = bench.run("straight")
    assert ended.code == 0
    assert f"is complete: step {STEPS} of {STEPS}" in ended.said
    assert (straight / "metrics.jsonl").read_bytes() == before


def test_complete_run_with_a_changed_recipe_is_refused(bench: Bench, straight: Path) -> None:
    ended = bench.run("straight", settings=(*COMMON, "optimizer.beta1=0.8"))
    assert ended.code == 2
    assert ended.said.count("\n") == 1
    assert "optimizer.beta1 was 0.9 and is 0.8" in ended.said
