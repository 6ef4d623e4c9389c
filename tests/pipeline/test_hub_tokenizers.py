"""Tokenizers and templates, by name and by path."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from hermes_pipeline.errors import UserError
from hermes_pipeline.services.hub import load_template, load_tokenizer, tokenizer_fingerprint


@pytest.fixture
def alone(backend: Tokenizer, tmp_path: Path) -> Path:
    """A folder with tokenizer.json alone."""
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write_gzipped(folder: Path) -> Path:
    path = folder / "tokenizer.json.gz"
    path.write_bytes(gzip.compress((folder / "tokenizer.json").read_bytes()))
    return path


TEXT = "<|im_start|>user\nZürich 日本 🙂<|im_end|>\n"


def test_a_tokenizer_in_any_form_gives_the_same_ids(
    backend: Tokenizer, tokenizer_folder: Path, alone: Path
) -> None:
    gzipped = write_gzipped(alone)
    for path in (tokenizer_folder, alone, alone / "tokenizer.json", gzipped):
        ids = load_tokenizer(str(path))(TEXT, add_special_tokens=False)["input_ids"]
        assert ids == backend.encode(TEXT, add_special_tokens=False).ids


def test_the_fingerprint_does_not_depend_on_the_form(tokenizer_folder: Path, alone: Path) -> None:
    paths = (tokenizer_folder, alone, write_gzipped(alone))
    assert len({tokenizer_fingerprint(load_tokenizer(str(path))) for path in paths}) == 1


def test_the_fingerprint_does_not_depend_on_where_an_added_token_stands(
    backend: Tokenizer, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_str(backend.to_str())
    tokenizer.add_special_tokens(["<another>"])
    state = json.loads(tokenizer.to_str())
    (tmp_path / "a.json").write_text(json.dumps(state))
    state["model"]["vocab"]["<another>"] = tokenizer.token_to_id("<another>")
    state["model"]["vocab"] = dict(reversed(state["model"]["vocab"].items()))
    (tmp_path / "b.json").write_text(json.dumps(state))
    first, second = (load_tokenizer(str(tmp_path / name)) for name in ("a.json", "b.json"))
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(second)


def test_the_fingerprint_knows_vocabularies_with_scores(tmp_path: Path) -> None:
    prints = set()
    for score in (-1.0, -2.0):
        model = models.Unigram([("<unk>", 0.0), ("a", score)], unk_id=0)
        Tokenizer(model).save(str(tmp_path / "x.json"))
        prints.add(tokenizer_fingerprint(load_tokenizer(str(tmp_path / "x.json"))))
    assert len(prints) == 2


def test_the_fingerprint_tells_another_token(alone: Path) -> None:
    tokenizer = load_tokenizer(str(alone))
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.add_tokens(["<another>"])
    assert tokenizer_fingerprint(tokenizer) != before


ANOTHER = {"id": 0, "content": "a", "special": False} | dict.fromkeys(
    ("single_word", "lstrip", "rstrip", "normalized"), False
)
OTHER_STATES: list[dict[str, Any]] = [
    {"normalizer": {"type": "Lowercase"}},
    {"pre_tokenizer": {"type": "WhitespaceSplit"}},
    {"pre_tokenizer": {"type": "Digits", "individual_digits": True}},
    {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": "a"}},
    {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "ignore_merges": True}},
    {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}},
    {"added_tokens": [ANOTHER]},
    *(
        {"added_tokens": [ANOTHER | {flag: True}]}
        for flag in ("special", "single_word", "lstrip", "rstrip", "normalized")
    ),
]


def test_the_fingerprint_tells_whatever_changes_ids(tmp_path: Path) -> None:
    state = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    prints = set()
    for other in ({}, *OTHER_STATES):
        (tmp_path / "x.json").write_text(json.dumps(state | {"added_tokens": []} | other))
        prints.add(tokenizer_fingerprint(load_tokenizer(str(tmp_path / "x.json"))))
    assert len(prints) == 1 + len(OTHER_STATES)


def test_the_fingerprint_knows_no_option_that_is_not_used(tmp_path: Path) -> None:
    prints = set()
    for unused in ({}, {"continuing_subword_prefix": "", "dropout": None, "byte_fallback": False}):
        model = {"type": "BPE", "vocab": {"a": 0}, "merges": []} | unused
        (tmp_path / "x.json").write_text(json.dumps({"added_tokens": [], "model": model}))
        prints.add(tokenizer_fingerprint(load_tokenizer(str(tmp_path / "x.json"))))
    assert len(prints) == 1


def test_the_fingerprint_outlives_saving(shared_data: Path, tmp_path: Path) -> None:
    for name in ("gpt2", "qwen", "deepseek"):
        tokenizer = load_tokenizer(str(shared_data / "tokenizers" / name))
        tokenizer.save_pretrained(tmp_path / name)
        saved = load_tokenizer(str(tmp_path / name))
        assert tokenizer_fingerprint(saved) == tokenizer_fingerprint(tokenizer)


def test_a_folder_of_transformers_names_its_tokens(tokenizer_folder: Path) -> None:
    for path in (tokenizer_folder, tokenizer_folder / "tokenizer.json"):
        tokenizer = load_tokenizer(str(path))
        assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", None)


def test_a_file_of_another_name_in_such_a_folder_stands_for_itself(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    shutil.copy(tokenizer_folder / "tokenizer_config.json", tmp_path)
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path / "mine.json")
    assert load_tokenizer(str(tmp_path / "mine.json")).bos_token == "<|begin_of_text|>"


def test_a_file_alone_has_the_likeliest_tokens_named(alone: Path) -> None:
    write_gzipped(alone)
    for path in (alone, alone / "tokenizer.json", alone / "tokenizer.json.gz"):
        tokenizer = load_tokenizer(str(path))
        assert tokenizer.bos_token == "<|begin_of_text|>"
        assert tokenizer.eos_token == "<|im_end|>"
        assert tokenizer.pad_token == "<|endoftext|>"


def test_a_folder_with_a_gzipped_tokenizer_is_one(alone: Path) -> None:
    write_gzipped(alone)
    (alone / "tokenizer.json").unlink()
    assert load_tokenizer(str(alone)).eos_token == "<|im_end|>"


@pytest.mark.parametrize("name", ["no/such/folder", "./no", "no.json"])
def test_a_tokenizer_that_is_missing_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"^no such tokenizer: {name}$"):
        load_tokenizer(name)


def test_a_folder_without_a_tokenizer_names_the_files_wanted(tmp_path: Path) -> None:
    wanted = r"tokenizer\.json, tokenizer_config\.json, tokenizer\.json\.gz$"
    with pytest.raises(UserError, match=f"holds no tokenizer: none of {wanted}"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b'{"a": 1}'),
        ("tokenizer.json", b"\xff"),
        ("tokenizer.json.gz", b"{}"),
        ("tokenizer.json.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9]),
    ],
)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=rf"{name} is not a tokenizer\.json: ."):
            load_tokenizer(str(path))


def test_a_folder_whose_tokenizer_is_broken_is_named(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tokenizer_folder, folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"^tokenizer '.*broken' cannot be loaded: ."):
        load_tokenizer(str(folder))


def test_a_tokenizer_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^tokenizer 'nobody/nothing' cannot be loaded: ."):
        load_tokenizer("nobody/nothing", "v1")


@pytest.mark.parametrize(
    ("name", "size"), [("gpt2", 50_257), ("qwen", 151_669), ("deepseek", 129_280)]
)
def test_released_tokenizers_are_loaded(shared_data: Path, name: str, size: int) -> None:
    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / name))
    assert len(tokenizer) == size
    assert tokenizer.decode(tokenizer(TEXT, add_special_tokens=False)["input_ids"]) == TEXT


# Templates.


@pytest.mark.parametrize("name", ["hermes_chatml", "hermes_llama3"])
def test_a_template_of_ours_is_found_by_name(name: str) -> None:
    assert load_template(name, None)[0] == name
    assert "add_generation_prompt" in load_template(name, None)[1]


def test_a_template_is_found_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{{ messages }} é", encoding="utf-8")
    assert load_template(str(path), None) == ("mine.jinja", "{{ messages }} é")


@pytest.mark.parametrize("own", ["{{ messages }}", {"default": "{{ messages }}", "tools": "x"}])
def test_without_a_name_the_template_is_that_of_the_tokenizer(alone: Path, own: Any) -> None:
    tokenizer = load_tokenizer(str(alone))
    tokenizer.chat_template = own
    assert load_template(None, tokenizer) == ("the tokenizer's own", "{{ messages }}")


@pytest.mark.parametrize("own", [None, {"tools": "x"}])
def test_a_tokenizer_without_a_template_names_ours(alone: Path, own: Any) -> None:
    tokenizer = load_tokenizer(str(alone))
    tokenizer.chat_template = own
    words = "give --template: one of hermes_chatml, hermes_llama3, or a .jinja file$"
    with pytest.raises(UserError, match=words):
        load_template(None, tokenizer)


@pytest.mark.parametrize("name", ["hermes", "no/such.jinja", "", "report.html"])
def test_an_unknown_template_names_ours(name: str) -> None:
    words = f"^no template '{name}': want one of hermes_chatml, hermes_llama3, or a .jinja file$"
    with pytest.raises(UserError, match=words):
        load_template(name, None)


def test_a_template_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jinja").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match=r"x\.jinja is not UTF-8: byte 2$"):
        load_template(str(tmp_path / "x.jinja"), None)
