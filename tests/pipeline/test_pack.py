"""`hermes4 pack`: the plan that is printed is hermes_core's; what cannot be packed says why."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hermes_core import Packing, StoreWriter, open_store
from hermes_core import pack as core_pack
from hermes_core.store import read_header
from hermes_pipeline.errors import UserError
from hermes_pipeline.packing import length_histogram, plan_epoch
from running import Ended, Hermes4

pytestmark = pytest.mark.timeout(60)

LENGTHS = [5, 5, 3, 3, 2]  # in rows of 8: 5 + 3, 5 + 3, 2


Pack = Callable[..., Ended]


@pytest.fixture
def pack(hermes4: Hermes4) -> Pack:
    """Runs `hermes4 pack` in this process."""
    return partial(hermes4, "pack")


def write_store(folder: Path, lengths: Sequence[int] = LENGTHS, vocab_size: int = 99) -> Path:
    with StoreWriter(folder, meta={}, vocab_size=vocab_size) as writer:
        for length in lengths:
            writer.append([1] * length, [[0, 1]])
        writer.quarantine({"line": 1, "reason": "no turn"})
        writer.finish()
    return folder


def random_lengths() -> list[int]:
    return [int(n) for n in np.random.default_rng(0).integers(1, 1002, 2000)]


def rows_of(plan: Packing) -> list[list[int]]:
    return [part.tolist() for part in np.split(plan.samples, plan.row_offsets[1:-1])]


def assert_same_rows(plan: Packing, expected: Packing) -> None:
    assert rows_of(plan) == rows_of(expected)
    assert plan.dropped.tolist() == expected.dropped.tolist()
    assert plan.truncated.tolist() == expected.truncated.tolist()


def refused(ended: Ended) -> str:
    """The one line of a user's mistake."""
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended
    assert ended.err.startswith("hermes4: error: ")
    return ended.err


# The plan.


def test_rows_fill_and_lower_bound_are_printed(pack: Pack, tmp_path: Path) -> None:
    ended = pack(write_store(tmp_path), "--row-length", 8)
    assert ended.code == 0
    assert f"{tmp_path}: 5 samples, 18 tokens\n" in ended.out
    assert "0 samples are longer than a row of 8\n3 rows of 8 tokens by " in ended.out
    assert "5 samples of 2 to 5 tokens, 18 in all\n" in ended.out
    assert "fill 75.0000%; lower bound 3 rows, reached\n" in ended.out


@pytest.mark.parametrize("strategy", ["best_fit_decreasing", "first_fit_decreasing"])
def test_the_figures_are_those_of_hermes_core(pack: Pack, tmp_path: Path, strategy: Any) -> None:
    lengths = random_lengths()
    plan = core_pack(lengths, row_length=1001, strategy=strategy)
    store = write_store(tmp_path, lengths)
    ended = pack(store, "--row-length", 1001, "--strategy", strategy)
    line = r"([\d,]+) rows of 1,001 tokens by \w+\n.*\nfill ([\d.]+)%; lower bound ([\d,]+) rows"
    found = re.search(line, ended.out)
    assert found is not None, ended
    rows, fill, bound = (float(number.replace(",", "")) for number in found.groups())
    assert (rows, bound) == (plan.rows, plan.lower_bound)
    assert fill == pytest.approx(100 * sum(lengths) / (plan.rows * 1001), abs=1e-4)


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
@pytest.mark.parametrize("seed", [0, 3])
def test_the_first_epoch_is_the_plan_of_hermes_core(
    tmp_path: Path, too_long: Any, seed: int
) -> None:
    lengths = random_lengths()
    store = open_store(write_store(tmp_path, lengths))
    plan = plan_epoch(store, row_length=900, too_long=too_long, seed=seed)
    assert_same_rows(plan, core_pack(lengths, row_length=900, too_long=too_long, seed=seed))


def test_the_plan_is_written_and_bound_to_its_store(pack: Pack, tmp_path: Path) -> None:
    store, out = write_store(tmp_path / "store"), tmp_path / "new" / "plan.npz"
    ended = pack(store, "--row-length", 8, "--out", out)
    assert f"plan written to {out}\n" in ended.out
    plan = Packing.load(out, open_store(store).fingerprint)
    assert_same_rows(plan, plan_epoch(open_store(store), row_length=8))


