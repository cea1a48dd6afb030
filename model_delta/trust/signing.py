"""Signed bytes.

Everything signed travels in an `Envelope`: payload bytes, a type, signatures. What is signed is the pre-authentication
encoding of DSSE v1.0 (`DSSEv1 SP LEN(type) SP type SP LEN(payload) SP payload`), so that a signature over one type can
never be read as another. Two schemes: Ed25519 (RFC 8032) for people and coordinators, ECDSA P-256 with SHA-256
(FIPS 186-5) for device certificates. A key's id is the SHA-256 of its SubjectPublicKeyInfo.

Verify first, parse after: `verify` returns the payload bytes, and only those.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack
from model_delta.errors import Malformed, SignatureInvalid

PrivateKey = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey
PublicKey = ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey


class Signature(msgspec.Struct, frozen=True):
    """One signature by the key named `key_id`."""

    key_id: str
    value: bytes


class Envelope(msgspec.Struct, frozen=True):
    """Signed bytes of one `type`."""

    type: str
    payload: bytes
    signatures: tuple[Signature, ...]


def public_bytes(key: PublicKey) -> bytes:
    """DER SubjectPublicKeyInfo of a public key."""
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def load_public_key(der: bytes) -> PublicKey:
    """Read a SubjectPublicKeyInfo. Raises Malformed for anything but Ed25519 and P-256."""
    try:
        key = serialization.load_der_public_key(der)
    except Exception as error:
        raise Malformed(f"public key: {type(error).__name__}") from None
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return key
    raise Malformed(f"public key: expected Ed25519 or ECDSA P-256, found {type(key).__name__}")


def key_id(key: PublicKey) -> str:
    """The key's name: digest of its SubjectPublicKeyInfo."""
    return digest_of(public_bytes(key))


def pre_authentication_encoding(kind: str, payload: bytes) -> bytes:
    """DSSE v1.0 PAE."""
    encoded = kind.encode()
    return b"DSSEv1 %d %s %d %s" % (len(encoded), encoded, len(payload), payload)


def sign(kind: str, payload: bytes, keys: Iterable[PrivateKey]) -> Envelope:
    """Sign `payload` as a `kind` with each of `keys`."""
    message = pre_authentication_encoding(kind, payload)
    signatures = []
    for private in keys:
        if isinstance(private, ed25519.Ed25519PrivateKey):
            value = private.sign(message)
        else:
            value = private.sign(message, ec.ECDSA(hashes.SHA256()))
        signatures.append(Signature(key_id(private.public_key()), value))
    return Envelope(kind, payload, tuple(signatures))


def verify(envelope: Envelope, kind: str, keys: Mapping[str, PublicKey], threshold: int = 1) -> bytes:
    """Return the payload if at least `threshold` different keys of `keys` (by id) signed it as a `kind`.

    Raises SignatureInvalid. A key counts once, however often it signed.
    """
    if envelope.type != kind:
        raise SignatureInvalid(f"envelope: expected type {kind!r}, found {envelope.type!r}")
    message = pre_authentication_encoding(envelope.type, envelope.payload)
    valid: set[str] = set()
    for signature in envelope.signatures[:16]:
        public = keys.get(signature.key_id)
        if public is None or signature.key_id in valid:
            continue
        try:
            if isinstance(public, ed25519.Ed25519PublicKey):
                public.verify(signature.value, message)
            else:
                public.verify(signature.value, message, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            continue
        valid.add(signature.key_id)
    if len(valid) < threshold:
        raise SignatureInvalid(f"{kind}: expected {threshold} valid signature(s) by a known key, found {len(valid)}")
    return envelope.payload


def seal_envelope(envelope: Envelope) -> bytes:
    """The envelope's bytes on the wire."""
    return pack(envelope)


def open_envelope(data: bytes) -> Envelope:
    """Parse an envelope; nothing in it is believed yet. Raises Malformed."""
    return unpack(data, Envelope)
