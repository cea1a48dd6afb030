"""Device certificates: one certificate names a device and both of its keys.

A leaf carries a P-256 key (TLS and signatures) and, in a private non-critical extension, the X25519 key that secrets
are sealed to. The common name is the identity, the organisation the tenant. Profile: RFC 5280; server names also stand
in the subject alternative name (RFC 6125).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from model_delta.errors import Expired, Malformed, Untrusted

SEALING_KEY_OID = x509.ObjectIdentifier("2.25.168093751408913502811174590211283340097")
"""Extension whose value is a DER OCTET STRING of the 32 raw bytes of an X25519 public key (RFC 7748). The arc under
2.25 is a UUID (ITU-T X.667), so it needs no registration."""

_OCTET_STRING_32 = b"\x04\x20"
_ECDSA_WITH_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")
"""AlgorithmIdentifier of RFC 5758, section 3.2."""

_IDENTITY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ONE_DAY = timedelta(days=1)


class DeviceKeys(NamedTuple):
    """Whose certificate it is, the key that verifies its signatures, the X25519 bytes to seal to."""

    common_name: str
    verifying: ec.EllipticCurvePublicKey
    sealing: bytes


def require_identity(name: str) -> str:
    """Return `name` if it can be an identity: it becomes an MQTT topic level and a file name. Raises Malformed."""
    if not _IDENTITY.fullmatch(name):
        raise Malformed(
            f"identity: expected 1 to 64 letters, digits, '.', '_', '-', not first a sign, found {name[:80]!r}"
        )
    return name


def make_request(private: ec.EllipticCurvePrivateKey, common_name: str) -> bytes:
    """A PKCS #10 certificate request (RFC 2986), PEM, which proves possession of `private`."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, require_identity(common_name))])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(private, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def make_authority(private: ec.EllipticCurvePrivateKey, tenant: str, now: float, days: int = 3650) -> bytes:
    """A self-signed CA certificate, PEM, that may sign leaves and nothing below them. `now` is Unix seconds."""
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, require_identity(tenant)),
            x509.NameAttribute(NameOID.COMMON_NAME, f"Atoll {tenant} CA"[:64]),
        ]
    )
    public = private.public_key()
    start = _moment(now)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - _ONE_DAY)
        .not_valid_after(start + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(authority=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(private, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )


def make_leaf(
    authority: bytes,
    sign: ec.EllipticCurvePrivateKey | Callable[[bytes], bytes],
    request: bytes,
    common_name: str,
    tenant: str,
    sealing: bytes | None,
    *,
    now: float,
    days: int,
    dns_names: Sequence[str] = (),
    server: bool = False,
) -> bytes:
    """A leaf certificate, PEM, for the key of `request`; nothing else in the request is believed.

    `sign` is the key of `authority`, or a function that asks its holder for an ECDSA P-256 SHA-256 signature (DER).
    A server's certificate names localhost, 127.0.0.1 and `dns_names` (names or addresses) and is good for both ends of
    a connection. It is valid from a day back, for devices whose clock is behind. Raises Malformed for a request that is
    not PEM, is not P-256, or whose own signature is wrong.
    """
    issuer = _load(authority, "CA certificate")
    try:
        parsed = x509.load_pem_x509_csr(request)
        possessed = parsed.is_signature_valid
        public = parsed.public_key()
    except Exception as error:
        raise Malformed(f"certificate request of {common_name!r}: {type(error).__name__}") from None
    if not possessed:
        raise Malformed(f"certificate request of {common_name!r}: not signed by the key that it names")
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
        raise Malformed(f"certificate request of {common_name!r}: expected a P-256 key, found {type(public).__name__}")
    if sealing is not None and len(sealing) != 32:
        raise Malformed(f"certificate request of {common_name!r}: expected 32 bytes of X25519, found {len(sealing)}")
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, require_identity(tenant)),
            x509.NameAttribute(NameOID.COMMON_NAME, require_identity(common_name)),
        ]
    )
    purposes = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if server else [])]
    start = _moment(now)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - _ONE_DAY)
        .not_valid_after(min(start + timedelta(days=days), issuer.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(_p256_key_of(issuer)), critical=False)
    )
    names = dict.fromkeys([*dns_names, *(("localhost", "127.0.0.1") if server else ())])
    if names:
        builder = builder.add_extension(
            x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False
        )
    if sealing is not None:
        extension = x509.UnrecognizedExtension(SEALING_KEY_OID, _OCTET_STRING_32 + sealing)
        builder = builder.add_extension(extension, critical=False)
    return _signed(builder, issuer, sign).public_bytes(serialization.Encoding.PEM)


