"""The masked loss: against the plain twin in float64, and what it must never do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hermes_core.loss import linear_cross_entropy

IGNORE = -100


def problem(
    tokens: int, vocabulary: int, size: int, share: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens + vocabulary)
    hidden = torch.randn(tokens, size, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, size, generator=generator) / 4).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) >= share] = IGNORE
    return hidden, weight, labels


def run(
    hidden: Tensor, weight: Tensor, labels: Tensor, **options: object
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, labels, **options).total  # type: ignore[arg-type]
    (loss / 3).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize(
    ("tokens", "vocabulary", "size"), [(1, 2, 3), (63, 1001, 16), (100, 33, 8)]
)
def test_equals_the_plain_twin(tokens: int, vocabulary: int, size: int, share: float) -> None:
    hidden, weight, labels = problem(tokens, vocabulary, size, share)
    wanted = run(hidden.double(), weight.double(), labels, backend="reference")
    for chunk_bytes in (1, 4 * vocabulary * 7, 2**28):
        ours = run(hidden, weight, labels, chunk_bytes=chunk_bytes)
        for mine, right in zip(ours, wanted, strict=True):
            torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=1e-5)


def test_reference_equals_the_formula_of_torch() -> None:
    hidden, weight, labels = (x.detach() for x in problem(50, 70, 8, 0.5))
    wanted = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    ours = linear_cross_entropy(hidden, weight, labels, backend="reference").total
    torch.testing.assert_close(ours, wanted)


def test_one_kept_token_by_hand() -> None:
    hidden, weight = torch.tensor([[2.0], [5.0]]), torch.tensor([[0.5], [0.0]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, IGNORE]))
    assert float(loss.total) == pytest.approx(0.31326169)  # log(1 + exp(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_the_plain_computation(dtype: torch.dtype) -> None:
    hidden, weight, labels = problem(120, 501, 32, 0.6, dtype)
    right = run(hidden.double(), weight.double(), labels, backend="reference")
    plain = run(hidden, weight, labels, backend="reference")
    for ours, theirs, true in zip(run(hidden, weight, labels), plain, right, strict=True):
        error = (ours.double() - true).norm() / true.norm()
        assert error <= 1.1 * (theirs.double() - true).norm() / true.norm() + 1e-3


def test_kept_indices_given_or_found_are_the_same() -> None:
    hidden, weight, labels = problem(90, 40, 8, 0.4)
    found = run(hidden, weight, labels)
    given = run(hidden, weight, labels, kept=(labels != IGNORE).nonzero().squeeze(1))
    assert all(torch.equal(a, b) for a, b in zip(found, given, strict=True))


def test_gradient_is_zero_where_no_token_is_kept() -> None:
    hidden, weight, labels = problem(90, 40, 8, 0.4)
    _, d_hidden, _ = run(hidden, weight, labels)
    assert torch.equal(d_hidden[labels == IGNORE], torch.zeros_like(d_hidden[labels == IGNORE]))
    assert (d_hidden[labels != IGNORE].abs().sum(1) > 0).all()


def test_what_stands_at_masked_positions_does_not_matter() -> None:
    hidden, weight, labels = problem(90, 40, 8, 0.4)
    poisoned = hidden.detach().clone()
    poisoned[labels == IGNORE] = float("nan")
    clean, dirty = run(hidden, weight, labels), run(poisoned, weight, labels)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


def test_no_kept_token_is_zero_and_still_connected() -> None:
    hidden, weight, labels = problem(20, 40, 8, 0.0)
    loss, d_hidden, d_weight = run(hidden, weight, labels)
    assert float(loss) == 0
    assert d_hidden.abs().max() == 0
    assert d_weight.abs().max() == 0


def test_micro_batches_add_up_to_the_batch() -> None:
    hidden, weight, labels = problem(96, 40, 8, 0.5)
    whole = run(hidden, weight, labels)
    parts = [run(hidden[i : i + 32], weight, labels[i : i + 32]) for i in (0, 32, 64)]
    torch.testing.assert_close(sum(p[0] for p in parts), whole[0])
    torch.testing.assert_close(sum(p[2] for p in parts), whole[2])


def rows_of_logits(call: Callable[[], Tensor], vocabulary: int) -> int:
    """The most rows of a matrix as wide as the vocabulary that any operator was given."""
    with torch.profiler.profile(record_shapes=True) as profile:
        call().backward()
    shapes = [shape for event in profile.events() for shape in event.input_shapes]
    return max(shape[0] for shape in shapes if len(shape) == 2 and shape[1] == vocabulary)


def test_no_logit_of_a_masked_position_is_computed() -> None:
    problem_ = hidden, weight, labels = problem(200, 301, 8, 0.2)
    kept = int((labels != IGNORE).sum())
    whole = rows_of_logits(lambda: linear_cross_entropy(*problem_).total, 301)
    assert whole == kept
    less = 4 * 301 * 15  # bytes: 15 rows at most, and chunks are even
    cut = rows_of_logits(lambda: linear_cross_entropy(*problem_, chunk_bytes=less).total, 301)
    assert cut == 14 < kept
    plain = linear_cross_entropy(hidden, weight, labels, backend="reference")
    assert rows_of_logits(lambda: plain.total, 301) == 200  # the check can fail


def test_without_gradients_none_is_computed() -> None:
    hidden, weight, labels = problem(90, 40, 8, 0.4)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels).total.requires_grad
    frozen = linear_cross_entropy(hidden, weight.detach(), labels)
    frozen.total.backward()
    assert weight.grad is None


def test_a_second_backward_is_refused_in_words() -> None:
    loss = linear_cross_entropy(*problem(9, 7, 4, 1.0)).total
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass only"):
        loss.backward()


def test_a_share_of_the_vocabulary_never_passes_for_the_whole() -> None:
    hidden, weight, labels = problem(9, 40, 4, 1.0)
    with pytest.raises(
        ValueError, match="20 rows here and 20 over the group, but vocab_size is 40"
    ):
        linear_cross_entropy(hidden, weight[:20], labels % 20, vocab_size=40)


@pytest.mark.parametrize("label", [40, 1000, -1])
def test_a_label_outside_the_vocabulary_is_named(label: int) -> None:
    hidden, weight, labels = problem(9, 40, 4, 1.0)
    labels[6] = label
    with pytest.raises(ValueError, match=rf"labels\[6\] is {label}, outside \[0, 40\)"):
        linear_cross_entropy(hidden, weight, labels)


def test_arguments_that_disagree_are_refused() -> None:
    hidden, weight, labels = problem(9, 40, 4, 1.0)
    with pytest.raises(ValueError, match="labels is"):
        linear_cross_entropy(hidden, weight, labels[:-1])
    with pytest.raises(TypeError, match="labels must be int64"):
        linear_cross_entropy(hidden, weight, labels.int())
    with pytest.raises(ValueError, match=r"hidden must be .* got \(9, 4\) and \(40, 3\)"):
        linear_cross_entropy(hidden, weight[:, :3], labels)
    with pytest.raises(ValueError, match=r"hidden is torch\.float32 but weight is torch\.bfloat16"):
        linear_cross_entropy(hidden, weight.bfloat16(), labels)
    with pytest.raises(ValueError, match="chunk_bytes must be at least 1"):
        linear_cross_entropy(hidden, weight, labels, chunk_bytes=0)
