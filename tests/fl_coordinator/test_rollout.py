import contextlib
import random
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_coordinator.cohorts import RolloutSpec, read_rollout
from fl_coordinator.evidence import Counts, RatioEvidence, exceeding, observe, quantile_upper_bound_us, rate_bounds
from fl_coordinator.rollout import (
    Advance,
    Rollout,
    advance,
    begin,
    holds_devices,
    next_stable,
    plan_of,
    standing,
    stop,
)
from model_delta.encoding import pack, unpack
from model_delta.errors import Malformed
from model_delta.plan import BUCKETS, DeviceTraits, RolloutPlan, assign
from monitoring.health import CohortHealth, DeviceStanding, cohort_health
from monitoring.telemetry import ModelSummary, UpdateOutcome, latency_bucket

NEW, OLD = "a" * 64, "b" * 64
TEXT = """\
apiVersion: atoll/v1
kind: Rollout
metadata:
  name: canary
spec:
  model: fraud
  target: latest
  cohorts:
    - name: shops
      match: {deviceClass: [pos, phone], region: eu-west}
    - name: kiosks
      match: {merchant: kiosk}
  strategy:
    canary:
      control: mirrored
      stages:
        - devices: 1
          hold: {minSeconds: 5, minDecisions: 20}
        - share: 25%
        - share: 100%
          hold: {minAdopted: 90%}
  guardrails:
    - {metric: latency_p95_ms, max: 50, ratioToControl: 3}
    - {metric: false_positive_rate, maxIncrease: 5%}
    - {metric: error_rate, ratioToControl: 2}
    - {metric: rolled_back, max: 0}
    - {metric: silence, share: 20%, withinSeconds: 30}
  rollback: {auto: true}
"""
SIMPLE = """\
apiVersion: atoll/v1
kind: Rollout
metadata: {name: canary}
spec:
  model: fraud
  cohorts: [{name: everyone}]
  strategy: {canary: {stages: [STAGES]}}
  guardrails: [RAILS]
"""


def simple(stages: str = "{devices: 1}, {share: 100%}", rails: str = "") -> RolloutSpec:
    return read_rollout(SIMPLE.replace("STAGES", stages).replace("RAILS", rails))


def traits(number: int, device_class: str = "pos") -> DeviceTraits:
    return DeviceTraits(f"{device_class}-{number:04}", "acme", device_class, "eu-west")


def begun(
    spec: RolloutSpec, devices: Sequence[DeviceTraits], *, awake: Sequence[str] | None = None, **changes: object
) -> Advance:
    options: dict[str, object] = {
        "yaml": "",
        "tenant": "acme",
        "target": NEW,
        "stable": OLD,
        "devices": [(device, awake is None or device.device_id in awake) for device in devices],
        "serial": 4,
        "withdrawn": {},
        "now": 1000.0,
    }
    return begin(spec, **{**options, **changes})  # type: ignore[arg-type]


def arm(plan: RolloutPlan, devices: Sequence[DeviceTraits], name: str) -> set[str]:
    return {device.device_id for device in devices if assign(plan, device).arm == name}


def summary(manifest: str, decisions: int, latency_us: float = 300.0, **counts: int) -> ModelSummary:
    return ModelSummary(
        manifest=manifest,
        where="device",
        decisions=decisions,
        latency={latency_bucket(latency_us): decisions},
        labelled_legitimate=counts.pop("legitimate", decisions),
        **counts,
    )


def health_of(
    found: Rollout,
    devices: Sequence[DeviceTraits],
    target: ModelSummary | None = None,
    control: ModelSummary | None = None,
    outcomes: Sequence[tuple[str, UpdateOutcome]] = (),
    *,
    now: float = 1010.0,
    silent: Sequence[str] = (),
    adopted: bool = True,
) -> CohortHealth:
    plan = plan_of(found, {}, now)
    standings = []
    for device in devices:
        wanted = assign(plan, device).manifest
        seen = 0.0 if device.device_id in silent else now
        standings.append(DeviceStanding(device, seen, wanted if adopted else OLD))
    teller = min(arm(plan, devices, "target"), default=devices[0].device_id)
    rows = [(teller, one) for one in (target, control) if one is not None]
    return cohort_health(plan, standings, rows, outcomes, now=now, silent_after=30)


