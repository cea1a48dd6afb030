"""From a cohort YAML to plans: which devices get a version, in which stages, and what stops it.

`read_rollout` turns the YAML into a `RolloutSpec` or says file, line, key, what was expected, what was found and what
to do. `begin` fixes everything random or dependent on the fleet (the salt and each stage's bucket bound) once, so that
a stage only ever adds devices. `advance` is the whole judgement, as a function of values: given the health of both arms
it waits, widens, completes or stops. A stop is a new plan with a higher serial that names the stable version and
withdraws the target; a version withdrawn once is never a target again.

Guardrails are looked at every second, so each is a test that stays valid under repeated looks (`evidence`); the 5 %
chance of stopping a healthy version is split over the guardrails. Decisions of one device resemble each other, which no
test over decisions accounts for: give rates a margin (`ratioToControl: 2`) when the canary is a single device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from fl_coordinator.cohorts import Guardrail, Hold, RolloutSpec, Stage
from fl_coordinator.evidence import (
    Counts,
    RatioEvidence,
    exceeding,
    observe,
    quantile_upper_bound_us,
    rate_bounds,
)
from model_delta.errors import Malformed
from model_delta.plan import BUCKETS, DeviceTraits, RolloutPlan, bucket_of, matches
from monitoring.health import ArmHealth, CohortHealth
from monitoring.telemetry import LATENCY_BOUNDS_US, ModelSummary, latency_quantile_us

ALPHA = 0.05
SALTS_TRIED = 500
PLAN_SECONDS = 400 * 86_400
SILENT_AFTER_S = 60.0
"""A device not heard for this long is silent, unless the rollout's silence guardrail says otherwise."""

State = Literal["running", "paused", "completed", "stopped", "aborted"]


class Verdict(msgspec.Struct, frozen=True):
    """One guardrail at one look: `breached`, the figure seen, what it was held against, and a sentence. `judged` is
    False while even the worst figures could not breach it: too little was seen to call it healthy."""

    metric: str
    breached: bool
    value: float
    limit: float
    text: str
    judged: bool = True


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """One rollout as it stands. `target_bounds` and `control_bounds` give each stage's bucket counts. `first_serial`
    is the serial of its first plan, `serial` that of its newest. `decisions_before` is what the target arm had decided
    when the stage began. `evidence` is kept per ratio guardrail, by its position. Times are Unix seconds."""

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
    salt = _choose_salt(spec, eligible)
    target_bounds, control_bounds = _bounds(spec, salt, [device_id for device_id, _ in eligible])
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
    evidence, verdicts = _judge(rollout, health, now)
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
            decisions_before=health.target.decided.decisions,
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


def silent_after(spec: RolloutSpec) -> float:
    """Seconds after which a device counts as silent."""
    return next((rail.within_seconds for rail in spec.guardrails if rail.metric == "silence"), SILENT_AFTER_S)


def _judge(rollout: Rollout, health: CohortHealth, now: float) -> tuple[dict[int, RatioEvidence], tuple[Verdict, ...]]:
    rails = rollout.spec.guardrails
    evidence = dict(rollout.evidence)
    verdicts: list[Verdict] = []
    tests = sum((rail.max is not None) + (rail.max_increase is not None) + (rail.ratio is not None) for rail in rails)
    alpha = ALPHA / max(1, tests)
    for index, rail in enumerate(rails):
        if rail.metric == "silence":
            verdicts.append(_silence(rail, health, now - rollout.stage_since, first=rollout.stable == rollout.target))
        elif rail.metric in ("rolled_back", "safe_mode"):
            verdicts.append(_count(rail, health.target))
        elif rail.metric.startswith("latency_"):
            verdicts.extend(_latency(rail, health, alpha))
        else:
            counts = Counts(*_rate(rail.metric, health.target.decided), *_rate(rail.metric, health.control.decided))
            if rail.ratio is not None:
                evidence[index] = observe(evidence.get(index, RatioEvidence()), counts, rail.ratio)
            others = _without_the_worst([_rate(rail.metric, one) for one in health.target.by_device])
            verdicts.extend(_rates(rail, counts, others, evidence.get(index), alpha))
    return evidence, tuple(verdicts)


def _without_the_worst(devices: Sequence[tuple[int, int]]) -> float:
    """The failure rate of all devices but the one with most failures; of the only one, if there is no other.

    `devices` are exposures and failures by device. The tests count decisions, and the decisions of one device are not
    independent: a broken or hostile one could stop a rollout by itself. So where several devices have something to say,
    a breach has to be seen without the loudest of them too. That only takes alarms away, so the tests stay valid."""
    spoke = [(total, hits) for total, hits in devices if total]
    if len(spoke) > 1:
        spoke.remove(max(spoke, key=lambda one: (one[1], one[0])))
    total = sum(total for total, _ in spoke)
    return sum(hits for _, hits in spoke) / total if total else 0.0


