import msgspec

from model_delta.plan import Cohort, DeviceTraits, RolloutPlan, assign
from monitoring.health import CohortHealth, DeviceStanding, cohort_health
from monitoring.telemetry import ModelSummary, UpdateOutcome

NEW, OLD = "a" * 64, "b" * 64
PLAN = RolloutPlan(
    tenant="acme",
    model="fraud",
    name="r",
    serial=1,
    salt="s",
    cohorts=(Cohort("shops", {"device_class": ("pos",)}),),
    target_buckets=5000,
    control_buckets=2000,
    target=NEW,
    stable=OLD,
    issued=0,
    expires=10**10,
)
NOW = 1000.0


def standing(number: int, device_class: str = "pos", **changes: object) -> DeviceStanding:
    traits = DeviceTraits(f"{device_class}-{number}", "acme", device_class, "eu-west")
    plain = DeviceStanding(traits, NOW, assign(PLAN, traits).manifest)
    return msgspec.structs.replace(plain, **changes)


FLEET = [standing(number) for number in range(40)]
TARGET = [one for one in FLEET if one.running == NEW]


def summary(manifest: str, decisions: int, **changes: object) -> ModelSummary:
    return ModelSummary(manifest=manifest, where="device", decisions=decisions, **changes)  # type: ignore[arg-type]


def health(
    devices: list[DeviceStanding],
    summaries: list[tuple[str, ModelSummary]] | None = None,
    outcomes: list[tuple[str, UpdateOutcome]] | None = None,
    plan: RolloutPlan = PLAN,
) -> CohortHealth:
    return cohort_health(plan, devices, summaries or [], outcomes or [], now=NOW, silent_after=30)


def test_arms_add_up_and_leave_out_whoever_is_not_in_a_cohort() -> None:
    seen = health([*FLEET, *(standing(number, "mcu") for number in range(9))])
    assert seen.target.devices == len(TARGET)
    assert seen.target.devices + seen.control.devices == 40
    assert (seen.target.adopted, seen.control.adopted) == (seen.target.devices, seen.control.devices)


def test_decisions_count_by_the_version_that_made_them() -> None:
    inside = TARGET[0].traits.device_id
    seen = health(
        [*FLEET, standing(1, "mcu")],
        [
            (inside, summary(NEW, 10, errors=2)),
            (inside, summary(OLD, 7)),
            (inside, ModelSummary(manifest=NEW, where="region", decisions=99)),
            (inside, summary("c" * 64, 50)),
            ("mcu-1", summary(OLD, 1000)),
            ("nobody", summary(OLD, 1000)),
        ],
    )
    assert (seen.target.decided.decisions, seen.target.decided.errors) == (10, 2)
    assert seen.control.decided.decisions == 7


def test_a_silent_device_is_neither_adopted_nor_healthy() -> None:
    quiet = {TARGET[0].traits.device_id, TARGET[1].traits.device_id}
    devices = [
        msgspec.structs.replace(one, last_seen=NOW - 31) if one.traits.device_id in quiet else one for one in FLEET
    ]
    seen = health(devices)
    assert seen.target.silent == 2
    assert seen.target.adopted == len(TARGET) - 2
    assert seen.target.silent_share == 2 / len(TARGET)
    assert seen.control.silent == 0


def test_outcomes_count_devices_and_only_those_of_the_target() -> None:
    first, second, third, fourth = (device.traits.device_id for device in TARGET[:4])
    outcomes = [
        (first, UpdateOutcome(manifest=NEW, event="rolled_back")),
        (first, UpdateOutcome(manifest=NEW, event="rolled_back")),
        (second, UpdateOutcome(manifest=NEW, event="adopted")),
        (third, UpdateOutcome(manifest=OLD, event="rolled_back")),
        (fourth, UpdateOutcome(manifest=NEW, event="safe_mode")),
    ]
    seen = health(FLEET, outcomes=outcomes)
    assert (seen.target.rolled_back, seen.target.safe_mode) == (1, 1)


def test_devices_that_were_not_given_the_target_cannot_speak_about_it() -> None:
    outsider = next(device.traits.device_id for device in FLEET if device.running == OLD)
    seen = health(
        [*FLEET, standing(1, "mcu")],
        [(outsider, summary(NEW, 1000, errors=1000)), ("mcu-1", summary(NEW, 1000, errors=1000))],
        [
            (outsider, UpdateOutcome(manifest=NEW, event="rolled_back")),
            ("mcu-1", UpdateOutcome(manifest=NEW, event="safe_mode")),
            ("nobody", UpdateOutcome(manifest=NEW, event="rolled_back")),
        ],
    )
    assert (seen.target.decided.decisions, seen.target.rolled_back, seen.target.safe_mode) == (0, 0, 0)
    alone = msgspec.structs.replace(PLAN, stable=NEW)  # a first version: everybody in a cohort has it
    assert health(FLEET, [(outsider, summary(NEW, 5))], plan=alone).target.decided.decisions == 5


def test_an_empty_arm_has_no_shares() -> None:
    seen = health([], plan=msgspec.structs.replace(PLAN, stable=NEW))
    assert (seen.target.silent_share, seen.target.adopted) == (0.0, 0)
    assert seen.control.decided.decisions == 0
