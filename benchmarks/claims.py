"""The form of a benchmark's result.

`{"machine", "commit", "claims": [{"id", "value", "unit", "target", "baseline", "ratio", "met"}]}`: `target` is the
bound as text (`<= 180`), `baseline` what was measured beside it in the same run (null when there is no peer), `ratio`
value over baseline.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from atoll.report import commit_name, machine_facts

ROOT = Path(__file__).resolve().parent.parent


class Claim(msgspec.Struct, frozen=True):
    """One measured figure against its target."""

    id: str
    value: float
    unit: str
    target: str
    baseline: float | None
    ratio: float | None
    met: bool


def at_most(name: str, value: float, unit: str, bound: float, baseline: float | None = None) -> Claim:
    """A claim that `value` does not exceed `bound`."""
    ratio = round(value / baseline, 4) if baseline else None
    return Claim(name, _shown(value), unit, f"<= {bound:g}", baseline, ratio, value <= bound)


def at_least(name: str, value: float, unit: str, bound: float, baseline: float | None = None) -> Claim:
    """A claim that `value` reaches `bound`."""
    ratio = round(value / baseline, 4) if baseline else None
    return Claim(name, _shown(value), unit, f">= {bound:g}", baseline, ratio, value >= bound)


def at_most_share(name: str, value: float, unit: str, share: float, baseline: float) -> Claim:
    """A claim that `value` does not exceed `share` of what was measured beside it."""
    ratio = round(value / baseline, 4)
    return Claim(name, round(value, 4), unit, f"<= {share:g} x baseline", baseline, ratio, value <= share * baseline)


def _shown(value: float) -> float:
    """Four digits behind the point, or in all where that would leave none."""
    return round(value, 4) if abs(value) >= 0.001 else float(f"{value:.3g}")


def run(
    description: str, measure: Callable[[argparse.Namespace], Sequence[Claim]], parser: argparse.ArgumentParser
) -> None:
    """Parse options, measure, print a table or one JSON object."""
    parser.description = description
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    claims = measure(options)
    if options.json:
        result = {"machine": machine_facts(), "commit": commit_name(ROOT), "claims": msgspec.to_builtins(claims)}
        print(json.dumps(result))
        return
    print(table(claims))


def table(claims: Sequence[Claim]) -> str:
    """Claims as a Markdown table."""
    lines = ["| claim | value | target | baseline | ratio | met |", "|---|---|---|---|---|---|"]
    for claim in claims:
        baseline = "" if claim.baseline is None else f"{claim.baseline:g}"
        ratio = "" if claim.ratio is None else f"{claim.ratio:g}"
        lines.append(
            f"| {claim.id} | {claim.value:g} {claim.unit} | {claim.target} | {baseline} | {ratio} "
            f"| {'yes' if claim.met else 'no'} |"
        )
    return "\n".join(lines)
