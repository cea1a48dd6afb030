"""The gates between a candidate and a release: pure comparisons of what was measured on both versions.

A round's result is a file until every gate passes. Each gate returns its reason either way, so that a refusal can be
read at three in the morning. The evaluation itself (a held-out set, a runtime) is handed in by the wiring.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from model_delta.manifest import Manifest


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What a version reached on the held-out set: average precision overall and by slice (with the number of frauds in
    it), the 95 % quantile of single-row latency, and the size of its file."""

    average_precision: float
    slices: dict[str, float] = {}
    slice_frauds: dict[str, int] = {}
    latency_p95_us: float = 0.0
    size_bytes: int = 0


Evaluate = Callable[[Manifest, bytes], Evaluation]
"""(manifest, plain file) -> what it reaches. Blocks."""


class Gate(msgspec.Struct, frozen=True):
    """One comparison: its name, whether the candidate passed, and the figures in words."""

    name: str
    passed: bool
    reason: str


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much worse a candidate may be. Losses are absolute average precision; ratios are to the stable version.

    A slice with fewer than `slice_frauds_min` frauds says nothing and is passed over. Latency within
    `latency_slack_us` of the stable version always passes: below that the clock decides, not the model."""

    precision_loss_max: float = 0.01
    slice_loss_max: float = 0.10
    slice_frauds_min: int = 20
    latency_ratio_max: float = 2.0
    latency_slack_us: float = 200.0
    size_ratio_max: float = 1.5


DEFAULT_LIMITS = Limits()


def judge(candidate: Evaluation, stable: Evaluation, limits: Limits = DEFAULT_LIMITS) -> tuple[Gate, ...]:
    """All gates, in a fixed order. The candidate is promoted if every one of them passed."""
    return (
        _precision(candidate, stable, limits),
        *_slices(candidate, stable, limits),
        _latency(candidate, stable, limits),
        _size(candidate, stable, limits),
    )


def failed(gates: tuple[Gate, ...]) -> str:
    """The reasons of the gates that did not pass; "" when all did."""
    return "; ".join(f"{gate.name}: {gate.reason}" for gate in gates if not gate.passed)


def _precision(candidate: Evaluation, stable: Evaluation, limits: Limits) -> Gate:
    loss = stable.average_precision - candidate.average_precision
    reason = (
        f"average precision {candidate.average_precision:.4f}, stable {stable.average_precision:.4f}, "
        f"allowed loss {limits.precision_loss_max:g}"
    )
    # Written so that a NaN on either side fails.
    return Gate("precision", loss <= limits.precision_loss_max, reason)


def _slices(candidate: Evaluation, stable: Evaluation, limits: Limits) -> tuple[Gate, ...]:
    gates = []
    for name in sorted(_judged(stable.slices, stable.slice_frauds, limits)):
        before, after = stable.slices[name], candidate.slices.get(name)
        if after is None:
            gates.append(Gate(f"slice {name}", False, "expected a figure for the candidate, found none"))
            continue
        reason = f"average precision {after:.4f}, stable {before:.4f}, allowed loss {limits.slice_loss_max:g}"
        gates.append(Gate(f"slice {name}", before - after <= limits.slice_loss_max, reason))
    return tuple(gates)


def _judged(slices: Mapping[str, float], frauds: Mapping[str, int], limits: Limits) -> list[str]:
    return [name for name in slices if frauds.get(name, limits.slice_frauds_min) >= limits.slice_frauds_min]


def _latency(candidate: Evaluation, stable: Evaluation, limits: Limits) -> Gate:
    allowed = max(stable.latency_p95_us * limits.latency_ratio_max, stable.latency_p95_us + limits.latency_slack_us)
    reason = f"p95 {candidate.latency_p95_us:.0f} us, stable {stable.latency_p95_us:.0f} us, allowed {allowed:.0f} us"
    return Gate("latency", candidate.latency_p95_us <= allowed, reason)


def _size(candidate: Evaluation, stable: Evaluation, limits: Limits) -> Gate:
    allowed = int(stable.size_bytes * limits.size_ratio_max)
    reason = f"{candidate.size_bytes} bytes, stable {stable.size_bytes} bytes, allowed {allowed} bytes"
    return Gate("size", candidate.size_bytes <= allowed, reason)
