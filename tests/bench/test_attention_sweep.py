"""What the sweep of launches refuses to time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench import attention_sweep
from bench.attention_sweep import candidates, fault
from bench.machine_code import SHARED_BYTES
from hermes_kernels.launch import Launch

KNOWN, OTHER = Launch(128, 64, 8, 2), Launch(64, 64, 4, 2)


@pytest.mark.parametrize(
    ("lse", "wrong"), [(1.001, False), (1.02, True), (float("nan"), True), (float("inf"), True)]
)
def test_a_launch_that_computes_something_else_is_wrong(
    lse: float, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def call(how: Launch) -> list[Tensor]:
        return [torch.ones(4), torch.full((4,), 1.0 if how == KNOWN else lse)]

    assert fault(call, OTHER, KNOWN).startswith("WRONG: off by 0.0e+00, ") == wrong
    assert (fault(call, OTHER, KNOWN) == "") != wrong


def test_a_launch_that_does_not_run_is_told_in_a_line() -> None:
    def call(how: Launch) -> list[Tensor]:
        if how == OTHER:
            raise RuntimeError("out of resources\nand more")
        return [torch.ones(4)]

    assert fault(call, OTHER, KNOWN) == "RuntimeError: out of resources"


def test_candidates_fit_shared_memory_and_keys_of_256_may_have_eight_warps() -> None:
    found = candidates("dkdv", 256)
    assert {(how.keys, how.warps) for how in found} >= {(64, 4), (64, 8)}
    assert all(2 * 256 * 2 * (how.keys + how.stages * how.queries) <= SHARED_BYTES for how in found)


def test_without_a_gpu_the_sweep_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        next(attention_sweep.run())
