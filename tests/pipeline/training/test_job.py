"""What a run says of its samples before it starts, and what one that goes on may be told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hermes_pipeline.training import run_folder
from hermes_pipeline.training.job import Job, prepare

Check = Callable[..., Job]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    make_store: Callable[..., Path],
    make_model: Callable[..., Path],
) -> Path:
    folder = tmp_path_factory.mktemp("job")
    make_store(folder / "store", samples=10)
    make_model(folder / "model")
    return folder


@pytest.fixture
def check(folder: Path, any_recipe: Path, tmp_path: Path) -> Check:
    """Checks a run as `hermes4 train` does before it starts a process."""

    def checked(
        *settings: str, store: Path = folder / "store", model: Path | None = folder / "model"
    ) -> Job:
        return prepare(
            str(any_recipe),
            store=store,
            model=None if model is None else str(model),
            out=tmp_path / "run",
            settings=settings,
            processes=1,
        )

    return checked


@pytest.fixture
def begun(check: Check, folder: Path) -> Path:
    """A run folder with a checkpoint."""
    job = check()
    (job.folder / "checkpoint/step-2").mkdir(parents=True)
    (job.folder / "checkpoint/step-2/.metadata").touch()
    run_folder.write_model_files(job.folder, folder / "model", job.store)
    run_folder.write_record(
        job.folder,
        job.recipe,
        store=job.store.folder,
        fingerprint=job.store.fingerprint,
        model=folder / "model",
    )
    return job.folder


def test_a_run_goes_on_with_another_seed_of_torch_which_nothing_uses(
    check: Check, begun: Path
) -> None:
    assert check("training.seed=5").step == 2
