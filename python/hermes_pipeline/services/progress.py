"""Progress for people: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

LINE_EVERY_S = 5.0
WAIT_LINE_EVERY_S = 15.0


class Tell(Protocol):
    """Counts work done, with figures by their names; ``fewer`` turned out to be none."""

    def __call__(self, count: float, figures: Mapping[str, float], *, fewer: float = 0) -> None: ...


class Counter(Protocol):
    """Counts work done; `note` is a short live remark, such as the loss."""

    def advance(self, count: float = 1, note: str = "", *, fewer: float = 0) -> None: ...


class _Lines:
    """Progress as plain lines, one every few seconds and one at the end."""

    def __init__(
        self, stage: str, total: float | None, unit: str, stream: TextIO, done: float
    ) -> None:
        self._stage, self._total, self._unit, self._stream = stage, total, unit, stream
        self._before = self._done = done
        self._note = ""
        self._start = self._last = time.monotonic()
        self._written = -1.0  # what the last line said was done

    def advance(self, count: float = 1, note: str = "", *, fewer: float = 0) -> None:
        self._done += count
        self._total = None if self._total is None else self._total - fewer
        self._note = note or self._note
        if time.monotonic() - self._last >= LINE_EVERY_S:
            self.write()

    def close(self) -> None:
        if self._written != self._done:
            self.write()

    def write(self) -> None:
        self._last, self._written = time.monotonic(), self._done
        seconds = self._last - self._start
        rate = (self._done - self._before) / seconds if seconds > 0 else 0.0
        text = f"{self._stage}: {self._done:,.0f}"
        if self._total is not None:
            text += f"/{self._total:,.0f}"
        text += f" {self._unit}, {rate:,.1f} {self._unit}/s, {seconds:.0f} s"
        if self._total is not None and rate > 0 and self._done < self._total:
            text += f", {(self._total - self._done) / rate:.0f} s left"
        print(text + (f", {self._note}" if self._note else ""), file=self._stream, flush=True)


class _Bar:
    """Progress as a live bar."""

    def __init__(
        self, bar: Progress, stage: str, total: float | None, unit: str, done: float
    ) -> None:
        self._bar, self._unit, self._new, self._start = bar, unit, 0.0, time.monotonic()
        self._total = total
        self._task = bar.add_task(stage, total=total, completed=int(done), rate="", note="")

    def advance(self, count: float = 1, note: str = "", *, fewer: float = 0) -> None:
        self._new += count
        self._total = None if self._total is None else self._total - fewer
        rate = self._new / max(1e-9, time.monotonic() - self._start)
        fields = {"rate": f"{rate:,.1f} {self._unit}/s"} | ({"note": note} if note else {})
        self._bar.update(self._task, advance=count, total=self._total, **fields)  # type: ignore[arg-type]


@contextmanager
def progress(
    stage: str,
    *,
    total: float | None,
    unit: str,
    done: float = 0,
    stream: TextIO | None = None,
) -> Iterator[Counter]:
    """Show the progress of one stage on ``stream`` (standard error if None).

    Args:
        stage: what is being done.
        total: how much there is, or None when nobody knows.
        unit: what is counted, in the plural.
        done: how much of it was there before; rates leave it out.
    """
    stream = stream or sys.stderr
    if not stream.isatty():
        lines = _Lines(stage, total, unit, stream, done)
        try:
            yield lines
        finally:
            lines.close()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        # Where a terminal is narrow the note is folded, so that no figure is cut.
        TextColumn("{task.fields[note]}", table_column=Column()),
    )
    bar = Progress(*columns, console=Console(file=stream))
    bar.start()
    try:
        yield _Bar(bar, stage, total, unit, done)
    finally:
        with suppress(OSError):  # of a terminal that is gone: why we end says more
            bar.stop()


class JsonLines:
    """Progress for other programs: JSON, a line every few seconds."""

    def __init__(
        self, stage: str, *, total: float | None, done: float = 0, stream: TextIO | None = None
    ) -> None:
        self._stage, self._total, self._stream = stage, total, stream or sys.stdout
        self._before = self._done = done
        self._start = self._last = time.monotonic()

    def advance(self, count: float, figures: Mapping[str, float], *, fewer: float = 0) -> None:
        """Count work done; ``figures`` stand beside it, by their names."""
        self._done += count
        self._total = None if self._total is None else self._total - fewer
        now = time.monotonic()
        if now - self._last < LINE_EVERY_S:
            return
        self._last, seconds = now, now - self._start
        line = {"stage": self._stage, "seconds": round(seconds, 1), "done": self._done}
        if self._total is not None and (new := self._done - self._before) > 0:
            left = max(0.0, self._total - self._done) * seconds / new
            line |= {"total": self._total, "seconds_left": round(left, 1)}
        print(json.dumps(line | dict(figures)), file=self._stream, flush=True)


@contextmanager
def telling(
    stage: str,
    *,
    total: float,
    unit: str,
    describe: Callable[[Mapping[str, float]], str],
    as_json: bool,
    done: float = 0,
    label: str | None = None,
) -> Iterator[Tell]:
    """Where a stage tells what is done, with figures by their names.

    Args:
        describe: the figures as a remark for people.
        as_json: lines of JSON on standard output, instead of a bar or lines for people.
        done: how much was there before.
        label: what people see, ``stage`` if None.
    """
    if as_json:
        yield JsonLines(stage, total=total, done=done).advance
        return
    with progress(label or stage, total=total, unit=unit, done=done) as bar:

        def tell(count: float, figures: Mapping[str, float], *, fewer: float = 0) -> None:
            bar.advance(count, describe(figures), fewer=fewer)

        yield tell


@contextmanager
def waiting(stage: str, *, stream: TextIO | None = None) -> Iterator[Callable[[], None]]:
    """Show that something of unknown length goes on; call what it gives now and then."""
    stream = stream or sys.stderr
    start = last = time.monotonic()

    def write(end: str) -> None:
        print(f"{stage}{end} {time.monotonic() - start:.0f} s", file=stream, flush=True)

    def tick() -> None:
        nonlocal last
        if time.monotonic() - last >= WAIT_LINE_EVERY_S:
            last = time.monotonic()
            write(": waiting,")

    if stream.isatty():
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=Console(file=stream), transient=True) as bar:
            bar.add_task(stage, total=None)
            yield lambda: None
    else:
        yield tick
    write(": ready after")
