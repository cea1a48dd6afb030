"""Reports become totals, each report once, and a live rate.

`judge_range` decides from sequence numbers alone whether a report is new, seen before, or leaves a gap. A device folds
its outbox records into reports and repeats a report until it is acknowledged, so duplicates are normal and must change
nothing. `require_plausible` refuses what no device could have folded from its outbox, before anything is added up: one
report can move the totals by no more than the records it stands for. `LiveWindow` keeps the last seconds in memory for
the page and the metrics; it is not durable and need not be.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from math import isfinite
from typing import Literal

import msgspec

from model_delta.errors import Malformed
from monitoring.telemetry import LATENCY_BOUNDS_US, ModelSummary, Report, latency_quantile_us, merge_counts

REPORT_BYTES_MAX = 256 * 1024
REPORT_RECORDS_MAX = 20_000
"""The longest range of outbox records in one report; devices send at most 5,000."""
PARTS_MAX = 256
"""The most summaries, and the most outcomes, in one report."""
COUNT_MAX = 2**53
OUTCOMES = frozenset({"adopted", "rolled_back", "refused", "withdrawn", "safe_mode"})


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


def require_plausible(report: Report) -> None:
    """Raise Malformed for a report that cannot be the fold of its range of records.

    Counts are not negative, parts are not larger than their whole, and no count is larger than the range; texts and
    lists are bounded, numbers finite. Who sends it may still lie, but only about records that it has numbers for.
    """
    records = max(0, report.last_sequence - report.first_sequence + 1)
    if len(report.summaries) > PARTS_MAX or len(report.outcomes) > min(records, PARTS_MAX):
        raise _implausible(report, f"at most {PARTS_MAX} summaries and as many outcomes as records", "more")
    if not 0 <= report.epoch < 2**64 or records > REPORT_RECORDS_MAX:
        raise _implausible(report, f"an epoch of 64 bits and at most {REPORT_RECORDS_MAX} records", f"{records}")
    whole = (
        report.first_sequence,
        report.last_sequence,
        report.plan_serial,
        report.dropped,
        report.lost_requests,
        *(outcome.bytes_received for outcome in report.outcomes),
    )
    if not all(0 <= number <= COUNT_MAX for number in whole):
        raise _implausible(report, f"counts from 0 to {COUNT_MAX}", "others")
    measured = [report.time]
    for outcome in report.outcomes:
        measured += [outcome.seconds, outcome.seconds_active, outcome.time]
    if not all(isfinite(number) for number in measured):
        raise _implausible(report, "finite times", "others")
    texts = [report.device_id, report.state, report.running, *(summary.manifest for summary in report.summaries)]
    texts += [text for outcome in report.outcomes for text in (outcome.manifest, outcome.route)]
    if any(len(text) > 64 for text in texts) or any(len(outcome.reason) > 500 for outcome in report.outcomes):
        raise _implausible(report, "names of at most 64 and reasons of at most 500 characters", "longer ones")
    if report.sitting_out is not msgspec.UNSET and len(report.sitting_out.round_id) > 200:
        raise _implausible(report, "the name of a round of at most 200 characters", "a longer one")
    unknown = {outcome.event for outcome in report.outcomes} - OUTCOMES
    if unknown:
        raise _implausible(report, f"outcomes of {', '.join(sorted(OUTCOMES))}", repr(sorted(unknown)[0][:32]))
    for summary in report.summaries:
        _require_whole(report, summary)
    answered = sum(summary.answers for summary in report.summaries)
    labelled = sum(summary.labelled_legitimate + summary.labelled_fraud for summary in report.summaries)
    if answered > records or labelled > records:
        raise _implausible(report, f"at most {records} answers and labels", f"{answered} and {labelled}")


def _require_whole(report: Report, summary: ModelSummary) -> None:
    parts = (
        (summary.declined, summary.decisions),
        (summary.inferences, summary.answers),
        (summary.errors, summary.answers),
        (summary.fallbacks, summary.answers),
        (summary.false_positives, summary.labelled_legitimate),
        (summary.true_positives, summary.labelled_fraud),
        (sum(summary.latency.values()), summary.answers),
    )
    if not all(0 <= part <= whole for part, whole in parts) or min(summary.latency.values(), default=0) < 0:
        raise _implausible(report, "counts from 0 to the number that they are part of", "others")
    if not all(0 <= index <= len(LATENCY_BOUNDS_US) for index in summary.latency):
        raise _implausible(report, f"latency buckets from 0 to {len(LATENCY_BOUNDS_US)}", "others")


def _implausible(report: Report, expected: str, found: str) -> Malformed:
    return Malformed(f"report of {report.device_id[:64]!r}: expected {expected}, found {found}; not folded")


class LiveRate(msgspec.Struct, frozen=True):
    """What the fleet did over the window: answers (decisions, inferences) a second, latency quantiles in us."""

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
            decisions += summary.answers
            latency = merge_counts(latency, summary.latency)
        self._slots.append((slot, decisions, latency))

    def rate(self, now: float) -> LiveRate:
        """Answers a second and latency quantiles over the last `seconds`, or since the first report if less."""
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
