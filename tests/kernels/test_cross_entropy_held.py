"""The loss's kernel that holds a row in shared memory, in the simulator, against PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hermes_core import loss_rows
from hermes_kernels.cross_entropy_held import HELD_BYTES, constants
from twins import held_rows
from twins.gluon_machine import TOO_EARLY, Fault
from twins.simulated import Sources, replaced

STEP = held_rows.THREADS * held_rows.WIDE  # columns of a block


def chunk(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Logits, targets of which some are elsewhere, and weights."""
    generator = torch.Generator().manual_seed(rows + columns)
    logits = (3 * torch.randn(rows, columns, generator=generator)).to(dtype)
    column = torch.randint(0, columns, (rows,), generator=generator)
    column[::3] = -1
    return [logits, column, torch.rand(rows, generator=generator)]


def assert_right(given: list[Tensor], z: float = 0.0, cap: float = 0.0, **options: int) -> None:
    plain = given[0].clone()
    wanted = loss_rows.loss_and_gradient_(plain, *given[1:], z, cap)
    found = held_rows.loss_and_gradient_(*given, z, cap, **options)  # type: ignore[misc, arg-type]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(given[0], plain, rtol=2**-7, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("z", "cap"), [(0.0, 0.0), (1e-3, 20.0)])
@pytest.mark.parametrize(
    ("columns", "held", "ahead"),
    [
        (STEP, 1, 8),  # fewer blocks than are copied ahead
        (3 * STEP, 3, 1),
        (5 * STEP + 1, 5, 2),  # one column that is not held
        (9 * STEP - 1, 4, 3),  # several blocks that are not
    ],
)
def test_rows_held_equal_those_of_pytorch(
    columns: int, held: int, ahead: int, z: float, cap: float, dtype: torch.dtype
) -> None:
    assert_right(chunk(4, columns, dtype), z, cap, held=held, ahead=ahead)


@pytest.mark.parametrize("cap", [128.0, 1e5])
def test_a_wide_cap_loses_no_digits(cap: float) -> None:
    assert_right(chunk(4, 3 * STEP + 9), cap=cap, held=3)


@pytest.mark.parametrize("seed", range(5))
def test_copies_may_end_in_any_order(seed: int) -> None:
    assert_right(chunk(2, 7 * STEP + 5), held=7, ahead=4, seed=seed)


@pytest.mark.parametrize("offset", [1000.0, -3000.0])
def test_a_large_offset_of_all_logits_changes_no_sum(offset: float) -> None:
    """Over 60 blocks; fp32 rounds a log-sum-exp of 3,000 by 1.2e-4."""
    logits, column, weight = chunk(2, 60 * STEP, torch.float16)
    logits += offset
    right = logits.double().logsumexp(1)
    p = (logits.double() - right[:, None]).exp()
    found = held_rows.loss_and_gradient_(logits, column.fill_(-1), weight, 0.0, 0.0, held=50)
    torch.testing.assert_close(found[0].double(), right, rtol=1.5e-7, atol=0)
    torch.testing.assert_close(logits.double(), p * weight[:, None], rtol=2e-3, atol=1e-7)


def test_extreme_logits_lose_finitely() -> None:
    given = chunk(4, 3 * STEP + 9)
    given[0][0, 1:] = -float("inf")
    given[0][1, : 3 * STEP] = -float("inf")
    given[0][2] *= 1e4
    given[1].fill_(0)
    found = held_rows.loss_and_gradient_(*given, 0.0, 0.0, held=3)  # type: ignore[misc, arg-type]
    assert found[0].isfinite().all()
    assert given[0].isfinite().all()


@pytest.mark.parametrize("columns", [8_192, 32_001, 55_296, 55_297, 65_537, 128_256, 262_208])
def test_what_is_held_of_a_row_fits(columns: int) -> None:
    of_row = constants(columns)
    block = of_row["THREADS"] * held_rows.WIDE
    assert of_row["HELD"] >= 2
    assert of_row["HELD"] * block <= columns
    assert 2 * of_row["HELD"] * block <= HELD_BYTES
    rest = columns - of_row["HELD"] * block
    assert rest < block or 2 * (of_row["HELD"] + 1) * block > HELD_BYTES


DEFECTS = {
    "read before it is copied": ("wait_group(AHEAD - 1)", "wait_group(AHEAD)"),
    "not waited for": ("async_copy.wait_group(AHEAD - 1)", "pass"),
    "no group ahead": ("        async_copy.commit_group()\n    target", "    target"),
    "a block twice": ("row + (i + AHEAD) * STEP", "row + i * STEP"),
    "a block not copied": ("if i + AHEAD < HELD:", "if i + AHEAD < HELD - 1:"),
    "rest not summed": ("range(HELD * STEP, size, STEP):\n        inside = start + at < size\n"
                        "        z = gl.load(row + start + at, mask=inside, other=-",
                        "range(size, size, STEP):\n        inside = start + at < size\n"
                        "        z = gl.load(row + start + at, mask=inside, other=-"),
    "threads' sums not joined": ("sums * gl.exp2(top - largest)", "sums"),
    "a sum that does not shrink": ("sums * gl.exp2(top - risen) + part", "sums + part"),
    "the end is a logit": ("other=-float(\"inf\")).to", "other=0.0).to"),
    "no slope": ("gradient *= 1 - bent * bent", "pass"),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_deliberate_defect_is_found(defect: str) -> None:
    sources = replaced(held_rows.SOURCES, DEFECTS[defect])
    given = chunk(3, 6 * STEP + 3)
    plain = given[0].clone()
    wanted = loss_rows.loss_and_gradient_(plain, *given[1:], 0.0, 3.0)
    what = outcome(given, sources)
    if isinstance(what, Fault):
        assert any(word in str(what) for word in TOO_EARLY.split("|")), what
    else:
        near = torch.allclose(what, wanted, rtol=1e-5, atol=1e-5)
        assert not (near and torch.allclose(given[0], plain, rtol=2**-7, atol=2e-6))


def outcome(given: list[Tensor], sources: Sources) -> Tensor | Fault:
    """What the kernel finds, or what hardware would punish it for."""
    try:
        return held_rows.loss_and_gradient_(*given, 0.0, 3.0, held=5, sources=sources)  # type: ignore[misc, arg-type]
    except Fault as fault:
        return fault