def look(found: Rollout, health: CohortHealth, now: float = 1010.0) -> Advance:
    return advance(found, health, now=now, serial=found.serial + 1, withdrawn={})


FLEET = [traits(number) for number in range(60)]


# Reading


def test_the_example_is_read_whole() -> None:
    spec = read_rollout(TEXT)
    assert spec.cohorts[0].match == {"device_class": ("pos", "phone"), "region": ("eu-west",)}
    assert [(stage.devices, stage.share) for stage in spec.stages] == [(1, None), (None, 0.25), (None, 1.0)]
    assert spec.stages[0].hold.min_decisions == 20
    assert spec.guardrails[0].ratio == 3
    assert spec.guardrails[-1].within_seconds == 30
    assert spec.rollback_auto


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("atoll/v1", "atoll/v9", "f.yaml:1: apiVersion: expected atoll/v1, found 'atoll/v9'"),
        ("  model: fraud\n", "", "f.yaml:6: spec: expected the key 'model'"),
        ("share: 25%", "share: 25", "f.yaml:19: spec.strategy.canary.stages[1].share: expected a percentage"),
        ("share: 25%", "sahre: 25%", "f.yaml:19: spec.strategy.canary.stages[1].sahre: expected one of"),
        ("devices: 1", "devices: 0", "f.yaml:17: spec.strategy.canary.stages[0].devices"),
        ("share: 25%", "share: 100%", "stages only grow"),
        ("devices: 1", "devices: 1\n          share: 5%", "exactly one of them"),
        ("metric: error_rate", "metric: eror_rate", "f.yaml:25: spec.guardrails[2].metric: expected error_rate"),
        ("ratioToControl: 2", "min: 2", "spec.guardrails[2].min"),
        ("{metric: rolled_back, max: 0}", "{metric: rolled_back}", "expected the key 'max'"),
        ("control: mirrored", "control: none", "expected a control arm to compare with"),
        ("auto: true", "auto: maybe", "f.yaml:28: spec.rollback.auto: expected true or false, found 'maybe'"),
        ("  name: canary", "  name: Canary Rollout", "f.yaml:4: metadata.name"),
        ("  name: canary", "  name: canary\n  name: other", "expected 'name' once"),
        ("  cohorts:", "   cohorts:", "f.yaml:8: expected YAML"),
        ("kind: Rollout", "kind: [Rollout]", "f.yaml:2: kind: expected Rollout, found a list"),
        ("merchant: kiosk", "merchant: []", "at least one value"),
        ("minSeconds: 5", "minSeconds: soon", "expected seconds, found 'soon'"),
        ("share: 20%", "share: 200%", "expected a percentage from 0% to 100%"),
    ],
)
def test_a_mistake_is_named_with_line_key_and_advice(old: str, new: str, words: str) -> None:
    assert old in TEXT
    with pytest.raises(Malformed) as caught:
        read_rollout(TEXT.replace(old, new, 1), "f.yaml")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ("", "expected at least one stage"),
        ("{devices: 5}, {devices: 5}", "more devices than the stage before"),
        ("{share: 5%}, {devices: 10}", "more devices than the stage before"),
        ("{share: 5%}, {share: 5%}", "a larger share than the stage before"),
    ],
)
def test_stages_that_do_not_grow_are_refused(stages: str, words: str) -> None:
    with pytest.raises(Malformed) as caught:
        simple(stages)
    assert words in str(caught.value)


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    with pytest.raises(Malformed) as caught:
        read_rollout(text)
    assert "\n" not in str(caught.value)


@settings(max_examples=60)
@given(st.integers(0, len(TEXT) - 1), st.integers(1, 12))
def test_a_damaged_example_is_read_or_refused(start: int, length: int) -> None:
    with contextlib.suppress(Malformed):
        assert read_rollout(TEXT[:start] + TEXT[start + length :]).model


