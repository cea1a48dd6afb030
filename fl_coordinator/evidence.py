"""Tests that stay honest however often one looks.

A rollout is judged every second until it ends. A fixed-sample test repeated at every look raises false alarms about a
third of the time; the two tests here bound the chance that a healthy version is *ever* stopped.

`rate_bounds` is a confidence sequence for a proportion: Robbins' mixture (Ann. Math. Statist. 41, 1970) with the
Beta(1/2, 1/2) prior. With probability 1 - alpha the true rate lies inside the bounds at all times at once.

`RatioEvidence` compares two failure rates: given how many failures fell between two looks, under the hypothesis
"target <= ratio x control" each of them is the target's with a known probability (the share of exposures), so the
likelihood ratio against a mixture of worse rates is a test martingale (Ville's inequality). It is exact for rare
failures and conservative for common ones; no base rate enters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import msgspec

from monitoring.telemetry import LATENCY_BOUNDS_US, latency_bucket

ALTERNATIVES: tuple[float, ...] = (1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
"""How much worse than allowed the mixture supposes the target to be, equally weighted."""


def rate_bounds(hits: int, total: int, alpha: float) -> tuple[float, float]:
    """Lower and upper bound of a rate after `hits` in `total`; both hold at all looks with probability 1 - alpha."""
    if total <= 0:
        return 0.0, 1.0
    misses = total - hits
    mixture = (
        math.lgamma(hits + 0.5) + math.lgamma(misses + 0.5) - math.lgamma(total + 1) - 2 * math.lgamma(0.5)
    ) + math.log(alpha)

    def excluded(rate: float) -> bool:
        likelihood = (hits * math.log(rate) if hits else 0.0) + (misses * math.log1p(-rate) if misses else 0.0)
        return mixture >= likelihood

    middle = hits / total
    lower = 0.0 if hits == 0 else _edge(excluded, 1e-12, middle)
    upper = 1.0 if misses == 0 else _edge(excluded, 1.0 - 1e-12, middle)
    return lower, upper


def _edge(excluded: Callable[[float], bool], outside: float, inside: float) -> float:
    if not excluded(outside):
        return round(outside)
    for _ in range(60):
        middle = (outside + inside) / 2
        if excluded(middle):
            outside = middle
        else:
            inside = middle
    return outside


class Counts(msgspec.Struct, frozen=True):
    """Exposures and failures of both arms, since the rollout began."""

    target_total: int = 0
    target_hits: int = 0
    control_total: int = 0
    control_hits: int = 0


class RatioEvidence(msgspec.Struct, frozen=True):
    """What is known so far against "target rate <= ratio x control rate": the counts last seen, and the logarithm of
    the likelihood ratio for each alternative."""

    seen: Counts = Counts()
    log_ratios: tuple[float, ...] = (0.0,) * len(ALTERNATIVES)

    @property
    def log_evidence(self) -> float:
        """log of the mixture's likelihood ratio; it exceeds log(1/alpha) for a healthy version with chance < alpha."""
        peak = max(self.log_ratios)
        return peak + math.log(sum(math.exp(value - peak) for value in self.log_ratios) / len(self.log_ratios))


def observe(evidence: RatioEvidence, counts: Counts, ratio: float) -> RatioEvidence:
    """Take one more look at the cumulative `counts`; the hypothesis is "target <= `ratio` x control"."""
    target_total = counts.target_total - evidence.seen.target_total
    control_total = counts.control_total - evidence.seen.control_total
    target_hits = counts.target_hits - evidence.seen.target_hits
    control_hits = counts.control_hits - evidence.seen.control_hits
    if min(target_total, control_total, target_hits, control_hits) < 0:
        return evidence  # totals only grow; a restored older ledger waits until they have caught up
    if target_total == 0 or control_total == 0:
        # No share of exposures to compare with: take the failures when both arms have been exposed.
        return evidence
    expected = ratio * target_total / (ratio * target_total + control_total)
    values = []
    for alternative, before in zip(ALTERNATIVES, evidence.log_ratios, strict=True):
        supposed = expected * alternative / (expected * alternative + 1 - expected)
        values.append(
            before
            + target_hits * math.log(supposed / expected)
            + control_hits * (math.log1p(-supposed) - math.log1p(-expected))
        )
    return RatioEvidence(counts, tuple(values))


def exceeding(latency: Mapping[int, int], limit_us: float) -> int:
    """How many latencies certainly lie above `limit_us` (whole buckets above the one that holds it)."""
    bucket = latency_bucket(limit_us)
    return sum(count for index, count in latency.items() if index > bucket)


def quantile_upper_bound_us(latency: Mapping[int, int], q: float, alpha: float) -> float | None:
    """A latency that the `q` quantile does not exceed, at all looks with probability 1 - alpha; None while unknown.

    Holds for all bucket bounds at once (alpha is split over them), since the bound is chosen by looking.
    """
    total = sum(latency.values())
    each = alpha / len(LATENCY_BOUNDS_US)
    above = total
    for index, bound in enumerate(LATENCY_BOUNDS_US):
        above -= latency.get(index, 0)
        if rate_bounds(above, total, each)[1] <= 1 - q:
            return bound
    return None
