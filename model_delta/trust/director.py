"""What one device is told to fetch, and what it says of itself beforehand and afterwards.

A `VersionReport` is signed by the device: what runs, which files stand there with their Merkle roots, how far it has
seen the signed world advance, what it can do. A `DevicePlan` is the director's answer to one report: the steps from
what the device holds to the version that it should run. The names, and what is defended against, are those of Uptane
Standard 2.1 (full verification, sections 5.4.4 and 5.4.5); here the image repository's part is the TUF repository and
the signed rollout plan.

The director says *how*, never *what*: the target must be the version that the signed rollout plan gives this device, or
its stable one, and its manifest is judged as always. Whoever holds the director's key alone can make a device fetch
more bytes than need be, and nothing else; whoever drops its answers makes devices plan for themselves.

Compatibility promise: see `encoding`.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Literal

import msgspec

from model_delta.digest import require_digest
from model_delta.encoding import unpack
from model_delta.errors import Expired, Malformed, RolledBack, TooLarge, Untrusted
from model_delta.manifest import Blob, Manifest, manifest_digest
from model_delta.patch.route import DeviceLimits, Route, Step
from model_delta.plan import DeviceTraits, RolloutPlan, assign
from model_delta.trust.signing import PublicKey, key_id, open_envelope, verify
from model_delta.trust.updater import TrustAnchors, role_keys

VERSION_REPORT_TYPE = "version-report"
DEVICE_PLAN_TYPE = "device-plan"
ROLE_DIRECTOR = "director"
FORMAT = 1
NONCE_BYTES = 16
REPORT_CLOCK_S = 86_400
"""How far a report's time may be from the coordinator's: a broker keeps messages for months, a plan is for now."""
PLAN_LIFETIME_S = 3_600
COUNTER_MAX = 1 << 53
HELD_MAX = 4
DAMAGED_MAX = 4_096
AT_HAND_MAX = 256
FORMATS_MAX = 16
STEPS_MAX = 8
ALARM_CHARACTERS_MAX = 300
_SPARE_BYTES = 1 << 20


class HeldFile(msgspec.Struct, frozen=True):
    """A model file on the device: the version it came as (manifest digest), the Merkle root of what stands there now,
    and the numbers of the segments that are not what the manifest says."""

    manifest: str
    root: str
    damaged: tuple[int, ...] = ()


class VersionReport(msgspec.Struct, frozen=True, kw_only=True):
    """One device's state, signed by its certificate's key.

    `wanted`: the version that it is about to fetch, "" when it only tells. `running`: manifest digest or "".
    `release_floor`, `plan_serial`, `director_serial`: how far it has seen the signed world advance. `at_hand`: sealed
    blobs that an interrupted attempt left. `memory_bytes`, `flash_bytes` (0: no limit), `formats`, `cached_cost`: see
    `patch.route`. `nonce`: 16 bytes that nobody could foresee. `counter` only grows, `time` is Unix seconds. `alarm`:
    what looked like an attack since the last report, "" for nothing."""

    format: int = FORMAT
    tenant: str
    device_id: str
    model: str
    wanted: str = ""
    running: str = ""
    held: tuple[HeldFile, ...] = ()
    release_floor: int = 0
    plan_serial: int = 0
    director_serial: int = 0
    at_hand: tuple[str, ...] = ()
    memory_bytes: int = 0
    flash_bytes: int = 0
    formats: tuple[str, ...] = ("bsdiff40",)
    cached_cost: float = 1.0
    nonce: bytes
    counter: int
    time: int
    alarm: str = ""


class ChosenStep(msgspec.Struct, frozen=True, kw_only=True):
    """One step as the director chose it; the fields are those of `patch.route.Step`."""

    kind: Literal["patch", "whole", "replace"]
    base: str = ""
    target: str
    blobs: tuple[Blob, ...]
    segments: tuple[int, ...] = ()
    format: str = ""


class DevicePlan(msgspec.Struct, frozen=True, kw_only=True):
    """How one device gets to `target`. `nonce` is that of the report it answers; `serial` only grows per device and
    model. Times are Unix seconds."""

    format: int = FORMAT
    tenant: str
    device_id: str
    model: str
    target: str
    steps: tuple[ChosenStep, ...]
    nonce: bytes
    serial: int
    issued: int
    expires: int


class DirectorState(msgspec.Struct, frozen=True):
    """What a device keeps of its director: the serial of the newest plan accepted, and its last report's counter."""

    serial: int = 0
    counter: int = 0


