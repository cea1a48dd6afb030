"""Reports become totals, each report once, and a live rate.

`judge_range` decides from sequence numbers alone whether a report is new, seen before, or leaves a gap. A device folds
its outbox records into reports and repeats a report until it is acknowledged, so duplicates are normal and must change
nothing. `LiveWindow` keeps the last seconds in memory for the page and the metrics; it is not durable and need not be.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Literal

import msgspec

from monitoring.telemetry import ModelSummary, latency_quantile_us, merge_counts


class Fold(msgspec.Struct, frozen=True):
    """What to do with a report: fold it (new, gap), take only its state (empty), or neither (duplicate, overlap).

    `missing` counts the records in the gap."""

    kind: Literal["new", "gap", "duplicate", "overlap", "empty"]
    missing: int = 0


def judge_range(known: int | None, first: int, last: int) -> Fold:
    """Judge the range [first, last] of outbox sequence numbers when all up to `known` are folded (None: none yet).

    A range that begins inside what is known and ends beyond it is an overlap: its summaries cannot be split, so it is
    not folded, and the acknowledgement tells the device to report from `known` + 1 on. A range without records
    (`last` < `first`) is empty: such a report carries only the device's state.
    """
    if last < first:
        return Fold("empty")
    if known is None:
        return Fold("new") if first <= 1 else Fold("gap", first - 1)
    if last <= known:
        return Fold("duplicate")
    if first <= known:
        return Fold("overlap")
    return Fold("new") if first == known + 1 else Fold("gap", first - known - 1)


class LiveRate(msgspec.Struct, frozen=True):
    """What the fleet did over the window: decisions a second, and latency quantiles in microseconds."""

    decisions_per_second: float = 0.0
    latency_p50_us: float = 0.0
    latency_p95_us: float = 0.0
    latency_p99_us: float = 0.0
    latency: dict[int, int] = {}


class LiveWindow:
    """A sliding window over what was folded lately, in slots of one second. Memory is bounded by `seconds` slots."""

    def __init__(self, seconds: int = 10) -> None:
        self._seconds = seconds
        self._slots: deque[tuple[int, int, dict[int, int]]] = deque(maxlen=seconds + 1)
        self._began: float | None = None

    def add(self, now: float, summaries: Iterable[ModelSummary]) -> None:
        """Count what a report said, at the time it was folded."""
        if self._began is None:
            self._began = now
        slot, decisions = int(now), 0
        latency: dict[int, int] = {}
        if self._slots and self._slots[-1][0] >= slot:
            slot, decisions, latency = self._slots.pop()
        for summary in summaries:
            decisions += summary.decisions
            latency = merge_counts(latency, summary.latency)
        self._slots.append((slot, decisions, latency))

    def rate(self, now: float) -> LiveRate:
        """Decisions a second and latency quantiles over the last `seconds`, or since the first report if less."""
        if self._began is None:
            return LiveRate()
        decisions = 0
        latency: dict[int, int] = {}
        for slot, count, counts in self._slots:
            if slot > int(now) - self._seconds:
                decisions += count
                latency = merge_counts(latency, counts)
        span = min(float(self._seconds), max(1.0, now - self._began))
        return LiveRate(
            decisions / span,
            latency_quantile_us(latency, 0.50),
            latency_quantile_us(latency, 0.95),
            latency_quantile_us(latency, 0.99),
            latency,
        )
