"""Who holds the platform's own keys.

A program asks a `Keyring` to wrap, sign and certify; it never sees a private key. Two implementations pass one suite of
tests: `EmbeddedKeyring`, the default, one file for a platform that runs on one machine, whose protection is the file's
mode (0600) and the disk it lies on; and `vault.VaultKeyring`, for which the keys stay in HashiCorp Vault or OpenBao.

Artifact keys are stored wrapped (see `wrapping`) under the tenant's wrapping key, which has versions: `rotate` adds
one, `rewrap` moves stored records to it without handing out what is in them, `trim` forgets the old ones, and then no
copy of an old record, in whatever backup, opens again. So a version of a model is shredded: drop its record, rotate,
rewrap the rest, trim.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from model_delta.errors import Malformed, NotFound
from model_delta.keys import keyfile
from model_delta.keys.certificates import make_authority, make_leaf, make_revocation_list, require_identity
from model_delta.keys.encryption import new_key
from model_delta.keys.keyfile import KeyFile, WrappingKey
from model_delta.keys.wrapping import LEGACY, VERSIONS_MAX, KeyVersions, unwrap, version_of, wrap
from model_delta.trust.signing import Envelope, key_id, load_public_key, public_bytes, verify
from model_delta.trust.signing import sign as sign_envelope
from model_delta.trust.updater import RoleKeys, TrustAnchors

ROLES = ("release", "plan", "round", "baseline", "director")
LATER_ROLES = frozenset({"director"})
"""Roles that keyrings made by an earlier program have no keys for; without them everything else still works."""
SIGNED_BYTES_MAX = 8 << 20
"""What `sign_bytes` takes: far above any metadata file, far below what a key service accepts in one request."""


class Keyring(Protocol):
    """What a program may ask of the platform's keys. Every call may raise Unavailable where the keys are elsewhere."""

    @property
    def tenant(self) -> str:
        """Whose keys these are."""

    def new_key(self, context: str) -> tuple[bytes, bytes]:
        """A fresh 256-bit artifact key, and the same wrapped for storage, bound to `context`."""

    def wrap(self, context: str, key: bytes) -> bytes:
        """Encrypt an artifact key for storage, bound to `context` (not empty)."""

    def unwrap(self, context: str, wrapped: bytes) -> bytes:
        """The key again. Raises Untrusted for another context, altered bytes, or a version that was trimmed."""

    def rewrap(self, records: Sequence[tuple[str, bytes]]) -> list[bytes]:
        """Each (context, wrapped) again under the newest wrapping key, in order. No plaintext is returned; all or
        nothing. Raises Untrusted, naming the first record that does not open."""

    def rotate(self) -> int:
        """Add a version of the wrapping key and return its number. What was wrapped before still opens. Durable."""

    def trim(self, floor: int) -> None:
        """Forget the wrapping keys older than version `floor`: what is wrapped under them never opens again. Durable.
        Raises Malformed for a version that there is not."""

    def versions(self) -> KeyVersions:
        """The oldest and the newest version of the wrapping key."""

    def sign(self, role: str, kind: str, payload: bytes) -> Envelope:
        """Sign `payload` as a `kind` with the keys of `role`. Raises NotFound for a role without keys."""

    def sign_bytes(self, role: str, data: bytes) -> tuple[str, bytes]:
        """Sign exactly `data`, at most SIGNED_BYTES_MAX, with the newest key of `role`: (key id, Ed25519 signature of
        64 bytes). For forms that bring their own framing, such as TUF metadata. Raises NotFound, Malformed."""

    def public_key(self, role: str) -> bytes:
        """DER SubjectPublicKeyInfo of the key by which `sign_bytes` signs now. Raises NotFound."""

    def verify(self, envelope: Envelope, kind: str, role: str) -> bytes:
        """The payload, if the keys of `role` signed it as a `kind`. Raises SignatureInvalid, NotFound."""

    def anchors(self) -> TrustAnchors:
        """The public half: what devices are provisioned with."""

    def issue_certificate(
        self,
        csr_pem: bytes,
        common_name: str,
        sealing_public: bytes | None,
        days: int = 400,
        dns_names: Sequence[str] = (),
        server: bool = False,
    ) -> bytes:
        """A leaf certificate, PEM, for the key of the request. Raises Malformed."""

    def ca_pem(self) -> bytes:
        """The CA certificate, PEM."""

    def revoke(self, serial: int) -> None:
        """Stop believing the certificate with this serial number. Durable when it returns. Raises Malformed."""

    def revoked(self) -> frozenset[int]:
        """Serial numbers of revoked certificates."""

    def revocation_list(self) -> bytes:
        """What is revoked as the CA's signed list, PEM, for brokers that read one."""


