import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitoring.collector import Fold, LiveWindow, judge_range
from monitoring.telemetry import ModelSummary, latency_bucket


@pytest.mark.parametrize(
    ("known", "first", "last", "expected"),
    [
        (None, 0, 4, Fold("new")),
        (None, 1, 4, Fold("new")),
        (None, 5, 9, Fold("gap", 4)),
        (4, 5, 9, Fold("new")),
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
