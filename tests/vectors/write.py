"""Writes the frozen files that do not exist yet: `python -m tests.vectors.write`. Existing ones stay as they are."""

from __future__ import annotations

import bz2
import json
import os
import struct
from collections.abc import Iterator

import bsdiff4
import cbor2
import msgspec
import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fl_coordinator.shares.client import make_contribution
from fl_coordinator.shares.contribution import CONTRIBUTION_TYPE, Claim, Contribution
from model_delta.assembly import segments_root
from model_delta.baseline import BASELINE_TYPE, BaselineModel, codes_of_scale, quantized, sealed_form
from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack, unpack_plain
from model_delta.frames import Fragments
from model_delta.graphs.mlp import mlp_model
from model_delta.keys.certificates import make_authority, make_leaf, make_request
from model_delta.keys.encryption import seal_blob
from model_delta.keys.keyring import EmbeddedKeyring
from model_delta.manifest import (
    MANIFEST_TYPE,
    Blob,
    Delivery,
    DenseOffer,
    GoldenCase,
    Lineage,
    Manifest,
    PatchOffer,
    Segment,
    StoredTensor,
    Tensor,
    TensorSpec,
)
from model_delta.patch.bsdiff import make_patch
from model_delta.plan import PLAN_TYPE, Cohort, RolloutPlan
from model_delta.task import TASK_TYPE, AggregatorKey, Parameter, RoundTask
from model_delta.topics import Hello, KeyRequest
from model_delta.trust.signing import (
    Envelope,
    open_envelope,
    pre_authentication_encoding,
    public_bytes,
    seal_envelope,
    sign,
)
from model_delta.trust.sitting_out import sitting_out_message
from monitoring.telemetry import ModelSummary, Report, SittingOut, UpdateOutcome
from tests.vectors.check_ins import check_ins
from tests.vectors.dense_patches import dense_patches
from tests.vectors.directing import Keys, directing
from tests.vectors.reading import BLOB_KEY, DEVICE, FOLDER, MODEL, NOW
from tests.vectors.transcripts import transcripts

LATER = int(NOW) + 1000 * 86_400
STABLE, TARGET = digest_of(b"stable"), digest_of(b"target")
UPDATE = np.array([0.5, -0.25, 0.125, 0.0], dtype=np.float32)


def main() -> None:
    """Write what is missing, each file by its maker below."""
    keyring = _keyring()
    for name, data in _files(keyring):
        path = FOLDER / name
        if not path.exists():
            path.write_bytes(data)


def _keyring() -> EmbeddedKeyring:
    path = FOLDER / "keyring.cbor"
    if not path.exists():
        EmbeddedKeyring.create(path, "acme", lambda: NOW)
    path.chmod(0o600)
    return EmbeddedKeyring.open(path, lambda: NOW)


def _files(keyring: EmbeddedKeyring) -> Iterator[tuple[str, bytes]]:
    yield "anchors.cbor", pack(keyring.anchors())
    yield from _manifests(keyring)
    yield from _plans(keyring)
    yield from _rounds(keyring)
    yield from _baselines(keyring)
    yield from _reports()
    yield from _sealed()
    yield from _patches()
    yield from directing()
    yield from check_ins()
    yield from transcripts(lambda role, kind, payload: _signed(keyring, role, kind, payload))


def _signed(keyring: EmbeddedKeyring, role: str, kind: str, payload: object) -> bytes:
    data = payload if isinstance(payload, bytes) else pack(payload)
    return seal_envelope(keyring.sign(role, kind, data))


def _plus(record: object, **fields: object) -> bytes:
    """The packed record with fields added or changed, as a newer program would write it."""
    return pack({**unpack_plain(pack(record)), **fields})


def _not_canonical(record: object) -> bytes:
    """The same map with its keys in another order."""
    plain = unpack_plain(pack(record))
    return cbor2.dumps(dict(sorted(plain.items(), reverse=True)))


