"""Bytes read from anywhere in a file, without holding the file.

A patch is applied on devices whose memory is smaller than the model. So appliers read the old file and the patch by
position, a piece at a time, and do not care whether a file or bytes stand behind it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from model_delta.errors import DigestMismatch, Malformed, NotFound

PIECE_BYTES = 65_536
"""How much is read at a time where a file is gone through from its start to its end."""


class RandomAccess(Protocol):
    """Something that can be read from any position."""

    @property
    def size(self) -> int:
        """How many bytes there are."""

    def pread(self, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset`; fewer only at the end."""


class BytesAccess:
    """Bytes in memory as a `RandomAccess`."""

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._view = memoryview(data)

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return len(self._view)

    def pread(self, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset`; fewer only at the end."""
        return bytes(self._view[offset : offset + size])


class FileAccess:
    """An open file as a `RandomAccess`. Its size is the one it had here; the caller closes the descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return self._size

    def pread(self, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset`; fewer only at the end."""
        return os.pread(self._descriptor, size, offset)


class PathAccess:
    """A file by its path as a `RandomAccess`. It is opened for each read, so that hundreds cost no descriptors.

    Raises NotFound when the file is gone or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def size(self) -> int:
        """How many bytes there are now."""
        try:
            return self._path.stat().st_size
        except OSError:
            raise NotFound(f"file {self._path}: it is gone") from None

    def pread(self, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset`; fewer only at the end."""
        try:
            descriptor = os.open(self._path, os.O_RDONLY)
        except OSError:
            raise NotFound(f"file {self._path}: it is gone") from None
        try:
            return os.pread(descriptor, size, offset)
        except OSError as error:
            raise NotFound(f"file {self._path}: cannot be read at {offset}: {error.strerror}") from None
        finally:
            os.close(descriptor)


class Part:
    """At most `size` bytes of another `RandomAccess` from `start` on, seen as a whole."""

    def __init__(self, whole: RandomAccess, start: int, size: int) -> None:
        self._whole, self._start, self._size = whole, start, size

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return max(0, min(self._size, self._whole.size - self._start))

    def pread(self, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset`; fewer only at the end."""
        return self._whole.pread(self._start + offset, max(0, min(size, self._size - offset)))


def pieces_from(source: RandomAccess) -> Iterator[bytes]:
    """All bytes in order, at most PIECE_BYTES at a time."""
    at = 0
    while piece := source.pread(at, PIECE_BYTES):
        yield piece
        at += len(piece)


def digest_at(source: RandomAccess) -> str:
    """SHA-256 of what `source` holds, as `digest.digest_of` writes it. Memory: one piece."""
    digest = hashlib.sha256()
    for piece in pieces_from(source):
        digest.update(piece)
    return digest.hexdigest()


def require_match_at(source: RandomAccess, expected: str, what: str) -> None:
    """Raise DigestMismatch unless what `source` holds hashes to `expected`. Memory: one piece."""
    found = digest_at(source)
    if found != expected:
        raise DigestMismatch(f"{what}: expected sha256 {expected[:16]}…, found {found[:16]}…")


def read_exactly(source: RandomAccess, offset: int, size: int, what: str) -> bytes:
    """`size` bytes from `offset`. Raises Malformed, naming `what`, when the source ends before (a file that shrank
    while it was read, or a length that lies)."""
    data = source.pread(offset, size)
    while len(data) < size:  # a read may be cut short by a signal
        more = source.pread(offset + len(data), size - len(data))
        if not more:
            raise Malformed(f"{what}: expected {size} bytes at {offset}, found {len(data)}; it is cut off")
        data += more
    return data


class ResumedOutput:
    """The new file as it is written, from its first byte; the first `done` bytes stand there already.

    What was written before an interruption is compared, not written twice: a decoder's state would have to be made
    durable together with the output, while a length needs no state at all, and decoding again costs less than fetching.
    With `done` above 0, `new` must be readable and seekable, and its first `done` bytes durable.
    """

    def __init__(self, new: BinaryIO, done: int = 0) -> None:
        self._new = new
        self._left = done
        self.written = 0
        """Bytes of the new file so far, those found in place included."""
        if done:
            new.seek(0)

    def write(self, data: bytes | memoryview) -> None:
        """The next bytes. Raises Malformed when other bytes stand in their place."""
        self.written += len(data)
        if self._left:
            old = min(self._left, len(data))
            if self._new.read(old) != data[:old]:
                raise Malformed(
                    f"new file: its bytes before {self.written} are not those of this patch; remove it and start again"
                )
            self._left -= old
            if self._left:
                return
            self._new.seek(self.written - len(data) + old)
            data = data[old:]
        self._new.write(data)
