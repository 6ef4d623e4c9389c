"""Progress: plain lines where nobody looks at a terminal, a bar where somebody does."""

from __future__ import annotations

import contextlib
import io
import json

import pytest

from hermes_pipeline.services import progress as module
from hermes_pipeline.services.progress import JsonLines, progress, waiting


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test moves by hand."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_lines_say_stage_count_rate_and_time_left(clock: list[float]) -> None:
    out = io.StringIO()
    with progress("pack", total=100, unit="rows", stream=out) as counter:
        clock[0] += 10
        counter.advance(20, "loss 1.5")
    first = out.getvalue().splitlines()[0]
    assert first == "pack: 20/100 rows, 2.0 rows/s, 10 s, 40 s left, loss 1.5"


def test_what_was_done_before_counts_but_not_in_the_rate(clock: list[float]) -> None:
    out, bar = io.StringIO(), Terminal()
    with progress("train", total=400, unit="steps", done=44, stream=out) as counter:
        clock[0] += 10
        counter.advance(20)
    assert out.getvalue() == "train: 64/400 steps, 2.0 steps/s, 10 s, 168 s left\n"
    with progress("train", total=400, unit="steps", done=44, stream=bar) as counter:
        clock[0] += 10
        counter.advance(20)
    assert "64/400" in bar.getvalue()
    assert "2.0 steps/s" in bar.getvalue()


def test_what_turns_out_to_be_none_leaves_the_total(clock: list[float]) -> None:
    out, bar, lines = io.StringIO(), Terminal(), io.StringIO()
    with progress("complete", total=40, unit="draws", stream=out) as counter:
        clock[0] += 10
        counter.advance(20, fewer=10)
    assert out.getvalue() == "complete: 20/30 draws, 2.0 draws/s, 10 s, 5 s left\n"
    with progress("complete", total=40, unit="draws", stream=bar) as counter:
        counter.advance(20, fewer=10)
    assert "20/30" in bar.getvalue()
    told = JsonLines("complete", total=50, done=10, stream=lines)
    clock[0] += 10
    told.advance(20, {}, fewer=10)
    assert json.loads(lines.getvalue()) == {
        "stage": "complete",
        "seconds": 10,
        "done": 30,
        "total": 40,
        "seconds_left": 5,
    }


def test_lines_are_seldom(clock: list[float]) -> None:
    out = io.StringIO()
    with progress("pack", total=1000, unit="rows", stream=out) as counter:
        for _ in range(1000):
            clock[0] += 0.01
            counter.advance()
    assert len(out.getvalue().splitlines()) == 2  # one at five seconds, one at the end


def test_lines_do_without_a_total(clock: list[float]) -> None:
    out = io.StringIO()
    with progress("read", total=None, unit="records", stream=out) as counter:
        clock[0] += 2
        counter.advance(10)
    assert out.getvalue() == "read: 10 records, 5.0 records/s, 2 s\n"


def test_the_last_line_is_written_when_the_work_fails(clock: list[float]) -> None:
    out = io.StringIO()
    with (
        contextlib.suppress(RuntimeError),
        progress("pack", total=9, unit="rows", stream=out) as counter,
    ):
        counter.advance(3)
        raise RuntimeError
    assert "3/9 rows" in out.getvalue()


def test_lines_carry_no_control_characters() -> None:
    out = io.StringIO()
    with progress("pack", total=2, unit="rows", stream=out) as counter:
        counter.advance(2)
    assert out.getvalue().replace("\n", "").isprintable()


def test_a_terminal_gets_a_bar_with_stage_count_and_note() -> None:
    out = Terminal()
    with progress("pack", total=2, unit="rows", stream=out) as counter:
        counter.advance(2, "loss 1.5")
    assert "pack" in out.getvalue()
    assert "2/2" in out.getvalue()
    assert "rows/s" in out.getvalue()
    assert "loss 1.5" in out.getvalue()


def test_a_narrow_terminal_cuts_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = Terminal()
    with progress("complete", total=8000, unit="draws", stream=out) as counter:
        counter.advance(2240, "3 set aside, 32 in flight, 41,648 tokens/s")
    for part in ("2240/8000", "draws/s", "3 set aside", "41,648", "tokens/s"):
        assert part in out.getvalue()


def test_json_lines_carry_figures_by_name_and_are_seldom(clock: list[float]) -> None:
    out = io.StringIO()
    counter = JsonLines("complete", total=40, stream=out)
    for _ in range(3):
        clock[0] += 4
        counter.advance(10, {"in_flight": 2})
    assert [json.loads(line) for line in out.getvalue().splitlines()] == [
        {"stage": "complete", "seconds": 8, "done": 20, "total": 40, "seconds_left": 8}
        | {"in_flight": 2}
    ]


def test_waiting_says_so_now_and_then_and_when_it_is_over(clock: list[float]) -> None:
    out = io.StringIO()
    with waiting("start", stream=out) as tick:
        for _ in range(40):
            clock[0] += 1
            tick()
    assert out.getvalue().splitlines() == [
        "start: waiting, 15 s",
        "start: waiting, 30 s",
        "start: ready after 40 s",
    ]


def test_waiting_that_fails_does_not_call_itself_ready() -> None:
    out = io.StringIO()
    with pytest.raises(RuntimeError), waiting("start", stream=out):
        raise RuntimeError
    assert "ready" not in out.getvalue()