def _manifests(keyring: EmbeddedKeyring) -> Iterator[tuple[str, bytes]]:
    segments = (Segment("graph", 4, digest_of(b"file")), Segment("layer0.weight", 2, digest_of(b"xy")))
    ones = Tensor("float32", (1, 2), np.ones((1, 2), dtype="<f4").tobytes())
    manifest = Manifest(
        tenant="acme",
        model=MODEL,
        version={"core": 2, "eu-west": 1},
        release=3,
        parents=(STABLE,),
        size=6,
        file_digest=digest_of(b"filexy"),
        segments=segments,
        merkle_root=segments_root(segments),
        tensors=(StoredTensor("layer0.weight", "int8", (1, 2), 4, 2),),
        inputs=(TensorSpec("features", "float32", (-1, 2)),),
        outputs=(TensorSpec("score", "float32", (-1, 1)),),
        feature_set="terminal-26-v1",
        golden=(GoldenCase({"features": ones}, {"score": Tensor("float32", (1, 1), bytes(4))}),),
        lineage=Lineage(round_id="fraud-7", contributions_root=digest_of(b"root")),
        created=int(NOW) - 100,
        expires=LATER,
    )
    good = _signed(keyring, "release", MANIFEST_TYPE, manifest)
    yield "manifest.cbor", good
    signed_elsewhere = msgspec.structs.replace(manifest.lineage, provenance=digest_of(b"bundle"))
    yield (
        "manifest_with_provenance.cbor",
        _signed(keyring, "release", MANIFEST_TYPE, msgspec.structs.replace(manifest, lineage=signed_elsewhere)),
    )
    opened = open_envelope(good)
    changed = msgspec.structs.replace(opened, payload=opened.payload.replace(b"\x65model", b"\x65nodel"))
    yield "manifest_changed_after_signing.cbor", seal_envelope(changed)
    yield "manifest_cut_off.cbor", good[:-1]
    yield "manifest_signed_by_the_plan_role.cbor", _signed(keyring, "plan", MANIFEST_TYPE, manifest)
    yield "manifest_signed_as_a_plan.cbor", _signed(keyring, "release", PLAN_TYPE, manifest)
    yield (
        "manifest_signed_by_a_stranger.cbor",
        seal_envelope(sign(MANIFEST_TYPE, pack(manifest), [Ed25519PrivateKey.generate()])),
    )
    yield "manifest_without_signature.cbor", seal_envelope(Envelope(MANIFEST_TYPE, pack(manifest), ()))
    for name, payload in {
        "of_another_tenant": _plus(manifest, tenant="other"),
        "expired": _plus(manifest, expires=int(NOW) - 1),
        "of_a_newer_format": _plus(manifest, format=2),
        "with_a_field_of_the_future": _plus(manifest, colour="blue"),
        "with_sizes_that_do_not_add_up": _plus(manifest, size=7),
        "not_canonical": _not_canonical(manifest),
    }.items():
        yield f"manifest_{name}.cbor", _signed(keyring, "release", MANIFEST_TYPE, payload)
    patch = PatchOffer(STABLE, Blob(digest_of(b"patch"), 5))
    delivery = Delivery(digest_of(pack(manifest)), (Blob(digest_of(b"a"), 1), Blob(digest_of(b"b"), 2)), (patch,))
    yield "delivery.cbor", pack(delivery)
    dense = DenseOffer(STABLE, Blob(digest_of(b"dense"), 4), "tp1")
    strange = DenseOffer(STABLE, Blob(digest_of(b"strange"), 3), "from-the-future")
    yield "delivery_with_dense_patches.cbor", pack(msgspec.structs.replace(delivery, dense=(dense, strange)))
    nameless = {"base": STABLE, "blob": {"digest": digest_of(b"dense"), "size": 4}}
    yield "delivery_with_a_patch_of_no_format.cbor", _plus(delivery, dense=[nameless])
    hello = Hello(DEVICE, "pos", "eu-west", TARGET, "IDLE", manifest.merkle_root)
    yield "hello.cbor", pack(hello)
    yield "hello_of_a_model.cbor", pack(msgspec.structs.replace(hello, model=MODEL))
    yield "hello_without_a_root.cbor", pack({k: v for k, v in unpack_plain(pack(hello)).items() if k != "root"})
    yield "hello_with_a_number_for_a_root.cbor", _plus(hello, root=7)


def _plans(keyring: EmbeddedKeyring) -> Iterator[tuple[str, bytes]]:
    plan = RolloutPlan(
        tenant="acme",
        model=MODEL,
        name="spring",
        serial=5,
        salt="spring",
        cohorts=(Cohort("terminals", {"device_class": ("pos",), "region": ("eu-west", "ap-south")}),),
        stage=1,
        target_buckets=2_500,
        control_buckets=2_500,
        target=TARGET,
        stable=STABLE,
        withdrawn=(digest_of(b"bad"),),
        issued=int(NOW) - 10,
        expires=LATER,
    )
    yield "plan.cbor", _signed(keyring, "plan", PLAN_TYPE, plan)
    yield "plan_signed_by_the_release_role.cbor", _signed(keyring, "release", PLAN_TYPE, plan)
    for name, fields in {
        "with_a_field_of_the_future": {"colour": "blue"},
        "older_than_one_seen": {"serial": 4},
        "of_another_model": {"model": "other"},
        "expired": {"expires": int(NOW) - 1},
        "of_a_newer_format": {"format": 2},
        "with_more_than_all_buckets": {"target_buckets": 9_000},
        "naming_no_digest": {"target": "../../etc/passwd"},
    }.items():
        yield f"plan_{name}.cbor", _signed(keyring, "plan", PLAN_TYPE, _plus(plan, **fields))


