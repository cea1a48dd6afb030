"""Dense patches (`tp1`): the meaning of bsdiff (old bytes plus a difference, new bytes, moves in the old file), with a
coding chosen for each run of each tensor by what it takes in bytes.

Between two rounds of training few int8 weights move, nearly all by one step; a byte of difference for each weight,
which BSDIFF40 holds, is mostly zeros that its compressor must describe again. Here the places of the changed weights
and their signs are written, close to their entropy, and floats as steps of their ranks, plane by plane (`coding`).

A patch names the old and the new file by size and SHA-256. A wrong old file is refused before a byte is written; a new
file that does not have the digest is reported, and the caller never lets it stand under the target's name.

Applying takes the memory of one segment, whatever the size of the model, and needs no state but the length of what has
been written.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, cast

import numpy as np

from model_delta.errors import DigestMismatch, Malformed
from model_delta.manifest import StoredTensor
from model_delta.patch import bsdiff, bspatch
from model_delta.patch.access import Part, RandomAccess, ResumedOutput, read_exactly
from model_delta.patch.align import Run, align
from model_delta.patch.coding import (
    LEVELS_MAX,
    MARKS_MAX,
    WINDOW_BITS_MAX,
    Bytes,
    Places,
    Planes,
    Source,
    marks_bits,
    prefix_bits,
    read_planes,
    read_steps,
    squeezed_whole,
    unsqueezed_pieces,
    write_planes,
    write_steps,
)
from model_delta.patch.tp1 import (
    CONTROL,
    DIFFERENCE,
    FLOATS,
    HEADER_BYTES,
    LITERAL,
    LOW,
    NIBBLES,
    OPERATION_BYTES_MAX,
    PLANES,
    REST,
    SIGNS,
    STEPS_BYTES_MAX,
    STREAMS,
    UNARY,
    WIDTHS,
    Body,
    Coded,
    Drafted,
    Header,
    Kind,
    Operation,
    SegmentHead,
    operations,
    pack_header,
    read_header,
    read_stream,
    segments,
    skip_control,
)
from model_delta.segments import stored_tensors

_SEGMENT_BYTES = 393_216
_PIECE_BYTES = 65_536
_NUMBERS_BYTES_MIN = 32
_OPERATION_BITS = 48
"""About what an operation of steps takes in the control stream."""
_PREFIX_CODE_LOSS = 1.02
"""Brotli's prefix codes over the best; besides, they spend a bit on each byte."""
_KINDS = {
    "int16": Kind.INT16,
    "uint16": Kind.INT16,
    "int32": Kind.INT32,
    "uint32": Kind.INT32,
    "float16": Kind.FLOAT16,
    "float32": Kind.FLOAT32,
}

_BITS_OF = {Kind.FLOAT16: Kind.INT16, Kind.FLOAT32: Kind.INT32}
"""Floats seen as their bits: sign and magnitude. Where weights decay, all magnitudes step down, and that is shorter."""
_SAMPLE_BYTES = 32_768


# Making


def make_dense(old: bytes, new: bytes) -> bytes:
    """A tp1 patch that turns `old` into `new`.

    Where the two align by their tensors' names, that takes little time and few MB besides the two files. Elsewhere, and
    for small files, the BSDIFF40 patch and the packed new file are made too, and the shortest is taken as the body: so
    it exceeds neither by more than its header.
    """
    runs = align(old, new)
    bodies = {Body.SEGMENTS: b"".join(_segments(old, new, runs))}
    if not bsdiff.aligns_well(len(bodies[Body.SEGMENTS]), old, new, runs):
        bodies[Body.BSDIFF40] = bsdiff.make_patch(old, new)
        bodies[Body.BROTLI] = squeezed_whole(new, WINDOW_BITS_MAX)
    body = min(bodies, key=lambda kind: len(bodies[kind]))
    digests = hashlib.sha256(old).digest(), hashlib.sha256(new).digest()
    return pack_header(Header(body, WINDOW_BITS_MAX, len(old), len(new), *digests)) + bodies[body]


def _segments(old: bytes, new: bytes, runs: tuple[Run, ...]) -> Iterator[bytes]:
    draft = Drafted(0)
    for coded in _coded(np.frombuffer(old, np.uint8), np.frombuffer(new, np.uint8), runs):
        draft.add(coded)
        if draft.plain_size >= _SEGMENT_BYTES:
            yield draft.packed(WINDOW_BITS_MAX)
            draft = Drafted(draft.old_end)
    if draft.size:
        yield draft.packed(WINDOW_BITS_MAX)


