"""The round YAML: what an operator asks of a federated round, and what is said when it is wrong.

`atoll/examples/round.yaml` shows all of it; `yaml_tree` reads the text and makes the complaints. A number that does not
go with another one (a quorum too small for f) is complained about at its line too.
"""

from __future__ import annotations

import re
from typing import Any

from fl_coordinator.promotion import Limits
from fl_coordinator.rounds import POLICIES, REVEALS, Privacy, Quota, RoundSpec
from fl_coordinator.yaml_tree import Place, read_object
from model_delta.topics import NAME, NAME_TOLD

EXAMPLE = "atoll/examples/round.yaml"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_NUMBERS: dict[str, tuple[str, float, float, bool]] = {
    # key of the YAML -> field of the spec, lowest, highest, whole
    "quorum": ("quorum", 2, 100_000, True),
    "contributions_max": ("contributions_max", 2, 100_000, True),
    "clip": ("clip_norm_l2", 1e-6, 1e6, False),
    "eps": ("eps_l2", 1e-6, 1e6, False),
    "f": ("hostile_max", 0, 10_000, True),
    "m_min": ("selected_min", 2, 100_000, True),
}
_TRAINING: dict[str, tuple[str, float, float, bool]] = {
    "steps": ("steps", 1, 100_000, True),
    "batch_size": ("batch_size", 1, 100_000, True),
    "learning_rate": ("learning_rate", 1e-9, 100, False),
    "momentum": ("momentum", 0, 0.999, False),
    "positive_weight": ("positive_weight", 1e-3, 1e6, False),
}
_GATES: dict[str, tuple[str, float, float, bool]] = {
    "precision_loss": ("precision_loss_max", 0, 1, False),
    "slice_loss": ("slice_loss_max", 0, 1, False),
    "slice_frauds_min": ("slice_frauds_min", 1, 1e9, True),
    "latency_ratio": ("latency_ratio_max", 1, 1000, False),
    "latency_slack_us": ("latency_slack_us", 0, 1e9, False),
    "size_ratio": ("size_ratio_max", 0.01, 1000, False),
}
_DURATIONS = {"deadline": "deadline_s", "aggregation": "aggregation_s"}
_OTHERS = {"base", "reveal", "policy", "training", "privacy", "gates", "quota", "autopilot", "rollout"}


def read_round(text: str, file: str = "round.yaml") -> tuple[RoundSpec, str, str]:
    """The spec that a YAML describes, and the files that its `rollout` and `training.graph` name ("" for none).

    Raises Malformed with one line that names file, line, key, expected, found and what to do.
    """
    name, place = read_object(text, file, "Round", EXAMPLE)
    fields = place.map({"model"}, optional={*_NUMBERS, *_DURATIONS, *_OTHERS})
    told: dict[str, Place] = {}
    graph = ""
    values = _numbers(fields, _NUMBERS, told)
    for key, field in _DURATIONS.items():
        if key in fields:
            values[field], told[field] = _seconds(fields[key]), fields[key]
    if "training" in fields:
        training = fields["training"].map(set(), optional={*_TRAINING, "graph"})
        values |= _numbers(training, _TRAINING, told)
        graph = training["graph"].text("a file made by `atoll model training-graph`") if "graph" in training else ""
    for key, allowed in (("reveal", REVEALS), ("policy", POLICIES)):
        if key in fields:
            values[key], told[key] = fields[key].one_of(allowed), fields[key]
    if "reveal" in told:
        told.setdefault("policy", told["reveal"])
    if "privacy" in fields:
        values["privacy"], told["privacy"] = _privacy(fields["privacy"]), fields["privacy"]
    if "gates" in fields:
        values["gates"] = Limits(**_numbers(fields["gates"].map(set(), optional=_GATES.keys()), _GATES, {}))
    if "quota" in fields:
        values["quota"], told["quota"] = _quota(fields["quota"]), fields["quota"]
    if "base" in fields:
        values["base"] = fields["base"].text("a manifest digest", "64 hex digits", _DIGEST)
    autopilot = fields["autopilot"].yes_or_no() if "autopilot" in fields else False
    if "rollout" in fields and not autopilot:
        raise fields["rollout"].wrong("`autopilot: true` with it", "add that, or remove `rollout`", "none")
    model = fields["model"].text("a model's name", NAME_TOLD, NAME)
    spec = RoundSpec(model=model, name=name, autopilot=autopilot, **values)
    problem = spec.problem()
    if problem is not None:
        at = told.get(problem[0], place)
        raise at.refused(problem[1])
    return spec, fields["rollout"].text("a file with a rollout") if "rollout" in fields else "", graph


def _numbers(
    fields: dict[str, Place], known: dict[str, tuple[str, float, float, bool]], told: dict[str, Place]
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, (field, low, high, whole) in known.items():
        if key in fields:
            number = fields[key].number(f"a number from {low:g} to {high:g}", low, high, whole)
            values[field] = int(number) if whole else number
            told[field] = fields[key]
    return values


def _seconds(place: Place) -> float:
    text = place.text("a duration such as 60s, 10m, 2h or 1d")
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)([smhd]?)", text)
    if found is None:
        raise place.wrong("a duration", "write it like 60s, 10m, 2h or 1d")
    return float(found[1]) * _SECONDS[found[2]]


def _privacy(place: Place) -> Privacy:
    fields = place.map({"epsilon", "delta", "noise_multiplier"}, optional={"epsilon_device"})
    epsilon = fields["epsilon"].number("a budget above 0", 1e-6, 1e6)
    return Privacy(
        epsilon=epsilon,
        delta=fields["delta"].number("a probability above 0", 1e-15, 0.5),
        noise_multiplier=fields["noise_multiplier"].number("a multiple of the clip norm", 1e-3, 10_000),
        epsilon_device=fields["epsilon_device"].number("a budget above 0", 1e-6, 1e6)
        if "epsilon_device" in fields
        else 0.0,
    )


def _quota(place: Place) -> Quota:
    fields = place.map(set(), optional={"per_device", "per_group", "group"})
    before = Quota()

    def number(key: str) -> int:
        return int(fields[key].number("a number of contributions", 1, 1e6, whole=True)) if key in fields else 0

    group = fields["group"].text("a label of the enrolment") if "group" in fields else before.group
    return Quota(per_device=number("per_device"), per_group=number("per_group"), group=group)
