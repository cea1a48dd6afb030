"""The demo's report: `report.json` for machines, `report.html` for people, a table for the terminal.

Every figure was measured in the run that wrote it; an act that did not run has none. The JSON form is
`{"seed", "commit", "machine", "acts": [{"name", "ok", "seconds", "figures"}]}`; keys may be added, never renamed.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import textwrap
from collections.abc import Mapping
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from atoll.figures import NO_BREAK, headline, label, shown
from atoll.report_charts import act_charts
from atoll.settings import write_private

WIDTH = 100
OPEN_MAX = 12
"""Lists up to this length are shown unfolded."""
_DIGEST = re.compile("[0-9a-f]{16}…")
_HOSTILE = '<span class="chip bad">hostile</span>'

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
    """The terminal's table, at most WIDTH columns: an act a line, its main figures behind it, wrapped where needed."""
    lines = [f"{'act':<14}{'ok':<4}{'time':>7}  figures"]
    for act in report.acts:
        told = act.problem or headline(act.name, act.figures)
        lines += _row(TITLES[act.name], act.ok, act.seconds, told)
    lines += _row(
        "all",
        report.ok,
        report.seconds,
        f"peak memory {report.memory_mb_peak:.0f} MB, seed {report.seed}, commit {report.commit}",
    )
    return "\n".join(lines)


def _row(name: str, ok: bool, seconds: float, told: str) -> list[str]:
    start = f"{name:<14}{'yes' if ok else 'NO':<4}{seconds:>5.1f} s  "
    words = textwrap.wrap(told, WIDTH - len(start)) or [""]
    lines = [start + words[0], *(" " * len(start) + more for more in words[1:])]
    # A terminal may not be able to write these letters.
    return [line.replace(NO_BREAK, " ").replace("µ", "u") for line in lines]


def render_html(report: Report) -> str:
    """One self-contained page: no script, no network."""
    verdict = "Every act did what it promises." if report.ok else "Not everything worked: see below."
    facts = {
        "duration": f"{report.seconds:.0f} s",
        "peak memory": f"{report.memory_mb_peak:,.0f} MB",
        "seed": report.seed,
        "commit": report.commit,
        **report.machine,
    }
    told = "".join(f"<span>{escape(name)} <b>{escape(str(value))}</b></span>" for name, value in facts.items())
    links = "".join(
        f'<a href="#{act.name}">{index}. {TITLES[act.name]}{"" if act.ok else " (failed)"}</a>'
        for index, act in enumerate(report.acts, start=1)
    )
    style = resources.files("atoll").joinpath("report.css").read_text()
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><title>Atoll demo report</title>'
        f"<style>{style}</style><header><h1>Atoll demo report</h1>"
        f'<p class="verdict {"good" if report.ok else "bad"}">{verdict}</p><p class="facts">{told}</p>'
        f'<nav aria-label="Acts">{links}</nav></header><main>{_results(report)}'
        f"{''.join(_section(index, act) for index, act in enumerate(report.acts, start=1))}</main></html>\n"
    )


def _results(report: Report) -> str:
    """The run in six figures; those of acts that left none are not shown."""
    acts = {act.name: act.figures for act in report.acts}
    tiles = [
        ("publish", "latency_p95_us", "{latency_p95_us}", "p95 latency of a decision on the device"),
        (
            "learn",
            "average_precision_after",
            "{average_precision_stale} → {average_precision_after}",
            "average precision, learning among hostile devices",
        ),
        ("canary", "share_of_full", "{share_of_full}", "of the bytes of full downloads, by patches"),
        ("bad_version", "devices_ever", "{devices_ever}", "devices that ever ran the bad version"),
        ("region_loss", "requests_lost", "{requests_lost}", "requests lost when a region died"),
        ("long_absence", "catch_up_bytes", "{catch_up_bytes}", "bring back a device after 120 days"),
    ]
    shown_tiles = "".join(
        f"<div><b>{escape(text.format_map({key: shown(key, value) for key, value in acts[act].items()}))}</b>"
        f"<span>{escape(words)}</span></div>"
        for act, needed, text, words in tiles
        if needed in acts.get(act, {})
    )
    return f'<section class="results" aria-label="Results">{shown_tiles}</section>' if shown_tiles else ""


