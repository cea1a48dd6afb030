"""What every keyring does, run against each implementation; Vault's against a real server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from model_delta.errors import Malformed, NotFound, SignatureInvalid, Untrusted
from model_delta.keys.certificates import device_keys_of, make_request, serial_of
from model_delta.keys.keyring import ROLES, SIGNED_BYTES_MAX, EmbeddedKeyring, Keyring
from model_delta.keys.wrapping import KeyVersions, version_of
from model_delta.trust.signing import key_id, load_public_key, open_envelope, seal_envelope
from model_delta.trust.updater import TrustAnchors
from tests.model_delta.keys.rings import KINDS, NOW, Rings, certified, rings


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rings]:
    with rings(request.param, tmp_path_factory.mktemp(request.param)) as made:
        yield made


@pytest.fixture(params=KINDS)
def fresh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rings]:
    with rings(request.param, tmp_path_factory.mktemp(request.param)) as made:
        yield made


def test_a_wrapped_key_opens_only_in_its_context_and_tenant(both: Rings) -> None:
    ring, key = both.acme, b"k" * 32
    wrapped = ring.wrap("fraud/1", key)
    assert ring.unwrap("fraud/1", wrapped) == both.again().unwrap("fraud/1", wrapped) == key
    assert wrapped != ring.wrap("fraud/1", key)
    assert len(wrapped) < 128
    altered = wrapped[:-8] + (b"A" if wrapped[-8:-7] != b"A" else b"B") + wrapped[-7:]
    for holder, context, data in (
        (ring, "fraud/2", wrapped),
        (both.globex, "fraud/1", wrapped),
        (ring, "fraud/1", altered),
        (ring, "fraud/1", b""),
        (ring, "fraud/1", wrapped[:20]),
        (ring, "fraud/1", wrapped.replace(b"vault:v1:", b"vault:v9:")),
        (ring, "fraud/1", wrapped.replace(b"vault:v1:", b"vault:v0:")),
        (ring, "fraud/1", wrapped + b"A" * 5000),
        (ring, "fraud/1", b"\xff" + wrapped),
    ):
        with pytest.raises(Untrusted) as failure:
            holder.unwrap(context, data)
        assert "kkkk" not in str(failure.value)


def test_a_context_that_says_nothing_is_refused(both: Rings) -> None:
    with pytest.raises(Malformed, match="context"):
        both.acme.wrap("", b"k" * 32)


def test_a_new_key_is_its_wrapped_form(both: Rings) -> None:
    key, wrapped = both.acme.new_key("fraud/7")
    assert len(key) == 32
    assert both.acme.unwrap("fraud/7", wrapped) == key
    assert both.acme.new_key("fraud/7")[0] != key


def test_rotation_keeps_what_was_wrapped_until_it_is_trimmed(fresh: Rings) -> None:
    ring = fresh.acme
    other_process = fresh.again()
    assert ring.versions() == KeyVersions(1, 1)
    records = [(f"fraud/{index}", ring.wrap(f"fraud/{index}", bytes([index]) * 32)) for index in range(3)]
    assert ring.rotate() == 2
    assert ring.versions() == fresh.again().versions() == KeyVersions(1, 2)
    assert [ring.unwrap(context, wrapped)[0] for context, wrapped in records] == [0, 1, 2]
    moved = ring.rewrap(records)
    assert [version_of(wrapped) for wrapped in moved] == [2, 2, 2]
    assert other_process.unwrap("fraud/2", moved[2]) == b"\x02" * 32
    ring.trim(2)
    assert ring.versions() == fresh.again().versions() == KeyVersions(2, 2)
    assert [ring.unwrap(context, wrapped)[0] for (context, _), wrapped in zip(records, moved, strict=True)] == [0, 1, 2]
    for holder in (ring, fresh.again()):
        with pytest.raises(Untrusted):
            holder.unwrap(*records[0])
        with pytest.raises(Untrusted):
            holder.rewrap(records)
    for version in (0, 3, -1):
        with pytest.raises(Malformed, match="expected a version from 1 to 2"):
            ring.trim(version)
    ring.trim(1)
    assert ring.versions() == KeyVersions(2, 2)
    assert fresh.globex.versions() == KeyVersions(1, 1)


def test_rewrapping_is_all_or_nothing_and_names_what_does_not_open(both: Rings) -> None:
    good, foreign = both.acme.wrap("fraud/1", b"k" * 32), both.globex.wrap("fraud/2", b"k" * 32)
    with pytest.raises(Untrusted, match="fraud/2"):
        both.acme.rewrap([("fraud/1", good), ("fraud/2", foreign)])
    assert both.acme.rewrap([]) == []


def test_signatures_are_believed_under_the_rings_own_anchors(both: Rings) -> None:
    ring = both.acme
    for role in ROLES:
        envelope = open_envelope(seal_envelope(ring.sign(role, "plan", b"payload")))
        assert both.again().verify(envelope, "plan", role) == b"payload"
        with pytest.raises(SignatureInvalid):
            ring.verify(envelope, "round", role)
        with pytest.raises(SignatureInvalid):
            both.globex.verify(envelope, "plan", role)
    with pytest.raises(SignatureInvalid):
        ring.verify(ring.sign("plan", "plan", b"p"), "plan", "release")


def test_the_anchors_are_public_and_the_same_for_every_process(both: Rings) -> None:
    anchors = both.acme.anchors()
    assert isinstance(anchors, TrustAnchors)
    assert anchors == both.again().anchors()
    assert (anchors.tenant, set(anchors.roles)) == (both.acme.tenant, set(ROLES))
    for keys in anchors.roles.values():
        assert isinstance(serialization.load_der_public_key(keys.keys[0]), ed25519.Ed25519PublicKey)


def test_exact_bytes_are_signed_for_forms_with_their_own_framing(both: Rings) -> None:
    public = both.acme.public_key("release")
    name, signature = both.acme.sign_bytes("release", b"exactly this")
    assert name == key_id(load_public_key(public))
    verifying = load_public_key(public)
    assert isinstance(verifying, ed25519.Ed25519PublicKey)
    verifying.verify(signature, b"exactly this")
    with pytest.raises(Malformed, match="to sign"):
        both.acme.sign_bytes("release", bytes(SIGNED_BYTES_MAX + 1))


def test_there_is_no_signature_without_a_role(both: Rings) -> None:
    for role in ("root", "", "wrapping", "../wrapping"):
        with pytest.raises(NotFound, match="role"):
            both.acme.sign(role, "plan", b"")
        with pytest.raises(NotFound, match="role"):
            both.acme.sign_bytes(role, b"")
        with pytest.raises(NotFound, match="role"):
            both.acme.public_key(role)


def test_a_certificate_names_the_device_and_both_keys(both: Rings) -> None:
    private, sealing, certificate = certified(both.acme)
    name, verifying, sealed_to = device_keys_of(certificate, both.again().ca_pem(), NOW, both.acme.revoked())
    assert (name, sealed_to, verifying) == ("pos-0001", sealing, private.public_key())
    assert x509.load_pem_x509_certificate(certificate).subject.rfc4514_string() == "CN=pos-0001,O=acme"
    with pytest.raises(Untrusted, match="not issued by"):
        device_keys_of(certificate, both.globex.ca_pem(), NOW)


def test_a_servers_certificate_names_its_hosts(both: Rings) -> None:
    _, _, certificate = certified(both.acme, "gateway-eu", server=True, dns_names=["eu.example", "10.0.0.1"])
    found = x509.load_pem_x509_certificate(certificate).extensions
    names = found.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["eu.example", "localhost"]


def test_the_request_proves_possession_and_decides_nothing_else(both: Rings) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    certificate = both.acme.issue_certificate(make_request(private, "coordinator"), "pos-0002", b"s" * 32)
    assert device_keys_of(certificate, both.acme.ca_pem(), NOW).common_name == "pos-0002"
    request = bytearray(x509.load_pem_x509_csr(make_request(private, "a")).public_bytes(serialization.Encoding.DER))
    request[-1] ^= 1
    forged = x509.load_der_x509_csr(bytes(request)).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(Malformed, match="not signed by the key"):
        both.acme.issue_certificate(forged, "a", b"s" * 32)


def test_requests_that_are_refused(both: Rings) -> None:
    weak = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    rsa_request = weak.sign(rsa.generate_private_key(65537, 2048), hashes.SHA256())
    good = make_request(ec.generate_private_key(ec.SECP256R1()), "pos-0001")
    for request, name, sealing in (
        (b"", "pos-0001", None),
        (rsa_request.public_bytes(serialization.Encoding.PEM), "pos-0001", None),
        (good, "pos-0001", b"short"),
        (good, "../x", None),
        (good, "x" * 65, None),
    ):
        with pytest.raises(Malformed):
            both.acme.issue_certificate(request, name, sealing)


def test_revocation_is_durable_and_nobody_elses_is_undone(fresh: Rings) -> None:
    ring, other = fresh.acme, fresh.again()
    serials = [serial_of(certified(ring, f"pos-{index}")[2]) for index in range(2)]
    ring.revoke(serials[0])
    ring.revoke(serials[0])
    other.revoke(serials[1])
    other.revoke(7)  # certified by another keyring, before a move
    ring.revoke(8)
    assert fresh.again().revoked() == ring.revoked() == {*serials, 7, 8}
    assert fresh.globex.revoked() == frozenset()
    for serial in (0, -1, 1 << 160):
        with pytest.raises(Malformed, match="serial number"):
            ring.revoke(serial)


def test_the_revocation_list_is_signed_by_the_ca(both: Rings) -> None:
    serial = serial_of(certified(both.acme, "pos-0009")[2])
    both.acme.revoke(serial)
    listed = x509.load_pem_x509_crl(both.acme.revocation_list())
    assert {entry.serial_number for entry in listed} == both.again().revoked() >= {serial}
    for holder, believed in ((both.acme, True), (both.globex, False)):
        key = x509.load_pem_x509_certificate(holder.ca_pem()).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        assert listed.is_signature_valid(key) is believed


def test_an_implementation_is_a_keyring(both: Rings) -> None:
    ring: Keyring = both.acme
    assert ring.tenant == "acme"
    assert (both.kind == "embedded") == isinstance(ring, EmbeddedKeyring)
