"""A holder's stick: the offline keys of one of the people who together are the root of trust.

A stick is a folder, best on a medium of its own that lies in a drawer: `root.pem` and `targets.pem` (Ed25519, PKCS #8,
encrypted) and `stick.json` (whose it is, and how the passphrase is stretched). PKCS #8 as OpenSSL writes it stretches a
passphrase by 2,048 rounds, which a stolen stick's finder tries in no time, so the file's password is what scrypt
(RFC 7914) makes of the passphrase: 32 MB and a tenth of a second for each guess.
"""

from __future__ import annotations

import base64
import os
import secrets
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from getpass import getpass
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from atoll.settings import ConfigurationError, write_private

OFFLINE_ROLES = ("root", "targets")
PASSPHRASE_MIN = 12
VARIABLE = "ATOLL_TRUST_PASSPHRASE"
AUTOMATIC, PASSPHRASE = "automatic", "passphrase"
_COST, _BLOCK, _COST_MAX = 2**15, 8, 2**20


class StickRecord(msgspec.Struct, frozen=True):
    """`stick.json`: the holder's name and scrypt's parameters."""

    holder: str
    salt: str
    cost: int = _COST
    format: int = 1


def make_stick(folder: Path, passphrase: str) -> dict[str, Ed25519PrivateKey]:
    """New keys by role on an empty stick, which is made if it is not there. Raises ConfigurationError for one that
    holds keys, or a short passphrase."""
    require_empty(folder)
    require_passphrase(passphrase, folder)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    salt = os.urandom(16)
    record = StickRecord(holder_of(folder), salt.hex())
    password = _stretched(passphrase, record)
    keys = {role: Ed25519PrivateKey.generate() for role in OFFLINE_ROLES}
    for role, key in keys.items():
        protection = serialization.BestAvailableEncryption(password)
        pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)
        write_private(folder / f"{role}.pem", pem)
    write_private(folder / "stick.json", msgspec.json.encode(record))
    return keys


def open_stick(folder: Path, passphrase: str) -> dict[str, Ed25519PrivateKey]:
    """The stick's keys by role. Raises ConfigurationError when there are none or the passphrase is another."""
    record = read_record(folder)
    password = _stretched(passphrase, record)
    keys = {}
    for role in OFFLINE_ROLES:
        path = folder / f"{role}.pem"
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), password)
        except FileNotFoundError:
            raise ConfigurationError(f"{path}: expected a holder's key, found none; is this the right stick?") from None
        except (ValueError, TypeError):
            raise ConfigurationError(f"{path}: the passphrase does not open it; try again") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigurationError(f"{path}: expected an Ed25519 key, found {type(key).__name__}")
        keys[role] = key
    return keys


def read_record(folder: Path) -> StickRecord:
    """Whose stick this is. Raises ConfigurationError when it is none."""
    path = folder / "stick.json"
    try:
        record = msgspec.json.decode(path.read_bytes(), type=StickRecord)
        bytes.fromhex(record.salt)
    except FileNotFoundError:
        raise ConfigurationError(
            f"{folder}: expected a holder's stick, found no stick.json; is it plugged in?"
        ) from None
    except ValueError:
        raise ConfigurationError(f"{path}: expected a stick's record, found something else; take its copy") from None
    if record.format > 1 or not 2 <= record.cost <= _COST_MAX:
        raise ConfigurationError(f"{path}: expected format 1, found {record.format}; use a newer atoll")
    return record


def make_automatic(trust: Path) -> dict[Path, str]:
    """Three sticks to be made in the folder `trust` of a platform, by passphrase; what an attempt that broke off left
    is thrown away."""
    folder = trust / AUTOMATIC
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, mode=0o700)
    passphrase = secrets.token_urlsafe(24)
    write_private(folder / PASSPHRASE, passphrase.encode())
    return {folder / f"automatic-{number}": passphrase for number in (1, 2, 3)}


def automatic_sticks(trust: Path) -> tuple[Path, ...]:
    """The sticks that a platform made for itself; none when people hold the keys."""
    return tuple(sorted(path.parent for path in (trust / AUTOMATIC).glob("*/stick.json")))


def automatic_passphrase(folder: Path) -> str:
    """What opens the sticks in `folder`. Raises ConfigurationError."""
    return _read(folder / PASSPHRASE)


def forget_automatic(trust: Path) -> None:
    """Delete the sticks that a platform made for itself."""
    shutil.rmtree(trust / AUTOMATIC, ignore_errors=True)


def holder_of(folder: Path) -> str:
    """The holder's name: the folder's."""
    return folder.resolve().name


def require_empty(folder: Path) -> None:
    """Raise ConfigurationError if a stick holds keys: they are never replaced."""
    for name in ("stick.json", *(f"{role}.pem" for role in OFFLINE_ROLES)):
        if (folder / name).exists():
            raise ConfigurationError(
                f"{folder}: expected an empty stick, found {name}; take another one "
                "(or delete its files, if they are left from a ceremony that was never finished)"
            )
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"{folder}: expected a folder, found a file")


def require_passphrase(passphrase: str, folder: Path) -> None:
    """Raise ConfigurationError for a passphrase that is too short to protect a stick that gets lost."""
    if len(passphrase) < PASSPHRASE_MIN:
        raise ConfigurationError(
            f"{folder}: expected a passphrase of {PASSPHRASE_MIN} characters or more, found {len(passphrase)}; "
            "five random words are easy to keep"
        )


def passphrases(
    sticks: Sequence[Path], files: Sequence[Path], environment: Mapping[str, str], *, new: Collection[Path]
) -> dict[Path, str]:
    """A passphrase for each stick: from `files` (one for all, or one for each in order), the environment, or the person
    at the terminal (twice for a stick in `new`). Raises ConfigurationError when there is no way to ask."""
    if files and len(files) not in (1, len(sticks)):
        raise ConfigurationError(
            f"--passphrase-file: expected 1 or {len(sticks)}, as many as sticks, found {len(files)}"
        )
    found = {}
    for index, stick in enumerate(sticks):
        if files:
            found[stick] = _read(files[index if len(files) > 1 else 0])
        elif environment.get(VARIABLE):
            found[stick] = environment[VARIABLE]
        elif sys.stdin.isatty():
            found[stick] = _asked(stick, new=stick in new)
        else:
            raise ConfigurationError(f"{stick}: no passphrase; pass --passphrase-file or set {VARIABLE}")
    return found


def _read(path: Path) -> str:
    try:
        found = path.read_text(encoding="utf-8").strip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: expected a passphrase as text, found {type(error).__name__}") from None
    if len(found.splitlines()) > 1:
        raise ConfigurationError(
            f"{path}: expected one passphrase on one line, found {len(found.splitlines())} lines; "
            "repeat --passphrase-file for sticks with different ones"
        )
    return found


def _asked(stick: Path, *, new: bool) -> str:
    first = getpass(f"{holder_of(stick)}: {'new ' if new else ''}passphrase: ")
    if new and getpass(f"{holder_of(stick)}: once more: ") != first:
        raise ConfigurationError(f"{stick}: the two passphrases differ; start again, nothing was written")
    return first


def _stretched(passphrase: str, record: StickRecord) -> bytes:
    derived = Scrypt(salt=bytes.fromhex(record.salt), length=32, n=record.cost, r=_BLOCK, p=1)
    return base64.b64encode(derived.derive(passphrase.encode()))
