"""BSDIFF40 patches: write them, and apply them from a sender that is not believed. The only importer of bsdiff4.

The format is Colin Percival's bsdiff 4 (Naive differences of executable code, 2003): magic, three lengths, then
bz2-compressed control triples, differences and extra bytes; stock `bspatch` applies what is written here.

bsdiff's search wants runs of equal bytes to align two files by. When training moved most weights by a step, there are
few, and its patch grows to the size of the file; yet two versions of equal length hold the same tensors in the same
places. So a second patch with one control triple, old and new byte by byte, is written too, and the smaller one taken.

Applying checks the header before anything is allocated, unpacks each stream to at most what the header and the caller
allow, and checks every control triple against the three streams and the old file before a byte is written.
"""

from __future__ import annotations

import bz2
import io
import struct

import bsdiff4
import bsdiff4.format
import numpy as np

from model_delta.errors import Malformed

_MAGIC = b"BSDIFF40"
_HEADER_BYTES = 32
_TRIPLE_BYTES = 24


def make_patch(old: bytes, new: bytes) -> bytes:
    """A BSDIFF40 patch that turns `old` into `new`. Takes about 17 times the old file's size in memory."""
    searched = bytes(bsdiff4.diff(old, new))
    if not new or len(old) != len(new):
        return searched
    return min(searched, _aligned_patch(old, new), key=len)


def _aligned_patch(old: bytes, new: bytes) -> bytes:
    """The patch of one control triple: all bytes differ from those in the same place."""
    difference = np.frombuffer(new, np.uint8) - np.frombuffer(old, np.uint8)
    written = io.BytesIO()
    control = struct.pack("<qqq", len(new), 0, 0)
    bsdiff4.format.write_patch(written, len(new), control, difference.tobytes(), b"")
    return written.getvalue()


def apply_patch(old: bytes, patch: bytes, size_max: int) -> bytes:
    """The new file, at most `size_max` bytes. The caller checks its digest.

    Raises Malformed for anything that `make_patch` would not have written for this old file's size; memory stays within
    a small multiple of `size_max`, whatever the patch says.
    """
    if len(patch) < _HEADER_BYTES or not patch.startswith(_MAGIC):
        raise Malformed(f"patch: expected BSDIFF40 and a header of {_HEADER_BYTES} bytes, found {len(patch)} bytes")
    control_size, difference_size, new_size = (_length(patch[start : start + 8]) for start in (8, 16, 24))
    if min(control_size, difference_size, new_size) < 0 or control_size + difference_size > len(patch) - _HEADER_BYTES:
        raise Malformed(f"patch: its header's lengths do not fit its {len(patch)} bytes")
    if new_size > size_max:
        raise Malformed(f"patch: expected a new file of at most {size_max} bytes, found {new_size}")
    difference_start = _HEADER_BYTES + control_size
    extra_start = difference_start + difference_size
    control = _unpacked(patch[_HEADER_BYTES:difference_start], _TRIPLE_BYTES * (new_size + 1), "control block")
    difference = _unpacked(patch[difference_start:extra_start], new_size, "difference block")
    extra = _unpacked(patch[extra_start:], new_size, "extra block")
    _check_control(control, len(old), len(difference), len(extra), new_size)
    try:
        return bytes(bsdiff4.core.patch(old, new_size, control, difference, extra))
    except ValueError as error:
        raise Malformed(f"patch: {error}") from None


def _check_control(control: bytes, old_size: int, difference_size: int, extra_size: int, new_size: int) -> None:
    if len(control) % _TRIPLE_BYTES:
        raise Malformed(f"patch: its control block of {len(control)} bytes is not made of triples")
    words = np.frombuffer(control, "<u8").reshape(-1, 3)
    magnitudes = (words & np.uint64(2**63 - 1)).astype(np.int64)
    triples = np.where(words >> np.uint64(63), -magnitudes, magnitudes)  # bsdiff writes sign and magnitude
    added, copied, moved = triples[:, 0], triples[:, 1], triples[:, 2]
    # Bounds first, so that no sum below can overflow.
    limit = new_size + old_size
    if triples.size and (added.min() < 0 or copied.min() < 0 or max(added.max(), copied.max()) > new_size):
        raise Malformed("patch: a control triple has a length outside the new file")
    if triples.size and np.abs(moved).max() > limit:
        raise Malformed("patch: a control triple moves outside the old file")
    if (int(added.sum()), int(copied.sum())) != (
        difference_size,
        extra_size,
    ) or difference_size + extra_size != new_size:
        raise Malformed(
            f"patch: its triples, {difference_size} difference and {extra_size} extra bytes do not make {new_size}"
        )
    ends = np.cumsum(added + moved) - moved
    if ((added > 0) & ((ends - added < 0) | (ends > old_size))).any():
        raise Malformed(f"patch: it reads outside an old file of {old_size} bytes; was it made for another one?")


def _unpacked(data: bytes, size_max: int, what: str) -> bytes:
    unpacker = bz2.BZ2Decompressor()
    try:
        plain = unpacker.decompress(data, size_max + 1)
    except (OSError, ValueError):
        raise Malformed(f"patch: its {what} is damaged") from None
    if len(plain) > size_max:
        raise Malformed(f"patch: its {what} unpacks to more than {size_max} bytes")
    if not unpacker.eof or unpacker.unused_data:
        raise Malformed(f"patch: its {what} is cut off, or bytes follow it")
    return plain


def _length(data: bytes) -> int:
    """A bsdiff integer: 63 bits of magnitude, little endian, and a sign bit."""
    value = int.from_bytes(data, "little")
    return value if value < 1 << 63 else -(value & ((1 << 63) - 1))
