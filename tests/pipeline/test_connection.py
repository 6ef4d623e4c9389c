"""A hub that cannot be reached is said to be, before anyone waits for it."""

from __future__ import annotations

import time
from pathlib import Path

import huggingface_hub.constants as constants
import pytest

from hermes_pipeline.errors import UserError
from hermes_pipeline.services import connection
from hermes_pipeline.services.connection import reach_hub
from hermes_pipeline.services.hub import DataSource, load_tokenizer
from running import free_port


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """An address where nobody listens, as the hub's; nothing was downloaded."""
    address = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return address


def test_a_mistyped_tokenizer_is_refused_at_once(
    nobody: str, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    words = rf"^tokenizer 'nope/tok' is no file or folder here, and {nobody} cannot be reached \("
    with pytest.raises(UserError, match=words):
        load_tokenizer("nope/tok")
    assert time.monotonic() - began < 30
    assert capsys.readouterr().err.startswith("tokenizer 'nope/tok' is no file or folder here: ask")


def test_a_mistyped_data_set_is_refused_at_once(nobody: str, cache: None) -> None:
    with pytest.raises(UserError, match=r"^data set 'nope/data' is no file or folder here, and"):
        DataSource("nope/data").count()


def test_what_was_downloaded_before_is_taken(
    nobody: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hub" / "models--some--tok").mkdir(parents=True)
    assert reach_hub("tokenizer", "some/tok", "models") is False
    assert capsys.readouterr().err.endswith(": taking what was downloaded before\n")


def test_a_name_that_nobody_looks_up_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*_: object, **__: object) -> None:
        time.sleep(1)
        raise OSError

    monkeypatch.setattr(connection, "WAIT_S", 0.1)
    monkeypatch.setattr(connection.socket, "create_connection", look_up)
    with pytest.raises(UserError, match=r"cannot be reached \(no answer in 0 s\)"):
        reach_hub("tokenizer", "nope/tok", "models")


def test_a_proxy_is_tried_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def connect(address: tuple[str, int], timeout: float) -> None:
        asked.append(address)
        raise OSError("no")

    monkeypatch.setattr(connection.socket, "create_connection", connect)
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.example")
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    with pytest.raises(UserError):
        reach_hub("tokenizer", "nope/tok", "models")
    assert asked == [("proxy.example", 3128)]
