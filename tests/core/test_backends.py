"""Which backend runs, and why another cannot."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from hermes_core import attention_peers, backends
from hermes_core.backends import AUTO, BACKENDS, BackendError, choose, explain, obstacle
from hermes_kernels import launch
from hermes_kernels.launch import TABLE, TILE, padded_size, room_for

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if tensors lay on a Hopper, with no flash-attn and kernels not interpreted."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "architecture", lambda device: 90)
    monkeypatch.setattr("hermes_core.attention_peers.FLASH", "")


def test_the_table_names_backends_that_are_there() -> None:
    for (_, operation, _), line in AUTO.items():
        assert set(line.backends) <= set(BACKENDS[operation])
        assert line.backends[-1] == "reference"  # runs everywhere
        assert line.source


def test_a_cpu_takes_the_cpu_backend() -> None:
    assert choose("attention", "auto", CPU, torch.bfloat16) == "cpu"


@pytest.mark.usefixtures("on")
def test_a_hopper_takes_our_kernels_where_dtype_and_head_size_allow() -> None:
    assert choose("attention", "auto", CUDA, torch.bfloat16, size=128) == "gluon"
    assert choose("attention", "auto", CUDA, torch.bfloat16, size=96) == "gluon"
    assert choose("attention", "auto", CUDA, torch.bfloat16, size=256) == "triton"
    assert choose("attention", "auto", CUDA, torch.float32, size=128) == "reference"
    assert choose("attention", "auto", CUDA, torch.bfloat16, size=320) == "reference"


@pytest.mark.parametrize(
    ("deterministic", "chosen"), [(False, "flash"), (True, "triton")], ids=["fast", "same bits"]
)
def test_a_blackwell_takes_flash_unless_determinism_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, deterministic: bool, chosen: str
) -> None:
    monkeypatch.setattr(backends, "architecture", lambda device: 100)
    monkeypatch.setattr("hermes_core.attention_peers.FLASH", "flash_attn.cute")
    torch.use_deterministic_algorithms(deterministic)
    try:
        assert choose("attention", "auto", CUDA, torch.bfloat16) == chosen
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "size", "words"),
    [
        ("triton", CPU, torch.bfloat16, 128, "Triton needs CUDA tensors, these are on cpu"),
        ("flash", CPU, torch.bfloat16, 128, "flash-attn needs CUDA tensors"),
        ("triton", CUDA, torch.float32, 128, "bfloat16 or float16, not torch.float32"),
        ("triton", CUDA, torch.bfloat16, 512, "head sizes to 256, not 512"),
        ("flash", CUDA, torch.bfloat16, 128, "no flash-attn is installed"),
        ("cpu", CUDA, torch.float32, 128, "the tensors are on cuda"),
    ],
)
@pytest.mark.usefixtures("on")
def test_an_obstacle_is_named(
    backend: str, device: torch.device, dtype: torch.dtype, size: int, words: str
) -> None:  # fmt: skip
    assert words in obstacle("attention", backend, device, dtype, size)
    with pytest.raises(BackendError, match=f"backend '{backend}' cannot run here"):
        choose("attention", backend, device, dtype, size=size)


def test_every_backend_of_each_operation_is_explained() -> None:
    lines = explain()
    for operation, names in BACKENDS.items():
        for name in (*names, "auto"):
            assert any(line.split()[:2] == [operation, name] for line in lines)


def test_every_head_size_of_the_table_has_all_kernels() -> None:
    for architecture, _, size in TABLE:
        assert padded_size(size) == size
        for kernel in ("forward", "dq", "dkdv"):
            assert (architecture, kernel, size) in TABLE


@pytest.mark.parametrize(
    ("found", "newest"),
    [
        ([], ""),
        (["flash_attn/__init__.py"], "flash_attn"),
        (["flash_attn/__init__.py", "flash_attn_interface.py"], "flash_attn_interface"),
        (["flash_attn/cute/__init__.py", "flash_attn_interface.py"], "flash_attn.cute"),
    ],
)
def test_the_newest_flash_attn_is_found_and_not_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: list[str], newest: str
) -> None:
    for name in found:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("raise RuntimeError('loaded')")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert attention_peers._newest_flash() == newest


@pytest.mark.usefixtures("on")
def test_a_varlen_attn_that_takes_no_scale_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hermes_core.attention_peers.VARLEN", frozenset())
    assert "from torch 2.11 on" in obstacle("attention", "torch", CUDA, torch.bfloat16)


@pytest.mark.usefixtures("on")
def test_an_older_triton_has_no_gluon_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "TRITON_VERSION", (3, 5))
    assert "need triton 3.6 or newer" in obstacle("attention", "gluon", CUDA, torch.bfloat16)
    assert choose("attention", "auto", CUDA, torch.bfloat16) == "triton"


@pytest.mark.parametrize(
    ("said", "known"), [("3.5.1", (3, 5)), ("3.10.0+git1", (3, 10)), ("main", (0,))]
)
def test_triton_tells_its_version(
    monkeypatch: pytest.MonkeyPatch, said: str, known: tuple[int, ...]
) -> None:
    monkeypatch.setattr(launch, "version", lambda package: said)
    assert launch._triton_version() == known


@pytest.mark.usefixtures("on")
def test_gluon_is_not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "Triton interprets" in obstacle("attention", "gluon", CUDA, torch.bfloat16)
    assert choose("attention", "auto", CUDA, torch.bfloat16) == "triton"


@pytest.mark.parametrize(
    ("heads", "tokens", "words"),
    [
        (64, 2**23, "64 heads x 8388608 tokens pass 2\\^29"),
        (1, 2_097_121, "2097121 tokens, at most 2097120 a batch"),
    ],
)
def test_a_batch_too_large_for_a_launch_is_refused(heads: int, tokens: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        room_for(heads, tokens, -(-tokens // TILE))
    assert room_for(1, 1_000_000, -(-1_000_000 // TILE)) >= 1_000_000
