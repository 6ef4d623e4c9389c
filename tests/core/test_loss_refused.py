"""What the masked loss refuses, in words, whichever backend would run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hermes_core.loss import Backend, linear_cross_entropy, masked_cross_entropy, token_nll
from hermes_core.loss_head import LossHead

IGNORE = -100
INF, NAN = float("inf"), float("nan")
BACKENDS = pytest.mark.parametrize("backend", ["torch", "reference"])


def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(9, 4, generator=generator).requires_grad_()
    weight = torch.randn(40, 4, generator=generator).requires_grad_()
    return hidden, weight, torch.randint(0, 40, (9,), generator=generator)


def totals(backend: Backend) -> list[Callable[..., Tensor]]:
    """A scalar of each function of hidden, weight and labels."""

    def masked(hidden: Tensor, weight: Tensor, labels: Tensor, **options: object) -> Tensor:
        logits = hidden @ weight.T
        return masked_cross_entropy(logits, labels, backend=backend, **options).total  # type: ignore[arg-type]

    return [
        lambda h, w, y, **o: linear_cross_entropy(h, w, y, backend=backend, **o).total,
        masked,
        lambda h, w, y, **o: token_nll(h, w, y, backend=backend, **o).nll_T.sum(),
    ]


def test_a_gradient_of_the_gradient_is_refused() -> None:
    hidden, weight, labels = problem()
    for total in totals("torch")[:2]:
        with pytest.raises(RuntimeError, match="the loss has no gradient of its gradient"):
            torch.autograd.grad(total(hidden.tanh(), weight, labels), hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="the loss has no gradient of its gradient"):
            torch.autograd.functional.hessian(lambda h, f=total: f(h, weight, labels), hidden)  # type: ignore[no-untyped-call]


def test_a_checkpointed_loss_has_its_gradient() -> None:
    hidden, weight, labels = problem()

    def total(hidden: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels).total

    wanted = torch.autograd.grad(total(hidden), hidden)[0]
    for reentrant in (False, True):
        leaf = hidden.detach().clone().requires_grad_()
        torch.utils.checkpoint.checkpoint(total, leaf, use_reentrant=reentrant).backward()
        torch.testing.assert_close(leaf.grad, wanted)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode_is_refused() -> None:
    hidden, weight, labels = (x.detach() for x in problem())
    for total, plain in zip(totals("torch"), totals("reference"), strict=True):
        with pytest.raises(RuntimeError, match="the loss has no forward-mode derivative"):
            torch.func.jvp(lambda h, f=total: f(h, weight, labels), (hidden,), (hidden,))
        torch.func.jvp(lambda h, f=plain: f(h, weight, labels), (hidden,), (hidden,))


@BACKENDS
@pytest.mark.parametrize("label", [40, 1000, -1])
def test_a_label_outside_the_vocabulary_is_named(label: int, backend: Backend) -> None:
    hidden, weight, labels = problem()
    labels[6] = label
    for total in totals(backend):
        with pytest.raises(ValueError, match=rf"labels\[6\] is {label}, outside \[0, 40\)"):
            total(hidden, weight, labels)


@BACKENDS
def test_ignore_index_may_be_any_number(backend: Backend) -> None:
    hidden, weight, labels = problem()
    labels[6] = 40
    for total, usual in zip(totals(backend), totals("torch"), strict=True):
        wanted = usual(hidden, weight, labels.masked_fill(labels == 40, IGNORE))
        torch.testing.assert_close(total(hidden, weight, labels, ignore_index=40), wanted)


@BACKENDS
@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([5, 2, 7], r"kept\[1\] is 2 after 5; kept must rise"),
        ([2, 2, 5], r"kept\[1\] is 2 after 2; kept must rise"),
        ([-1], r"kept\[0\] is -1, outside \[0, 9\)"),
        ([1, 9], r"kept\[1\] is 9, outside \[0, 9\)"),
        ([1, 3], r"kept\[1\] is 3, whose label is ignore_index 7"),
    ],
)
def test_kept_that_is_wrong_is_named(kept: list[int], message: str, backend: Backend) -> None:
    hidden, weight, labels = problem()
    labels[3] = 7
    labels[1] = 8
    for total in totals(backend):
        with pytest.raises(ValueError, match=message):
            total(hidden, weight, labels, kept=torch.tensor(kept), ignore_index=7)


@BACKENDS
def test_what_is_not_a_number_at_a_masked_position_does_not_matter(backend: Backend) -> None:
    hidden, weight, labels = problem()
    labels[2] = IGNORE
    poisoned = hidden.detach().clone()
    poisoned[2] = NAN
    poisoned.requires_grad_()
    for total in totals(backend):
        found = torch.autograd.grad(total(poisoned, weight.detach(), labels), poisoned)[0]
        assert bool(found.isfinite().all())
        assert not found[2].any()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"chunk_bytes": 1e9}, TypeError, "chunk_bytes must be an int, got 1000000000.0"),
        ({"softcap": INF}, ValueError, "softcap must be finite and at least 0, got inf"),
        ({"softcap": NAN}, ValueError, "softcap must be finite and at least 0, got nan"),
        ({"softcap": -5.0}, ValueError, r"softcap must be finite and at least 0, got -5\.0"),
        ({"z_loss": NAN}, ValueError, "z_loss must be finite, got nan"),
        (
            {"token_weights_T": torch.ones(9) * 1j},
            TypeError,
            r"token_weights must be real, got torch\.complex64",
        ),
        (
            {"denominator": torch.tensor(3.0, requires_grad=True)},
            ValueError,
            "denominator requires a gradient",
        ),
        ({"denominator": torch.ones(2, 1)}, ValueError, r"one number, got \(2, 1\)"),
    ],
)
@BACKENDS
def test_options_outside_their_range_are_named(
    options: dict[str, object], error: type[Exception], message: str, backend: Backend
) -> None:
    for total in totals(backend)[:2]:
        with pytest.raises(error, match=message):
            total(*problem(), **options)


@BACKENDS
def test_a_model_of_no_width_is_refused(backend: Backend) -> None:
    hidden, weight, labels = problem()
    with pytest.raises(ValueError, match="hidden and weight have D 0"):
        linear_cross_entropy(hidden[:, :0], weight[:, :0], labels, backend=backend)


def test_the_head_refuses_labels_of_another_shape() -> None:
    hidden, _, labels = problem()
    head = LossHead(4, 40)
    with pytest.raises(ValueError, match=r"labels is \(4, 2\) but hidden is \(2, 4, 4\)"):
        head(hidden[:8].view(2, 4, 4), labels[:8].view(4, 2))
    with pytest.raises(ValueError, match=r"hidden must be \[\.\.\., tokens, D\], got \(4,\)"):
        head(hidden[0], labels[0])
