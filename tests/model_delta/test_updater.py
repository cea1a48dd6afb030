"""What the updater refuses: one test per attack, named after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from model_delta.digest import digest_of
from model_delta.encoding import pack
from model_delta.errors import DigestMismatch, Expired, Malformed, RolledBack, SignatureInvalid, Untrusted
from model_delta.manifest import Manifest, Segment, TensorSpec, manifest_digest
from model_delta.plan import Cohort, RolloutPlan
from model_delta.task import RoundTask
from model_delta.trust.signing import (
    Envelope,
    PrivateKey,
    Signature,
    key_id,
    load_public_key,
    public_bytes,
    seal_envelope,
    sign,
    verify,
)
from model_delta.trust.updater import (
    RoleKeys,
    TrustAnchors,
    TrustState,
    accept_plan,
    accept_task,
    check_release,
    read_manifest,
)
from tests.model_delta.models import NOW, keyring

KEYS = {
    role: [ed25519.Ed25519PrivateKey.generate() for _ in range(3)] for role in ("release", "plan", "round", "baseline")
}
STABLE, TARGET = digest_of(b"stable"), digest_of(b"target")


def anchors(threshold: int = 1, tenant: str = "acme") -> TrustAnchors:
    return TrustAnchors(
        tenant,
        {role: RoleKeys(tuple(public_bytes(k.public_key()) for k in keys), threshold) for role, keys in KEYS.items()},
    )


def a_manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "tenant": "acme",
        "model": "fraud",
        "version": {"eu-west": 1},
        "release": 3,
        "size": 4,
        "file_digest": digest_of(b"file"),
        "segments": (Segment("graph", 4, digest_of(b"file")),),
        "merkle_root": digest_of(b"root"),
        "inputs": (TensorSpec("features", "float32", (-1, 6)),),
        "outputs": (TensorSpec("score", "float32", (-1, 1)),),
        "created": int(NOW) - 100,
        "expires": int(NOW) + 1000,
    }
    return Manifest(**{**values, **changes})


def a_plan(**changes: Any) -> RolloutPlan:
    values: dict[str, Any] = {
        "tenant": "acme",
        "model": "fraud",
        "name": "r1",
        "serial": 5,
        "salt": "s",
        "cohorts": (Cohort("all"),),
        "target_buckets": 100,
        "target": TARGET,
        "stable": STABLE,
        "issued": int(NOW) - 10,
        "expires": int(NOW) + 1000,
    }
    return RolloutPlan(**{**values, **changes})


def a_task(**changes: Any) -> RoundTask:
    values: dict[str, Any] = {
        "tenant": "acme",
        "model": "fraud",
        "round_id": "round-1",
        "base": STABLE,
        "training_graph": digest_of(b"graph"),
        "parameters": (),
        "length": 10,
        "issued": int(NOW) - 10,
        "deadline": int(NOW) + 60,
    }
    return RoundTask(**{**values, **changes})


def signed(kind: str, value: object, *keys: ed25519.Ed25519PrivateKey) -> bytes:
    return seal_envelope(sign(kind, pack(value), keys))


def test_a_vouched_manifest_is_accepted() -> None:
    manifest = a_manifest()
    envelope = signed("manifest", manifest, KEYS["release"][1])
    assert read_manifest(envelope, manifest_digest(manifest), "acme", NOW) == manifest


def test_a_keyrings_signature_is_accepted_under_its_anchors(tmp_path: Path) -> None:
    ring = keyring(tmp_path)
    envelope = seal_envelope(ring.sign("plan", "plan", pack(a_plan())))
    plan, state = accept_plan(envelope, "fraud", ring.anchors(), TrustState(), NOW)
    assert (plan, state.plan_serial) == (a_plan(), 5)


def test_a_mix_and_match_manifest_is_another_version() -> None:
    envelope = signed("manifest", a_manifest(release=2), KEYS["release"][0])
    with pytest.raises(DigestMismatch, match="expected sha256"):
        read_manifest(envelope, manifest_digest(a_manifest()), "acme", NOW)


def test_an_altered_payload_is_refused() -> None:
    good, evil = sign("plan", pack(a_plan()), KEYS["plan"][:1]), pack(a_plan(serial=99))
    with pytest.raises(SignatureInvalid):
        accept_plan(seal_envelope(msgspec.structs.replace(good, payload=evil)), "fraud", anchors(), TrustState(), NOW)


@pytest.mark.parametrize("role", ["release", "round", "baseline"])
def test_a_key_of_another_role_does_not_count(role: str) -> None:
    with pytest.raises(SignatureInvalid, match="expected 1 valid"):
        accept_plan(signed("plan", a_plan(), KEYS[role][0]), "fraud", anchors(), TrustState(), NOW)


def test_a_foreign_key_that_borrows_a_known_key_id_does_not_count() -> None:
    forged = sign("plan", pack(a_plan()), [ed25519.Ed25519PrivateKey.generate()])
    real_id = sign("plan", b"", KEYS["plan"][:1]).signatures[0].key_id
    envelope = Envelope("plan", forged.payload, (Signature(real_id, forged.signatures[0].value),))
    with pytest.raises(SignatureInvalid):
        accept_plan(seal_envelope(envelope), "fraud", anchors(), TrustState(), NOW)


@pytest.mark.parametrize(
    "make", [ed25519.Ed25519PrivateKey.generate, lambda: ec.generate_private_key(ec.SECP256R1())], ids=["ed", "ec"]
)
def test_in_both_schemes_another_keys_signature_does_not_count_under_a_known_id(make: Callable[[], PrivateKey]) -> None:
    genuine, stranger = make(), make()
    public = genuine.public_key()
    good, forged = (sign("report", b"payload", [key]) for key in (genuine, stranger))
    assert verify(good, "report", {key_id(public): public}) == b"payload"
    borrowed = msgspec.structs.replace(
        forged, signatures=(msgspec.structs.replace(forged.signatures[0], key_id=key_id(public)),)
    )
    with pytest.raises(SignatureInvalid, match="found 0"):
        verify(borrowed, "report", {key_id(public): public})


def test_the_wrong_type_is_refused_even_when_the_role_key_signed_it() -> None:
    plan_as_round = signed("round", a_plan(), KEYS["plan"][0])
    with pytest.raises(SignatureInvalid, match="expected type 'plan', found 'round'"):
        accept_plan(plan_as_round, "fraud", anchors(), TrustState(), NOW)
    relabelled = msgspec.structs.replace(sign("round", pack(a_plan()), KEYS["plan"][:1]), type="plan")
    with pytest.raises(SignatureInvalid, match="found 0"):
        accept_plan(seal_envelope(relabelled), "fraud", anchors(), TrustState(), NOW)


def test_a_threshold_counts_different_keys() -> None:
    plan = a_plan()
    first, second = KEYS["plan"][0], KEYS["plan"][1]
    with pytest.raises(SignatureInvalid, match="expected 2 valid"):
        accept_plan(signed("plan", plan, first, first), "fraud", anchors(2), TrustState(), NOW)
    assert accept_plan(signed("plan", plan, first, second), "fraud", anchors(2), TrustState(), NOW)[0] == plan


@pytest.mark.parametrize("threshold", [0, -1, 4])
def test_a_threshold_that_protects_nothing_or_cannot_be_met_is_refused(threshold: int) -> None:
    with pytest.raises(Malformed, match="threshold"):
        accept_plan(signed("plan", a_plan()), "fraud", anchors(threshold), TrustState(), NOW)


def test_the_same_key_listed_twice_counts_once() -> None:
    der = public_bytes(KEYS["plan"][0].public_key())
    twice = TrustAnchors("acme", {"plan": RoleKeys((der, der), 2)})
    with pytest.raises(Malformed, match="from 1 to 1"):
        accept_plan(signed("plan", a_plan(), KEYS["plan"][0]), "fraud", twice, TrustState(), NOW)


@pytest.mark.parametrize("late", [0, 1, 1e6])
def test_an_expired_record_is_refused(late: float) -> None:
    now = int(NOW) + late
    manifest, plan, task = (
        a_manifest(expires=int(NOW)),
        a_plan(expires=int(NOW)),
        a_task(deadline=int(NOW)),
    )
    with pytest.raises(Expired):
        read_manifest(signed("manifest", manifest, KEYS["release"][0]), manifest_digest(manifest), "acme", now)
    with pytest.raises(Expired):
        accept_plan(signed("plan", plan, KEYS["plan"][0]), "fraud", anchors(), TrustState(), now)
    with pytest.raises(Expired):
        accept_task(signed("round", task, KEYS["round"][0]), "fraud", anchors(), TrustState(), now)


def test_the_close_of_a_round_is_heard_after_its_deadline() -> None:
    task = a_task(open=False)
    heard, _ = accept_task(signed("round", task, KEYS["round"][0]), "fraud", anchors(), TrustState(), NOW + 1e6)
    assert not heard.open


def test_a_replayed_older_plan_is_refused_and_the_same_one_is_not() -> None:
    old, new = (signed("plan", a_plan(serial=serial), KEYS["plan"][0]) for serial in (4, 5))
    _, state = accept_plan(new, "fraud", anchors(), TrustState(), NOW)
    with pytest.raises(RolledBack, match="expected serial 5 or higher, found 4"):
        accept_plan(old, "fraud", anchors(), state, NOW)
    assert accept_plan(new, "fraud", anchors(), state, NOW)[1] == state


def test_a_replayed_older_round_is_refused() -> None:
    old, new = (signed("round", a_task(issued=int(NOW) - age), KEYS["round"][0]) for age in (20, 10))
    _, state = accept_task(new, "fraud", anchors(), TrustState(), NOW)
    with pytest.raises(RolledBack):
        accept_task(old, "fraud", anchors(), state, NOW)
    assert accept_task(new, "fraud", anchors(), state, NOW)[1] == state


def counting(*keys: ed25519.Ed25519PrivateKey) -> TrustAnchors:
    role = RoleKeys(tuple(public_bytes(key.public_key()) for key in keys))
    return TrustAnchors("acme", {"plan": role, "round": role})


def test_huge_numbers_of_a_thief_end_with_the_keys_that_gave_them_out() -> None:
    stolen, new = KEYS["plan"][:2]
    before, after, huge = counting(stolen), counting(new), 1 << 60
    _, state = accept_plan(signed("plan", a_plan(serial=huge), stolen), "fraud", before, TrustState(), NOW)
    _, state = accept_task(signed("round", a_task(issued=huge), stolen), "fraud", before, state, NOW)
    with pytest.raises(RolledBack):
        accept_plan(signed("plan", a_plan(), stolen), "fraud", before, state, NOW)
    with pytest.raises(RolledBack):
        accept_task(signed("round", a_task(), stolen), "fraud", before, state, NOW)
    with pytest.raises(SignatureInvalid):
        accept_plan(signed("plan", a_plan(serial=huge), stolen), "fraud", after, state, NOW)
    _, state = accept_plan(signed("plan", a_plan(), new), "fraud", after, state, NOW)
    _, state = accept_task(signed("round", a_task(), new), "fraud", after, state, NOW)
    assert (state.plan_serial, state.round_issued) == (a_plan().serial, a_task().issued)
    with pytest.raises(RolledBack, match="expected serial 5 or higher, found 4"):
        accept_plan(signed("plan", a_plan(serial=4), new), "fraud", after, state, NOW)


def test_a_key_that_stays_keeps_what_it_signed_from_returning() -> None:
    old, new = KEYS["plan"][:2]
    _, state = accept_plan(signed("plan", a_plan(), old), "fraud", counting(old), TrustState(), NOW)
    with pytest.raises(RolledBack):
        accept_plan(signed("plan", a_plan(serial=4), old), "fraud", counting(old, new), state, NOW)


def test_another_tenants_or_models_record_is_refused() -> None:
    plan, manifest = a_plan(), a_manifest()
    with pytest.raises(Untrusted, match="expected tenant 'other', found 'acme'"):
        accept_plan(signed("plan", plan, KEYS["plan"][0]), "fraud", anchors(tenant="other"), TrustState(), NOW)
    with pytest.raises(Untrusted, match="expected model 'limits'"):
        accept_plan(signed("plan", plan, KEYS["plan"][0]), "limits", anchors(), TrustState(), NOW)
    with pytest.raises(Untrusted, match="expected tenant"):
        read_manifest(signed("manifest", manifest, KEYS["release"][0]), manifest_digest(manifest), "other", NOW)


@pytest.mark.parametrize(
    "changes",
    [
        {"target": "../../etc/passwd"},
        {"stable": "ABC"},
        {"withdrawn": ("",)},
        {"target_buckets": -1},
        {"target_buckets": 9_000, "control_buckets": 2_000},
        {"format": 2},
    ],
)
def test_a_signed_plan_that_makes_no_sense_is_malformed(changes: dict[str, Any]) -> None:
    with pytest.raises(Malformed):
        accept_plan(signed("plan", a_plan(**changes), KEYS["plan"][0]), "fraud", anchors(), TrustState(), NOW)


@pytest.mark.parametrize("data", [b"", b"\xff", b"{}", pack({"type": "plan"}), pack([1, 2]), b"\x00" * 1000])
def test_bytes_that_are_no_envelope_are_malformed(data: bytes) -> None:
    with pytest.raises(Malformed):
        accept_plan(data, "fraud", anchors(), TrustState(), NOW)


@pytest.mark.parametrize("der", [b"", b"not DER", public_bytes(ec.generate_private_key(ec.SECP384R1()).public_key())])
def test_what_is_no_ed25519_or_p256_key_is_malformed(der: bytes) -> None:
    with pytest.raises(Malformed, match="public key: "):
        load_public_key(der)


def test_a_refused_record_changes_no_state() -> None:
    state = TrustState(plan_serial=5, release_floor=3, round_issued=1)
    with pytest.raises(RolledBack):
        accept_plan(signed("plan", a_plan(serial=1), KEYS["plan"][0]), "fraud", anchors(), state, NOW)
    assert state == TrustState(plan_serial=5, release_floor=3, round_issued=1)


def test_the_release_floor_rises_and_never_sinks() -> None:
    new, old = a_manifest(release=7), a_manifest(release=6)
    plan = a_plan(target=manifest_digest(new), stable=manifest_digest(old))
    state = check_release(new, plan, TrustState())
    assert state.release_floor == 7
    assert check_release(new, plan, state) == state, "asked again after a power cut"
    assert check_release(old, plan, state).release_floor == 7


def test_an_older_release_returns_only_as_the_plans_stable_version() -> None:
    old = a_manifest(release=6)
    state = TrustState(release_floor=7)
    with pytest.raises(RolledBack, match="expected release 7"):
        check_release(old, a_plan(target=manifest_digest(old)), state)
    assert check_release(old, a_plan(stable=manifest_digest(old)), state) == state


def test_a_withdrawn_version_is_refused_even_as_stable() -> None:
    manifest = a_manifest()
    digest = manifest_digest(manifest)
    with pytest.raises(Untrusted, match="withdrawn"):
        check_release(manifest, a_plan(stable=digest, withdrawn=(digest,)), TrustState())


def test_a_plan_cannot_bring_another_tenants_version() -> None:
    manifest = a_manifest(tenant="other")
    with pytest.raises(Untrusted, match="expected acme/fraud, found other/fraud"):
        check_release(manifest, a_plan(target=manifest_digest(manifest)), TrustState())
