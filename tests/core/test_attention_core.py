"""The compiled attention: equal to its plain twin, and to itself on every instruction set.

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
from twins import attention as twin

Array = NDArray[Any]

# Around the edges of what is computed together: 64 keys, 64 queries (tokens by heads of a group),
# blocks of 256 queries.
PACKINGS = [[1], [1, 1, 5, 1], [63, 64, 65], [17, 130, 3], [257, 31]]
HEADS = [(4, 4), (8, 2), (3, 1), (10, 2), (6, 1), (7, 1), (8, 1)]
SIZES = [1, 7, 64, 96, 128, 192, 256]


def starts_of(lengths: list[int]) -> NDArray[np.int32]:
    return np.repeat(np.cumsum(lengths) - lengths, lengths).astype(np.int32)


def drawn(tokens: int, heads: tuple[int, int], size: int, dtype: str = "float32") -> list[Array]:
    """A gradient of the output, q, k, v."""
    random = np.random.default_rng(tokens)
    counts = (heads[0], heads[0], heads[1], heads[1])
    return [random.standard_normal((tokens, n, size)).astype(dtype) for n in counts]


def attend(
    inputs: list[Array], lengths: list[int], *, threads: int = 1, scale: float = 0.2
) -> list[Array]:
    """Output, log-sum-exps, and the gradients of q, k and v; what is not written is NaN."""
    grad, q, k, v = inputs
    settings: Any = {"dtype": str(q.dtype), "scale": scale, "threads": threads}
    out, lse = np.full_like(q, np.nan), np.full((q.shape[1], len(q) + 3), np.nan, q.dtype)
    grads = [np.full_like(x, np.nan) for x in (q, k, v)]
    _C.attend(q, k, v, starts_of(lengths), out, lse, **settings)
    _C.differentiate_attention(grad, q, k, v, out, lse, starts_of(lengths), *grads, **settings)
    assert np.isnan(lse[:, len(q) :]).all()
    return [out, lse[:, : len(q)], *grads]


def wanted(inputs: list[Array], lengths: list[int], scale: float = 0.2) -> list[Array]:
    grad, q, k, v = (x.astype(np.float64) for x in inputs)
    out, lse = twin.attend(q, k, v, lengths, scale)
    return [out, lse, *twin.differentiate(grad, q, k, v, lengths, scale)]


def assert_near(ours: list[Array], theirs: list[Array], tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1, np.abs(b).max()))


@pytest.mark.parametrize("lengths", PACKINGS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_it_equals_the_plain_twin(lengths: list[int], heads: tuple[int, int]) -> None:
    inputs = drawn(sum(lengths), heads, 16)
    assert_near(attend(inputs, lengths), wanted(inputs, lengths), 1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_it_takes_any_head_size(size: int) -> None:
    inputs, lengths = drawn(140, (4, 2), size), [70, 1, 69]
    assert_near(attend(inputs, lengths), wanted(inputs, lengths), 1e-4)


def test_float64_is_computed_in_float64() -> None:
    inputs, lengths = drawn(101, (4, 2), 9, "float64"), [70, 31]
    assert_near(attend(inputs, lengths), wanted(inputs, lengths), 1e-13)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_change_no_bit(threads: int) -> None:
    inputs, lengths = drawn(1100, (4, 2), 64), [900, 150, 50]
    alone = attend(inputs, lengths)
    for a, b in zip(attend(inputs, lengths, threads=threads), alone, strict=True):
        assert a.tobytes() == b.tobytes()


def test_what_stands_beside_a_segment_changes_no_bit() -> None:
    inputs = drawn(400, (6, 2), 24)
    alone = attend([np.ascontiguousarray(x[33:333]) for x in inputs], [300])
    among = attend(inputs, [20, 13, 300, 1, 66])
    for a, b, axis in zip(among, alone, [0, 1, 0, 0, 0], strict=True):
        assert np.take(a, range(33, 333), axis).tobytes() == b.tobytes()


RUN = """
import sys
import numpy as np
from test_attention_core import CASES, LENGTHS, attend, drawn

for dtype, size, _ in CASES:
    found = attend(drawn(sum(LENGTHS), (6, 2), size, dtype), LENGTHS)
    np.savez(f"{sys.argv[1]}/{dtype}-{size}", *found)
