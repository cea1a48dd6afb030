"""What stops a rollout: each guardrail of its YAML, held against the health of both arms.

Guardrails are looked at every second, so each is a test that stays valid under repeated looks (`evidence`); the 5 %
chance of stopping a healthy version is split over the guardrails. Decisions of one device resemble each other, which no
test over decisions accounts for: give rates a margin (`ratioToControl: 2`) when the canary is a single device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from fl_coordinator.cohorts import Guardrail
from fl_coordinator.evidence import (
    Counts,
    RatioEvidence,
    exceeding,
    observe,
    quantile_upper_bound_us,
    rate_bounds,
)
from monitoring.health import ArmHealth, CohortHealth
from monitoring.telemetry import LATENCY_BOUNDS_US, ModelSummary, latency_quantile_us

ALPHA = 0.05


class Verdict(msgspec.Struct, frozen=True):
    """One guardrail at one look: `breached`, the figure seen, what it was held against, and a sentence. `judged` is
    False while even the worst figures could not breach it: too little was seen to call it healthy."""

    metric: str
    breached: bool
    value: float
    limit: float
    text: str
    judged: bool = True


def judge(
    rails: Sequence[Guardrail],
    seen: Mapping[int, RatioEvidence],
    health: CohortHealth,
    *,
    stage_age: float,
    first: bool,
) -> tuple[dict[int, RatioEvidence], tuple[Verdict, ...]]:
    """One look at all guardrails; the evidence to hand in at the next one, by a ratio guardrail's position, and the
    verdicts. `stage_age` in seconds; `first` says that nobody runs anything beside the target."""
    evidence = dict(seen)
    verdicts: list[Verdict] = []
    tests = sum((rail.max is not None) + (rail.max_increase is not None) + (rail.ratio is not None) for rail in rails)
    alpha = ALPHA / max(1, tests)
    for index, rail in enumerate(rails):
        if rail.metric == "silence":
            verdicts.append(_silence(rail, health, stage_age, first=first))
        elif rail.metric in ("rolled_back", "safe_mode"):
            verdicts.append(_count(rail, health.target))
        elif rail.metric.startswith("latency_"):
            verdicts.extend(_latency(rail, health, alpha))
        else:
            counts = Counts(*_rate(rail.metric, health.target.decided), *_rate(rail.metric, health.control.decided))
            if rail.ratio is not None:
                evidence[index] = observe(evidence.get(index, RatioEvidence()), counts, rail.ratio)
            others = _without_the_worst([_rate(rail.metric, one) for one in health.target.by_device])
            verdicts.extend(_rates(rail, counts, others, evidence.get(index), alpha))
    return evidence, tuple(verdicts)


def _without_the_worst(devices: Sequence[tuple[int, int]]) -> float:
    """The failure rate of all devices but the one with most failures; of the only one, if there is no other.

    `devices` are exposures and failures by device. The tests count decisions, and the decisions of one device are not
    independent: a broken or hostile one could stop a rollout by itself. So where several devices have something to say,
    a breach has to be seen without the loudest of them too. That only takes alarms away, so the tests stay valid."""
    spoke = [(total, hits) for total, hits in devices if total]
    if len(spoke) > 1:
        spoke.remove(max(spoke, key=lambda one: (one[1], one[0])))
    total = sum(total for total, _ in spoke)
    return sum(hits for _, hits in spoke) / total if total else 0.0


def _confirmed(breached: bool, others: float, limit: float, text: str) -> tuple[bool, str]:
    """Whether a breach also shows without the loudest device, and the text, which says so when it does not."""
    if breached and others <= limit:
        return False, f"{text}; one device alone, without it {others:.2%}"
    return breached, text


def _rate(metric: str, decided: ModelSummary) -> tuple[int, int]:
    """Exposures and failures in a summary for a rate metric."""
    if metric == "error_rate":
        return decided.answers, decided.errors
    if metric == "fallback_rate":
        return decided.answers, decided.fallbacks
    if metric == "decline_rate":
        return decided.decisions, decided.declined
    if metric == "false_positive_rate":
        return decided.labelled_legitimate, decided.false_positives
    return decided.labelled_fraud, decided.labelled_fraud - decided.true_positives  # miss_rate


def _rates(
    rail: Guardrail, counts: Counts, others: float, evidence: RatioEvidence | None, alpha: float
) -> list[Verdict]:
    seen = counts.target_hits / counts.target_total if counts.target_total else 0.0
    beside = counts.control_hits / counts.control_total if counts.control_total else 0.0
    told = f"{rail.metric} {seen:.2%} of {counts.target_total}"
    found: list[Verdict] = []
    if rail.max is not None:
        lower, _ = rate_bounds(counts.target_hits, counts.target_total, alpha)
        worst, _ = rate_bounds(counts.target_total, counts.target_total, alpha)
        text = f"{told}, allowed {rail.max:.2%}"
        breached, text = _confirmed(lower > rail.max, others, rail.max, text)
        found.append(Verdict(rail.metric, breached, seen, rail.max, text, worst > rail.max))
    if rail.max_increase is not None:
        lower, _ = rate_bounds(counts.target_hits, counts.target_total, alpha / 2)
        _, upper = rate_bounds(counts.control_hits, counts.control_total, alpha / 2)
        text = f"{told}, control {beside:.2%} of {counts.control_total}, allowed + {rail.max_increase:.2%}"
        worst, _ = rate_bounds(counts.target_total, counts.target_total, alpha / 2)
        limit = upper + rail.max_increase
        breached, text = _confirmed(lower > limit, others, beside + rail.max_increase, text)
        found.append(Verdict(rail.metric, breached, seen, beside + rail.max_increase, text, worst > limit))
    if rail.ratio is not None and evidence is not None:
        text = f"{told}, control {beside:.2%} of {counts.control_total}, allowed {rail.ratio:g} times control"
        breached, text = _confirmed(evidence.log_evidence >= math.log(1 / alpha), others, beside * rail.ratio, text)
        judged = counts.target_total > 0 and counts.control_total > 0
        found.append(Verdict(rail.metric, breached, seen, beside * rail.ratio, text, judged))
    return found


def _latency(rail: Guardrail, health: CohortHealth, alpha: float) -> list[Verdict]:
    """Whether the quantile lies above a limit: too large a share of decisions took longer than the limit."""
    q = {"latency_p50_ms": 0.50, "latency_p95_ms": 0.95, "latency_p99_ms": 0.99}[rail.metric]
    latency = health.target.decided.latency
    each_latency = [one.latency for one in health.target.by_device]
    total = sum(latency.values())
    seen_ms = latency_quantile_us(latency, q) / 1000
    found: list[Verdict] = []
    if rail.max is not None:
        lower, _ = rate_bounds(exceeding(latency, rail.max * 1000), total, alpha)
        text = f"{rail.metric} {seen_ms:.3g} ms over {total} decisions, allowed {rail.max:g} ms"
        worst, _ = rate_bounds(total, total, alpha)
        others = _without_the_worst([(sum(one.values()), exceeding(one, rail.max * 1000)) for one in each_latency])
        breached, text = _confirmed(lower > 1 - q, others, 1 - q, text)
        found.append(Verdict(rail.metric, breached, seen_ms, rail.max, text, worst > 1 - q))
    if rail.ratio is not None:
        control_us = quantile_upper_bound_us(health.control.decided.latency, q, alpha / 2)
        limit_us = rail.ratio * control_us if control_us is not None else math.inf
        # The limit is one of as many values as there are buckets, chosen by looking: alpha is split over them.
        each = alpha / 2 / len(LATENCY_BOUNDS_US)
        above = exceeding(latency, limit_us) if control_us is not None else 0
        lower, _ = rate_bounds(above, total, each)
        limit_ms = limit_us / 1000 if control_us is not None else 0.0
        allowed = f"{limit_ms:.3g} ms ({rail.ratio:g} times control)"
        text = f"{rail.metric} {seen_ms:.3g} ms over {total} decisions, allowed {allowed}"
        worst, _ = rate_bounds(total, total, each)
        judged = control_us is not None and worst > 1 - q
        others = _without_the_worst(
            [(sum(one.values()), exceeding(one, limit_us) if control_us is not None else 0) for one in each_latency]
        )
        breached, text = _confirmed(lower > 1 - q, others, 1 - q, text)
        found.append(Verdict(rail.metric, breached, seen_ms, limit_ms, text, judged))
    return found


def _count(rail: Guardrail, arm: ArmHealth) -> Verdict:
    seen = arm.rolled_back if rail.metric == "rolled_back" else arm.safe_mode
    limit = rail.max or 0.0
    return Verdict(rail.metric, seen > limit, seen, limit, f"{rail.metric}: {seen} devices, allowed {limit:g}")


def _silence(rail: Guardrail, health: CohortHealth, stage_age: float, *, first: bool) -> Verdict:
    """A silent target arm beside a talking control arm; when both are silent, the line is to blame and nothing is said.

    Judged only when a device has had the time to fall silent since the stage began, and never of a `first` version:
    nobody is beside it, and its devices have nothing else to run. The stage waits for them."""
    share, beside = health.target.silent_share, health.control.silent_share
    text = (
        f"silence: {health.target.silent} of {health.target.devices} devices not heard for {rail.within_seconds:g} s, "
        f"control {beside:.0%}, allowed + {rail.share:.0%}"
    )
    breached = not first and stage_age >= rail.within_seconds and share > beside + rail.share
    return Verdict("silence", breached, share, beside + rail.share, text)
