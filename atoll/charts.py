"""Small charts as inline SVG, for pages that must open without a network.

Each function returns one `<figure>`: a caption, an `<svg>` with a title and a description for screen readers, and a
legend where there is more than one colour. Colours come from CSS custom properties (`--series-1` ...), so that the page
decides on light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise

import msgspec

from atoll.figures import number

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 60, 16, 34, 42
ROW, ROW_LABEL, ROW_VALUE = 30, 200, 76


class Series(msgspec.Struct, frozen=True):
    """A named line: points are (x, y) in data units. `colour` counts the page's series colours from 1; 0 takes the
    next one."""

    name: str
    points: tuple[tuple[float, float], ...]
    dashed: bool = False
    colour: int = 0


class Mark(msgspec.Struct, frozen=True):
    """A moment or value on the x axis that deserves a name."""

    x: float
    name: str


class Bar(msgspec.Struct, frozen=True):
    """One row of a row chart: what it is, its length in data units, its value in words, its series colour."""

    name: str
    value: float
    words: str
    colour: int = 1


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
    """Lines over a common axis, each point marked. `y_range` defaults to the data's, from zero."""
    points = [point for line in series for point in line.points]
    if not points:
        return empty_chart(title)
    xs = sorted({x for x, _ in points})
    frame = _Frame((xs[0], xs[-1]), y_range or (0.0, max(y for _, y in points) * 1.1))
    whole = all(x == int(x) for x in xs) and len(xs) <= 12
    parts = [_axes(frame, x_label, y_label, xs if whole else ticks(frame.x0, frame.x1))]
    for index, line in enumerate(series):
        colour = _colour(line, index)
        dash = ' stroke-dasharray="6 4"' if line.dashed else ""
        path = "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in line.points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2.2"{dash}/>')
        parts.extend(
            f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3.4" fill="{colour}">'
            f"<title>{escape(line.name)}: {number(y)} at {number(x)}</title></circle>"
            for x, y in line.points
        )
    parts.extend(_last_values(frame, series))
    return _figure(title, _told(series), parts, series)


def _last_values(frame: _Frame, series: Sequence[Series]) -> list[str]:
    """The last value of each line above its end, or below it where it would run into another."""
    parts, taken = [], list[float]()
    for line in sorted(series, key=lambda one: -one.points[-1][1]):
        x, y = line.points[-1]
        places = [frame.y(y) - 8, frame.y(y) + 18, frame.y(y) + 32]
        at = next((place for place in places if all(abs(place - other) >= 13 for other in taken)), places[-1])
        taken.append(at)
        parts.append(_text(frame.x(x), at, number(y), "end", "value"))
    return parts


def stack_chart(title: str, series: Sequence[Series], *, x_label: str, y_label: str, marks: Sequence[Mark] = ()) -> str:
    """Counts on top of each other, the first series at the bottom, each held until its next point. All series have
    the same x values."""
    if not series or not series[0].points:
        return empty_chart(title)
    xs = [x for x, _ in series[0].points]
    totals = [sum(line.points[index][1] for line in series) for index in range(len(xs))]
    frame = _Frame((xs[0], xs[-1]), (0.0, max(totals)))
    parts = []
    below = [0.0] * len(xs)
    for index, line in enumerate(series):
        above = [low + y for low, (_, y) in zip(below, line.points, strict=True)]
        upper, lower = list(zip(xs, above, strict=True)), list(zip(xs, below, strict=True))
        outline = f"{_stairs(frame, upper)} L{_stairs(frame, lower, back=True)} Z"
        parts.append(f'<path d="M{outline}" fill="{_colour(line, index)}"><title>{escape(line.name)}</title></path>')
        below = above
    parts.append(_axes(frame, x_label, y_label, ticks(frame.x0, frame.x1)))
    parts.extend(_marks(frame, marks))
    return _figure(title, _told(series), parts, series)


def histogram(
    title: str,
    counts: Sequence[tuple[float, float, float]],
    *,
    x_label: str,
    y_label: str,
    show: Callable[[float], str],
    marks: Sequence[Mark] = (),
) -> str:
    """Bars of (lower bound, upper bound, count) on a logarithmic x axis; `show` writes a value of that axis. Bounds are
    above zero."""
    if not counts:
        return empty_chart(title)
    frame = _Frame(
        (math.log10(counts[0][0]), math.log10(counts[-1][1])), (0.0, max(count for _, _, count in counts) * 1.1)
    )
    parts = [_axes(frame, x_label, y_label, ())]
    for low, high, count in counts:
        left, right, top = frame.x(math.log10(low)) + 1, frame.x(math.log10(high)) - 1, frame.y(count)
        parts.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{frame.y(0) - top:.1f}" '
            f'fill="var(--series-1)"><title>{show(low)} to {show(high)}: {number(count)}</title></rect>'
        )
    parts.extend(
        _text(frame.x(math.log10(value)), HEIGHT - BOTTOM + 16, show(value), "middle")
        for value in _one_two_five(counts[0][0], counts[-1][1])
    )
    parts.extend(_marks(frame, [Mark(math.log10(mark.x), mark.name) for mark in marks if mark.x > 0]))
    return _figure(title, f"{len(counts)} bars", parts)