def test_an_alias_bomb_is_refused() -> None:
    bomb = "a: &a [x,x]\n" + "\n".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)},*{chr(97 + i)}]" for i in range(20)
    )
    with pytest.raises(Malformed):
        read_rollout(bomb)
    with pytest.raises(Malformed, match="at most"):
        read_rollout("# " + "x" * 100_000)


# Stages


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 90), st.integers(0, 10_000))
def test_one_device_means_exactly_one_and_stages_only_grow(size: int, seed: int) -> None:
    devices = [DeviceTraits(f"d{seed}-{number}", "acme", "pos", "eu-west") for number in range(size)]
    found = begun(simple("{devices: 1}, {share: 25%}, {share: 60%}, {share: 100%}"), devices).rollout
    before: set[str] = set()
    controls: set[str] = set()
    for stage in range(4):
        plan = plan_of(msgspec.structs.replace(found, stage=stage), {}, 0.0)
        now = arm(plan, devices, "target")
        if stage == 0:
            assert len(now) == 1
            assert len(arm(plan, devices, "control")) == 1
        assert before <= now
        assert plan.target_buckets + plan.control_buckets <= BUCKETS
        before, controls = now, controls | arm(plan, devices, "control")
    assert before == {device.device_id for device in devices}


def test_the_canary_is_a_device_that_was_heard_lately() -> None:
    few = begun(simple(), FLEET, awake=["pos-0007", "pos-0031"]).plan
    assert few is not None
    assert arm(few, FLEET, "target") <= {"pos-0007", "pos-0031"}
    awake = {f"pos-{number:04}" for number in range(10)}
    more = begun(simple(), FLEET, awake=sorted(awake)).plan
    assert more is not None
    assert arm(more, FLEET, "target") | arm(more, FLEET, "control") <= awake
    assert begun(simple(), FLEET, awake=[]).plan is not None


def test_more_devices_than_there_are_is_said() -> None:
    with pytest.raises(Malformed, match=r"asks for 5 device\(s\), found 3"):
        begun(simple("{devices: 5}"), FLEET[:3])


def test_devices_outside_the_cohorts_are_never_in_a_stage() -> None:
    others = [DeviceTraits(f"mcu-{number:04}", "acme", "mcu", "eu-west") for number in range(10)]
    found = begun(read_rollout(TEXT), [*FLEET, *others]).rollout
    plan = plan_of(msgspec.structs.replace(found, stage=2), {}, 0.0)
    assert arm(plan, others, "excluded") == {device.device_id for device in others}
    assert len(arm(plan, FLEET, "target")) == 60


def test_a_first_version_goes_to_everybody_and_is_compared_with_nothing() -> None:
    rails = "{metric: error_rate, max: 50%, ratioToControl: 2}, {metric: miss_rate, maxIncrease: 5%}"
    first = begun(simple(rails=rails), FLEET, stable="")
    assert first.plan is not None
    assert (first.plan.stable, first.plan.target_buckets, len(first.rollout.spec.guardrails)) == (NEW, BUCKETS, 1)
    assert next_stable(first.rollout) == NEW
    broken = look(first.rollout, health_of(first.rollout, FLEET, summary(NEW, 100, errors=100)))
    assert (broken.rollout.state, broken.plan) == ("stopped", None)
    assert "no earlier version" in broken.text


def test_a_withdrawn_version_is_no_target() -> None:
    with pytest.raises(Malformed, match=r"withdrawn \(too slow\)"):
        begun(simple(), FLEET, withdrawn={NEW: "too slow"})


# Judging


