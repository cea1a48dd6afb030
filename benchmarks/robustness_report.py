"""Runs of `benchmarks.robustness` as claims, tables and plots."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.attacks import BACKDOORS, UNTARGETED
from benchmarks.claims import ROOT, Claim, at_most

PAGE = ROOT / "docs" / "robustness.md"
Values = NDArray[np.float64]
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
COMPARED = ("Multi-Krum", "robust", "history")
TEXTBOOK = ("FedAvg", "FedAdam", "Krum", "krum")
SWEEP_ATTACKS = ("IPM 0.5", "DnC-aware", "search")
COLOURS = {"FedAvg": "#888888", "Multi-Krum": "#d97706", "robust": "#2563eb", "history": "#059669"}


class Run(msgspec.Struct, frozen=True):
    """One training: what was ordered, and the result. `alpha` infinity means IID."""

    task: str
    alpha: float
    attack: str
    rule: str
    hostile: int
    assumed: int
    seed: int
    quality: float = 0.0
    backdoor: float = 0.0

    @property
    def order(self) -> Run:
        """The run without its result."""
        return msgspec.structs.replace(self, quality=0.0, backdoor=0.0)


class Runs:
    """Results by cell: (task, alpha, attack, rule, hostile, assumed) -> one value a seed."""

    def __init__(self, found: Sequence[Run]) -> None:
        self._cells: dict[tuple[object, ...], dict[int, Run]] = defaultdict(dict)
        for one in found:
            self._cells[one.task, one.alpha, one.attack, one.rule, one.hostile, one.assumed][one.seed] = one

    def quality(self, task: str, alpha: float, attack: str, rule: str, hostile: int, assumed: int) -> Values:
        """Quality in %, one value a seed in order of seeds; empty when the cell was not run."""
        cell = self._cells.get((task, alpha, attack, rule, hostile, assumed), {})
        return np.array([cell[seed].quality for seed in sorted(cell)])

    def backdoor(self, task: str, alpha: float, attack: str, rule: str, hostile: int, assumed: int) -> Values:
        """Backdoor success in %, one value a seed."""
        cell = self._cells.get((task, alpha, attack, rule, hostile, assumed), {})
        return np.array([cell[seed].backdoor for seed in sorted(cell)])

    def having(self, place: int) -> list[object]:
        """Distinct values of one part of the cells' names, in order of appearance."""
        return list(dict.fromkeys(key[place] for key in self._cells))

    def lost(self, task: str, alpha: float, attack: str, rule: str, hostile: int, assumed: int) -> Values:
        """Points lost against FedAvg that nobody attacks, one value a seed of those that both have."""
        calm = self._cells.get((task, alpha, "", "FedAvg", 0, 8), {})
        cell = self._cells.get((task, alpha, attack, rule, hostile, assumed), {})
        return np.array([calm[seed].quality - cell[seed].quality for seed in sorted(calm.keys() & cell.keys())])

    def worst(self, task: str, alpha: float, rule: str, hostile: int = 8) -> tuple[str, Values]:
        """The untargeted attack with the lowest mean, and its values."""
        cells = [(name, self.quality(task, alpha, name, rule, hostile, 8)) for name in UNTARGETED]
        there = [(name, values) for name, values in cells if values.size]
        return min(there, key=lambda cell: float(cell[1].mean())) if there else ("", np.zeros(0))


def complete(found: Sequence[Run]) -> list[Run]:
    """Without runs of a seed that one of the compared rules lacks in the same cell, so that differences are paired."""
    have: dict[tuple[object, ...], set[str]] = defaultdict(set)
    for one in found:
        have[_circumstances(one)].add(one.rule)
    return [one for one in found if one.rule not in COMPARED or have[_circumstances(one)].issuperset(COMPARED)]


def _circumstances(one: Run) -> tuple[object, ...]:
    return one.task, one.alpha, one.attack, one.hostile, one.assumed, one.seed


def spread(values: Values) -> float:
    """Standard error of the mean; 0 for a single value."""
    return float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else 0.0