class EmbeddedKeyring:
    """The platform's keys in one file. `clock` gives Unix seconds for the certificates' validity."""

    def __init__(self, path: Path, contents: KeyFile, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._authority_key = _load_authority_key(contents.authority_key)
        self._take(contents)

    @classmethod
    def create(cls, path: Path, tenant: str, clock: Callable[[], float] = time.time) -> EmbeddedKeyring:
        """New keys for `tenant` in a new file. Raises Malformed if the file is there already: keys are never replaced
        by accident."""
        require_identity(tenant)
        authority_key = ec.generate_private_key(ec.SECP256R1())
        contents = KeyFile(
            tenant=tenant,
            roles={role: (_private_bytes(ed25519.Ed25519PrivateKey.generate()),) for role in ROLES},
            authority_key=_private_bytes(authority_key),
            authority_certificate=make_authority(authority_key, tenant, clock()),
            wrapping_keys=(WrappingKey(1, os.urandom(32)),),
        )
        keyfile.create(path, contents)
        return cls(path, contents, clock)

    @classmethod
    def open(cls, path: Path, clock: Callable[[], float] = time.time) -> EmbeddedKeyring:
        """Read the file. Raises NotFound, Malformed (not a keyring, or a newer format) and Untrusted (readable by
        others)."""
        contents = keyfile.read(path)
        try:
            return cls(path, contents, clock)
        except Malformed as error:
            raise Malformed(f"keyring {path}: {error}") from None

    @property
    def tenant(self) -> str:
        """Whose keys these are."""
        return self._contents.tenant

    @property
    def contents(self) -> KeyFile:
        """All of it, private keys too: for the one ceremony that moves a tenant to a key service."""
        return self._contents

    def add_missing_roles(self) -> tuple[str, ...]:
        """Make keys for the roles that an earlier program knew nothing of; which these were. Durable."""

        def with_all(before: KeyFile) -> KeyFile:
            fresh = {
                role: (_private_bytes(ed25519.Ed25519PrivateKey.generate()),)
                for role in ROLES
                if role not in before.roles
            }
            return msgspec.structs.replace(before, format=keyfile.FORMAT, roles={**before.roles, **fresh})

        missing = tuple(role for role in ROLES if role not in self._contents.roles)
        if missing:
            self._take(keyfile.change(self._path, with_all))
        return missing

    def new_key(self, context: str) -> tuple[bytes, bytes]:
        """A fresh artifact key from the operating system, and the same wrapped."""
        key = new_key()
        return key, self.wrap(context, key)

    def wrap(self, context: str, key: bytes) -> bytes:
        """Encrypt `key` under the tenant's newest wrapping key, bound to `context`. Raises Malformed (no context)."""
        return wrap(self._wrapping, context, key)

    def unwrap(self, context: str, wrapped: bytes) -> bytes:
        """The key again. Raises Untrusted for another context, another tenant's key, altered bytes, or a version that
        was trimmed."""
        if wrapped[:1] != LEGACY and version_of(wrapped) > max(self._wrapping):
            self._take(keyfile.read(self._path))  # another process may have rotated since this one read the file
        return unwrap(self._wrapping, context, wrapped)

    def rewrap(self, records: Sequence[tuple[str, bytes]]) -> list[bytes]:
        """Each record again under the newest wrapping key. Raises Untrusted, with nothing returned."""
        return [self.wrap(context, self.unwrap(context, wrapped)) for context, wrapped in records]

    def rotate(self) -> int:
        """Add a version of the wrapping key. Durable. Raises Malformed when VERSIONS_MAX are kept: trim first."""

        def with_one_more(before: KeyFile) -> KeyFile:
            if len(before.wrapping_keys) >= VERSIONS_MAX:
                raise Malformed(f"keyring {self._path}: expected fewer than {VERSIONS_MAX} versions; trim old ones")
            latest = WrappingKey(before.wrapping_keys[-1].version + 1, os.urandom(32))
            return msgspec.structs.replace(before, format=keyfile.FORMAT, wrapping_keys=(*before.wrapping_keys, latest))

        self._take(keyfile.change(self._path, with_one_more))
        return max(self._wrapping)

    def trim(self, floor: int) -> None:
        """Forget the versions below `floor`. Durable. Raises Malformed for a version that there is not."""

        def without_the_old(before: KeyFile) -> KeyFile:
            latest = before.wrapping_keys[-1].version
            if not 1 <= floor <= latest:
                raise Malformed(f"keyring {self._path}: expected a version from 1 to {latest} to keep, found {floor}")
            kept = tuple(item for item in before.wrapping_keys if item.version >= floor)
            return msgspec.structs.replace(before, format=keyfile.FORMAT, wrapping_keys=kept)

        self._take(keyfile.change(self._path, without_the_old))

    def versions(self) -> KeyVersions:
        """The oldest and the newest version of the wrapping key."""
        return KeyVersions(min(self._wrapping), max(self._wrapping))

    def sign(self, role: str, kind: str, payload: bytes) -> Envelope:
        """Sign with every key of `role`. Raises NotFound for a role without keys."""
        return sign_envelope(kind, payload, self._keys_of(role))

    def sign_bytes(self, role: str, data: bytes) -> tuple[str, bytes]:
        """Sign exactly `data` with the newest key of `role`: (key id, signature). Raises NotFound, Malformed."""
        require_signable(role, data)
        key = self._keys_of(role)[-1]
        return key_id(key.public_key()), key.sign(data)

    def public_key(self, role: str) -> bytes:
        """DER SubjectPublicKeyInfo of the newest key of `role`. Raises NotFound."""
        return public_bytes(self._keys_of(role)[-1].public_key())

    def verify(self, envelope: Envelope, kind: str, role: str) -> bytes:
        """The payload, if the keys of `role` signed it. Raises SignatureInvalid, NotFound."""
        return verify_by_anchors(self.anchors(), envelope, kind, role)

    def anchors(self) -> TrustAnchors:
        """The public half: what devices are provisioned with."""
        return TrustAnchors(
            self.tenant,
            {
                role: RoleKeys(tuple(public_bytes(key.public_key()) for key in keys))
                for role, keys in self._roles.items()
            },
        )

    def issue_certificate(
        self,
        csr_pem: bytes,
        common_name: str,
        sealing_public: bytes | None,
        days: int = 400,
        dns_names: Sequence[str] = (),
        server: bool = False,
    ) -> bytes:
        """A leaf certificate, PEM; see `certificates.make_leaf`. Raises Malformed."""
        return make_leaf(
            self.ca_pem(),
            self._authority_key,
            csr_pem,
            common_name,
            self.tenant,
            sealing_public,
            now=self._clock(),
            days=days,
            dns_names=dns_names,
            server=server,
        )

    def ca_pem(self) -> bytes:
        """The CA certificate, PEM."""
        return self._contents.authority_certificate

    def revoke(self, serial: int) -> None:
        """Add a serial number to the file; it is durable when this returns. Raises Malformed for what is none."""
        require_serial(serial)
        if serial in self._revoked:
            return

        def with_one_more(before: KeyFile) -> KeyFile:
            revoked = sorted({*before.revoked, serial.to_bytes(20, "big")})
            return msgspec.structs.replace(before, format=keyfile.FORMAT, revoked=tuple(revoked))

        self._take(keyfile.change(self._path, with_one_more))

    def revoked(self) -> frozenset[int]:
        """Serial numbers of revoked certificates."""
        return self._revoked

    def revocation_list(self) -> bytes:
        """What is revoked as the CA's signed list, PEM, for brokers that read one; see `make_revocation_list`."""
        return make_revocation_list(self.ca_pem(), self._authority_key, self._revoked, self._clock())

    def _take(self, contents: KeyFile) -> None:
        self._contents = contents
        self._roles = {role: tuple(map(_load_role_key, keys)) for role, keys in contents.roles.items()}
        self._wrapping = {item.version: item.key for item in contents.wrapping_keys}
        self._revoked = frozenset(int.from_bytes(serial, "big") for serial in contents.revoked)

    def _keys_of(self, role: str) -> tuple[ed25519.Ed25519PrivateKey, ...]:
        keys = self._roles.get(role)
        if not keys:
            raise no_such_role(role, self._roles)
        return keys


def no_such_role(role: str, known: Iterable[str]) -> NotFound:
    """The refusal of a role without keys."""
    return NotFound(f"role {role!r}: this keyring has keys for {', '.join(sorted(known))}")


def require_signable(role: str, data: bytes) -> None:
    """Raises Malformed for more bytes than `sign_bytes` takes."""
    if len(data) > SIGNED_BYTES_MAX:
        raise Malformed(f"role {role!r}: expected at most {SIGNED_BYTES_MAX} bytes to sign, found {len(data)}")


def require_serial(serial: int) -> None:
    """Raises Malformed for what cannot be a certificate's serial number (RFC 5280, section 4.1.2.2)."""
    if not 0 < serial < 1 << 160:
        raise Malformed(f"serial number: expected a positive one of at most 160 bits, found {serial.bit_length()} bits")


def verify_by_anchors(anchors: TrustAnchors, envelope: Envelope, kind: str, role: str) -> bytes:
    """The payload, if enough keys of `role` in `anchors` signed it as a `kind`. Raises SignatureInvalid, NotFound."""
    found = anchors.roles.get(role)
    if found is None:
        raise no_such_role(role, anchors.roles)
    keys = {key_id(key): key for key in map(load_public_key, found.keys)}
    return verify(envelope, kind, keys, found.threshold)


def _private_bytes(key: ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _load_private(der: bytes) -> object:
    try:
        return serialization.load_der_private_key(der, None)
    except Exception as error:
        raise Malformed(f"private key: {type(error).__name__}") from None


def _load_role_key(der: bytes) -> ed25519.Ed25519PrivateKey:
    key = _load_private(der)
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise Malformed(f"role key: expected Ed25519, found {type(key).__name__}")
    return key


def _load_authority_key(der: bytes) -> ec.EllipticCurvePrivateKey:
    key = _load_private(der)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Malformed(f"CA key: expected P-256, found {type(key).__name__}")
    return key
