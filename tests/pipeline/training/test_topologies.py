"""One process and many give the same figures on the same rows, through the real command."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from hermes_pipeline.training import launch
from hermes_pipeline.training.run_folder import read_metrics
from hermes_pipeline.training.shape import Shape

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(300)]

Metrics = list[dict[str, Any]]
STEPS = 5
# Small rows, 12 a step, over several epochs; a rate at which rounding is not blown up.
# Tied embeddings start small, so that the first loss is that of a language model.
COMMON = (
    f"training.steps={STEPS}",
    "optimizer.warmup_steps=1",
    "optimizer.learning_rate=3e-4",
    "data.seed=7",
)


@dataclass(frozen=True)
class Case:
    """One way to share the work."""

    model: str
    processes: int
    settings: tuple[str, ...]


CASES = {
    "accumulation, recomputation": Case(
        "llama", 1, ("data.local_rows=2", "training.recompute=full")
    ),
    "2 FSDP": Case("llama", 2, ("data.local_rows=3",)),
    "2 TP": Case("qwen", 2, ("parallel.tensor=2", "data.local_rows=6")),
    "2 copies": Case("qwen", 2, ("parallel.replicate=2", "parallel.shard=1")),
    "2 FSDP x 2 TP": Case("llama", 4, ("parallel.tensor=2", "data.local_rows=2")),
}


def assert_same(figures: Metrics, expected: Metrics) -> None:
    """The same steps to half a digit of what is printed: five of the loss, four of the norm."""
    assert [line["step"] for line in figures] == [line["step"] for line in expected]
    for ours, theirs in zip(figures, expected, strict=True):
        assert ours["kept_tokens"] == theirs["kept_tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=5e-6, rel=0)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], abs=5e-5, rel=0)


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    make_store: Callable[..., Path],
    make_model: Callable[..., Path],
    qwen: Shape,
    llama: Shape,
) -> Path:
    folder = tmp_path_factory.mktemp("topologies")
    make_store(folder / "store", samples=60)
    make_model(folder / "qwen", replace(qwen, tied=True), embedding_std=0.1)
    make_model(folder / "llama", llama)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path, any_recipe: Path, train: Callable[..., Any]) -> Callable[..., Metrics]:
    def figures(case: Case, name: str) -> Metrics:
        ended = train(
            folder / f"{case.model} {name}",
            processes=case.processes,
            settings=[*COMMON, *case.settings],
            recipe=str(any_recipe),
            store=folder / "store",
            model=folder / case.model,
        )
        assert ended.code == 0, ended.said
        return list(ended.metrics)

    return figures


@pytest.fixture(scope="module")
def one_process(run: Callable[..., Metrics]) -> dict[str, Metrics]:
    return {model: run(Case(model, 1, ()), "one") for model in ("qwen", "llama")}


def test_figures_move(one_process: dict[str, Metrics]) -> None:
    for figures in one_process.values():
        assert len({round(line["loss"], 3) for line in figures}) == STEPS


@pytest.mark.parametrize(("key", "error"), [("loss", 1e-5), ("grad_norm", 1e-4), ("step", 1)])
def test_other_figures_are_noticed(one_process: dict[str, Metrics], key: str, error: float) -> None:
    figures = one_process["llama"]
    wrong = [*figures[:-1], figures[-1] | {key: figures[-1][key] + error}]
    with pytest.raises(AssertionError):
        assert_same(wrong, figures)


@pytest.mark.parametrize("name", CASES)
def test_topology_gives_the_figures_of_one_process(
    name: str, run: Callable[..., Metrics], one_process: dict[str, Metrics]
) -> None:
    case = CASES[name]
    assert_same(run(case, name), one_process[case.model])


def test_ranks_that_found_other_checkpoints_are_refused(
    folder: Path,
    any_recipe: Path,
    train: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    machines = (folder / "first machine", folder / "second machine")
    paths = {"store": folder / "store", "model": folder / "llama"}
    settings = ["training.steps=4", "training.schedule_steps=6"]
    ended = train(machines[0], settings=settings, recipe=str(any_recipe), **paths)
    assert ended.code == 0, ended.said
    shutil.copytree(*machines)
    shutil.rmtree(machines[1] / "checkpoint/step-4")
    start = launch._start

    def start_elsewhere(words: Sequence[str], rank: int, *rest: Any) -> Any:
        return start([*words, "--out", str(machines[rank])], rank, *rest)

    monkeypatch.setattr(launch, "_start", start_elsewhere)
    assert launch.launch(["--recipe", str(any_recipe)], 2) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert "rank 1 would do other work than rank 0: the last checkpoint's step is 2, not 4." in said
    assert len(read_metrics(machines[0])) == 4