def behind(runs: Runs, rule: str, alphas: Sequence[float]) -> tuple[int, list[tuple[float, str]]]:
    """Cells (task, split, untargeted attack) in which `rule` is more than two standard errors of the paired difference
    behind the better of Multi-Krum and `robust`: number of cells, and (points, name) of those behind, worst first."""
    count, found = 0, []
    for task in map(str, runs.having(0)):
        for alpha in alphas:
            for attack in UNTARGETED:
                own = runs.quality(task, alpha, attack, rule, 8, 8)
                peers = [runs.quality(task, alpha, attack, peer, 8, 8) for peer in ("Multi-Krum", "robust")]
                if own.size < 2 or any(peer.size != own.size for peer in peers):  # One seed has no standard error.
                    continue
                count += 1
                gaps = [own - peer for peer in peers]
                gap = min(gaps, key=lambda values: float(values.mean()))
                if float(gap.mean()) < -2 * spread(gap):
                    found.append((float(gap.mean()), f"{task} {_name(alpha)} {attack}"))
    return count, sorted(found)


def claims(found: Sequence[Run]) -> list[Claim]:
    """Losses in points of accuracy (fraud: of average precision) of the policy `history`; the baseline is `robust`."""
    runs = Runs(found)
    tasks = [str(task) for task in runs.having(0)]

    def clean_loss(rule: str, assumed: int) -> Values:
        cells = [runs.lost(task, alpha, "", rule, 0, assumed) for task in tasks for alpha in (math.inf, 0.3)]
        return max(cells, key=lambda values: float(values.mean()))

    def worst_loss(rule: str, alpha: float) -> float:
        return max(float(runs.lost(task, alpha, runs.worst(task, alpha, rule)[0], rule, 8, 8).mean()) for task in tasks)

    def clean(name: str, assumed: int, text: str, target: float) -> Claim:
        found = clean_loss("history", assumed)
        told = f"± {spread(found):.2f} points lost on the worst task, {found.size} seeds, f = {text}"
        return at_most(name, float(found.mean()), told, target, float(clean_loss("robust", assumed).mean()))

    _, cells = behind(runs, "history", (math.inf, 0.3))
    _, cells_robust = behind(runs, "robust", (math.inf, 0.3))
    unit = "points lost on the worst task"
    return [
        clean("robust.clean_loss", 2, "5 %", 1),
        clean("robust.clean_loss_25", 8, "25 %", 4),
        at_most("robust.worst_iid", worst_loss("history", math.inf), unit, 5, worst_loss("robust", math.inf)),
        at_most("robust.worst_0.3", worst_loss("history", 0.3), unit, 8, worst_loss("robust", 0.3)),
        at_most("robust.cells_behind", len(cells), "cells behind a peer", 0, len(cells_robust)),
    ]


def write(found: Sequence[Run]) -> None:
    """Replace the part of docs/robustness.md between the markers, and the plots."""
    runs = Runs(complete(found))
    text = PAGE.read_text()
    head, rest = text.split(BEGIN)
    PAGE.write_text(head + BEGIN + "\n\n" + tables(runs) + "\n" + END + rest.split(END)[1])
    for task in map(str, runs.having(0)):
        (PAGE.parent / f"robustness_{task}.svg").write_text(plot(runs, task))


def tables(runs: Runs) -> str:
    """All tables as Markdown."""
    tasks = [str(task) for task in runs.having(0)]
    alphas = [alpha for alpha in (math.inf, 1.0, 0.3, 0.1) if alpha in runs.having(1)]
    rules = [str(rule) for rule in runs.having(3) if rule != "centralised"]
    seeds = ", ".join(f"{_name(alpha)} {_seeds(runs, tasks, alpha, (*COMPARED, *TEXTBOOK))}" for alpha in alphas)
    parts = [
        f"Seeds under attack: {seeds}. ± is the standard error over them.\n",
        *_without_attack(runs, tasks, alphas, rules),
        *_worst_attack(runs, tasks, alphas, rules),
        *(part for task in tasks for part in _each_attack(runs, task, alphas)),
        *_against_the_better(runs, alphas),
        *_by_number_of_attackers(runs, tasks),
        *_backdoors(runs, tasks, alphas, rules),
    ]
    return "\n".join(parts)


