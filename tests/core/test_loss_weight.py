"""The weight's gradient in bf16 on a CPU: one product, whatever part of it is computed again."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from hermes_core import loss_rows, loss_weight
from hermes_core.loss import linear_cross_entropy, token_nll
from hermes_core.loss_chunks import VECTOR, Plan

TOKENS, VOCABULARY, SIZE = 150, 1501, 56


def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(TOKENS, SIZE, generator=generator).bfloat16()
    weight = (torch.randn(VOCABULARY, SIZE, generator=generator) / 4).bfloat16()
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    labels[::5] = -100  # 120 are kept
    return hidden, weight, labels


def gradients(rows: int, **options: object) -> list[Tensor]:
    """Of hidden and weight, with so many rows of logits at a time."""
    hidden, weight, labels = problem()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    options["chunk_bytes"] = 2 * VOCABULARY * rows
    loss = linear_cross_entropy(*leaves, labels, **options)  # type: ignore[arg-type]
    return list(torch.autograd.grad(loss.total, leaves))


def assert_a_rounding_apart(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=float(b.abs().max()) * 2**-9)
        assert float((a != b).float().mean()) < 0.02


# 56 stored and 64; 31 computed again, 56 stored and 33; 57 again; nearly all that are not stored.
@pytest.mark.parametrize("rows", [64, 33, 7, 1])
@pytest.mark.parametrize(
    "options",
    [
        {"denominator": 120},
        {"z_loss": 1e-2, "token_weights_T": torch.linspace(0, 2, TOKENS)},
        {"softcap": 2.0, "z_loss": 1e-2, "denominator": 17.5},
    ],
)
def test_chunks_change_no_more_than_a_rounding(rows: int, options: dict[str, object]) -> None:
    assert_a_rounding_apart(gradients(rows, **options), gradients(120, **options))


@pytest.mark.parametrize("rows", [64, 33, 7, 1])
def test_tokens_change_no_more_than_a_rounding(rows: int) -> None:
    def found(rows: int) -> list[Tensor]:
        hidden, weight, labels = problem()
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        nll, entropy = token_nll(*leaves, labels, chunk_bytes=2 * VOCABULARY * rows)
        return list(torch.autograd.grad((2 * nll - entropy).sum(), leaves))

    assert_a_rounding_apart(found(rows), found(120))


def test_what_fits_into_the_gradient_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    again: list[int] = []
    gradient_ = loss_rows.gradient_

    def counted(logits_CV: Tensor, *rest: object) -> None:
        again.append(len(logits_CV))
        gradient_(logits_CV, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(loss_rows, "gradient_", counted)
    gradients(120)
    gradients(120 - SIZE)
    assert not again
    gradients(50)
    assert set(again) == {120 - 50 - SIZE}


def test_rows_of_unlike_tiles_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,501 ids in tiles of 64: the last one has 29."""
    wanted = gradients(120)
    monkeypatch.setattr(loss_weight, "TILE_BYTES", 1)
    assert_a_rounding_apart(gradients(33), wanted)