"""
LENGTHS = [1, 230, 69]
CASES = [("float32", 1, 1e-5), ("float32", 40, 1e-5), ("float32", 136, 1e-4), ("float64", 9, 1e-13)]


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_but_for_rounding(isa: str, tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    subprocess.run(
        [sys.executable, "-P", "-c", RUN, tmp_path], check=True, timeout=100,
        env={**os.environ, "HERMES_CORE_ISA": isa, "PYTHONPATH": path},
    )  # fmt: skip
    for dtype, size, tolerance in CASES:
        inputs = drawn(sum(LENGTHS), (6, 2), size, dtype)
        with np.load(tmp_path / f"{dtype}-{size}.npz") as found:
            assert_near(list(found.values()), wanted(inputs, LENGTHS), tolerance)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_key_that_is_no_number_poisons_those_that_see_it_alone(poison: float) -> None:
    inputs, lengths = drawn(200, (4, 2), 16), [90, 100, 10]
    clean = attend(inputs, lengths)
    inputs[2][150, 1] = poison  # token 60 of the second segment, seen by heads 2 and 3
    out, lse, *grads = attend(inputs, lengths)
    spoilt = np.zeros(out.shape[:2], dtype=bool)
    spoilt[150:190, 2:] = True
    assert np.isnan(out[spoilt]).all()
    assert out[~spoilt].tobytes() == clean[0][~spoilt].tobytes()
    assert lse[~spoilt.T].tobytes() == clean[1][~spoilt.T].tobytes()
    for mine, before in zip(grads, clean[2:], strict=True):
        for others in (slice(0, 90), slice(190, 200)):
            assert mine[others].tobytes() == before[others].tobytes()


def test_scores_of_minus_infinity_have_no_weight() -> None:
    inputs, lengths = drawn(80, (1, 1), 1), [80]
    inputs[1][:] = 1
    inputs[2][:70] = -np.inf
    out, lse, *_ = attend(inputs, lengths)
    assert np.isnan(out[:70]).all()
    assert_near([out[70:]], [wanted([x[70:] for x in inputs], [10])[0]], 1e-6)
    assert (lse[:, :70] == -np.inf).all()


def test_weights_of_distant_scores_are_zero_and_of_equal_ones_equal() -> None:
    inputs, lengths = drawn(66, (2, 1), 8), [66]
    inputs[2] *= 1e4
    assert_near(attend(inputs, lengths)[:2], wanted(inputs, lengths)[:2], 1e-2)
    inputs[2][:] = 0
    out = attend(inputs, lengths)[0]
    means = np.cumsum(inputs[3], 0) / np.arange(1, 67)[:, None, None]
    assert_near([out], [np.repeat(means, 2, axis=1)], 1e-6)


def arguments() -> dict[str, Any]:
    _, q, k, v = drawn(6, (4, 2), 8)
    lse = np.zeros((4, 8), np.float32)
    given = {"q": q, "k": k, "v": v, "starts": starts_of([4, 2]), "out": q.copy(), "lse": lse}
    return given | {"dtype": "float32", "scale": 1.0, "threads": 1}


def read_only(x: Array) -> Array:
    x.flags.writeable = False
    return x


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("q", np.zeros((6, 4), np.float32), r"q is float32 \[6, 4\], want \[tokens, heads"),
        ("q", np.zeros((0, 4, 8), np.float32), r"q is float32 \[0, 4, 8\].* none of them 0"),
        ("q", np.zeros((6, 3, 8), np.float32), "q has 3 heads, not a multiple of the 2 of k"),
        ("q", np.zeros((6, 4, 8)), r"q is float64 .*want an aligned, contiguous array of float32"),
        ("k", np.zeros((5, 2, 8), np.float32), r"k is float32 \[5, 2, 8\].* \[6, 2, 8\]"),
        ("v", np.zeros((6, 2, 7), np.float32), r"v is float32 \[6, 2, 7\].* \[6, 2, 8\]"),
        ("v", np.zeros((6, 4, 8), np.float32)[:, ::2], r"v is .*, not contiguous, want"),
        ("out", read_only(np.zeros((6, 4, 8), np.float32)), r"out is .*, read-only, want"),
        ("lse", np.zeros((4, 5), np.float32), r"lse is .*\[4, 5\], want \[4, at least 6\]"),
        ("lse", np.zeros((3, 6), np.float32), r"lse is float32 \[3, 6\].* \[4, 6\]"),
        ("lse", np.zeros((4, 6)), r"lse is float64 .* float32 \[4, 6\]"),
        ("starts", np.zeros(6, np.int64), r"starts is int64 \[6\], want .* int32 \[6\]"),
        ("starts", np.zeros(5, np.int32), r"starts is int32 \[5\], want .* int32 \[6\]"),
        ("starts", np.array([0, 0, 1, 1, 1, 1], np.int32), r"starts\[2\] is 1, want 0 or 2"),
        ("starts", np.array([1, 1, 1, 1, 1, 1], np.int32), r"starts\[0\] is 1, want 0"),
        ("dtype", "int8", "dtype is 'int8', want float32, float64, bfloat16 or float16"),
        ("dtype", "bfloat16", "q is float32 .* uint16"),
        ("scale", 0.0, "scale is 0.0+, want a positive, finite number"),
        ("scale", 1e-46, "scale is 0.0+, want a positive, finite number"),
        ("scale", float("nan"), "scale is nan, want a positive"),
        ("scale", float("inf"), "scale is inf, want a positive"),
        ("threads", 0, r"threads is 0, outside \[1, 1024\]"),
    ],
)  # fmt: skip
def test_arguments_that_disagree_are_refused(name: str, value: Any, words: str) -> None:
    _C.attend(**arguments())
    with pytest.raises((TypeError, ValueError), match=words):
        _C.attend(**arguments() | {name: value})
