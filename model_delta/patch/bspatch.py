"""Applies BSDIFF40 patches from a sender that is not believed, in a few MB whatever the model's size.

The format is Colin Percival's bsdiff 4 (Naive differences of executable code, 2003): magic, three lengths, then
three bz2 streams: control triples (add, copy, move), differences, extra bytes. For each triple the new file goes on
with `add` bytes of the old file plus as many differences, then with `copy` extra bytes; then the place in the old file
moves. Integers are 64 bits, little endian, sign and magnitude.

All control triples are checked against the header and the old file's size before a byte is written, so most wrong old
files are refused then (the format has no room for a digest). After that the three streams are unpacked side by side,
64 KiB at a time: three bz2 decoders, 0.4 MB each for the blocks of 100 KB that `bsdiff` writes, at most 3.7 MB each.
"""

from __future__ import annotations

import bz2
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from model_delta.errors import Malformed
from model_delta.patch.access import RandomAccess, ResumedOutput, read_exactly

MAGIC = b"BSDIFF40"
HEADER_BYTES = 32
TRIPLE_BYTES = 24
TRIPLES_MAX = 1 << 24
"""Bounds the time that a hostile control block takes; bsdiff writes at most one for eight new bytes."""

_SIZE_MAX = 1 << 46  # so that no sum of a batch of triples overflows 64 bits
_BATCH_TRIPLES = 2048
_READ_BYTES = 16_384
_PIECE_BYTES = 65_536
_WINDOW_UNIT_BYTES = 100_000

Triples = npt.NDArray[np.int64]


class Layout(NamedTuple):
    """Where the three streams stand in a patch, and how long the new file is."""

    control_start: int
    difference_start: int
    extra_start: int
    end: int
    new_size: int


class Survey(NamedTuple):
    """What the control block says: its number of triples, and how many bytes they add to old ones and copy."""

    triples: int
    added: int
    copied: int


def read_layout(patch: RandomAccess) -> Layout:
    """The checked header of a patch. Raises Malformed; allocates nothing by what the header says."""
    if patch.size < HEADER_BYTES or not (header := patch.pread(0, HEADER_BYTES)).startswith(MAGIC):
        raise Malformed(f"patch: expected BSDIFF40 and a header of {HEADER_BYTES} bytes, found {patch.size} bytes")
    control_size, difference_size, new_size = (_number(header[start : start + 8]) for start in (8, 16, 24))
    if min(control_size, difference_size, new_size) < 0 or control_size + difference_size > patch.size - HEADER_BYTES:
        raise Malformed(f"patch: its header's lengths do not fit its {patch.size} bytes")
    if new_size > _SIZE_MAX:
        raise Malformed(f"patch: expected a new file of at most {_SIZE_MAX} bytes, found {new_size}")
    difference_start = HEADER_BYTES + control_size
    return Layout(HEADER_BYTES, difference_start, difference_start + difference_size, patch.size, new_size)


def survey_patch(patch: RandomAccess, layout: Layout, old_size: int | None = None) -> Survey:
    """Check every control triple against the new file's size, and against the old file's where it is known.

    Raises Malformed for what bsdiff would not have written. Memory: one decoder and a batch of triples.
    """
    new_size, count, added_total, copied_total, position = layout.new_size, 0, 0, 0, 0
    moved_max = new_size + (_SIZE_MAX if old_size is None else old_size)
    for triples in _batches(patch, layout):
        added, copied, moved = triples[:, 0], triples[:, 1], triples[:, 2]
        count += len(triples)
        # Bounds first, so that no sum below can overflow.
        if added.min() < 0 or copied.min() < 0 or max(added.max(), copied.max()) > new_size:
            raise Malformed("patch: a control triple has a length outside the new file")
        if moved.min() < -moved_max or moved.max() > moved_max:
            raise Malformed("patch: a control triple moves outside the old file")
        added_total, copied_total = added_total + int(added.sum()), copied_total + int(copied.sum())
        if added_total + copied_total > new_size:
            raise Malformed(f"patch: its triples make more than the {new_size} bytes of the new file")
        ends = position + np.cumsum(added + moved) - moved
        if old_size is not None and ((added > 0) & ((ends - added < 0) | (ends > old_size))).any():
            raise Malformed(f"patch: it reads outside an old file of {old_size} bytes; was it made for another one?")
        position = int(ends[-1] + moved[-1])
        if abs(position) > moved_max:
            raise Malformed("patch: a control triple moves outside the old file")
    if added_total + copied_total != new_size:
        raise Malformed(
            f"patch: its triples, {added_total} difference and {copied_total} extra bytes do not make {new_size}"
        )
    return Survey(count, added_total, copied_total)