def _confirmed(breached: bool, others: float, limit: float, text: str) -> tuple[bool, str]:
    """Whether a breach also shows without the loudest device, and the text, which says so when it does not."""
    if breached and others <= limit:
        return False, f"{text}; one device alone, without it {others:.2%}"
    return breached, text


def _rate(metric: str, decided: ModelSummary) -> tuple[int, int]:
    """Exposures and failures in a summary for a rate metric."""
    if metric == "error_rate":
        return decided.decisions, decided.errors
    if metric == "fallback_rate":
        return decided.decisions, decided.fallbacks
    if metric == "decline_rate":
        return decided.decisions, decided.declined
    if metric == "false_positive_rate":
        return decided.labelled_legitimate, decided.false_positives
    return decided.labelled_fraud, decided.labelled_fraud - decided.true_positives  # miss_rate


def _rates(
    rail: Guardrail, counts: Counts, others: float, evidence: RatioEvidence | None, alpha: float
) -> list[Verdict]:
    seen = counts.target_hits / counts.target_total if counts.target_total else 0.0
    beside = counts.control_hits / counts.control_total if counts.control_total else 0.0
    told = f"{rail.metric} {seen:.2%} of {counts.target_total}"
    found: list[Verdict] = []
    if rail.max is not None:
        lower, _ = rate_bounds(counts.target_hits, counts.target_total, alpha)
        worst, _ = rate_bounds(counts.target_total, counts.target_total, alpha)
        text = f"{told}, allowed {rail.max:.2%}"
        breached, text = _confirmed(lower > rail.max, others, rail.max, text)
        found.append(Verdict(rail.metric, breached, seen, rail.max, text, worst > rail.max))
    if rail.max_increase is not None:
        lower, _ = rate_bounds(counts.target_hits, counts.target_total, alpha / 2)
        _, upper = rate_bounds(counts.control_hits, counts.control_total, alpha / 2)
        text = f"{told}, control {beside:.2%} of {counts.control_total}, allowed + {rail.max_increase:.2%}"
        worst, _ = rate_bounds(counts.target_total, counts.target_total, alpha / 2)
        limit = upper + rail.max_increase
        breached, text = _confirmed(lower > limit, others, beside + rail.max_increase, text)
        found.append(Verdict(rail.metric, breached, seen, beside + rail.max_increase, text, worst > limit))
    if rail.ratio is not None and evidence is not None:
        text = f"{told}, control {beside:.2%} of {counts.control_total}, allowed {rail.ratio:g} times control"
        breached, text = _confirmed(evidence.log_evidence >= math.log(1 / alpha), others, beside * rail.ratio, text)
        judged = counts.target_total > 0 and counts.control_total > 0
        found.append(Verdict(rail.metric, breached, seen, beside * rail.ratio, text, judged))
    return found


def _latency(rail: Guardrail, health: CohortHealth, alpha: float) -> list[Verdict]:
    """Whether the quantile lies above a limit: too large a share of decisions took longer than the limit."""
    q = {"latency_p50_ms": 0.50, "latency_p95_ms": 0.95, "latency_p99_ms": 0.99}[rail.metric]
    latency = health.target.decided.latency
    each_latency = [one.latency for one in health.target.by_device]
    total = sum(latency.values())
    seen_ms = latency_quantile_us(latency, q) / 1000
    found: list[Verdict] = []
    if rail.max is not None:
        lower, _ = rate_bounds(exceeding(latency, rail.max * 1000), total, alpha)
        text = f"{rail.metric} {seen_ms:.3g} ms over {total} decisions, allowed {rail.max:g} ms"
        worst, _ = rate_bounds(total, total, alpha)
        others = _without_the_worst([(sum(one.values()), exceeding(one, rail.max * 1000)) for one in each_latency])
        breached, text = _confirmed(lower > 1 - q, others, 1 - q, text)
        found.append(Verdict(rail.metric, breached, seen_ms, rail.max, text, worst > 1 - q))
    if rail.ratio is not None:
        control_us = quantile_upper_bound_us(health.control.decided.latency, q, alpha / 2)
        limit_us = rail.ratio * control_us if control_us is not None else math.inf
        # The limit is one of as many values as there are buckets, chosen by looking: alpha is split over them.
        each = alpha / 2 / len(LATENCY_BOUNDS_US)
        above = exceeding(latency, limit_us) if control_us is not None else 0
        lower, _ = rate_bounds(above, total, each)
        limit_ms = limit_us / 1000 if control_us is not None else 0.0
        allowed = f"{limit_ms:.3g} ms ({rail.ratio:g} times control)"
        text = f"{rail.metric} {seen_ms:.3g} ms over {total} decisions, allowed {allowed}"
        worst, _ = rate_bounds(total, total, each)
        judged = control_us is not None and worst > 1 - q
        others = _without_the_worst(
            [(sum(one.values()), exceeding(one, limit_us) if control_us is not None else 0) for one in each_latency]
        )
        breached, text = _confirmed(lower > 1 - q, others, 1 - q, text)
        found.append(Verdict(rail.metric, breached, seen_ms, limit_ms, text, judged))
    return found


