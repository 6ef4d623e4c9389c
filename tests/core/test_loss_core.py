"""The compiled rows of the loss: near float64, and themselves on every instruction set.

NumPy alone, so that it runs under the sanitizers too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hermes_core import _C

Array = NDArray[Any]
COLUMNS = [1, 3, 15, 16, 17, 63, 64, 200, 1023, 1025, 5000]  # around vectors and pieces
ROUNDING = {"float32": 2e-6, "float16": 2**-10, "bfloat16": 2**-7}
ROWS = 7


def stored(values: Array, dtype: str) -> Array:
    """As PyTorch keeps them: half precision as bits."""
    if dtype == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return values.astype(dtype).view(np.uint16 if dtype == "float16" else np.float32)


def read(values: Array, dtype: str) -> Array:
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values.view(dtype).astype(np.float64)


def given(columns: int, dtype: str = "float32", offset: float = 0.0) -> dict[str, Any]:
    """Logits in a wider buffer of NaN, targets of which some are elsewhere, numbers of rows."""
    random = np.random.default_rng(columns)
    buffer = np.full((ROWS, columns + 3), np.nan)
    buffer[:, :columns] = offset + 3 * random.standard_normal((ROWS, columns))
    column = random.integers(0, columns, ROWS)
    column[::3] = -1
    weight, scale, tilt = (random.random(ROWS).astype(np.float32) for _ in range(3))
    logits = stored(buffer, dtype)
    return {"buffer": logits, "logits": logits[:, :columns], "column": column, "weight": weight,
            "scale": scale, "tilt": -tilt, "dtype": dtype}  # fmt: skip


def statistics(case: dict[str, Any], threads: int = 1) -> Array:
    found = np.full((3, ROWS), np.nan, np.float32)
    _C.find_statistics(case["logits"], case["column"], *found, dtype=case["dtype"], threads=threads)
    return found


def differentiate(case: dict[str, Any], threads: int = 1, z_loss: float = 1e-3) -> Array:
    found = np.full((2, ROWS), np.nan, np.float32)
    _C.differentiate_loss(
        case["logits"], case["column"], case["weight"], *found, z_loss=z_loss,
        dtype=case["dtype"], threads=threads,
    )  # fmt: skip
    return found


def differentiate_rows(case: dict[str, Any], lse: Array, *, tilts: bool, threads: int = 1) -> None:
    _C.differentiate_rows(
        case["logits"], case["column"], lse, case["scale"], case["tilt"] if tilts else None,
        case["weight"], dtype=case["dtype"], threads=threads,
    )  # fmt: skip


def truth(case: dict[str, Any]) -> tuple[Array, Array, Array]:
    """lse, target and expected logit; probabilities; ones at the targets."""
    x = read(case["logits"], case["dtype"])
    top = x.max(1, keepdims=True)
    lse = top[:, 0] + np.log(np.exp(x - top).sum(1))
    p = np.exp(x - lse[:, None])
    one = np.zeros_like(x)
    here = case["column"] >= 0
    one[here, case["column"][here]] = 1
    return np.stack([lse, (x * one).sum(1), (x * p).sum(1)]), p, one


def assert_near(case: dict[str, Any], wanted: Array) -> None:
    found, rounding = read(case["logits"], case["dtype"]), ROUNDING[case["dtype"]]
    np.testing.assert_allclose(found, wanted, rtol=rounding, atol=1e-6)
    beyond = read(case["buffer"], case["dtype"])[:, wanted.shape[1] :]
    assert np.isnan(beyond).all()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("columns", COLUMNS)
def test_rows_are_near_float64(columns: int, dtype: str) -> None:
    case = given(columns, dtype)
    found, p, one = truth(case)
    before = case["buffer"].copy()
    np.testing.assert_allclose(statistics(case), found, rtol=5e-6, atol=5e-6)
    assert case["buffer"].tobytes() == before.tobytes()
    lse = (found[0] + 0.3).astype(np.float32)
    for tilts in (False, True):
        case["buffer"][:] = before
        differentiate_rows(case, lse, tilts=tilts)
        log_p = np.log(p) + (found[0] - lse)[:, None]
        factor = case["scale"][:, None] + tilts * case["tilt"][:, None] * log_p
        assert_near(case, np.exp(log_p) * factor - case["weight"][:, None] * one)
    case["buffer"][:] = before
    np.testing.assert_allclose(differentiate(case), found[:2], rtol=5e-6, atol=5e-6)
    weight = case["weight"][:, None]
    assert_near(case, weight * ((1 + 2e-3 * found[0])[:, None] * p - one))


@pytest.mark.parametrize("dtype", ROUNDING)
def test_threads_change_no_bit(dtype: str) -> None:
    cases = [given(70_000, dtype) for _ in range(2)]
    outs = [[statistics(case, threads)] for case, threads in zip(cases, (1, 3), strict=True)]
    for case, out, threads in zip(cases, outs, (1, 3), strict=True):
        out.append(differentiate(case, threads))
        differentiate_rows(case, out[1][0], tilts=True, threads=threads)
        out.append(case["logits"])
    for one, other in zip(*outs, strict=True):
        assert one.tobytes() == other.tobytes()


def test_extreme_logits_lose_finitely() -> None:
    case = given(1001)
    case["logits"][0, 1:] = -np.inf
    case["logits"][1, :900] = -np.inf
    case["logits"][2] *= 1e4
    found = differentiate(case, z_loss=0)
    assert np.isfinite(found[0]).all()
    assert np.isfinite(case["logits"]).all()
    far = given(5000, offset=3000)
    wanted = truth(far)[0]
    np.testing.assert_allclose(statistics(far)[0], wanted[0], rtol=1e-7)


def test_what_is_no_number_stays_in_its_row() -> None:
    case, clean = given(200), given(200)
    case["logits"][3, 7] = np.nan
    case["logits"][4, 9] = np.inf
    found, wanted = differentiate(case), differentiate(clean)
    assert np.isnan(found[0, 3:5]).all()
    assert np.isnan(case["logits"][3:5]).all()
    for mine, plain in ((found.T, wanted.T), (case["logits"], clean["logits"])):
        assert np.delete(mine, (3, 4), 0).tobytes() == np.delete(plain, (3, 4), 0).tobytes()


RUN = """
import sys
import numpy as np
from test_loss_core import ROUNDING, differentiate, given, statistics