# Each section is a heading with its text, and a table.


def _without_attack(runs: Runs, tasks: Sequence[str], alphas: Sequence[float], rules: Sequence[str]) -> tuple[str, str]:
    lines = []
    for task in tasks:
        for alpha in alphas:
            cells = []
            for rule in rules:
                values = [_mean(runs.quality(task, alpha, "", rule, 0, assumed)) for assumed in (8, 2)]
                cells.append(values[0] if rule in ("FedAvg", "FedAdam") or not values[1] else " / ".join(values))
            central = _mean(runs.quality(task, math.inf, "", "centralised", 0, 0)) if math.isinf(alpha) else ""
            lines.append([f"{task} {_name(alpha)}", central, *cells])
    head = "### Nobody attacks\n\nf = 8 assumed / f = 2 assumed; FedAvg does not know f.\n"
    return head, _table(["task, split", "centralised", *rules], lines)


def _worst_attack(runs: Runs, tasks: Sequence[str], alphas: Sequence[float], rules: Sequence[str]) -> tuple[str, str]:
    lines = []
    for task in tasks:
        for alpha in alphas:
            lowest = [runs.worst(task, alpha, rule) for rule in rules]
            lines.append([f"{task} {_name(alpha)}", *(f"{_mean(values)} {name}" for name, values in lowest)])
    head = "### The worst untargeted attack, 8 of 32 devices hostile, f = 8\n"
    return head, _table(["task, split", *rules], lines)


def _each_attack(runs: Runs, task: str, alphas: Sequence[float]) -> tuple[str, str]:
    lines = []
    for attack in UNTARGETED:
        row = [attack]
        for alpha in alphas:
            three = [runs.quality(task, alpha, attack, rule, 8, 8) for rule in COMPARED]
            row.append(" / ".join(f"{one.mean():.1f}" if one.size else "" for one in three))
        lines.append(row)
    head = f"### {task}, attack by attack\n\nMulti-Krum / `robust` / `history`, 8 of 32 hostile.\n"
    return head, _table(["attack", *(_name(alpha) for alpha in alphas)], lines)


def _against_the_better(runs: Runs, alphas: Sequence[float]) -> tuple[str, str]:
    lines = []
    for alpha in alphas:
        count, cells_behind = behind(runs, "history", [alpha])
        count_robust = len(behind(runs, "robust", [alpha])[1])
        count_krum = len(behind(runs, "Multi-Krum", [alpha])[1])
        listed = "; ".join(f"{name.split(' ', 2)[0]} {name.split(' ', 2)[2]} {gap:.1f}" for gap, name in cells_behind)
        names = [str(count), str(len(cells_behind)), str(count_robust), str(count_krum), listed]
        lines.append([_name(alpha), *names])
    head = (
        "### Against the better of Multi-Krum and clip + DnC, cell by cell\n\n"
        "A cell is a task, a split and an untargeted attack; behind means by more than two standard errors of the "
        "paired difference.\n"
    )
    columns = ["cells", "`history` behind", "`robust` behind", "Multi-Krum behind", "where `history` is behind"]
    return head, _table(["split", *columns], lines)


def _by_number_of_attackers(runs: Runs, tasks: Sequence[str]) -> tuple[str, str, str]:
    numbers = [number for number in sorted(int(str(value)) for value in runs.having(4)) if number in (1, 3, 6, 8, 10)]
    lines = []
    for task in tasks:
        for rule in COMPARED:
            lines.append([f"{task} `{rule}`", *(_swept(runs, task, rule, number) for number in numbers)])
    head = "### Other numbers of attackers\n\nDirichlet 0.3, f = 8 assumed, worst of three attacks.\n"
    plots = "".join(f"![{task} by number of attackers](robustness_{task}.svg)\n" for task in tasks)
    return head, _table(["task, rule", *(f"{number} of 32" for number in numbers)], lines), plots