def _rounds(keyring: EmbeddedKeyring) -> Iterator[tuple[str, bytes]]:
    path = FOLDER / "aggregators.json"
    if not path.exists():
        path.write_text(json.dumps([X25519PrivateKey.generate().private_bytes_raw().hex() for _ in range(3)]) + "\n")
    sealing = [X25519PrivateKey.from_private_bytes(bytes.fromhex(key)) for key in json.loads(path.read_text())]
    task = RoundTask(
        tenant="acme",
        model=MODEL,
        round_id="fraud-7",
        base=STABLE,
        training_graph=digest_of(b"graph"),
        parameters=(Parameter("layer0.weight", (2, 2), "layer0.weight_scale"),),
        length=4,
        selected_min=8,
        aggregators=tuple(
            AggregatorKey(
                name,
                key.public_key().public_bytes_raw(),
                public_bytes(Ed25519PrivateKey.from_private_bytes(bytes([index]) * 32).public_key()),
            )
            for index, (name, key) in enumerate(zip(("a0", "a1", "a2"), sealing, strict=True))
        ),
        issued=int(NOW) - 10,
        deadline=LATER,
    )
    written = FOLDER / "round.cbor"
    good = written.read_bytes() if written.exists() else _signed(keyring, "round", TASK_TYPE, task)
    yield "round.cbor", good
    yield "round_signed_by_the_release_role.cbor", _signed(keyring, "release", TASK_TYPE, task)
    for name, fields in {
        "closed_after_its_deadline": {"open": False, "deadline": int(NOW) - 1},
        "older_than_one_seen": {"issued": int(NOW) - 1000},
        "past_its_deadline": {"deadline": int(NOW) - 1},
        "of_another_tenant": {"tenant": "other"},
    }.items():
        yield f"round_{name}.cbor", _signed(keyring, "round", TASK_TYPE, _plus(task, **fields))
    yield from _contributions(keyring, task)
    yield from _contributions_on_terms(keyring, unpack(open_envelope(good).payload, RoundTask))


def _contributions_on_terms(keyring: EmbeddedKeyring, task: RoundTask) -> Iterator[tuple[str, bytes]]:
    """Since devices sign what they were told of the round."""
    if (FOLDER / "contribution_on_terms.cbor").exists():
        return  # its device's key is gone, as it should be
    key, name = ec.generate_private_key(ec.SECP256R1()), "pos-0003"
    sealing = X25519PrivateKey.generate().public_key().public_bytes_raw()
    certificate = keyring.issue_certificate(make_request(key, name), name, sealing)
    for terms, told in {"terms": task, "other_terms": msgspec.structs.replace(task, selected_min=2)}.items():
        made = make_contribution(
            UPDATE, told, lambda message: key.sign(message, ec.ECDSA(hashes.SHA256())), certificate, name, os.urandom
        )
        yield f"contribution_on_{terms}.cbor", made


def _contributions(keyring: EmbeddedKeyring, task: RoundTask) -> Iterator[tuple[str, bytes]]:
    if (FOLDER / "contribution.cbor").exists():
        return  # its device's key is gone, as it should be
    key = ec.generate_private_key(ec.SECP256R1())

    def certificate(name: str) -> bytes:
        sealing = X25519PrivateKey.generate().public_key().public_bytes_raw()
        return keyring.issue_certificate(make_request(key, name), name, sealing)

    def signature(message: bytes) -> bytes:
        return key.sign(message, ec.ECDSA(hashes.SHA256()))

    own = certificate(DEVICE)
    good = make_contribution(UPDATE, task, signature, own, DEVICE, os.urandom)
    yield "contribution.cbor", good
    parts = unpack(good, Contribution)
    claim = unpack(parts.claim, Claim)

    def signed(**fields: object) -> bytes:
        packed = _plus(claim, **fields)
        message = pre_authentication_encoding(CONTRIBUTION_TYPE, packed)
        return pack(Contribution(packed, signature(message), parts.masked))

    yield "contribution_with_a_field_of_the_future.cbor", signed(colour="blue")
    yield "contribution_to_another_round.cbor", signed(round_id="fraud-8")
    yield "contribution_of_a_newer_format.cbor", signed(format=3)
    yield "contribution_with_somebody_elses_certificate.cbor", signed(certificate=certificate("pos-0002"))
    authority = ec.generate_private_key(ec.SECP256R1())
    stranger = make_leaf(
        make_authority(authority, "acme", NOW),
        authority,
        make_request(key, DEVICE),
        DEVICE,
        "acme",
        bytes(32),
        now=NOW,
        days=400,
    )
    yield "contribution_with_a_strangers_certificate.cbor", signed(certificate=stranger)
    yield (
        "contribution_changed_after_signing.cbor",
        pack(Contribution(_plus(claim, base=TARGET), parts.signature, parts.masked)),
    )
    yield (
        "contribution_with_another_vector.cbor",
        pack(Contribution(parts.claim, parts.signature, parts.masked[:-1] + bytes([parts.masked[-1] ^ 1]))),
    )
    request = KeyRequest(1, DEVICE, TARGET, int(NOW))
    yield "key_request.cbor", seal_envelope(sign("key-request", pack(request), [key]))
    other = ec.generate_private_key(ec.SECP256R1())
    yield "key_request_signed_by_another_device.cbor", seal_envelope(sign("key-request", pack(request), [other]))
    yield "device_certificate.pem", own


