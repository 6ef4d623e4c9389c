"""The masked loss: against the plain twin in float64, and what it must never do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hermes_core.loss import Loss, linear_cross_entropy, masked_cross_entropy, token_nll
from hermes_core.loss_head import LossHead

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_bytes", [501 * 4 * 20, 2**30])
def test_weights_z_loss_and_soft_cap_are_in_the_gradient(
    dtype: torch.dtype, chunk_bytes: int
) -> None:
    hidden, weight, labels = problem(120, 501, 32, 0.6, dtype)
    options = {
        "token_weights_T": torch.rand(120, generator=torch.Generator().manual_seed(2)),
        "denominator": 17.5, "z_loss": 1e-2, "softcap": 3.0,
    }  # fmt: skip
    right = run(hidden.double(), weight.double(), labels, backend="reference", **options)
    plain = run(hidden, weight, labels, backend="reference", **options)
    ours = run(hidden, weight, labels, chunk_bytes=chunk_bytes, **options)
    for mine, theirs, true in zip(ours, plain, right, strict=True):
        error = (mine.double() - true).norm() / true.norm()
        assert error <= 1.1 * (theirs.double() - true).norm() / true.norm() + 1e-3


def test_sums_and_token_count_add_up() -> None:
    hidden, weight, labels = problem(50, 70, 8, 0.5)
    loss = linear_cross_entropy(hidden, weight, labels, z_loss=1e-2, denominator=10)
    assert float(loss.tokens) == int((labels != IGNORE).sum())
    torch.testing.assert_close(loss.total, (loss.nll_sum + loss.z_sum) / 10)
    plain = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(loss.nll_sum, plain.nll_sum)
    assert not loss.nll_sum.requires_grad


def test_weight_zero_is_the_same_as_not_kept() -> None:
    hidden, weight, labels = problem(50, 70, 8, 1.0)
    zero = torch.arange(50) % 2
    masked = torch.where(zero == 0, IGNORE, labels)
    ours = run(hidden, weight, labels, token_weights_T=zero.float())
    for a, b in zip(ours, run(hidden, weight, masked), strict=True):
        torch.testing.assert_close(a, b)


def test_a_shared_denominator_makes_any_split_the_same() -> None:
    hidden, weight, labels = problem(96, 40, 8, 0.5)
    kept = torch.tensor(float((labels != IGNORE).sum()))
    whole = run(hidden, weight, labels, denominator=kept)
    cuts = [slice(0, 10), slice(10, 11), slice(11, 96)]
    parts = [run(hidden[c], weight, labels[c], denominator=kept) for c in cuts]
    torch.testing.assert_close(sum(p[0] for p in parts), whole[0])
    torch.testing.assert_close(sum(p[2] for p in parts), whole[2])
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), whole[1])


@pytest.mark.parametrize("scale", [0.02, 0.3])
def test_weight_gradient_is_as_good_as_summed_in_fp32(scale: float) -> None:
    """And better than Liger's default, which adds up chunks in bf16."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 64, generator=generator).bfloat16()
    weight = (scale * torch.randn(2000, 64, generator=generator)).bfloat16()
    labels = torch.randint(0, 2000, (512,), generator=generator)
    right = run(hidden.double(), weight.double(), labels, backend="reference")[2]

    d_logits = (hidden @ weight.T).float().softmax(1)
    d_logits[torch.arange(512), labels] -= 1
    d_logits = (d_logits / 3).bfloat16()
    summed = (d_logits.float().T @ hidden.float()).bfloat16()
    liger = torch.zeros_like(weight)
    for g, h in zip(d_logits.split(32), hidden.split(32), strict=True):
        liger += g.T @ h

    def error(found: Tensor) -> float:
        return float((found.double() - right).norm())

    for chunks in (1, 2, 16):
        options = {"chunk_bytes": 2 * 2000 * 512 // chunks, "denominator": 3}
        leaf = weight.clone().requires_grad_()
        linear_cross_entropy(hidden, leaf, labels, **options).total.backward()  # type: ignore[arg-type]
        assert leaf.grad is not None
        assert error(leaf.grad) <= 1.1 * error(summed)
        assert error(leaf.grad) < error(liger)


@pytest.mark.parametrize("vocabulary", [128_256, 151_936, 50_257])
def test_real_vocabularies(vocabulary: int) -> None:
    hidden, weight, labels = problem(9, vocabulary, 4, 0.7)
    labels[-1] = vocabulary - 1
    wanted = run(hidden.double(), weight.double(), labels, backend="reference")
    for mine, right in zip(run(hidden, weight, labels), wanted, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(dtype: torch.dtype) -> None:
    hidden, weight, labels = problem(30, 101, 8, 0.8, dtype)
    loss, d_hidden, d_weight = run(100 * hidden, 100 * weight, labels)
    assert bool(loss.isfinite())
    assert bool(d_hidden.isfinite().all())
    assert bool(d_weight.isfinite().all())
    wanted = run(100 * hidden.double(), 100 * weight.double(), labels, backend="reference")[0]
    torch.testing.assert_close(loss.double(), wanted, rtol=2e-2, atol=0)


@pytest.mark.parametrize("chunk_bytes", [40 * 8 * 7, 2**30])
def test_token_statistics_pass_gradcheck(chunk_bytes: int) -> None:
    hidden, weight, labels = problem(16, 40, 4, 0.6)

    def statistics(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return token_nll(h, w, labels, softcap=2.0, chunk_bytes=chunk_bytes)

    torch.autograd.gradcheck(statistics, (hidden.double(), weight.double()))


def test_token_statistics_are_those_of_the_distribution() -> None:
    hidden, weight, labels = (x.detach() for x in problem(50, 70, 8, 0.5))
    nll, entropy = token_nll(hidden, weight, labels)
    kept = labels != IGNORE
    of = torch.distributions.Categorical(logits=(hidden @ weight.T)[kept])
    torch.testing.assert_close(nll[kept], -of.log_prob(labels[kept]))  # type: ignore[no-untyped-call]
    torch.testing.assert_close(entropy[kept], of.entropy())  # type: ignore[no-untyped-call]
    assert not nll[~kept].any()
    assert not entropy[~kept].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_given_logits_lose_the_same(dtype: torch.dtype) -> None:
    hidden, weight, labels = problem(60, 101, 8, 0.5)
    logits = (hidden @ weight.T).detach().to(dtype).requires_grad_()
    options = {"z_loss": 1e-2, "softcap": 3.0, "denominator": 12, "chunk_bytes": 101 * 4 * 9}
    masked_cross_entropy(logits, labels, **options).total.backward()  # type: ignore[arg-type]
    wide = logits.detach().double().requires_grad_()
    masked_cross_entropy(wide, labels, backend="reference", **options).total.backward()  # type: ignore[arg-type]
    assert logits.grad is not None
    assert wide.grad is not None
    rtol = {torch.float32: 1e-4, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=rtol, atol=1e-6)


def test_the_head_gives_the_loss_of_any_leading_shape() -> None:
    hidden, _, labels = problem(60, 101, 8, 0.5)
    head = LossHead(8, 101)
    shaped = head(hidden.view(3, 20, 8), labels.view(3, 20), denominator=5)
    flat = linear_cross_entropy(hidden, head.weight, labels, denominator=5)
    assert isinstance(shaped, Loss)
    torch.testing.assert_close(shaped.total, flat.total)


def test_the_head_refuses_a_share_of_its_vocabulary() -> None:
    hidden, _, labels = problem(60, 100, 8, 0.5)
    head = LossHead(8, 100)
    head.weight = torch.nn.Parameter(head.weight[:50].detach())
    with pytest.raises(ValueError, match="50 rows here and 50 over the group"):
        head(hidden, labels % 50)


def test_options_that_make_no_sense_are_refused() -> None:
    hidden, weight, labels = problem(9, 40, 4, 1.0)
    with pytest.raises(ValueError, match=r"token_weights is \(8,\) but labels is \(9,\)"):
        linear_cross_entropy(hidden, weight, labels, token_weights_T=torch.ones(8))
    with pytest.raises(ValueError, match="denominator must not be negative, got -1"):
        linear_cross_entropy(hidden, weight, labels, denominator=-1)
    with pytest.raises(ValueError, match=r"denominator must be one number, got \(2,\)"):
        linear_cross_entropy(hidden, weight, labels, denominator=torch.ones(2))
    with pytest.raises(TypeError, match=r"kept must be \[M\] int64, got \(9,\) torch.bool"):
        linear_cross_entropy(hidden, weight, labels, kept=labels > 0)
    with pytest.raises(ValueError, match=r"logits must be .* got \(9, 4\) and \(8,\)"):
        masked_cross_entropy(hidden, labels[1:])
    with pytest.raises(ValueError, match="token_weights requires a gradient"):
        linear_cross_entropy(
            hidden, weight, labels, token_weights_T=torch.ones(9, requires_grad=True)
        )


@pytest.mark.parametrize("denominator", [0, torch.tensor(0)])
def test_a_batch_without_kept_tokens_has_the_loss_0(denominator: Any) -> None:
    hidden, weight, labels = problem(9, 40, 4, 1.0)
    nothing = torch.full_like(labels, -100)
    loss = linear_cross_entropy(hidden, weight, nothing, denominator=denominator)
    assert loss.total == 0


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_weights_of_tokens_that_do_not_count_may_be_anything(backend: Any) -> None:
    hidden, weight, labels = problem(9, 40, 4, 1.0)
    labels[::2] = -100
    weights = torch.rand(9)
    right = linear_cross_entropy(hidden, weight, labels, token_weights_T=weights, backend=backend)
    weights[0], weights[2] = torch.nan, torch.inf
    loss = linear_cross_entropy(hidden, weight, labels, token_weights_T=weights, backend=backend)
    assert loss.total == right.total
