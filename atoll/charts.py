"""Small charts as inline SVG, for pages that must open without a network.

Each function returns one `<figure>`: a caption, the drawing with a title and a description for screen readers, and a
legend where there is more than one colour. Colours come from CSS custom properties (`--series-1` ...), so that the page
decides on light and dark. A drawing scales with its letters, so there are two `<svg>`, `wide` and `narrow`; the
page shows the one whose letters can be read in its room.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise

import msgspec

from atoll.figures import number

LETTER = 6.2
"""Width of a letter, about, in the 12 units that text is high."""
BOTTOM = 42
ROW_VALUE = 76


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


class Layout(msgspec.Struct, frozen=True):
    """Where things stand in one drawing. `row_label` is the room before a row's bar; 0 puts its name above it.
    `mark_lines` of names of marks fit above."""

    name: str
    width: int
    height: int
    left: int
    right: int
    top: int
    row: int
    row_label: int
    mark_lines: int


WIDE = Layout("wide", 640, 260, 60, 16, 34, 30, 200, 2)
NARROW = Layout("narrow", 340, 250, 54, 12, 48, 42, 0, 3)
Draw = Callable[[Layout], Sequence[str]]


class _Frame:
    """Maps data units to the drawing area."""

    def __init__(self, layout: Layout, x_range: tuple[float, float], y_range: tuple[float, float]) -> None:
        (self.x0, self.x1), (self.y0, self.y1) = _widen(x_range), _widen(y_range)
        self.layout = layout
        self.right, self.bottom = layout.width - layout.right, layout.height - BOTTOM

    def x(self, value: float) -> float:
        return self.layout.left + (value - self.x0) / (self.x1 - self.x0) * (self.right - self.layout.left)

    def y(self, value: float) -> float:
        return self.bottom - (value - self.y0) / (self.y1 - self.y0) * (self.bottom - self.layout.top)


def line_chart(
    title: str, series: Sequence[Series], *, x_label: str, y_label: str, y_range: tuple[float, float] | None = None
) -> str:
    """Lines over a common axis, each point marked. `y_range` defaults to the data's, from zero."""
    points = [point for line in series for point in line.points]
    if not points:
        return empty_chart(title)
    xs = sorted({x for x, _ in points})
    whole = all(x == int(x) for x in xs) and len(xs) <= 12

    def draw(layout: Layout) -> list[str]:
        frame = _Frame(layout, (xs[0], xs[-1]), y_range or (0.0, max(y for _, y in points) * 1.1))
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
        return [*parts, *_last_values(frame, series)]

    return _figure(title, _told(series), draw, series)


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

    def draw(layout: Layout) -> list[str]:
        frame = _Frame(layout, (xs[0], xs[-1]), (0.0, max(totals)))
        parts = []
        below = [0.0] * len(xs)
        for index, line in enumerate(series):
            above = [low + y for low, (_, y) in zip(below, line.points, strict=True)]
            upper, lower = list(zip(xs, above, strict=True)), list(zip(xs, below, strict=True))
            outline = f"{_stairs(frame, upper)} L{_stairs(frame, lower, back=True)} Z"
            name = f"<title>{escape(line.name)}</title>"
            parts.append(f'<path d="M{outline}" fill="{_colour(line, index)}">{name}</path>')
            below = above
        parts.append(_axes(frame, x_label, y_label, ticks(frame.x0, frame.x1)))
        return [*parts, *_marks(frame, marks)]

    return _figure(title, _told(series), draw, series)


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
    highest = max(count for _, _, count in counts) * 1.1

    def draw(layout: Layout) -> list[str]:
        frame = _Frame(layout, (math.log10(counts[0][0]), math.log10(counts[-1][1])), (0.0, highest))
        parts = [_axes(frame, x_label, y_label, ())]
        for low, high, count in counts:
            left, right, top = frame.x(math.log10(low)) + 0.5, frame.x(math.log10(high)) - 0.5, frame.y(count)
            parts.append(
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{frame.y(0) - top:.1f}" '
                f'fill="var(--series-1)"><title>{show(low)} to {show(high)}: {number(count)}</title></rect>'
            )
        scale = _one_two_five(counts[0][0], counts[-1][1])
        parts.extend(_along_x(frame, [(math.log10(value), show(value)) for value in scale]))
        return [*parts, *_marks(frame, [Mark(math.log10(mark.x), mark.name) for mark in marks if mark.x > 0])]

    return _figure(title, f"{len(counts)} bars", draw)


