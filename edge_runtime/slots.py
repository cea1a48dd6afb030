"""What a device has on disk: two slots, one pointer, the update's record, and blobs on their way.

    slots/a/manifest.envelope, model.bin     a complete version, or nothing
    slots/b/...
    slots/b/<name>.part                      a file in the making (see `SlotRoom`), in the slot that is not in use
    pointer                                  "a", "b" or "-": which slot answers
    update.record                            State, target, counters, TrustState: one file, replaced as a whole
    incoming/<digest>.part                   the chunks of a blob received so far, in order, without a hole
    incoming/<digest>                        a complete, checked blob

Every replacement is write to a temporary file, fsync, rename, fsync of the directory (POSIX rename is atomic; the
second fsync makes it durable): after a power cut a reader sees the old or the new content, never a mixture. Parts are
the exception: they are written with plain writes, since what a power cut may do to them (a shorter file, a tail of
zeros) is found when digests are checked, and costs one blob, or the segments that are not whole. A part becomes a
slot's file as every replacement does: fsync, rename, fsync.

Compatibility promise: see `encoding` for `update.record`; file names are never changed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec

from edge_runtime.update import State
from model_delta.digest import require_digest, require_match
from model_delta.durable import replace_whole, storage_error, sync_file, sync_folder
from model_delta.encoding import pack, unpack
from model_delta.errors import AtollError, DigestMismatch, Malformed, NotFound, StorageFull
from model_delta.manifest import Manifest, manifest_digest, parse_manifest
from model_delta.patch.access import Part, PathAccess, RandomAccess, require_match_at
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


class SlotRoom:
    """Where a slot's next file is made: `assembly.Room` in the slot's folder. What was written stays there over a power
    cut, until the version is installed or the update has ended."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """The file to read and write, with what is in it. Raises StorageFull; what was written is kept."""
        path = self._path(name)
        with storage_errors(path), os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            yield file

    def read(self, name: str) -> RandomAccess | None:
        """What stands there by that name."""
        path = self._path(name)
        return PathAccess(path) if path.exists() else None

    def remove(self, name: str) -> None:
        """Forget the file, if there is one."""
        self._path(name).unlink(missing_ok=True)

    def adopt(self, name: str) -> None:
        """Take up a file whose installation a power cut ended between the file and its manifest."""
        model = self._folder / "model.bin"
        if model.exists() and not (self._folder / "manifest.envelope").exists() and not self._path(name).exists():
            model.rename(self._path(name))

    def size(self, name: str) -> int:
        """How many bytes stand there by that name."""
        found = self.read(name)
        return 0 if found is None else found.size

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.part"


def free_bytes(path: Path) -> int:
    """How many bytes the file system of `path` has left for us."""
    return shutil.disk_usage(path).free


class Slots:
    """The device's folder. One process at a time; the holder of the object is the only writer. `free`: how many bytes
    there is room for."""

    def __init__(self, directory: Path, *, free: Callable[[Path], int] = free_bytes) -> None:
        self.directory, self._free = directory, free
        self._incoming = directory / "incoming"
        for folder in (self._incoming, *(directory / "slots" / name for name in SLOTS)):
            folder.mkdir(parents=True, exist_ok=True)
        for leftover in directory.rglob("*.new"):
            with contextlib.suppress(OSError):  # a disk that takes nothing: what is there can still answer
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

    def room(self, slot: SlotName) -> SlotRoom:
        """Where the next file of `slot` is made. Raises Malformed for the slot that is in use (it must stay whole)."""
        if slot == self.pointer():
            raise Malformed(f"slot {slot}: in use; a version is only ever written to the other one")
        return SlotRoom(self._folder(slot))

    def require_room(self, size: int, what: str) -> None:
        """Raise StorageFull, with both numbers, unless `size` bytes more can be written now."""
        free = self._free(self.directory)
        if free < size:
            raise StorageFull(
                f"{what}: needs {size} bytes more on {self.directory}, which has {free}: free some space; "
                "nothing was changed"
            )

    def install(self, slot: SlotName, envelope: bytes) -> None:
        """Make the version of `envelope`, whose file was made and checked in the slot's room, what stands in `slot`.

        The manifest is written last: a slot without one is empty. A power cut before that leaves the file to be adopted
        by the room. Raises Malformed for the slot that is in use, NotFound for a file that was not made, StorageFull.
        """
        room = self.room(slot)
        digest = manifest_digest(parse_manifest(open_envelope(envelope).payload))
        room.adopt(digest)
        folder = self._folder(slot)
        part = folder / f"{digest}.part"
        if not part.exists():
            raise NotFound(f"slot {slot}: expected a finished file of version {digest[:12]}, found none")
        with storage_errors(part):
            sync_file(part)
        self.clear_slot(slot)
        part.rename(folder / "model.bin")
        sync_folder(folder)
        replace_file(folder / "manifest.envelope", envelope)
        _remove_parts(folder)

    def write_slot(self, slot: SlotName, envelope: bytes, file: bytes) -> None:
        """Fill `slot` with a version whose file is at hand in memory. Raises as `install`, and DigestMismatch if the
        file is not the manifest's."""
        manifest = parse_manifest(open_envelope(envelope).payload)
        require_match(file, manifest.file_digest, f"model file for slot {slot}")
        with self.room(slot).open(manifest_digest(manifest)) as new:
            new.truncate()
            new.write(file)
        self.install(slot, envelope)

    def clear_slot(self, slot: SlotName) -> None:
        """Empty `slot`: first its manifest, so that half a deletion is an empty slot."""
        folder = self._folder(slot)
        for name in ("manifest.envelope", "model.bin"):
            (folder / name).unlink(missing_ok=True)
        sync_folder(folder)

    def installed(self, slot: SlotName | None) -> InstalledVersion | None:
        """What stands in `slot`, or None if it is empty or unreadable. The file itself is not read."""
        if slot is None:
            return None
        folder = self._folder(slot)
        try:
            envelope = (folder / "manifest.envelope").read_bytes()
            manifest = parse_manifest(open_envelope(envelope).payload)
        except (OSError, AtollError):
            return None
        return InstalledVersion(slot, manifest_digest(manifest), manifest, envelope)

    def model_file(self, version: InstalledVersion) -> Path:
        """The path of a slot's model file, which is now what its manifest says. Raises NotFound and DigestMismatch."""
        require_match_at(self.read(version), version.manifest.file_digest, f"model file of slot {version.slot}")
        return self._folder(version.slot) / "model.bin"

    def read(self, version: InstalledVersion) -> RandomAccess:
        """What stands in a slot, damaged or not: at most one byte more than the file should have, so that a file that
        grew is found and costs no time. Raises NotFound."""
        path = self._folder(version.slot) / "model.bin"
        if not path.exists():
            raise NotFound(f"model file of slot {version.slot}: expected {path}, found none")
        return Part(PathAccess(path), 0, version.manifest.size + 1)

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
        with storage_errors(part):
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

    def complete(self, digest: str) -> RandomAccess:
        """The whole blob: its part is checked, kept under its final name and handed out to be read by position. Raises
        DigestMismatch (the part is then gone, so that a retry starts afresh), NotFound for one damaged since."""
        whole, part = self._blob_paths(digest)
        found = whole if whole.exists() else part
        try:
            require_match_at(PathAccess(found), digest, f"blob {digest[:16]}…")
        except DigestMismatch:
            found.unlink(missing_ok=True)
            if found == whole:
                raise NotFound(f"blob {digest[:16]}…: damaged on disk, dropped") from None
            raise
        if found == part:
            sync_file(part)
            part.rename(whole)
            sync_folder(self._incoming)
        return PathAccess(whole)

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
        for slot in SLOTS:
            _remove_parts(self._folder(slot))

    def _folder(self, slot: str) -> Path:
        return self.directory / "slots" / slot

    def _blob_paths(self, digest: str) -> tuple[Path, Path]:
        require_digest(digest, "blob")
        return self._incoming / digest, self._incoming / f"{digest}.part"


def other_slot(slot: str) -> SlotName:
    """The slot that is not `slot`."""
    return "a" if slot == "b" else "b"


def replace_file(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace `path` by `data` so that a power cut leaves the old or the new content; with `durable` off it is only
    certain that the death of this process does (and it costs no disk wait). Raises StorageFull and StorageFailed with
    the old content in place."""
    with storage_errors(path):
        replace_whole(path, data, aside=path.with_name(path.name + ".new"), durable=durable)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """A full disk as StorageFull, one that fails otherwise as StorageFailed."""
    try:
        yield
    except OSError as error:
        raise storage_error(path, error) from None


def _remove_parts(folder: Path) -> None:
    for part in folder.glob("*.part"):
        part.unlink(missing_ok=True)
