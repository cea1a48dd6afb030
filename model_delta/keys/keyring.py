"""Who holds the platform's own keys.

A program asks a `Keyring` to wrap, sign and certify; it never sees a private key. `EmbeddedKeyring` is the default: one
file, for a platform that runs on one machine. Its protection is the file's mode (0600) and the disk it lies on; a
platform with more than that to lose keeps the same protocol over an external key service.

The file is a CBOR record (see `encoding`) with a `format` number; a newer format is refused by name. It is replaced
whole (written aside, flushed, renamed), so that a crash leaves the old file or the new one.

A wrapped key is  1 (format) | nonce (12 bytes) | AES-256-GCM(HKDF-SHA256(wrapping key, context), key, context):
`context` binds it to what it is for (tenant, manifest), as HashiCorp Vault's Transit engine does with derived keys.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from model_delta.encoding import pack, unpack
from model_delta.errors import Malformed, NotFound, StorageFull, Untrusted
from model_delta.keys.certificates import make_authority, make_leaf, require_identity
from model_delta.trust.signing import Envelope, key_id, public_bytes
from model_delta.trust.signing import sign as sign_envelope
from model_delta.trust.updater import RoleKeys, TrustAnchors

FORMAT = 1
ROLES = ("release", "plan", "round", "baseline")
SIGNED_BYTES_MAX = 8 << 20
"""What `sign_bytes` takes: far above any metadata file, far below what a key service accepts in one request."""


class Keyring(Protocol):
    """What a program may ask of the platform's keys."""

    @property
    def tenant(self) -> str:
        """Whose keys these are."""

    def wrap(self, context: str, key: bytes) -> bytes:
        """Encrypt an artifact key for storage, bound to `context`."""

    def unwrap(self, context: str, wrapped: bytes) -> bytes:
        """The key again. Raises Untrusted for another context or altered bytes."""

    def sign(self, role: str, kind: str, payload: bytes) -> Envelope:
        """Sign `payload` as a `kind` with the keys of `role`. Raises NotFound for a role without keys."""

    def sign_bytes(self, role: str, data: bytes) -> tuple[str, bytes]:
        """Sign exactly `data`, at most SIGNED_BYTES_MAX, with the newest key of `role`: (key id, Ed25519 signature of
        64 bytes). For forms that bring their own framing, such as TUF metadata. Raises NotFound, Malformed."""

    def public_key(self, role: str) -> bytes:
        """DER SubjectPublicKeyInfo of the key by which `sign_bytes` signs now. Raises NotFound."""

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
        """Stop believing the certificate with this serial number. Durable when it returns."""

    def revoked(self) -> frozenset[int]:
        """Serial numbers of revoked certificates."""


class _KeyFile(msgspec.Struct, frozen=True, kw_only=True):
    """The file's contents: private keys as PKCS #8 DER, the CA certificate as PEM, serial numbers as big-endian bytes
    (they have up to 160 bits)."""

    format: int = FORMAT
    tenant: str
    roles: dict[str, tuple[bytes, ...]]
    authority_key: bytes
    authority_certificate: bytes
    wrapping_key: bytes
    revoked: tuple[bytes, ...] = ()


