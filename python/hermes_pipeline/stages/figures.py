"""Figures as SVG text that takes its colours from the page, so that it suits light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 14, 42


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover [low, high], about ``count`` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def histogram(
    values: NDArray[np.int64], *, bins: int, x_label: str, y_label: str, high: float | None = None
) -> str:
    """How often values fall into equal bins from 0 (or the least value) to ``high``."""
    low = 0.0 if high is None else float(values.min())
    edges = np.linspace(low, float(values.max()) if high is None else high, bins + 1)
    counts, _ = np.histogram(values, edges)
    frame = _Frame(low, float(edges[-1]), 0.0, float(counts.max()) or 1.0)
    parts = [frame.axes(x_label, y_label)]
    for count, left, right in zip(counts.tolist(), edges, edges[1:], strict=False):
        x, width = frame.x(left), frame.x(right) - frame.x(left)
        y = frame.y(count)
        hint = f"{left:,.4g} to {right:,.4g}: {count:,}"
        parts.append(_rect("bar", x + 0.5, y, max(0.5, width - 1), frame.bottom - y, hint))
    return _svg(parts, f"{y_label} over {x_label}")


def curve(
    xs: Sequence[float], ys: Sequence[float], *, x_label: str, y_label: str, smooth: int = 1
) -> str:
    """A line through points; with ``smooth`` a second one, the mean of so many points."""
    top = max(ys, default=1.0)
    frame = _Frame(min(xs, default=0.0), max(xs, default=1.0), 0.0, top or 1.0)
    parts = [frame.axes(x_label, y_label)]
    raw = [(frame.x(x), frame.y(y)) for x, y in zip(xs, ys, strict=True)]
    parts.append(_line("line faint" if smooth > 1 else "line", raw))
    if smooth > 1 and len(ys) >= smooth:
        kernel = np.ones(smooth) / smooth
        means = np.convolve(np.asarray(ys, dtype=np.float64), kernel, mode="valid")
        centres = np.asarray(xs, dtype=np.float64)[smooth // 2 : smooth // 2 + len(means)]
        steady = [(frame.x(x), frame.y(y)) for x, y in zip(centres, means, strict=True)]
        parts.append(_line("line", steady))
    if raw:
        parts.append(
            f'<text class="note" x="{raw[-1][0]:.1f}" y="{raw[-1][1] - 8:.1f}" '
            f'text-anchor="end">{ys[-1]:.3f}</text>'
        )
    return _svg(parts, f"{y_label} over {x_label}")


def grouped_bars(
    groups: Sequence[str],
    series: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    *,
    y_label: str,
) -> str:
    """Percentages with standard errors: a group of bars for each name, a bar for each series."""
    frame = _Frame(0.0, float(len(groups)), 0.0, 100.0)
    parts = [frame.axes("", y_label, x_ticks=False)]
    room = 0.76 / max(1, len(series))
    for g, group in enumerate(groups):
        parts.append(
            f'<text class="tick" x="{frame.x(g + 0.5):.1f}" y="{frame.bottom + 17}" '
            f'text-anchor="middle">{escape(group)}</text>'
        )
        for s, (name, values) in enumerate(series):
            mean, error = values[g]
            x = frame.x(g + 0.12 + room * s)
            width = frame.x(room) - frame.x(0) - 3
            y = frame.y(mean)
            hint = f"{name}, {group}: {mean:.1f} ± {error:.1f} %"
            parts.append(_rect(f"bar s{s}", x, y, width, max(1.0, frame.bottom - y), hint))
            middle = x + width / 2
            whisker = [
                (middle, frame.y(min(100, mean + error))),
                (middle, frame.y(max(0, mean - error))),
            ]
            parts.append(_line("whisker", whisker))
    return _svg(parts, y_label)


def row_map(rows: Sequence[Sequence[int]], row_length: int) -> str:
    """Rows as bars made of their samples; what is left of a row stays empty."""
    height, gap = 9, 3
    total = len(rows) * (height + gap)
    parts = []
    for r, lengths in enumerate(rows):
        y, at = r * (height + gap), 0
        parts.append(_rect("empty", 0, y, WIDTH, height, f"row of {row_length} tokens"))
        for s, length in enumerate(lengths):
            x, width = at * WIDTH / row_length, length * WIDTH / row_length
            parts.append(
                _rect(f"seg g{s % 4}", x, y, max(0.5, width - 1), height, f"{length} tokens")
            )
            at += length
    return (
        f'<svg viewBox="0 0 {WIDTH} {total}" role="img" aria-label="Packed rows">'
        f"{''.join(parts)}</svg>"
    )


class _Frame:
    """The plane of a figure: from data to pixels, and its axes."""

    def __init__(self, x_low: float, x_high: float, y_low: float, y_high: float) -> None:
        self._x = (x_low, x_high if x_high > x_low else x_low + 1)
        self._y = (y_low, y_high * 1.04 if y_high != 100 else 100)
        self.bottom = HEIGHT - BOTTOM

    def x(self, value: float) -> float:
        low, high = self._x
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self._y
        return self.bottom - (value - low) / (high - low) * (self.bottom - TOP)

    def axes(self, x_label: str, y_label: str, *, x_ticks: bool = True) -> str:
        parts = []
        for value in ticks(*self._y):
            y = self.y(value)
            parts.append(_line("grid", [(LEFT, y), (WIDTH - RIGHT, y)]))
            parts.append(
                f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">'
                f"{value:,.10g}</text>"
            )
        parts.extend(
            f'<text class="tick" x="{self.x(value):.1f}" y="{self.bottom + 17}" '
            f'text-anchor="middle">{value:,.10g}</text>'
            for value in (ticks(*self._x, 8) if x_ticks else ())
        )
        parts.append(_line("axis", [(LEFT, self.bottom), (WIDTH - RIGHT, self.bottom)]))
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(
            f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">'
            f"{escape(x_label)}</text>"
            f'<text class="label" transform="translate(13 {(TOP + self.bottom) / 2}) rotate(-90)" '
            f'text-anchor="middle">{escape(y_label)}</text>'
        )
        return "".join(parts)


def _rect(kind: str, x: float, y: float, width: float, height: float, hint: str) -> str:
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}">'
        f"<title>{escape(hint)}</title></rect>"
    )


def _line(kind: str, points: Sequence[tuple[float, float]]) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{kind}" points="{path}"/>'


def _svg(parts: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )
