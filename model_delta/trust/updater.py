"""What may be believed next.

A holder keeps a `TrustState` per tenant and model: how far the signed world has been seen to advance. Each function
takes the bytes that arrived, the keys that count (`TrustAnchors`) and that state, and returns the parsed record, with
the new state where there is one; or it raises and nothing changes. The order is always the same: enough signatures of
the right role over the right type, then parse, then whose it is, then newer than what was seen, then not expired.
The holder stores the new state durably before it acts on the record: a power cut in between repeats a step, whereas the
other order would forget one.

What this defends against, in the words of the TUF specification 1.0 (section 1.5.2): arbitrary software, wrong
software, rollback, indefinite freeze (by expiry), endless data is for the caller to bound.

Compatibility promise: see `encoding`.
"""

from __future__ import annotations

import msgspec

from model_delta.digest import require_digest, require_match
from model_delta.encoding import unpack
from model_delta.errors import Expired, Malformed, RolledBack, SignatureInvalid, Untrusted
from model_delta.manifest import Manifest, manifest_digest, parse_manifest
from model_delta.plan import BUCKETS, PLAN_TYPE, RolloutPlan
from model_delta.task import TASK_TYPE, RoundTask
from model_delta.trust.signing import PublicKey, key_id, load_public_key, open_envelope, verify

RECORD_FORMAT = 1


class RoleKeys(msgspec.Struct, frozen=True):
    """The keys of one role (DER SubjectPublicKeyInfo) and how many different ones must sign."""

    keys: tuple[bytes, ...]
    threshold: int = 1


class TrustAnchors(msgspec.Struct, frozen=True):
    """The keys of a tenant's roles. A device is provisioned with them; newer ones come with the TUF repository."""

    tenant: str
    roles: dict[str, RoleKeys]


class TrustState(msgspec.Struct, frozen=True):
    """How far one model of one tenant has been seen to advance. The holder persists it.

    `plan_serial`: of the newest plan accepted; `release_floor`: the highest release counter accepted; `round_issued`:
    Unix seconds, of the newest round announcement accepted. `plan_keys`, `round_keys`: ids of the keys that counted
    then; when none of them counts any more, the numbers start anew (TUF 1.0 section 5.3.11: whoever took the old keys
    may have given out huge ones). A key that was retired must not come back."""

    plan_serial: int = 0
    release_floor: int = 0
    round_issued: int = 0
    plan_keys: tuple[str, ...] = ()
    round_keys: tuple[str, ...] = ()


def read_manifest(envelope: bytes, expected_digest: str, tenant: str, now: float) -> Manifest:
    """The manifest named `expected_digest` of `tenant`, still valid at `now` (Unix seconds; 0.0 asks nothing of it).

    A name is all that is checked: whether anybody vouches for a version is `authority.Authority.require`'s to say,
    which the caller owes before the version is run. Raises Malformed, DigestMismatch, Untrusted (another tenant's) and
    Expired.
    """
    require_digest(expected_digest, "manifest digest")
    payload = open_envelope(envelope).payload
    require_match(payload, expected_digest, f"manifest {expected_digest[:16]}…")
    manifest = parse_manifest(payload)
    what = f"manifest {expected_digest[:16]}… of {manifest.model}"
    if manifest.tenant != tenant:
        raise Untrusted(f"{what}: expected tenant {tenant!r}, found {manifest.tenant!r}")
    _require_current(what, manifest.expires, now)
    return manifest


def accept_plan(
    envelope: bytes, model: str, anchors: TrustAnchors, state: TrustState, now: float
) -> tuple[RolloutPlan, TrustState]:
    """The rollout plan of `model`, if the role `plan` vouches for it and no newer one was accepted before.

    An equal serial is accepted again (a retained message returns on every reconnect). Raises Malformed,
    SignatureInvalid, Untrusted (another tenant's or model's), RolledBack and Expired.
    """
    payload, keys = _verified(envelope, PLAN_TYPE, "plan", anchors)
    plan = unpack(payload, RolloutPlan)
    what = f"plan {plan.name!r} of {plan.model}"
    _require_format(what, plan.format)
    _require_tenant(what, plan.tenant, anchors)
    _require_model(what, plan.model, model)
    for digest in (plan.target, plan.stable, *plan.withdrawn):
        require_digest(digest, f"{what}: a version it names")
    if min(plan.target_buckets, plan.control_buckets) < 0 or plan.target_buckets + plan.control_buckets > BUCKETS:
        raise Malformed(
            f"{what}: expected target and control to share {BUCKETS} buckets, "
            f"found {plan.target_buckets} and {plan.control_buckets}"
        )
    floor = 0 if _all_replaced(state.plan_keys, keys) else state.plan_serial
    if plan.serial < floor:
        raise RolledBack(f"{what}: expected serial {floor} or higher, found {plan.serial}")
    _require_current(what, plan.expires, now)
    return plan, msgspec.structs.replace(state, plan_serial=plan.serial, plan_keys=keys)