def _count(rail: Guardrail, arm: ArmHealth) -> Verdict:
    seen = arm.rolled_back if rail.metric == "rolled_back" else arm.safe_mode
    limit = rail.max or 0.0
    return Verdict(rail.metric, seen > limit, seen, limit, f"{rail.metric}: {seen} devices, allowed {limit:g}")


def _silence(rail: Guardrail, health: CohortHealth, stage_age: float, *, first: bool) -> Verdict:
    """A silent target arm beside a talking control arm; when both are silent, the line is to blame and nothing is said.

    Judged only when a device has had the time to fall silent since the stage began, and never of a `first` version:
    nobody is beside it, and its devices have nothing else to run. The stage waits for them."""
    share, beside = health.target.silent_share, health.control.silent_share
    text = (
        f"silence: {health.target.silent} of {health.target.devices} devices not heard for {rail.within_seconds:g} s, "
        f"control {beside:.0%}, allowed + {rail.share:.0%}"
    )
    breached = not first and stage_age >= rail.within_seconds and share > beside + rail.share
    return Verdict("silence", breached, share, beside + rail.share, text)


def _lacking(rollout: Rollout, health: CohortHealth, now: float) -> str:
    """What the stage still needs before it may be widened; "" when nothing."""
    hold: Hold = rollout.spec.stages[rollout.stage].hold
    age = now - rollout.stage_since
    decided = health.target.decided.decisions - rollout.decisions_before
    heard = health.target.devices - health.target.silent
    silence = next((rail.share for rail in rollout.spec.guardrails if rail.metric == "silence"), 1.0)
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


def _choose_salt(spec: RolloutSpec, eligible: Sequence[tuple[str, bool]]) -> str:
    """The rollout's name, with a suffix if without it a stage of n devices could not be exactly n awake devices.

    Of the salts without a tie at a bound, prefers one under which the first devices, then the mirrored control's, were
    heard lately.
    """
    wanted = [stage.devices for stage in spec.stages if stage.devices is not None]
    if not wanted:
        return spec.name
    if max(wanted) > len(eligible):
        raise Malformed(
            f"rollout {spec.name}: a stage asks for {max(wanted)} device(s), found {len(eligible)} enrolled that match "
            "the cohorts; enrol more, widen the cohorts, or give the stage a share"
        )
    tries = max(8, min(SALTS_TRIED, 200_000 // len(eligible)))
    best, best_awake = "", (-1, -1)
    for attempt in range(tries):
        salt = spec.name if attempt == 0 else f"{spec.name}-{attempt}"
        ranked = sorted((bucket_of(salt, device_id), awake) for device_id, awake in eligible)
        ends = [ranked, ranked[::-1] if spec.control == "mirrored" else []]
        if any(count < len(end) and end[count - 1][0] == end[count][0] for end in ends for count in wanted):
            continue
        first, last = (sum(awake for _, awake in end[: max(wanted)]) for end in ends)
        if (first, last) > best_awake:
            best, best_awake = salt, (first, last)
        if first == max(wanted) and last == (max(wanted) if spec.control == "mirrored" else 0):
            break
    if not best:
        raise Malformed(
            f"rollout {spec.name}: no bucket bound separates exactly {wanted} of {len(eligible)} devices; use a share"
        )
    return best


def _bounds(spec: RolloutSpec, salt: str, device_ids: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bucket counts of each stage for the target and the control: they only grow, and never overlap."""
    buckets = sorted(bucket_of(salt, device_id) for device_id in device_ids)
    targets: list[int] = []
    controls: list[int] = []
    for stage in spec.stages:
        if stage.devices is not None:
            bound = buckets[stage.devices - 1] + 1
            mirrored = BUCKETS - buckets[-stage.devices]
        else:
            bound = mirrored = round((stage.share or 0.0) * BUCKETS)
        targets.append(max([bound, *targets[-1:]]))
        controls.append(min(max([mirrored, *controls[-1:]]), BUCKETS) if spec.control == "mirrored" else 0)
    # A device that ever gets the target cannot stay in the control: the target's last word wins.
    return tuple(targets), tuple(
        min(control, BUCKETS - target) for control, target in zip(controls, targets, strict=True)
    )


def _universal(spec: RolloutSpec) -> bool:
    return any(not cohort.match for cohort in spec.cohorts)


def _stage_text(rollout: Rollout) -> str:
    stage = rollout.spec.stages[rollout.stage]
    size = f"{stage.devices} device(s)" if stage.devices is not None else f"{stage.share or 0.0:.0%}"
    return f"stage {rollout.stage + 1} of {len(rollout.spec.stages)}: {size} on {rollout.target[:16]}…"
