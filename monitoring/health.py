"""How a cohort is doing: two arms of a rollout, counted side by side.

`cohort_health` folds what the ledger knows into one value, which `rollout.advance` judges. The target arm is every
device that the plan assigns the target. The control arm is every other device of the cohorts: buckets are random, so
all of them are a fair comparison, not only the mirrored range that the plan keeps free of the target. Decisions are
counted since the rollout began, by version; device counts are of this moment.

Silence is counted apart: a device not heard for a while is neither healthy nor faulty; it is no evidence of health.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from model_delta.plan import DeviceTraits, RolloutPlan, assign
from monitoring.telemetry import ModelSummary, UpdateOutcome, merge_summaries


class DeviceStanding(msgspec.Struct, frozen=True):
    """What was last heard of a device. `last_seen` is Unix seconds (0.0: never)."""

    traits: DeviceTraits
    last_seen: float = 0.0
    running: str = ""
    safe_mode: bool = False


class ArmHealth(msgspec.Struct, frozen=True, kw_only=True):
    """One arm: devices now, and what its version decided since the rollout began. `silent` of `devices` were not heard
    lately; `adopted` of the others run the arm's version. `rolled_back` and `safe_mode` count devices. `by_device` is
    `decided` apart, by device that answered anything (of the target arm only)."""

    manifest: str
    devices: int = 0
    silent: int = 0
    adopted: int = 0
    rolled_back: int = 0
    safe_mode: int = 0
    decided: ModelSummary
    by_device: tuple[ModelSummary, ...] = ()

    @property
    def silent_share(self) -> float:
        """Share of the arm's devices not heard lately; 0.0 for an empty arm."""
        return self.silent / self.devices if self.devices else 0.0


class CohortHealth(msgspec.Struct, frozen=True):
    """The two arms of one rollout at one moment."""

    target: ArmHealth
    control: ArmHealth


def cohort_health(
    plan: RolloutPlan,
    devices: Sequence[DeviceStanding],
    summaries: Iterable[tuple[str, ModelSummary]],
    outcomes: Iterable[tuple[str, UpdateOutcome]],
    *,
    now: float,
    silent_after: float,
) -> CohortHealth:
    """Count both arms of `plan`.

    `summaries` and `outcomes` are (device id, record) pairs since the rollout began; only decisions made on the device
    count, by the version that made them. A device is silent when it was not heard for `silent_after` seconds before
    `now`. Outcomes count a device once per kind, and only those of the target. What is said about the target counts
    only from devices that the plan gives it to: the others cannot stop a rollout, or praise it, by what they claim.
    """
    arms = {device.traits.device_id: assign(plan, device.traits).arm for device in devices}

    def may_tell(device_id: str, manifest: str) -> bool:
        arm = arms.get(device_id, "excluded")
        return arm == "target" if manifest == plan.target != plan.stable else arm != "excluded"

    totals = {
        plan.target: ModelSummary(manifest=plan.target, where="device"),
        plan.stable: ModelSummary(manifest=plan.stable, where="device"),
    }
    alone: dict[str, ModelSummary] = {}
    for device_id, summary in summaries:
        if summary.where == "device" and summary.manifest in totals and may_tell(device_id, summary.manifest):
            totals[summary.manifest] = merge_summaries(totals[summary.manifest], summary)
            if summary.manifest == plan.target:
                alone[device_id] = merge_summaries(alone[device_id], summary) if device_id in alone else summary
    rolled_back, unsafe = set(), set()
    for device_id, outcome in outcomes:
        if outcome.manifest != plan.target or not may_tell(device_id, plan.target):
            continue
        if outcome.event == "rolled_back":
            rolled_back.add(device_id)
        elif outcome.event == "safe_mode":
            unsafe.add(device_id)
    target = [device for device in devices if arms[device.traits.device_id] == "target"]
    control = [device for device in devices if arms[device.traits.device_id] in ("control", "stable")]
    unsafe |= {device.traits.device_id for device in target if device.safe_mode}
    control_decided = totals[plan.stable]
    if plan.stable == plan.target:  # a first version has nothing to be compared with
        control_decided = ModelSummary(manifest=plan.stable, where="device")
    return CohortHealth(
        ArmHealth(
            manifest=plan.target,
            devices=len(target),
            silent=_silent(target, now - silent_after),
            adopted=_adopted(target, plan.target, now - silent_after),
            rolled_back=len(rolled_back),
            safe_mode=len(unsafe),
            decided=totals[plan.target],
            by_device=tuple(summary for summary in alone.values() if summary.answers),
        ),
        ArmHealth(
            manifest=plan.stable,
            devices=len(control),
            silent=_silent(control, now - silent_after),
            adopted=_adopted(control, plan.stable, now - silent_after),
            safe_mode=sum(device.safe_mode for device in control),
            decided=control_decided,
        ),
    )


def _silent(devices: Iterable[DeviceStanding], since: float) -> int:
    return sum(device.last_seen < since for device in devices)


def _adopted(devices: Iterable[DeviceStanding], manifest: str, since: float) -> int:
    return sum(device.running == manifest for device in devices if device.last_seen >= since)