def test_the_same_seed_writes_the_same_bytes_and_another_another_order(
    pack: Pack, tmp_path: Path
) -> None:
    store = write_store(tmp_path / "store", random_lengths())
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pack(store, "--row-length", 1001, "--seed", seed, "--out", tmp_path / f"{name}.npz")
    a, b, c = (tmp_path / f"{name}.npz" for name in "abc")
    assert a.read_bytes() == b.read_bytes()
    one, other = rows_of(Packing.load(a)), rows_of(Packing.load(c))
    assert one != other
    assert sorted(one) == sorted(other)


# The histogram.


def test_the_histogram_counts_every_sample_and_ends_at_the_row() -> None:
    lines = length_histogram(np.array([1, 2, 3, 3, 5, 8, 9, 40]), 8)
    assert [line.split("  longer")[0].rstrip("█ ").split() for line in lines] == [
        ["1", "to", "1", "1", "12.50%"],
        ["2", "to", "3", "3", "37.50%"],
        ["4", "to", "7", "1", "12.50%"],
        ["8", "to", "8", "1", "12.50%"],
        ["9", "to", "15", "1", "12.50%"],
        ["16", "to", "31", "0", "0.00%"],
        ["32", "to", "63", "1", "12.50%"],
    ]
    assert [line.endswith("longer than a row") for line in lines] == [False] * 4 + [True] * 3


def test_the_longest_bar_stands_for_the_commonest_length() -> None:
    bars = [line.count("█") for line in length_histogram(np.array([1] * 80 + [2] * 40 + [4]), 8)]
    assert bars == [40, 20, 1]


def test_the_histogram_is_printed(pack: Pack, tmp_path: Path) -> None:
    ended = pack(write_store(tmp_path), "--row-length", 8)
    assert "".join(f"{line}\n" for line in length_histogram(np.array(LENGTHS), 8)) in ended.out


def test_a_terminal_without_bars_shows_the_rest(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "hermes_pipeline", "pack", str(write_store(tmp_path))]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=50, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"4 to 7 +2 +40\.00% \?+\n", done.stdout)


# Samples longer than a row.


def test_longer_samples_are_an_error_that_counts_them(pack: Pack, tmp_path: Path) -> None:
    ended = pack(write_store(tmp_path), "--row-length", 4)
    assert "2 samples are longer than a row of 4\n" in ended.out
    message = refused(ended)
    assert "2 of 5 samples are longer than --row-length 4 (the longest has 5 tokens)" in message
    assert "choose longer rows, or --too-long drop or truncate" in message


def test_after_an_error_no_plan_is_written(pack: Pack, tmp_path: Path) -> None:
    pack(write_store(tmp_path / "store"), "--row-length", 4, "--out", tmp_path / "plan.npz")
    assert not (tmp_path / "plan.npz").exists()


def test_longer_samples_are_dropped_on_demand(pack: Pack, tmp_path: Path) -> None:
    ended = pack(write_store(tmp_path), "--row-length", 4, "--too-long", "drop")
    assert "3 samples of 2 to 3 tokens, 8 in all\n" in ended.out
    assert "2 samples longer than a row dropped\n" in ended.out
    assert "10 of 18 tokens are lost with them, 2 of 5 kept ones\n" in ended.out


def test_longer_samples_are_truncated_on_demand(pack: Pack, tmp_path: Path) -> None:
    ended = pack(write_store(tmp_path), "--row-length", 4, "--too-long", "truncate")
    assert "5 samples of 2 to 4 tokens, 16 in all\n" in ended.out
    assert "2 samples longer than a row truncated\n" in ended.out
    assert "2 of 18 tokens are lost with them, 0 of 5 kept ones\n" in ended.out


def test_nothing_left_to_pack_is_refused(pack: Pack, tmp_path: Path) -> None:
    ended = pack(write_store(tmp_path, [5, 6]), "--row-length", 4, "--too-long", "drop")
    assert "all 2 samples are longer" in refused(ended)


# What cannot be packed.


def shorten(store: Path) -> None:
    shard = store / "shard-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-64])


def exchange(store: Path) -> None:
    """The shard of another tokenizer's store, of the same size."""
    other = write_store(store.with_name("other"), [5, 5, 3, 3, 1], vocab_size=77)
    shard = store / "shard-00000.bin"
    assert (other / shard.name).stat().st_size == shard.stat().st_size
    (other / shard.name).rename(shard)


