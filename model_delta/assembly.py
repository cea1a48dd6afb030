"""From sealed blobs to a checked model file, as a stream.

A device has less memory than a model has bytes. So a file is made from files: sealed blobs are opened chunk by chunk,
patches and segments at hand are read by position, and each byte of the new file is hashed on its way out. Nothing here
holds a file, a blob or a segment; where files are made is the caller's `Room`, which may also be memory.

*Checked* means: size, every segment's digest, the Merkle root and the file's digest are those of the manifest, which
the caller has verified. The file is looked through once, as it is written. `write_release` returns only when all of
that holds for the wanted file and for each file in between; there is no other way out of `model_delta` for model bytes
that came from outside.

*Interrupted* work is taken up: what stands in the room is compared with the manifest, segment by segment, and goes on
behind the last whole one. Segments there are not opened again; a patch is decoded from its start, because the state of
its decoders is nowhere, but nothing is written twice. So no state has to survive besides the file itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from io import BytesIO
from typing import BinaryIO, Protocol, cast

from model_delta import merkle
from model_delta.errors import DigestMismatch, Malformed, NotFound, Unavailable
from model_delta.keys.encryption import open_stream
from model_delta.manifest import Blob, Manifest, Segment, manifest_digest
from model_delta.patch.access import (
    PIECE_BYTES,
    BytesAccess,
    Part,
    RandomAccess,
    digest_at,
    pieces_from,
    require_match_at,
)
from model_delta.patch.container import apply
from model_delta.patch.route import Route, Step

PATCH_NAME = "patch"
_PATCH_BYTES_EXTRA = 65_536


class Room(Protocol):
    """Where files are made, by name: a version's digest, or PATCH_NAME for the patch that is being applied."""

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        """The file to read and write, with what an interrupted attempt left in it; empty when there is none."""

    def read(self, name: str) -> RandomAccess | None:
        """What stands there by that name."""

    def remove(self, name: str) -> None:
        """Forget the file, if there is one."""


class MemoryRoom:
    """A `Room` in memory."""

    def __init__(self) -> None:
        self._files: dict[str, BytesIO] = {}

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """The file to read and write."""
        yield self._files.setdefault(name, BytesIO())

    def read(self, name: str) -> RandomAccess | None:
        """What stands there by that name."""
        return BytesAccess(self._files[name].getvalue()) if name in self._files else None

    def remove(self, name: str) -> None:
        """Forget the file, if there is one."""
        self._files.pop(name, None)