def _baselines(keyring: EmbeddedKeyring) -> Iterator[tuple[str, bytes]]:
    model = _baseline()
    envelope = keyring.sign("baseline", BASELINE_TYPE, model.encode())
    good = sealed_form(envelope)
    yield "baseline.cbor", good
    yield (
        "baseline_signed_by_the_release_role.cbor",
        sealed_form(keyring.sign("release", BASELINE_TYPE, model.encode())),
    )
    payload = unpack_plain(model.encode())
    for name, fields in {"of_a_newer_format": {0: 2}, "with_a_key_of_the_future": {14: "blue"}}.items():
        packed = pack({**payload, **fields})
        yield f"baseline_{name}.cbor", sealed_form(keyring.sign("baseline", BASELINE_TYPE, packed))
    yield "baseline_changed_after_signing.cbor", good.replace(b"acme", b"acne")
    frames = Fragments(good, 51)
    lines = [frames.frame(index).hex() for index in range(frames.needed + 2)]
    yield "baseline.frames", _lines(lines[: frames.needed])
    yield "baseline_two_frames_lost.frames", _lines([lines[0], *lines[3:], lines[-1]])
    yield "baseline_a_frame_too_few.frames", _lines(lines[: frames.needed - 1])
    spoilt = lines[1][:-2] + f"{int(lines[1][-2:], 16) ^ 1:02x}"
    yield "baseline_a_frame_spoilt.frames", _lines([lines[0], spoilt, *lines[2 : frames.needed]])
    yield "baseline_a_frame_without_its_header.frames", _lines([lines[0][:6]])


def _baseline() -> BaselineModel:
    rng = np.random.default_rng(1)
    layers = [
        (rng.standard_normal((26, 16)).astype(np.float32), rng.standard_normal(16).astype(np.float32)),
        (rng.standard_normal((16, 1)).astype(np.float32), rng.standard_normal(1).astype(np.float32)),
    ]
    return quantized(
        layers,
        np.zeros(26, dtype=np.float32),
        codes_of_scale(np.ones(26, dtype=np.float32)),
        tenant="acme",
        model=MODEL,
        release=3,
        created=int(NOW) - 100,
        feature_set="terminal-26-v1",
        decision_threshold=0.5,
    )


def _reports() -> Iterator[tuple[str, bytes]]:
    report = Report(
        device_id=DEVICE,
        epoch=2**53 + 1,
        first_sequence=11,
        last_sequence=20,
        time=NOW,
        state="ON_PROBATION",
        running=TARGET,
        plan_serial=5,
        lost_requests=1,
        summaries=(ModelSummary(manifest=TARGET, where="device", decisions=9, declined=2, latency={20: 8, 31: 1}),),
        outcomes=(UpdateOutcome(manifest=TARGET, event="adopted", route="patch", bytes_received=5_000, seconds=1.5),),
    )
    yield "report.cbor", pack(report)
    sitting_out = SittingOut("fraud-1799999000-0a1b2c", "training diverged")
    yield "report_sitting_a_round_out.cbor", pack(msgspec.structs.replace(report, sitting_out=sitting_out))
    if not (FOLDER / "report_sitting_a_round_out_signed.cbor").exists():
        task = unpack(open_envelope((FOLDER / "round.cbor").read_bytes()).payload, RoundTask)
        message, key = sitting_out_message(task, DEVICE, "training diverged"), Keys().device
        told = SittingOut(task.round_id, "training diverged", key.sign(message, ec.ECDSA(hashes.SHA256())))
        changed = msgspec.structs.replace(told, reason="no data")
        yield "report_sitting_a_round_out_signed.cbor", pack(msgspec.structs.replace(report, sitting_out=told))
        yield "report_sitting_a_round_out_changed.cbor", pack(msgspec.structs.replace(report, sitting_out=changed))
    yield "report_with_a_field_of_the_future.cbor", _plus(report, battery=0.5)
    inferred = ModelSummary(manifest=TARGET, where="device", inferences=8, errors=2, latency={40: 6})
    yield "report_with_inferences.cbor", pack(msgspec.structs.replace(report, summaries=(inferred,)))
    yield "report_with_text_for_a_number.cbor", _plus(report, first_sequence="11")
    yield "report_not_canonical.cbor", _not_canonical(report)


