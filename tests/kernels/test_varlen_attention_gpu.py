"""The Triton kernels of attention on a GPU: `TRITON_INTERPRET=0 pytest -m gpu tests/kernels`.

For the memory checks, run the same under `compute-sanitizer --tool memcheck` and `racecheck`.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hermes_core.attention import Backend, varlen_attention
from hermes_core.backends import obstacle
from hermes_core.segments import Segments, segments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = [1, 127, 128, 129, 5000, 63, *[1] * 256, 9680, 1000]


def where(lengths: list[int]) -> Segments:
    return segments(np.concatenate([[0], np.cumsum(lengths)]), device="cuda")


def qkv(tokens: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(tokens, n, size) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, device="cuda", dtype=dtype, requires_grad=True) for s in shapes]


def run(inputs: list[Tensor], at: Segments, backend: Backend) -> list[Tensor]:
    out = varlen_attention(*inputs, at, backend=backend)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out))]


BACKENDS: list[Backend] = ["triton", "gluon"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    name: Backend = request.param
    if reason := obstacle("attention", name, torch.device("cuda"), torch.bfloat16):
        pytest.skip(reason)
    return name


@pytest.mark.parametrize("size", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 1), (5, 1)])
def test_a_row_of_16384_equals_float64(
    backend: Backend, size: int, dtype: torch.dtype, heads: int, kv_heads: int
) -> None:
    if reason := obstacle("attention", backend, torch.device("cuda"), dtype, size):
        pytest.skip(reason)
    assert sum(LENGTHS) == 16_384
    at, inputs = where(LENGTHS), qkv(16_384, heads, kv_heads, size, dtype)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    plain, right = run(inputs, at, "torch"), run(wide, at, "reference")
    for ours, theirs, truth in zip(run(inputs, at, backend), plain, right, strict=True):
        assert ours.isfinite().all()
        assert (ours - truth).norm() <= 1.5 * (theirs - truth).norm()


def test_fifty_runs_give_the_same_bits(backend: Backend) -> None:
    at, inputs = where(LENGTHS), qkv(16_384, 8, 1, 128, torch.bfloat16)
    first = run(inputs, at, backend)
    for _ in range(49):
        for one, other in zip(first, run(inputs, at, backend), strict=True):
            assert torch.equal(one, other)


def test_nothing_waits_for_the_device(backend: Backend) -> None:
    bounds = torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32, device="cuda")
    inputs = qkv(16_384, 8, 1, 128, torch.bfloat16)
    run(inputs, where(LENGTHS), backend)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = varlen_attention(*inputs, segments(bounds, 16_384), backend=backend)
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_follows_another_packing(backend: Backend) -> None:
    q, k, v = (x.detach() for x in qkv(1024, 4, 1, 128, torch.bfloat16))
    bounds = torch.tensor([0, 300, 1024], dtype=torch.int32, device="cuda")

    def work() -> Tensor:
        return varlen_attention(q, k, v, segments(bounds, 1024), backend=backend)

    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()
    bounds.copy_(torch.tensor([0, 700, 1024], dtype=torch.int32))
    graph.replay()
    assert torch.equal(out, work())