for dtype in ROUNDING:
    case = given(1111, dtype)
    np.savez(f"{sys.argv[1]}/{dtype}", statistics(case), differentiate(case), case["logits"])
"""


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_but_for_rounding(isa: str, tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    subprocess.run(
        [sys.executable, "-P", "-c", RUN, tmp_path], check=True, timeout=100,
        env={**os.environ, "HERMES_CORE_ISA": isa, "PYTHONPATH": path},
    )  # fmt: skip
    for dtype in ROUNDING:
        case = given(1111, dtype)
        wanted, p, one = truth(case)
        with np.load(tmp_path / f"{dtype}.npz") as saved:
            found, both, case["logits"][:] = saved.values()
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(both, wanted[:2], rtol=1e-5, atol=1e-5)
        weight = case["weight"][:, None]
        assert_near(case, weight * ((1 + 2e-3 * wanted[0])[:, None] * p - one))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("logits", np.zeros((ROWS, 8)), "logits is .*float64.*, want rows of float32"),
        ("logits", np.zeros((8, ROWS), np.float32).T, "want rows of float32 side by side"),
        ("logits", np.zeros((ROWS, 0), np.float32), "not empty"),
        ("logits", np.broadcast_to(np.float32(0), (ROWS, 8)), "want rows of float32"),
        ("column", np.zeros(ROWS - 1, np.int64), r"column is .*, want a contiguous.* int64 \[7\]"),
        ("column", np.zeros(ROWS, np.int32), "column is .*int32"),
        ("weight", np.zeros(2 * ROWS, np.float32)[::2], "weight is .*, want a contiguous"),
        ("dtype", "float64", "dtype is 'float64', want float32, bfloat16 or float16"),
        ("threads", 0, "threads"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, value: Any, words: str) -> None:
    case = given(8) | {"threads": 1, name: value}
    found = np.zeros((2, ROWS), np.float32)
    with pytest.raises(ValueError, match=words):
        _C.differentiate_loss(
            case["logits"], case["column"], case["weight"], *found, z_loss=0.0,
            dtype=case["dtype"], threads=case["threads"],
        )  # fmt: skip


def test_targets_elsewhere_and_out_of_range_are_nowhere() -> None:
    case, other = given(8), given(8)
    case["column"][:] = -1
    other["column"][:] = [8, 9, 2**40, -2, -(2**40), -1, 8]
    assert differentiate(case).tobytes() == differentiate(other).tobytes()
    assert case["logits"].tobytes() == other["logits"].tobytes()
