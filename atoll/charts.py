"""Small charts as inline SVG, for pages that must open without a network.

Each function returns one `<svg>` element with a title and a description for screen readers. Colours come from CSS
custom properties (`--series-1` ...), so that the page decides on light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import msgspec

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 16, 40


class Series(msgspec.Struct, frozen=True):
    """A named line: points are (x, y) in data units. `steps` draws it as a staircase."""

    name: str
    points: tuple[tuple[float, float], ...]
    steps: bool = False
    dashed: bool = False


class _Frame:
    """Maps data units to the drawing area."""

    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float]) -> None:
        (self.x0, self.x1), (self.y0, self.y1) = _widen(x_range), _widen(y_range)

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)


def line_chart(
    title: str, series: Sequence[Series], *, x_label: str, y_label: str, y_range: tuple[float, float] | None = None
) -> str:
    """Lines over a common axis. `y_range` defaults to the data's, from zero."""
    points = [point for line in series for point in line.points]
    if not points:
        return empty_chart(title)
    frame = _Frame(
        (min(x for x, _ in points), max(x for x, _ in points)),
        y_range or (0.0, max(y for _, y in points) * 1.05),
    )
    parts = [_axes(frame, x_label, y_label)]
    for index, line in enumerate(series):
        colour = f"var(--series-{index % 6 + 1})"
        dash = ' stroke-dasharray="5 4"' if line.dashed else ""
        parts.append(
            f'<path d="{_path(frame, line)}" fill="none" stroke="{colour}" stroke-width="2.2"{dash}>'
            f"<title>{escape(line.name)}</title></path>"
        )
        if not line.steps:
            parts.extend(
                f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3.4" fill="{colour}">'
                f"<title>{escape(line.name)}: {number(y)} at {number(x)}</title></circle>"
                for x, y in line.points
            )
    return _svg(title, ", ".join(line.name for line in series), parts) + _legend([line.name for line in series])


def bar_chart(title: str, bars: Sequence[tuple[str, float]], *, x_label: str, y_label: str) -> str:
    """One bar a label, in the given order; every n-th label is written so that they do not collide."""
    if not bars:
        return empty_chart(title)
    frame = _Frame((0.0, float(len(bars))), (0.0, max(value for _, value in bars) * 1.05))
    every = max(1, math.ceil(len(bars) / 9))
    parts = [_axes(frame, x_label, y_label, x_ticks=False)]
    for index, (label, value) in enumerate(bars):
        left, right = frame.x(index + 0.08), frame.x(index + 0.92)
        top = frame.y(value)
        parts.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{frame.y(0) - top:.1f}" '
            f'fill="var(--series-1)"><title>{escape(label)}: {number(value)}</title></rect>'
        )
        if index % every == 0:
            parts.append(
                f'<text x="{(left + right) / 2:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">'
                f"{escape(label)}</text>"
            )
    return _svg(title, f"{len(bars)} bars", parts)


def empty_chart(title: str) -> str:
    """What is shown when nothing was measured."""
    return f'<p class="empty">{escape(title)}: nothing was measured.</p>'


def number(value: float) -> str:
    """A short human form: 1234567 -> 1.23M, 0.04213 -> 0.0421."""
    size = abs(value)
    if size >= 1_000_000:
        return f"{value / 1_000_000:.3g}M"
    if size >= 10_000:
        return f"{value / 1_000:.3g}k"
    if size >= 100 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.3g}"


def _widen(bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = bounds
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _path(frame: _Frame, line: Series) -> str:
    commands: list[str] = []
    previous: float | None = None
    for x, y in line.points:
        if previous is None:
            commands.append(f"M{frame.x(x):.1f} {frame.y(y):.1f}")
        elif line.steps:
            commands.append(f"H{frame.x(x):.1f} V{frame.y(y):.1f}")
        else:
            commands.append(f"L{frame.x(x):.1f} {frame.y(y):.1f}")
        previous = y
    return " ".join(commands)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values between `low` and `high`, about `count` of them."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw)
    first = math.ceil(low / step) * step
    values = []
    while first <= high + step * 1e-9:
        values.append(round(first, 12))
        first += step
    return values


def _axes(frame: _Frame, x_label: str, y_label: str, *, x_ticks: bool = True) -> str:
    parts = []
    for value in ticks(frame.y0, frame.y1):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
    if x_ticks:
        for value in ticks(frame.x0, frame.x1):
            parts.append(
                f'<text x="{frame.x(value):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{number(value)}</text>'
            )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle" class="label">{escape(x_label)}</text>')
    parts.append(
        f'<text x="12" y="{HEIGHT / 2 - 10}" text-anchor="middle" class="label" '
        f'transform="rotate(-90 12 {HEIGHT / 2 - 10})">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _svg(title: str, description: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{''.join(parts)}</svg>"
    )


def _legend(names: Sequence[str]) -> str:
    items = "".join(
        f'<span><i style="background:var(--series-{index % 6 + 1})"></i>{escape(name)}</span>'
        for index, name in enumerate(names)
    )
    return f'<p class="legend">{items}</p>'
