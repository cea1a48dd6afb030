"""Version reports of a device and a director's plans, good and bad, and how each side reads them.

Their keys are in `directing.json`, for these files alone: the director's came later than `keyring.cbor`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack, unpack_plain
from model_delta.manifest import Blob
from model_delta.plan import DeviceTraits, RolloutPlan
from model_delta.trust.director import (
    DEVICE_PLAN_TYPE,
    VERSION_REPORT_TYPE,
    ChosenStep,
    DevicePlan,
    DirectorState,
    HeldFile,
    Question,
    VersionReport,
    accept_device_plan,
    accept_version_report,
)
from model_delta.trust.signing import PrivateKey, open_envelope, public_bytes, seal_envelope, sign
from model_delta.trust.updater import RoleKeys, TrustAnchors

FOLDER = Path(__file__).parent
NOW, TENANT, MODEL, DEVICE = 1_800_000_000, "acme", "fraud", "pos-0001"
NONCE = bytes(range(16))
STABLE, TARGET, BAD = digest_of(b"stable"), digest_of(b"target"), digest_of(b"bad")
SEEN = {MODEL: 41}
STATE = DirectorState(serial=6, counter=42)
TRAITS = DeviceTraits(DEVICE, TENANT, "pos", "eu-west")


class Keys:
    """The private keys in `directing.json`, made when there is no such file."""

    def __init__(self) -> None:
        path = FOLDER / "directing.json"
        if not path.exists():
            director = Ed25519PrivateKey.generate().private_bytes_raw().hex()
            device = ec.generate_private_key(ec.SECP256R1()).private_numbers().private_value
            path.write_text(json.dumps({"director": director, "device": f"{device:064x}"}) + "\n")
        kept = json.loads(path.read_text())
        self.director = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(kept["director"]))
        self.device = ec.derive_private_key(int(kept["device"], 16), ec.SECP256R1())


def read_directing(kind: str, data: bytes, now: float) -> VersionReport | DevicePlan:
    """A `version report` as the coordinator reads it, a `device plan` as the device does that has asked for it."""
    keys = Keys()
    if kind == "version report":
        return accept_version_report(data, TENANT, DEVICE, keys.device.public_key(), SEEN, now)
    anchors = TrustAnchors(TENANT, {"director": RoleKeys((public_bytes(keys.director.public_key()),))})
    rollout = unpack(open_envelope((FOLDER / "plan.cbor").read_bytes()).payload, RolloutPlan)
    return accept_device_plan(data, Question(MODEL, NONCE), anchors, STATE, rollout, TRAITS, now)[0]


def directing() -> Iterator[tuple[str, bytes]]:
    """Names and bytes."""
    keys = Keys()
    report = VersionReport(
        tenant=TENANT,
        device_id=DEVICE,
        model=MODEL,
        wanted=TARGET,
        running=STABLE,
        held=(HeldFile(STABLE, digest_of(b"root")), HeldFile(BAD, digest_of(b"another root"), (1, 4))),
        release_floor=3,
        plan_serial=5,
        director_serial=6,
        at_hand=(digest_of(b"blob"),),
        memory_bytes=1 << 22,
        flash_bytes=1 << 24,
        formats=("bsdiff40", "tp1"),
        cached_cost=0.25,
        nonce=NONCE,
        counter=42,
        time=NOW,
        alarm="no director answered 3 questions in a row",
    )
    yield "version_report.cbor", _signed(VERSION_REPORT_TYPE, pack(report), keys.device)
    bad_reports: dict[str, dict[str, object]] = {
        "with_a_field_of_the_future": {"colour": "blue"},
        "of_a_newer_format": {"format": 2},
        "of_another_device": {"device_id": "pos-0002"},
        "with_a_counter_seen_before": {"counter": 41},
        "held_back_for_days": {"time": NOW - 3 * 86_400},
        "with_a_nonce_too_short": {"nonce": b"1"},
        "naming_no_digest": {"running": "../../etc/passwd"},
    }
    for name, fields in bad_reports.items():
        yield f"version_report_{name}.cbor", _signed(VERSION_REPORT_TYPE, _plus(report, **fields), keys.device)
    yield (
        "version_report_signed_by_another_device.cbor",
        _signed(VERSION_REPORT_TYPE, pack(report), ec.generate_private_key(ec.SECP256R1())),
    )
    plan = DevicePlan(
        tenant=TENANT,
        device_id=DEVICE,
        model=MODEL,
        target=STABLE,
        steps=(
            ChosenStep(
                kind="patch", base=TARGET, target=STABLE, blobs=(Blob(digest_of(b"patch"), 5),), format="bsdiff40"
            ),
        ),
        nonce=NONCE,
        serial=7,
        issued=NOW - 5,
        expires=NOW + 600,
    )
    yield "device_plan.cbor", _signed(DEVICE_PLAN_TYPE, pack(plan), keys.director)
    bad_plans: dict[str, dict[str, object]] = {
        "with_a_field_of_the_future": {"colour": "blue"},
        "of_a_newer_format": {"format": 2},
        "for_another_device": {"device_id": "pos-0002"},
        "for_another_model": {"model": "other"},
        "answering_another_question": {"nonce": bytes(16)},
        "older_than_one_seen": {"serial": 6},
        "expired": {"expires": NOW},
        "valid_for_days": {"expires": NOW + 86_400},
        "to_a_version_of_its_own": {"target": digest_of(b"evil")},
        "to_a_withdrawn_version": {"target": BAD},
    }
    for name, fields in bad_plans.items():
        yield f"device_plan_{name}.cbor", _signed(DEVICE_PLAN_TYPE, _plus(plan, **fields), keys.director)
    yield "device_plan_signed_by_the_device.cbor", _signed(DEVICE_PLAN_TYPE, pack(plan), keys.device)
    yield "device_plan_signed_as_a_plan.cbor", _signed("plan", pack(plan), keys.director)


def _signed(kind: str, payload: bytes, key: PrivateKey) -> bytes:
    return seal_envelope(sign(kind, payload, [key]))


def _plus(record: VersionReport | DevicePlan, **fields: object) -> bytes:
    return pack({**unpack_plain(pack(record)), **fields})
