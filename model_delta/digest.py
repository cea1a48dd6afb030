"""Content addresses.

A digest is the lower-case hexadecimal SHA-256 (FIPS 180-4) of the bytes it names: 64 characters, no prefix.
"""

from __future__ import annotations

import hashlib
import re

from model_delta.errors import DigestMismatch, Malformed

_DIGEST = re.compile(r"[0-9a-f]{64}")


def digest_of(data: bytes | bytearray | memoryview) -> str:
    """SHA-256 of `data` as 64 hexadecimal characters."""
    return hashlib.sha256(data).hexdigest()


def require_digest(text: str, what: str = "digest") -> str:
    """Return `text` if it is a well-formed digest; raise Malformed otherwise (it may be used as a file name)."""
    if not _DIGEST.fullmatch(text):
        raise Malformed(f"{what}: expected 64 hexadecimal characters, found {text[:80]!r}")
    return text


def require_match(data: bytes | bytearray | memoryview, expected: str, what: str) -> None:
    """Raise DigestMismatch unless `data` hashes to `expected`."""
    found = digest_of(data)
    if found != expected:
        raise DigestMismatch(f"{what}: expected sha256 {expected[:16]}…, found {found[:16]}…")
