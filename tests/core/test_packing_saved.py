"""Plans on disk: small, the same when loaded, refused where they do not fit or are damaged."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hermes_core import Packing, RowLoader, StoreWriter, build_rows, open_store, pack


def test_saved_plan_takes_about_five_bytes_a_sample(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(1, 1_000, 100_000)
    pack(lengths, row_length=2_000).save(tmp_path / "plan.npz")
    assert (tmp_path / "plan.npz").stat().st_size < 5 * 100_000


@pytest.mark.parametrize("seed", [None, 7])
def test_save_and_load_give_the_same_plan(tmp_path: Path, seed: int | None) -> None:
    saved = pack([3, 11, 10, 7], row_length=10, too_long="truncate", seed=seed, fingerprint="abc")
    saved.save(tmp_path / "plan.npz")
    loaded = Packing.load(tmp_path / "plan.npz", fingerprint="abc")
    for name in Packing.__slots__:
        assert np.array_equal(getattr(loaded, name), getattr(saved, name)), name
    assert [path.name for path in tmp_path.iterdir()] == ["plan.npz"]


def test_save_keeps_the_name_it_was_given(tmp_path: Path) -> None:
    pack([1], row_length=1).save(str(tmp_path / "plan"))
    assert Packing.load(str(tmp_path / "plan")).rows == 1


def test_plan_of_another_store_is_refused(tmp_path: Path) -> None:
    pack([1], row_length=1, fingerprint="abc").save(tmp_path / "plan.npz")
    with pytest.raises(ValueError, match="was made for the store abc, not for def; pack this"):
        Packing.load(tmp_path / "plan.npz", fingerprint="def")


@pytest.mark.parametrize("use", [RowLoader, build_rows])
def test_plan_of_another_store_builds_no_rows(tmp_path: Path, use: Any) -> None:
    """Both stores have samples of the same lengths, so that only the fingerprints differ."""
    stores = []
    for name in ("a", "b"):
        with StoreWriter(tmp_path / name, meta={"name": name}, vocab_size=9) as writer:
            for length in (3, 4):
                writer.append([len(stores)] * length, [])
            writer.finish()
        stores.append(open_store(tmp_path / name))
    plan = pack(stores[0].lengths, row_length=8, fingerprint=stores[0].fingerprint)
    options: dict[str, Any] = {"batch_rows": 1} if use is RowLoader else {"rows": [0]}
    use(stores[0], plan, **options)
    with pytest.raises(
        ValueError, match=f"store {plan.fingerprint}, not for samples of {stores[1].fingerprint}"
    ):
        use(stores[1], plan, **options)
    without = pack(stores[0].lengths, row_length=8)
    use(stores[1], without, **options)


def test_plan_of_a_newer_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hermes_core.packing.VERSION", 99)
    pack([1], row_length=1).save(tmp_path / "plan.npz")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="version 99, want 'hermes4 packing' version 2"):
        Packing.load(tmp_path / "plan.npz")


def test_missing_plan_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"plan\.npz"):
        Packing.load(tmp_path / "plan.npz")


def test_damaged_plan_is_refused_wherever_the_damage_is(tmp_path: Path) -> None:
    path = tmp_path / "plan.npz"
    pack(range(1, 60), row_length=64).save(path)
    good = path.read_bytes()
    for keep in (0, 1, 10, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:keep])
        with pytest.raises(ValueError, match=r"plan.npz is not a packing plan, or damaged"):
            Packing.load(path)


def test_any_bit_of_a_plan_that_changes_is_noticed_or_means_nothing(tmp_path: Path) -> None:
    path = tmp_path / "plan.npz"
    saved = pack([2, 1, 3], row_length=4, fingerprint="abc")
    saved.save(path)
    good = path.read_bytes()
    for bit in range(8 * len(good)):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            loaded = Packing.load(path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            for name in Packing.__slots__:
                assert np.array_equal(getattr(loaded, name), getattr(saved, name)), (bit, name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"header": [1]}, "is not a packing plan, or damaged"),
        ({"row_length": -1}, r"row_length is -1, outside \[1, 2147483648\]"),
        ({"row_length": "4"}, "row_length is '4', want an integer"),
        ({"lower_bound": 0}, "lower_bound is 0, outside"),
        ({"longest": 5}, "longest is 5, outside"),
        ({"strategy": "none"}, "strategy is 'none', want 'best'"),
        ({"seed": 1.5}, r"seed is 1\.5, want an integer"),
        ({"fingerprint": None}, "fingerprint is None, want a string"),
        ({"samples": np.array([0.0, 1, 2])}, r"samples is float64 \[3\], want \[n\] unsigned"),
        ({"samples": np.array([0, 1, 1], np.uint8)}, "it does not name each sample once"),
        ({"samples": np.array([0, 1, 3], np.uint8)}, r"names a sample outside \[0, 3\)"),
        ({"samples": np.array([[0, 1, 2]], np.uint8)}, r"samples is uint8 \[1, 3\]"),
        ({"row_sizes": np.array([], np.uint8)}, "its rows do not hold its samples"),
        ({"row_sizes": np.array([3, 0], np.uint8)}, "its rows do not hold its samples"),
    ],
)
def test_a_file_that_is_like_a_plan_is_refused_by_what_is_wrong(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "plan.npz"
    pack([2, 1, 3], row_length=4).save(path)
    with np.load(path) as file:
        parts = {name: file[name] for name in file.files if name != "allow_pickle"}
    header = json.loads(bytes(parts["header"]))
    for name, value in change.items():
        if name in parts and name != "header":
            parts[name] = value
        else:
            header = value if name == "header" else header | {name: value}
    parts["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez(path, **parts)
    with pytest.raises(ValueError, match=message) as caught:
        Packing.load(path)
    assert str(path) in str(caught.value)


def test_of_two_that_save_at_once_each_writes_a_whole_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.npz"
    plans = [pack(range(1, n), row_length=n) for n in (500, 1000)]

    def save(plan: Packing) -> None:
        for _ in range(20):
            plan.save(path)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(save, plans))
    assert Packing.load(path).row_length in (500, 1000)
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.npz"]


def test_other_npz_files_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", samples=np.zeros(3))
    with pytest.raises(ValueError, match=r"other.npz is not a packing plan"):
        Packing.load(tmp_path / "other.npz")


def test_failed_save_leaves_the_old_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.npz"
    pack([1, 2], row_length=4).save(path)
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        pack([3, 4], row_length=4).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.npz"]


def test_a_seed_of_numpy_is_saved(tmp_path: Path) -> None:
    pack([5, 6], row_length=11, seed=np.int64(1)).save(tmp_path / "plan.npz")
    assert Packing.load(tmp_path / "plan.npz").seed == 1
