"""The demo's report: `report.json` for machines, `report.html` for people, a table for the terminal.

Every figure was measured in the run that wrote it; an act that did not run has none. The JSON form is
`{"seed", "commit", "machine", "acts": [{"name", "ok", "seconds", "figures"}]}`; keys may be added, never renamed.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from atoll.charts import Series, bar_chart, empty_chart, line_chart, number
from atoll.settings import write_private
from monitoring.telemetry import LATENCY_BOUNDS_US

TITLES = {
    "up": "Up",
    "publish": "Publish",
    "learn": "Learn",
    "canary": "Canary",
    "bad_version": "A bad version",
    "region_loss": "A region dies",
    "long_absence": "120 days away",
}


class ActResult(msgspec.Struct, frozen=True):
    """One act: whether everything it promises was seen, how long it took, what was measured, what went wrong."""

    name: str
    ok: bool
    seconds: float
    figures: dict[str, Any]
    problem: str = ""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The whole run."""

    seed: int
    commit: str
    machine: dict[str, Any]
    seconds: float
    memory_mb_peak: float
    acts: tuple[ActResult, ...]

    @property
    def ok(self) -> bool:
        """Whether every act did what it promises."""
        return len(self.acts) == len(TITLES) and all(act.ok for act in self.acts)


def write_report(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write `report.json` and `report.html` into `folder`; returns both paths. Raises StorageFull."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "report.json"
    page = folder / "report.html"
    write_private(data, json.dumps(msgspec.to_builtins(report), indent=2).encode() + b"\n")
    write_private(page, render_html(report).encode())
    for path in (data, page):
        path.chmod(0o644)
    return data, page


def render_table(report: Report) -> str:
    """The terminal's table: an act a line, its main figures behind it."""
    lines = [f"{'act':<16} {'ok':<4} {'seconds':>8}  figures"]
    for act in report.acts:
        summary = act.problem or headline(act)
        lines.append(f"{TITLES[act.name]:<16} {'yes' if act.ok else 'NO':<4} {act.seconds:>8.1f}  {summary}")
    lines.append(
        f"{'all':<16} {'yes' if report.ok else 'NO':<4} {report.seconds:>8.1f}  "
        f"peak memory {report.memory_mb_peak:.0f} MB, seed {report.seed}, commit {report.commit}"
    )
    return "\n".join(lines)


def headline(act: ActResult) -> str:
    """The scalar figures of an act in one line."""
    return ", ".join(
        f"{key.replace('_', ' ')} {_scalar(value)}"
        for key, value in act.figures.items()
        if isinstance(value, int | float | str) and not isinstance(value, bool)
    )


def _scalar(value: float | str) -> str:
    return value if isinstance(value, str) else number(float(value))


def render_html(report: Report) -> str:
    """One self-contained page: no script, no network."""
    acts = {act.name: act for act in report.acts}
    sections = "".join(_section(act, _charts(act, acts)) for act in report.acts)
    verdict = "every act did what it promises" if report.ok else "not everything worked: see below"
    machine = ", ".join(f"{key} {value}" for key, value in report.machine.items())
    style = resources.files("atoll").joinpath("report.css").read_text()
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1"><title>Atoll demo report</title>'
        f"<style>{style}</style><main><header><h1>Atoll demo report</h1>"
        f'<p class="{"good" if report.ok else "bad"}">{verdict}</p>'
        f"<p>{report.seconds:.0f} s, peak memory {report.memory_mb_peak:.0f} MB, seed {report.seed}, "
        f"commit {escape(report.commit)}; {escape(machine)}</p></header>{sections}</main></html>\n"
    )


def _section(act: ActResult, charts: Sequence[str]) -> str:
    rows = "".join(
        f"<tr><th scope=row>{escape(key.replace('_', ' '))}</th><td>{_cell(value)}</td></tr>"
        for key, value in act.figures.items()
        if not key.startswith("plot_")
    )
    problem = f'<p class="bad">{escape(act.problem)}</p>' if act.problem else ""
    mark = '<span class="good">ok</span>' if act.ok else '<span class="bad">failed</span>'
    return (
        f'<section id="{act.name}"><h2>{TITLES[act.name]} {mark}<small>{act.seconds:.1f} s</small></h2>{problem}'
        f'<div class="columns"><table>{rows}</table><div>{"".join(charts)}</div></div></section>'
    )


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(float(value))
    if isinstance(value, list) and value and isinstance(value[0], dict):
        keys = [key for key in value[0] if not isinstance(value[0][key], list | dict)]
        head = "".join(f"<th>{escape(key.replace('_', ' '))}</th>" for key in keys)
        body = "".join(
            "<tr>" + "".join(f"<td>{_cell(row.get(key, ''))}</td>" for key in keys) + "</tr>" for row in value
        )
        return f"<table><tr>{head}</tr>{body}</table>"
    if isinstance(value, list):
        return escape(", ".join(str(item) for item in value)) or "none"
    if isinstance(value, dict):
        return escape(", ".join(f"{key}: {_scalar(item)}" for key, item in value.items())) or "none"
    return escape(str(value))


def _charts(act: ActResult, acts: Mapping[str, ActResult]) -> list[str]:
    if act.name == "publish":
        return [_latency(act)]
    if act.name == "learn":
        return [_precision(act)]
    if act.name in ("canary", "bad_version"):
        return [_timeline(act)]
    return []


def _latency(act: ActResult) -> str:
    counts = {int(bucket): count for bucket, count in act.figures.get("plot_latency", {}).items()}
    if not counts:
        return empty_chart("Decision latency")
    span = range(min(counts), max(counts) + 1)
    bars = [(number(LATENCY_BOUNDS_US[min(b, len(LATENCY_BOUNDS_US) - 1)]), float(counts.get(b, 0))) for b in span]
    return bar_chart("Decision latency", bars, x_label="microseconds (upper bound)", y_label="decisions")


def _precision(act: ActResult) -> str:
    rounds = act.figures.get("rounds", [])
    if not rounds:
        return empty_chart("Average precision by round")
    lines = []
    for key, name, dashed in (
        ("average_precision", "Atoll: Multi-Krum on shares", False),
        ("average_precision_fedavg", "plain FedAvg, same updates", True),
        ("average_precision_stale", "stale model", True),
    ):
        points = tuple((float(row["round"]), float(row[key])) for row in rounds if key in row)
        lines.append(Series(name, points, dashed=dashed))
    return line_chart(
        "Average precision by round", lines, x_label="round", y_label="average precision", y_range=(0.0, 1.0)
    )


def _timeline(act: ActResult) -> str:
    samples = act.figures.get("plot_timeline", [])
    if not samples:
        return empty_chart("Devices by version over time")
    names = sorted({name for sample in samples for name in sample["devices"]})
    lines = [
        Series(name, tuple((s["seconds"], float(s["devices"].get(name, 0))) for s in samples), steps=True)
        for name in names
    ]
    return line_chart("Devices by version over time", lines, x_label="seconds", y_label="devices")


def machine_facts() -> dict[str, Any]:
    """What the figures were measured on."""
    return {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count() or 1,
            "python": platform.python_version()}  # fmt: skip


def commit_name(folder: Path) -> str:
    """The checked-out commit, with `+` when files differ from it; `unknown` outside a checkout."""
    try:
        name = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=5
        )
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    if name.returncode != 0:
        return "unknown"
    return name.stdout.strip() + ("+" if dirty.stdout.strip() else "")