def _sealed() -> Iterator[tuple[str, bytes]]:
    good = seal_blob(BLOB_KEY, TARGET, "segment:0", b"weights " * 40)
    yield "blob.bin", good
    yield "blob_with_one_bit_flipped.bin", good[:-1] + bytes([good[-1] ^ 1])
    yield "blob_cut_off.bin", good[:-8]
    yield "blob_of_an_unknown_form.bin", b"ATB9" + good[4:]


def _lines(lines: list[str]) -> bytes:
    return ("\n".join(lines) + "\n").encode()


def _patches() -> Iterator[tuple[str, bytes]]:
    """Patches from the model `patched.onnx`."""
    rng = np.random.default_rng(1)
    weights = [
        (rng.normal(0, 0.5, (rows, columns)).astype(np.float32), np.zeros(columns, np.float32))
        for rows, columns in ((6, 16), (16, 1))
    ]
    zeros, ones = np.zeros(6, np.float32), np.ones(6, np.float32)
    old = mlp_model(weights, zeros, ones)
    new = mlp_model([(weight * np.float32(1.001), bias) for weight, bias in weights], zeros, ones)
    good = make_patch(old, new)
    yield "patched.onnx", old
    yield "bsdiff40.patch", good
    yield "bsdiff40_written_by_bsdiff4.patch", bsdiff4.diff(old, new[::-1] + old)
    yield "bsdiff40_cut_off.patch", good[:-1]
    yield "bsdiff40_with_a_byte_behind_it.patch", good + b"x"
    yield "bsdiff40_with_one_bit_flipped.patch", good[:-40] + bytes([good[-40] ^ 1]) + good[-39:]
    yield "bsdiff40_of_two_gib.patch", _bsdiff40([(1 << 31, 0, 0)], b"aaaa", b"", 1 << 31)
    yield "bsdiff40_with_a_negative_length.patch", good[:24] + struct.pack("<Q", 1 << 63 | 5) + good[32:]
    yield "bsdiff40_with_a_length_past_its_end.patch", good[:16] + struct.pack("<Q", len(good)) + good[24:]
    yield "bsdiff40_reading_past_the_old_file.patch", _bsdiff40([(0, 0, len(old)), (4, 0, 0)], bytes(4), b"", 4)
    yield "bsdiff40_reading_before_the_old_file.patch", _bsdiff40([(0, 0, -1), (4, 0, 0)], bytes(4), b"", 4)
    yield "bsdiff40_with_triples_that_make_less.patch", _bsdiff40([(4, 0, 0)], bytes(4), b"", 5)
    yield "bsdiff40_with_a_negative_run.patch", _bsdiff40([(-4, 8, 0)], b"", bytes(8), 4)
    yield "bsdiff40_with_more_differences_than_it_uses.patch", _bsdiff40([(4, 0, 0)], bytes(1_000_000), b"", 4)
    yield "bsdiff40_with_too_few_extra_bytes.patch", _bsdiff40([(4, 4, 0)], bytes(4), bytes(3), 8)
    yield "bsdiff40_with_endless_triples.patch", _bsdiff40([(0, 0, 0)] * 100_000, b"", b"", 4)
    yield "bsdiff41.patch", good.replace(b"BSDIFF40", b"BSDIFF41", 1)
    yield from dense_patches(old, new)


def _bsdiff40(triples: list[tuple[int, int, int]], difference: bytes, extra: bytes, size: int) -> bytes:
    numbers = [abs(number) | (1 << 63 if number < 0 else 0) for triple in triples for number in triple]
    control, packed = bz2.compress(struct.pack(f"<{len(numbers)}Q", *numbers)), bz2.compress(difference)
    header = b"BSDIFF40" + struct.pack("<QQQ", len(control), len(packed), size)
    return header + control + packed + bz2.compress(extra)


if __name__ == "__main__":
    main()
