"""A keyring whose keys stay in HashiCorp Vault or OpenBao.

Each tenant has mounts and logins of its own, below one folder; Vault's namespaces are Enterprise-only:

    atoll/TENANT/transit    wrapping (aes256-gcm96, derived by context), role-release ... (ed25519), authority (P-256)
    atoll/TENANT/pki        the tenant's CA, for whoever expects it there; issues the certificates of certificate logins
    atoll/TENANT/kv         what is not secret but must be agreed on: the CA certificate, revoked serials
    auth: atoll/TENANT/approle, atoll/TENANT/cert

No private key, and no wrapping key, ever leaves the server. The PKI engine neither issues nor even reads a device's
certificate: it adds no extension of ours, and Go's X.509 parser refuses the 128-bit arc of that extension's name. So a
device's certificate, and the list of revoked ones, are made here, byte for byte as the embedded keyring makes them
(`certificates`), and signed by `authority` in Transit.

Artifact keys pass through; models never do. `rewrap` takes no associated data there, so what a record is for is bound
by `context`.
"""

from __future__ import annotations

import base64
import binascii
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from model_delta.errors import AtollError, Malformed, NotFound, Unavailable, Untrusted
from model_delta.keys.certificates import make_leaf, make_revocation_list, require_identity
from model_delta.keys.encryption import KEY_BYTES
from model_delta.keys.keyring import (
    LATER_ROLES,
    ROLES,
    no_such_role,
    require_serial,
    require_signable,
    verify_by_anchors,
)
from model_delta.keys.vault_connection import AccessDenied, VaultConnection
from model_delta.keys.wrapping import LEGACY, WRAPPED_BYTES_MAX, KeyVersions, version_of
from model_delta.trust.signing import Envelope, Signature, key_id, pre_authentication_encoding, public_bytes
from model_delta.trust.updater import RoleKeys, TrustAnchors

WRAPPING = "wrapping"
AUTHORITY = "authority"
REWRAP_BATCH = 2000
"""Records a request; 0.4 MB of the 32 MB that a server takes."""

REVOKED_S = 5.0
"""How long the list of revoked serials is believed before it is read again."""

REVOKED_AWAY_S = 60.0
"""How long it is believed when the server did not answer: who waits for it does so once a minute."""

REVOKED_TRIES = 16


@dataclass(frozen=True)
class TenantPaths:
    """Where one tenant's things are on the server."""

    tenant: str
    base: str = "atoll"

    def __post_init__(self) -> None:
        require_identity(self.tenant)
        for part in self.base.split("/"):
            require_identity(part)

    @property
    def folder(self) -> str:
        """Above all mounts of the tenant."""
        return f"{self.base}/{self.tenant}"

    @property
    def transit(self) -> str:
        """The mount of the Transit engine."""
        return f"{self.folder}/transit"

    @property
    def pki(self) -> str:
        """The mount of the PKI engine."""
        return f"{self.folder}/pki"

    @property
    def kv(self) -> str:
        """The mount of the key-value engine, version 2."""
        return f"{self.folder}/kv"

    @property
    def approle(self) -> str:
        """The mount of AppRole logins, below auth/."""
        return f"{self.folder}/approle"

    @property
    def cert(self) -> str:
        """The mount of certificate logins, below auth/."""
        return f"{self.folder}/cert"


def role_key_name(role: str) -> str:
    """The name of a role's signing key in Transit."""
    return f"role-{role}"


