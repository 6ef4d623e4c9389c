"""Attention inside segments: every backend against the plain twin in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hermes_core.attention import varlen_attention
from hermes_core.backends import BackendError
from hermes_core.segments import Segments, segments
from hermes_kernels import reference


def where(lengths: list[int]) -> Segments:
    return segments(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def qkv(tokens: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, n, size) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def run(inputs: list[Tensor], lengths: list[int], **options: object) -> list[Tensor]:
    """Output and the gradients of q, k and v for one fixed gradient of the output."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = varlen_attention(*leaves, where(lengths), **options)  # type: ignore[arg-type]
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in leaves)]  # type: ignore[list-item]


def truth(inputs: list[Tensor], lengths: list[int], scale: float | None = None) -> list[Tensor]:
    wide = [x.detach().double() for x in inputs]
    return run(wide, lengths, backend="reference", scale=scale)


LENGTHS = [
    [1],
    [63],
    [1, 1, 1, 1],
    [5, 100, 7, 1, 64, 65],
    [257, 3, 300, 12, 12],
    [1001],
]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 32), (8, 2, 64), (3, 1, 16)])
def test_cpu_equals_the_plain_twin(
    lengths: list[int], heads: int, kv_heads: int, size: int
) -> None:
    inputs = qkv(sum(lengths), heads, kv_heads, size, torch.float32)
    for ours, wanted in zip(
        run(inputs, lengths, backend="cpu"), truth(inputs, lengths), strict=True
    ):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-5)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=12), st.sampled_from([1, 2, 4]))
@settings(max_examples=25)
def test_cpu_equals_the_plain_twin_on_any_packing(lengths: list[int], group: int) -> None:
    inputs = qkv(sum(lengths), 4, 4 // group, 16, torch.float32)
    for ours, wanted in zip(
        run(inputs, lengths, backend="cpu"), truth(inputs, lengths), strict=True
    ):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_the_plain_computation(dtype: torch.dtype) -> None:
    lengths = [5, 100, 7, 1, 64, 65]
    inputs = qkv(sum(lengths), 8, 2, 64, dtype)
    wanted = truth(inputs, lengths)
    plain = run(inputs, lengths, backend="reference")
    for ours, theirs, right in zip(run(inputs, lengths, backend="cpu"), plain, wanted, strict=True):
        error, allowed = (ours - right).norm(), (theirs - right).norm()
        assert error <= 1.1 * allowed


def test_reference_equals_a_dense_block_mask() -> None:
    lengths = [3, 1, 6]
    q, k, v = (x.detach().double() for x in qkv(10, 2, 2, 8, torch.float32))
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    allowed = (owner[:, None] == owner[None]) & torch.ones(10, 10, dtype=torch.bool).tril()
    dense = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attn_mask=allowed
    ).transpose(0, 1)
    torch.testing.assert_close(reference.varlen_attention(q, k, v, lengths, 8**-0.5), dense)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_segment_ignores_the_others(backend: str) -> None:
    lengths = [40, 33, 27]
    q, k, v = qkv(100, 4, 2, 16, torch.float32)
    alone = [x[40:73] for x in (q, k, v)]
    out = varlen_attention(q, k, v, where(lengths), backend=backend)  # type: ignore[arg-type]
    single = varlen_attention(*alone, where([33]), backend=backend)  # type: ignore[arg-type]
    torch.testing.assert_close(out[40:73], single)
    out[40:73].sum().backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert x.grad[:40].abs().max() == 0
        assert x.grad[73:].abs().max() == 0


def test_scale_is_a_factor_on_the_scores() -> None:
    inputs = qkv(50, 2, 2, 16, torch.float32)
    ours = run(inputs, [20, 30], backend="cpu", scale=0.7)
    for mine, wanted in zip(ours, truth(inputs, [20, 30], scale=0.7), strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-4, atol=1e-5)
    default = run(inputs, [20, 30], backend="cpu")
    assert (ours[0] - default[0]).abs().max() > 1e-2


def test_strided_inputs_give_the_same() -> None:
    q, k, v = (x.detach() for x in qkv(60, 4, 4, 16, torch.float32))
    fused = torch.cat([q, k, v], dim=1)
    views = fused.split([4, 4, 4], dim=1)
    assert not views[1].is_contiguous()
    for lengths in ([60], [20, 40]):
        a = varlen_attention(*views, where(lengths))
        assert torch.equal(a, varlen_attention(q, k, v, where(lengths)))


def test_no_token_is_no_work() -> None:
    q, k, v = qkv(0, 2, 2, 16, torch.float32)
    assert varlen_attention(q, k, v, where([])).shape == (0, 2, 16)


@pytest.mark.parametrize(
    ("shapes", "lengths", "words"),
    [
        ([(8, 4, 16), (8, 3, 16), (8, 3, 16)], [8], "4 heads, not a multiple of the 3"),
        ([(8, 4, 16), (8, 4, 16), (8, 4, 8)], [8], "k is"),
        ([(8, 4, 16), (7, 4, 16), (7, 4, 16)], [8], "k is"),
        ([(8, 4, 16), (8, 4, 16), (8, 4, 16)], [9], "ends at 9 but q has 8"),
        ([(8, 64), (8, 64), (8, 64)], [8], "q must be"),
        ([(8, 4, 0), (8, 4, 0), (8, 4, 0)], [8], "the head size is 0, want 1 or more"),
    ],
)
def test_shapes_that_disagree_are_refused(
    shapes: list[tuple[int, ...]], lengths: list[int], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        varlen_attention(*(torch.zeros(s) for s in shapes), where(lengths))  # type: ignore[misc]


def test_dtypes_that_disagree_are_refused() -> None:
    q, k, v = qkv(8, 2, 2, 16, torch.float32)
    with pytest.raises(ValueError, match=r"k is torch\.float64"):
        varlen_attention(q, k.double(), v, where([8]))


def test_a_backend_that_cannot_run_says_why_and_what_can() -> None:
    q, k, v = qkv(8, 2, 2, 16, torch.float32)
    with pytest.raises(BackendError, match=r"needs CUDA tensors.*use backend='cpu'"):
        varlen_attention(q, k, v, where([8]), backend="torch")
    with pytest.raises(ValueError, match="'fast' is not one of attention's: auto, triton"):
        varlen_attention(q, k, v, where([8]), backend="fast")  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="int32"):
        varlen_attention(*(x.detach().int() for x in (q, k, v)), where([8]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_torch_backend_equals_the_plain_twin_on_cuda() -> None:
    lengths = [5, 100, 7, 1, 64, 300]
    inputs = [x.detach().cuda() for x in qkv(sum(lengths), 8, 2, 64, torch.bfloat16)]
    wide = [x.double() for x in inputs]
    ours = varlen_attention(*inputs, where(lengths).to("cuda"))
    plain = varlen_attention(*wide, where(lengths).to("cuda"), backend="reference")
    assert (ours - plain).abs().max() < 3e-2
