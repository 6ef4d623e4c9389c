"""Which peers the benchmark of attention on a GPU times: decided on a CPU, with peers of ours."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.attention import Shape, inputs, loop
from bench.attention_gpu import fault, truth, without_gradient

SHAPE = Shape("two", (40, 24), (4, 2), 64, torch.float32)


def right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return loop(q, k, v, SHAPE.lengths)


def refuses(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise NotImplementedError("no such engine\nand a trace")


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (right, ""),
        (without_gradient(right), ""),
        (refuses, "no such engine"),
        (lambda q, k, v: right(q, k, 2 * v), "out is off by 1.0e+00"),
        (lambda q, k, v: right(q.detach(), k, v) + 0 * q, "dq is off by 1.0e+00"),
        (lambda q, k, v: right(q, k, v) * torch.nan, "out is off by nan"),
    ],
    ids=["right", "forward-alone", "refuses", "wrong", "wrong-gradient", "no-number"],
)
def test_a_peer_is_timed_only_if_it_is_right(
    call: Callable[[Tensor, Tensor, Tensor], Tensor], why: str
) -> None:
    one = inputs(SHAPE)
    assert fault(call, one, truth(SHAPE, one)) == why
