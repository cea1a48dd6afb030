"""From a cohort YAML to plans: which devices get a version, in which stages, and what stops it.

`cohorts` reads the YAML. `begin` fixes everything random or dependent on the fleet once (`staging`). `advance` is the
whole judgement, as a function of values: given the health of both arms (`guardrails`) it waits, widens, completes or
stops. A stop is a new plan with a higher serial that names the stable version and withdraws the target; a version
withdrawn once is never a target again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from fl_coordinator.cohorts import Hold, RolloutSpec, Stage
from fl_coordinator.evidence import RatioEvidence
from fl_coordinator.guardrails import Verdict, judge
from fl_coordinator.staging import choose_salt, stage_bounds
from model_delta.errors import Malformed
from model_delta.plan import DeviceTraits, RolloutPlan, matches
from monitoring.health import CohortHealth

PLAN_SECONDS = 400 * 86_400
SILENT_AFTER_S = 60.0
"""A device not heard for this long is silent, unless the rollout's silence guardrail says otherwise."""

SUPERSEDED = "superseded"
"""The event that ends a rollout in whose place a later one came."""

State = Literal["running", "paused", "completed", "stopped", "aborted"]


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """One rollout as it stands. `target_bounds` and `control_bounds` give each stage's bucket counts. `first_serial`
    is the serial of its first plan, `serial` that of its newest. `decisions_before` is how often the target arm had
    answered when the stage began. `evidence` is kept per ratio guardrail, by its position. Times are Unix seconds."""

    name: str
    tenant: str
    yaml: str
    spec: RolloutSpec
    target: str
    stable: str
    salt: str
    target_bounds: tuple[int, ...]
    control_bounds: tuple[int, ...]
    state: State = "running"
    stage: int = 0
    stage_since: float
    first_serial: int
    serial: int
    created: float
    decisions_before: int = 0
    reason: str = ""
    evidence: dict[int, RatioEvidence] = {}
    verdicts: tuple[Verdict, ...] = ()

    @property
    def model(self) -> str:
        """The model that is rolled out."""
        return self.spec.model

    @property
    def live(self) -> bool:
        """Whether it still has something to decide."""
        return self.state in ("running", "paused")


class Advance(msgspec.Struct, frozen=True):
    """What a look led to: the rollout after it, a plan to sign and publish (None: nothing changes on devices), and what
    happened, for the history (`event` is "" when there is nothing to say)."""

    rollout: Rollout
    plan: RolloutPlan | None = None
    event: str = ""
    text: str = ""


def begin(
    spec: RolloutSpec,
    *,
    yaml: str,
    tenant: str,
    target: str,
    stable: str,
    devices: Sequence[tuple[DeviceTraits, bool]],
    serial: int,
    withdrawn: Mapping[str, str],
    now: float,
) -> Advance:
    """Start a rollout: fix the salt and the stages' bounds, and make the first plan.

    `devices` are all known devices, each with whether it was heard lately. The first version of a model (`stable` is
    "") has nothing to fall back to, so it goes to all devices of the cohorts at once. Raises Malformed for a withdrawn
    target and for `devices: n` with fewer than n known devices.
    """
    if target in withdrawn:
        raise Malformed(
            f"rollout {spec.name}: version {target[:16]}… was withdrawn ({withdrawn[target]}); publish a corrected one"
        )
    first = stable in ("", target)
    eligible = [
        (traits.device_id, awake)
        for traits, awake in devices
        if traits.tenant == tenant and any(matches(cohort, traits) for cohort in spec.cohorts)
    ]
    if first:
        alone = (msgspec.structs.replace(rail, ratio=None, max_increase=None) for rail in spec.guardrails)
        spec = msgspec.structs.replace(
            spec,
            control="none",
            stages=(Stage(share=1.0, hold=spec.stages[-1].hold),),
            guardrails=tuple(rail for rail in alone if rail.max is not None or rail.metric == "silence"),
        )
    salt = choose_salt(spec, eligible)
    target_bounds, control_bounds = stage_bounds(spec, salt, [device_id for device_id, _ in eligible])
    rollout = Rollout(
        name=spec.name,
        tenant=tenant,
        yaml=yaml,
        spec=spec,
        target=target,
        stable=target if first else stable,
        salt=salt,
        target_bounds=target_bounds,
        control_bounds=control_bounds,
        stage_since=now,
        first_serial=serial,
        serial=serial,
        created=now,
    )
    plan = plan_of(rollout, withdrawn, now)
    return Advance(rollout, plan, "begun", _stage_text(rollout))


def plan_of(rollout: Rollout, withdrawn: Mapping[str, str], now: float) -> RolloutPlan:
    """The plan that says what `rollout` now wants of devices."""
    over = rollout.state in ("stopped", "aborted")
    everyone = rollout.state == "completed" and _universal(rollout.spec)
    return RolloutPlan(
        tenant=rollout.tenant,
        model=rollout.model,
        name=rollout.name,
        serial=rollout.serial,
        salt=rollout.salt,
        cohorts=rollout.spec.cohorts,
        stage=rollout.stage,
        target_buckets=0 if over else rollout.target_bounds[rollout.stage],
        control_buckets=0 if over else rollout.control_bounds[rollout.stage],
        target=rollout.target,
        stable=rollout.target if everyone else rollout.stable,
        withdrawn=tuple(sorted(withdrawn)),
        issued=int(now),
        expires=int(now) + PLAN_SECONDS,
    )