def test_a_stage_waits_for_what_it_holds_for_and_then_widens() -> None:
    found = begun(simple("{devices: 1, hold: {minSeconds: 5, minDecisions: 20}}, {share: 50%}"), FLEET).rollout
    early = look(found, health_of(found, FLEET, summary(NEW, 50)), now=1002.0)
    assert (early.plan, early.rollout.reason) == (None, "waits for 3 more seconds")
    few = look(found, health_of(found, FLEET, summary(NEW, 5)))
    assert few.rollout.reason == "waits for 15 more decisions"
    behind = look(found, health_of(found, FLEET, summary(NEW, 50), adopted=False))
    assert "devices to become" in behind.rollout.reason
    wider = look(found, health_of(found, FLEET, summary(NEW, 50)))
    assert wider.plan is not None
    assert (wider.event, wider.rollout.stage, wider.plan.serial) == ("widened", 1, 5)
    assert wider.plan.target_buckets == 5000
    again = look(wider.rollout, health_of(wider.rollout, FLEET, summary(NEW, 60)))
    assert again.rollout.state == "completed"
    assert again.plan is not None
    assert again.plan.stable == NEW
    assert not holds_devices(again.rollout)


def test_completing_for_some_cohorts_leaves_the_others_on_the_stable_version() -> None:
    found = begun(read_rollout(TEXT), FLEET).rollout
    done = msgspec.structs.replace(found, stage=2, state="completed")
    assert plan_of(done, {}, 0.0).stable == OLD
    assert next_stable(done) is None
    assert holds_devices(done)


def test_one_cohort_of_everybody_is_enough_to_settle_what_is_stable() -> None:
    spec = read_rollout(TEXT.replace("{merchant: kiosk}", "{}"))
    assert [bool(cohort.match) for cohort in spec.cohorts] == [True, False]
    done = msgspec.structs.replace(begun(spec, FLEET).rollout, stage=2, state="completed")
    assert (next_stable(done), holds_devices(done)) == (NEW, False)


BAD = {
    "error_rate": {"errors": 60},
    "fallback_rate": {"fallbacks": 60},
    "decline_rate": {"declined": 60},
    "false_positive_rate": {"false_positives": 60},
    "miss_rate": {"true_positives": 40},
}


@pytest.mark.parametrize("metric", BAD)
@pytest.mark.parametrize("bad", BAD)
def test_each_rate_is_judged_by_its_own_count(metric: str, bad: str) -> None:
    found = begun(simple(rails=f"{{metric: {metric}, max: 20%}}"), FLEET).rollout
    counts = {"labelled_fraud": 100, "true_positives": 100, **BAD[bad]}
    looked = look(found, health_of(found, FLEET, summary(NEW, 100, legitimate=100, **counts)))
    assert (looked.rollout.state == "stopped") == (metric == bad)


def test_inferences_count_as_answers_and_approve_nothing() -> None:
    """A version of any signature is held and judged by its inferences."""
    rails = "{metric: error_rate, max: 20%}, {metric: latency_p95_ms, max: 1}"
    found = begun(simple("{devices: 1, hold: {minDecisions: 50}}, {share: 100%}", rails), FLEET).rollout

    def inferred(number: int, latency_us: float = 300.0, errors: int = 0) -> ModelSummary:
        latency = {latency_bucket(latency_us): number - errors}
        return ModelSummary(manifest=NEW, where="device", inferences=number, errors=errors, latency=latency)

    assert look(found, health_of(found, FLEET, inferred(40))).rollout.reason == "waits for 10 more decisions"
    fine = look(found, health_of(found, FLEET, inferred(60)))
    assert (fine.event, fine.rollout.decisions_before) == ("widened", 60)
    for bad in (inferred(60, errors=40), inferred(60, latency_us=5_000.0)):
        assert look(found, health_of(found, FLEET, bad)).rollout.state == "stopped"
    declines = begun(simple(rails="{metric: decline_rate, max: 20%}"), FLEET).rollout
    assert look(declines, health_of(declines, FLEET, inferred(60))).rollout.reason.endswith("evidence on decline_rate")


def test_a_ratio_to_a_silent_control_arm_is_no_evidence_of_health() -> None:
    found = begun(simple(rails="{metric: error_rate, ratioToControl: 2}"), FLEET).rollout
    assert (
        look(found, health_of(found, FLEET, summary(NEW, 50))).rollout.reason == "waits for more evidence on error_rate"
    )
    assert look(found, health_of(found, FLEET, summary(NEW, 50), summary(OLD, 50))).event == "widened"


