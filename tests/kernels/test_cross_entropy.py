"""The loss's kernels, in the interpreter where there is no GPU, against their plain twin."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

from hermes_core import loss_rows
from hermes_core.loss import linear_cross_entropy, masked_cross_entropy, token_nll
from hermes_core.loss_chunks import Plan, RowFunctions
from hermes_kernels import cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IGNORE = -100
ODD = [1, 2, 63, 1001, 4096, 9000]  # one column; under, at and over a block
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def chunk(rows: int, columns: int, dtype: torch.dtype, spread: float = 3.0) -> tuple[Tensor, ...]:
    """Logits inside a buffer of NaN, targets of which some are elsewhere, and weights."""
    generator = torch.Generator().manual_seed(rows + columns)
    buffer = torch.full((rows + 1, columns + 5), float("nan"), dtype=dtype)
    buffer[:rows, :columns] = spread * torch.randn(rows, columns, generator=generator)
    column = torch.randint(0, columns, (rows,), generator=generator)
    column[::3] = -1
    weight = torch.rand(rows, generator=generator)
    return buffer.to(DEVICE)[:rows, :columns], column.to(DEVICE), weight.to(DEVICE)


def truth(logits: Tensor, column: Tensor, weight: Tensor, z: float, cap: float) -> list[Tensor]:
    """Statistics and the loss's gradient by float64 and autograd."""
    raw = logits.double().detach().requires_grad_()
    capped = cap * torch.tanh(raw / cap) if cap else raw
    lse = capped.logsumexp(1)
    picked = capped.gather(1, column.clamp(min=0)[:, None]).squeeze(1) * (column >= 0)
    (weight * (lse - picked + z * lse**2)).sum().backward()
    expected = (capped.softmax(1) * capped).sum(1)
    assert raw.grad is not None
    return [x.detach() for x in (lse, picked, expected, raw.grad)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", ODD)
@pytest.mark.parametrize(("z", "cap"), [(0.0, 0.0), (1e-3, 20.0)])
def test_one_pass_equals_float64(columns: int, dtype: torch.dtype, z: float, cap: float) -> None:
    logits, column, weight = chunk(5, columns, dtype)
    lse, picked, _, gradient = truth(logits, column, weight, z, cap)
    found = cross_entropy.loss_and_gradient_(logits, column, weight, z, cap)
    torch.testing.assert_close(found.double(), torch.stack([lse, picked]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, gradient.to(dtype), rtol=1e-2, atol=2e-6)


@pytest.mark.parametrize("columns", ODD)
@pytest.mark.parametrize("cap", [0.0, 20.0])
def test_statistics_equal_float64(columns: int, cap: float) -> None:
    logits, column, weight = chunk(5, columns, torch.bfloat16)
    wanted = torch.stack(truth(logits, column, weight, 0.0, cap)[:3])
    before = logits.clone()
    found = cross_entropy.statistics(logits, column, cap)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("functions", [cross_entropy, loss_rows])
def test_a_share_of_minus_infinity_counts_as_nothing(functions: RowFunctions) -> None:
    """Which pads a vocabulary; a single such logit has no part in the expected one."""
    logits = torch.zeros(2, 9, device=DEVICE)
    logits[0] = -float("inf")
    logits[1, 4] = -float("inf")
    lse, picked, expected = functions.statistics(logits, torch.tensor([-1, 3], device=DEVICE), 0.0)
    assert lse.tolist() == [-float("inf"), pytest.approx(math.log(8))]
    assert picked.tolist() == [0.0, 0.0]
    assert expected.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("cap", [128.0, 1e3, 1e5, 1e7])
def test_a_wide_cap_loses_no_digits(cap: float) -> None:
    """Where tanh by the sigmoid is off by the rounding of the cap itself."""
    logits, column, weight = chunk(5, 1001, torch.float32)
    lse, picked, expected, gradient = truth(logits, column, weight, 0.0, cap)
    found = cross_entropy.statistics(logits, column, cap)
    torch.testing.assert_close(
        found.double(), torch.stack([lse, picked, expected]), rtol=2e-6, atol=2e-5
    )
    cross_entropy.loss_and_gradient_(logits, column, weight, 0.0, cap)
    torch.testing.assert_close(logits.double(), gradient, rtol=3e-5, atol=1e-8)


@pytest.mark.parametrize("cap", [0.0, 20.0])
def test_gradient_from_statistics_equals_the_one_of_pytorch(cap: float) -> None:
    logits, column, weight = chunk(5, 1001, torch.float32)
    lse = loss_rows.statistics(logits, column, cap)[0] + 0.5
    plain = logits.clone()
    arguments = (column, lse, weight, -weight.flip(0), weight.sqrt(), cap)
    cross_entropy.gradient_(logits, *arguments)
    loss_rows.gradient_(plain, *arguments)
    torch.testing.assert_close(logits, plain, rtol=1e-5, atol=1e-6)


def test_nothing_outside_the_logits_is_read_or_written() -> None:
    logits, column, weight = chunk(4, 63, torch.float32)
    buffer = logits._base
    assert buffer is not None
    cross_entropy.loss_and_gradient_(logits, column, weight, 0.0, 0.0)
    assert bool(logits.isfinite().all())
    assert bool(buffer[:4, 63:].isnan().all())
    assert bool(buffer[4].isnan().all())


@pytest.mark.skipif(DEVICE == "cuda", reason="4 GB that only a CPU leaves untouched")
def test_addresses_past_two_to_the_31_elements_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third row that starts 2^31 elements behind the first, in memory that is hardly touched."""
    # The interpreter would copy what it ran on back to where it came from: the same 4 GB.
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    columns, stride = 63, 2**30
    memory = torch.from_numpy(np.zeros(2 * stride + columns, np.float16))
    far = memory.as_strided((3, columns), (stride, 1))
    far[2] = torch.randn(columns, generator=torch.Generator().manual_seed(0))
    near, column, weight = far.clone(), torch.tensor([1, 2, 3]), torch.ones(3)
    found = cross_entropy.loss_and_gradient_(far, column, weight, 0.0, 0.0)
    wanted = cross_entropy.loss_and_gradient_(near, column, weight, 0.0, 0.0)
    assert torch.equal(found, wanted)
    assert torch.equal(far, near)
    assert far[2].count_nonzero() == columns


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits_give_finite_gradients(dtype: torch.dtype) -> None:
    logits, column, weight = chunk(6, 1001, dtype, spread=1e4)
    logits[0, 1:] = -float("inf")  # what fp16 overflows to
    logits[1, :900] = -float("inf")
    found = cross_entropy.loss_and_gradient_(logits, column.clamp(max=0), weight, 0.0, 0.0)
    assert bool(logits.isfinite().all())
    assert bool(found[0].isfinite().all())


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(40, 16, generator=generator).to(dtype).to(DEVICE).requires_grad_()
    weight = (torch.randn(301, 16, generator=generator) / 4).to(dtype).to(DEVICE).requires_grad_()
    labels = torch.randint(0, 301, (40,), generator=generator)
    labels[torch.rand(40, generator=generator) < 0.5] = IGNORE
    return hidden, weight, labels.to(DEVICE), torch.rand(40, generator=generator).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_loss_errs_no_more_than_in_pytorch(dtype: torch.dtype) -> None:
    hidden, weight, labels, token_weights = problem(dtype)

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
        total = linear_cross_entropy(
            *leaves, labels, token_weights_T=token_weights, denominator=7.5, z_loss=1e-3,
            softcap=5.0, chunk_bytes=301 * 4 * 9, backend=backend,  # type: ignore[arg-type]
        ).total  # fmt: skip
        total.backward()
        return [x.double() for x in (total.detach(), leaves[0].grad, leaves[1].grad)]  # type: ignore[union-attr]

    right, plain = run(torch.float64, "reference"), run(dtype, "torch")
    for ours, theirs, true in zip(run(dtype, "triton"), plain, right, strict=True):
        assert (ours - true).norm() <= 1.05 * (theirs - true).norm() + 2e-6 * true.norm()


def test_token_statistics_and_their_gradients_equal_those_of_pytorch() -> None:
    hidden, weight, labels, token_weights = problem(torch.float32)

    def run(backend: str) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
        nll, entropy = token_nll(*leaves, labels, softcap=5.0, backend=backend)  # type: ignore[arg-type]
        ((nll - 0.3 * entropy) * token_weights).sum().backward()
        return [nll.detach(), entropy.detach(), leaves[0].grad, leaves[1].grad]  # type: ignore[list-item]

    for ours, plain in zip(run("triton"), run("reference"), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_given_logits_lose_the_same() -> None:
    hidden, weight, labels, _ = problem(torch.float32)
    logits = (hidden @ weight.T).detach().requires_grad_()
    masked_cross_entropy(logits, labels, backend="triton").total.backward()
    (wanted,) = torch.autograd.grad(
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), logits
    )
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 4096, 9001])
def test_scaling_rounds_once(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    around = torch.randn(size + 2, generator=generator).to(dtype).to(DEVICE)
    before, factor = around.clone(), torch.tensor(1 / 3, device=DEVICE)
    cross_entropy.scale_(around[1:-1], factor)
    wanted = (before[1:-1].float() * factor).to(dtype)
    assert torch.equal(around[1:-1], wanted)
    assert torch.equal(around[[0, -1]], before[[0, -1]])


def test_scaling_by_one_touches_nothing() -> None:
    values = torch.full((5000,), torch.nan, device=DEVICE)
    before = values.clone()
    cross_entropy.scale_(values, torch.ones((), device=DEVICE))
    assert torch.equal(values.view(torch.int32), before.view(torch.int32))


def test_more_values_than_programs_at_once_are_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "PROGRAMS", 2)
    values = torch.ones(9 * cross_entropy.BLOCK + 5, device=DEVICE)
    cross_entropy.scale_(values, torch.tensor(2.0, device=DEVICE))
    assert (values == 2).all()


@pytest.mark.parametrize(
    ("dtype", "denominator", "late"),
    [(torch.bfloat16, 9.0, False), (torch.float16, 9.0, True), (torch.float16, None, False)],
)
def test_what_is_divided_late_is_no_single_product(
    dtype: torch.dtype, denominator: float | None, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(Plan, "use_room", lambda _, *sizes, late: asked.append((*sizes, late)))
    hidden, weight, labels, _ = problem(dtype)
    loss = linear_cross_entropy(hidden, weight, labels, denominator=denominator, backend="triton")
    assert asked == [(16, dtype, late)]
    loss.total.backward()
    token_nll(hidden, weight, labels, backend="triton").nll_T.sum().backward()
    assert asked == [(16, dtype, late), (16, dtype, False)]
    linear_cross_entropy(hidden, weight, labels, backend="torch").total.backward()
    assert len(asked) == 2  # PyTorch's rows take more memory than their logits
