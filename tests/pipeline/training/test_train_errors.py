"""What a user can get wrong about a run is said before anything is started."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hermes_core.store import HEADER, read_header
from hermes_pipeline.errors import UserError
from hermes_pipeline.services.hub import load_tokenizer, tokenizer_fingerprint
from hermes_pipeline.stages import train
from hermes_pipeline.training import run_folder
from hermes_pipeline.training.job import Job, prepare
from hermes_pipeline.training.recipes import MAY_CHANGE
from hermes_pipeline.training.run import _begin
from hermes_pipeline.training.shape import Shape

Check = Callable[..., Job]


def test_sound_run_passes_and_leaves_nothing(check: Check) -> None:
    job = check()
    assert (job.step, job.begun, job.complete) == (0, False, False)
    assert not job.folder.exists()


def test_missing_store(check: Check, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        check(store=tmp_path / "nowhere")


def test_unknown_recipe_names_a_close_one(check: Check) -> None:
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        check(recipe="tinny")


def test_unknown_key_of_a_recipe_names_a_close_one(
    check: Check, any_recipe: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(any_recipe.read_text().replace("warmup_steps", "warmup_step"))
    with pytest.raises(UserError, match=r"mine\.toml: unknown key 'warmup_step'.*'warmup_steps'"):
        check(recipe=str(path))


def test_unknown_key_of_a_setting_names_a_close_one(check: Check) -> None:
    with pytest.raises(UserError, match=r"warmup_step.*did you mean.*warmup_steps"):
        check("optimizer.warmup_step=3")


def test_missing_model(check: Check, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        check(model=tmp_path / "nowhere")


def test_model_without_weights(check: Check, folder: Path, tmp_path: Path) -> None:
    shutil.copyfile(folder / "model/config.json", tmp_path / "config.json")
    with pytest.raises(UserError, match=r"holds no \.safetensors file"):
        check(model=tmp_path)


def test_model_whose_weights_are_cut_off(check: Check, folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(folder / "model", tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        check(model=model)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_model_with_a_damaged_file(check: Check, folder: Path, tmp_path: Path, name: str) -> None:
    model = shutil.copytree(folder / "model", tmp_path / "model")
    for text in ("{", "[1]"):
        (model / name).write_text(text)
        with pytest.raises(UserError, match=rf"{name}: not "):
            check(model=model)


def test_weights_of_another_shape(
    check: Check,
    folder: Path,
    tmp_path: Path,
    qwen: Shape,
    make_model: Callable[..., Path],
) -> None:
    model = make_model(tmp_path / "model", replace(qwen, ffn_width=128))
    shutil.copyfile(folder / "model/config.json", model / "config.json")
    with pytest.raises(UserError, match=r"mlp\.\w+\.weight is .*128.*implies .*96"):
        check(model=model)


def test_recipe_of_another_shape(check: Check) -> None:
    with pytest.raises(UserError, match=r"layers"):
        check("model.layers=7")


def test_vocabulary_too_small(
    check: Check, make_store: Callable[..., Path], tmp_path: Path
) -> None:
    store = make_store(tmp_path / "store", samples=3, vocab_size=200)
    with pytest.raises(UserError, match=r"token ids up to 199, but model .* knows 128"):
        check(store=store)


def test_store_of_another_tokenizer(
    check: Check,
    folder: Path,
    tmp_path: Path,
    tokenizer_folder: Path,
    make_store: Callable[..., Path],
) -> None:
    model = shutil.copytree(folder / "model", tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer_folder / name, model / name)
    fingerprint = tokenizer_fingerprint(load_tokenizer(str(tokenizer_folder)))
    same = make_store(tmp_path / "same", samples=3, meta={"tokenizer": fingerprint})
    other = make_store(
        tmp_path / "other", samples=3, meta={"tokenizer": "0" * 64, "tokenizer_name": "Other/Name"}
    )
    assert check(store=same, model=model).step == 0
    with pytest.raises(UserError, match=r"made with another tokenizer \(Other/Name\)"):
        check(store=other, model=model)


def test_row_too_short_for_a_sample(check: Check) -> None:
    with pytest.raises(UserError, match=r"longer than data\.row_length = 8, the first is sample"):
        check("data.row_length=8")


def test_samples_longer_than_a_row_may_be_dropped(check: Check) -> None:
    assert check("data.row_length=32", "data.too_long=drop").step == 0


def test_row_too_short_for_every_sample(check: Check) -> None:
    with pytest.raises(UserError, match=r"every sample .* is longer than data\.row_length = 2"):
        check("data.row_length=2", "data.too_long=drop")


def test_row_longer_than_the_positions_of_the_model(check: Check) -> None:
    with pytest.raises(UserError, match=r"row_length = 1024 is longer than the 512 positions"):
        check("data.row_length=1024")


def test_rows_that_ranks_cannot_share(check: Check) -> None:
    with pytest.raises(UserError, match=r"data\.rows = 384 is no multiple .* 1 x 5 = 5"):
        check("data.rows=384", "data.local_rows=5")
    with pytest.raises(UserError, match=r"data\.rows = 384 is no multiple .* 5 x 1 = 5"):
        check("data.rows=384", processes=5)


def test_processes_that_the_degrees_do_not_make(check: Check) -> None:
    with pytest.raises(UserError, match=r"3 processes cannot be shared as parallel\.tensor = 2"):
        check("parallel.tensor=2", processes=3)


def test_tensor_parallel_degree_that_divides_no_heads(check: Check) -> None:
    with pytest.raises(UserError, match=r"parallel\.tensor = 4 does not divide .*kv_heads = 2"):
        check("parallel.tensor=4", processes=4)


@pytest.mark.parametrize("missing", ["store", "model", "out"])
def test_path_that_nobody_gives(
    folder: Path, any_recipe: Path, tmp_path: Path, missing: str
) -> None:
    paths: dict[str, Any] = {
        "store": folder / "store",
        "model": str(folder / "model"),
        "out": tmp_path / "run",
    }
    with pytest.raises(UserError, match=f"give --{missing} "):
        prepare(str(any_recipe), settings=(), processes=1, **paths | {missing: None})


def test_only_folders_of_saves_are_removed(begun: Path) -> None:
    checkpoints = begun / "checkpoint"
    whole = ("step-2", "step-2-best", "step-3.bad", "bad-step-4", "step-05")
    for name in (*whole, "step-6", "step-7-torn"):
        (checkpoints / name).mkdir(parents=True)
    for name in whole:
        (checkpoints / name / ".metadata").touch()
    (checkpoints / "step-notes.txt").touch()
    (checkpoints / "step-8").touch()
    before = {path.name for path in checkpoints.iterdir()}

    run_folder.remove_torn_checkpoints(begun)

    assert before - {path.name for path in checkpoints.iterdir()} == {"step-6"}
    assert run_folder.checkpoint_steps(begun) == [2]


@pytest.mark.parametrize("step", [0, 2])
def test_job_that_another_overtook_changes_nothing(check: Check, begun: Path, step: int) -> None:
    late = check() if step else replace(check(), begun=False)  # as before the other job's record
    (begun / "checkpoint/step-1").mkdir(parents=True)  # which looks like a save that was cut off
    if step:
        (begun / f"checkpoint/step-{step}").mkdir()
        (begun / f"checkpoint/step-{step}/.metadata").touch()
    before = sorted(begun.rglob("*"))

    with pytest.raises(UserError, match=r"another job has changed run folder .* the same command"):
        _begin(late)

    assert sorted(begun.rglob("*")) == before
    _begin(check())
    assert not (begun / "checkpoint/step-1").exists()


def test_run_folder_of_another_recipe(check: Check, begun: Path) -> None:
    assert check().begun
    with pytest.raises(UserError, match=r"optimizer\.learning_rate was 0\.001 and is 0\.5"):
        check("optimizer.learning_rate=0.5")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("header", r"shard-00000\.bin is not the shard that store\.json lists"),
        ("offsets", "tokens are in samples of -"),
    ],
)
def test_damaged_shard_before_anything_starts(
    check: Check, make_store: Callable[..., Path], tmp_path: Path, damage: str, message: str
) -> None:
    store = make_store(tmp_path / "damaged", samples=10, seed=1)
    path = store / "shard-00000.bin"
    data = bytearray(path.read_bytes())
    second_sample = read_header(path)[2][1] + 8
    data[HEADER.size - 1 if damage == "header" else second_sample + 7] ^= 0x80
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        check(store=store)


def test_run_folder_of_another_store(
    check: Check, begun: Path, make_store: Callable[..., Path], tmp_path: Path
) -> None:
    other = make_store(tmp_path / "other", samples=10, seed=1)
    with pytest.raises(UserError, match="is not the one this run began with"):
        check(store=other)


def test_steps_past_the_schedule_of_the_run(check: Check, begun: Path) -> None:
    with pytest.raises(UserError, match=r"goes past the learning-rate schedule of 5 steps"):
        check("training.steps=6")
    assert check("training.steps=6", "training.schedule_steps=6").begun


PARTS = [
    "{",
    "[]",
    "{}",
    '{"format": 2}',
    '{"format": 3}',
    '{"format": 3, "store": 1, "recipe": 1}',
    '{"format": 3, "model": null, "store": {"folder": "s", "fingerprint": "f"}, '
    '"recipe": {"training.schedule_steps": null}}',
]


@pytest.mark.parametrize("text", PARTS)
def test_damaged_record_of_a_run(check: Check, begun: Path, text: str) -> None:
    (begun / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run\.json is"):
        check()


@pytest.mark.parametrize("line", [b'{"st', b"5", b"{}", b"\xff\0"])
def test_damaged_figures_of_a_run_are_not_lost(check: Check, begun: Path, line: bytes) -> None:
    path = begun / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line)  # cut off
    assert check().begun
    assert run_folder.read_metrics(begun) == [{"step": 1}]
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged; mend it, or move"):
        check()


def test_export_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run folder: it holds no run\.json"):
        train.export(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("step", [None, 3])
def test_export_without_a_checkpoint(begun: Path, tmp_path: Path, step: int | None) -> None:
    torn = begun / "checkpoint/step-3"
    torn.mkdir(parents=True)  # a save that was cut off: no .metadata
    with pytest.raises(UserError, match=r"has not a.* checkpoint.*steps with one: none"):
        train.export(begun, tmp_path / "out", step=step)
    assert not (tmp_path / "out").exists()


def test_export_of_an_unknown_dtype(begun: Path, tmp_path: Path) -> None:
    saved = begun / "checkpoint/step-2"
    saved.mkdir(parents=True)
    (saved / ".metadata").touch()
    with pytest.raises(UserError, match="dtype is 'int8', not float32"):
        train.export(begun, tmp_path / "out", dtype="int8")


def test_init_of_a_vocabulary_too_small(tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.vocab_size = 64, but tokenizer .* has \d+ tokens"):
        train.init(
            "tiny",
            tokenizer=str(tokenizer_folder),
            out=tmp_path / "out",
            settings=["model.vocab_size=64"],
        )
    assert list(tmp_path.iterdir()) == []


def test_init_over_a_folder_of_somebody_else(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").touch()
    with pytest.raises(UserError, match=r"holds precious.txt and no hermes4.json, so it"):
        train.init("tiny", tokenizer=str(tokenizer_folder), out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_mistake_is_one_line_and_exit_code_2(
    folder: Path, any_recipe: Path, tmp_path: Path
) -> None:
    words = ["train", "--recipe", str(any_recipe), "--store", str(tmp_path / "nowhere")]
    words += ["--model", str(folder / "model"), "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "hermes_pipeline", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("hermes4: error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_record_of_a_run_holds_what_is_compared(begun: Path) -> None:
    recipe = json.loads((begun / "run.json").read_text())["recipe"]
    assert recipe.keys() >= MAY_CHANGE
