"""Which version answers a request.

The region follows the same signed plan as the devices. A request that names a device gets the version that this device
should run (`model_delta.plan.assign`), so that a device and its region never disagree during a canary. A request
without a device gets the stable version, and the target once the stage covers everybody. A withdrawn version never
answers.
Pure; a refusal is a value.
"""

from __future__ import annotations

import msgspec

from model_delta.plan import BUCKETS, Arm, DeviceTraits, RolloutPlan, assign

VERSION_PREFIX_MIN = 12
"""So many hexadecimal characters of a manifest digest name a version in a request."""


class Route(msgspec.Struct, frozen=True):
    """The manifest to answer with, `fallback` to use while it is not loaded ("" for none), and the plan's arm."""

    manifest: str
    fallback: str
    arm: Arm | None = None


class Refusal(msgspec.Struct, frozen=True):
    """Nothing may answer, for `reason`."""

    reason: str


def choose(plan: RolloutPlan, traits: DeviceTraits, asked: str = "") -> Route | Refusal:
    """The route under `plan`; `traits.device_id` may be "". `asked` is a manifest digest, or at least 12 characters of
    one, when the client wants exactly that version ("" when it leaves the choice to the plan)."""
    if asked:
        return _exactly(plan, asked)
    if traits.device_id:
        assignment = assign(plan, traits)
        manifest, arm = assignment.manifest, assignment.arm
    elif plan.target_buckets >= BUCKETS and plan.target not in plan.withdrawn:
        manifest, arm = plan.target, "target"
    else:
        manifest, arm = plan.stable, "stable"
    if manifest in plan.withdrawn:
        return Refusal(f"model {plan.model}: version {manifest[:12]} is withdrawn and the plan names no other")
    # Only a canary may wait on the stable version: who is not in the canary never runs it, not even while stable loads.
    fallback = plan.stable if arm == "target" and plan.stable not in (manifest, *plan.withdrawn) else ""
    return Route(manifest, fallback, arm)


def wanted(plan: RolloutPlan) -> tuple[str, ...]:
    """The manifests that the region must be able to answer with, stable first."""
    both = (plan.stable,) if plan.stable == plan.target else (plan.stable, plan.target)
    return tuple(digest for digest in both if digest not in plan.withdrawn)


def _exactly(plan: RolloutPlan, asked: str) -> Route | Refusal:
    if len(asked) >= VERSION_PREFIX_MIN:
        for digest in wanted(plan):
            if digest.startswith(asked):
                return Route(digest, "")
    offered = ", ".join(digest[:VERSION_PREFIX_MIN] for digest in wanted(plan))
    return Refusal(f"model {plan.model}: expected one of the versions {offered}, found {asked[:64]!r}")
