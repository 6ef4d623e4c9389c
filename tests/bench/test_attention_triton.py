"""What is reckoned about the Triton kernels from their rates on an H100."""

from __future__ import annotations

import pytest

from bench.attention_model import CHIPS, Turn
from bench.attention_triton import RATES, SWEPT, swept, swept_shape, with_swept_overlaps

TURN = Turn(64, 128, 4 * 64 * 128**2, 700, 4)
TURNS = {
    (target, kernel, size): TURN
    for target in (90, 100) for kernel in (*SWEPT, "pairs") for size in (64, 128)
}  # fmt: skip


def test_ours_in_triton_alone_have_the_overlap_of_their_rate_on_an_h100() -> None:
    found = with_swept_overlaps(TURNS)
    assert found[100, "pairs", 128].overlap is None
    for kernel in SWEPT:
        assert found[100, kernel, 64].overlap == swept(TURNS, kernel)[0]
    assert swept(found, "dq") == swept(TURNS, "dq")


@pytest.mark.parametrize("kernel", SWEPT)
def test_the_overlap_gives_the_rate_that_was_measured_and_tells_what_it_errs(kernel: str) -> None:
    overlap, errors = swept(TURNS, kernel)
    rates = [RATES[kernel](TURN, CHIPS[0], overlap, swept_shape(*at)) for at in SWEPT[kernel]]
    measured = list(SWEPT[kernel].values())
    assert rates[0] == pytest.approx(measured[0])
    wanted = [rate / known - 1 for rate, known in zip(rates[1:], measured[1:], strict=True)]
    assert errors == pytest.approx(wanted)