def advance(
    rollout: Rollout, health: CohortHealth, *, now: float, serial: int, withdrawn: Mapping[str, str]
) -> Advance:
    """Take one look at the health of both arms: wait, widen, complete, pause or stop. `serial` is the next free one."""
    if rollout.state != "running":
        return Advance(rollout)
    evidence, verdicts = judge(
        rollout.spec.guardrails,
        rollout.evidence,
        health,
        stage_age=now - rollout.stage_since,
        first=rollout.stable == rollout.target,
    )
    rollout = msgspec.structs.replace(rollout, evidence=evidence, verdicts=verdicts)
    breaches = [verdict.text for verdict in verdicts if verdict.breached]
    if breaches:
        if rollout.spec.rollback_auto:
            return stop(rollout, "stopped", "; ".join(breaches), now=now, serial=serial, withdrawn=withdrawn)
        paused = msgspec.structs.replace(rollout, state="paused", reason="; ".join(breaches))
        return Advance(paused, None, "paused", f"waits for an operator: {paused.reason}")
    lacking = _lacking(rollout, health, now)
    if lacking:
        return Advance(msgspec.structs.replace(rollout, reason=f"waits for {lacking}"))
    if rollout.stage + 1 < len(rollout.spec.stages):
        wider = msgspec.structs.replace(
            rollout,
            stage=rollout.stage + 1,
            stage_since=now,
            serial=serial,
            decisions_before=health.target.decided.answers,
            reason="",
        )
        return Advance(wider, plan_of(wider, withdrawn, now), "widened", _stage_text(wider))
    done = msgspec.structs.replace(rollout, state="completed", serial=serial, reason="")
    whom = "everybody's stable version" if _universal(rollout.spec) else "the cohorts' version"
    return Advance(done, plan_of(done, withdrawn, now), "completed", f"{done.target[:16]}… is {whom}")


def stop(
    rollout: Rollout,
    state: Literal["stopped", "aborted"],
    reason: str,
    *,
    now: float,
    serial: int,
    withdrawn: Mapping[str, str],
) -> Advance:
    """End a rollout: the target is withdrawn and a plan sends every device back to the stable version.

    A first version cannot be withdrawn, for there is nothing to return to: the rollout ends and the plan stays.
    """
    if rollout.stable == rollout.target:
        ended = msgspec.structs.replace(rollout, state=state, reason=reason)
        return Advance(ended, None, state, f"{reason}; there is no earlier version to return to")
    ended = msgspec.structs.replace(rollout, state=state, reason=reason, serial=serial)
    return Advance(ended, plan_of(ended, {**withdrawn, rollout.target: reason}, now), state, reason)


def next_stable(rollout: Rollout) -> str | None:
    """The model's new stable version if this rollout settled it, else None."""
    first = rollout.stable == rollout.target
    return rollout.target if first or (rollout.state == "completed" and _universal(rollout.spec)) else None


def holds_devices(rollout: Rollout) -> bool:
    """Whether devices of a cohort still depend on this rollout's plan: another version must not replace the plan."""
    settled = rollout.stable == rollout.target or _universal(rollout.spec)
    return rollout.live or (rollout.state == "completed" and not settled)


def standing(rollout: Rollout, in_stage: int | None = None, superseded: bool = False) -> str:
    """How it stands, in a few words for people; `in_stage` devices are in its stage now (None: nobody has counted),
    `superseded` says that a later rollout took its place."""
    if superseded:
        return "superseded"
    if rollout.state == "running" and in_stage == 0:
        return "waiting for devices"
    if rollout.state == "paused":
        return "paused, waits for you"
    if rollout.state in ("stopped", "aborted"):
        first = rollout.stable == rollout.target
        return f"{rollout.state}; devices keep this first version" if first else f"{rollout.state}, rolled back"
    return rollout.state


def silent_after(spec: RolloutSpec) -> float:
    """Seconds after which a device counts as silent."""
    return next((rail.within_seconds for rail in spec.guardrails if rail.metric == "silence"), SILENT_AFTER_S)


def _lacking(rollout: Rollout, health: CohortHealth, now: float) -> str:
    """What the stage still needs before it may be widened; "" when nothing."""
    hold: Hold = rollout.spec.stages[rollout.stage].hold
    age = now - rollout.stage_since
    decided = health.target.decided.answers - rollout.decisions_before
    heard = health.target.devices - health.target.silent
    silence = next((rail.share for rail in rollout.spec.guardrails if rail.metric == "silence"), 1.0)
    if health.target.devices == 0:
        return f"devices: none that follows {rollout.model} is in this stage yet"
    if age < hold.min_seconds:
        return f"{hold.min_seconds - age:.0f} more seconds"
    if heard == 0:
        return "a device of this stage to be heard"
    if health.target.adopted < math.ceil(hold.min_adopted * heard):
        return f"{health.target.adopted} of {heard} devices to become {hold.min_adopted:.0%} of them"
    if health.target.silent_share > silence:
        return f"{health.target.silent} silent devices"
    if decided < hold.min_decisions:
        return f"{hold.min_decisions - decided} more decisions"
    unjudged = [verdict.metric for verdict in rollout.verdicts if not verdict.judged]
    if unjudged:
        return f"more evidence on {', '.join(dict.fromkeys(unjudged))}"
    return ""


def _universal(spec: RolloutSpec) -> bool:
    return any(not cohort.match for cohort in spec.cohorts)


def _stage_text(rollout: Rollout) -> str:
    stage = rollout.spec.stages[rollout.stage]
    size = f"{stage.devices} device(s)" if stage.devices is not None else f"{stage.share or 0.0:.0%}"
    return f"stage {rollout.stage + 1} of {len(rollout.spec.stages)}: {size} on {rollout.target[:16]}…"
