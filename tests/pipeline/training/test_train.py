"""What `hermes4 train` hands to its ranks, and keeps in the run folder for `hermes4 export`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hermes_core import open_store
from hermes_pipeline.errors import UserError
from hermes_pipeline.stages import train
from hermes_pipeline.training import run_folder
from hermes_pipeline.training.recipes import load_recipe
from hermes_pipeline.training.run import _options
from hermes_pipeline.training.shape import read_json
from hermes_pipeline.training.weights import stored_dtype, write_json


@pytest.fixture
def store(tmp_path: Path, make_store: Callable[..., Path]) -> Path:
    return make_store(tmp_path / "store", samples=10)


@pytest.fixture
def model(tmp_path: Path, make_model: Callable[..., Path]) -> Path:
    """Start weights whose config.json names no dtype."""
    folder = make_model(tmp_path / "start")
    config = read_json(folder / "config.json")
    unnamed = {key: value for key, value in config.items() if not key.endswith("dtype")}
    write_json(folder / "config.json", unnamed)
    return folder


def test_ranks_are_told_values_that_begin_with_a_hyphen(
    store: Path, model: Path, any_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def launch(arguments: Sequence[str], processes: int) -> int:
        told.extend(arguments)
        return 0

    monkeypatch.setattr(train, "launch", launch)
    monkeypatch.chdir(tmp_path)
    shutil.move(store, "-store")
    shutil.move(model, "-model")
    settings = ["training.steps=3", "data.rows=6"]
    paths = {"store": Path("-store"), "model": "-model", "out": Path("-run")}
    assert train.run(str(any_recipe), **paths, settings=settings) == 0  # type: ignore[arg-type]
    expected = paths | {"recipe": str(any_recipe), "set": settings}
    assert vars(_options(told)) == expected


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (("float32",), "float32"),
        (("bfloat16",), "bfloat16"),
        (("float16",), "float16"),
        (("float64",), "float32"),
        (("bfloat16", "float32"), "float32"),
        (("bfloat16", "float16"), "float32"),
    ],
)
def test_a_run_keeps_the_dtype_of_weights_whose_config_names_none(
    store: Path, model: Path, tmp_path: Path, dtypes: tuple[str, ...], expected: str
) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    for number, dtype in enumerate(dtypes):  # a file of each
        names = list(tensors)[number :: len(dtypes)]
        part = {name: tensors[name].to(getattr(torch, dtype)) for name in names}
        save_file(part, model / f"model-{number}.safetensors")
    computed = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(computed, model / "old.safetensors")
    run_folder.write_model_files(tmp_path / "run", model, open_store(store))
    assert stored_dtype(tmp_path / "run/model") == expected


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_run_keeps_the_dtype_that_config_names(
    store: Path, model: Path, tmp_path: Path, key: str
) -> None:
    write_json(model / "config.json", read_json(model / "config.json") | {key: "bfloat16"})
    run_folder.write_model_files(tmp_path / "run", model, open_store(store))
    assert stored_dtype(tmp_path / "run/model") == "bfloat16"


def test_a_run_that_lost_its_model_files_says_how_they_come_back(
    any_recipe: Path, tmp_path: Path
) -> None:
    run, store, start = (tmp_path / name for name in ("run", "store", "start"))
    saved = run / "checkpoint/step-2"
    saved.mkdir(parents=True)
    (saved / ".metadata").touch()
    recipe = load_recipe(str(any_recipe), ["training.schedule_steps=5"])
    run_folder.write_record(run, recipe, store=store, fingerprint="f", model=start)
    words = rf"^run {run} has lost {run}/model, which .* --store {store} --model {start} and copy"
    with pytest.raises(UserError, match=words):
        train.export(run, tmp_path / "out")
