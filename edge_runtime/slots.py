"""What a device has on disk: two slots, one pointer, the update's record, and blobs on their way.

    slots/a/manifest.envelope, model.bin     a complete version, or nothing
    slots/b/...
    pointer                                  "a", "b" or "-": which slot answers
    update.record                            State, target, counters, TrustState: one file, replaced as a whole
    incoming/<digest>.part                   the chunks of a blob received so far, in order, without a hole
    incoming/<digest>                        a complete, checked blob

Every replacement is write to a temporary file, fsync, rename, fsync of the directory (POSIX rename is atomic; the
second fsync makes it durable): after a power cut a reader sees the old or the new content, never a mixture. Parts are
the exception: they are appended with plain writes, since what a power cut may do to them (a shorter file, a tail of
zeros) is found when the blob's digest is checked, and costs one blob.

Compatibility promise: see `encoding` for `update.record`; file names are never changed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from edge_runtime.update import State
from model_delta.digest import digest_of, require_digest, require_match
from model_delta.encoding import pack, unpack
from model_delta.errors import AtollError, Malformed, NotFound, StorageFull
from model_delta.manifest import Manifest, manifest_digest, parse_manifest
from model_delta.trust.signing import open_envelope
from model_delta.trust.updater import TrustState
from monitoring.telemetry import UpdateOutcome

SlotName = Literal["a", "b"]
SLOTS: tuple[SlotName, SlotName] = ("a", "b")


class UpdateRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about the update that must survive: written before a command is performed.

    `target` and `slot`: the version being installed and where. `rollout`: the plan that asked for it. `route`: patch,
    chain, whole or none. `started` and `switched`: Unix seconds. `given_up`: versions that failed here, by the rollout
    that offered them; they are not tried again in it. `plan`: the newest accepted plan, as received.
    `outcomes`: what is yet to be told, noted when the outbox's last number was `told_after`.
    """

    state: State = State.IDLE
    target: str = ""
    slot: str = ""
    rollout: str = ""
    route: str = ""
    bytes_received: int = 0
    started: float = 0.0
    switched: float = 0.0
    given_up: dict[str, str] = {}
    trust: TrustState = TrustState()
    plan: bytes = b""
    outcomes: tuple[UpdateOutcome, ...] = ()
    told_after: int = 0
    adopted: int = 0
    rolled_back: int = 0


class InstalledVersion(msgspec.Struct, frozen=True):
    """A complete slot: its signed envelope, the parsed manifest and its digest. Signatures were checked on the way in;
    the file is checked against the manifest whenever it is read."""

    slot: SlotName
    digest: str
    manifest: Manifest
    envelope: bytes