def row_chart(title: str, bars: Sequence[Bar]) -> str:
    """One horizontal bar a row, from zero."""
    if not bars:
        return empty_chart(title)
    widest = max(bar.value for bar in bars) or 1.0
    room = WIDTH - ROW_LABEL - ROW_VALUE
    parts = []
    for index, bar in enumerate(bars):
        y, width = index * ROW + 4, room * bar.value / widest
        parts.append(_text(ROW_LABEL - 10, y + 15, bar.name, "end"))
        parts.append(
            f'<rect x="{ROW_LABEL}" y="{y}" width="{width:.1f}" height="{ROW - 9}" rx="2" '
            f'fill="var(--series-{bar.colour})"/>'
        )
        parts.append(_text(ROW_LABEL + width + 8, y + 15, bar.words, "start", "value"))
    told = ", ".join(f"{bar.name}: {bar.words}" for bar in bars)
    return _figure(title, told, parts, height=len(bars) * ROW + 4)


def empty_chart(title: str) -> str:
    """What is shown when nothing was measured."""
    return f'<p class="empty">{escape(title)}: nothing was measured.</p>'


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


def _one_two_five(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [value for at in decades for value in (10.0**at, 2 * 10.0**at, 5 * 10.0**at) if low <= value <= high]


def _widen(bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = bounds
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _colour(line: Series, index: int) -> str:
    return f"var(--series-{line.colour or index % 6 + 1})"


def _told(series: Sequence[Series]) -> str:
    return "; ".join(f"{line.name}: {number(line.points[0][1])} to {number(line.points[-1][1])}" for line in series)


def _stairs(frame: _Frame, points: Sequence[tuple[float, float]], *, back: bool = False) -> str:
    """A staircase that holds each value until the next point, from the left or (`back`) from the right."""
    corners = [points[0]]
    for (_, before), (x, y) in pairwise(points):
        corners += [(x, before), (x, y)]
    ordered = reversed(corners) if back else corners
    return " L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in ordered)


def _text(x: float, y: float, words: str, anchor: str, kind: str = "") -> str:
    chosen = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{chosen}>{escape(words)}</text>'


def _marks(frame: _Frame, marks: Sequence[Mark]) -> list[str]:
    """Vertical lines with their names above; a name that would run into the one before goes a line higher."""
    parts, free = [], [-math.inf, -math.inf]
    for mark in sorted(marks, key=lambda one: one.x):
        x = frame.x(mark.x)
        width = 6.2 * len(mark.name)
        centre = min(max(x, LEFT + width / 2), WIDTH - RIGHT - width / 2)
        line = 0 if centre - width / 2 > free[0] + 6 else 1
        free[line] = centre + width / 2
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(_text(centre, TOP - 5 - 14 * line, mark.name, "middle", "value"))
    return parts


def _axes(frame: _Frame, x_label: str, y_label: str, x_ticks: Sequence[float]) -> str:
    parts = []
    for value in ticks(frame.y0, frame.y1):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 8, y + 4, number(value), "end"))
    parts.extend(_text(frame.x(value), HEIGHT - BOTTOM + 16, number(value), "middle") for value in x_ticks)
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "middle", "label"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="14" y="{middle}" text-anchor="middle" class="label" transform="rotate(-90 14 {middle})">'
        f"{escape(y_label)}</text>"
    )
    return "".join(parts)


def _figure(
    title: str, description: str, parts: Sequence[str], series: Sequence[Series] = (), height: int = HEIGHT
) -> str:
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}: {escape(description)}">'
        f"{''.join(parts)}</svg>{_legend(series)}</figure>"
    )


def _legend(series: Sequence[Series]) -> str:
    if not series:
        return ""
    items = "".join(
        f'<span><i style="background:{_colour(line, index)}"></i>{escape(line.name)}</span>'
        for index, line in enumerate(series)
    )
    return f'<p class="legend">{items}</p>'
