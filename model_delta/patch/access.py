"""Bytes read from anywhere in a file, without holding the file.

A patch is applied on devices whose memory is smaller than the model. So appliers read the old file and the patch by
position, a piece at a time, and do not care whether a file or bytes stand behind it.
"""

from __future__ import annotations

import os
from typing import BinaryIO, Protocol

from model_delta.errors import Malformed


class RandomAccess(Protocol):
    """Something that can be read from any position."""

    @property
    def size(self) -> int:
        """How many bytes there are."""

    def pread(self, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset`; fewer only at the end."""


class BytesAccess:
    """Bytes in memory as a `RandomAccess`."""

    def __init__(self, data: bytes) -> None:
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
