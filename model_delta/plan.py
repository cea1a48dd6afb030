"""Who should run which version.

A `RolloutPlan` is signed and the same for everybody; `assign(plan, traits)` is pure, so a device, a gateway, the
coordinator and a simulator get the same answer from the same bytes. A device belongs to the rollout if one of the
cohorts selects it (predicates on its traits); it is in the stage if its bucket lies below the stage's bound. Growing
the bound only adds devices and never swaps them. The control group grows from the other end of the bucket range.

Bucketing is murmur3_x86_32(utf8(salt + ":" + device id), seed 0) mod 10,000: Unleash's function with a hundred times
finer buckets, and 30 lines of C on a microcontroller.
"""

from __future__ import annotations

from typing import Literal

import msgspec

PLAN_TYPE = "plan"
BUCKETS = 10_000

Arm = Literal["target", "control", "stable", "excluded"]


class DeviceTraits(msgspec.Struct, frozen=True):
    """What a plan may ask about a device. `labels` are free-form (`merchant: grocery`)."""

    device_id: str
    tenant: str
    device_class: str
    region: str
    labels: dict[str, str] = {}


class Cohort(msgspec.Struct, frozen=True):
    """Devices whose traits match: every key must be present with one of the listed values; no keys match everybody.

    Keys are `device_id`, `device_class`, `region`, or a label's name."""

    name: str
    match: dict[str, tuple[str, ...]] = {}


class RolloutPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Stage `stage` of the rollout `name`: devices of `cohorts` in buckets [0, target_buckets) run `target`, all others
    `stable`. `serial` only grows per tenant and model: a device never follows an older plan than one it has accepted.
    `withdrawn` names versions that must not run any more. Times are Unix seconds."""

    format: int = 1
    tenant: str
    model: str
    name: str
    serial: int
    salt: str
    cohorts: tuple[Cohort, ...]
    stage: int = 0
    target_buckets: int = 0
    control_buckets: int = 0
    target: str
    stable: str
    withdrawn: tuple[str, ...] = ()
    issued: int
    expires: int


class Assignment(msgspec.Struct, frozen=True):
    """The manifest a device should run, and why."""

    manifest: str
    arm: Arm
    cohort: str
    bucket: int


def assign(plan: RolloutPlan, traits: DeviceTraits) -> Assignment:
    """Which version `traits` should run under `plan`. Pure."""
    bucket = bucket_of(plan.salt, traits.device_id)
    cohort = next((cohort.name for cohort in plan.cohorts if matches(cohort, traits)), None)
    if traits.tenant != plan.tenant or cohort is None:
        return Assignment(plan.stable, "excluded", "", bucket)
    if bucket < plan.target_buckets and plan.target not in plan.withdrawn:
        return Assignment(plan.target, "target", cohort, bucket)
    if bucket >= BUCKETS - plan.control_buckets:
        return Assignment(plan.stable, "control", cohort, bucket)
    return Assignment(plan.stable, "stable", cohort, bucket)


def matches(cohort: Cohort, traits: DeviceTraits) -> bool:
    """Whether every predicate of `cohort` holds for `traits`."""
    values = {
        **traits.labels,
        "device_id": traits.device_id,
        "device_class": traits.device_class,
        "region": traits.region,
    }
    return all(values.get(key) in allowed for key, allowed in cohort.match.items())


def bucket_of(salt: str, device_id: str) -> int:
    """The device's bucket in [0, 10,000)."""
    return murmur3_x86_32(f"{salt}:{device_id}".encode()) % BUCKETS


def murmur3_x86_32(data: bytes) -> int:
    """MurmurHash3_x86_32 with seed 0 (Austin Appleby, public domain), unsigned."""
    mask = 0xFFFFFFFF
    value = 0
    whole = len(data) & ~3
    for start in range(0, whole, 4):
        block = int.from_bytes(data[start : start + 4], "little")
        block = (block * 0xCC9E2D51) & mask
        block = ((block << 15) | (block >> 17)) & mask
        value ^= (block * 0x1B873593) & mask
        value = ((value << 13) | (value >> 19)) & mask
        value = (value * 5 + 0xE6546B64) & mask
    if len(data) > whole:
        block = int.from_bytes(data[whole:], "little")
        block = (block * 0xCC9E2D51) & mask
        block = ((block << 15) | (block >> 17)) & mask
        value ^= (block * 0x1B873593) & mask
    value ^= len(data)
    value ^= value >> 16
    value = (value * 0x85EBCA6B) & mask
    value ^= value >> 13
    value = (value * 0xC2B2AE35) & mask
    return value ^ (value >> 16)
