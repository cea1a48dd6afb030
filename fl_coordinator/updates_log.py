"""Encrypted updates in the order in which they were admitted.

`SegmentLog` is the embedded log: files of framed records, appended and flushed before anything is acknowledged.

    frame    length (4 bytes, big-endian) | CRC-32 of the payload (4 bytes, big-endian; see `_checksum`) | payload
    file     NNNNNNNNNNNNNNNNNNNN.log, named by the offset of its first byte in the whole log

An offset is a byte position in the whole log and never changes. A power cut can leave a torn last frame; it was never
acknowledged, so opening the log cuts it off. Damage anywhere else is not repaired but said. `ports.UpdatesLog` is what
the coordinator needs of any log; `kafka_log` is the other one.

Who follows a log asks for what is there from an offset on, gets a `LogPart`, and asks next for its `next`. One thread
appends; any number may read meanwhile, and see records only once they are durable.
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

import msgspec

from model_delta.errors import Malformed, NotFound, StorageFull, Unavailable

RECORD_BYTES_MAX = 64 * 2**20
PART_BYTES = 8 * 2**20
"""How much a follower takes at a time; a single record may be longer."""
RECORD_COST = 256
"""What a record counts for in a part beside its bytes: a log of very small ones must not make long parts."""
_HEADER = struct.Struct(">II")
_PART = struct.Struct(">QQ")
_RECORD = struct.Struct(">QI")


class LogPart(msgspec.Struct, frozen=True):
    """Consecutive records of a log from the offset `start`, each with its own; `next` is the offset to ask for next.

    `start` is the offset that was asked for, or the first one kept when the log does not hold that (any more)."""

    start: int
    records: tuple[tuple[int, bytes], ...]
    next: int


def packed_part(part: LogPart) -> bytes:
    """A part as it travels: start and next (8 bytes each, big-endian), then each record's offset (8), length (4) and
    bytes."""
    pieces = [_PART.pack(part.start, part.next)]
    for offset, record in part.records:
        pieces += [_RECORD.pack(offset, len(record)), record]
    return b"".join(pieces)


def unpacked_part(data: bytes) -> LogPart:
    """The part in `data`. Raises Malformed for bytes that are cut off, or offsets that do not grow."""
    if len(data) < _PART.size:
        raise Malformed(f"part of an updates log: expected at least {_PART.size} bytes, found {len(data)}")
    start, after = _PART.unpack_from(data)
    records: list[tuple[int, bytes]] = []
    at, least = _PART.size, start
    while at < len(data):
        offset, length = _RECORD.unpack_from(data, at) if at + _RECORD.size <= len(data) else (least, len(data))
        at += _RECORD.size + length
        if at > len(data) or offset < least:
            raise Malformed(f"part of an updates log: expected whole records in order, found a broken one at {offset}")
        records.append((offset, data[at - length : at]))
        least = offset + 1
    if not least <= after < 2**63:
        raise Malformed(f"part of an updates log: expected an end from {least} on, found {after}")
    return LogPart(start, tuple(records), after)


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
        end = self._end
        offsets = []
        try:
            if self._file.closed:  # something went wrong before, and may have been put right since
                self._forget(self._end - self._start)
            if self._end - self._start >= self._segment_bytes:
                self._roll()
            for record in records:
                if len(record) > RECORD_BYTES_MAX:
                    raise Malformed(f"updates log: expected at most {RECORD_BYTES_MAX} bytes, found {len(record)}")
                offsets.append(end)
                self._file.write(_HEADER.pack(len(record), _checksum(record)) + record)
                end += _HEADER.size + len(record)
            self._file.flush()
            os.fsync(self._file.fileno())
        except (OSError, Malformed) as error:
            with contextlib.suppress(OSError):  # it is tried again before the next record
                self._forget(self._end - self._start)
            if isinstance(error, Malformed):
                raise
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise StorageFull(
                    f"updates log {self._folder}: no room left; free some space, nothing was added"
                ) from None
            raise Unavailable(f"updates log {self._folder}: {error.strerror}") from None
        self._end = end
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

    def read_from(self, offset: int, bytes_max: int = PART_BYTES) -> LogPart:
        """What is there from `offset` on: one record at least if there is one, and no more than `bytes_max` otherwise.

        What follows a damaged record, or an offset inside a record, begins with the next file; Malformed when there is
        none yet.
        """
        end, starts = self._end, self._starts()
        if not starts[0] <= offset <= end:
            offset = starts[0]
        records: list[tuple[int, bytes]] = []
        at, left = offset, bytes_max
        while at < end and left > 0:
            start = max(start for start in starts if start <= at)
            until = min((following for following in starts if following > start), default=end)
            try:
                file = self._path(start).open("rb")
            except FileNotFoundError:  # removed since it was listed: what is kept begins behind it
                return self.read_from(offset, bytes_max)
            with file:
                file.seek(at - start)
                while at < until and left > 0:
                    record = _read_frame(file)
                    if record is None and not records and until < end:
                        offset = at = until  # nobody knows where the next record of this file begins
                        break
                    if record is None and not records:
                        raise Malformed(f"updates log {self._path(start)}: the record at offset {at} is damaged")
                    if record is None:
                        left = 0
                        break
                    left -= len(record) + RECORD_COST
                    if left < 0 and records:
                        break
                    records.append((at, record))
                    at += _HEADER.size + len(record)
        return LogPart(offset, tuple(records), at)

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
        following = self._open(self._end)  # before anything changes: there may be no room for another file
        self._file.close()
        self._start, self._file = self._end, following

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
    return record if len(record) == length and _checksum(record) == checksum else None


def _checksum(record: bytes) -> int:
    """CRC-32; of an empty record all ones, because a power cut may leave a file with zeros behind its end, and zeros
    must not be records."""
    return zlib.crc32(record) if record else 0xFFFF_FFFF
