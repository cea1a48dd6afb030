"""The keyring's file and the certificates it issues."""

from __future__ import annotations

import ssl
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from model_delta.encoding import pack, unpack_plain
from model_delta.errors import Expired, Malformed, NotFound, StorageFull, Untrusted
from model_delta.keys.certificates import (
    SEALING_KEY_OID,
    days_left,
    device_keys_of,
    key_named_in,
    make_authority,
    make_leaf,
    make_request,
    same_keys,
    serial_of,
)
from model_delta.keys.keyring import ROLES, EmbeddedKeyring
from tests.model_delta.models import NOW, keyring

DAY = 86_400


def enroll(ring: EmbeddedKeyring, name: str = "pos-0001", **options: Any) -> tuple[Any, bytes, bytes]:
    private = ec.generate_private_key(ec.SECP256R1())
    sealing = X25519PrivateKey.generate().public_key().public_bytes_raw()
    return private, sealing, ring.issue_certificate(make_request(private, name), name, sealing, **options)


def test_the_file_is_private_and_survives_reopening(tmp_path: Path) -> None:
    ring = keyring(tmp_path)
    path = tmp_path / "keyring-acme"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    wrapped, signed = ring.wrap("fraud/1", b"k" * 32), ring.sign("plan", "plan", b"payload")
    again = EmbeddedKeyring.open(path)
    assert again.unwrap("fraud/1", wrapped) == b"k" * 32
    assert again.sign("plan", "plan", b"payload") == signed
    assert again.anchors() == ring.anchors()
    assert set(ring.anchors().roles) == set(ROLES)
    assert [path.name for path in tmp_path.iterdir()] == ["keyring-acme"]


def test_a_keyring_is_never_replaced_by_accident(tmp_path: Path) -> None:
    ring = keyring(tmp_path)
    with pytest.raises(Malformed, match="is there already"):
        EmbeddedKeyring.create(tmp_path / "keyring-acme", "acme")
    assert EmbeddedKeyring.open(tmp_path / "keyring-acme").anchors() == ring.anchors()
    assert [path.name for path in tmp_path.iterdir()] == ["keyring-acme"]


def test_a_missing_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(StorageFull, match="nothing was changed"):
        EmbeddedKeyring.create(tmp_path / "absent" / "keyring", "acme")


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    keyring(tmp_path)
    path = tmp_path / "keyring-acme"
    path.chmod(0o640)
    with pytest.raises(Untrusted, match="expected mode 0600, found 0640; run: chmod 600"):
        EmbeddedKeyring.open(path)


def test_a_file_that_is_no_keyring_is_named(tmp_path: Path) -> None:
    keyring(tmp_path)
    path = tmp_path / "keyring-acme"
    good = path.read_bytes()
    newer = pack({**unpack_plain(good), "format": 3, "roles": "something new"})
    for data, message in ((b"", "CBOR"), (good[:-1], "CBOR"), (b"hello", "CBOR"), (newer, "format 3.*up to 2")):
        path.write_bytes(data)
        with pytest.raises(Malformed, match=message) as failure:
            EmbeddedKeyring.open(path)
        assert str(path) in str(failure.value)
    with pytest.raises(NotFound):
        EmbeddedKeyring.open(tmp_path / "absent")


def test_a_wrapped_key_opens_only_in_its_context_and_tenant(tmp_path: Path) -> None:
    ring, other = keyring(tmp_path), keyring(tmp_path, "globex")
    wrapped = ring.wrap("fraud/1", b"k" * 32)
    assert wrapped != ring.wrap("fraud/1", b"k" * 32)
    altered = wrapped[:-1] + bytes([wrapped[-1] ^ 1])
    for holder, context, data in (
        (ring, "fraud/2", wrapped),
        (other, "fraud/1", wrapped),
        (ring, "fraud/1", altered),
        (ring, "fraud/1", b""),
        (ring, "fraud/1", wrapped[:10]),
        (ring, "fraud/1", b"\x02" + wrapped[1:]),
    ):
        with pytest.raises(Untrusted, match="does not open"):
            holder.unwrap(context, data)


def test_no_signature_without_a_role(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="role 'root'"):
        keyring(tmp_path).sign("root", "plan", b"")


def test_a_certificate_names_the_device_and_both_keys(tmp_path: Path) -> None:
    ring = keyring(tmp_path)
    private, sealing, certificate = enroll(ring)
    name, verifying, sealed_to = device_keys_of(certificate, ring.ca_pem(), NOW, ring.revoked())
    assert (name, sealed_to) == ("pos-0001", sealing)
    assert verifying == private.public_key()
    parsed = x509.load_pem_x509_certificate(certificate)
    assert parsed.subject.rfc4514_string() == "CN=pos-0001,O=acme"
    assert not parsed.extensions.get_extension_for_oid(SEALING_KEY_OID).critical


