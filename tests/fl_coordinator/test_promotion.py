import math

import msgspec
import pytest

from fl_coordinator.promotion import Evaluation, Limits, failed, judge

STABLE = Evaluation(
    average_precision=0.60,
    slices={"grocery": 0.7, "fuel": 0.5, "kiosk": 0.9},
    slice_frauds={"grocery": 100, "fuel": 100, "kiosk": 3},
    latency_p95_us=100.0,
    size_bytes=1000,
)


def candidate(**changes: object) -> Evaluation:
    return msgspec.structs.replace(STABLE, **changes)


def test_an_equal_candidate_passes_every_gate() -> None:
    gates = judge(STABLE, STABLE)
    assert [gate.name for gate in gates] == ["precision", "slice fuel", "slice grocery", "latency", "size"]
    assert failed(gates) == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"average_precision": 0.58}, "precision: average precision 0.5800, stable 0.6000"),
        ({"average_precision": math.nan}, "precision"),
        ({"slices": {"grocery": 0.7, "fuel": 0.3, "kiosk": 0.9}}, "slice fuel: average precision 0.3000"),
        ({"slices": {"grocery": 0.7}}, "slice fuel: expected a figure"),
        ({"latency_p95_us": 900.0}, "latency: p95 900 us, stable 100 us, allowed 300 us"),
        ({"size_bytes": 1501}, "size: 1501 bytes, stable 1000 bytes, allowed 1500 bytes"),
    ],
)
def test_each_gate_can_close_and_says_why(changes: dict[str, object], reason: str) -> None:
    assert reason in failed(judge(candidate(**changes), STABLE))


def test_a_slice_with_few_frauds_says_nothing() -> None:
    assert failed(judge(candidate(slices={"grocery": 0.7, "fuel": 0.5, "kiosk": 0.1}), STABLE)) == ""
    strict = Limits(slice_frauds_min=1)
    assert "slice kiosk" in failed(judge(candidate(slices={"grocery": 0.7, "fuel": 0.5, "kiosk": 0.1}), STABLE, strict))


def test_better_is_always_allowed() -> None:
    better = candidate(average_precision=0.9, latency_p95_us=1.0, size_bytes=1)
    assert failed(judge(better, STABLE)) == ""
