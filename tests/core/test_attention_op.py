"""Attention as an operation of PyTorch: compiled whole, checkpointed, checked by opcheck."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hermes_core.attention import Backend, _op, varlen_attention
from hermes_core.segments import Segments, segments
from hermes_kernels import reference
from twins.interpreter import make_honest

BACKENDS: list[tuple[Backend, torch.dtype]] = [("cpu", torch.float32), ("triton", torch.float16)]
both = pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=["cpu", "triton"])


@pytest.fixture(autouse=True)
def forget_compilations() -> Iterator[None]:
    make_honest()
    yield
    torch._dynamo.reset()


def where(lengths: list[int]) -> Segments:
    return segments(np.concatenate([[0], np.cumsum(lengths)]))


def qkv(tokens: int, dtype: torch.dtype, size: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, n, size) for n in (4, 2, 2)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(out.float().square().sum(), inputs))


@both
def test_opcheck_finds_nothing(backend: Backend, dtype: torch.dtype) -> None:
    at = where([50, 1, 79])
    torch.library.opcheck(_op, (*qkv(130, dtype), *at.places, 0.125, backend))


@both
def test_it_compiles_whole_and_once_whatever_the_packing(
    backend: Backend, dtype: torch.dtype
) -> None:
    inputs, compilations = qkv(130, dtype), 0

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal compilations
        compilations += 1
        return graph

    @torch.compile(fullgraph=True, backend=count)
    def layer(q: Tensor, k: Tensor, v: Tensor, at: Segments) -> Tensor:
        return varlen_attention(q * 2, k, v, at, backend=backend) + 1

    for lengths in ([130], [1] * 130, [50, 1, 79]):
        out = layer(*inputs, where(lengths))
        q, k, v = inputs
        plain = varlen_attention(q * 2, k, v, where(lengths), backend=backend) + 1
        assert torch.equal(out, plain)
        for ours, wanted in zip(gradients(out, inputs), gradients(plain, inputs), strict=True):
            assert torch.equal(ours, wanted)
    assert compilations == 1


@both
def test_ahead_of_time_autograd_gives_the_same_gradients(
    backend: Backend, dtype: torch.dtype
) -> None:
    inputs, at = qkv(130, dtype), where([50, 1, 79])
    compiled = torch.compile(
        lambda q, k, v: varlen_attention(q, k, v, at, backend=backend),
        fullgraph=True,
        backend="aot_eager",
    )
    plain = gradients(varlen_attention(*inputs, at, backend=backend), inputs)
    for ours, wanted in zip(gradients(compiled(*inputs), inputs), plain, strict=True):
        assert torch.equal(ours, wanted)


@both
def test_recomputed_activations_give_the_same_gradients(
    backend: Backend, dtype: torch.dtype
) -> None:
    inputs, at = qkv(130, dtype), where([50, 1, 79])

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention(q, k, v, at, backend=backend)

    again = checkpoint(layer, *inputs, use_reentrant=False)
    wanted = gradients(layer(*inputs), inputs)
    for ours, theirs in zip(gradients(again, inputs), wanted, strict=True):
        assert torch.equal(ours, theirs)


@both
def test_log_sum_exp_is_given_when_asked_for(backend: Backend, dtype: torch.dtype) -> None:
    lengths, (q, k, v) = [50, 1, 79], qkv(130, dtype)
    _, lse = varlen_attention(q, k, v, where(lengths), return_lse=True, backend=backend)
    wanted = reference.varlen_lse(q.double(), k.double(), lengths, 64**-0.5)
    assert not lse.requires_grad
    torch.testing.assert_close(lse.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [16, 96, 192])
def test_triton_pads_head_sizes_that_it_has_no_tiles_for(size: int) -> None:
    inputs, at = qkv(130, torch.float16, size), where([50, 80])
    ours = varlen_attention(*inputs, at, backend="triton")
    wide = [x.detach().double().requires_grad_() for x in inputs]
    right = varlen_attention(*wide, at, backend="reference")
    assert ours.shape == right.shape
    torch.testing.assert_close(ours.double(), right, rtol=0, atol=3e-3)
    for mine, wanted in zip(gradients(ours, inputs), gradients(right, wide), strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-2, atol=1e-2)


def test_a_second_derivative_is_refused() -> None:
    inputs = qkv(20, torch.float32)
    out = varlen_attention(*inputs, where([20]), backend="cpu")
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        grad.sum().backward()


def test_gradients_of_the_reference_are_those_of_finite_differences() -> None:
    inputs = [x.detach().double().requires_grad_() for x in qkv(6, torch.float32, 2)]
    at = where([2, 4])
    assert torch.autograd.gradcheck(
        lambda *x: varlen_attention(*x, at, backend="reference"), inputs
    )
