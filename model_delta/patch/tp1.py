"""The layout of a `tp1` patch: header, segments, operations. `docs/formats.md` has it byte by byte.

A patch is a header and a body. The usual body is a row of segments, each of which makes the next bytes of the new file
from the old file alone: so a device reads the patch once from front to back and holds one segment. A segment is a set
of streams (one kind of number each, so that like stands with like); its control stream is a list of operations. Two
other bodies exist for files that do not align: a BSDIFF40 patch, and the new file as one brotli stream.

Everything here may come from anybody: lengths are checked against the bytes that are there, and against fixed limits,
before anything of that length is allocated.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple

from model_delta.errors import Malformed
from model_delta.patch.access import RandomAccess, read_exactly
from model_delta.patch.coding import LEVELS_MAX, WINDOW_BITS_MAX, WINDOW_BITS_MIN, Source, squeezed, unsqueezed, varint

MAGIC = b"ATP1"
_HEADER = struct.Struct("<4sBBxxQQ32s32s")
HEADER_BYTES = _HEADER.size
SEGMENT_BYTES_MAX = 786_432
"""All streams of a segment together, unpacked."""
OPERATION_BYTES_MAX = 131_072
"""New bytes of one operation that carries bytes or numbers for each of them."""
STEPS_BYTES_MAX = 1 << 22
"""New bytes of one operation of steps."""
STREAMS = (
    "control stream",
    "unary stream",
    "low stream",
    "sign stream",
    "remainder stream",
    "difference stream",
    "literal stream",
    "first plane",
    "second plane",
    "third plane",
    "fourth plane",
    "nibble stream",
)
CONTROL, UNARY, LOW, SIGNS, REST, DIFFERENCE, LITERAL, PLANES = range(8)
NIBBLES = PLANES + 4
_SEGMENT_HEAD_BYTES_MAX = 3 * 9 + len(STREAMS) * 2 * 9
_SEEK, _FRESH = 0x40, 0x80


class Body(IntEnum):
    """What stands behind the header."""

    SEGMENTS = 0
    BSDIFF40 = 1
    BROTLI = 2


class Kind(IntEnum):
    """How an operation makes its new bytes."""

    SAME = 0
    """As in the old file."""
    STEPS = 1
    """As in the old file plus small steps at some places, bytewise modulo 256."""
    BYTES = 2
    """As in the old file plus a byte each, modulo 256; fresh: the byte itself."""
    INT16 = 3
    INT32 = 4
    FLOAT16 = 5
    FLOAT32 = 6
    """Little-endian numbers: the old ones plus steps of their ranks; fresh: plus zeros."""


WIDTHS = {Kind.INT16: 2, Kind.INT32: 4, Kind.FLOAT16: 2, Kind.FLOAT32: 4}
FLOATS = frozenset({Kind.FLOAT16, Kind.FLOAT32})


class Header(NamedTuple):
    """The first bytes of a patch; digests are raw SHA-256."""

    body: Body
    window_bits: int
    old_size: int
    new_size: int
    old_digest: bytes
    new_digest: bytes


class Operation(NamedTuple):
    """`size` new bytes, from `old_start` on unless `fresh`; what follows in the control stream belongs to its kind."""

    kind: Kind
    fresh: bool
    old_start: int
    size: int


class SegmentHead(NamedTuple):
    """Where a segment's streams stand and what it makes: `size` new bytes. Ranges are (start, coded, plain) sizes."""

    size: int
    old_start: int
    ranges: dict[int, tuple[int, int, int]]
    end: int


def pack_header(header: Header) -> bytes:
    """HEADER_BYTES bytes."""
    return _HEADER.pack(MAGIC, header.body, *header[1:])


def read_header(patch: RandomAccess) -> Header:
    """The header of `patch`. Raises Malformed for anything that `pack_header` does not write."""
    data = patch.pread(0, HEADER_BYTES)
    if len(data) < HEADER_BYTES or not data.startswith(MAGIC):
        raise Malformed(
            f"patch: expected {MAGIC.decode()} and a header of {HEADER_BYTES} bytes, found {len(data)} bytes"
        )
    _, body, window_bits, old_size, new_size, old_digest, new_digest = _HEADER.unpack(data)
    if data[6:8] != bytes(2) or body not in tuple(Body):
        raise Malformed(f"patch: expected a body of kind 0, 1 or 2, found {body}; was it made by a newer version?")
    if not WINDOW_BITS_MIN <= window_bits <= WINDOW_BITS_MAX:
        raise Malformed(
            f"patch: expected a window of 2**{WINDOW_BITS_MIN} to 2**{WINDOW_BITS_MAX} bytes, found 2**{window_bits}"
        )
    if max(old_size, new_size) >= 1 << 62:
        raise Malformed("patch: its header's sizes are no sizes of files")
    return Header(Body(body), window_bits, old_size, new_size, old_digest, new_digest)


class Coded(NamedTuple):
    """An operation, the numbers of its kind that follow it in the control stream, and its bytes by stream."""

    operation: Operation
    control: Sequence[int] = ()
    streams: Mapping[int, bytes] = {}


