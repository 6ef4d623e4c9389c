"""The kernels of attention on a GPU: `TRITON_INTERPRET=0 pytest -m gpu tests/kernels`.

For the memory checks, its `-k small` under `compute-sanitizer --tool memcheck` and `racecheck`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hermes_core.attention import Backend, varlen_attention
from hermes_core.backends import choose, obstacle
from hermes_core.segments import Segments, segments, segments_of_positions
from hermes_kernels import reference
from hermes_kernels.launch import architecture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Of the thread that goes backward, where the first thing it does is a product in float64.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
]
ROW = [1, 127, 128, 129, 5000, 63, *[1] * 256, 4000, 5680, 1000]
SMALL = [1, 130, 127, 300, *[1] * 5, 77]
BACKENDS: list[Backend] = ["triton", "gluon"]


def where(lengths: list[int]) -> Segments:
    return segments(np.concatenate([[0], np.cumsum(lengths)]), device="cuda")


def qkv(
    tokens: int, heads: int, kv_heads: int, size: int = 128, dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    torch.manual_seed(tokens)
    shapes = [(tokens, n, size) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, device="cuda", dtype=dtype, requires_grad=True) for s in shapes]


def run(inputs: list[Tensor], at: Segments, backend: Backend) -> list[Tensor]:
    """The output, and the gradients by a fixed one of the output."""
    return gradients(varlen_attention(*inputs, at, backend=backend), inputs)


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent(out))]


def cotangent(out: Tensor) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(1)
    return torch.randn(out.shape, generator=generator, device="cuda").to(out)


def near_float64(inputs: list[Tensor], lengths: list[int], backend: Backend) -> None:
    """At most 1.5 times PyTorch's own error (FlashAttention-2's kernels)."""
    at = where(lengths)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    out = reference.varlen_attention(*wide, lengths, inputs[0].shape[-1] ** -0.5)
    right = gradients(out, wide)
    plain = run(inputs, at, "torch")
    for ours, theirs, truth in zip(run(inputs, at, backend), plain, right, strict=True):
        assert ours.isfinite().all()
        assert (ours - truth).norm() <= 1.5 * (theirs - truth).norm()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    name: Backend = request.param
    if reason := obstacle("attention", name, torch.device("cuda"), torch.bfloat16):
        pytest.skip(reason)
    return name


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """What is allocated and not written is NaN."""
    torch.cuda.empty_cache()
    held = [torch.full((1 << 26,), torch.nan, device="cuda") for _ in range(8)]
    del held
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("size", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 1), (5, 1)])
def test_a_row_of_16384_equals_float64(
    backend: Backend, size: int, dtype: torch.dtype, heads: int, kv_heads: int
) -> None:
    if reason := obstacle("attention", backend, torch.device("cuda"), dtype, size):
        pytest.skip(reason)
    assert sum(ROW) == 16_384
    near_float64(qkv(16_384, heads, kv_heads, size, dtype), ROW, backend)


@pytest.mark.parametrize("lengths", [[16_384], [8191, 8193]], ids=["one", "two"])
def test_long_segments_equal_float64(backend: Backend, lengths: list[int]) -> None:
    near_float64(qkv(16_384, 1, 1), lengths, backend)


def test_single_tokens_attend_to_themselves(backend: Backend) -> None:
    inputs = qkv(16_384, 2, 1)
    out, dq, dk, dv = run(inputs, where([1] * 16_384), backend)
    assert torch.equal(out, inputs[2].detach().expand(-1, 2, -1))
    assert max(dq.abs().max(), dk.abs().max()) < 1e-2
    right = cotangent(out).float().sum(1, keepdim=True)
    torch.testing.assert_close(dv.float(), right, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("size", [64, 128, 256])
def test_a_small_row_equals_float64(backend: Backend, size: int) -> None:
    if reason := obstacle("attention", backend, torch.device("cuda"), torch.bfloat16, size):
        pytest.skip(reason)
    near_float64(qkv(sum(SMALL), 4, 2, size), SMALL, backend)


def test_fifty_runs_give_the_same_bits(backend: Backend) -> None:
    at, inputs = where(ROW), qkv(16_384, 8, 1)
    first = run(inputs, at, backend)
    for _ in range(49):
        for one, other in zip(first, run(inputs, at, backend), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("length", [1, 40, 190, 256, 1000])
def test_neither_its_place_nor_what_stands_beside_it_changes_a_bit_of_a_segment(
    backend: Backend, length: int
) -> None:
    alone = qkv(length, 8, 2)
    out = varlen_attention(*alone, where([length]), backend=backend)
    grad = cotangent(out)
    wanted = [out.detach(), *torch.autograd.grad(out, alone, grad)]
    for before in ([256], [1], [37], [129], [1] * 70, [100, *[1] * 300, 5]):
        lengths, place = [*before, length, 500], sum(before)
        mine, inputs = slice(place, place + length), qkv(place + length + 500, 8, 2)
        with torch.no_grad():
            for x, one in zip(inputs, alone, strict=True):
                x *= 100
                x[mine] = one
        out = varlen_attention(*inputs, where(lengths), backend=backend)
        others = cotangent(out)
        others[mine] = grad
        found = [out.detach(), *torch.autograd.grad(out, inputs, others)]
        for ours, right in zip(found, wanted, strict=True):
            assert torch.equal(ours[mine], right)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_waits_for_the_device(backend: Backend) -> None:
    bounds = torch.tensor([0, *np.cumsum(ROW)], dtype=torch.int32, device="cuda")
    positions = torch.arange(16_384, device="cuda")[None] % 1000
    inputs = qkv(16_384, 8, 1)
    run(inputs, where(ROW), backend)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for at in (segments(bounds, 16_384), segments_of_positions(positions)):
            out = varlen_attention(*inputs, at, backend=backend)
            torch.autograd.grad(out, inputs, torch.ones_like(out))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # captured on another
def test_a_cuda_graph_follows_another_packing(backend: Backend) -> None:
    inputs = qkv(1024, 4, 1)
    bounds = torch.tensor([0, 300, 1024], dtype=torch.int32, device="cuda")

    def work() -> tuple[Tensor, ...]:
        out = varlen_attention(*inputs, segments(bounds, 1024), backend=backend)
        return out, *torch.autograd.grad(out, inputs, torch.ones_like(out))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    for cut in (700, 1, 1023):
        bounds.copy_(torch.tensor([0, cut, 1024], dtype=torch.int32))
        graph.replay()
        for ours, wanted in zip(found, work(), strict=True):
            assert torch.equal(ours, wanted)


def test_it_compiles_whole_and_once_whatever_the_packing(backend: Backend) -> None:
    inputs = qkv(1000, 4, 1, 64)

    @torch.compile(fullgraph=True)
    def layer(q: Tensor, k: Tensor, v: Tensor, at: Segments) -> Tensor:
        return varlen_attention(q * 2, k, v, at, backend=backend) + 1

    with torch.compiler.set_stance("default"):
        for lengths in ([1000], [1] * 1000, [50, 1, 949]):
            at = where(lengths)
            plain = varlen_attention(inputs[0] * 2, *inputs[1:], at, backend=backend) + 1
            found = gradients(layer(*inputs, at), inputs)
            for ours, wanted in zip(found, gradients(plain, inputs), strict=True):
                assert torch.equal(ours, wanted)
            torch.compiler.set_stance("fail_on_recompile")


def test_recomputed_activations_give_the_same_gradients(backend: Backend) -> None:
    inputs, at = qkv(1000, 4, 1), where([400, 600])

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention(q, k, v, at, backend=backend)

    again = checkpoint(layer, *inputs, use_reentrant=False)
    assert isinstance(again, Tensor)
    for ours, wanted in zip(gradients(again, inputs), run(inputs, at, backend), strict=True):
        assert torch.equal(ours, wanted)


def test_auto_takes_ours_and_log_sum_exp_is_right() -> None:
    gpu = torch.device("cuda")
    if architecture(gpu) == 90:
        assert choose("attention", "auto", gpu, torch.bfloat16) == "gluon"
    inputs, at = qkv(sum(SMALL), 4, 2), where(SMALL)
    out, lse = varlen_attention(*inputs, at, return_lse=True)
    wide = [x.detach().double() for x in inputs[:2]]
    right = reference.varlen_lse(*wide, SMALL, 128**-0.5)
    torch.testing.assert_close(lse.double(), right, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(out, run(inputs, at, "triton")[0], rtol=2e-2, atol=2e-2)


def test_addresses_past_two_to_the_31_elements_are_right(backend: Backend) -> None:
    """A batch of 135,168 tokens and 128 heads of 128: the last rows lie past 2^31."""
    lengths = [1024] * 132
    inputs = qkv(sum(lengths), 128, 1)
    assert inputs[0].numel() > 2**31
    out = varlen_attention(*inputs, where(lengths), backend=backend)
    found = [out, *torch.autograd.grad(out, inputs, out.detach())]
    alone = [x[-1024:].detach().requires_grad_() for x in inputs]
    out = varlen_attention(*alone, where([1024]), backend=backend)
    right = [out, *torch.autograd.grad(out, alone, out.detach())]
    for ours, wanted in zip(found, right, strict=True):
        assert torch.equal(ours[-1024:], wanted)