class EmbeddedKeyring:
    """The platform's keys in one file. `clock` gives Unix seconds for the certificates' validity."""

    def __init__(self, path: Path, contents: _KeyFile, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._contents = contents
        self._clock = clock
        self._roles = {role: tuple(map(_load_role_key, keys)) for role, keys in contents.roles.items()}
        self._authority_key = _load_authority_key(contents.authority_key)
        self._revoked = frozenset(int.from_bytes(serial, "big") for serial in contents.revoked)

    @classmethod
    def create(cls, path: Path, tenant: str, clock: Callable[[], float] = time.time) -> EmbeddedKeyring:
        """New keys for `tenant` in a new file. Raises Malformed if the file is there already: keys are never replaced
        by accident."""
        require_identity(tenant)
        authority_key = ec.generate_private_key(ec.SECP256R1())
        contents = _KeyFile(
            tenant=tenant,
            roles={role: (_private_bytes(ed25519.Ed25519PrivateKey.generate()),) for role in ROLES},
            authority_key=_private_bytes(authority_key),
            authority_certificate=make_authority(authority_key, tenant, clock()),
            wrapping_key=os.urandom(32),
        )
        _write(path, contents, replace=False)
        return cls(path, contents, clock)

    @classmethod
    def open(cls, path: Path, clock: Callable[[], float] = time.time) -> EmbeddedKeyring:
        """Read the file. Raises NotFound, Malformed (not a keyring, or a newer format) and Untrusted (readable by
        others)."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFound(f"keyring {path}: no such file; `create` makes one") from None
        with os.fdopen(descriptor, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise Untrusted(f"keyring {path}: expected mode 0600, found {mode:04o}; run: chmod 600 {path}")
            data = file.read()
        try:
            version = unpack(data, _Versioned).format
            if version > FORMAT:
                raise Malformed(f"format {version}, this program knows up to {FORMAT}; use a newer Atoll")
            return cls(path, unpack(data, _KeyFile), clock)
        except Malformed as error:
            raise Malformed(f"keyring {path}: {error}") from None

    @property
    def tenant(self) -> str:
        """Whose keys these are."""
        return self._contents.tenant

    def wrap(self, context: str, key: bytes) -> bytes:
        """Encrypt `key` under the tenant's wrapping key, bound to `context`."""
        nonce = os.urandom(12)
        return b"\x01" + nonce + self._wrapping(context).encrypt(nonce, key, context.encode())

    def unwrap(self, context: str, wrapped: bytes) -> bytes:
        """The key again. Raises Untrusted for another context, another tenant's key or altered bytes."""
        try:
            if wrapped[:1] == b"\x01":
                return self._wrapping(context).decrypt(wrapped[1:13], wrapped[13:], context.encode())
        except (InvalidTag, ValueError):
            pass
        raise Untrusted(f"wrapped key of {context!r}: does not open under this tenant's key and context")

    def sign(self, role: str, kind: str, payload: bytes) -> Envelope:
        """Sign with every key of `role`. Raises NotFound for a role without keys."""
        return sign_envelope(kind, payload, self._keys_of(role))

    def sign_bytes(self, role: str, data: bytes) -> tuple[str, bytes]:
        """Sign exactly `data` with the newest key of `role`: (key id, Ed25519 signature). Raises NotFound, Malformed."""
        if len(data) > SIGNED_BYTES_MAX:
            raise Malformed(f"role {role!r}: expected at most {SIGNED_BYTES_MAX} bytes to sign, found {len(data)}")
        key = self._keys_of(role)[-1]
        return key_id(key.public_key()), key.sign(data)

    def public_key(self, role: str) -> bytes:
        """DER SubjectPublicKeyInfo of the newest key of `role`. Raises NotFound."""
        return public_bytes(self._keys_of(role)[-1].public_key())

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
        """Add a serial number to the revoked ones; durable when it returns. Raises Malformed for no serial number."""
        if not 0 < serial < 1 << 160:  # RFC 5280 section 4.1.2.2
            raise Malformed(f"revocation: expected a serial number of at most 160 bits, found {serial}")
        if serial in self._revoked:
            return
        # Another process (an operator's command) may have revoked one since this one read the file.
        revoked = self._revoked | self.open(self._path, self._clock).revoked() | {serial}
        contents = msgspec.structs.replace(
            self._contents, revoked=tuple(number.to_bytes(20, "big") for number in sorted(revoked))
        )
        _write(self._path, contents, replace=True)
        self._contents, self._revoked = contents, revoked

    def revoked(self) -> frozenset[int]:
        """Serial numbers of revoked certificates."""
        return self._revoked

    def _keys_of(self, role: str) -> tuple[ed25519.Ed25519PrivateKey, ...]:
        keys = self._roles.get(role)
        if not keys:
            raise NotFound(f"role {role!r}: this keyring has keys for {', '.join(sorted(self._roles))}")
        return keys

    def _wrapping(self, context: str) -> AESGCM:
        info = b"atoll wrap|" + context.encode()
        return AESGCM(HKDF(hashes.SHA256(), 32, None, info).derive(self._contents.wrapping_key))


class _Versioned(msgspec.Struct, frozen=True):
    """Only the number that says whether the rest can be read."""

    format: int


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


def _write(path: Path, contents: _KeyFile, *, replace: bool) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(pack(contents))
            file.flush()
            os.fsync(file.fileno())
        if replace:
            aside.replace(path)
        else:
            os.link(aside, path)  # unlike a rename, refuses to overwrite
    except FileExistsError:
        raise Malformed(f"keyring {path}: is there already; open it, or choose another path") from None
    except OSError as error:
        raise StorageFull(f"keyring {path}: {error.strerror}; nothing was changed; free some space") from None
    finally:
        aside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