class Question(msgspec.Struct, frozen=True):
    """What a device has asked, and may be answered: about which model, with which nonce."""

    model: str
    nonce: bytes


def accept_version_report(
    envelope: bytes, tenant: str, device_id: str, verifying: PublicKey, seen: Mapping[str, int], now: float
) -> VersionReport:
    """The report of `device_id`, whose certificate's key is `verifying`.

    `seen`: the counter of its newest report by model. Raises Malformed, SignatureInvalid, Untrusted (another device's
    or tenant's), RolledBack (a repetition, or older than one seen) and Expired (made long ago, or in the future).
    """
    payload = verify(open_envelope(envelope), VERSION_REPORT_TYPE, {key_id(verifying): verifying})
    report = unpack(payload, VersionReport)
    what = f"version report of {device_id}"
    if report.format > FORMAT:
        raise Malformed(f"{what}: format {report.format}, this reader knows up to {FORMAT}")
    _require(what, "device", report.device_id, device_id)
    _require(what, "tenant", report.tenant, tenant)
    _require_bounds(what, report)
    last = seen.get(report.model, 0)
    if report.counter <= last:
        raise RolledBack(f"{what}: expected a counter above {last}, found {report.counter}: a repetition")
    if abs(now - report.time) > REPORT_CLOCK_S:
        raise Expired(
            f"{what}: expected a time within {REPORT_CLOCK_S} s of {now:.0f}, found {report.time}: "
            "it was held back, or the device's clock is wrong"
        )
    return report


def accept_device_plan(
    envelope: bytes,
    question: Question,
    anchors: TrustAnchors,
    state: DirectorState,
    rollout: RolloutPlan,
    traits: DeviceTraits,
    now: float,
) -> tuple[DevicePlan, DirectorState]:
    """The plan that answers `question`, if the role `director` vouches for it and `rollout` (the newest signed rollout
    plan that was accepted) lets this device run its target; with the state to store before it is followed.

    Raises Malformed, SignatureInvalid, Untrusted (another device's, tenant's or model's, an answer to another question,
    a version that was withdrawn or that the rollout does not give this device), RolledBack and Expired.
    """
    keys, threshold = role_keys(anchors, ROLE_DIRECTOR)
    plan = unpack(verify(open_envelope(envelope), DEVICE_PLAN_TYPE, keys, threshold), DevicePlan)
    what = f"device plan {plan.serial} for {traits.device_id}"
    if plan.format > FORMAT:
        raise Malformed(f"{what}: format {plan.format}, this reader knows up to {FORMAT}")
    _require(what, "device", plan.device_id, traits.device_id)
    _require(what, "tenant", plan.tenant, anchors.tenant)
    _require(what, "model", plan.model, question.model)
    if plan.nonce != question.nonce:
        raise Untrusted(f"{what}: expected the nonce of the question just asked, found another: a repeated answer")
    if not state.serial < plan.serial < COUNTER_MAX:
        raise RolledBack(f"{what}: expected a serial above {state.serial}, found {plan.serial}")
    if now >= plan.expires:
        raise Expired(f"{what}: expired at {plan.expires}, {now - plan.expires:.0f} s ago")
    if plan.expires - plan.issued > PLAN_LIFETIME_S:
        raise Untrusted(f"{what}: expected at most {PLAN_LIFETIME_S} s of validity, found {plan.expires - plan.issued}")
    if now >= rollout.expires:
        raise Expired(f"{what}: rollout plan {rollout.name!r} serial {rollout.serial} expired at {rollout.expires}")
    _require_allowed(what, plan.target, rollout, traits)
    return plan, msgspec.structs.replace(state, serial=plan.serial)