def _coded(old: Bytes, new: Bytes, runs: tuple[Run, ...]) -> Iterator[Coded]:
    """The new file as operations, in order."""
    position = 0
    for run in (*runs, Run(0, len(new), 0, "")):
        for start in range(position, run.new_start, OPERATION_BYTES_MAX):
            yield _literal(new[start : min(start + OPERATION_BYTES_MAX, run.new_start)])
        kind = _KINDS.get(run.dtype) if run.size >= _NUMBERS_BYTES_MIN else None
        step = STEPS_BYTES_MAX if kind is None else OPERATION_BYTES_MAX
        for start in range(0, run.size, step):
            size, old_start = min(step, run.size - start), run.old_start + start
            before, after = old[old_start : old_start + size], new[run.new_start + start : run.new_start + start + size]
            if np.array_equal(before, after):
                yield Coded(Operation(Kind.SAME, False, old_start, size))
            elif kind is None:
                yield from _coded_bytes(before, after, old_start)
            else:
                yield _coded_numbers(before, after, old_start, kind)
        position = run.new_start + run.size


def _literal(new: Bytes) -> Coded:
    return Coded(Operation(Kind.BYTES, True, 0, len(new)), (), {LITERAL: new.tobytes()})


def _coded_bytes(old: Bytes, new: Bytes, old_start: int) -> Iterator[Coded]:
    """Up to STEPS_BYTES_MAX bytes as steps, as differences or as they are: whatever is estimated shortest."""
    differences = new - old
    places = np.flatnonzero(differences)
    steps = differences[places]
    counts = np.bincount(steps, minlength=256)
    counts[0] = len(new) - len(places)
    sizes = counts[:129].copy()
    sizes[1:128] += counts[:128:-1]  # a step and its opposite are of one size
    left = len(new) - np.concatenate(([0], np.cumsum(sizes[: LEVELS_MAX + 1])))  # left[i]: steps of size i or more
    steps_bits = sum(marks_bits(int(left[level + 1]), int(left[level])) for level in range(LEVELS_MAX))
    steps_bits += left[1] + 8 * left[LEVELS_MAX] + _OPERATION_BITS
    difference_bits, plain_bits = (
        max(prefix_bits(values) * _PREFIX_CODE_LOSS, 1) * len(new) for values in (differences, new)
    )
    if steps_bits <= min(difference_bits, plain_bits):
        yield from _coded_steps(places, steps, len(new), old_start)
        return
    for start in range(0, len(new), OPERATION_BYTES_MAX):
        end = min(start + OPERATION_BYTES_MAX, len(new))
        if plain_bits < difference_bits:
            yield _literal(new[start:end])
        else:
            operation = Operation(Kind.BYTES, False, old_start + start, end - start)
            yield Coded(operation, (), {DIFFERENCE: differences[start:end].tobytes()})


def _coded_steps(places: Places, steps: Bytes, size: int, old_start: int) -> Iterator[Coded]:
    start = 0
    for first in range(0, len(places), MARKS_MAX):
        some = places[first : first + MARKS_MAX]
        end = size if first + MARKS_MAX >= len(places) else int(some[-1]) + 1
        parts = write_steps(some - start, steps[first : first + MARKS_MAX], end - start)
        operation = Operation(Kind.STEPS, False, old_start + start, end - start)
        yield Coded(
            operation, parts.control, {UNARY: parts.unary, LOW: parts.low, SIGNS: parts.signs, REST: parts.rest}
        )
        start = end


def _coded_numbers(old: Bytes, new: Bytes, old_start: int, kind: Kind) -> Coded:
    """Numbers against the old ones, or against zeros where those would not help."""
    if kind in _BITS_OF:
        ways = {
            way: write_planes(old[:_SAMPLE_BYTES], new[:_SAMPLE_BYTES], WIDTHS[way], floats=way in FLOATS)
            for way in (kind, _BITS_OF[kind])
        }
        kind = min(ways, key=lambda way: _bits_each(ways[way]))
    floats, width = kind in FLOATS, WIDTHS[kind]
    planes = write_planes(old, new, width, floats=floats)
    bits = _bits_each(planes)
    fresh = bits > 4.0 * width and bits > sum(prefix_bits(new[octet::width]) for octet in range(width))
    if fresh:
        planes = write_planes(np.zeros_like(new), new, width, floats=floats)
    operation = Operation(kind, fresh, 0 if fresh else old_start, len(new))
    control = 2 * planes.divisor + bool(planes.nibbles)
    return Coded(operation, (control,), {NIBBLES: planes.nibbles, **dict(enumerate(planes.octets, PLANES))})


