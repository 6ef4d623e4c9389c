"""`hermes4 pack --ranks`: what ranks lose by waiting for each other is said, before and after."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hermes_core import StoreWriter, deal, pack, row_costs
from hermes_pipeline.errors import UserError
from hermes_pipeline.stages.pack import run
from hermes_pipeline.training.shape import BASES

LENGTHS = np.random.default_rng(0).integers(1, 65, 400)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "store"
    with StoreWriter(folder, meta={}, vocab_size=8) as writer:
        for length in LENGTHS:
            writer.append(np.zeros(length, np.int64), np.array([[0, length]], np.uint32))
        writer.finish()
    return folder


def test_imbalance_is_that_of_the_base(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(store, row_length=64, strategy="best", ranks=8, micro_batches=4, base="llama3.1_70b")
    plan = pack(LENGTHS, row_length=64)
    linear, quadratic = BASES["llama3.1_70b"].training_flops()
    costs = row_costs(plan, LENGTHS, linear=linear, quadratic=quadratic)
    assert deal(costs, ranks=8, micro_batches=4).report() in capsys.readouterr().out


def test_imbalance_is_not_said_unasked(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(store, row_length=64)
    assert "ranks" not in capsys.readouterr().out


def test_fewer_rows_than_a_step_has_are_said_to_be(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pack(LENGTHS, row_length=64).rows
    run(store, row_length=64, ranks=rows, micro_batches=2)
    said = capsys.readouterr().out
    assert f"{rows} rows: fewer than one step of {rows} ranks x 2 micro-batches has" in said
    assert "lose 1" not in said


def test_micro_batches_without_ranks_are_refused(store: Path) -> None:
    with pytest.raises(UserError, match=r"^--micro-batches 4 is for --ranks; give that, too$"):
        run(store, row_length=64, micro_batches=4)


def test_unknown_base_is_refused(store: Path) -> None:
    with pytest.raises(UserError, match="--base 'gpt2' is not known; known: qwen3_14b, llama3"):
        run(store, row_length=64, ranks=8, base="gpt2")


def test_step_too_large_to_deal_is_refused(store: Path) -> None:
    with pytest.raises(UserError, match=r"--ranks 8192, --micro-batches 4096: .* at most 16777216"):
        run(store, row_length=64, ranks=8192, micro_batches=4096)