def walkable_route(
    plan: DevicePlan,
    want: Manifest,
    *,
    files: Container[str],
    pieces: Container[str],
    manifests: Mapping[str, Manifest],
    limits: DeviceLimits,
) -> Route:
    """The steps of `plan` as a route that this device can walk from what it holds.

    `want` is the accepted manifest of the version being fetched; `files`, `pieces`, `manifests` and `limits` as in
    `patch.route.plan_update`. Steps that belong to another version or do not follow each other (a mixed bundle), that
    leave something out (a partial bundle), that this device cannot take, or that are larger than the version could need
    raise Untrusted, TooLarge or Malformed. What the blobs hold is not judged here: each opens under its version's key
    alone, and the resulting file is checked against the manifest.
    """
    what = f"device plan {plan.serial} for {plan.device_id}"
    goal = manifest_digest(want)
    if plan.target != goal:
        raise Untrusted(f"{what}: expected steps to {goal[:16]}…, found {plan.target[:16]}…: a mixed bundle")
    if not 1 <= len(plan.steps) <= STEPS_MAX:
        raise Malformed(f"{what}: expected 1 to {STEPS_MAX} steps, found {len(plan.steps)}")
    if plan.steps[-1].target != goal:
        raise Untrusted(f"{what}: its last step leads to {plan.steps[-1].target[:16]}…: a mixed bundle")
    known = {**manifests, goal: want}
    before = ""
    for number, step in enumerate(plan.steps, 1):
        name = f"{what}, step {number}"
        require_digest(step.target, f"{name}: its target")
        for blob in step.blobs:
            require_digest(blob.digest, f"{name}: a blob")
            if blob.size <= 0:
                raise Malformed(f"{name}: expected blobs of some bytes, found {blob.size}")
        _require_follows(name, step, before, files)
        _require_complete(name, step, known, pieces, limits)
        before = step.target
    steps = tuple(
        Step(step.kind, step.base, step.target, step.blobs, step.segments, step.format) for step in plan.steps
    )
    total = sum(blob.size for step in steps for blob in step.blobs)
    _require_fits(what, steps, total, want, known, limits)
    return Route(steps, total, "chain" if len(steps) > 1 else steps[0].kind)


def chosen(steps: Sequence[Step]) -> tuple[ChosenStep, ...]:
    """A route's steps as a plan carries them."""
    return tuple(
        ChosenStep(
            kind=step.kind,
            base=step.base,
            target=step.target,
            blobs=step.blobs,
            segments=step.segments,
            format=step.format,
        )
        for step in steps
    )


def _require(what: str, field: str, found: str, expected: str) -> None:
    if found != expected:
        raise Untrusted(f"{what}: expected {field} {expected!r}, found {found[:64]!r}")


def _require_bounds(what: str, report: VersionReport) -> None:
    if len(report.nonce) != NONCE_BYTES:
        raise Malformed(f"{what}: expected a nonce of {NONCE_BYTES} bytes, found {len(report.nonce)}")
    for digest in (report.wanted, report.running):
        if digest:
            require_digest(digest, f"{what}: a version it names")
    for held in report.held:
        require_digest(held.manifest, f"{what}: a file's version")
        require_digest(held.root, f"{what}: a file's root")
    marks = (report.release_floor, report.plan_serial, report.director_serial, report.counter)
    numbers = [
        *marks,
        report.memory_bytes,
        report.flash_bytes,
        *(index for held in report.held for index in held.damaged),
    ]
    if not all(0 <= number < COUNTER_MAX for number in numbers):
        raise Malformed(f"{what}: expected numbers from 0 to {COUNTER_MAX - 1}")
    if not 0.0 <= report.cached_cost <= 1.0:
        raise Malformed(f"{what}: expected a cached cost from 0 to 1, found {report.cached_cost}")
    for name, count, most in (
        ("files", len(report.held), HELD_MAX),
        ("damaged segments", sum(len(held.damaged) for held in report.held), DAMAGED_MAX),
        ("blobs at hand", len(report.at_hand), AT_HAND_MAX),
        ("formats", len(report.formats), FORMATS_MAX),
        ("characters of alarm", len(report.alarm), ALARM_CHARACTERS_MAX),
    ):
        if count > most:
            raise TooLarge(f"{what}: expected at most {most} {name}, found {count}")


