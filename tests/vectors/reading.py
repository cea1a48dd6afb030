"""How each kind of frozen file is read: as the program that receives it reads it, with the frozen keys."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fl_coordinator.shares.contribution import hold, keep, mismatch, size_max, verify
from fl_coordinator.shares.fixed_point import decode
from model_delta.baseline import decode_verified
from model_delta.digest import digest_of
from model_delta.encoding import unpack
from model_delta.errors import Malformed, Untrusted
from model_delta.frames import Reassembly
from model_delta.keys.certificates import device_keys_of
from model_delta.keys.encryption import open_blob
from model_delta.keys.keyring import EmbeddedKeyring
from model_delta.manifest import Delivery
from model_delta.patch.container import apply_bytes
from model_delta.topics import Hello, KeyRequest
from model_delta.trust.checkin import CheckIn, read_answer
from model_delta.trust.signing import key_id, open_envelope
from model_delta.trust.signing import verify as verify_envelope
from model_delta.trust.sitting_out import require_own_word
from model_delta.trust.updater import TrustAnchors, TrustState, accept_plan, accept_task, read_manifest, role_keys
from monitoring.telemetry import Report, SittingOut
from tests.vectors.directing import Keys, read_directing
from tests.vectors.transcripts import read_transcript

FOLDER = Path(__file__).parent
NOW = 1_800_000_000.0
MODEL = "fraud"
DEVICE = "pos-0001"
BLOB_KEY = bytes(range(32))
PATCHED_BYTES_MAX = 100_000
SEEN = TrustState(plan_serial=5, release_floor=2, round_issued=int(NOW) - 60)


def bytes_of(name: str) -> bytes:
    """One frozen file."""
    return (FOLDER / name).read_bytes()


def anchors() -> TrustAnchors:
    """The public keys that every reader trusts."""
    return unpack(bytes_of("anchors.cbor"), TrustAnchors)


def keyring(folder: Path) -> EmbeddedKeyring:
    """The frozen keyring, from a copy with the mode that it asks for."""
    path = folder / "keyring.cbor"
    shutil.copyfile(FOLDER / path.name, path)
    path.chmod(0o600)
    return EmbeddedKeyring.open(path, lambda: NOW)


def read(kind: str, name: str, now: float, ca_pem: bytes) -> Mapping[str, Any]:
    """What the file holds, as plain values, after every check its reader makes. Raises what the reader raises."""
    data = bytes_of(name)
    if kind == "manifest":
        payload = verify_envelope(open_envelope(data), "manifest", *role_keys(anchors(), "release"))
        return plain(read_manifest(data, digest_of(payload), anchors().tenant, now))
    if kind == "plan":
        return plain(accept_plan(data, MODEL, anchors(), SEEN, now)[0])
    if kind == "round":
        return plain(accept_task(data, MODEL, anchors(), SEEN, now)[0])
    if kind == "baseline":
        return _baseline(data)
    if kind == "frames":
        return _baseline(_joined(data.decode().split()))
    if kind == "contribution":
        return _contribution(data, now, ca_pem)
    if kind == "key request":
        device = device_keys_of(bytes_of("device_certificate.pem"), ca_pem, now)
        payload = verify_envelope(open_envelope(data), "key-request", {key_id(device.verifying): device.verifying})
        return plain(unpack(payload, KeyRequest))
    if kind == "sitting out":
        task, _ = accept_task(bytes_of("round.cbor"), MODEL, anchors(), SEEN, now)
        said = unpack(data, Report).sitting_out
        assert isinstance(said, SittingOut)
        require_own_word(task, DEVICE, said.reason, said.signature, Keys().device.public_key())
        return {"round_id": said.round_id, "reason": said.reason}
    if kind == "transcript":
        return read_transcript(data, anchors())
    if kind in ("version report", "device plan"):
        return plain(read_directing(kind, data, now))
    if kind == "patch":
        new = apply_bytes(bytes_of("patched.onnx"), data, PATCHED_BYTES_MAX)
        return {"bytes": len(new), "sha256": digest_of(new)}
    if kind == "blob":
        return {"plain": open_blob(BLOB_KEY, digest_of(b"target"), "segment:0", data, 1_000).decode()}
    if kind == "check-in":
        asked = unpack(data, CheckIn)
        return {"request": asked.request, "root": asked.root, "timestamp": asked.timestamp}
    if kind == "check-in answer":
        answer, timestamp = read_answer(data)
        found = None if timestamp is None else timestamp.decode()
        return {"request": answer.request, "root": answer.root, "timestamp": found}
    return plain(unpack(data, {"report": Report, "delivery": Delivery, "hello": Hello}[kind]))


def plain(record: msgspec.Struct) -> Mapping[str, Any]:
    """A record as JSON would show it."""
    found: Mapping[str, Any] = msgspec.json.decode(msgspec.json.encode(record))
    return found


def _baseline(data: bytes) -> Mapping[str, Any]:
    keys, _ = role_keys(anchors(), "baseline")
    model = decode_verified(data, keys)
    return {"release": model.release, "features": model.features, "score": round(model.score([1.0] * 26), 4)}


def _joined(frames: list[str]) -> bytes:
    reassembly = Reassembly()
    files = [reassembly.add(bytes.fromhex(frame)) for frame in frames]
    whole = next((file for file in files if file is not None), None)
    if whole is None:
        raise Malformed(f"frames: {len(frames)} are too few")
    return whole


def _contribution(data: bytes, now: float, ca_pem: bytes) -> Mapping[str, Any]:
    task, _ = accept_task(bytes_of("round.cbor"), MODEL, anchors(), SEEN, NOW)
    verified = verify(data, ca_pem, frozenset(), now)
    reason = mismatch(verified.claim, len(verified.masked), task)
    if reason:
        raise Untrusted(reason)
    private = [
        X25519PrivateKey.from_private_bytes(bytes.fromhex(key)) for key in json.loads(bytes_of("aggregators.json"))
    ]
    holdings = [
        hold([keep(data, size_max(task))], task, index, key, ca_pem, frozenset(), now)
        for index, key in enumerate(private)
    ]
    first, second = (
        [next(rows.blocks([0]))[1][0].copy() for rows in shares]
        for shares in zip(*((holding.first, holding.second) for holding in holdings), strict=True)
    )
    assert all((second[index] == first[(index + 1) % 3]).all() for index in range(3))
    total = first[0] + first[1] + first[2]
    return {"device_id": verified.device_id, "update": [round(float(x), 3) for x in decode(total, task.fraction_bits)]}
