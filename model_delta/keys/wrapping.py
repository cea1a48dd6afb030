"""How an artifact key is wrapped for storage, in the form that HashiCorp Vault's and OpenBao's Transit engines write.

    wrapped = "vault:v" VERSION ":" base64( nonce (12 bytes) | AES-256-GCM(derived key, nonce, key) )
    derived key = HKDF-SHA256(RFC 5869; input the wrapping key of that version, no salt, info = context)

That is Transit's form for a key of type aes256-gcm96 with derivation: a record made here opens there once the wrapping
keys have been restored there (`vault_backup`), and the other way round. There are no associated data, because Transit's
`rewrap` takes none: what a record is for (tenant, version) is bound through `context`, which derives the key.

Compatibility promise: records of the form before this one (`LEGACY`, a byte 1 in front) still open under version 1, and
`rewrap` turns them into the present form.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from model_delta.errors import Malformed, Untrusted

WRAPPED_BYTES_MAX = 4096
"""Of one wrapped key; checked before anything is decoded."""

VERSIONS_MAX = 1000
"""Of wrapping keys kept at a time; monthly rotation takes 83 years to get there."""

LEGACY = b"\x01"
_FORM = re.compile(rb"vault:v([1-9][0-9]{0,8}):([A-Za-z0-9+/]+={0,2})")
_NONCE_BYTES = 12


class KeyVersions(NamedTuple):
    """The oldest version of the wrapping key that still opens records, and the one that new records get."""

    floor: int
    latest: int


def version_of(wrapped: bytes) -> int:
    """The version of the wrapping key that `wrapped` names. Raises Untrusted for what has no such form."""
    return _split(wrapped)[0]


def wrap(keys: Mapping[int, bytes], context: str, key: bytes, nonce: Callable[[int], bytes] = os.urandom) -> bytes:
    """Wrap `key` under the newest of `keys` (wrapping key by version), bound to `context`. Raises Malformed for an
    empty context, which derives nothing."""
    version = max(keys)
    fresh = nonce(_NONCE_BYTES)
    body = fresh + AESGCM(derived_key(keys[version], context)).encrypt(fresh, key, None)
    return b"vault:v%d:%s" % (version, base64.b64encode(body))


def unwrap(keys: Mapping[int, bytes], context: str, wrapped: bytes) -> bytes:
    """The key again. Raises Untrusted for another context, another tenant's key, a version that is not (or no longer)
    kept, or altered bytes."""
    version, body = _split(wrapped)
    if version not in keys:
        raise Untrusted(f"wrapped key of {context!r}: expected versions {min(keys)} to {max(keys)}, found {version}")
    try:
        if wrapped[:1] == LEGACY:
            key = HKDF(hashes.SHA256(), 32, None, b"atoll wrap|" + context.encode()).derive(keys[version])
            return AESGCM(key).decrypt(body[:_NONCE_BYTES], body[_NONCE_BYTES:], context.encode())
        return AESGCM(derived_key(keys[version], context)).decrypt(body[:_NONCE_BYTES], body[_NONCE_BYTES:], None)
    except (InvalidTag, ValueError):
        raise Untrusted(f"wrapped key of {context!r}: does not open under this tenant's key and context") from None


def derived_key(key: bytes, context: str) -> bytes:
    """The key of one context, 32 bytes. Raises Malformed for an empty context."""
    if not context:
        raise Malformed("wrapped key: expected a context that says what it is for, found none")
    return HKDF(hashes.SHA256(), 32, None, context.encode()).derive(key)


def _split(wrapped: bytes) -> tuple[int, bytes]:
    if wrapped[:1] == LEGACY and len(wrapped) <= WRAPPED_BYTES_MAX:
        return 1, wrapped[1:]
    found = _FORM.fullmatch(wrapped) if len(wrapped) <= WRAPPED_BYTES_MAX else None
    if found is None:
        raise Untrusted("wrapped key: does not open, expected the form vault:vN:base64")
    try:
        return int(found[1]), base64.b64decode(found[2], validate=True)
    except binascii.Error:
        raise Untrusted("wrapped key: does not open, its base64 is damaged") from None