def _require_allowed(what: str, target: str, rollout: RolloutPlan, traits: DeviceTraits) -> None:
    require_digest(target, f"{what}: its target")
    if target in rollout.withdrawn:
        raise Untrusted(
            f"{what}: version {target[:16]}… was withdrawn by plan {rollout.name!r} serial {rollout.serial}"
        )
    given = assign(rollout, traits).manifest
    if target not in (given, rollout.stable):
        raise Untrusted(
            f"{what}: expected {given[:16]}… or {rollout.stable[:16]}… as rollout plan {rollout.name!r} serial "
            f"{rollout.serial} says, found {target[:16]}…: a director cannot choose the version"
        )


def _require_follows(name: str, step: ChosenStep, before: str, files: Container[str]) -> None:
    """Each step starts where the one before it ended; the first from a file at hand, or from nothing."""
    if step.kind == "patch":
        if (step.base != before) if before else (step.base not in files):
            there = f"{before[:16]}…" if before else "a file at hand"
            raise Untrusted(f"{name}: expected a patch from {there}, found one from {step.base[:16]}…: a mixed bundle")
    elif before or step.base:
        raise Untrusted(f"{name}: expected a patch from {before[:16]}…, found a {step.kind}: a mixed bundle")


def _require_complete(
    name: str, step: ChosenStep, known: Mapping[str, Manifest], pieces: Container[str], limits: DeviceLimits
) -> None:
    if step.kind == "patch":
        if len(step.blobs) != 1 or step.segments:
            raise Untrusted(f"{name}: expected one patch, found {len(step.blobs)} blobs: a partial bundle")
        if step.format not in limits.formats:
            raise Untrusted(f"{name}: expected a format of {', '.join(sorted(limits.formats))}, found {step.format!r}")
        return
    manifest = known.get(step.target)
    if step.kind == "whole":
        if manifest is not None and len(step.blobs) != len(manifest.segments):
            raise Untrusted(
                f"{name}: expected {len(manifest.segments)} segments, found {len(step.blobs)}: a partial bundle"
            )
        return
    if manifest is None:
        raise Untrusted(f"{name}: expected segments of a version at hand, found {step.target[:16]}…: a mixed bundle")
    listed = step.segments
    if len(listed) != len(step.blobs) or list(listed) != sorted(set(listed)):
        raise Malformed(f"{name}: expected ascending segments, a blob each; found {len(listed)} and {len(step.blobs)}")
    if listed and not 0 <= listed[0] <= listed[-1] < len(manifest.segments):
        raise Malformed(f"{name}: expected segments below {len(manifest.segments)}, found {listed[-1]}")
    brought = {manifest.segments[index].digest for index in listed}
    missing = sum(item.digest not in pieces and item.digest not in brought for item in manifest.segments)
    if missing:
        raise Untrusted(f"{name}: {missing} segments are neither at hand nor among its blobs: a partial bundle")


def _require_fits(
    what: str,
    steps: Sequence[Step],
    total: int,
    want: Manifest,
    known: Mapping[str, Manifest],
    limits: DeviceLimits,
) -> None:
    most = 2 * want.size + _SPARE_BYTES
    if total > most:
        raise TooLarge(f"{what}: expected at most {most} bytes for a file of {want.size}, found {total}")
    memory = max(step.memory_bytes for step in steps)
    if limits.memory_bytes is not None and memory > limits.memory_bytes:
        raise TooLarge(f"{what}: expected at most {limits.memory_bytes} B of memory, found {memory}")
    flash = total + sum((known.get(step.target) or want).size for step in steps)
    if limits.flash_bytes is not None and flash > limits.flash_bytes:
        raise TooLarge(f"{what}: expected at most {limits.flash_bytes} B of flash, found {flash}")
