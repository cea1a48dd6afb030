"""The cohort YAML: what an operator writes, and what is said when it is wrong.

The form is that of a Kubernetes object (`apiVersion`, `kind`, `metadata`, `spec`); `atoll/examples/canary.yaml` shows
all of it. The text is read as a tree of nodes that know their lines, never as Python objects, so that each complaint
names file, line, key, what was expected, what was found and what to do. Every key is known or refused: a misspelt
guardrail must not be a guardrail that silently does not exist.
"""

from __future__ import annotations

import re
from collections.abc import Set
from typing import Literal

import msgspec
import yaml

from model_delta.errors import Malformed
from model_delta.plan import Cohort

API_VERSION = "atoll/v1"
YAML_BYTES_MAX = 65_536
STAGES_MAX = 32
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")

RATES = ("error_rate", "fallback_rate", "decline_rate", "false_positive_rate", "miss_rate")
LATENCIES = ("latency_p50_ms", "latency_p95_ms", "latency_p99_ms")
COUNTS = ("rolled_back", "safe_mode")
METRICS = (*RATES, *LATENCIES, *COUNTS, "silence")


class Hold(msgspec.Struct, frozen=True):
    """What a stage needs before it is widened: seconds, decisions by the target, share of heard devices that run it."""

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
    if len(text.encode(errors="replace")) > YAML_BYTES_MAX:
        raise Malformed(f"{file}: expected at most {YAML_BYTES_MAX} bytes of YAML, found {len(text)} characters")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise Malformed(f"{file}:{line}: expected YAML, found {error.problem}; check the indentation") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise Malformed(f"{file}:1: expected YAML, found {type(error).__name__}; check the file's encoding") from None
    if root is None:
        raise Malformed(f"{file}:1: expected a rollout, found an empty file; start from atoll/examples/canary.yaml")
    top = _Place(file, "", root).map({"apiVersion", "kind", "metadata", "spec"})
    top["apiVersion"].one_of((API_VERSION,))
    top["kind"].one_of(("Rollout",))
    name = top["metadata"].map({"name"})["name"].text("a name", "letters, digits, '-' and '.'", _NAME)
    spec = top["spec"].map({"model", "cohorts", "strategy"}, optional={"target", "guardrails", "rollback"})
    canary = spec["strategy"].map({"canary"})["canary"].map({"stages"}, optional={"control"})
    control = canary["control"].one_of(("mirrored", "none")) if "control" in canary else "mirrored"
    return RolloutSpec(
        name=name,
        model=spec["model"].text("a model's name", "letters, digits, '-' and '.'", _NAME),
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


class _Place:
    """A node of the YAML tree together with the path that leads to it."""

    def __init__(self, file: str, path: str, node: yaml.Node) -> None:
        self.file, self.path, self.node = file, path, node

    def wrong(self, expected: str, advice: str, found: str | None = None) -> Malformed:
        """The complaint about this node."""
        where = f"{self.file}:{self.node.start_mark.line + 1}: {self.path or 'document'}"
        return Malformed(f"{where}: expected {expected}, found {found or self._found()}; {advice}")

    def map(self, required: set[str], optional: Set[str] = frozenset()) -> dict[str, _Place]:
        """The children of a mapping with exactly these keys."""
        known = required | optional
        listed = ", ".join(sorted(known))
        children = self.free_map(f"a mapping with {listed}")
        for key, child in children.items():
            if key not in known:
                raise child.wrong(f"one of {listed}", "correct or remove the key", f"the key {key!r}")
        for key in sorted(required - children.keys()):
            raise self.wrong(f"the key {key!r}", f"add `{key}:`", f"only {', '.join(sorted(children)) or 'nothing'}")
        return children

    def free_map(self, expected: str) -> dict[str, _Place]:
        """The children of a mapping with any keys; a key may stand there once."""
        if not isinstance(self.node, yaml.MappingNode):
            raise self.wrong(expected, "indent `key: value` lines below it")
        children: dict[str, _Place] = {}
        for key_node, value_node in self.node.value:
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
            child = _Place(self.file, f"{self.path}.{key}".lstrip("."), value_node)
            if key in children:
                raise child.wrong(f"{key!r} once", "remove one of them", "it twice")
            children[key] = child
        return children

    def items(self, most: int) -> list[_Place]:
        """The children of a list."""
        if not isinstance(self.node, yaml.SequenceNode):
            raise self.wrong("a list", "start each item with `- `")
        if len(self.node.value) > most:
            raise self.wrong(f"at most {most} items", "shorten the list", str(len(self.node.value)))
        return [_Place(self.file, f"{self.path}[{index}]", node) for index, node in enumerate(self.node.value)]

    def text(self, expected: str, form: str = "", pattern: re.Pattern[str] | None = None) -> str:
        """A scalar as text."""
        if not isinstance(self.node, yaml.ScalarNode) or not self.node.value:
            raise self.wrong(expected, "write it after the colon")
        if pattern is not None and not pattern.fullmatch(self.node.value):
            raise self.wrong(f"{expected} of {form}", "rename it")
        return str(self.node.value)

    def one_of(self, values: tuple[str, ...]) -> str:
        """A scalar with one of a few values."""
        if not isinstance(self.node, yaml.ScalarNode) or self.node.value not in values:
            raise self.wrong(" or ".join(values), "use one of these")
        return str(self.node.value)

    def yes_or_no(self) -> bool:
        """true or false."""
        return self.one_of(("true", "false")) == "true"

    def number(self, expected: str, low: float, high: float, whole: bool = False) -> float:
        """A number in [low, high]."""
        try:
            value = float(self.text(expected))
        except ValueError:
            raise self.wrong(expected, f"write a number from {low:g} to {high:g}") from None
        if not low <= value <= high or (whole and value != int(value)):
            raise self.wrong(expected, f"write a {'whole ' if whole else ''}number from {low:g} to {high:g}")
        return value

    def share(self) -> float:
        """A percentage (`25%`) as a fraction."""
        text = self.text("a percentage such as 25%")
        try:
            value = float(text.removesuffix("%")) / 100
        except ValueError:
            value = -1.0
        if not text.endswith("%") or not 0 <= value <= 1:
            raise self.wrong("a percentage from 0% to 100%", "write it like 25%")
        return value

    def _found(self) -> str:
        if isinstance(self.node, yaml.ScalarNode):
            return repr(self.node.value[:60]) if self.node.value else "nothing"
        return "a list" if isinstance(self.node, yaml.SequenceNode) else "a mapping"


_TRAITS = {"deviceClass": "device_class", "region": "region", "deviceId": "device_id"}


def _cohorts(place: _Place) -> tuple[Cohort, ...]:
    cohorts = []
    for item in place.items(64):
        fields = item.map({"name"}, optional={"match"})
        name = fields["name"].text("a name", "letters, digits, '-' and '.'", _NAME)
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


def _stages(place: _Place) -> tuple[Stage, ...]:
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


def _hold(place: _Place) -> Hold:
    fields = place.map(set(), optional={"minSeconds", "minDecisions", "minAdopted"})
    hold = Hold()
    return Hold(
        fields["minSeconds"].number("seconds", 0, 10_000_000) if "minSeconds" in fields else hold.min_seconds,
        int(fields["minDecisions"].number("a number of decisions", 0, 1e12, whole=True))
        if "minDecisions" in fields
        else hold.min_decisions,
        fields["minAdopted"].share() if "minAdopted" in fields else hold.min_adopted,
    )


def _guardrail(place: _Place, control: str) -> Guardrail:
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
