"""`hermes4 init` and `hermes4 export` say what they write, and replace nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hermes_pipeline.errors import UserError
from hermes_pipeline.stages import train
from hermes_pipeline.training.shape import read_json
from hermes_pipeline.training.weights import write_json, written_whole
from running import Hermes4, contents


@pytest.fixture(scope="module")
def start(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("init") / "start"
    train.init("tiny", tokenizer=str(tokenizer_folder), out=out)
    return out


def test_it_says_how_large_the_model_will_be_and_is(
    hermes4: Hermes4, tokenizer_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "start"
    words = ("init", "--recipe", "tiny", "--tokenizer", tokenizer_folder, "--out", out)
    ended = hermes4(*words)
    before, after = ended.err.splitlines()
    parameters = before.removeprefix("init: a model of ").partition(" ")[0]
    size = (out / "model.safetensors").stat().st_size
    assert ended.code == 0
    assert 0 <= size - 4 * int(parameters.replace(",", "")) < 20_000
    assert before.endswith("B in float32")
    assert after.startswith(f"init: wrote {out}: {parameters} parameters, ")


def test_the_same_again_is_the_same_bytes(
    start: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(start, tmp_path / "start"))
    (out / "model.safetensors").write_bytes(b"torn")
    train.init("tiny", tokenizer=str(tokenizer_folder), out=out)
    assert contents(out) == contents(start)


@pytest.mark.parametrize(
    ("seed", "settings", "words"),
    [
        (1, (), r"seed was 0 and is 1\. Choose another --out, or remove this one"),
        (0, ("model.layers=1",), r"wrote of something else: model.layers was \d and is 1\."),
    ],
)
def test_another_seed_or_shape_does_not_take_its_place(
    start: Path, tokenizer_folder: Path, seed: int, settings: tuple[str, ...], words: str
) -> None:
    before = contents(start)
    with pytest.raises(UserError, match=words):
        train.init("tiny", tokenizer=str(tokenizer_folder), out=start, seed=seed, settings=settings)
    assert contents(start) == before


@pytest.mark.parametrize("seed", [-1, 2**31, 99_999_999_999_999_999_999])
def test_a_seed_that_training_would_refuse_is_refused(
    hermes4: Hermes4, tokenizer_folder: Path, tmp_path: Path, seed: int
) -> None:
    out = tmp_path / "start"
    words = ("--recipe", "tiny", "--tokenizer", tokenizer_folder, "--out", out)
    ended = hermes4("init", *words, f"--seed={seed}")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "Invalid value for '--seed'" in ended.err
    with pytest.raises(UserError, match=rf"^seed is {seed}, outside \[0, 2147483647\]$"):
        train.init("tiny", tokenizer=str(tokenizer_folder), out=out, seed=seed)
    assert not out.exists()


def test_another_tokenizer_does_not_take_its_place(
    start: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tokenizer_folder, tmp_path / "other"))
    state = read_json(other / "tokenizer.json")
    state["model"]["merges"].pop()
    write_json(other / "tokenizer.json", state)
    with pytest.raises(UserError, match=r"wrote of something else: tokenizer was '.*' and is '"):
        train.init("tiny", tokenizer=str(other), out=start)


def test_trained_weights_are_kept(start: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(start, tmp_path / "model"))
    marker = {"made_by": "hermes4 export", "run": "/runs/a", "step": 5}
    write_json(out / "hermes4.json", marker)
    with pytest.raises(UserError, match=r"model holds what `hermes4 export` wrote; choose another"):
        train.init("tiny", tokenizer=str(tokenizer_folder), out=out)


def test_an_export_takes_the_place_of_one_of_the_same_run_alone(tmp_path: Path) -> None:
    def export(run: str, step: int) -> None:
        marker = {"made_by": "hermes4 export", "run": run, "step": step}
        with written_whole(tmp_path / "out", marker=marker, may_differ=("step",)) as folder:
            (folder / "step").write_text(str(step))

    export("/a", 1)
    export("/a", 2)
    with pytest.raises(UserError, match="run was '/a' and is '/b'"):
        export("/b", 3)
    assert (tmp_path / "out" / "step").read_text() == "2"


def test_a_model_larger_than_the_disk_is_refused_before_it_is_made(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hermes_pipeline.services.folders.room", lambda path: 10**9)
    with pytest.raises(UserError, match=r"^--out .* wants 59\.1 GB, and 1\.0 GB are free there"):
        train.init("hermes4_14b", tokenizer=str(tokenizer_folder), out=tmp_path / "start")
    assert list(tmp_path.iterdir()) == []
