"""What golden cases and live answers say about a fresh version."""

from __future__ import annotations

import re

import msgspec
import numpy as np
import pytest

from edge_runtime.probation import LiveRecord, ProbationRules, judge_golden, judge_live
from model_delta.errors import Malformed
from model_delta.manifest import GoldenCase, Requirements, Tensor
from tests.edge_runtime.world import tensor

EXPECTED = np.array([[0.1], [0.9]], np.float32)
CASE = GoldenCase({"features": tensor(np.zeros((2, 4), np.float32))}, {"score": tensor(EXPECTED)}, tolerance=1e-3)
RULES = ProbationRules(decisions=20, latency_decisions=60, seconds=10.0, error_share_max=0.02, latency_quantile=0.9)
NEEDS = Requirements(latency_ms_max=5.0)


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        ({"score": EXPECTED + np.float32(0.01)}, "score differs by 0.01, at most 0.001 is allowed"),
        ({"score": np.array([[0.1], [np.nan]], np.float32)}, "differs by nan"),
        ({"score": EXPECTED[:1]}, r"shape \(1, 1\), expected \(2, 1\)"),
        ({"other": EXPECTED}, "expected an output 'score', found none"),
    ],
)
def test_golden_cases_that_disagree(outputs: dict[str, np.ndarray], reason: str) -> None:
    verdict = judge_golden([CASE], [outputs])
    assert verdict.outcome == "unhealthy"
    assert re.search(reason, verdict.reason)


def test_golden_cases_within_tolerance_agree() -> None:
    assert judge_golden([CASE], [{"score": EXPECTED + np.float32(5e-4)}]).outcome == "healthy"
    assert judge_golden([], []).outcome == "healthy"
    assert judge_golden([CASE], []).outcome == "unhealthy"


def test_a_broken_golden_case_is_the_publishers_mistake() -> None:
    broken = GoldenCase({}, {"score": Tensor("float32", (3, 1), b"\0" * 8)})
    with pytest.raises(Malformed, match=r"golden case 0: output score: 8 bytes are no 'float32' of shape \(3, 1\)"):
        judge_golden([broken], [{"score": EXPECTED}])


@pytest.mark.parametrize(
    ("live", "outcome"),
    [
        (LiveRecord((1.0,) * 5, 0, 1.0), "wait"),
        (LiveRecord((1.0,) * 20, 0, 1.0), "healthy"),
        (LiveRecord((1.0,) * 5, 0, 10.0), "healthy"),
        (LiveRecord((), 0, 10.0), "healthy"),
        (LiveRecord((1.0,) * 18 + (9.0,) * 2, 0, 1.0), "healthy"),
        (LiveRecord((1.0,) * 17 + (9.0,) * 3, 0, 1.0), "wait"),
        (LiveRecord((9.0,) * 6, 0, 0.1), "wait"),
        (LiveRecord((9.0,) * 6 + (1.0,) * 53, 0, 1.0), "wait"),
        (LiveRecord((9.0,) * 6 + (1.0,) * 54, 0, 1.0), "healthy"),
        (LiveRecord((9.0,) * 7, 0, 0.1), "unhealthy"),
        (LiveRecord((9.0,) * 7 + (1.0,) * 60, 0, 1.0), "unhealthy"),
        (LiveRecord((1.0,) * 17 + (9.0,) * 3, 0, 10.0), "unhealthy"),
        (LiveRecord((9.0,), 0, 10.0), "healthy"),
        (LiveRecord((9.0, 1.0, 9.0), 0, 10.0), "unhealthy"),
        (LiveRecord((1.0,) * 3, 1, 0.1), "unhealthy"),
    ],
)
def test_live_answers(live: LiveRecord, outcome: str) -> None:
    assert judge_live(live, NEEDS, RULES).outcome == outcome


def test_errors_within_the_share_are_forgiven() -> None:
    rules = ProbationRules(decisions=100, seconds=10.0, error_share_max=0.02)
    assert judge_live(LiveRecord((1.0,) * 98, 2, 1.0), NEEDS, rules).outcome == "healthy"
    assert judge_live(LiveRecord((1.0,) * 97, 3, 1.0), NEEDS, rules).outcome == "unhealthy"
    few = LiveRecord((1.0,) * 8, 2, 1.0)
    assert judge_live(few, NEEDS, rules).outcome == "wait"
    ended = judge_live(msgspec.structs.replace(few, seconds=10.0), NEEDS, rules)
    assert (ended.outcome, ended.reason) == ("unhealthy", "2 of 10 live answers failed")