def _bits_each(planes: Planes) -> float:
    """About what each number takes."""
    return sum(prefix_bits(np.frombuffer(octets, np.uint8)) for octets in planes.octets) + (4 if planes.nibbles else 0)


# Applying


def apply_dense(old: RandomAccess, patch: RandomAccess, new: BinaryIO, size_max: int, done: int = 0) -> int:
    """Write the new file, at most `size_max` bytes, to `new`; return its size.

    `done`: so many first bytes stand in `new` already (see `ResumedOutput`). Raises DigestMismatch for another old
    file, before anything is written, and for a result that is not the new file; Malformed for a patch that `make_dense`
    would not have written. Takes a few MB of memory, whatever the patch says.
    """
    header = read_header(patch)
    if header.new_size > size_max:
        raise Malformed(f"patch: expected a new file of at most {size_max} bytes, found {header.new_size}")
    if not 0 <= done <= header.new_size:
        raise Malformed(f"new file: {done} bytes are written already, the patch makes {header.new_size}; start again")
    if header.old_size != old.size:
        raise DigestMismatch(f"patch: it was made for an old file of {header.old_size} bytes, this one has {old.size}")
    if _sha256(old) != header.old_digest:
        raise DigestMismatch("patch: it was made for another old file than this one (the SHA-256 differ)")
    digested = _Digested(new)
    if header.body == Body.BSDIFF40:
        written = bspatch.apply_stream(
            old, Part(patch, HEADER_BYTES, patch.size), digested.file, header.new_size, done=done
        )
    else:
        output = ResumedOutput(digested.file, done)
        for piece in _pieces(old, patch, header):
            output.write(piece)
        written = output.written
    if written != header.new_size or digested.digest() != header.new_digest:
        raise DigestMismatch("patch: what it made is not the new file that it names (the SHA-256 differ)")
    return written


class _Digested:
    """A file whose bytes are hashed as they are written, or found in place, from the first to the last."""

    def __init__(self, new: BinaryIO) -> None:
        self._new, self._sha256 = new, hashlib.sha256()

    @property
    def file(self) -> BinaryIO:
        """This object as what it stands for; `ResumedOutput` asks for no more than it has."""
        return cast(BinaryIO, self)

    def seek(self, offset: int) -> int:
        return self._new.seek(offset)

    def read(self, size: int) -> bytes:
        data = self._new.read(size)
        self._sha256.update(data)
        return data

    def write(self, data: bytes | memoryview) -> int:
        self._sha256.update(data)
        return self._new.write(data)

    def digest(self) -> bytes:
        return self._sha256.digest()


def _pieces(old: RandomAccess, patch: RandomAccess, header: Header) -> Iterator[bytes]:
    """The new file's bytes, from segments or from one brotli stream."""
    if header.body == Body.BROTLI:
        starts = range(HEADER_BYTES, patch.size, _PIECE_BYTES)
        coded = (patch.pread(start, min(_PIECE_BYTES, patch.size - start)) for start in starts)
        yield from unsqueezed_pieces(coded, header.new_size, header.window_bits, "new file")
        return
    for head in segments(patch, header):
        yield from made_by(
            head, [read_stream(patch, head, index, header.window_bits) for index in range(len(STREAMS))], old
        )


