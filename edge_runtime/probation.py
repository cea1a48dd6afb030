"""Judging a freshly switched slot: does it run here as it ran at the publisher's, fast enough, without errors?

Pure: the shell runs the golden inputs and the live decisions, these functions say what that means. Two judgements:

1. `judge_golden` before the first live answer: each golden output within the case's absolute tolerance.
2. `judge_live` over the live decisions since the switch: error share, then latency against `latency_ms_max`. It says
   "wait" until enough decisions or seconds have passed, but does not wait to condemn: a version that already cannot
   pass is unhealthy now.

Latency is judged by a quantile of live decisions, not by its mean: one slow answer after a switch (cold caches) is
normal, a tenth of them is not. And slow answers come in bursts, when a device is busy with something else: a version
whose first answers were slow has more of them to show that it is not the cause.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np

from edge_runtime.inference import Arrays, array_of
from model_delta.manifest import GoldenCase, Requirements


class Verdict(msgspec.Struct, frozen=True):
    """The judgement and its reason ("" while waiting)."""

    outcome: Literal["healthy", "unhealthy", "wait"]
    reason: str = ""


class ProbationRules(msgspec.Struct, frozen=True):
    """How long probation lasts (`decisions` answers or `seconds`, whichever comes first) and what it forgives. With too
    many slow answers among them it goes on, for up to `latency_decisions` answers."""

    decisions: int = 20
    latency_decisions: int = 60
    seconds: float = 20.0
    error_share_max: float = 0.02
    latency_quantile: float = 0.9


class LiveRecord(msgspec.Struct, frozen=True):
    """Live answers since the switch: latencies of those that worked (ms), how many failed, seconds gone by."""

    latencies_ms: tuple[float, ...] = ()
    errors: int = 0
    seconds: float = 0.0


def judge_golden(cases: Sequence[GoldenCase], found: Sequence[Arrays]) -> Verdict:
    """Compare `found[i]` (the outputs of running case i here) with what the publisher saw. No cases: healthy.

    Raises Malformed if a golden case itself is broken (it was signed so: the publisher's mistake).
    """
    if len(cases) != len(found):
        return Verdict("unhealthy", f"golden cases: expected {len(cases)} results, found {len(found)}")
    for index, (case, outputs) in enumerate(zip(cases, found, strict=True)):
        for name, tensor in case.outputs.items():
            expected = array_of(tensor, f"golden case {index}: output {name}")
            if name not in outputs:
                return Verdict("unhealthy", f"golden case {index}: expected an output {name!r}, found none")
            seen = np.asarray(outputs[name])
            if seen.shape != expected.shape:
                return Verdict(
                    "unhealthy", f"golden case {index}: {name} has shape {seen.shape}, expected {expected.shape}"
                )
            worst = float(np.max(np.abs(seen.astype(np.float64) - expected.astype(np.float64)), initial=0.0))
            if not worst <= case.tolerance:  # NaN fails too
                return Verdict(
                    "unhealthy",
                    f"golden case {index}: {name} differs by {worst:.3g}, at most {case.tolerance:.3g} is allowed",
                )
    return Verdict("healthy", f"{len(cases)} golden case(s) agree")


def judge_live(live: LiveRecord, requirements: Requirements, rules: ProbationRules) -> Verdict:
    """What the live answers so far say about the version. "wait" until the probation is over, unless it already failed.

    A probation that ends by time with fewer answers than asked judges those it has; with none at all the golden cases
    stand alone (a terminal at night must not stay on probation for ever).
    """
    answers = len(live.latencies_ms)
    total = answers + live.errors
    if live.errors > math.floor(rules.error_share_max * max(total, rules.decisions)):
        return Verdict("unhealthy", f"{live.errors} of {total} live answers failed")
    slow = sum(latency > requirements.latency_ms_max for latency in live.latencies_ms)
    over = live.seconds >= rules.seconds
    if slow > _slow_max(answers if over else max(answers, rules.decisions, rules.latency_decisions), rules):
        return Verdict(
            "unhealthy", f"{slow} of {answers} live answers took more than {requirements.latency_ms_max:g} ms"
        )
    if not over and (total < rules.decisions or slow > _slow_max(answers, rules)):
        return Verdict("wait")
    if total and live.errors > rules.error_share_max * total:
        return Verdict("unhealthy", f"{live.errors} of {total} live answers failed")
    return Verdict("healthy", f"{total} live answers in {live.seconds:.1f} s")


def _slow_max(answers: int, rules: ProbationRules) -> int:
    """How many of so many answers may be slow: one always, the first after a switch."""
    return max(1, math.floor((1.0 - rules.latency_quantile) * answers + 1e-9))