class VaultKeyring:
    """The keyring of one tenant on a server; `clock` gives Unix seconds for the certificates' validity."""

    def __init__(self, connection: VaultConnection, paths: TenantPaths, clock: Callable[[], float] = time.time) -> None:
        """Nothing is asked yet."""
        self._connection = connection
        self._paths = paths
        self._clock = clock
        self._lock = threading.Lock()
        self._ca_pem = b""
        self._role_keys: dict[str, dict[int, bytes]] = {}
        self._revoked: frozenset[int] = frozenset()
        self._revoked_at = float("-inf")

    @property
    def tenant(self) -> str:
        """Whose keys these are."""
        return self._paths.tenant

    def new_key(self, context: str) -> tuple[bytes, bytes]:
        """An artifact key that Transit made, and the same wrapped."""
        answer = self._transit(f"datakey/plaintext/{WRAPPING}", {"context": _context(context), "bits": KEY_BYTES * 8})
        key = _decoded(answer, "plaintext")
        if len(key) != KEY_BYTES:
            raise Unavailable(f"Transit of {self.tenant}: expected an artifact key of {KEY_BYTES} bytes")
        return key, _text(answer, "ciphertext").encode()

    def wrap(self, context: str, key: bytes) -> bytes:
        """Encrypt `key` under the tenant's newest wrapping key, bound to `context`. Raises Malformed (no context)."""
        answer = self._transit(f"encrypt/{WRAPPING}", {"context": _context(context), "plaintext": _base64(key)})
        return _text(answer, "ciphertext").encode()

    def unwrap(self, context: str, wrapped: bytes) -> bytes:
        """The key again. Raises Untrusted for another context, another tenant's key, altered bytes, or a version that
        was trimmed."""
        data = {"context": _context(context), "ciphertext": _ciphertext(context, wrapped)}
        try:
            return _decoded(self._transit(f"decrypt/{WRAPPING}", data), "plaintext")
        except AccessDenied:
            raise
        except Untrusted:
            raise _does_not_open(context) from None

    def rewrap(self, records: Sequence[tuple[str, bytes]]) -> list[bytes]:
        """Each record again under the newest wrapping key; the plaintext stays on the server. Raises Untrusted, naming
        the first record that does not open, with nothing returned."""
        fresh: list[bytes] = []
        for start in range(0, len(records), REWRAP_BATCH):
            batch = records[start : start + REWRAP_BATCH]
            items = [{"context": _context(name), "ciphertext": _ciphertext(name, data)} for name, data in batch]
            answer = self._transit(f"rewrap/{WRAPPING}", {"batch_input": items})
            results = answer.get("batch_results")
            if not isinstance(results, list) or len(results) != len(batch):
                raise Unavailable(f"Transit of {self.tenant}: expected {len(batch)} rewrapped keys in the answer")
            for (context, _), result in zip(batch, results, strict=True):
                if not isinstance(result, dict) or result.get("error") or not result.get("ciphertext"):
                    raise _does_not_open(context)
                fresh.append(str(result["ciphertext"]).encode())
        return fresh

    def rotate(self) -> int:
        """Add a version of the wrapping key."""
        self._transit(f"keys/{WRAPPING}/rotate", {})
        return self.versions().latest

    def trim(self, floor: int) -> None:
        """Forget the versions below `floor`. Raises Malformed for a version that there is not."""
        kept = self.versions()
        if not 1 <= floor <= kept.latest:
            raise Malformed(f"Transit of {self.tenant}: expected a version from 1 to {kept.latest}, found {floor}")
        if floor <= kept.floor:
            return
        # The server deletes nothing that may still be used: first no use below the floor, then the trim. Cut off in
        # between, the records are already refused, and the same call ends the work.
        bounds = {"min_decryption_version": floor, "min_encryption_version": floor}
        self._transit(f"keys/{WRAPPING}/config", bounds)
        self._transit(f"keys/{WRAPPING}/trim", {"min_available_version": floor})

    def versions(self) -> KeyVersions:
        """The oldest version that is kept, and the newest."""
        found = self._key(WRAPPING)
        return KeyVersions(max(1, int(found.get("min_available_version") or 1)), int(found["latest_version"]))

    def sign(self, role: str, kind: str, payload: bytes) -> Envelope:
        """Sign with the newest key of `role`. Raises NotFound for a role without keys."""
        name, value = self.sign_bytes(role, pre_authentication_encoding(kind, payload))
        return Envelope(kind, payload, (Signature(name, value),))

    def sign_bytes(self, role: str, data: bytes) -> tuple[str, bytes]:
        """Sign exactly `data` with the newest key of `role`: (key id, signature). Raises NotFound, Malformed."""
        if role not in ROLES:
            raise no_such_role(role, ROLES)
        require_signable(role, data)
        version, value = self._signature(role_key_name(role), {"input": _base64(data)})
        keys = self._keys_of(role)
        if version not in keys:
            keys = self._keys_of(role, again=True)
        return _id_of(keys[version]), value

    def public_key(self, role: str) -> bytes:
        """DER SubjectPublicKeyInfo of the newest key of `role`. Raises NotFound."""
        keys = self._keys_of(role, again=True)
        return keys[max(keys)]

    def verify(self, envelope: Envelope, kind: str, role: str) -> bytes:
        """The payload, if the keys of `role` signed it; checked here. Raises SignatureInvalid, NotFound."""
        return verify_by_anchors(self.anchors(), envelope, kind, role)

    def anchors(self) -> TrustAnchors:
        """The public half: what devices are provisioned with."""
        roles = {}
        for role in ROLES:
            try:
                keys = self._keys_of(role)
            except (NotFound, Untrusted):
                if role not in LATER_ROLES:
                    raise
                continue  # set up by an earlier program: `atoll vault setup` adds what is missing
            roles[role] = RoleKeys(tuple(keys[number] for number in sorted(keys)))
        return TrustAnchors(self.tenant, roles)

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
            self._sign_as_authority,
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
        if not self._ca_pem:
            found = _record(self._connection.read(f"{self._paths.kv}/data/authority"))
            self._ca_pem = str(found.get("certificate", "")).encode()
        return self._ca_pem

    def revoke(self, serial: int) -> None:
        """Add a serial number to the tenant's record. Durable. Raises Malformed for what is no serial number,
        Unavailable when others keep writing the record."""
        require_serial(serial)
        for _ in range(REVOKED_TRIES):
            serials, version = self._read_revoked()
            if serial in serials:
                return
            data = {"serials": sorted(f"{number:040x}" for number in serials | {serial})}
            try:
                self._connection.write(f"{self._paths.kv}/data/revoked", {"options": {"cas": version}, "data": data})
            except AccessDenied:
                raise
            except Untrusted:
                continue  # another process wrote in between: read again
            self._take_revoked(serials | {serial})
            return
        raise Unavailable(f"revoked serials of {self.tenant}: other processes keep writing them; try again")

    def revoked(self) -> frozenset[int]:
        """Serial numbers of revoked certificates, at most REVOKED_S old; when the server does not answer, those last
        known: a platform whose key service is away for a while goes on with what it knows."""
        with self._lock:
            if self._clock() - self._revoked_at < REVOKED_S:
                return self._revoked
        try:
            self._take_revoked(self._read_revoked()[0])
        except Unavailable:
            if self._revoked_at == float("-inf"):
                raise
            with self._lock:
                self._revoked_at = self._clock() + REVOKED_AWAY_S - REVOKED_S
        return self._revoked

    def revocation_list(self) -> bytes:
        """What is revoked as the CA's signed list, PEM, for brokers that read one; see `make_revocation_list`."""
        return make_revocation_list(self.ca_pem(), self._sign_as_authority, self.revoked(), self._clock())

    def _sign_as_authority(self, data: bytes) -> bytes:
        """ECDSA P-256 over SHA-256, DER."""
        asked = {"input": _base64(data), "hash_algorithm": "sha2-256", "marshaling_algorithm": "asn1"}
        return self._signature(AUTHORITY, asked)[1]

    def _read_revoked(self) -> tuple[frozenset[int], int]:
        try:
            answer = self._connection.read(f"{self._paths.kv}/data/revoked")
        except NotFound:
            return frozenset(), 0
        serials = _record(answer).get("serials", [])
        return frozenset(int(text, 16) for text in serials), int(answer["metadata"]["version"])

    def _take_revoked(self, serials: frozenset[int]) -> None:
        with self._lock:
            self._revoked, self._revoked_at = serials, self._clock()

    def _signature(self, name: str, data: Mapping[str, Any]) -> tuple[int, bytes]:
        """(version of the key, signature) from `vault:vN:base64`."""
        parts = _text(self._transit(f"sign/{name}", data), "signature").split(":")
        if len(parts) != 3 or not parts[1][1:].isdecimal():
            raise Unavailable(f"Transit of {self.tenant}: expected a signature vault:vN:base64 by {name}")
        return int(parts[1][1:]), base64.b64decode(parts[2])

    def _keys_of(self, role: str, *, again: bool = False) -> dict[int, bytes]:
        """Public keys by version, DER."""
        if role not in ROLES:
            raise no_such_role(role, ROLES)
        if again or role not in self._role_keys:
            listed = self._key(role_key_name(role)).get("keys", {})
            self._role_keys[role] = {int(number): _public(entry["public_key"]) for number, entry in listed.items()}
        return self._role_keys[role]

    def _key(self, name: str) -> dict[str, Any]:
        return self._connection.read(f"{self._paths.transit}/keys/{name}")

    def _transit(self, path: str, data: Mapping[str, Any]) -> dict[str, Any]:
        return self._connection.write(f"{self._paths.transit}/{path}", data)