def write_release(
    manifest: Manifest,
    route: Route,
    blobs: Mapping[str, RandomAccess],
    keys: Mapping[str, bytes],
    room: Room,
    *,
    held: Mapping[str, RandomAccess] | None = None,
    manifests: Mapping[str, Manifest] | None = None,
    pieces: Mapping[str, RandomAccess] | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> RandomAccess:
    """Make the file of `manifest` in `room`, under its digest, by the steps of `route` (see `patch.route.plan_update`);
    return it, checked. For a route without steps it is the one among `held`.

    `blobs`: sealed bytes by digest, all that the route names. `keys`: artifact key by manifest digest, of every step's
    target. `held`: files at hand by manifest digest, for patches to start from. `manifests`: verified manifests by
    digest, of the versions in between on a chain, and of held bases so that a damaged base is told from a damaged patch
    (both optional otherwise). `pieces`: plain segments at hand by digest, for the steps that replace the others.
    `interrupted` is asked at each write.

    Raises NotFound for something missing, DigestMismatch for bytes that are not what they are called, Malformed and
    Untrusted for blobs that do not open; after any of these but NotFound the whole route may be tried instead, in the
    same room. Raises Unavailable when interrupted, and what the room raises. Memory: `Step.memory_bytes`.
    """
    goal = manifest_digest(manifest)
    known = {**(manifests or {}), goal: manifest}
    files = dict(held or {})
    finished = _finished(route, known, room)
    for number, step in enumerate(route.steps):
        target = known.get(step.target)
        if target is None or manifest_digest(target) != step.target:
            raise NotFound(f"version {step.target[:16]}…: the route passes through it, its manifest is not at hand")
        if number >= finished:
            key = keys.get(step.target)
            if key is None:
                raise NotFound(f"version {step.target[:16]}… of {target.model}: its key is not at hand; ask for it")
            _require_all(step.blobs, blobs)
            base = files.get(step.base)
            if step.kind == "patch" and step.base in known and base is not None:
                check_file(known[step.base], base)
            with room.open(step.target) as new:
                output = _Output(target, new, interrupted)
                if step.kind == "patch":
                    _write_patched(target, step, base, blobs, key, room, output)
                else:
                    _write_joined(target, step, blobs, key, pieces or {}, output)
                output.finish()
            room.remove(PATCH_NAME)
            if number:
                room.remove(step.base)  # it was made on the way, and has had its use
        made = room.read(step.target)
        if made is not None:
            files[step.target] = made
    if goal not in files:
        raise NotFound(f"version {goal[:16]}… of {manifest.model}: the route does not lead to it")
    if not route.steps:
        check_file(manifest, files[goal])
    return files[goal]


def check_file(manifest: Manifest, file: bytes | RandomAccess) -> None:
    """Raise DigestMismatch unless `file` is the one that `manifest` describes: size, segments, Merkle root, digest."""
    source = _access(file)
    if source.size != manifest.size:
        raise DigestMismatch(f"{_name(manifest)}: expected {manifest.size} bytes, found {source.size}")
    checking = _Checking(manifest)
    for piece in pieces_from(source):
        checking.update(piece)
    checking.finish()


def is_finished(manifest: Manifest, file: RandomAccess | None) -> bool:
    """Whether `file` is there and is the one that `manifest` describes."""
    try:
        if file is None or file.size != manifest.size:
            return False
        check_file(manifest, file)
    except (DigestMismatch, NotFound):
        return False
    return True


def segments_root(segments: Sequence[Segment]) -> str:
    """The Merkle root of a version: leaf i is the 32 bytes of segment i's digest."""
    return merkle.root([bytes.fromhex(segment.digest) for segment in segments])


def pieces_of(manifest: Manifest, file: bytes | RandomAccess) -> dict[str, RandomAccess]:
    """The segments of `file` that are those of `manifest`, by digest; of a damaged file those that are whole.

    The file's tree is walked against the manifest's from the root down. They are ranges of `file`, which must stay as
    it is. Raises DigestMismatch when the manifest's own segments are not under its root.
    """
    tree, parts = _tree(manifest, _access(file))
    theirs = merkle.Tree([bytes.fromhex(segment.digest) for segment in manifest.segments])
    spoilt = set(merkle.differences(tree, manifest.merkle_root, theirs.digests))
    return {
        segment.digest: part
        for index, (segment, part) in enumerate(zip(manifest.segments, parts, strict=True))
        if index not in spoilt
    }


def root_of(manifest: Manifest, file: bytes | RandomAccess) -> str:
    """The Merkle root of `file` cut as `manifest` says: the manifest's own unless the file was damaged or changed.

    Bytes behind the last segment belong to it, so that they change the root."""
    return _tree(manifest, _access(file))[0].root


def segment_label(index: int) -> str:
    """What the sealed blob of a version's segment is bound to."""
    return f"segment:{index}"


def patch_label(base: str, form: str) -> str:
    """What a sealed patch is bound to. A BSDIFF40 patch's label is older than the other formats and names none."""
    return f"patch:{base}" if form in ("", "bsdiff40") else f"patch:{form}:{base}"


# Checking


class _Checking:
    """A version's file, hashed as it passes by. Raises DigestMismatch as soon as a segment is not the manifest's."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest, self._what = manifest, _name(manifest)
        covered = sum(segment.size for segment in manifest.segments)
        if covered != manifest.size:
            raise DigestMismatch(f"{self._what}: its segments cover {covered} of {manifest.size} bytes")
        if segments_root(manifest.segments) != manifest.merkle_root:
            raise DigestMismatch(f"{self._what}: its segments are not the ones under the manifest's Merkle root")
        self._file, self._segment = hashlib.sha256(), hashlib.sha256()
        self._index = self._inside = 0
        self.position = 0
        """Bytes so far."""

    def update(self, data: bytes | memoryview) -> None:
        """The next bytes."""
        view, at = memoryview(data), 0
        while at < len(view):
            if self._index == len(self._manifest.segments):
                raise DigestMismatch(f"{self._what}: expected {self._manifest.size} bytes, found more")
            part = view[at : at + self._manifest.segments[self._index].size - self._inside]
            self._segment.update(part)
            self._file.update(part)
            at, self._inside, self.position = at + len(part), self._inside + len(part), self.position + len(part)
            self._close_segments()

    def finish(self) -> None:
        """Raise DigestMismatch unless all has passed by, and was the file."""
        self._close_segments()
        if self._index < len(self._manifest.segments):
            raise DigestMismatch(f"{self._what}: expected {self._manifest.size} bytes, found {self.position}")
        _require_equal(self._file.hexdigest(), self._manifest.file_digest, self._what)

    def resume(self, file: BinaryIO) -> None:
        """Take in the whole segments that `file` starts with, from its start."""
        file.seek(0)
        for segment in self._manifest.segments:
            whole, here, left = self._file.copy(), hashlib.sha256(), segment.size
            while left and (piece := file.read(min(left, PIECE_BYTES))):
                whole.update(piece)
                here.update(piece)
                left -= len(piece)
            if left or here.hexdigest() != segment.digest:
                return
            self._file, self._index, self.position = whole, self._index + 1, self.position + segment.size

    def _close_segments(self) -> None:
        """Judge the segment that is complete, and empty ones behind it."""
        segments = self._manifest.segments
        while self._index < len(segments) and self._inside == segments[self._index].size:
            segment = segments[self._index]
            _require_equal(self._segment.hexdigest(), segment.digest, f"{self._what}, segment {segment.name!r}")
            self._segment, self._inside, self._index = hashlib.sha256(), 0, self._index + 1


class _Output:
    """The new file for whoever writes it from its first byte: what stands there already is neither hashed nor written
    again, everything else is hashed before it is written."""

    def __init__(self, manifest: Manifest, new: BinaryIO, interrupted: Callable[[], bool]) -> None:
        self._new, self._interrupted, self._what = new, interrupted, _name(manifest)
        self._checking = _Checking(manifest)
        self._checking.resume(new)
        self.done = self._checking.position
        """So many first bytes stand there from an interrupted attempt; they end with a segment."""
        self.position = 0
        """Bytes of the file so far, those found in place included."""
        new.seek(self.done)
        new.truncate()

    @property
    def file(self) -> BinaryIO:
        """This object as what it stands for; appliers that begin at the first byte ask for no more than it has."""
        return cast(BinaryIO, self)

    def skip(self, size: int) -> None:
        """Pass over bytes that stand there already."""
        self.position += size

    def write(self, data: bytes | memoryview) -> int:
        if self._interrupted():
            raise Unavailable(f"{self._what}: interrupted after {self.position} bytes, to be taken up again")
        rest = memoryview(data)[max(0, min(self.done - self.position, len(data))) :]
        self.position += len(data)
        if len(rest):
            self._checking.update(rest)
            self._new.write(rest)
        return len(data)

    def finish(self) -> None:
        """Raise DigestMismatch unless the file is complete and is the manifest's."""
        self._checking.finish()
        self._new.flush()


# Making


def _finished(route: Route, known: Mapping[str, Manifest], room: Room) -> int:
    """How many first steps an interrupted attempt has behind it: those up to the last whose file is complete."""
    for number, step in reversed(list(enumerate(route.steps))):
        target = known.get(step.target)
        if target is not None and is_finished(target, room.read(step.target)):
            return number + 1
    return 0


def _write_joined(
    target: Manifest,
    step: Step,
    blobs: Mapping[str, RandomAccess],
    key: bytes,
    pieces: Mapping[str, RandomAccess],
    output: _Output,
) -> None:
    """The file out of segments that came and, for a replace, those at hand."""
    numbers = step.segments if step.kind == "replace" else tuple(range(len(target.segments)))
    if len(step.blobs) != len(numbers) or not set(numbers) <= set(range(len(target.segments))):
        raise Malformed(
            f"version {step.target[:16]}… of {target.model}: expected {len(numbers)} of {len(target.segments)} "
            f"segments, found {len(step.blobs)} blobs"
        )
    came = {target.segments[index].digest: (index, blob) for index, blob in zip(numbers, step.blobs, strict=True)}
    at_hand: Mapping[str, RandomAccess] = pieces if step.kind == "replace" else {}
    missing = next((one for one in target.segments if one.digest not in came and one.digest not in at_hand), None)
    if missing is not None:
        raise NotFound(f"segment {missing.name!r} of {target.model}: not at hand and not fetched; take the whole route")
    for segment in target.segments:
        end = output.position + segment.size
        if end <= output.done:
            output.skip(segment.size)
            continue
        found = came.get(segment.digest)
        if found is None:
            parts = pieces_from(at_hand[segment.digest])
        else:
            index, blob = found
            sealed = _checked_blob(blob, blobs)
            parts = open_stream(key, step.target, segment_label(index), sealed, segment.size)
        for piece in parts:
            output.write(piece)
        if output.position != end:
            raise DigestMismatch(f"segment {segment.name!r} of {target.model}: expected {segment.size} bytes")


def _write_patched(
    target: Manifest,
    step: Step,
    base: RandomAccess | None,
    blobs: Mapping[str, RandomAccess],
    key: bytes,
    room: Room,
    output: _Output,
) -> None:
    """The file out of an older one. The patch is opened to a file first: it is read in several places at once."""
    if base is None or len(step.blobs) != 1:
        raise NotFound(f"version {step.base[:16]}…: the patch's base is not at hand; take the whole route")
    sealed = _checked_blob(step.blobs[0], blobs)
    size_max = 2 * (target.size + base.size) + _PATCH_BYTES_EXTRA
    with room.open(PATCH_NAME) as plain:
        plain.seek(0)
        plain.truncate()
        for piece in open_stream(key, step.target, patch_label(step.base, step.format), sealed, size_max):
            plain.write(piece)
    patch = room.read(PATCH_NAME)
    if patch is None:
        raise NotFound(f"patch from {step.base[:16]}…: it was cleared away; open it again")
    apply(base, patch, output.file, target.size)


def _require_all(wanted: Sequence[Blob], blobs: Mapping[str, RandomAccess]) -> None:
    missing = next((blob for blob in wanted if blob.digest not in blobs), None)
    if missing is not None:
        raise NotFound(f"blob {missing.digest[:16]}…: not at hand; fetch it")


def _checked_blob(blob: Blob, blobs: Mapping[str, RandomAccess]) -> RandomAccess:
    sealed = blobs[blob.digest]
    require_match_at(sealed, blob.digest, f"blob {blob.digest[:16]}…")
    return sealed


def _tree(manifest: Manifest, file: RandomAccess) -> tuple[merkle.Tree, list[RandomAccess]]:
    start, parts = 0, list[RandomAccess]()
    for index, segment in enumerate(manifest.segments):
        last = index == len(manifest.segments) - 1
        parts.append(Part(file, start, max(segment.size, file.size - start) if last else segment.size))
        start += segment.size
    return merkle.Tree([bytes.fromhex(digest_at(part)) for part in parts]), parts


def _access(file: bytes | RandomAccess) -> RandomAccess:
    return BytesAccess(file) if isinstance(file, bytes | bytearray | memoryview) else file


def _name(manifest: Manifest) -> str:
    return f"file of {manifest.model} release {manifest.release}"


def _require_equal(found: str, expected: str, what: str) -> None:
    if found != expected:
        raise DigestMismatch(f"{what}: expected sha256 {expected[:16]}…, found {found[:16]}…")