def made_by(head: SegmentHead, streams: list[Source], old: RandomAccess) -> Iterator[bytes]:
    """The new bytes that one segment makes, in pieces. Raises Malformed."""
    control = streams[CONTROL]
    for operation in operations(head, control, old.size):
        start, size = operation.old_start, operation.size
        if operation.kind == Kind.SAME:
            for at in range(0, size, _PIECE_BYTES):
                yield read_exactly(old, start + at, min(_PIECE_BYTES, size - at), "old file")
        elif operation.kind == Kind.STEPS:
            yield from _stepped(operation, streams, old)
        elif operation.kind == Kind.BYTES:
            if operation.fresh:
                yield streams[LITERAL].take(size)
            else:
                before = np.frombuffer(read_exactly(old, start, size, "old file"), np.uint8)
                yield (before + np.frombuffer(streams[DIFFERENCE].take(size), np.uint8)).tobytes()
        else:
            width = WIDTHS[operation.kind]
            count = size // width
            divisor, cut = divmod(control.number(), 2)
            if not 0 < divisor < 1 << (8 * width):
                raise Malformed(f"patch: numbers of {width} bytes have a common divisor of {divisor}")
            nibbles = streams[NIBBLES].take((count + 1) // 2) if cut else b""
            planes = Planes(divisor, nibbles, [streams[PLANES + octet].take(count) for octet in range(width)])
            before_bytes = bytes(size) if operation.fresh else read_exactly(old, start, size, "old file")
            yield read_planes(before_bytes, planes, floats=operation.kind in FLOATS)
    for stream in streams:
        stream.close()


def _stepped(operation: Operation, streams: list[Source], old: RandomAccess) -> Iterator[bytes]:
    places, steps = read_steps(
        operation.size, streams[CONTROL], streams[UNARY], streams[LOW], streams[SIGNS], streams[REST]
    )
    for at in range(0, operation.size, _PIECE_BYTES):
        size = min(_PIECE_BYTES, operation.size - at)
        first, last = np.searchsorted(places, (at, at + size))
        piece = read_exactly(old, operation.old_start + at, size, "old file")
        if first == last:
            yield piece
            continue
        changed = np.frombuffer(piece, np.uint8).copy()
        changed[places[first:last] - at] += steps[first:last]
        yield changed.tobytes()


def _sha256(file: RandomAccess) -> bytes:
    digest = hashlib.sha256()
    for start in range(0, file.size, _PIECE_BYTES):
        digest.update(read_exactly(file, start, min(_PIECE_BYTES, file.size - start), "old file"))
    return digest.digest()


# Looking


class DenseInfo(NamedTuple):
    """What a tp1 patch says: its header, (name, coded bytes, plain bytes) of its streams, and the ranges of the old
    file, as (start, end) in rising order, that it takes over unchanged; None where only applying would tell."""

    header: Header
    streams: tuple[tuple[str, int, int], ...]
    unchanged: tuple[tuple[int, int], ...] | None


def inspect_dense(patch: RandomAccess) -> DenseInfo:
    """Read a patch's heads and control streams, and make nothing of it. Raises Malformed."""
    header = read_header(patch)
    if header.body != Body.SEGMENTS:
        return DenseInfo(header, ((header.body.name.lower(), patch.size - HEADER_BYTES, header.new_size),), None)
    sizes: dict[int, tuple[int, int]] = {}
    unchanged: list[tuple[int, int]] = []
    for head in segments(patch, header):
        for index, (_, coded, plain) in head.ranges.items():
            before = sizes.get(index, (0, 0))
            sizes[index] = before[0] + coded, before[1] + plain
        control = read_stream(patch, head, CONTROL, header.window_bits)
        for operation in operations(head, control, header.old_size):
            skip_control(operation, control)
            if operation.kind == Kind.SAME:
                unchanged.append((operation.old_start, operation.old_start + operation.size))
        control.close()
    named = tuple((STREAMS[index], *sizes[index]) for index in sorted(sizes))
    return DenseInfo(header, named, tuple(_merged(unchanged)))


def changed_tensors(patch: RandomAccess, old: bytes) -> tuple[str, ...] | None:
    """Names of the tensors of `old`, in file order, of which the patch does not take over every byte; None where only
    applying would tell. Raises Malformed; DigestMismatch for another old file."""
    info = inspect_dense(patch)
    if hashlib.sha256(old).digest() != info.header.old_digest:
        raise DigestMismatch("patch: it was made for another old file than this one (the SHA-256 differ)")
    if info.unchanged is None:
        return None
    starts = [start for start, _ in info.unchanged]

    def kept(tensor: StoredTensor) -> bool:
        index = bisect_right(starts, tensor.offset) - 1
        return index >= 0 and info.unchanged is not None and tensor.offset + tensor.size <= info.unchanged[index][1]

    return tuple(tensor.name for tensor in stored_tensors(old) if not kept(tensor))


def _merged(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The ranges in order, those that touch or overlap as one."""
    last: tuple[int, int] | None = None
    for start, end in sorted(ranges):
        if last and start <= last[1]:
            last = last[0], max(last[1], end)
            continue
        if last:
            yield last
        last = start, end
    if last:
        yield last