def test_a_breach_withdraws_the_target_with_a_higher_serial() -> None:
    found = begun(simple(rails="{metric: rolled_back, max: 0}"), FLEET).rollout
    canary = min(arm(plan_of(found, {}, 0.0), FLEET, "target"))
    outcomes = [(canary, UpdateOutcome(manifest=NEW, event="rolled_back"))]
    stopped = look(found, health_of(found, FLEET, outcomes=outcomes))
    assert stopped.plan is not None
    assert (stopped.rollout.state, stopped.plan.serial) == ("stopped", 5)
    assert (stopped.plan.withdrawn, stopped.plan.target_buckets) == ((NEW,), 0)
    assert {assign(stopped.plan, device).manifest for device in FLEET} == {OLD}
    assert look(stopped.rollout, health_of(stopped.rollout, FLEET)).event == ""
    other = [(canary, UpdateOutcome(manifest=OLD, event="rolled_back"))]
    assert look(found, health_of(found, FLEET, outcomes=other)).rollout.state != "stopped"


def test_without_automatic_rollback_a_breach_waits_for_an_operator() -> None:
    spec = msgspec.structs.replace(simple(rails="{metric: rolled_back, max: 0}"), rollback_auto=False)
    found = begun(spec, FLEET).rollout
    canary = min(arm(plan_of(found, {}, 0.0), FLEET, "target"))
    outcomes = [(canary, UpdateOutcome(manifest=NEW, event="rolled_back"))]
    paused = look(found, health_of(found, FLEET, outcomes=outcomes))
    assert (paused.rollout.state, paused.plan) == ("paused", None)
    aborted = stop(paused.rollout, "aborted", "operator", now=0.0, serial=9, withdrawn={})
    assert aborted.plan is not None
    assert aborted.plan.withdrawn == (NEW,)


def test_a_slow_target_is_stopped_and_an_unjudged_one_is_not_widened() -> None:
    found = begun(simple(rails="{metric: latency_p95_ms, ratioToControl: 3}"), FLEET).rollout
    blind = look(found, health_of(found, FLEET, summary(NEW, 50), summary(OLD, 20)))
    assert blind.rollout.reason == "waits for more evidence on latency_p95_ms"
    same = look(found, health_of(found, FLEET, summary(NEW, 50), summary(OLD, 2000)))
    assert same.event == "widened"
    slow = look(found, health_of(found, FLEET, summary(NEW, 50, 2000.0), summary(OLD, 2000)))
    assert slow.rollout.state == "stopped"
    assert "latency_p95_ms 2.15 ms" in slow.rollout.reason
    absolute = begun(simple(rails="{metric: latency_p95_ms, max: 1}"), FLEET).rollout
    assert look(absolute, health_of(absolute, FLEET, summary(NEW, 50, 2000.0))).rollout.state == "stopped"
    assert look(absolute, health_of(absolute, FLEET, summary(NEW, 50, 300.0))).event == "widened"


@pytest.mark.parametrize("limit", ["maxIncrease: 5%", "ratioToControl: 2", "max: 10%"])
def test_false_positives_stop_a_rollout(limit: str) -> None:
    found = begun(simple(rails=f"{{metric: false_positive_rate, {limit}}}"), FLEET).rollout
    control = summary(OLD, 3000, false_positives=60)
    bad = look(found, health_of(found, FLEET, summary(NEW, 100, false_positives=30), control))
    assert bad.rollout.state == "stopped"
    assert "false_positive_rate 30.00% of 100" in bad.rollout.reason
    fine = look(found, health_of(found, FLEET, summary(NEW, 100, false_positives=2), control))
    assert fine.event == "widened"


RAILS_OF_DEVICES = [
    "{metric: false_positive_rate, maxIncrease: 5%}",
    "{metric: false_positive_rate, ratioToControl: 2}",
    "{metric: false_positive_rate, max: 10%}",
    "{metric: latency_p95_ms, max: 1}",
    "{metric: latency_p95_ms, ratioToControl: 3}",
]


