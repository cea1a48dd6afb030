"""Bytes by kind and name: manifests, deliveries, sealed blobs, artifacts.

A store believes nothing and promises one thing: what `get` returns is what some `put` wrote, whole. The reader checks
digests. `DirectoryStore` keeps each object as a file `KIND/NAME`: written aside in `.writing`, flushed, renamed, and
the folder flushed. A crash at any point leaves the old object or the new one, and at most a file in `.writing`, which
the next store to open the folder sweeps away; a file that another process is still writing is locked and left alone.
`.removing` is locked shared by each put and exclusively by each removal of something old, so that what was written
again a moment ago is never taken for garbage.

`store_url.open_store` finds the store that a URL names; those in buckets are in `object_store`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import msgspec

from model_delta.durable import sync_folder
from model_delta.errors import Malformed, NotFound, StorageFull, Unavailable

BLOB = "blob"
_KIND = re.compile(r"[a-z][a-z0-9-]{0,31}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_ATTEMPTS = 4
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ArtifactStore(Protocol):
    """Where a program keeps and finds objects. Names are digests, or short names in a kind of their own."""

    def put(self, kind: str, name: str, data: bytes) -> None:
        """Keep `data`, replacing what had this name; durable on return. Raises StorageFull and Malformed (name)."""

    def get(self, kind: str, name: str) -> bytes:
        """The whole object. Raises NotFound."""

    def read(self, kind: str, name: str, offset: int, length: int) -> tuple[int, bytes]:
        """The object's size, and its bytes [offset, offset + length), fewer at the end. Raises NotFound."""

    def has(self, kind: str, name: str) -> bool:
        """Whether the object is there."""

    def names(self, kind: str) -> tuple[str, ...]:
        """The names in a kind, sorted."""

    def remove(self, kind: str, name: str) -> None:
        """Forget an object; nothing happens when it is not there. The caller knows that nothing refers to it."""


class StoredObject(msgspec.Struct, frozen=True):
    """An object in an inventory: its size in bytes, and when it was written last in Unix seconds."""

    kind: str
    name: str
    size: int
    modified: float


class InventoriedStore(ArtifactStore, Protocol):
    """A store that can be cleaned."""

    def entries(self, kind: str) -> tuple[StoredObject, ...]:
        """What lies in a kind, by name."""

    def remove_unchanged(self, entry: StoredObject) -> bool:
        """Forget an object unless it was written since it was listed; whether it was removed."""


class DirectoryStore:
    """An `InventoriedStore` in a folder, which is made if it is not there. Any number of processes may share it."""

    def __init__(self, path: Path) -> None:
        self._path = Path(path)
        self._writing = self._path / ".writing"
        self._writing.mkdir(parents=True, exist_ok=True)
        self._sweep()

    def put(self, kind: str, name: str, data: bytes) -> None:
        """See `ArtifactStore.put`."""
        target = self._file(kind, name)
        try:
            if not target.parent.exists():
                target.parent.mkdir(exist_ok=True)
                sync_folder(self._path)
            with self._removals(fcntl.LOCK_SH):
                written = any(self._write(target, data) for _ in range(_ATTEMPTS))
            if not written:
                raise Unavailable(f"store {self._path}: {kind} {name[:16]}: swept away while it was written; try again")
            sync_folder(target.parent)
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise StorageFull(
                    f"store {self._path}: no room for {len(data)} bytes of {kind} {name[:16]} ({error.strerror}); "
                    "nothing was changed, free some space"
                ) from None
            raise Unavailable(f"store {self._path}: {kind} {name[:16]}: {error.strerror}") from None

    def get(self, kind: str, name: str) -> bytes:
        """See `ArtifactStore.get`."""
        try:
            return self._file(kind, name).read_bytes()
        except FileNotFoundError:
            raise NotFound(f"store {self._path}: no {kind} named {name[:16]}") from None

    def read(self, kind: str, name: str, offset: int, length: int) -> tuple[int, bytes]:
        """See `ArtifactStore.read`. Raises Malformed for a negative offset or length."""
        require_range(kind, name, offset, length)
        try:
            with self._file(kind, name).open("rb") as file:
                total = os.fstat(file.fileno()).st_size
                wanted = min(length, max(total - offset, 0))
                return total, os.pread(file.fileno(), wanted, offset) if wanted else b""
        except FileNotFoundError:
            raise NotFound(f"store {self._path}: no {kind} named {name[:16]}") from None

    def has(self, kind: str, name: str) -> bool:
        """See `ArtifactStore.has`."""
        return self._file(kind, name).is_file()

    def names(self, kind: str) -> tuple[str, ...]:
        """See `ArtifactStore.names`."""
        try:
            return tuple(sorted(entry.name for entry in os.scandir(self._folder(kind)) if is_name(entry.name)))
        except FileNotFoundError:
            return ()

    def remove(self, kind: str, name: str) -> None:
        """See `ArtifactStore.remove`."""
        self._file(kind, name).unlink(missing_ok=True)

    def entries(self, kind: str) -> tuple[StoredObject, ...]:
        """See `InventoriedStore.entries`."""
        found = []
        for name in self.names(kind):
            try:
                state = self._file(kind, name).stat()
            except FileNotFoundError:
                continue
            found.append(StoredObject(kind, name, state.st_size, state.st_mtime))
        return tuple(found)

    def remove_unchanged(self, entry: StoredObject) -> bool:
        """See `InventoriedStore.remove_unchanged`."""
        target = self._file(entry.kind, entry.name)
        try:
            with self._removals(fcntl.LOCK_EX):
                state = target.stat()
                if (state.st_size, state.st_mtime) != (entry.size, entry.modified):
                    return False
                target.unlink()
        except FileNotFoundError:
            return False
        return True

    def _folder(self, kind: str) -> Path:
        return self._path / require_kind(kind)

    def _file(self, kind: str, name: str) -> Path:
        return self._path / require_place(kind, name)

    @contextmanager
    def _removals(self, how: int) -> Iterator[None]:
        descriptor = os.open(self._path / ".removing", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, how)
            yield
        finally:
            os.close(descriptor)

    def _write(self, target: Path, data: bytes) -> bool:
        aside = self._writing / f"{os.getpid()}-{os.urandom(8).hex()}"
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
            aside.rename(target)
        except FileNotFoundError:  # another store's sweep won the race for a file not yet locked
            return False
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        return True

    def _sweep(self) -> None:
        for leftover in self._writing.iterdir():
            try:
                descriptor = os.open(leftover, os.O_WRONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink(missing_ok=True)
            except BlockingIOError:
                pass  # somebody is writing it
            finally:
                os.close(descriptor)


def is_name(text: str) -> bool:
    """Whether an object may be called that."""
    return _NAME.fullmatch(text) is not None


def require_kind(kind: str) -> str:
    """`kind`. Raises Malformed unless it is one."""
    if not _KIND.fullmatch(kind):
        raise Malformed(f"store: expected a kind of small letters, digits and '-', found {kind[:80]!r}")
    return kind


def require_place(kind: str, name: str) -> str:
    """KIND/NAME. Raises Malformed unless both are what they should be."""
    require_kind(kind)
    if not is_name(name):
        raise Malformed(f"{kind}: expected a name of letters, digits, '.', '_', '-', found {name[:80]!r}")
    return f"{kind}/{name}"


def require_range(kind: str, name: str, offset: int, length: int) -> None:
    """Raises Malformed for a negative offset or length."""
    if offset < 0 or length < 0:
        raise Malformed(f"{kind} {name[:16]}: expected a range, found offset {offset} and length {length}")
