"""The CPU backend in every dtype: its error against float64, beside that of PyTorch's kernels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hermes_core.attention import varlen_attention
from hermes_core.segments import Segments, segments

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def where(lengths: list[int]) -> Segments:
    return segments(np.concatenate([[0], np.cumsum(lengths)]))


def drawn(tokens: int, heads: tuple[int, int], size: int, dtype: torch.dtype) -> list[Tensor]:
    """A gradient of the output, q, k, v."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, n, size) for n in (heads[0], heads[0], *heads[1:] * 2)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def run(inputs: list[Tensor], lengths: list[int], backend: str) -> list[Tensor]:
    """Output and the gradients of q, k and v; "fused" is PyTorch's kernel, a segment at a time."""
    grad, *leaves = [x.clone() for x in inputs]
    q, k, v = (x.requires_grad_() for x in leaves)
    if backend == "fused":
        parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        out = torch.cat([fused(*part) for part in parts])
    else:
        out = varlen_attention(q, k, v, where(lengths), backend=backend)  # type: ignore[call-overload]
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = (x.transpose(0, 1)[None] for x in (q, k, v))
    return scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=6),
    heads=st.sampled_from([(4, 4), (8, 2), (3, 1), (8, 1)]),
    size=st.sampled_from([1, 7, 64, 96, 128, 192, 256]),
)
@example(lengths=[41], heads=(4, 4), size=1)  # 1.2 roundings
@settings(max_examples=25)
def test_it_errs_no_more_than_pytorch(
    dtype: torch.dtype, lengths: list[int], heads: tuple[int, int], size: int
) -> None:
    inputs = drawn(sum(lengths), heads, size, dtype)
    right = run([x.double() for x in inputs], lengths, "reference")
    theirs = run(inputs, lengths, "fused")
    for ours, peer, truth in zip(run(inputs, lengths, "cpu"), theirs, right, strict=True):
        error, allowed = (ours - truth).norm(), (peer - truth).norm()
        few_roundings = 4 * torch.finfo(dtype).eps * (truth.norm() + truth.numel() ** 0.5)
        assert error <= 1.5 * allowed + few_roundings


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_a_full_row_equals_the_plain_twin(dtype: torch.dtype) -> None:
    inputs = drawn(1024, (4, 1), 64, dtype)
    tolerance = 16 * torch.finfo(dtype).eps
    right = run([x.double() for x in inputs], [1024], "reference")
    for ours, truth in zip(run(inputs, [1024], "cpu"), right, strict=True):
        assert (ours.double() - truth).norm() <= tolerance * truth.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """Every number is the one nearest to what float32 gives, subnormals and the largest too."""
    tokens = [1] * 512
    grad, q, k, v = drawn(512, (2, 1), 64, torch.float32)
    v *= 2.0 ** torch.arange(-30, 34).expand_as(v)
    v = v.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    halves = [grad.to(dtype), q.to(dtype), k.to(dtype), v]
    out, _, _, dv = run(halves, tokens, "cpu")
    assert torch.equal(out, v.expand_as(out))
    assert torch.equal(dv, halves[0].float().sum(1, keepdim=True).to(dtype))
    halves[3].fill_(float("inf"))
    halves[3][::2] = float("nan")
    out = run(halves, tokens, "cpu")[0]
    assert out[::2].isnan().all()
    assert (out[1::2] == float("inf")).all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_threads_and_place_change_no_bit(dtype: torch.dtype) -> None:
    inputs, lengths = drawn(1300, (4, 2), 64, dtype), [700, 500, 99, 1]
    torch.set_num_threads(1)
    alone = run([x[700:1200] for x in inputs], [500], "cpu")
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        for all_of, one in zip(run(inputs, lengths, "cpu"), alone, strict=True):
            assert torch.equal(all_of[700:1200], one)


def test_small_halves_survive_a_processor_that_flushes_subnormals() -> None:
    """All of fp16's own subnormals are normal numbers in fp32."""
    values = (torch.arange(1024) * 2.0**-24).to(torch.float16).view(1, 1, 1024)
    assert torch.set_flush_denormal(True)
    try:
        out = varlen_attention(values, values, values, where([1]), backend="cpu")
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(out, values)