@pytest.mark.parametrize("rail", RAILS_OF_DEVICES)
@pytest.mark.parametrize(("faulty", "speaking", "stopped"), [(1, 6, False), (1, 1, True), (2, 6, True), (6, 6, True)])
def test_one_device_of_several_cannot_stop_a_rollout(rail: str, faulty: int, speaking: int, stopped: bool) -> None:
    found = begun(simple("{share: 25%}, {share: 100%}", rails=rail), FLEET).rollout
    plan = plan_of(found, {}, 1010.0)
    in_stage = sorted(arm(plan, FLEET, "target"))
    assert len(in_stage) > 6
    rows = [("pos-0000", summary(OLD, 6000, false_positives=60))]
    for number, device_id in enumerate(in_stage[:speaking]):
        bad = number < faulty
        # In two reports: what counts is the device, not how often it speaks.
        row = summary(NEW, 100, 2000.0 if bad else 300.0, false_positives=90 if bad else 1)
        rows += [(device_id, row), (device_id, row)]
    standings = [DeviceStanding(device, 1010.0, assign(plan, device).manifest) for device in FLEET]
    health = cohort_health(plan, standings, rows, [], now=1010.0, silent_after=30)
    assert len(health.target.by_device) == speaking
    looked = look(found, health).rollout
    assert (looked.state == "stopped") == stopped, looked.verdicts
    assert any("one device alone" in verdict.text for verdict in looked.verdicts) == (not stopped)


def test_silence_of_the_target_counts_when_the_control_talks() -> None:
    found = begun(simple(rails="{metric: silence, share: 20%, withinSeconds: 30}"), FLEET).rollout
    plan = plan_of(found, {}, 0.0)
    canary = arm(plan, FLEET, "target")
    early = look(found, health_of(found, FLEET, now=1010.0, silent=list(canary)))
    assert early.rollout.reason == "waits for a device of this stage to be heard"
    bricked = look(found, health_of(found, FLEET, now=1040.0, silent=list(canary)), now=1040.0)
    assert bricked.rollout.state == "stopped"
    everybody = [device.device_id for device in FLEET]
    network = look(found, health_of(found, FLEET, now=1040.0, silent=everybody), now=1040.0)
    assert network.rollout.state == "running"
    assert network.plan is None


def test_silence_does_not_stop_a_first_version_but_its_stage_waits() -> None:
    spec = simple(rails="{metric: silence, share: 20%, withinSeconds: 30}")
    first = begun(spec, FLEET, stable="", target=NEW).rollout
    assert first.stable == first.target
    asleep = look(
        first, health_of(first, FLEET, now=1040.0, silent=[device.device_id for device in FLEET[:20]]), 1040.0
    )
    assert (asleep.event, asleep.rollout.state) == ("", "running")
    assert asleep.rollout.reason == "waits for 20 silent devices"
    assert look(asleep.rollout, health_of(first, FLEET, now=1050.0), now=1050.0).rollout.state == "completed"


def test_a_stage_without_devices_waits_for_them_and_says_so() -> None:
    found = begun(simple(), [], stable="").rollout
    assert (standing(found), standing(found, 0)) == ("running", "waiting for devices")
    nobody = cohort_health(plan_of(found, {}, 1000.0), [], [], [], now=1000.0, silent_after=30.0)
    alone = look(found, nobody, now=1000.0)
    assert (alone.rollout.state, alone.plan) == ("running", None)
    assert alone.rollout.reason == "waits for devices: none that follows fraud is in this stage yet"


@pytest.mark.parametrize(
    ("state", "first", "in_stage", "superseded", "words"),
    [
        ("running", True, 0, False, "waiting for devices"),
        ("running", True, 1, False, "running"),
        ("paused", False, 1, False, "paused, waits for you"),
        ("stopped", False, 0, False, "stopped, rolled back"),
        ("aborted", False, 0, False, "aborted, rolled back"),
        ("stopped", True, 9, False, "stopped; devices keep this first version"),
        ("aborted", True, 0, False, "aborted; devices keep this first version"),
        ("completed", False, 9, False, "completed"),
        ("completed", False, 0, True, "superseded"),
    ],
)
def test_how_a_rollout_stands_is_said_in_words(
    state: str, first: bool, in_stage: int, superseded: bool, words: str
) -> None:
    found = begun(simple(), FLEET, **({"stable": ""} if first else {})).rollout
    found = msgspec.structs.replace(found, state=state)
    assert standing(found, in_stage, superseded) == words


