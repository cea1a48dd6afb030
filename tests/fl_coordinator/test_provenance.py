"""Bundles that the library itself wrote, and what a forger would make of them."""

from __future__ import annotations

import base64
import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from model_signing import hashing, signing

from fl_coordinator.provenance import verified_bundle
from model_delta.digest import digest_of
from model_delta.errors import Malformed, SignatureInvalid
from model_delta.manifest import Lineage, manifest_digest
from tests.fl_coordinator.control_calls import calling
from tests.fl_coordinator.platform_in_memory import Platform, fraud_model, on_a_loop

MODEL = b"a model, for all that a signature cares"


class Signer:
    """A key pair in files, and a model that it signed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model, self.bundle = folder, folder / "model.onnx", folder / "model.sig"
        self.model.write_bytes(MODEL)
        self.private = ec.generate_private_key(ec.SECP256R1())
        self.key, self.public = folder / "key.pem", folder / "key.pub.pem"
        self.key.write_bytes(_private(self.private))
        self.public.write_bytes(_public(self.private))
        self.sign()

    def sign(self, signed: Path | None = None) -> None:
        signing.Config().use_elliptic_key_signer(private_key=self.key).sign(signed or self.model, self.bundle)

    def verified(self, **options: object) -> bytes:
        settings: dict[str, object] = {"key": self.public, **options}
        return verified_bundle(self.model, self.model.read_bytes(), self.bundle, **settings)  # type: ignore[arg-type]


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _public(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    return Signer(tmp_path)


def test_a_bundle_over_the_file_verifies(signer: Signer) -> None:
    assert signer.verified() == signer.bundle.read_bytes()


def test_a_bundle_over_a_folder_verifies_for_a_file_in_it(signer: Signer, tmp_path: Path) -> None:
    folder = tmp_path / "released"
    (folder / "onnx").mkdir(parents=True)
    signer.model = folder / "onnx" / "model.onnx"
    signer.model.write_bytes(MODEL)
    (folder / "README.md").write_text("what it is")
    signer.sign(folder)
    assert signer.verified(folder=folder)
    with pytest.raises(SignatureInvalid, match="does not vouch for"):
        signer.verified()
    (folder / "README.md").write_text("something else")
    with pytest.raises(SignatureInvalid, match=r"Hash mismatch for .*README.md"):
        signer.verified(folder=folder)
    with pytest.raises(Malformed, match="expected it to hold"):
        signer.verified(folder=tmp_path / "onnx")


def _changed_model(signer: Signer) -> None:
    signer.model.write_bytes(MODEL + b"!")


def _another_key(signer: Signer) -> None:
    signer.public.write_bytes(_public(ec.generate_private_key(ec.SECP256R1())))


def _changed_statement(signer: Signer) -> None:
    bundle = json.loads(signer.bundle.read_bytes())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    statement["predicate"]["resources"][0]["digest"] = digest_of(MODEL + b"!")
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    signer.bundle.write_text(json.dumps(bundle))
    signer.model.write_bytes(MODEL + b"!")


def _no_signature(signer: Signer) -> None:
    bundle = json.loads(signer.bundle.read_bytes())
    bundle["dsseEnvelope"]["signatures"] = []
    signer.bundle.write_text(json.dumps(bundle))


def _junk(signer: Signer) -> None:
    signer.bundle.write_bytes(b"\x00junk")


def _deep(signer: Signer) -> None:
    signer.bundle.write_text("[" * 100_000)


@pytest.mark.parametrize("spoil", [_changed_model, _another_key, _changed_statement, _no_signature, _junk, _deep])
def test_what_does_not_verify_is_refused(signer: Signer, spoil: Callable[[Signer], None]) -> None:
    spoil(signer)
    with pytest.raises(SignatureInvalid, match=r"signature .*model.sig: does not vouch for .*model.onnx: ") as caught:
        signer.verified()
    assert "\n" not in str(caught.value)


def test_the_bytes_to_be_published_are_the_ones_that_were_signed(signer: Signer) -> None:
    with pytest.raises(SignatureInvalid, match=r"expected sha256 .* for .*model.onnx, found sha256"):
        verified_bundle(
            signer.model, b"read before somebody put the signed file back", signer.bundle, key=signer.public
        )


def test_a_signature_over_parts_of_files_is_not_taken(signer: Signer) -> None:
    shards = hashing.Config().use_shard_serialization()
    config = signing.Config().use_elliptic_key_signer(private_key=signer.key).set_hashing_config(shards)
    config.sign(signer.model, signer.bundle)
    with pytest.raises(SignatureInvalid, match="signature"):
        signer.verified()


def test_what_is_missing_is_said_in_a_line(signer: Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Malformed, match=r"expected the signer's --signer-key PUB.pem, or --signer-chain"):
        signer.verified(key=None)
    with pytest.raises(Malformed, match=r"expected the signer's --signer-key PUB.pem, or --signer-chain"):
        signer.verified(chain=[signer.public])
    with pytest.raises(Malformed, match=r"nowhere.pem: No such file"):
        signer.verified(key=Path("nowhere.pem"))
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(Malformed, match=r"model_signing is not installed; pip install 'atoll\[provenance\]'"):
        signer.verified()


def test_a_bundle_with_certificates_verifies_against_their_authority(signer: Signer, tmp_path: Path) -> None:
    authority = ec.generate_private_key(ec.SECP256R1())
    root = tmp_path / "root.pem"
    root.write_bytes(_certificate(authority, authority, authority=True))
    leaf = tmp_path / "leaf.pem"
    leaf.write_bytes(_certificate(signer.private, authority))
    config = signing.Config().use_certificate_signer(
        private_key=signer.key, signing_certificate=leaf, certificate_chain=[root]
    )
    config.sign(signer.model, signer.bundle)
    assert signer.verified(key=None, chain=[root])
    other = ec.generate_private_key(ec.SECP256R1())
    root.write_bytes(_certificate(other, other, authority=True))
    with pytest.raises(SignatureInvalid, match="does not vouch for"):
        signer.verified(key=None, chain=[root])
    with pytest.raises(SignatureInvalid, match="does not vouch for"):
        signer.verified()


def _certificate(
    key: ec.EllipticCurvePrivateKey, issuer: ec.EllipticCurvePrivateKey, *, authority: bool = False
) -> bytes:
    def named(one: ec.EllipticCurvePrivateKey) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, digest_of(_public(one))[:12])])

    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(named(key))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(True, False, False, False, False, authority, authority, False, False), critical=True
        )
    )
    if not authority:
        made = made.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
    return made.sign(issuer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@on_a_loop
async def test_a_version_carries_the_digest_of_its_bundle(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    bundle = b'{"mediaType": "a bundle"}'
    digest = digest_of(bundle)
    async with calling(platform) as call:
        path = f"/v1/models?model=fraud&provenance={digest}"
        early = await call("POST", path, content=fraud_model(1))
        assert (early.status_code, "put it there first" in early.json()["error"]) == (404, True)
        assert (await call("PUT", f"/v1/store/artifact/{digest}", content=bundle)).status_code == 200
        published = (await call("POST", path, content=fraud_model(1))).json()
        again = (await call("POST", path, content=fraud_model(1))).json()
        assert again["manifest"] == published["manifest"]
        manifest = platform.publisher.manifest(published["manifest"])
        assert manifest.lineage.provenance == digest
        seen = (await call("GET", f"/v1/releases/{published['manifest']}")).json()
        assert seen["lineage"]["provenance"] == digest
        assert (await call("GET", f"/v1/store/artifact/{digest}")).content == bundle
        plain = (await call("POST", "/v1/models?model=fraud", content=fraud_model(2))).json()
        await call("PUT", f"/v1/store/artifact/{digest}", content=bundle)
        late = await call("POST", path, content=fraud_model(2))
        assert late.status_code == 400
        assert "published with no signature; a signature cannot be added" in late.json()["error"]
        assert len(platform.ledger.releases("fraud")) == 2
        assert platform.publisher.manifest(plain["manifest"]).lineage == Lineage()
        for wrong in ("../../etc", "x"):
            answer = await call("POST", f"/v1/models?model=fraud&provenance={wrong}", content=fraud_model(3))
            assert answer.status_code == 400


def test_a_version_without_a_bundle_keeps_the_identity_that_it_had(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    record = platform.publisher.publish(fraud_model(1), model="fraud", now=platform.clock())
    manifest = platform.publisher.manifest(record.manifest)
    assert manifest_digest(manifest) == record.manifest
    assert b"provenance" not in platform.store.get("manifest", record.manifest)