def _backdoors(runs: Runs, tasks: Sequence[str], alphas: Sequence[float], rules: Sequence[str]) -> tuple[str, str]:
    lines = []
    for task in tasks:
        for alpha in alphas:
            row = [f"{task} {_name(alpha)}"]
            for rule in rules:
                three = [runs.backdoor(task, alpha, "", rule, 0, 8)]
                three += [runs.backdoor(task, alpha, name, rule, 6, 8) for name in BACKDOORS]
                row.append(" / ".join(f"{one.mean():.0f}" for one in three) if three[2].size else "")
            lines.append(row)
    head = "### Backdoors\n\nSuccess in %, 6 of 32 hostile: nobody attacks / quiet / five times as long.\n"
    return head, _table(["task, split", *rules], lines)


def _seeds(runs: Runs, tasks: Sequence[str], alpha: float, rules: Sequence[str]) -> str:
    """How many seeds the cells of a split have: the fewest and, where they differ, the most."""
    sizes = [
        runs.quality(task, alpha, attack, rule, 8, 8).size
        for task in tasks
        for attack in UNTARGETED
        for rule in rules
        if rule in runs.having(3)
    ]
    low, high = min(sizes, default=0), max(sizes, default=0)
    return str(low) if low == high else f"{low} to {high}"


def _swept(runs: Runs, task: str, rule: str, hostile: int) -> str:
    low = _lowest(runs, task, rule, hostile)
    return f"{low:.1f}" if low is not None else ""


def _lowest(runs: Runs, task: str, rule: str, hostile: int) -> float | None:
    cells = [runs.quality(task, 0.3, name, rule, hostile, 8) for name in SWEEP_ATTACKS]
    return min((float(values.mean()) for values in cells if values.size), default=None)


def plot(runs: Runs, task: str) -> str:
    """Worst of three attacks over the number of attackers, Dirichlet 0.3, as a page-independent SVG."""
    width, height, left, bottom, top = 560, 300, 48, 40, 34
    lines = {
        rule: [(0, float(runs.quality(task, 0.3, "", rule, 0, 8).mean()))]
        + [(n, low) for n in (1, 3, 6, 8, 10) if (low := _lowest(runs, task, rule, n)) is not None]
        for rule in COMPARED
    }

    def at(x: float, y: float) -> str:
        return f"{left + x / 10 * (width - left - 20):.1f},{height - bottom - y / 100 * (height - bottom - top):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12"><title>{task}: worst of three attacks by number of attackers</title>'
        f'<rect width="{width}" height="{height}" fill="white"/>'
    ]
    for value in range(0, 101, 20):
        x, y = at(0, value).split(",")
        parts.append(f'<line x1="{x}" x2="{width - 20}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{float(x) - 6}" y="{float(y) + 4}" text-anchor="end">{value}</text>')
    for number in (0, 1, 3, 6, 8, 10):
        x = at(number, 0).split(",")[0]
        parts.append(f'<text x="{x}" y="{height - bottom + 16}" text-anchor="middle">{number}</text>')
    parts.append(f'<text x="{width / 2}" y="{height - 6}" text-anchor="middle">hostile devices of 32 (f = 8)</text>')
    for place, (rule, points) in enumerate(lines.items()):
        path = " ".join(at(x, y) for x, y in points)
        colour = COLOURS[rule]
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.4"/>')
        parts.append(f'<text x="{left + 10 + place * 120}" y="20" fill="{colour}" font-weight="bold">{rule}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _mean(values: Values) -> str:
    if not values.size:
        return ""
    return f"{values.mean():.1f}" + (f" ± {spread(values):.1f}" if values.size > 1 else "")


def _name(alpha: float) -> str:
    return "IID" if math.isinf(alpha) else f"{alpha:g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"
