import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_delta.errors import Malformed
from monitoring.collector import PARTS_MAX, Fold, LiveWindow, judge_range, require_plausible
from monitoring.telemetry import LATENCY_BOUNDS_US, ModelSummary, Report, UpdateOutcome, latency_bucket


@pytest.mark.parametrize(
    ("known", "first", "last", "expected"),
    [
        (None, 0, 4, Fold("new")),
        (None, 1, 4, Fold("new")),
        (None, 5, 9, Fold("gap", 4)),
        (4, 5, 9, Fold("new")),
        (4, 5, 5, Fold("new")),
        (None, 1, 1, Fold("new")),
        (4, 8, 9, Fold("gap", 3)),
        (4, 1, 4, Fold("duplicate")),
        (4, 2, 3, Fold("duplicate")),
        (4, 3, 9, Fold("overlap")),
        (4, 5, 4, Fold("empty")),
        (None, 1, 0, Fold("empty")),
    ],
)
def test_a_range_is_judged_by_its_numbers(known: int | None, first: int, last: int, expected: Fold) -> None:
    assert judge_range(known, first, last) == expected


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 10)), max_size=40))
def test_no_record_is_ever_folded_twice(ranges: list[tuple[int, int]]) -> None:
    known: int | None = None
    folded: list[int] = []
    missing = 0
    for first, more in ranges:
        verdict = judge_range(known, first, first + more)
        if verdict.kind in ("new", "gap"):
            folded += range(first, first + more + 1)
            known = first + more
            missing += verdict.missing
    assert len(folded) == len(set(folded))
    assert len(folded) + missing == (known or 0)


def summary(decisions: int, latency_us: float = 300.0) -> ModelSummary:
    latency = {latency_bucket(latency_us): decisions}
    return ModelSummary(manifest="m", where="device", decisions=decisions, latency=latency)


def test_the_rate_is_over_the_window_and_forgets() -> None:
    window = LiveWindow(seconds=10)
    assert window.rate(5.0).decisions_per_second == 0.0
    for second in range(30):
        window.add(100.0 + second, [summary(40), summary(10)])
    assert window.rate(129.5).decisions_per_second == pytest.approx(50.0)
    assert window.rate(134.5).decisions_per_second == pytest.approx(25.0)
    assert window.rate(500.0).decisions_per_second == 0.0


def test_a_young_window_does_not_divide_by_time_that_never_was() -> None:
    window = LiveWindow(seconds=10)
    window.add(100.0, [summary(60)])
    window.add(101.5, [summary(60)])
    assert window.rate(102.0).decisions_per_second == pytest.approx(60.0)


def test_latency_quantiles_are_of_the_window() -> None:
    window = LiveWindow(seconds=10)
    window.add(100.0, [summary(99, 300.0), summary(1, 90_000.0)])
    rate = window.rate(100.5)
    assert 300 <= rate.latency_p50_us < 400
    assert rate.latency_p95_us < 400
    window.add(100.6, [summary(10, 90_000.0)])
    assert window.rate(100.7).latency_p95_us > 80_000


def test_memory_is_bounded_by_the_window() -> None:
    window = LiveWindow(seconds=5)
    for second in range(1000):
        window.add(float(second), [summary(1)])
    assert len(window._slots) <= 6


HONEST = ModelSummary(
    manifest="m",
    where="device",
    decisions=10,
    declined=2,
    errors=1,
    fallbacks=1,
    latency={30: 9, len(LATENCY_BOUNDS_US): 1},
    labelled_legitimate=6,
    labelled_fraud=4,
    false_positives=1,
    true_positives=3,
)
REPORT = Report(
    device_id="pos-1",
    epoch=2**64 - 1,
    first_sequence=1,
    last_sequence=20,
    time=0.0,
    state="IDLE",
    running="m",
    summaries=(HONEST,),
    outcomes=(UpdateOutcome(manifest="m", event="rolled_back"),),
)


def test_an_honest_report_is_plausible() -> None:
    require_plausible(REPORT)
    require_plausible(msgspec.structs.replace(REPORT, last_sequence=0, summaries=(), outcomes=()))
    inferred = ModelSummary(manifest="m", where="device", inferences=20, errors=20, latency={30: 20})
    require_plausible(msgspec.structs.replace(REPORT, summaries=(inferred,)))


@pytest.mark.parametrize(
    "changes",
    [
        {"decisions": -1, "latency": {}},
        {"decisions": 21, "latency": {}},
        {"declined": 11},
        {"errors": -1},
        {"errors": 11},
        {"fallbacks": 11},
        {"false_positives": 7},
        {"true_positives": -3},
        {"labelled_legitimate": 10**30},
        {"latency": {30: 11}},
        {"latency": {30: -1, 31: 2}},
        {"latency": {-1: 1}},
        {"latency": {10**6: 1}},
        {"manifest": "m" * 65},
        {"inferences": -1},
        {"inferences": 11},
        {"decisions": -5, "declined": 0, "inferences": 20},
    ],
)
def test_counts_that_no_outbox_folds_to_are_refused(changes: dict[str, object]) -> None:
    forged = msgspec.structs.replace(HONEST, **changes)
    with pytest.raises(Malformed, match="not folded"):
        require_plausible(msgspec.structs.replace(REPORT, summaries=(forged,)))


@pytest.mark.parametrize(
    "changes",
    [
        {"last_sequence": 2**64 - 1},
        {"first_sequence": -5},
        {"first_sequence": 2**60, "last_sequence": 2**60 + 20},
        {"epoch": -1},
        {"dropped": 2**63},
        {"lost_requests": -1},
        {"plan_serial": 2**63},
        {"time": float("nan")},
        {"state": "I" * 65},
        {"running": "m" * 65},
        {"summaries": (HONEST, HONEST, HONEST)},
        {"summaries": (ModelSummary(manifest="m", where="device"),) * (PARTS_MAX + 1)},
        {"outcomes": (UpdateOutcome(manifest="m", event="rolled_back"),) * 21},
        {"outcomes": (UpdateOutcome(manifest="m", event="exploded"),)},
        {"outcomes": (UpdateOutcome(manifest="m", event="adopted", seconds=float("inf")),)},
        {"outcomes": (UpdateOutcome(manifest="m", event="adopted", bytes_received=-1),)},
        {"outcomes": (UpdateOutcome(manifest="m", event="adopted", reason="x" * 501),)},
    ],
)
def test_reports_beyond_every_bound_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(Malformed, match="not folded"):
        require_plausible(msgspec.structs.replace(REPORT, **changes))