def _section(index: int, act: ActResult) -> str:
    rounds = act.figures.get("rounds", [])
    told_below = {"rounds", "rejected"} if rounds else set()
    rows = "".join(
        f"<tr><th scope=row>{escape(label(key))}</th><td>{_cell(key, value)}</td></tr>"
        for key, value in act.figures.items()
        if not key.startswith("plot_") and key not in told_below
    )
    wide = _rounds(rounds, act.figures) if rounds else ""
    problem = f'<p class="problem">{escape(act.problem)}</p>' if act.problem else ""
    mark = '<span class="chip good">ok</span>' if act.ok else '<span class="chip bad">failed</span>'
    charts = "".join(act_charts(act.name, act.figures)) if act.figures else ""
    lead = escape(headline(act.name, act.figures))
    table = f"<table>{rows}</table>" if rows else ""
    return (
        f'<section id="{act.name}"><h2>{index}. {TITLES[act.name]} {mark}<small>{act.seconds:.1f} s</small></h2>'
        f'{problem}<p class="lead">{lead}</p><div class="columns"><div>{table}</div>'
        f'<div class="charts">{charts}</div></div>{wide}</section>'
    )


def _cell(key: str, value: Any) -> str:
    if key == "stages":
        value = [_DIGEST.sub("this version", item) for item in value]
    if isinstance(value, list):
        if not value:
            return "none"
        if any(len(str(item)) > 24 for item in value):
            return f"<ol>{''.join(f'<li>{escape(str(item))}</li>' for item in value)}</ol>"
        return " ".join(f'<span class="item">{escape(str(item))}</span>' for item in value)
    if isinstance(value, dict):
        return (
            " ".join(
                f'<span class="item">{escape(str(name))} {escape(shown(key, item))}</span>'
                for name, item in value.items()
            )
            or "none"
        )
    return escape(shown(key, value))


def _rounds(rows: list[dict[str, Any]], figures: Mapping[str, Any]) -> str:
    """A line a round, then a line a rejected device: in which rounds, and why the last time."""
    unvaried = {"average_precision_stale"}
    keys = [key for key, value in rows[0].items() if not isinstance(value, list | dict) and key not in unvaried]
    head = "".join(f"<th scope=col>{escape(label(key))}</th>" for key in keys)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(shown(key, row.get(key, '')))}</td>" for key in keys) + "</tr>" for row in rows
    )
    return (
        f'<h3>Round by round</h3><div class="scroll"><table class="numbers"><tr>{head}</tr>{body}</table></div>'
        f"{_rejected(rows, figures)}"
    )


def _rejected(rows: list[dict[str, Any]], figures: Mapping[str, Any]) -> str:
    seen: dict[str, tuple[list[str], str]] = {}
    for row in rows:
        for line in row.get("rejected", ()):
            device, _, reason = str(line).partition(": ")
            seen[device] = ([*seen.get(device, ([], ""))[0], str(row.get("round", ""))], reason)
    if not seen:
        return ""
    hostile = set(figures.get("hostile", ()))
    ordered = sorted(seen.items(), key=lambda found: (found[0] not in hostile, -len(found[1][0]), found[0]))
    body = "".join(
        f"<tr><td>{escape(device)}</td>"
        f"<td>{_HOSTILE if device in hostile else 'honest'}</td>"
        f"<td>{escape(', '.join(rounds))}</td><td>{escape(reason)}</td></tr>"
        for device, (rounds, reason) in ordered
    )
    return (
        f"<details{' open' if len(seen) <= OPEN_MAX else ''}><summary>{len(seen)} devices were left out of a round, "
        'and why</summary><div class="scroll"><table><tr><th scope=col>device</th><th scope=col>in truth</th>'
        f"<th scope=col>rounds</th><th scope=col>reason, the last time</th></tr>{body}</table></div></details>"
    )


def machine_facts() -> dict[str, Any]:
    """What the figures were measured on."""
    return {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count() or 1,
            "python": platform.python_version()}  # fmt: skip


def commit_name(folder: Path) -> str:
    """The checked-out commit, with `+` when files differ from it; `unknown` outside a checkout."""
    git = ["git", "--no-optional-locks"]  # looking at a checkout must not write into it
    try:
        name = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=5
        )
        dirty = subprocess.run([*git, "status", "--porcelain"], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    if name.returncode != 0:
        return "unknown"
    return name.stdout.strip() + ("+" if dirty.stdout.strip() else "")
