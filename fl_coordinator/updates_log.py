"""Encrypted updates in the order in which they were admitted.

`SegmentLog` is the embedded log: files of framed records, appended and flushed before anything is acknowledged.

    frame    length (4 bytes, big-endian) | CRC-32 of the payload (4 bytes, big-endian) | payload
    file     NNNNNNNNNNNNNNNNNNNN.log, named by the offset of its first byte in the whole log

An offset is a byte position in the whole log and never changes. A power cut can leave a torn last frame; it was never
acknowledged, so opening the log cuts it off. Damage anywhere else is not repaired but said. `ports.UpdatesLog` is what
the coordinator needs of any log; `kafka_log` is the other one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import zlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from model_delta.errors import Malformed, NotFound, StorageFull, Unavailable

RECORD_BYTES_MAX = 64 * 2**20
_HEADER = struct.Struct(">II")


class SegmentLog:
    """The embedded log in one folder, for one process."""

    def __init__(self, folder: Path, segment_bytes: int = 256 * 2**20) -> None:
        """Open or create. `torn_bytes` says how much of an unfinished last write was cut off."""
        self._folder = folder
        self._segment_bytes = segment_bytes
        self.torn_bytes = 0
        folder.mkdir(parents=True, exist_ok=True)
        starts = self._starts()
        self._start = starts[-1] if starts else 0
        self._file: BinaryIO = self._open(self._start)
        self._end = self._start + self._cut_torn_tail()

    @property
    def end(self) -> int:
        """The offset that the next record gets."""
        return self._end

    def append(self, records: Sequence[bytes]) -> list[int]:
        """Write `records` with one flush to the disk; their offsets. Raises StorageFull with none written."""
        if self._end - self._start >= self._segment_bytes:
            self._roll()
        before = self._end
        offsets = []
        try:
            for record in records:
                if len(record) > RECORD_BYTES_MAX:
                    raise Malformed(f"updates log: expected at most {RECORD_BYTES_MAX} bytes, found {len(record)}")
                offsets.append(self._end)
                self._file.write(_HEADER.pack(len(record), zlib.crc32(record)) + record)
                self._end += _HEADER.size + len(record)
            self._file.flush()
            os.fsync(self._file.fileno())
        except (OSError, Malformed) as error:
            self._end = before
            self._forget(before - self._start)
            if isinstance(error, Malformed):
                raise
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise StorageFull(
                    f"updates log {self._folder}: no room left; free some space, nothing was added"
                ) from None
            raise Unavailable(f"updates log {self._folder}: {error.strerror}") from None
        return offsets

    def read(self, offset: int) -> bytes:
        """The record at `offset`. Raises NotFound beyond the end or in a removed file, Malformed for damage."""
        start = max((start for start in self._starts() if start <= offset), default=-1)
        if start < 0 or offset >= self._end:
            raise NotFound(f"updates log {self._folder}: no record at offset {offset}, the end is {self._end}")
        with self._path(start).open("rb") as file:
            file.seek(offset - start)
            record = _read_frame(file)
        if record is None:
            raise Malformed(f"updates log {self._path(start)}: the record at offset {offset} is damaged")
        return record

    def remove_before(self, offset: int) -> int:
        """Delete whole files that hold only records below `offset`; how many."""
        starts = self._starts()
        gone = [start for start, following in pairwise(starts) if following <= offset]
        for start in gone:
            self._path(start).unlink(missing_ok=True)
        return len(gone)

    def close(self) -> None:
        """Close the file that is written to."""
        self._file.close()

    def _starts(self) -> list[int]:
        return sorted(int(path.stem) for path in self._folder.glob("*.log") if path.stem.isdigit())

    def _path(self, start: int) -> Path:
        return self._folder / f"{start:020d}.log"

    def _open(self, start: int) -> BinaryIO:
        file = self._path(start).open("ab")
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return file

    def _roll(self) -> None:
        self._file.close()
        self._start = self._end
        self._file = self._open(self._start)

    def _cut_torn_tail(self) -> int:
        path = self._path(self._start)
        with path.open("rb") as file:
            good = 0
            while _read_frame(file) is not None:
                good = file.tell()
        self.torn_bytes = path.stat().st_size - good
        if self.torn_bytes:
            self._forget(good)
        return good

    def _forget(self, good: int) -> None:
        """Cut the current file off after `good` bytes, past whatever a failed write left in the buffer."""
        with contextlib.suppress(OSError):  # the buffered rest may not be writable: it is what is being cut off
            self._file.close()
        os.truncate(self._path(self._start), good)
        self._file = self._open(self._start)


def _read_frame(file: BinaryIO) -> bytes | None:
    """The next record, or None at the end, at a torn frame or at a damaged one."""
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    length, checksum = _HEADER.unpack(header)
    if length > RECORD_BYTES_MAX:
        return None
    record = file.read(length)
    return record if len(record) == length and zlib.crc32(record) == checksum else None
