from pathlib import Path

import pytest

import atoll
from fl_coordinator.promotion import Limits
from fl_coordinator.round_yaml import read_round
from fl_coordinator.rounds import POLICIES, Privacy, Quota, RoundSpec
from fl_coordinator.rules import policy
from model_delta.errors import Malformed

EXAMPLE = Path(atoll.__file__).parent / "examples" / "round.yaml"
SHORT = """apiVersion: atoll/v1
kind: Round
metadata: {name: november}
spec:
  model: fraud
"""


def test_the_example_says_everything_and_is_read() -> None:
    spec, rollout, _ = read_round(EXAMPLE.read_text(), str(EXAMPLE))
    assert (spec.model, spec.name, rollout) == ("fraud", "fraud-november", "")
    assert (spec.quorum, spec.deadline_s, spec.clip_norm_l2, spec.hostile_max, spec.selected_min) == (12, 60, 4, 2, 8)
    assert (spec.policy, spec.reveal, spec.autopilot) == ("robust", "distances", False)
    assert spec.quota == Quota(per_device=24, per_group=100)
    assert spec.gates == Limits()
    assert spec.checked() == spec


def test_the_example_with_all_that_is_commented_out() -> None:
    lines = EXAMPLE.read_text().replace("autopilot: false", "autopilot: true").splitlines()
    whole = "\n".join(line.replace("  # ", "  ", 1) if line.startswith("  # ") else line for line in lines)
    spec, rollout, _ = read_round(whole, "round.yaml")
    assert spec.privacy == Privacy(epsilon=8, delta=1e-5, noise_multiplier=1)
    assert (spec.autopilot, rollout) == (True, "canary.yaml")


def test_what_is_left_out_has_the_defaults_of_a_round() -> None:
    assert read_round(SHORT)[0] == RoundSpec(model="fraud", name="november")


def test_policies_are_those_that_the_rules_know() -> None:
    assert {*policy.POLICIES, "cluster"} == set(POLICIES)
    assert RoundSpec(model="fraud").policy in policy.POLICIES


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90.0), ("90s", 90.0), ("1.5m", 90.0), ("2h", 7200.0), ("30d", 2_592_000.0)]
)
def test_a_deadline_is_a_duration(text: str, seconds: float) -> None:
    assert read_round(f"{SHORT}  deadline: {text}\n")[0].deadline_s == seconds


@pytest.mark.parametrize(
    ("lines", "line", "words"),
    [
        ("  quorun: 12", 6, "expected one of .*, found the key 'quorun'"),
        ("  quorum: many", 6, "spec.quorum: expected a number from 2 to 100000, found 'many'"),
        ("  quorum: 12.5", 6, "write a whole number"),
        ("  f: 2\n  quorum: 8\n  m_min: 9", 7, "spec.quorum: expected at least 12"),
        ("  quorum: 12\n  f: 5", 6, "spec.quorum: expected at least 16"),
        ("  f: 4", 5, "spec: expected at least 14 .*found 8; raise quorum or lower hostile_max"),
        ("  contributions_max: 5", 6, "spec.contributions_max: expected at least the quorum 8"),
        ("  deadline: soon", 6, "write it like 60s, 10m, 2h or 1d"),
        ("  deadline: 31d", 6, "spec.deadline: expected 1 to 2.592e\\+06"),
        (
            "  policy: median",
            6,
            "spec.policy: expected krum or robust or history or multikrum or cluster, found 'median'",
        ),
        ("  reveal: nothing", 6, "spec.reveal: expected distances or graph or selection"),
        ("  reveal: graph", 6, "spec.reveal: expected policy cluster with `reveal: graph`, found 'robust'"),
        ("  reveal: selection\n  policy: cluster", 7, "spec.policy: expected policy multikrum with `reveal: sel"),
        ("  reveal: selection\n  policy: multikrum\n  quorum: 129", 8, "spec.quorum: expected at most 128 with"),
        ("  policy: robust\n  eps: 2", 7, "spec.eps: expected `reveal: graph` with it"),
        ("  policy: cluster\n  reveal: graph\n  eps: 9", 8, "spec.eps: expected less than twice the clip norm 4"),
        ("  base: latest", 6, "spec.base: expected a manifest digest of 64 hex digits"),
        ("  training: {epochs: 3}", 6, "found the key 'epochs'"),
        ("  privacy: {epsilon: 8, delta: 0.00001}", 6, "spec.privacy: expected the key 'noise_multiplier'"),
        ("  privacy:\n    epsilon: 8\n    delta: 2\n    noise_multiplier: 1", 8, "spec.privacy.delta: expected a prob"),
        ("  privacy: {epsilon: 0, delta: 0.1, noise_multiplier: 1}", 6, "spec.privacy.epsilon: expected a budget"),
        ("  gates:\n    precision_loss: 2", 7, "spec.gates.precision_loss: expected a number from 0 to 1"),
        ("  quota: {per_grop: 3}", 6, "found the key 'per_grop'"),
        ("  quota: {per_group: 0}", 6, "spec.quota.per_group: expected a number of contributions"),
        ("  autopilot: maybe", 6, "spec.autopilot: expected true or false"),
        ("  rollout: canary.yaml", 6, "spec.rollout: expected `autopilot: true` with it"),
        ("  quorum: 9\n  quorum: 10", 7, "expected 'quorum' once"),
        ("  quorum: [", 7, "expected YAML"),
    ],
)
def test_a_complaint_names_the_line(lines: str, line: int, words: str) -> None:
    with pytest.raises(Malformed, match=rf"^round\.yaml:{line}: .*{words}"):
        read_round(f"{SHORT}{lines}\n")


def test_another_kind_of_object_is_refused() -> None:
    with pytest.raises(Malformed, match=r"round\.yaml:2: kind: expected Round, found 'Rollout'"):
        read_round(SHORT.replace("kind: Round", "kind: Rollout"))
    with pytest.raises(Malformed, match=r"found an empty file; start from atoll/examples/round\.yaml"):
        read_round("")