def test_products_of_widened_halves_are_a_rounding_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_weight, "WIDENED_TILE", 16)
    generator = torch.Generator().manual_seed(1)
    for rows, inner, columns in ((16, 16, 16), (1, 1, 1), (37, 50, 33), (0, 5, 3), (40, 0, 3)):
        for dtype in (torch.bfloat16, torch.float16):
            a = torch.randn(rows, inner, generator=generator).to(dtype)
            b = torch.randn(columns, inner, generator=generator).to(dtype).T
            wanted = (a.double() @ b.double()).to(dtype)
            out = torch.full((rows, columns), float("nan"), dtype=dtype)
            assert loss_weight.widened_product(a, b, out) is out
            torch.testing.assert_close(out, wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_the_same_whether_halves_are_widened(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> list[Tensor]:
        hidden, weight, labels = problem()
        leaves = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        loss = linear_cross_entropy(*leaves, labels, chunk_bytes=2 * VOCABULARY * 33)
        return list(torch.autograd.grad(loss.total, leaves))

    widened: list[torch.dtype] = []
    whole = loss_weight.widened_product

    def counted(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        widened.append(a.dtype)
        return whole(a, b, out)

    monkeypatch.setattr(loss_weight, "widened_product", counted)
    monkeypatch.setattr(loss_weight, "WIDENED", {dtype})
    monkeypatch.setattr(loss_weight, "WIDENED_TILE", 100)
    wanted = found()
    assert set(widened) == {dtype}
    widened.clear()
    monkeypatch.setattr(loss_weight, "WIDENED", set())
    assert_a_rounding_apart(found(), wanted)
    assert not widened


@pytest.mark.parametrize("by_onednn", [False, True])
def test_products_in_fp32_are_right_by_either_library(
    by_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_weight, "BY_ONEDNN", by_onednn)
    a, b = torch.randn(37, 50), torch.randn(33, 50).T
    out = torch.zeros(37, 33)
    found = loss_weight.product(a, b, out)
    torch.testing.assert_close(found, (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-5)
    assert (found is out) == (not by_onednn)  # oneDNN's operator makes its own


@pytest.mark.parametrize("by_onednn", [False, True])
def test_autocast_changes_no_product(by_onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_weight, "BY_ONEDNN", by_onednn)
    hidden, weight, labels = problem()
    leaves = hidden.float().requires_grad_(), weight.float().requires_grad_()
    wanted = torch.autograd.grad(linear_cross_entropy(*leaves, labels).total, leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(linear_cross_entropy(*leaves, labels).total, leaves)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def test_room_is_aligned_and_outlives_its_maker() -> None:
    like = torch.empty(0, dtype=torch.bfloat16)
    rooms = [loss_weight.room(rows, 3, like).fill_(rows) for rows in range(1, 200)]
    assert all(x.data_ptr() % 64 == 0 for x in rooms)
    assert all(bool((x == rows).all()) for rows, x in enumerate(rooms, 1))


def on_a_gpu(kept: int, dtype: torch.dtype, first: int, ids: int, largest: int) -> Plan:
    """Of a share of the vocabulary, 10 rows of logits at a time; on no CPU, so as on a GPU."""
    like = torch.empty(ids, SIZE, dtype=dtype, device="meta")
    labels = torch.empty(TOKENS, dtype=torch.int64, device="meta")
    room, shard = like.itemsize * largest * 10, [first, VOCABULARY, largest]
    return Plan(labels, labels[:kept], -100, room, shard, "", like)


ROW = (VOCABULARY + 2 * SIZE) / VOCABULARY  # with its hidden state and the gradient of that


@pytest.mark.parametrize(
    ("dtype", "late", "most"),
    [
        (torch.bfloat16, False, int((10 + 2 * SIZE) / ROW)),  # as one chunk
        (torch.float16, True, int((10 + SIZE) / ROW)),
        (torch.float32, False, 10),
    ],
)
def test_chunks_on_a_gpu_take_what_the_gradient_leaves_them(
    dtype: torch.dtype, late: bool, most: int
) -> None:
    for kept, chunks in ((most, 1), (most + 1, 2)):
        plan = on_a_gpu(kept, dtype, 0, VOCABULARY, VOCABULARY)
        assert len(plan.chunks()) == -(-kept // 10)
        plan.use_room(SIZE, dtype, late=late)
        assert len(plan.chunks()) == chunks


def test_ranks_with_shares_of_other_sizes_have_the_same_chunks() -> None:
    for kept in range(1, TOKENS):
        first, second = (on_a_gpu(kept, torch.bfloat16, *at, 751) for at in ((0, 751), (751, 750)))
        for plan in (first, second):
            plan.use_room(SIZE, torch.bfloat16, late=False)
        assert first.chunks() == second.chunks()


def test_rows_of_logits_start_at_whole_vectors_on_a_gpu() -> None:
    hidden, weight, labels = problem()
    plan = Plan(labels, None, -100, 2 * VOCABULARY * 50, [0, VOCABULARY, VOCABULARY], "", hidden)
    plan.on_cpu = False
    for at, hidden_CD, logits_CV in plan.logits(hidden, weight):
        assert logits_CV.stride(0) % VECTOR == 0
        assert torch.equal(logits_CV, loss_weight.product(hidden[plan.kept_M[at]], weight.T))
        assert len(hidden_CD) == len(logits_CV) > 0


def test_the_last_logits_are_gone_when_the_weights_gradient_is_rounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[weakref.ref[Tensor]] = []
    sum_ = loss_weight.SumOfProducts
    add, value = sum_.add, sum_.value

    def watched_add(self: object, at: slice, gradient_CV: Tensor, hidden_CD: Tensor) -> None:
        seen.append(weakref.ref(gradient_CV))
        add(self, at, gradient_CV, hidden_CD)  # type: ignore[arg-type]

    def watched_value(self: object) -> Tensor:
        assert seen
        assert all(logits() is None for logits in seen)
        return value(self)  # type: ignore[arg-type]

    monkeypatch.setattr(sum_, "add", watched_add)
    monkeypatch.setattr(sum_, "value", watched_value)
    hidden, weight, labels = (x.float() for x in problem())
    linear_cross_entropy(hidden, weight.requires_grad_(), labels.long(), chunk_bytes=10**5)