def make_revocation_list(
    authority_pem: bytes,
    sign: ec.EllipticCurvePrivateKey | Callable[[bytes], bytes],
    revoked: Collection[int],
    now: float,
    days: int = 3650,
) -> bytes:
    """The CA's signed list of revoked serial numbers, PEM, valid for `days`; may be empty. RFC 5280, section 5. `sign`
    as in `make_leaf`.

    It must not run out before its reader hears of a newer one: brokers that find it expired refuse everybody.
    """
    start = _moment(now)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(_load(authority_pem, "CA certificate").subject)
        .last_update(start)
        .next_update(start + days * _ONE_DAY)
    )
    for serial in sorted(revoked):
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(start).build()
        builder = builder.add_revoked_certificate(entry)
    if isinstance(sign, ec.EllipticCurvePrivateKey):
        return builder.sign(sign, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    draft = builder.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()).tbs_certlist_bytes
    made = x509.load_der_x509_crl(_signed_elsewhere(draft, sign))
    if not made.is_signature_valid(_p256_key_of(_load(authority_pem, "CA certificate"))):
        raise Untrusted("revocation list: the holder of the CA key signed with another key than the CA's")
    return made.public_bytes(serialization.Encoding.PEM)


def device_keys_of(cert_pem: bytes, ca_pem: bytes, now: float, revoked: Collection[int] = frozenset()) -> DeviceKeys:
    """The identity and keys that `ca_pem` vouches for in `cert_pem`. `now` is Unix seconds, `revoked` serial numbers.

    Checks the issuer's signature, the validity period, revocation, that it is a client's leaf (RFC 5280 section 4.2.1)
    and that both keys are there. Raises Malformed for what is no certificate, Expired, and Untrusted.
    """
    certificate, authority = _load(cert_pem, "device certificate"), _load(ca_pem, "CA certificate")
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        raise Untrusted("device certificate: not issued by this platform's CA; enroll the device again") from None
    if not _is_client_leaf(certificate):
        raise Untrusted("device certificate: expected a client's leaf certificate, found one for another purpose")
    identity = _identity_of(certificate)
    what = f"certificate of {identity}"
    moment = _moment(now)
    if moment < certificate.not_valid_before_utc:
        raise Untrusted(f"{what}: not valid before {certificate.not_valid_before_utc:%Y-%m-%d}; check the clock")
    if moment > certificate.not_valid_after_utc:
        raise Expired(f"{what}: expired on {certificate.not_valid_after_utc:%Y-%m-%d}; enroll the device again")
    if certificate.serial_number in revoked:
        raise Untrusted(f"{what}: revoked")
    verifying = certificate.public_key()
    if not isinstance(verifying, ec.EllipticCurvePublicKey) or not isinstance(verifying.curve, ec.SECP256R1):
        raise Untrusted(f"{what}: expected a P-256 key, found {type(verifying).__name__}")
    sealing = sealing_key_in(certificate)
    if not sealing:
        raise Untrusted(f"{what}: holds no X25519 key to seal to; enroll the device again")
    return DeviceKeys(identity, verifying, sealing)


