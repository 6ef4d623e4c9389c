"""Factors on the gradients: scales, denominators and weights, also where fp16 has no room."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hermes_core.loss import Backend, linear_cross_entropy, masked_cross_entropy, token_nll

IGNORE = -100
ROUNDING = {torch.float16: 5e-4, torch.bfloat16: 4e-3}  # relative, of the norm


def problem(dtype: torch.dtype, tokens: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 32, generator=generator).to(dtype)
    weight = (torch.randn(501, 32, generator=generator) / 4).to(dtype)
    labels = torch.randint(0, 501, (tokens,), generator=generator)
    labels[::3] = IGNORE
    return hidden, weight, labels


def gradients(
    hidden: Tensor, weight: Tensor, labels: Tensor, scale: float, **options: object
) -> tuple[Tensor, ...]:
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = linear_cross_entropy(*leaves, labels, **options)  # type: ignore[arg-type]
    return torch.autograd.grad(loss.total * scale, leaves)


def of_logits(logits: Tensor, labels: Tensor, scale: float, **options: object) -> Tensor:
    leaf = logits.clone().requires_grad_()
    loss = masked_cross_entropy(leaf, labels, **options)  # type: ignore[arg-type]
    return torch.autograd.grad(loss.total * scale, leaf)[0]


def error(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true.double()).norm() / true.double().norm())


@pytest.mark.parametrize("chunk_bytes", [2 * 501 * 7, 2**30])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("denominator", [4096.0, 1e6])
def test_a_scale_beyond_fp16_leaves_one_rounding(
    denominator: float, backend: Backend, chunk_bytes: int
) -> None:
    """65,536 is where PyTorch's GradScaler starts."""
    hidden, weight, labels = problem(torch.float16)
    wide = hidden.double(), weight.double(), labels, 65536.0
    right = gradients(*wide, denominator=denominator, backend="reference")
    options = {"denominator": denominator, "backend": backend, "chunk_bytes": chunk_bytes}
    ours = gradients(hidden, weight, labels, 65536.0, **options)
    for found, true in zip(ours, right, strict=True):
        assert error(found, true) < ROUNDING[torch.float16]


def test_a_scale_beyond_fp16_on_logits() -> None:
    hidden, weight, labels = problem(torch.float16)
    logits = hidden @ weight.T
    options = {"denominator": 4096.0}
    right = of_logits(logits.double(), labels, 65536.0, backend="reference", **options)
    assert error(of_logits(logits, labels, 65536.0, **options), right) < ROUNDING[torch.float16]


@pytest.mark.parametrize("weight_of_each", [1e6, 1e-7])
def test_weights_that_fp16_has_no_room_for(weight_of_each: float) -> None:
    hidden, weight, labels = problem(torch.float16)
    options = {
        "token_weights_T": torch.full((64,), weight_of_each),
        "denominator": 64 * weight_of_each,
    }
    wide = hidden.double(), weight.double(), labels, 1.0
    right = gradients(*wide, backend="reference", **options)
    for found, true in zip(gradients(hidden, weight, labels, 1.0, **options), right, strict=True):
        assert error(found, true) < ROUNDING[torch.float16]


def test_a_sum_that_fp16_has_no_room_for() -> None:
    """The sum over tokens is beyond 65,504; its mean is not."""
    hidden = torch.full((4096, 4), 100.0, dtype=torch.float16)
    weight = torch.zeros(9, 4, dtype=torch.float16)
    labels = torch.zeros(4096, dtype=torch.int64)
    right = gradients(hidden.double(), weight.double(), labels, 1.0, denominator=4096)
    found = gradients(hidden, weight, labels, 1.0, denominator=4096)
    assert error(found[1], right[1]) < ROUNDING[torch.float16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_upstream_factor_is_not_rounded(dtype: torch.dtype) -> None:
    hidden, weight, labels = problem(dtype, 256)
    once, thrice = (gradients(hidden, weight, labels, scale)[1] for scale in (1.0, 1 / 3))
    true = once.double() / 3
    bias = float((thrice.double() * true).sum() / true.square().sum()) - 1
    assert abs(bias) < ROUNDING[dtype] / 10


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", ["no label", "weights 0"])
def test_a_denominator_of_zero_for_no_token_gives_zero(
    dtype: torch.dtype, backend: Backend, how: str
) -> None:
    hidden, weight, labels = (x.clone() for x in problem(dtype))
    options: dict[str, object] = {"denominator": torch.tensor(0), "backend": backend}
    if how == "no label":
        labels.fill_(IGNORE)
    else:
        options["token_weights_T"] = torch.zeros(64)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(*leaves, labels, **options)  # type: ignore[arg-type]
    assert float(loss.total.detach()) == 0
    for gradient in torch.autograd.grad(loss.total, leaves):
        assert not gradient.any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_logit_beyond_fp16_has_no_part_in_the_entropy(backend: Backend) -> None:
    """One is -inf: rounded to fp16, -180,000 is."""
    hidden = torch.full((2, 2), 300.0, dtype=torch.float16).requires_grad_()
    rows = [[0.01, 0.0], [0.0, 0.011], [-300.0, -300.0], [0.0, 0.012]]
    weight = torch.tensor(rows, dtype=torch.float16).requires_grad_()
    labels = torch.tensor([0, 3])
    found = token_nll(hidden, weight, labels, backend=backend)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    right = token_nll(*wide, labels, backend="reference")
    torch.testing.assert_close(found.entropy_T.double(), right.entropy_T, rtol=1e-2, atol=0)
    for term in (0, 1):
        ours = torch.autograd.grad(found[term].sum(), (hidden, weight), retain_graph=True)
        true = torch.autograd.grad(right[term].sum(), wide, retain_graph=True)
        for a, b in zip(ours, true, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-2, atol=2e-2 * float(b.abs().max()))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_denominator_of_one_element_leaves_the_total_a_scalar(backend: Backend) -> None:
    hidden, weight, labels = problem(torch.float32)
    for shape in ((), (1,), (1, 1)):
        denominator = torch.full(shape, 7.0)
        loss = linear_cross_entropy(
            hidden, weight, labels, denominator=denominator, backend=backend
        )
        of_logits = masked_cross_entropy(
            hidden @ weight.T, labels, denominator=denominator, backend=backend
        )
        assert loss.total.shape == of_logits.total.shape == ()
        torch.testing.assert_close(loss.total, loss.nll_sum / 7)
