"""Keys in the form that the Transit engines of Vault and OpenBao restore (`transit/restore/NAME`).

Restoring, and not importing: `import` gives a derived key another derivation (HMAC in counter mode) than keys that are
made there have (HKDF-SHA256), and records that were wrapped before the move would not open. A restored key is as if it
had been made there: not exportable, no plaintext backup, its versions numbered as they were.

The form is JSON in base64: the engine's own record of a key (`keysutil.Policy` in its SDK), version by version.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

_AES256_GCM96, _ECDSA_P256, _ED25519 = 0, 1, 2
_HKDF_SHA256 = 1

Random = Callable[[int], bytes]


def wrapping_backup(name: str, keys: Mapping[int, bytes], now: float, random: Random = os.urandom) -> str:
    """A derived aes256-gcm96 key whose versions are `keys` (without gaps); `now`, Unix seconds, dates them."""
    entries = {version: {"key": _base64(key)} for version, key in keys.items()}
    return _backup(name, _AES256_GCM96, entries, now, random, derived=True, kdf=_HKDF_SHA256)


def ed25519_backup(
    name: str, keys: Mapping[int, ed25519.Ed25519PrivateKey], now: float, random: Random = os.urandom
) -> str:
    """A signing key whose versions are `keys`."""
    entries = {}
    for version, key in keys.items():
        public = key.public_key().public_bytes_raw()
        entries[version] = {"key": _base64(key.private_bytes_raw() + public), "public_key": _base64(public)}
    return _backup(name, _ED25519, entries, now, random)


def p256_backup(name: str, key: ec.EllipticCurvePrivateKey, now: float, random: Random = os.urandom) -> str:
    """An ECDSA P-256 key in one version."""
    public = key.public_key()
    point = public.public_numbers()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    entry = {"ec_x": point.x, "ec_y": point.y, "ec_d": key.private_numbers().private_value, "public_key": pem.decode()}
    return _backup(name, _ECDSA_P256, {1: entry}, now, random)


def _backup(
    name: str,
    kind: int,
    entries: Mapping[int, Mapping[str, Any]],
    now: float,
    random: Random,
    *,
    derived: bool = False,
    kdf: int = 0,
) -> str:
    moment = datetime.fromtimestamp(int(now), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    floor, latest = min(entries), max(entries)
    trimmed = floor if floor > 1 else 0
    policy = {
        "name": name,
        "keys": {
            str(version): {
                "key": None,
                "hmac_key": _base64(random(32)),
                "time": moment,
                "creation_time": int(now),
                "ec_x": None,
                "ec_y": None,
                "ec_d": None,
                "rsa_key": None,
                "public_key": "",
                "convergent_version": 0,
                **entry,
            }
            for version, entry in entries.items()
        },
        "derived": derived,
        "kdf": kdf,
        "convergent_encryption": False,
        "exportable": False,
        "min_decryption_version": floor,
        "min_encryption_version": trimmed,
        "latest_version": latest,
        "archive_version": floor - 1,
        "archive_min_version": trimmed,
        "min_available_version": trimmed,
        "deletion_allowed": False,
        "convergent_version": 0,
        "type": kind,
        "allow_plaintext_backup": False,
        "version_template": "",
        "storage_prefix": "",
        "auto_rotate_period": 0,
    }
    return _base64(json.dumps({"policy": policy, "archived_keys": None}).encode())


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