class Slots:
    """The device's folder. One process at a time; the holder of the object is the only writer."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._incoming = directory / "incoming"
        for folder in (self._incoming, *(directory / "slots" / name for name in SLOTS)):
            folder.mkdir(parents=True, exist_ok=True)
        for leftover in directory.rglob("*.new"):
            leftover.unlink(missing_ok=True)

    # -- the record

    def read_record(self) -> UpdateRecord:
        """The persisted record; a fresh one on a new device. Raises Malformed if the file is damaged."""
        path = self.directory / "update.record"
        if not path.exists():
            return UpdateRecord()
        try:
            return unpack(path.read_bytes(), UpdateRecord)
        except Malformed as error:
            raise Malformed(f"update record at {path}: {error}; move the file away to start over") from None

    def write_record(self, record: UpdateRecord, *, durable: bool = True) -> None:
        """Replace the record. `durable` off: it may be lost with the power (byte counts). Raises StorageFull."""
        replace_file(self.directory / "update.record", pack(record), durable=durable)

    # -- slots

    def pointer(self) -> SlotName | None:
        """The slot that answers, or None before the first switch."""
        path = self.directory / "pointer"
        text = path.read_text().strip() if path.exists() else ""
        return next((name for name in SLOTS if name == text), None)

    def point_to(self, slot: SlotName | None) -> None:
        """Flip the pointer durably."""
        replace_file(self.directory / "pointer", (slot or "-").encode())

    def inactive(self) -> SlotName:
        """The slot that a new version goes to."""
        return "b" if self.pointer() == "a" else "a"

    def write_slot(self, slot: SlotName, envelope: bytes, file: bytes) -> None:
        """Fill `slot` with a version. The manifest is written last: a slot without one is empty. Raises Malformed for
        the slot that is in use (it must stay whole), DigestMismatch if the file is not the manifest's, StorageFull."""
        if slot == self.pointer():
            raise Malformed(f"slot {slot}: in use; a version is only ever written to the other one")
        manifest = parse_manifest(open_envelope(envelope).payload)
        require_match(file, manifest.file_digest, f"model file for slot {slot}")
        folder = self.directory / "slots" / slot
        self.clear_slot(slot)
        replace_file(folder / "model.bin", file)
        replace_file(folder / "manifest.envelope", envelope)

    def clear_slot(self, slot: SlotName) -> None:
        """Empty `slot`: first its manifest, so that half a deletion is an empty slot."""
        folder = self.directory / "slots" / slot
        for name in ("manifest.envelope", "model.bin"):
            (folder / name).unlink(missing_ok=True)
        sync_directory(folder)

    def installed(self, slot: SlotName | None) -> InstalledVersion | None:
        """What stands in `slot`, or None if it is empty or unreadable. The file itself is not read."""
        if slot is None:
            return None
        folder = self.directory / "slots" / slot
        try:
            envelope = (folder / "manifest.envelope").read_bytes()
            manifest = parse_manifest(open_envelope(envelope).payload)
        except (OSError, AtollError):
            return None
        return InstalledVersion(slot, manifest_digest(manifest), manifest, envelope)

    def read_file(self, version: InstalledVersion) -> bytes:
        """The model file of a slot, checked against its manifest. Raises NotFound and DigestMismatch."""
        file = self.read_unchecked(version)
        require_match(file, version.manifest.file_digest, f"model file of slot {version.slot}")
        return file

    def read_unchecked(self, version: InstalledVersion) -> bytes:
        """The bytes that stand in a slot, damaged or not: at most one more than the file should have, so that a file
        that grew costs no memory. Raises NotFound."""
        path = self.directory / "slots" / version.slot / "model.bin"
        try:
            with path.open("rb") as file:
                return file.read(version.manifest.size + 1)
        except OSError:
            raise NotFound(f"model file of slot {version.slot}: expected {path}, found none") from None

    # -- incoming blobs

    def received(self, digest: str) -> int:
        """How many bytes of a blob are here; all of them once `take` finds it."""
        whole, part = self._blob_paths(digest)
        for path in (whole, part):
            if path.exists():
                return path.stat().st_size
        return 0

    def append(self, digest: str, offset: int, data: bytes) -> None:
        """Add the next chunk of a blob. `offset` must be where the part ends: a hole is a bug. Raises StorageFull."""
        _, part = self._blob_paths(digest)
        with _storage_errors(part):
            handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                found = os.fstat(handle).st_size
                if found != offset:
                    raise Malformed(f"blob {digest[:16]}…: expected the chunk at {found}, found one at {offset}")
                if os.write(handle, data) != len(data):
                    os.ftruncate(handle, found)
                    raise OSError(errno.ENOSPC, "short write")
            finally:
                os.close(handle)

    def complete(self, digest: str) -> bytes:
        """The whole blob: its part is checked, kept under its final name and returned. Raises DigestMismatch (the part
        is then gone, so that a retry starts afresh)."""
        whole, part = self._blob_paths(digest)
        if whole.exists():
            data = whole.read_bytes()
            if digest_of(data) == digest:
                return data
            whole.unlink()
            raise NotFound(f"blob {digest[:16]}…: damaged on disk, dropped")
        data = part.read_bytes() if part.exists() else b""
        try:
            require_match(data, digest, f"blob {digest[:16]}…")
        except AtollError:
            part.unlink(missing_ok=True)
            raise
        handle = os.open(part, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        part.rename(whole)
        sync_directory(self._incoming)
        return data

    def has(self, digest: str) -> bool:
        """Whether the blob is here as a whole."""
        return self._blob_paths(digest)[0].exists()

    def complete_blobs(self) -> frozenset[str]:
        """The digests of the blobs that are here as a whole."""
        return frozenset(path.name for path in self._incoming.iterdir() if not path.suffix)

    def truncate(self, digest: str, size: int) -> None:
        """Cut a part down to `size` bytes (to a whole number of chunks, or to nothing)."""
        _, part = self._blob_paths(digest)
        if part.exists():
            os.truncate(part, size)

    def clear_incoming(self) -> None:
        """Forget every blob and part: the update they belonged to has ended."""
        shutil.rmtree(self._incoming, ignore_errors=True)
        self._incoming.mkdir(parents=True, exist_ok=True)

    def _blob_paths(self, digest: str) -> tuple[Path, Path]:
        require_digest(digest, "blob")
        return self._incoming / digest, self._incoming / f"{digest}.part"


def other_slot(slot: str) -> SlotName:
    """The slot that is not `slot`."""
    return "a" if slot == "b" else "b"


def replace_file(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace `path` by `data` so that a power cut leaves the old or the new content; with `durable` off it is only
    certain that the death of this process does (and it costs no disk wait). Raises StorageFull with the old content in
    place."""
    temporary = path.with_name(path.name + ".new")
    with _storage_errors(path):
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(handle, view) :]
                if durable:
                    os.fsync(handle)
            finally:
                os.close(handle)
            temporary.rename(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        if durable:
            sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames and deletions in a directory durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageFull(f"no room left for {path}: free some space; nothing was changed") from None
        raise
