"""Which charts belong to which act, from the figures that the act left.

Charts are functions of figures alone: an act that failed half-way shows what it had measured until then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from atoll.charts import Bar, Mark, Series, empty_chart, histogram, line_chart, row_chart, stack_chart
from atoll.figures import duration, shown
from monitoring.telemetry import LATENCY_BOUNDS_US

Figures = Mapping[str, Any]

OLD, NEW, BAD = 1, 3, 2
"""Series colours with a meaning: what ran before, what replaces it, what must go."""


def act_charts(act: str, figures: Figures) -> list[str]:
    """The charts of one act, as HTML."""
    if act == "publish":
        return [latency_histogram(figures), _bars("Size of the first version", figures, _SIZES)]
    if act == "learn":
        return [precision_by_round(figures)]
    if act == "canary":
        timeline = devices_by_version(figures, old="before", new="learned", new_colour=NEW)
        return [timeline, _bars("Bytes to the fleet", figures, _SENT)]
    if act == "bad_version":
        marks = [
            Mark(figures[key], f"{name} {duration(figures[key])}")
            for key, name in (("seconds_until_stopped", "stopped"), ("seconds_until_undone", "undone"))
            if key in figures
        ]
        timeline = devices_by_version(figures, old="good", new="bad", new_colour=BAD, marks=marks)
        return [timeline, _bars("Honest payments declined", figures, _DECLINED)]
    if act == "region_loss":
        return [answers_by_region(figures)]
    if act == "long_absence":
        return [_bars("Bytes of the way back", figures, _WAY_BACK)]
    return []


_Rows = tuple[tuple[str, str, int], ...]
_SIZES: _Rows = (
    ("bytes_float32", "as trained (float32)", OLD),
    ("bytes_int8", "as published (int8)", NEW),
    ("bytes_download", "as downloaded", NEW),
)
_SENT: _Rows = (("bytes_full_downloads", "as full downloads", OLD), ("bytes_sent", "as sent, by patches", NEW))
_DECLINED: _Rows = (
    ("false_positive_rate_good", "good version", OLD),
    ("false_positive_rate_bad", "bad version", BAD),
)
_WAY_BACK: _Rows = (
    ("catch_up_bytes_whole", "a full download", OLD),
    ("catch_up_bytes", "its update", NEW),
    ("baseline_bytes", "baseline by radio", NEW),
)


def _bars(title: str, figures: Figures, rows: _Rows) -> str:
    return row_chart(
        title,
        [Bar(name, figures[key], shown(key, figures[key]), colour) for key, name, colour in rows if key in figures],
    )


def latency_histogram(figures: Figures) -> str:
    """Decisions by latency, with the quantiles marked."""
    title = "Decision latency on the devices"
    counts = {int(bucket): float(count) for bucket, count in figures.get("plot_latency", {}).items()}
    if not counts:
        return empty_chart(title)
    last = len(LATENCY_BOUNDS_US) - 1
    bars = [
        (
            LATENCY_BOUNDS_US[min(bucket, last)] / 10 ** (1 / 12),
            LATENCY_BOUNDS_US[min(bucket, last)],
            counts.get(bucket, 0),
        )
        for bucket in range(min(counts), max(counts) + 1)
    ]
    marks = [
        Mark(figures[f"latency_{name}_us"], f"{name} {duration(figures[f'latency_{name}_us'] / 1e6)}")
        for name in ("p50", "p95", "p99")
        if bars[0][0] <= figures.get(f"latency_{name}_us", 0.0) <= bars[-1][1]
    ]
    return histogram(
        title,
        bars,
        x_label="latency (logarithmic)",
        y_label="decisions",
        show=lambda us: duration(us / 1e6),
        marks=marks,
    )


def precision_by_round(figures: Figures) -> str:
    """Average precision of every candidate, beside plain averaging of the same updates and the model that stays."""
    title = "Average precision on held-out payments, by round"
    rounds = figures.get("rounds", [])
    if not rounds:
        return empty_chart(title)
    stale = rounds[0].get("average_precision_stale")
    lines = []
    for key, name, colour, dashed in (
        ("average_precision", "Atoll: Multi-Krum on shares", NEW, False),
        ("average_precision_fedavg", "plain FedAvg of each round's updates from the same base", BAD, True),
        ("average_precision_stale", "the model that stays as it is", OLD, True),
    ):
        points = [(float(row["round"]), float(row[key])) for row in rounds if key in row]
        if stale is not None and points:
            points.insert(0, (0.0, float(stale)))
        if points:
            lines.append(Series(name, tuple(points), dashed=dashed, colour=colour))
    high = max((y for line in lines for _, y in line.points), default=1.0)
    return line_chart(
        title, lines, x_label="round", y_label="average precision", y_range=(0.0, min(1.0, 1.15 * high) or 1.0)
    )


def devices_by_version(figures: Figures, *, old: str, new: str, new_colour: int, marks: Sequence[Mark] = ()) -> str:
    """Who ran what over time; versions that were not there at the start are at the bottom."""
    title = "Devices by version while the rollout ran"
    samples = figures.get("plot_timeline", [])
    if not samples:
        return empty_chart(title)
    before = samples[0]["devices"]
    names = sorted({name for sample in samples for name in sample["devices"]}, key=lambda name: (name in before, name))
    lines = [
        Series(
            f"{_version(name)} ({old if name in before else new})",
            tuple((float(sample["seconds"]), float(sample["devices"].get(name, 0))) for sample in samples),
            colour=0 if name == "none" else OLD if name == _most(before) else new_colour if name not in before else 0,
        )
        for name in names
    ]
    return stack_chart(title, lines, x_label="seconds since it began", y_label="devices", marks=marks)


def answers_by_region(figures: Figures) -> str:
    """Who answered the terminal that asks the region which dies, and how many answers were lost."""
    dead = figures.get("region")
    bars = [
        Bar(f"{region}, which died" if region == dead else region, count, f"{count:,}", OLD if region == dead else NEW)
        for region, count in figures.get("answered_by", {}).items()
    ]
    if bars and "requests_lost" in figures:
        bars.append(Bar("lost", figures["requests_lost"], f"{figures['requests_lost']:,}", BAD))
    return row_chart("Who answered the terminal", bars)


def _version(name: str) -> str:
    """A version's label; a digest, where there is no label, is cut short."""
    return "no model" if name == "none" else name[:12] + "…" if len(name) == 64 else name


def _most(devices: Mapping[str, int]) -> str:
    return max(devices, key=lambda name: devices[name], default="")