def accept_task(
    envelope: bytes, model: str, anchors: TrustAnchors, state: TrustState, now: float
) -> tuple[RoundTask, TrustState]:
    """The round announcement of `model`, if the role `round` vouches for it and no newer one was accepted before.

    A closed round (`open` false) is accepted after its deadline: it asks for nothing. Raises Malformed,
    SignatureInvalid, Untrusted, RolledBack and Expired.
    """
    payload, keys = _verified(envelope, TASK_TYPE, "round", anchors)
    task = unpack(payload, RoundTask)
    what = f"round {task.round_id!r} of {task.model}"
    _require_format(what, task.format)
    _require_tenant(what, task.tenant, anchors)
    _require_model(what, task.model, model)
    require_digest(task.base, f"{what}: its base version")
    require_digest(task.training_graph, f"{what}: its training graph")
    floor = 0 if _all_replaced(state.round_keys, keys) else state.round_issued
    if task.issued < floor:
        raise RolledBack(f"{what}: expected one issued at {floor} or later, found {task.issued}")
    if task.open:
        _require_current(what, task.deadline, now)
    return task, msgspec.structs.replace(state, round_issued=task.issued, round_keys=keys)


def check_release(manifest: Manifest, plan: RolloutPlan, state: TrustState) -> TrustState:
    """The state after taking `manifest`, which came by `plan`; to be asked before switching to it.

    An older release than the highest accepted one returns only if the (newer, signed) plan names it stable. The floor
    never sinks. Raises RolledBack, and Untrusted for a withdrawn version or one of another tenant or model.
    """
    digest = manifest_digest(manifest)
    what = f"version {digest[:16]}… of {manifest.model}"
    if (manifest.tenant, manifest.model) != (plan.tenant, plan.model):
        raise Untrusted(f"{what}: expected {plan.tenant}/{plan.model}, found {manifest.tenant}/{manifest.model}")
    if digest in plan.withdrawn:
        raise Untrusted(f"{what}: withdrawn by plan {plan.name!r} serial {plan.serial}")
    if manifest.release < state.release_floor and digest != plan.stable:
        raise RolledBack(
            f"{what}: expected release {state.release_floor} or higher, or the plan's stable version, "
            f"found release {manifest.release}"
        )
    return msgspec.structs.replace(state, release_floor=max(state.release_floor, manifest.release))


def role_keys(anchors: TrustAnchors, role: str) -> tuple[dict[str, PublicKey], int]:
    """The keys of `role` by key id, and its threshold. Raises SignatureInvalid for an unknown role, Malformed for a
    threshold that could not protect or could never be met."""
    entry = anchors.roles.get(role)
    if entry is None:
        raise SignatureInvalid(f"role {role!r}: no keys among the trust anchors ({', '.join(sorted(anchors.roles))})")
    keys = {key_id(key): key for key in map(load_public_key, entry.keys)}
    if not 1 <= entry.threshold <= len(keys):
        raise Malformed(f"role {role!r}: expected a threshold from 1 to {len(keys)}, found {entry.threshold}")
    return keys, entry.threshold


def _verified(envelope: bytes, kind: str, role: str, anchors: TrustAnchors) -> tuple[bytes, tuple[str, ...]]:
    """The payload, and the ids of the keys that count now."""
    keys, threshold = role_keys(anchors, role)
    return verify(open_envelope(envelope), kind, keys, threshold), tuple(sorted(keys))


def _all_replaced(before: tuple[str, ...], now: tuple[str, ...]) -> bool:
    """Whether nothing signed by then can count now. One key that is left could have signed what must not return."""
    return bool(before) and set(before).isdisjoint(now)


def _require_format(what: str, found: int) -> None:
    if found > RECORD_FORMAT:
        raise Malformed(f"{what}: format {found}, this reader knows up to {RECORD_FORMAT}")


def _require_tenant(what: str, found: str, anchors: TrustAnchors) -> None:
    if found != anchors.tenant:
        raise Untrusted(f"{what}: expected tenant {anchors.tenant!r}, found {found!r}")


def _require_model(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise Untrusted(f"{what}: expected model {expected!r}")


def _require_current(what: str, expires: int, now: float) -> None:
    if now >= expires:
        raise Expired(f"{what}: expired at {expires}, {now - expires:.0f} s ago")
