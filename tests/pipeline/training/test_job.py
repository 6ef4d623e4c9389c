"""What a run says of its samples before it starts, and what one that goes on may be told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hermes_core import StoreWriter
from hermes_core.store import read_header
from hermes_pipeline.errors import UserError
from hermes_pipeline.training import run_folder
from hermes_pipeline.training.job import Job
from hermes_pipeline.training.run import _begin

Check = Callable[..., Job]


@pytest.fixture
def saved(begun: Path) -> Path:
    """The run folder `begun` with a checkpoint."""
    (begun / "checkpoint/step-2").mkdir(parents=True)
    (begun / "checkpoint/step-2/.metadata").touch()
    return begun


def test_a_run_goes_on_with_another_seed_of_torch_which_nothing_uses(
    check: Check, saved: Path
) -> None:
    assert check("training.seed=5").step == 2


def test_a_run_keeps_the_weights_it_began_with_and_says_that_others_are_not_used(
    check: Check, saved: Path, folder: Path, tmp_path: Path
) -> None:
    assert check().notes == check(model=None).notes == ()

    job = check(model=tmp_path / "other")

    assert job.notes == (
        f"model {tmp_path / 'other'} is not used: the weights are those of the checkpoint of "
        f"step 2",
    )
    _begin(job)
    record = run_folder.read_record(saved)
    assert record is not None
    assert record["model"] == record["recipe"]["model.path"] == str((folder / "model").resolve())


# A prompt of 80 tokens, and an answer of 20 that is kept; a short one of 10 and 10.
LONG, SHORT = (100, [[80, 100]]), (20, [[10, 20]])


def write_store(folder: Path, *samples: tuple[int, list[list[int]]]) -> Path:
    with StoreWriter(folder, meta={}, vocab_size=128) as writer:
        for length, spans in samples:
            writer.append(np.arange(length), np.array(spans, np.uint32).reshape(-1, 2))
        writer.finish()
    return folder


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["data.row_length=100"], None),
        (
            ["data.row_length=90", "data.too_long=truncate"],
            "2 of 3 samples are longer than a row of 90 and are truncated: 20 of 220 tokens are "
            "lost, 20 of 50 kept ones",
        ),
        (
            ["data.row_length=64", "data.too_long=drop"],
            "2 of 3 samples are longer than a row of 64 and are dropped: 200 of 220 tokens are "
            "lost, 40 of 50 kept ones",
        ),
    ],
)
def test_what_is_lost_with_samples_longer_than_a_row_is_told(
    check: Check, tmp_path: Path, settings: list[str], told: str | None
) -> None:
    store = write_store(tmp_path / "store", LONG, SHORT, LONG)
    assert check(*settings, store=store).notes == (() if told is None else (told,))


def test_rows_that_cut_every_kept_token_away_are_refused(check: Check, tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", LONG, LONG)
    with pytest.raises(
        UserError,
        match=r"nothing left to learn: 2 of 2 samples are longer than a row of 64 and are "
        r"truncated: .*, 40 of 40 kept ones; --set data\.row_length",
    ):
        check("data.row_length=64", "data.too_long=truncate", store=store)
    write_store(tmp_path / "more", LONG, (20, []))
    with pytest.raises(UserError, match=r"nothing left to learn: 1 of 2 samples .* dropped"):
        check("data.row_length=64", "data.too_long=drop", store=tmp_path / "more")


def test_store_without_kept_tokens_is_refused(
    check: Check, tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    store = make_store(tmp_path / "store", samples=3, kept=False)
    with pytest.raises(UserError, match="has no kept token: there is nothing to learn"):
        check(store=store)


def test_long_samples_of_a_damaged_store_are_refused(check: Check, tmp_path: Path) -> None:
    path = write_store(tmp_path / "store", SHORT, LONG, SHORT) / "shard-00000.bin"
    data = bytearray(path.read_bytes())
    data[read_header(path)[2][3] + 8] = 9  # where the second sample's spans start
    path.write_bytes(data)
    with pytest.raises(UserError, match="is damaged; copy it again"):
        check("data.row_length=64", "data.too_long=drop", store=tmp_path / "store")
