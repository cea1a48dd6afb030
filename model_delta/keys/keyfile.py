"""The file of the embedded keyring: what is in it and how it changes without ever being half-written.

A CBOR record (see `encoding`) with a `format` number, mode 0600; a newer format is refused by name. It is replaced
whole (written aside, flushed, renamed), so that a crash leaves the old file or the new one. A change reads the file
again under a lock on its folder, so that two processes (the coordinator, an operator's command) do not undo each other.

    format 1   one wrapping key
    format 2   wrapping keys by version; a file of format 1 is read as version 1 of it, and written as 2 when it changes
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from model_delta.durable import sync_folder
from model_delta.encoding import pack, unpack
from model_delta.errors import Malformed, NotFound, StorageFull, Untrusted

FORMAT = 2
_FILE_BYTES_MAX = 64 << 20


class WrappingKey(msgspec.Struct, frozen=True):
    """One version of the wrapping key: 32 bytes."""

    version: int
    key: bytes


class KeyFile(msgspec.Struct, frozen=True, kw_only=True):
    """The contents: private keys as PKCS #8 DER, the CA certificate as PEM, serial numbers as big-endian bytes (they
    have up to 160 bits), wrapping keys in ascending order of version."""

    format: int = FORMAT
    tenant: str
    roles: dict[str, tuple[bytes, ...]]
    authority_key: bytes
    authority_certificate: bytes
    wrapping_keys: tuple[WrappingKey, ...]
    revoked: tuple[bytes, ...] = ()


class _KeyFile1(msgspec.Struct, frozen=True, kw_only=True):
    format: int
    tenant: str
    roles: dict[str, tuple[bytes, ...]]
    authority_key: bytes
    authority_certificate: bytes
    wrapping_key: bytes
    revoked: tuple[bytes, ...] = ()


class _Versioned(msgspec.Struct, frozen=True):
    format: int


def read(path: Path) -> KeyFile:
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
        data = file.read(_FILE_BYTES_MAX)
    try:
        return parse(data)
    except Malformed as error:
        raise Malformed(f"keyring {path}: {error}") from None


def parse(data: bytes) -> KeyFile:
    """The contents of a file of this format or an older one. Raises Malformed."""
    version = unpack(data, _Versioned).format
    if version > FORMAT:
        raise Malformed(f"format {version}, this program knows up to {FORMAT}; use a newer Atoll")
    if version == 1:
        old = unpack(data, _KeyFile1)
        contents = KeyFile(
            tenant=old.tenant,
            roles=old.roles,
            authority_key=old.authority_key,
            authority_certificate=old.authority_certificate,
            wrapping_keys=(WrappingKey(1, old.wrapping_key),),
            revoked=old.revoked,
        )
    else:
        contents = unpack(data, KeyFile)
    versions = [item.version for item in contents.wrapping_keys]
    if not versions or versions[0] < 1 or versions != sorted(set(versions)):
        raise Malformed(f"wrapping keys: expected versions in ascending order from 1 up, found {versions[:8]}")
    if any(len(item.key) != 32 for item in contents.wrapping_keys):
        raise Malformed("wrapping keys: expected 32 bytes each, found another length")
    return contents


def create(path: Path, contents: KeyFile) -> None:
    """Write a new file. Raises Malformed if there is one: keys are never replaced by accident; StorageFull."""
    _write(path, contents, replace=False)


def change(path: Path, update: Callable[[KeyFile], KeyFile]) -> KeyFile:
    """Apply `update` to what the file holds now, under the lock; durable when it returns. Raises as `read` does, and
    StorageFull with nothing changed."""
    with _locked(path):
        before = read(path)
        after = update(before)
        if after != before:
            _write(path, after, replace=True)
    return after


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise NotFound(f"keyring {path}: {error.strerror}") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # given back by the kernel when the process dies
        yield
    finally:
        os.close(folder)


def _write(path: Path, contents: KeyFile, *, replace: bool) -> None:
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
    sync_folder(path.parent)