def damage(*, offset: int) -> Callable[[Path], None]:
    """Makes the second sample start elsewhere, as a flipped bit does."""

    def damaged(store: Path) -> None:
        shard = store / "shard-00000.bin"
        data = bytearray(shard.read_bytes())
        start = read_header(shard)[2][1] + 8
        data[start : start + 8] = offset.to_bytes(8, "little", signed=True)
        shard.write_bytes(data)

    return damaged


def stop_early(store: Path) -> None:
    (store / "store.json").unlink()
    (store / "writing").mkdir()


def empty_folder(store: Path) -> None:
    for path in store.iterdir():
        path.unlink() if path.is_file() else path.rmdir()


def swap_for_file(store: Path) -> None:
    empty_folder(store)
    store.rmdir()
    store.write_text("")


def swap_for_folder(store: Path) -> None:
    (store / "store.json").unlink()
    (store / "store.json").mkdir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shorten, r"shard-00000\.bin is \d+ bytes long, want \d+ bytes: copy the store again"),
        (exchange, r"shard-00000\.bin is not the shard that store\.json lists"),
        (damage(offset=1 << 62), r"is damaged: its 18 tokens are in samples of -"),
        (damage(offset=-(1 << 63)), r"is damaged: its 18 tokens are in samples of -"),
        (stop_early, "is unfinished: run the same command again to finish it"),
        (empty_folder, r"is not a token store: it has no store\.json"),
        (swap_for_file, r"is not a token store: it has no store\.json"),
        (swap_for_folder, r"Is a directory: '.*store\.json'"),
    ],
)
def test_what_is_no_sound_store_is_refused(
    pack: Pack, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    store = write_store(tmp_path / "store")
    change(store)
    said = refused(pack(store))
    assert re.search(message, said)
    assert str(store) in said


def test_a_store_of_quarantined_records_alone_is_refused(pack: Pack, tmp_path: Path) -> None:
    assert f"the store {tmp_path} has no samples" in refused(pack(write_store(tmp_path, [])))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--row-length", 0], "--row-length"),
        (["--row-length", -8], "--row-length"),
        (["--row-length", 1 << 40], "row_length is 1099511627776, outside [1, 2147483648]"),
        (["--strategy", "worst"], "--strategy 'worst' is not known; known: "),
        (["--too-long", "split"], "--too-long 'split' is not known; known: error, drop, truncate"),
        (["--seed", -1], "--seed is -1, want 0 or more"),
        (["--seed", 1 << 129], "seed is "),
        (["--out", "plan.json"], "--out plan.json must end in .npz"),
    ],
)
def test_an_option_that_cannot_be_is_refused(
    pack: Pack, tmp_path: Path, words: list[object], message: str
) -> None:
    assert message in refused(pack(write_store(tmp_path), *words))


@pytest.mark.parametrize("words", [["--strategy", "worst"], ["--too-long", "split"]])
def test_a_wrong_word_is_refused_before_anything_is_printed(
    pack: Pack, tmp_path: Path, words: list[str]
) -> None:
    ended = pack(write_store(tmp_path), *words)
    assert (ended.code, ended.out) == (2, "")


def test_one_row_is_one_row(pack: Pack, tmp_path: Path) -> None:
    said = pack(write_store(tmp_path, [5]), "--row-length", 8, "--ranks", 1).out
    for words in (
        "1 sample, 5 tokens",
        "1 row of 8 tokens",
        "lower bound 1 row,",
        "1 row in 1 step",
    ):
        assert words in said
    assert "1 rows" not in said
    assert "1 samples" not in said


@pytest.mark.parametrize("row_length", [0, -8])
def test_rows_without_room_are_refused(tmp_path: Path, row_length: int) -> None:
    store = open_store(write_store(tmp_path))
    for too_long in ("error", "drop", "truncate"):
        with pytest.raises(UserError, match="row"):
            plan_epoch(store, row_length=row_length, too_long=too_long)


@pytest.mark.parametrize("name", ["file/plan.npz", "folder.npz"])
def test_a_plan_that_cannot_be_written_is_refused(pack: Pack, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.npz").mkdir()
    out = tmp_path / name
    ended = pack(write_store(tmp_path / "store"), "--out", out)
    assert f"--out {out} cannot be written" in refused(ended)
