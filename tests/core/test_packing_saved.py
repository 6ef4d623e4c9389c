"""Plans on disk: small, the same when loaded, refused where they do not fit or are damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hermes_core import Packing, pack


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
    middle = good.index(b"samples.npy") + 150  # inside the array: only its CRC can tell
    path.write_bytes(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
    with pytest.raises(ValueError, match=r"plan.npz is not a packing plan, or damaged"):
        Packing.load(path)


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
