"""Small stores and model folders for the tests of training."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hermes_core import StoreWriter
from hermes_pipeline.training import run_folder
from hermes_pipeline.training.job import Job, check_tokenizer, prepare
from hermes_pipeline.training.run_folder import read_metrics
from hermes_pipeline.training.shape import RopeScaling, Shape, hugging_face_config
from hermes_pipeline.training.weights import write_json, write_random

QWEN = Shape(
    family="qwen3",
    layers=2,
    width=64,
    heads=4,
    kv_heads=2,
    head_size=32,
    ffn_width=96,
    vocab_size=128,
    tied=False,
    norm_eps=1e-6,
    rope_theta=1e6,
    max_positions=512,
)
LLAMA = Shape(
    family="llama3",
    layers=2,
    width=64,
    heads=4,
    kv_heads=2,
    head_size=16,
    ffn_width=96,
    vocab_size=128,
    tied=False,
    norm_eps=1e-5,
    rope_theta=500_000.0,
    max_positions=512,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64),
)

# Gives no shape: that of each model's config.json holds.
RECIPE = """
[model]
[data]
row_length = 64
rows = 12
packing = "best_fit_decreasing"
too_long = "error"
seed = 0
[optimizer]
learning_rate = 1e-3
warmup_steps = 1
decay = "cosine"
final_fraction = 0.1
beta1 = 0.9
beta2 = 0.95
eps = 1e-8
weight_decay = 0.1
max_grad_norm = 1.0
[training]
steps = 5
seed = 0
precision = "float32"
recompute = "none"
deterministic = false
[parallel]
tensor = 1
replicate = 1
shard = -1
timeout_s = 60
[checkpoint]
every = 2
keep = 2
background = false
[run]
"""

MakeStore = Callable[..., Path]
Check = Callable[..., Job]
MakeModel = Callable[..., Path]


@pytest.fixture(scope="session")
def qwen() -> Shape:
    return QWEN


@pytest.fixture(scope="session")
def llama() -> Shape:
    return LLAMA


@pytest.fixture(scope="session")
def any_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of a few short steps for any of the models."""
    path = tmp_path_factory.mktemp("recipe") / "any.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def make_store() -> MakeStore:
    """Writes a store: an answer repeats its question with every id moved up by one."""

    def make(
        folder: Path,
        *,
        samples: int = 60,
        longest: int = 60,
        vocab_size: int = 128,
        seed: int = 0,
        kept: bool = True,
        meta: dict[str, Any] | None = None,
    ) -> Path:
        rng = np.random.default_rng(seed)
        with StoreWriter(folder, meta=meta or {}, vocab_size=vocab_size) as writer:
            for _ in range(samples):
                half = int(rng.integers(2, longest // 2 + 1))
                question = rng.integers(0, vocab_size - 1, half)
                spans = np.array([[half, 2 * half]] if kept else np.zeros((0, 2)), np.uint32)
                writer.append(np.concatenate([question, question + 1]), spans)
            writer.finish()
        return folder

    return make


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """Writes a model folder with random weights and no tokenizer."""

    def make(
        folder: Path, shape: Shape = QWEN, *, seed: int = 0, embedding_std: float = 0.5
    ) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        config = hugging_face_config(shape, dtype="float32", token_ids={"eos_token_id": 3})
        write_json(folder / "config.json", config)
        write_random(folder, shape, embedding_std=embedding_std, seed=seed)
        return folder

    return make


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, make_store: MakeStore, make_model: MakeModel
) -> Path:
    """A store and a model that go together."""
    folder = tmp_path_factory.mktemp("sound")
    make_store(folder / "store", samples=10)
    make_model(folder / "model")
    return folder


@pytest.fixture
def check(folder: Path, any_recipe: Path, tmp_path: Path) -> Check:
    """Checks a run as `hermes4 train` does before it starts a process."""

    def checked(
        *settings: str,
        store: Path = folder / "store",
        model: Path | None = folder / "model",
        recipe: str = str(any_recipe),
        processes: int = 1,
    ) -> Job:
        job = prepare(
            recipe,
            store=store,
            model=None if model is None else str(model),
            out=tmp_path / "run",
            settings=settings,
            processes=processes,
        )
        check_tokenizer(job)
        return job

    return checked


@pytest.fixture
def begun(check: Check, folder: Path) -> Path:
    """A run folder as a run leaves it that saved nothing yet."""
    job = check()
    job.folder.mkdir()
    run_folder.write_model_files(job.folder, folder / "model", job.store)
    run_folder.write_record(
        job.folder,
        job.recipe,
        store=job.store.folder,
        fingerprint=job.store.fingerprint,
        model=folder / "model",
    )
    return job.folder


@dataclass(frozen=True)
class Ended:
    """A run of `hermes4 train` that has ended."""

    code: int
    said: str  # on standard error
    folder: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder)


def command(
    recipe: str, out: Path, *, processes: int, settings: Sequence[str], **paths: Path
) -> list[str]:
    """The command line of a run."""
    words = [sys.executable, "-m", "hermes_pipeline", "train", "--recipe", recipe]
    words += ["--out", str(out), "--processes", str(processes)]
    for name, path in paths.items():
        words += [f"--{name}", str(path)]
    for setting in settings:
        words += ["--set", setting]
    return words


@pytest.fixture(scope="session")
def train_command() -> Callable[..., list[str]]:
    return command


@pytest.fixture(scope="session")
def train() -> Callable[..., Ended]:
    """Runs `hermes4 train` to its end."""

    def run(
        out: Path,
        *,
        processes: int = 1,
        settings: Sequence[str] = (),
        recipe: str = "tiny",
        **paths: Path,
    ) -> Ended:
        words = command(recipe, out, processes=processes, settings=settings, **paths)
        done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
        return Ended(done.returncode, done.stderr, out)

    return run
