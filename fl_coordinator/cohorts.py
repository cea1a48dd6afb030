"""The cohort YAML: what an operator writes, and what is said when it is wrong.

`atoll/examples/canary.yaml` shows all of it; `yaml_tree` reads the text and makes the complaints.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import yaml

from fl_coordinator.yaml_tree import Place, read_object
from model_delta.plan import Cohort
from model_delta.topics import NAME, NAME_TOLD

STAGES_MAX = 32

RATES = ("error_rate", "fallback_rate", "decline_rate", "false_positive_rate", "miss_rate")
PAYMENT_RATES = ("decline_rate", "false_positive_rate", "miss_rate")
"""Those of RATES that only a version which decides payments has."""
LATENCIES = ("latency_p50_ms", "latency_p95_ms", "latency_p99_ms")
COUNTS = ("rolled_back", "safe_mode")
METRICS = (*RATES, *LATENCIES, *COUNTS, "silence")


class Hold(msgspec.Struct, frozen=True):
    """What a stage needs before it is widened: seconds, answers of the target (decisions about payments, inferences),
    share of heard devices that run it."""

    min_seconds: float = 0.0
    min_decisions: int = 0
    min_adopted: float = 0.8


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """One stage: exactly `devices` of the devices known at the start, or a `share` (0 to 1] of the buckets."""

    devices: int | None = None
    share: float | None = None
    hold: Hold = Hold()


class Guardrail(msgspec.Struct, frozen=True, kw_only=True):
    """A limit on one metric. Rates and shares are fractions, latencies milliseconds; `ratio` is to the control arm."""

    metric: str
    max: float | None = None
    max_increase: float | None = None
    ratio: float | None = None
    share: float = 0.0
    within_seconds: float = 0.0


class RolloutSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The YAML as a value. `target` is a manifest digest, a release number, a name, or `latest`."""

    name: str
    model: str
    target: str
    cohorts: tuple[Cohort, ...]
    control: Literal["mirrored", "none"] = "mirrored"
    stages: tuple[Stage, ...]
    guardrails: tuple[Guardrail, ...] = ()
    rollback_auto: bool = True


def read_rollout(text: str, file: str = "rollout.yaml") -> RolloutSpec:
    """Read the YAML. Raises Malformed with one line that names file, line, key, expected, found and what to do."""
    name, described = read_object(text, file, "Rollout", "atoll/examples/canary.yaml")
    spec = described.map({"model", "cohorts", "strategy"}, optional={"target", "guardrails", "rollback"})
    canary = spec["strategy"].map({"canary"})["canary"].map({"stages"}, optional={"control"})
    control = canary["control"].one_of(("mirrored", "none")) if "control" in canary else "mirrored"
    return RolloutSpec(
        name=name,
        model=spec["model"].text("a model's name", NAME_TOLD, NAME),
        target=spec["target"].text("a manifest digest, a release number, a name or `latest`")
        if "target" in spec
        else "latest",
        cohorts=_cohorts(spec["cohorts"]),
        control="mirrored" if control == "mirrored" else "none",
        stages=_stages(canary["stages"]),
        guardrails=tuple(_guardrail(item, control) for item in spec["guardrails"].items(METRICS_MAX))
        if "guardrails" in spec
        else (),
        rollback_auto=spec["rollback"].map({"auto"})["auto"].yes_or_no() if "rollback" in spec else True,
    )


METRICS_MAX = 32


_TRAITS = {"deviceClass": "device_class", "region": "region", "deviceId": "device_id"}


def _cohorts(place: Place) -> tuple[Cohort, ...]:
    cohorts = []
    for item in place.items(64):
        fields = item.map({"name"}, optional={"match"})
        name = fields["name"].text("a name", NAME_TOLD, NAME)
        predicates: dict[str, tuple[str, ...]] = {}
        for key, value in (fields["match"].free_map("a mapping of traits") if "match" in fields else {}).items():
            if isinstance(value.node, yaml.SequenceNode):
                allowed = tuple(entry.text("a value") for entry in value.items(10_000))
            else:
                allowed = (value.text("a value or a list of values"),)
            if not allowed:
                raise value.wrong("at least one value", "list one, or remove the key", "an empty list")
            predicates[_TRAITS.get(key, key)] = allowed
        cohorts.append(Cohort(name, predicates))
    if not cohorts:
        raise place.wrong("at least one cohort", "add `- name: everyone`", "an empty list")
    return tuple(cohorts)


def _stages(place: Place) -> tuple[Stage, ...]:
    stages: list[Stage] = []
    for item in place.items(STAGES_MAX):
        fields = item.map(set(), optional={"devices", "share", "hold"})
        if ("devices" in fields) == ("share" in fields):
            raise item.wrong("`devices` or `share`", "give exactly one of them", ", ".join(fields) or "neither")
        hold = _hold(fields["hold"]) if "hold" in fields else Hold()
        before = stages[-1] if stages else Stage(devices=0)
        if "devices" in fields:
            count = int(fields["devices"].number("a number of devices", 1, 100_000, whole=True))
            if before.devices is None or count <= before.devices:
                raise fields["devices"].wrong("more devices than the stage before", "stages only grow")
            stages.append(Stage(devices=count, hold=hold))
        else:
            share = fields["share"].share()
            if share <= (before.share or 0.0):
                raise fields["share"].wrong("a larger share than the stage before", "stages only grow")
            stages.append(Stage(share=share, hold=hold))
    if not stages:
        raise place.wrong("at least one stage", "add `- share: 100%`", "an empty list")
    return tuple(stages)


def _hold(place: Place) -> Hold:
    fields = place.map(set(), optional={"minSeconds", "minDecisions", "minAdopted"})
    hold = Hold()
    return Hold(
        fields["minSeconds"].number("seconds", 0, 10_000_000) if "minSeconds" in fields else hold.min_seconds,
        int(fields["minDecisions"].number("a number of decisions", 0, 1e12, whole=True))
        if "minDecisions" in fields
        else hold.min_decisions,
        fields["minAdopted"].share() if "minAdopted" in fields else hold.min_adopted,
    )


def _guardrail(place: Place, control: str) -> Guardrail:
    known = place.map({"metric"}, optional={"max", "maxIncrease", "ratioToControl", "share", "withinSeconds"})
    metric = known["metric"].one_of(METRICS)
    if metric == "silence":
        fields = place.map({"metric", "share", "withinSeconds"})
        within = fields["withinSeconds"].number("seconds", 1, 10_000_000)
        return Guardrail(metric=metric, share=fields["share"].share(), within_seconds=within)
    if metric in COUNTS:
        fields = place.map({"metric", "max"})
        return Guardrail(metric=metric, max=fields["max"].number("a number of devices", 0, 1e9, whole=True))
    limits = {"max", "ratioToControl"} if metric in LATENCIES else {"max", "maxIncrease", "ratioToControl"}
    fields = place.map({"metric"}, optional=limits)
    if len(fields) == 1:
        raise place.wrong(f"a limit ({', '.join(sorted(limits))})", "add one", "only the metric")
    for key in ("maxIncrease", "ratioToControl"):
        if key in fields and control == "none":
            raise fields[key].wrong("a control arm to compare with", "set `control: mirrored`, or use `max`")
    rate = metric in RATES
    most = fields.get("max")
    return Guardrail(
        metric=metric,
        max=None if most is None else most.share() if rate else most.number("milliseconds", 0.001, 1e6),
        max_increase=fields["maxIncrease"].share() if "maxIncrease" in fields else None,
        ratio=fields["ratioToControl"].number("a ratio", 1, 1000) if "ratioToControl" in fields else None,
    )