def test_a_rollout_survives_being_written_down() -> None:
    found = begun(read_rollout(TEXT), FLEET).rollout
    looked = look(found, health_of(found, FLEET, summary(NEW, 50, errors=1), summary(OLD, 2000, errors=7))).rollout
    assert unpack(pack(looked), Rollout) == looked
    assert looked.evidence


# Evidence


def test_rate_bounds_hold_the_rate_and_shrink() -> None:
    assert rate_bounds(0, 0, 0.05) == (0.0, 1.0)
    low, high = rate_bounds(50, 1000, 0.05)
    assert low < 0.05 < high < 0.09
    assert rate_bounds(0, 100, 0.05)[0] == 0.0
    assert rate_bounds(100, 100, 0.05)[1] == 1.0
    wider = rate_bounds(50, 1000, 0.001)
    assert wider[0] < low
    assert wider[1] > high


def looks(rng: random.Random, target: float, control: float, each: int, rounds: int) -> bool:
    """Whether a hundred looks at two arms ever raise the alarm."""
    counts, evidence = Counts(), RatioEvidence()
    for _ in range(rounds):
        counts = Counts(
            counts.target_total + each,
            counts.target_hits + sum(rng.random() < target for _ in range(each)),
            counts.control_total + 3 * each,
            counts.control_hits + sum(rng.random() < control for _ in range(3 * each)),
        )
        evidence = observe(evidence, counts, 1.0)
        if evidence.log_evidence > 2.9957:  # log(1 / 0.05)
            return True
    return False


def test_looking_a_hundred_times_raises_few_false_alarms_and_finds_real_ones() -> None:
    rng = random.Random(7)
    false = sum(looks(rng, 0.01, 0.01, 20, 100) for _ in range(60))
    assert false <= 6  # 5 % of 60 is 3; the naive z test raises about 17
    assert all(looks(rng, 0.10, 0.01, 20, 100) for _ in range(20))


def test_rate_bounds_are_valid_under_repeated_looks() -> None:
    rng = random.Random(11)
    missed = 0
    for _ in range(60):
        hits = 0
        for total in range(1, 401):
            hits += rng.random() < 0.1
            if total % 10 == 0:
                low, high = rate_bounds(hits, total, 0.05)
                if not low <= 0.1 <= high:
                    missed += 1
                    break
    assert missed <= 6


def test_evidence_waits_for_both_arms_and_for_totals_that_went_back() -> None:
    first = observe(RatioEvidence(), Counts(10, 5, 0, 0), 1.0)
    assert first == RatioEvidence()
    second = observe(first, Counts(20, 9, 30, 0), 1.0)
    assert second.log_evidence > 0
    assert observe(second, Counts(5, 1, 30, 0), 1.0) == second
    assert observe(second, Counts(25, 1, 40, 2), 1.0) == second


def test_latency_counts_only_what_certainly_exceeds() -> None:
    latency = {latency_bucket(900.0): 10, latency_bucket(5000.0): 5}
    assert exceeding(latency, 1000.0) == 5
    assert exceeding(latency, 900.0) == 5
    assert quantile_upper_bound_us({latency_bucket(300.0): 10}, 0.95, 0.01) is None
    bound = quantile_upper_bound_us({latency_bucket(300.0): 1000}, 0.95, 0.01)
    assert bound is not None
    assert 300.0 <= bound < 400.0


def test_a_canary_in_a_small_fleet_stays_small_while_the_fleet_grows() -> None:
    plan = begun(simple(), FLEET[:6], awake=[device.device_id for device in FLEET[:6]]).plan
    later = [msgspec.structs.replace(FLEET[0], device_id=f"later-{number:05}") for number in range(2_000)]
    assert len(arm(plan, FLEET[:6], "target")) == 1
    assert len(arm(plan, later, "target")) <= 2_000 // 100
