"""Rows of the loss in C++ and in PyTorch give the same; who computes what."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hermes_core import loss_rows

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
Vectors = tuple[Tensor, Tensor, Tensor]  # targets' columns, and two numbers of each row

CALLS: dict[str, Callable[[Tensor, Vectors], Tensor | None]] = {
    "statistics": lambda x, v: loss_rows.statistics(x, v[0], 0.0),
    "loss": lambda x, v: loss_rows.loss_and_gradient_(x, v[0], v[1], 1e-3, 0.0),
    "gradient": lambda x, v: loss_rows.gradient_(x, v[0], v[2] + 8, v[1], None, v[2], 0.0),
    "tilted": lambda x, v: loss_rows.gradient_(x, v[0], v[2] + 8, v[1], -v[1], v[2], 0.0),
}


def drawn(columns: int, dtype: torch.dtype) -> tuple[Tensor, Vectors]:
    """Logits with room behind each row, as rows of a chunk may have."""
    generator = torch.Generator().manual_seed(columns)
    logits = torch.empty(9, columns + 3).normal_(std=3, generator=generator).to(dtype)
    column = torch.randint(columns, (9,), generator=generator)
    column[::4] = -1
    numbers = torch.rand(9, 2, generator=generator)
    return logits[:, :columns], (column, numbers[:, 0], numbers[:, 1])  # not contiguous


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("columns", [1, 17, 3001])
def test_rows_in_cpp_equal_those_in_pytorch(
    call: str, dtype: torch.dtype, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, vectors = drawn(columns, dtype)
    slow = fast.clone()
    assert loss_rows._in_cpp(fast, 0.0)
    found = CALLS[call](fast, vectors)
    monkeypatch.setattr(loss_rows, "_in_cpp", lambda logits, softcap: False)
    wanted = CALLS[call](slow, vectors)
    torch.testing.assert_close(fast, slow, rtol=ROUNDING[dtype], atol=1e-6)
    if wanted is not None:
        torch.testing.assert_close(found, wanted, rtol=5e-6, atol=5e-6)


def test_pytorch_computes_what_cpp_does_not() -> None:
    logits = torch.zeros(2, 3)
    assert loss_rows._in_cpp(logits, 0.0)
    assert not loss_rows._in_cpp(logits, 1.0)
    assert not loss_rows._in_cpp(logits.double(), 0.0)
    assert not loss_rows._in_cpp(logits.T, 0.0)
    assert not loss_rows._in_cpp(logits[:0], 0.0)
    assert not loss_rows._in_cpp(logits.to("meta"), 0.0)
