"""Steps that cannot be computed, and steps without anything to learn."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hermes_core import StoreWriter, open_store
from hermes_core.store import read_header
from hermes_pipeline.stages.train import export
from hermes_pipeline.training.order import RowOrder
from hermes_pipeline.training.run_folder import checkpoint_steps, read_metrics

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(240)]

ROWS, LOCAL_ROWS, POISON, BAD_SAMPLE = 12, 2, 120, 58

# Every save ends late, and with an error where a word says so.
LATE = """
import os, sys, time
from torch.distributed.checkpoint.filesystem import FileSystemWriter
finish = FileSystemWriter.finish
def late(self, *given, **named):
    time.sleep(1)
    if os.environ.get("FAILS"):
        raise OSError(28, "No space left on device")
    return finish(self, *given, **named)
FileSystemWriter.finish = late
from hermes_pipeline.training.run import main
code = main(sys.argv[1:])
sys.stderr.flush()
os._exit(code)
"""

# The first step wants more memory than there is.
GREEDY = """
import os, sys, torch
from hermes_pipeline.training.titan import engine
engine.run = lambda *given, **named: torch.empty(1 << 45)
from hermes_pipeline.training.run import main
code = main(sys.argv[1:])
sys.stderr.flush()
os._exit(code)
"""


def poisoned(folder: Path, make_model: Callable[..., Path]) -> None:
    """A store with one sample that holds a token whose embedding is not a number."""
    rng = np.random.default_rng(2)
    with StoreWriter(folder / "store", meta={}, vocab_size=128) as writer:
        for number in range(60):
            ids = rng.integers(0, 100, 40)
            ids[20] = POISON if number == BAD_SAMPLE else ids[20]
            writer.append(ids, np.array([[10, 40]], np.uint32))
        writer.finish()
    weights = make_model(folder / "model") / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"][POISON] = np.nan
    save_file(tensors, weights, metadata={"format": "pt"})


def test_gradient_that_is_not_finite_ends_the_run_and_names_its_rows(
    tmp_path: Path,
    make_model: Callable[..., Path],
    train: Callable[..., Any],
    any_recipe: Path,
) -> None:
    poisoned(tmp_path, make_model)
    order = RowOrder(
        open_store(tmp_path / "store"),
        row_length=64,
        packing="best_fit_decreasing",
        too_long="error",
        seed=0,
    )
    row = next(i for i, ids in enumerate(order.sample_ids(range(60))) if BAD_SAMPLE in ids)
    step = row // ROWS + 1
    assert step > 1  # some steps go well before

    ended = train(
        tmp_path / "run",
        settings=[f"data.local_rows={LOCAL_ROWS}", "checkpoint.every=1"],
        recipe=str(any_recipe),
        store=tmp_path / "store",
        model=tmp_path / "model",
    )

    assert ended.code == 3, ended.said
    assert "Traceback" not in ended.said
    error = ended.said.splitlines()[-1]
    assert error.startswith(f"hermes4: error: step {step}: loss nan")
    assert "not applied and nothing is saved" in error
    named = [int(number) for number in re.findall(r"row (\d+) \(", error)]
    order.advance((step - 1) * ROWS)
    shares = order.deal_step(ranks=1, micro_batches=ROWS // LOCAL_ROWS, local_rows=LOCAL_ROWS)
    assert named in shares.reshape(-1, LOCAL_ROWS).tolist()
    assert re.search(rf"row {row} \(samples {BAD_SAMPLE}\)", error)
    assert checkpoint_steps(tmp_path / "run")[-1] == step - 1
    assert len(read_metrics(tmp_path / "run")) == step - 1


@pytest.mark.parametrize("fails", [False, True])
def test_gradient_that_is_not_finite_waits_for_the_save_before_it(
    tmp_path: Path, make_model: Callable[..., Path], any_recipe: Path, fails: bool
) -> None:
    poisoned(tmp_path, make_model)
    # The first step's save alone is under way: a later save would wait for it.
    seed = f"data.seed={seed_with_bad_second_step(tmp_path)}"
    done = run_late(tmp_path, any_recipe, seed, "checkpoint.background=true", fails=fails)

    assert done.returncode == 3, done.stderr
    assert done.stderr.splitlines()[-1].startswith("hermes4: error: step 2: loss nan")
    assert "Traceback" not in done.stderr
    assert checkpoint_steps(tmp_path / "run") == ([] if fails else [1])


@pytest.mark.parametrize("background", ["true", "false"])
def test_save_that_a_disk_refuses_is_one_line_and_exit_code_2(
    tmp_path: Path,
    make_store: Callable[..., Path],
    make_model: Callable[..., Path],
    any_recipe: Path,
    background: str,
) -> None:
    make_store(tmp_path / "store")
    make_model(tmp_path / "model")

    done = run_late(tmp_path, any_recipe, f"checkpoint.background={background}", fails=True)

    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(
        r"\nhermes4: error: checkpoint \S+/run/checkpoint/step-1 cannot be saved: .*No space left "
        r"on device; [\d.]+ .B are free there\. Make room, and the same command goes on\n$",
        "\n" + done.stderr,
    )
    assert "Traceback" in (tmp_path / "run/log.txt").read_text()


def test_memory_that_is_not_there_is_one_line(
    tmp_path: Path,
    make_store: Callable[..., Path],
    make_model: Callable[..., Path],
    any_recipe: Path,
) -> None:
    make_store(tmp_path / "store")
    make_model(tmp_path / "model")

    done = run_late(tmp_path, any_recipe, fails=False, script=GREEDY)

    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("hermes4: error: rank 0 has no memory left: ")
    assert "can't allocate memory" in error
    assert "lower data.local_rows" in error


@pytest.mark.parametrize("processes", [1, 2])
def test_damaged_sample_of_any_rank_is_one_line_and_keeps_the_save_before_it(
    tmp_path: Path,
    make_store: Callable[..., Path],
    make_model: Callable[..., Path],
    train: Callable[..., Any],
    any_recipe: Path,
    processes: int,
) -> None:
    path = make_store(tmp_path / "store", samples=90) / "shard-00000.bin"
    data = bytearray(path.read_bytes())
    span_offsets = read_header(path)[2][3]
    data[span_offsets + 8 * 7 + 3] = 0xFF  # sample 6, which the second step reads
    path.write_bytes(data)

    ended = train(
        tmp_path / "run",
        processes=processes,
        settings=["checkpoint.every=1", "checkpoint.background=true"],
        recipe=str(any_recipe),
        store=tmp_path / "store",
        model=make_model(tmp_path / "model"),
    )

    assert ended.code == 2, ended.said
    assert "Traceback" not in ended.said
    error = ended.said.splitlines()[-1]
    assert error.startswith("hermes4: error: the store is damaged: sample 6 of shard 0 has spans")
    assert checkpoint_steps(tmp_path / "run") == [1]


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [("run/log.txt", 0, "is complete after step 1"), ("model/generation_config.json", 2, "error:")],
)
def test_file_that_a_disk_refuses_shows_no_traceback(
    tmp_path: Path,
    make_store: Callable[..., Path],
    make_model: Callable[..., Path],
    train: Callable[..., Any],
    any_recipe: Path,
    name: str,
    code: int,
    said: str,
) -> None:
    (tmp_path / "run").mkdir()
    make_model(tmp_path / "model")
    device = "/dev/full" if code == 0 else "/proc/self/mem"  # no room to write, an error to read
    (tmp_path / name).symlink_to(device)

    ended = train(
        tmp_path / "run",
        settings=["training.steps=1"],
        recipe=str(any_recipe),
        store=make_store(tmp_path / "store"),
        model=tmp_path / "model",
    )

    assert ended.code == code, ended.said
    assert "Traceback" not in ended.said
    assert said in ended.said.splitlines()[-1]


@pytest.mark.parametrize(("local_rank", "lines"), [("0", 1), ("1", 0)])
def test_mistake_of_one_machine_is_said_there_once(
    tmp_path: Path, any_recipe: Path, local_rank: str, lines: int
) -> None:
    words = ["--recipe", str(any_recipe), "--store", str(tmp_path / "nowhere")]
    place = {"RANK": "9", "WORLD_SIZE": "12", "LOCAL_RANK": local_rank}
    done = subprocess.run(
        [sys.executable, "-m", "hermes_pipeline.training", *words, "--out", str(tmp_path / "run")],
        env=os.environ | place,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("hermes4: error: ") == done.stderr.count("\n") == lines


def run_late(
    folder: Path, recipe: Path, *settings: str, fails: bool, script: str = LATE
) -> subprocess.CompletedProcess[str]:
    """A run whose saves, one for each step, end late or fail."""
    words = [sys.executable, "-c", script, "--recipe", str(recipe), "--out", str(folder / "run")]
    words += ["--store", str(folder / "store"), "--model", str(folder / "model")]
    for setting in (f"data.local_rows={LOCAL_ROWS}", "checkpoint.every=1", *settings):
        words += ["--set", setting]
    environment = os.environ | ({"FAILS": "1"} if fails else {})
    return subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def seed_with_bad_second_step(folder: Path) -> int:
    """A seed of the order by which the second step has the bad sample."""
    store = open_store(folder / "store")
    for seed in range(100):
        order = RowOrder(
            store, row_length=64, packing="best_fit_decreasing", too_long="error", seed=seed
        )
        if any(BAD_SAMPLE in ids for ids in order.sample_ids(range(ROWS, 2 * ROWS))):
            return seed
    raise AssertionError("no such seed")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's
def test_step_without_kept_tokens_counts_and_changes_nothing(
    tmp_path: Path,
    make_store: Callable[..., Path],
    make_model: Callable[..., Path],
    train: Callable[..., Any],
    any_recipe: Path,
) -> None:
    bare = open_store(make_store(tmp_path / "bare", kept=False))
    order = RowOrder(bare, row_length=64, packing="best_fit_decreasing", too_long="error", seed=0)
    kept = order.sample_ids([ROWS])[0][0]  # in the first row of the second step
    with StoreWriter(tmp_path / "store", meta={}, vocab_size=128) as writer:
        for number, (ids, _) in enumerate(bare):
            writer.append(ids, [[1, len(ids)]] if number == kept else [])
        writer.finish()
    paths = {"store": tmp_path / "store", "model": make_model(tmp_path / "model")}

    def run(name: str, steps: int, *settings: str) -> Path:
        given = [f"training.steps={steps}", "training.schedule_steps=3", *settings]
        ended = train(tmp_path / name, settings=given, recipe=str(any_recipe), **paths)
        assert ended.code == 0, ended.said
        export(ended.folder, tmp_path / f"{name}-{steps}")
        return tmp_path / f"{name}-{steps}" / "model.safetensors"

    start = (paths["model"] / "model.safetensors").read_bytes()
    assert run("stopped", 1).read_bytes() == start
    (line,) = read_metrics(tmp_path / "stopped")
    assert (line["loss"], line["grad_norm"], line["kept_tokens"]) == (0, 0, 0)
    straight = run("straight", 3, "checkpoint.every=100").read_bytes()
    assert run("stopped", 3).read_bytes() == straight != start
    rates = [line["lr"] for line in read_metrics(tmp_path / "stopped")]
    assert rates == pytest.approx([1e-3, 1e-3, 5.5e-4])


def test_what_a_run_drops_is_said_and_logged_before_its_first_step(
    tmp_path: Path,
    make_store: Callable[..., Path],
    make_model: Callable[..., Path],
    train: Callable[..., Any],
    any_recipe: Path,
) -> None:
    ended = train(
        tmp_path / "run",
        settings=["training.steps=1", "data.row_length=32", "data.too_long=drop"],
        recipe=str(any_recipe),
        store=make_store(tmp_path / "store"),
        model=make_model(tmp_path / "model"),
    )
    assert ended.code == 0, ended.said
    told = r"(\d+ of 60 samples are longer than a row of 32 and are dropped: .*)\n"
    found = re.match(rf"train: loading \.\.\.\ntrain: {told}", ended.said)
    assert found is not None, ended.said
    assert found[1] in (tmp_path / "run/log.txt").read_text()