def key_named_in(cert_pem: bytes) -> ec.EllipticCurvePublicKey:
    """The P-256 key in a certificate that nobody has vouched for yet. Raises Malformed and Untrusted."""
    try:
        key = _load(cert_pem, "device certificate").public_key()
    except (ValueError, UnsupportedAlgorithm) as error:  # the key is parsed only now, whoever wrote it
        raise Malformed(f"device certificate: expected a P-256 key, found {type(error).__name__}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise Untrusted(f"device certificate: expected a P-256 key, found {type(key).__name__}")
    return key


def sealing_key_in(certificate: x509.Certificate) -> bytes:
    """The X25519 public key in the private extension, or b"" when there is none in the right form."""
    try:
        extension = certificate.extensions.get_extension_for_oid(SEALING_KEY_OID).value
    except (x509.ExtensionNotFound, ValueError):
        return b""
    value = extension.value if isinstance(extension, x509.UnrecognizedExtension) else b""
    return value[2:] if len(value) == 34 and value.startswith(_OCTET_STRING_32) else b""


def serial_of(cert_pem: bytes) -> int:
    """The serial number by which a certificate is revoked. Raises Malformed."""
    return _load(cert_pem, "certificate").serial_number


def same_keys(first_pem: bytes, second_pem: bytes) -> bool:
    """Whether two certificates are for the same keys, whatever else differs. Raises Malformed."""
    first, second = _load(first_pem, "certificate"), _load(second_pem, "certificate")
    return first.public_key() == second.public_key() and sealing_key_in(first) == sealing_key_in(second)


def days_left(cert_pem: bytes, now: float) -> float:
    """Days until a certificate expires; negative when it has. `now` is Unix seconds. Raises Malformed."""
    return (_load(cert_pem, "certificate").not_valid_after_utc - _moment(now)) / _ONE_DAY


def _signed(
    builder: x509.CertificateBuilder,
    issuer: x509.Certificate,
    sign: ec.EllipticCurvePrivateKey | Callable[[bytes], bytes],
) -> x509.Certificate:
    """The certificate of `builder`, signed by a key here or by a holder elsewhere."""
    if isinstance(sign, ec.EllipticCurvePrivateKey):
        return builder.sign(sign, hashes.SHA256())
    draft = builder.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()).tbs_certificate_bytes
    certificate = x509.load_der_x509_certificate(_signed_elsewhere(draft, sign))
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, ValueError, TypeError):
        raise Untrusted("certificate: the holder of the CA key signed with another key than the CA's") from None
    return certificate


def _signed_elsewhere(draft: bytes, sign: Callable[[bytes], bytes]) -> bytes:
    """What a throw-away key signed, with the signature of a key that is elsewhere in its place. The signed bytes name
    the algorithm and not the key, so they stay. RFC 5280, sections 4.1 and 5.1: tbs, signatureAlgorithm, signature."""
    signature = b"\x00" + sign(draft)
    body = draft + _ECDSA_WITH_SHA256 + b"\x03" + _der_length(len(signature)) + signature
    return b"\x30" + _der_length(len(body)) + body


def _der_length(length: int) -> bytes:
    if length < 128:
        return bytes([length])
    encoded = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes([128 + len(encoded)]) + encoded


def _p256_key_of(issuer: x509.Certificate) -> ec.EllipticCurvePublicKey:
    key = issuer.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise Malformed(f"CA certificate: expected a P-256 key, found {type(key).__name__}")
    return key


def _load(pem: bytes, what: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except Exception as error:  # the parser raises several unrelated kinds on hostile input
        raise Malformed(f"{what}: expected an X.509 certificate in PEM, found {type(error).__name__}") from None


def _identity_of(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(names) != 1:
        raise Untrusted(f"device certificate: expected one common name, found {len(names)}")
    return require_identity(str(names[0].value))


def _is_client_leaf(certificate: x509.Certificate) -> bool:
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        purposes = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        return False
    return not constraints.ca and ExtendedKeyUsageOID.CLIENT_AUTH in purposes


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(int(seconds), UTC)
