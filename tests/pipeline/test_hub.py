"""Records out of data sets: their splits, subsets and identity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hermes_pipeline.errors import UserError
from hermes_pipeline.services.hub import DataSource
from reading import CHATS, numbered, read


@pytest.fixture
def data_set(tmp_path: Path, cache: None) -> Path:
    """A data set with two configurations, as its README.md tells."""
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "README.md").write_text(
        "---\n"
        "configs:\n"
        "- config_name: chats\n"
        "  default: true\n"
        "  data_files:\n"
        "  - {split: train, path: first.parquet}\n"
        "  - {split: test, path: second.parquet}\n"
        "- config_name: others\n"
        "  data_files: third.parquet\n"
        "---\n"
    )
    write_rows(folder / "first.parquet", CHATS)
    write_rows(folder / "second.parquet", CHATS[:2])
    write_rows(folder / "third.parquet", CHATS[2:])
    return folder


def write_rows(path: Path, rows: list[Any]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_a_data_set_gives_its_rows(data_set: Path) -> None:
    assert read(data_set) == numbered(CHATS)
    assert DataSource(str(data_set)).count() == 5


def test_a_row_names_its_data_set(data_set: Path) -> None:
    assert [r.source for r in DataSource(str(data_set)).records(start=4)] == [f"{data_set}:5"]


def test_reading_a_data_set_goes_on_from_any_row(data_set: Path) -> None:
    source = DataSource(str(data_set))
    for start in range(7):
        assert [r.line for r in source.records(start=start)] == list(range(start + 1, 6))


def test_a_data_set_has_splits_and_subsets(data_set: Path) -> None:
    assert read(data_set, split="test") == numbered(CHATS[:2])
    assert read(data_set, split="train[1:3]") == numbered(CHATS[1:3])
    assert read(data_set, subset="others") == numbered(CHATS[2:])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "dev"}, r"\(split 'dev'\) cannot be loaded: .*\['train', 'test'\]"),
        (
            {"subset": "no"},
            r"\(split 'train', subset 'no'\) cannot .*\['chats', 'others'\]",
        ),
    ],
)
def test_a_split_or_subset_that_is_missing_names_those_there(
    data_set: Path, options: dict[str, str], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        read(data_set, **options)


def test_an_edited_file_of_a_data_set_is_read_anew(data_set: Path) -> None:
    assert read(data_set) == numbered(CHATS)
    write_rows(data_set / "first.parquet", CHATS[1:])
    assert read(data_set) == numbered(CHATS[1:])


def test_the_identity_of_a_data_set_tells_edited_files_apart(data_set: Path) -> None:
    before = DataSource(str(data_set)).identity()
    assert DataSource(str(data_set)).identity() == before == json.loads(json.dumps(before))
    write_rows(data_set / "first.parquet", CHATS[::-1])
    after = DataSource(str(data_set)).identity()
    assert after["records"] == before["records"]
    assert after != before


def test_keys_that_a_data_set_fills_with_null_are_left_out(data_set: Path) -> None:
    rows = [CHATS[0] | {"system": "x"}, CHATS[1]]
    write_rows(data_set / "first.parquet", rows)
    assert read(data_set) == numbered(rows)


def test_a_data_set_that_cannot_be_built_says_why(data_set: Path) -> None:
    (data_set / "README.md").write_text("Files that do not go together.")
    write_rows(data_set / "first.parquet", [{"n": 1}])
    write_rows(data_set / "second.parquet", [{"n": "x"}])
    with pytest.raises(UserError, match=r"\(split 'train'\) cannot be loaded: .*'x'.* int64$"):
        read(data_set)


def test_a_saved_data_set_gives_its_rows(tmp_path: Path, cache: None) -> None:
    import datasets

    datasets.Dataset.from_list(CHATS).save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved", start=3) == numbered(CHATS[3:], 4)


def test_a_saved_data_set_has_splits(tmp_path: Path, cache: None) -> None:
    import datasets

    splits = {"train": CHATS, "test": CHATS[:1]}
    sets = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    datasets.DatasetDict(sets).save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved", split="test") == numbered(CHATS[:1])
    with pytest.raises(UserError, match=r"\(split 'dev'\) cannot be .*; found: train, test$"):
        read(tmp_path / "saved", split="dev")


def test_a_saved_data_set_has_no_other_parts_than_it_was_saved_with(
    tmp_path: Path, cache: None
) -> None:
    import datasets

    rows = datasets.Dataset.from_list(CHATS, split=datasets.Split.TEST)
    rows.save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved", split="test") == read(tmp_path / "saved") == numbered(CHATS)
    with pytest.raises(UserError, match=r"'dev'\) cannot be loaded: .*it is no set of splits$"):
        read(tmp_path / "saved", split="dev")
    with pytest.raises(UserError, match=r"subset 'a'\) cannot be loaded: .* keeps no subsets$"):
        read(tmp_path / "saved", subset="a")


def test_a_split_of_files_that_name_none_is_refused(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("{}\n")
    assert len(list(DataSource(str(tmp_path)).records())) == 2
    with pytest.raises(UserError, match=r"^--split test: no file in /.* name of a split, such as"):
        DataSource(str(tmp_path), split="test")


@pytest.mark.parametrize("mark", ["stage.json", "store.json", "writing/progress.json"])
def test_results_of_ours_are_no_data(tmp_path: Path, mark: str) -> None:
    (tmp_path / "chats.jsonl").write_text("{}\n")
    (tmp_path / "runs" / mark).parent.mkdir(parents=True)
    (tmp_path / "runs" / mark).write_text("{}")
    for folder in (tmp_path, tmp_path / "runs"):
        with pytest.raises(UserError, match=rf"runs/{mark} belongs to results .* file by name"):
            DataSource(str(folder))
    assert len(list(DataSource(str(tmp_path / "chats.jsonl")).records())) == 1


def test_files_on_this_machine_have_no_revision(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text("{}")
    for data in (file, tmp_path):
        with pytest.raises(UserError, match=r"lies on this machine and has no revision 'v1'"):
            DataSource(str(data), revision="v1")


def test_a_single_file_has_no_splits_and_subsets(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text("{}")
    for option, given in (("--split test", {"split": "test"}), ("--subset x", {"subset": "x"})):
        with pytest.raises(
            UserError, match=rf"^{option} is for a folder or a data set, and /.*out$"
        ):
            DataSource(str(file), **given)
    assert DataSource(str(file), split="train").count() is None


def test_a_data_set_that_cannot_be_reached_is_named_with_what_was_asked_for(
    cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    source = DataSource("nobody/nothing", revision="v1", split="test", subset="chats")
    words = r"^data set 'nobody/nothing' \(split 'test', subset 'chats', revision 'v1'\) cannot be "
    with pytest.raises(UserError, match=words):
        source.count()
