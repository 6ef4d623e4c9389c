"""The loss as operators: what PyTorch checks of them, and that the compiler takes them whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hermes_core.loss import linear_cross_entropy, masked_cross_entropy, token_nll
from hermes_core.loss_chunks import linear_op
from hermes_core.loss_tokens import masked_op, tokens_backward_op, tokens_op

IGNORE = -100


def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(12, 8, generator=generator).requires_grad_()
    weight = torch.randn(33, 8, generator=generator).requires_grad_()
    labels = torch.randint(0, 33, (12,), generator=generator)
    labels[::3] = IGNORE
    return hidden, weight, labels


OPTIONS = (1e-3, 5.0, IGNORE, 33 * 4 * 5, "torch", [0, 33, 33], "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pytorch_finds_no_fault_in_the_loss(dtype: torch.dtype) -> None:
    hidden, weight, labels = problem()
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
    arguments = (hidden, weight, labels, None, torch.rand(12), torch.tensor(5.0), *OPTIONS)
    torch.library.opcheck(linear_op, (*arguments, True, True))


def test_pytorch_finds_no_fault_in_the_loss_of_logits() -> None:
    hidden, weight, labels = problem()
    logits = (hidden @ weight.T).detach().requires_grad_()
    torch.library.opcheck(masked_op, (logits, labels, None, None, None, *OPTIONS, True))


def test_pytorch_finds_no_fault_in_the_statistics() -> None:
    torch.library.opcheck(tokens_op, (*problem(), None, *OPTIONS[1:]))


@pytest.mark.parametrize("labels", ["some", "none"])
def test_gradients_lie_where_the_compiler_is_told(labels: str) -> None:
    """A weight that lies by columns has a gradient that lies by rows."""
    hidden, weight, labels_T = (x.detach() for x in problem())
    weight = weight.T.contiguous().T
    if labels == "none":
        labels_T.fill_(IGNORE)
    given = (hidden, weight, labels_T, None)
    options = (None, None, *OPTIONS, True, True)
    vectors = [torch.ones(12) for _ in range(4)]
    real = [*linear_op(*given, *options), *tokens_backward_op(*given, *OPTIONS[1:], *vectors)]
    with FakeTensorMode() as mode:
        given = tuple(x if x is None else mode.from_tensor(x) for x in given)  # type: ignore[misc]
        vectors = [mode.from_tensor(x) for x in vectors]
        fake = [*linear_op(*given, *options), *tokens_backward_op(*given, *OPTIONS[1:], *vectors)]
    assert [x.stride() for x in real] == [x.stride() for x in fake]
    assert [x.shape for x in real] == [x.shape for x in fake]


def total(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy(hidden.tanh(), weight * 2, labels, denominator=8).total * 3


def of_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return masked_cross_entropy(hidden @ weight.T, labels, softcap=4.0).total


def of_tokens(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    nll, entropy = token_nll(hidden.tanh(), weight, labels)
    return (nll * 2 - entropy).sum()


@pytest.mark.parametrize("call", [total, of_logits, of_tokens])
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_compiler_takes_it_without_a_break(call, dynamic: bool) -> None:  # type: ignore[no-untyped-def]
    plain, compiled = problem(), problem()
    wanted = call(*plain)
    wanted.backward()
    found = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)(*compiled)
    found.backward()
    torch.testing.assert_close(found, wanted)
    for a, b in zip(compiled[:2], plain[:2], strict=True):
        torch.testing.assert_close(a.grad, b.grad)
