"""Each rank takes what it is dealt, and the state counts whole steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import pytest

from hermes_core.store import read_header
from hermes_pipeline.errors import UserError
from hermes_pipeline.training.titan.data import PackedRows

ROWS = 12
DIVISIONS = [(1, 12), (1, 2), (2, 3), (4, 1), (12, 1)]  # ranks and rows of a share

Loader = Callable[[int, int, int], PackedRows]


def rows_of(store: Path, ranks: int, rank: int, local_rows: int) -> PackedRows:
    config = PackedRows.Config(
        store=str(store), rows=ROWS, packing="best_fit_decreasing", too_long="error", seed=0
    )
    return PackedRows(
        config, dp_world_size=ranks, dp_rank=rank, seq_len=64, local_batch_size=local_rows
    )


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory, make_store: Callable[..., Path]) -> Loader:
    return partial(rows_of, make_store(tmp_path_factory.mktemp("data") / "store"))


def taken(rows: PackedRows, *, micro_batches: int) -> list[int]:
    """The numbers of the next rows of a rank."""
    return [number for batch in islice(iter(rows), micro_batches) for number in batch.rows]


@pytest.mark.parametrize(("ranks", "local_rows"), DIVISIONS)
def test_ranks_together_take_each_row_of_a_step_once(
    loader: Loader, ranks: int, local_rows: int
) -> None:
    all_ranks = [iter(loader(ranks, rank, local_rows)) for rank in range(ranks)]
    for step in range(4):  # several epochs
        of_step = [
            number
            for rows in all_ranks
            for batch in islice(rows, ROWS // (ranks * local_rows))
            for number in batch.rows
        ]
        assert sorted(of_step) == list(range(step * ROWS, (step + 1) * ROWS))


@pytest.mark.parametrize(("ranks", "local_rows"), DIVISIONS)
def test_tokens_of_a_step_do_not_depend_on_its_division(
    loader: Loader, ranks: int, local_rows: int
) -> None:
    micro_batches = ROWS // (ranks * local_rows)
    tokens = sum(
        batch.tokens
        for rank in range(ranks)
        for batch in islice(iter(loader(ranks, rank, local_rows)), micro_batches)
    )
    (whole,) = islice(iter(loader(1, 0, ROWS)), 1)
    assert tokens == whole.tokens


def test_state_counts_whole_steps(loader: Loader) -> None:
    rows = loader(2, 0, 2)
    batches, counts = iter(rows), []
    for _ in range(6):
        next(batches)
        counts.append(rows.state_dict()["rows"])
    assert counts == [0, 0, ROWS, ROWS, ROWS, 2 * ROWS]


def test_state_goes_on_with_another_number_of_ranks(loader: Loader) -> None:
    before = loader(2, 0, 2)
    taken(before, micro_batches=9)
    state = before.state_dict()
    numbers = []
    for rank in range(3):
        after = loader(3, rank, 4)
        after.load_state_dict(state)
        numbers += taken(after, micro_batches=1)
    assert sorted(numbers) == list(range(3 * ROWS, 4 * ROWS))


def test_micro_batch_names_its_rows(loader: Loader) -> None:
    rows = loader(2, 1, 3)
    (batch,) = islice(iter(rows), 1)
    built = rows.order.batch(batch.rows).rows
    assert batch.input_ids.tolist() == built.input_ids.tolist()
    assert batch.labels.tolist() == built.labels.tolist()


def test_damaged_token_is_refused_before_the_model_sees_it(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    path = make_store(tmp_path / "store", samples=3) / "shard-00000.bin"
    data = bytearray(path.read_bytes())
    data[read_header(path)[2][0] + 1] = 0xFF  # the high byte of the first token
    path.write_bytes(data)
    with pytest.raises(
        UserError, match=r"damaged: row \d+ holds token id 65\d+, of 128 that there"
    ):
        taken(rows_of(tmp_path / "store", 1, 0, ROWS), micro_batches=1)