def row_chart(title: str, bars: Sequence[Bar]) -> str:
    """One horizontal bar a row, from zero."""
    if not bars:
        return empty_chart(title)
    widest = max(bar.value for bar in bars) or 1.0
    thick = 21

    def draw(layout: Layout) -> list[str]:
        left, parts = layout.row_label, list[str]()
        for index, bar in enumerate(bars):
            bottom, width = (index + 1) * layout.row - 5, (layout.width - left - ROW_VALUE) * bar.value / widest
            if left:
                parts.append(_text(left - 10, bottom - thick + 15, bar.name, "end"))
            else:
                parts.append(_text(0, bottom - thick - 4, bar.name, "start"))
            parts.append(
                f'<rect x="{left}" y="{bottom - thick}" width="{width:.1f}" height="{thick}" rx="2" '
                f'fill="var(--series-{bar.colour})"/>'
            )
            parts.append(_text(left + width + 8, bottom - thick + 15, bar.words, "start", "value"))
        return parts

    told = ", ".join(f"{bar.name}: {bar.words}" for bar in bars)
    return _figure(title, told, draw, rows=len(bars))


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
    parts, top = [], frame.layout.top
    free = [-math.inf] * frame.layout.mark_lines
    for mark in sorted(marks, key=lambda one: one.x):
        x = frame.x(mark.x)
        width = LETTER * len(mark.name)
        centre = min(max(x, frame.layout.left + width / 2), frame.right - width / 2)
        line = next((line for line, end in enumerate(free) if centre - width / 2 > end + 6), len(free) - 1)
        free[line] = centre + width / 2
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{frame.bottom}"/>')
        parts.append(_text(centre, top - 5 - 14 * line, mark.name, "middle", "value"))
    return parts


def _along_x(frame: _Frame, values: Sequence[tuple[float, str]]) -> list[str]:
    """Values of the x axis in words, without those that would run into the one before."""
    parts, free = [], -math.inf
    for value, words in values:
        x, width = frame.x(value), LETTER * len(words)
        if x - width / 2 > free + 4:
            parts.append(_text(x, frame.bottom + 16, words, "middle"))
            free = x + width / 2
    return parts


def _axes(frame: _Frame, x_label: str, y_label: str, x_ticks: Sequence[float]) -> str:
    parts, left = [], frame.layout.left
    for value in ticks(frame.y0, frame.y1):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{left}" x2="{frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left - 8, y + 4, number(value), "end"))
    parts.extend(_along_x(frame, [(value, number(value)) for value in x_ticks]))
    parts.append(_text((left + frame.right) / 2, frame.layout.height - 6, x_label, "middle", "label"))
    middle = (frame.layout.top + frame.bottom) / 2
    parts.append(
        f'<text x="14" y="{middle}" text-anchor="middle" class="label" transform="rotate(-90 14 {middle})">'
        f"{escape(y_label)}</text>"
    )
    return "".join(parts)


def _figure(title: str, description: str, draw: Draw, series: Sequence[Series] = (), rows: int = 0) -> str:
    """The drawing in both layouts; as high as its `rows`, if it has any."""
    drawn = "".join(
        f'<svg class="{layout.name}" viewBox="0 0 {layout.width} {rows * layout.row + 4 if rows else layout.height}" '
        f'role="img" aria-label="{escape(title)}: {escape(description)}">{"".join(draw(layout))}</svg>'
        for layout in (WIDE, NARROW)
    )
    return f"<figure><figcaption>{escape(title)}</figcaption>{drawn}{_legend(series)}</figure>"


def _legend(series: Sequence[Series]) -> str:
    if not series:
        return ""
    items = "".join(
        f'<span><i style="background:{_colour(line, index)}"></i>{escape(line.name)}</span>'
        for index, line in enumerate(series)
    )
    return f'<p class="legend">{items}</p>'