class Drafted:
    """A segment while it is written: operations in, coded bytes out."""

    def __init__(self, old_start: int) -> None:
        self.size = 0
        self._start = self.old_end = old_start
        self._streams = [bytearray() for _ in STREAMS]
        self._same: Operation | None = None  # it may still grow

    @property
    def plain_size(self) -> int:
        """Bytes of all streams so far."""
        return sum(map(len, self._streams))

    def add(self, coded: Coded) -> None:
        """One more operation; unchanged bytes are joined with those right before them."""
        operation = coded.operation
        self.size += operation.size
        if operation.kind != Kind.SAME:
            self._flush()
            self._write(operation, coded.control)
            for stream, data in coded.streams.items():
                self._streams[stream] += data
            return
        last = self._same
        if last and last.old_start + last.size == operation.old_start:
            self._same = last._replace(size=last.size + operation.size)
        else:
            self._flush()
            self._same = operation

    def packed(self, window_bits: int) -> bytes:
        """The segment's bytes."""
        self._flush()
        present = [index for index, stream in enumerate(self._streams) if stream]
        coded = [squeezed(bytes(self._streams[index]), window_bits) for index in present]
        head = [self.size, self._start, sum(1 << index for index in present)]
        for index, data in zip(present, coded, strict=True):
            head += [len(self._streams[index]), len(data)]
        return b"".join(map(varint, head)) + b"".join(coded)

    def _flush(self) -> None:
        if self._same:
            self._write(self._same, ())
            self._same = None

    def _write(self, operation: Operation, control: Sequence[int]) -> None:
        seek = 0 if operation.fresh else operation.old_start - self.old_end
        code = operation.kind | (_SEEK if seek else 0) | (_FRESH if operation.fresh else 0)
        folded = [2 * seek if seek > 0 else -2 * seek - 1] if seek else []
        self._streams[CONTROL] += bytes([code]) + b"".join(map(varint, (*folded, operation.size, *control)))
        if not operation.fresh:
            self.old_end = operation.old_start + operation.size


def segments(patch: RandomAccess, header: Header) -> Iterator[SegmentHead]:
    """The heads of the segments, in order; together they make the new file. Raises Malformed."""
    offset, left = HEADER_BYTES, header.new_size
    while left:
        head = read_segment_head(patch, offset, left)
        offset, left = head.end, left - head.size
        yield head
    if offset != patch.size:
        raise Malformed(f"patch: expected its end at {offset}, found {patch.size - offset} more bytes")


def read_segment_head(patch: RandomAccess, offset: int, size_left: int) -> SegmentHead:
    """The head of the segment at `offset`, which makes at most `size_left` new bytes. Raises Malformed."""
    raw = patch.pread(offset, _SEGMENT_HEAD_BYTES_MAX)
    head = Source(raw, "segment's head")
    size, old_start, present = head.number(), head.number(), head.number()
    if not 0 < size <= size_left:
        raise Malformed(f"patch: a segment makes {size} bytes where {size_left} are missing")
    if present >> len(STREAMS):
        raise Malformed(f"patch: a segment has streams of unknown kinds ({present:#x})")
    sizes = {index: (head.number(), head.number()) for index in range(len(STREAMS)) if present >> index & 1}
    plain_total = sum(plain for plain, _ in sizes.values())
    if plain_total > SEGMENT_BYTES_MAX:
        raise Malformed(f"patch: expected segments of at most {SEGMENT_BYTES_MAX} bytes, found {plain_total}")
    start = offset + len(raw) - len(head.peek(len(raw)))
    ranges = {}
    for index, (plain, coded) in sizes.items():
        if not 0 < coded <= plain:
            raise Malformed(f"patch: a {STREAMS[index]} of {plain} bytes is coded in {coded}")
        ranges[index] = (start, coded, plain)
        start += coded
    if start > patch.size:
        raise Malformed(f"patch: a segment ends at {start}, the patch at {patch.size}")
    return SegmentHead(size, old_start, ranges, start)


def read_stream(patch: RandomAccess, head: SegmentHead, index: int, window_bits: int) -> Source:
    """One stream of a segment, unpacked; an absent one is empty. Raises Malformed."""
    what = STREAMS[index]
    if index not in head.ranges:
        return Source(b"", what)
    start, coded, plain = head.ranges[index]
    return Source(unsqueezed(read_exactly(patch, start, coded, what), plain, window_bits, what), what)


def operations(head: SegmentHead, control: Source, old_size: int) -> Iterator[Operation]:
    """The operations of a segment, each checked against the segment and the old file before it is given out.

    The caller takes what belongs to an operation's kind from `control` before it asks for the next. Raises Malformed.
    """
    left, position = head.size, head.old_start
    while left:
        code = control.take(1)[0]
        fresh, number = bool(code & _FRESH), code & ~(_FRESH | _SEEK)
        if number not in tuple(Kind) or (fresh and (number < Kind.BYTES or code & _SEEK)):
            raise Malformed(f"patch: expected an operation, found {code:#04x}")
        kind = Kind(number)
        if code & _SEEK:
            seek = control.number()
            position += seek // 2 if seek % 2 == 0 else -(seek + 1) // 2
        size = control.number()
        limit = {Kind.SAME: left, Kind.STEPS: STEPS_BYTES_MAX}.get(kind, OPERATION_BYTES_MAX)
        if not 0 < size <= min(left, limit) or size % WIDTHS.get(kind, 1):
            raise Malformed(f"patch: an operation makes {size} bytes, {left} are missing and {limit} allowed")
        if not fresh and not 0 <= position <= old_size - size:
            raise Malformed(
                f"patch: it reads {size} bytes at {position}, outside an old file of {old_size} bytes; "
                "was it made for another one?"
            )
        yield Operation(kind, fresh, 0 if fresh else position, size)
        left -= size
        if not fresh:
            position += size


def skip_control(operation: Operation, control: Source) -> None:
    """Take the numbers of the operation's kind from the control stream."""
    if operation.kind in WIDTHS:
        control.number()
    elif operation.kind == Kind.STEPS:
        for _ in range(LEVELS_MAX):
            if not control.number():
                break
            control.number()