def window_bytes(patch: RandomAccess, layout: Layout) -> int:
    """The largest bz2 block that any of the three streams declares, in bytes; a decoder needs about four times it."""
    starts = (layout.control_start, layout.difference_start, layout.extra_start)
    digits = [patch.pread(start + 3, 1) for start in starts]
    return max((int(digit) for digit in digits if digit.isdigit()), default=0) * _WINDOW_UNIT_BYTES


def apply_stream(old: RandomAccess, patch: RandomAccess, new: BinaryIO, size_max: int, *, done: int = 0) -> int:
    """Write the new file, at most `size_max` bytes, to `new`, and return its size. The caller checks its digest.

    `done`: so many first bytes stand in `new` already (see `ResumedOutput`). Raises Malformed for anything that bsdiff
    would not have written for an old file of this size: before the first byte where header or triples show it, else
    when the damaged place is reached. Memory stays within a few MB, whatever the patch says.
    """
    layout = read_layout(patch)
    if layout.new_size > size_max:
        raise Malformed(f"patch: expected a new file of at most {size_max} bytes, found {layout.new_size}")
    if not 0 <= done <= layout.new_size:
        raise Malformed(f"new file: {done} bytes are written already, the patch makes {layout.new_size}; start again")
    survey_patch(patch, layout, old.size)
    difference = _Stream(patch, layout.difference_start, layout.extra_start, "difference block")
    extra = _Stream(patch, layout.extra_start, layout.end, "extra block")
    output, position = ResumedOutput(new, done), 0
    for triples in _batches(patch, layout):
        for added, copied, moved in triples.tolist():
            for piece in difference.pieces(added):
                before = read_exactly(old, position, len(piece), "old file")
                output.write((np.frombuffer(piece, np.uint8) + np.frombuffer(before, np.uint8)).data)
                position += len(piece)
            for piece in extra.pieces(copied):
                output.write(piece)
            position += moved
    difference.finish()
    extra.finish()
    return output.written


class _Stream:
    """One bz2 stream of a patch, unpacked as it is asked for."""

    def __init__(self, patch: RandomAccess, start: int, end: int, what: str) -> None:
        self._patch, self._position, self._end, self._what = patch, start, end, what
        self._unpacker = bz2.BZ2Decompressor()
        self._total = 0

    def read(self, size: int) -> bytes:
        """At least one and at most `size` bytes; none at the stream's end."""
        while not self._unpacker.eof:
            packed = b""
            if self._unpacker.needs_input:
                packed = self._patch.pread(self._position, min(_READ_BYTES, self._end - self._position))
                if not packed:
                    raise Malformed(f"patch: its {self._what} is cut off, or bytes follow it")
                self._position += len(packed)
            try:
                plain = self._unpacker.decompress(packed, size)
            except (OSError, ValueError):
                raise Malformed(f"patch: its {self._what} is damaged") from None
            if plain:
                self._total += len(plain)
                return plain
        return b""

    def pieces(self, size: int) -> Iterator[bytes]:
        """The next `size` bytes, at most 64 KiB at a time. Raises Malformed when there are fewer."""
        while size:
            piece = self.read(min(size, _PIECE_BYTES))
            if not piece:
                raise Malformed(f"patch: its {self._what} ends after {self._total} bytes, its triples need more")
            size -= len(piece)
            yield piece

    def finish(self) -> None:
        """Raise Malformed unless the stream ends here, and with it its part of the patch."""
        total = self._total
        if self.read(1):
            raise Malformed(f"patch: its {self._what} unpacks to more than {total} bytes")
        if self._unpacker.unused_data or self._position != self._end:
            raise Malformed(f"patch: its {self._what} is cut off, or bytes follow it")


def _batches(patch: RandomAccess, layout: Layout) -> Iterator[Triples]:
    """The control triples int64[n, 3], n from 1 to 2,048."""
    stream = _Stream(patch, layout.control_start, layout.difference_start, "control block")
    count_max, count, left = min(layout.new_size + 1, TRIPLES_MAX), 0, b""
    while piece := stream.read(_BATCH_TRIPLES * TRIPLE_BYTES - len(left)):
        left += piece
        whole = len(left) // TRIPLE_BYTES * TRIPLE_BYTES
        count += whole // TRIPLE_BYTES
        if count > count_max:
            raise Malformed(f"patch: its control block unpacks to more than {count_max} triples")
        if whole:
            yield _signed(np.frombuffer(left[:whole], "<u8").reshape(-1, 3))
            left = left[whole:]
    if left:
        raise Malformed(f"patch: its control block is not made of triples, {len(left)} bytes are left over")
    stream.finish()


def _signed(words: npt.NDArray[Any]) -> Triples:
    magnitudes = (words & np.uint64(2**63 - 1)).astype(np.int64)
    signed: Triples = np.where(words >> np.uint64(63), -magnitudes, magnitudes)
    return signed


def _number(data: bytes) -> int:
    value = int.from_bytes(data, "little")
    return value if value < 1 << 63 else -(value & ((1 << 63) - 1))