def _context(context: str) -> str:
    if not context:
        raise Malformed("wrapped key: expected a context that says what it is for, found none")
    return _base64(context.encode())


def _ciphertext(context: str, wrapped: bytes) -> str:
    if wrapped[:1] == LEGACY:
        raise Untrusted(f"wrapped key of {context!r}: has the form before Transit's; run `atoll vault migrate`")
    if len(wrapped) > WRAPPED_BYTES_MAX:
        raise _does_not_open(context)
    version_of(wrapped)
    return wrapped.decode("ascii")


def _does_not_open(context: str) -> AtollError:
    return Untrusted(f"wrapped key of {context!r}: does not open under this tenant's key and context")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _text(answer: Mapping[str, Any], name: str) -> str:
    found = answer.get(name)
    if not isinstance(found, str):
        raise Unavailable(f"Vault: expected {name} in the answer, found none")
    return found


def _decoded(answer: Mapping[str, Any], name: str) -> bytes:
    try:
        return base64.b64decode(_text(answer, name), validate=True)
    except binascii.Error:
        raise Unavailable(f"Vault: expected base64 as {name}, found something else") from None


def _record(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The data of a KV version 2 record; a deleted one has none."""
    found = answer.get("data")
    return found if isinstance(found, dict) else {}


def _public(encoded: str) -> bytes:
    return public_bytes(Ed25519PublicKey.from_public_bytes(base64.b64decode(encoded)))


def _id_of(der: bytes) -> str:
    key = serialization.load_der_public_key(der)
    if not isinstance(key, Ed25519PublicKey):
        raise Malformed(f"role key: expected Ed25519, found {type(key).__name__}")
    return key_id(key)