def test_the_request_proves_possession_and_decides_nothing_else(tmp_path: Path) -> None:
    ring, private = keyring(tmp_path), ec.generate_private_key(ec.SECP256R1())
    sealing = X25519PrivateKey.generate().public_key().public_bytes_raw()
    certificate = ring.issue_certificate(make_request(private, "coordinator"), "pos-0002", sealing)
    assert device_keys_of(certificate, ring.ca_pem(), NOW).common_name == "pos-0002"
    request = x509.load_pem_x509_csr(make_request(private, "pos-0001"))
    der = bytearray(request.public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(Malformed, match="not signed by the key"):
        ring.issue_certificate(forged, "pos-0001", sealing)


def test_requests_that_are_refused(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import hashes

    ring = keyring(tmp_path)
    name = x509.Name([])
    rsa_request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(name)
        .sign(rsa.generate_private_key(65537, 2048), hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    good = make_request(ec.generate_private_key(ec.SECP256R1()), "pos-0001")
    for request, identity, sealing in (
        (b"", "pos-0001", None),
        (b"not a request", "pos-0001", None),
        (rsa_request, "pos-0001", None),
        (good, "pos-0001", b"short"),
        (good, "pos/0001", None),
        (good, "#", None),
        (good, "", None),
        (good, "../x", None),
        (good, "x" * 65, None),
    ):
        with pytest.raises(Malformed):
            ring.issue_certificate(request, identity, sealing)


def test_certificates_that_are_refused(tmp_path: Path) -> None:
    ring, other = keyring(tmp_path), keyring(tmp_path, "globex")
    _, _, certificate = enroll(ring, days=30)
    for at, kind in ((NOW + 31 * DAY, Expired), (NOW - 2 * DAY, Untrusted)):
        with pytest.raises(kind):
            device_keys_of(certificate, ring.ca_pem(), at)
    with pytest.raises(Untrusted, match="not issued by"):
        device_keys_of(certificate, other.ca_pem(), NOW)
    with pytest.raises(Untrusted, match="revoked"):
        device_keys_of(certificate, ring.ca_pem(), NOW, {serial_of(certificate)})
    with pytest.raises(Untrusted, match="another purpose"):
        device_keys_of(ring.ca_pem(), ring.ca_pem(), NOW)
    unsealed = ring.issue_certificate(make_request(ec.generate_private_key(ec.SECP256R1()), "a"), "a", None)
    with pytest.raises(Untrusted, match="no X25519 key"):
        device_keys_of(unsealed, ring.ca_pem(), NOW)
    for junk in (b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"):
        with pytest.raises(Malformed):
            device_keys_of(junk, ring.ca_pem(), NOW)


def issued(
    authority: ec.EllipticCurvePrivateKey, ca: bytes, public: Any, names: tuple[str, ...], extension: bytes
) -> bytes:
    """A certificate with the CA's signature and whatever else, as this CA would never make it."""
    start = datetime.fromtimestamp(NOW, UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names]))
        .issuer_name(x509.load_pem_x509_certificate(ca).subject)
        .public_key(public)
        .serial_number(7)
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.UnrecognizedExtension(SEALING_KEY_OID, extension), critical=False)
    )
    return builder.sign(authority, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


P256, P384 = (ec.generate_private_key(curve) for curve in (ec.SECP256R1(), ec.SECP384R1()))
SEALING = b"\x04\x20" + X25519PrivateKey.generate().public_key().public_bytes_raw()


@pytest.mark.parametrize(
    ("key", "names", "extension", "words"),
    [
        (P384, ("a",), SEALING, "expected a P-256 key"),
        (ed25519.Ed25519PrivateKey.generate(), ("a",), SEALING, "expected a P-256 key"),
        (P256, (), SEALING, "expected one common name, found 0"),
        (P256, ("a", "b"), SEALING, "expected one common name, found 2"),
        (P256, ("a",), SEALING[:-1], "holds no X25519 key"),
        (P256, ("a",), b"\x03" + SEALING[1:], "holds no X25519 key"),
    ],
    ids=["another curve", "no curve", "no name", "two names", "a short sealing key", "no sealing key"],
)
def test_the_authoritys_signature_alone_makes_no_device(
    key: Any, names: tuple[str, ...], extension: bytes, words: str
) -> None:
    authority = ec.generate_private_key(ec.SECP256R1())
    ca = make_authority(authority, "acme", NOW)
    assert device_keys_of(issued(authority, ca, P256.public_key(), ("a",), SEALING), ca, NOW).common_name == "a"
    certificate = issued(authority, ca, key.public_key(), names, extension)
    with pytest.raises(Untrusted, match=words):
        device_keys_of(certificate, ca, NOW)
    if key is not P256:
        with pytest.raises(Untrusted, match="expected a P-256 key"):
            key_named_in(certificate)


def test_who_signs_for_the_authority_must_have_its_key() -> None:
    authority, other = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca, request = make_authority(authority, "acme", NOW), make_request(P256, "a")

    def elsewhere(key: ec.EllipticCurvePrivateKey) -> bytes:
        sign = lambda draft: key.sign(draft, ec.ECDSA(hashes.SHA256()))  # noqa: E731
        return make_leaf(ca, sign, request, "a", "acme", SEALING[2:], now=NOW, days=1)

    assert device_keys_of(elsewhere(authority), ca, NOW).common_name == "a"
    with pytest.raises(Untrusted, match="signed with another key than the CA's"):
        elsewhere(other)


def test_a_certificate_from_a_copied_authority_name_is_refused(tmp_path: Path) -> None:
    real = keyring(tmp_path)
    (tmp_path / "copy").mkdir()
    impostor = keyring(tmp_path / "copy")  # same tenant, so the same names, and other keys
    _, _, certificate = enroll(impostor)
    with pytest.raises(Untrusted, match="not issued by"):
        device_keys_of(certificate, real.ca_pem(), NOW)


def test_revocation_is_durable(tmp_path: Path) -> None:
    ring = keyring(tmp_path)
    serials = {serial_of(enroll(ring, f"pos-{i}")[2]) for i in range(3)}
    for serial in serials:
        ring.revoke(serial)
        ring.revoke(serial)
    assert EmbeddedKeyring.open(tmp_path / "keyring-acme").revoked() == serials == ring.revoked()
    assert stat.S_IMODE((tmp_path / "keyring-acme").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["keyring-acme"]


def test_two_processes_do_not_undo_each_others_revocations(tmp_path: Path) -> None:
    coordinator = keyring(tmp_path)
    operator = EmbeddedKeyring.open(tmp_path / "keyring-acme")
    operator.revoke(7)
    coordinator.revoke(8)
    assert EmbeddedKeyring.open(tmp_path / "keyring-acme").revoked() == {7, 8} == coordinator.revoked()


@pytest.mark.parametrize("serial", [0, -1, 1 << 160])
def test_what_is_no_serial_number_cannot_be_revoked(tmp_path: Path, serial: int) -> None:
    ring = keyring(tmp_path)
    with pytest.raises(Malformed, match="serial number"):
        ring.revoke(serial)


def test_a_renewal_is_told_from_a_stranger(tmp_path: Path) -> None:
    ring, private = keyring(tmp_path), ec.generate_private_key(ec.SECP256R1())
    request = make_request(private, "pos-0001")
    sealing = [X25519PrivateKey.generate().public_key().public_bytes_raw() for _ in range(2)]
    first = ring.issue_certificate(request, "pos-0001", sealing[0], days=10)
    renewed = ring.issue_certificate(request, "pos-0001", sealing[0], days=20)
    assert same_keys(first, renewed)
    assert not same_keys(first, ring.issue_certificate(request, "pos-0001", sealing[1]))
    assert not same_keys(first, enroll(ring)[2])
    assert days_left(first, NOW + 3 * DAY) == pytest.approx(7)
    assert days_left(first, NOW + 12 * DAY) == pytest.approx(-2)


def test_an_altered_role_key_is_refused_by_kind(tmp_path: Path) -> None:
    keyring(tmp_path)
    path = tmp_path / "keyring-acme"
    contents = unpack_plain(path.read_bytes())
    contents["authority_key"] = contents["roles"]["plan"][0]
    path.write_bytes(pack(contents))
    with pytest.raises(Malformed, match="CA key: expected P-256, found Ed25519PrivateKey"):
        EmbeddedKeyring.open(path)


def test_both_ends_of_a_tls_connection_accept_the_certificates(tmp_path: Path) -> None:
    """Python's own TLS, with the hostname checked and a client certificate required."""
    import socket
    import time

    ring = EmbeddedKeyring.create(tmp_path / "keyring", "acme", clock=time.time)
    (tmp_path / "ca.pem").write_bytes(ring.ca_pem())
    contexts = {}
    for side, name, server in (
        (ssl.PROTOCOL_TLS_SERVER, "gateway-eu-west", True),
        (ssl.PROTOCOL_TLS_CLIENT, "p", False),
    ):
        private, _, certificate = enroll(ring, name, server=server)
        key = private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (tmp_path / f"{name}.pem").write_bytes(certificate + key)
        context = ssl.SSLContext(side)
        context.load_verify_locations(tmp_path / "ca.pem")
        context.load_cert_chain(tmp_path / f"{name}.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        contexts[side] = context
    names = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            raw, _ = listener.accept()
            with contexts[ssl.PROTOCOL_TLS_SERVER].wrap_socket(raw, server_side=True) as peer:
                names.append(dict(part[0] for part in peer.getpeercert()["subject"])["commonName"])
                peer.sendall(b"hello")

        thread = threading.Thread(target=serve)
        thread.start()
        with (
            socket.create_connection(listener.getsockname(), timeout=60) as raw,
            contexts[ssl.PROTOCOL_TLS_CLIENT].wrap_socket(raw, server_hostname="127.0.0.1") as connection,
        ):
            assert connection.recv(5) == b"hello"
        thread.join(60)
    assert names == ["p"]


def test_anchors_hold_public_keys_only(tmp_path: Path) -> None:
    for role in keyring(tmp_path).anchors().roles.values():
        assert role.threshold == 1
        for der in role.keys:
            assert isinstance(serialization.load_der_public_key(der), ed25519.Ed25519PublicKey)
