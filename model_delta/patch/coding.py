"""How differences between two versions become few bytes: pure coders for dense patches. The only importer of brotli.

Three coders, all plain NumPy in both directions:

- *Positions*: which of `universe` places are marked. Gaps between marks are split at bit `shift` (R. F. Rice, 1979):
  the low bits as they are, the rest in unary. The shift is the one that makes the two shortest together; when marks
  fall independently the unary bits are then nearly balanced, which costs about 0.5 % over the entropy of the marks.
- *Steps*: small signed bytes of which most are zero: where they are not zero, their signs, which of those are larger
  than one, which of those than two, and so on: one set of positions a level. Each level is coded with its own density.
- *Planes*: numbers of 2 or 4 bytes as differences of their ranks (for floats the order of their bits is the order of
  their values, so that a step of one unit in the last place is 1 everywhere), divided by their greatest common divisor,
  sign moved to the lowest bit, the first bytes of all, then the second ones, and so on: what is noise and what is
  constant then stand apart. Where a byte's border would cut through the digits that carry information, the lowest four
  bits go first, so that the border moves.

What these leave goes through brotli (RFC 7932) where that makes it shorter. A sender is not believed: the window a
stream asks for is read before a decoder is given a byte of it, and no output is longer than its declared length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import brotli
import numpy as np
import numpy.typing as npt

from model_delta.errors import Malformed

Bytes = npt.NDArray[np.uint8]
Places = npt.NDArray[np.int64]

WINDOW_BITS_MIN, WINDOW_BITS_MAX = 10, 18
SHIFT_MAX = 24
MARKS_MAX = 16_384
"""Marks in one set of positions: what is unpacked for them stays below a megabyte."""
UNARY_BITS_MAX = 1 << 19
LEVELS_MAX = 8
_SAMPLES = 16_384
_PIECE_BYTES = 65_536
_NOISE_BITS = 7.97
"""Bits per byte from which on brotli is not even tried."""
_BEST_BYTES_MAX = 1 << 15
"""Longer streams get a faster setting of brotli: on streams without order it finds nothing more, only slower."""


class Parts(NamedTuple):
    """What a coder made: small numbers for the control stream, and bytes for the streams of each kind."""

    control: list[int]
    unary: bytes
    low: bytes
    signs: bytes
    rest: bytes


class Source:
    """One stream's bytes, taken from the front. Raises Malformed where it ends too early."""

    def __init__(self, data: bytes, what: str) -> None:
        self._data, self._what, self._at = data, what, 0

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        if size > len(self._data) - self._at:
            raise Malformed(
                f"patch: expected {size} more bytes of its {self._what}, found {len(self._data) - self._at}"
            )
        taken = self._data[self._at : self._at + size]
        self._at += size
        return taken

    def peek(self, size: int) -> bytes:
        """At most the next `size` bytes, without taking them."""
        return self._data[self._at : self._at + size]

    def number(self) -> int:
        """The next varint: seven bits a byte, lowest first, top bit when more follow; below 2**63, shortest."""
        value = 0
        for shift in range(0, 63, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if byte == 0 and shift:
                    break
                return value
        raise Malformed(f"patch: a number in its {self._what} is not in its shortest form")

    def close(self) -> None:
        """Raise Malformed unless everything was taken."""
        if self._at != len(self._data):
            raise Malformed(f"patch: {len(self._data) - self._at} bytes of its {self._what} are left over")


def varint(value: int) -> bytes:
    """`value` >= 0 as `Source.number` reads it."""
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)


def entropy_bits(data: Bytes) -> float:
    """Order-0 entropy of bytes: bits of all of them together."""
    counts = np.bincount(data, minlength=256)
    counts = counts[counts > 0]
    return float(len(data) * np.log2(len(data)) - (counts * np.log2(counts)).sum()) if len(data) else 0.0


def sampled(data: Bytes) -> Bytes:
    """About 16,384 of the bytes, evenly: enough for a histogram."""
    return data[:: max(len(data) // _SAMPLES, 1)]


def prefix_bits(data: Bytes) -> float:
    """About what a prefix code takes for each byte on average, in bits; long runs of one byte are folded."""
    some = sampled(data)
    if not len(some):
        return 0.0
    counts = np.bincount(some, minlength=256)
    shares = counts[counts > 0] / len(some)
    lengths = -np.log2(shares)
    return float(min((shares * np.maximum(lengths, 1)).sum(), 3 * (shares * lengths).sum()))


def marks_bits(marked: int, universe: int) -> float:
    """Order-0 entropy of a set of `marked` places out of `universe`, in bits."""
    if not 0 < marked < universe:
        return 0.0
    share = marked / universe
    return -universe * float(share * np.log2(share) + (1 - share) * np.log2(1 - share))


# Streams


def squeezed(data: bytes, window_bits: int) -> bytes:
    """`data` as a brotli stream, or as it is when that is not shorter."""
    some = sampled(np.frombuffer(data, np.uint8))
    if len(data) < 16 or (len(some) >= _SAMPLES and entropy_bits(some) > _NOISE_BITS * len(some)):
        return data
    quality = 11 if len(data) <= _BEST_BYTES_MAX else 5
    packed = bytes(brotli.compress(data, quality=quality, lgwin=window_bits))
    return min(data, packed, key=len)  # equally long: as it is, since that is how a reader takes it


def unsqueezed(coded: bytes, size: int, window_bits: int, what: str) -> bytes:
    """The `size` bytes that `squeezed` was given. Raises Malformed for a stream that is damaged, makes another number
    of bytes or asks for a window of more than 2**`window_bits`; allocates at most that, `size` and 256 KB more."""
    if len(coded) == size:
        return coded
    needed = window_of(coded, what)
    if needed > window_bits:
        raise Malformed(f"patch: its {what} asks for a window of 2**{needed} bytes, its header allows 2**{window_bits}")
    unpacker = brotli.Decompressor()
    try:
        plain = bytes(unpacker.process(coded, output_buffer_limit=size + 1))
        # An empty last block may still be waiting when the output is complete.
        if not unpacker.is_finished() and len(plain) <= size:
            plain += bytes(unpacker.process(b"", output_buffer_limit=size + 1 - len(plain)))
    except brotli.error:
        raise Malformed(f"patch: its {what} is damaged") from None
    if len(plain) != size or not unpacker.is_finished():
        raise Malformed(f"patch: expected {size} bytes of {what}, found another number or a stream cut off")
    return plain


def squeezed_whole(data: bytes, window_bits: int) -> bytes:
    """`data` of any size as one brotli stream."""
    quality = 11 if len(data) <= 1 << 20 else 9 if len(data) <= 1 << 25 else 5
    return bytes(brotli.compress(data, quality=quality, lgwin=window_bits))


def unsqueezed_pieces(coded: Iterator[bytes], size: int, window_bits: int, what: str) -> Iterator[bytes]:
    """The `size` bytes of a brotli stream that comes in pieces. Raises Malformed as `unsqueezed` does; memory is the
    window's and that of a piece."""
    unpacker, left = brotli.Decompressor(), size
    for number, piece in enumerate(coded):
        if not number and (needed := window_of(piece, what)) > window_bits:
            raise Malformed(f"patch: its {what} asks for a window of 2**{needed} bytes, allowed are 2**{window_bits}")
        if unpacker.is_finished():
            raise Malformed(f"patch: bytes follow its {what}")
        while True:
            try:
                plain = bytes(unpacker.process(piece, output_buffer_limit=_PIECE_BYTES))
            except brotli.error:
                raise Malformed(f"patch: its {what} is damaged, or bytes follow it") from None
            left -= len(plain)
            if left < 0:
                raise Malformed(f"patch: its {what} unpacks to more than {size} bytes")
            if plain:
                yield plain
            if unpacker.can_accept_more_data() or unpacker.is_finished():
                break
            piece = b""
    if left or not unpacker.is_finished():
        raise Malformed(f"patch: expected {size} bytes of {what}, it is cut off")


def window_of(stream: bytes, what: str) -> int:
    """The window's size as a power of two that a brotli stream declares (RFC 7932 section 9.1, WBITS)."""
    first = stream[0] if stream else 0x11
    if not first & 1:
        return 16
    upper, lower = first >> 1 & 7, first >> 4 & 7
    if upper:
        return 17 + upper
    if lower == 1:
        raise Malformed(f"patch: its {what} is no brotli stream")
    return 8 + lower if lower else 17


# Positions


def write_positions(places: Places, universe: int) -> tuple[int, bytes, bytes]:
    """Strictly rising `places` in [0, universe), 1 to MARKS_MAX of them, as (shift, unary bytes, low bytes)."""
    gaps = np.diff(places, prepend=-1) - 1
    count = len(places)
    guess = _shift_guess(count, universe)
    shift = min(range(max(guess - 5, 0), guess + 1), key=lambda bits: count * bits + int((gaps >> bits).sum()))
    quotients = gaps >> shift
    ends = np.cumsum(quotients + 1)
    unary = np.zeros(int(ends[-1]), np.uint8)
    unary[ends - 1] = 1
    low = np.unpackbits(gaps.astype("<u4").view(np.uint8).reshape(count, 4), axis=1, bitorder="little")[:, :shift]
    return shift, np.packbits(unary, bitorder="little").tobytes(), np.packbits(low, bitorder="little").tobytes()


def read_positions(count: int, universe: int, shift: int, unary: Source, low: Source) -> Places:
    """The places that `write_positions` was given. Raises Malformed for a set that does not fit, before allocating."""
    bits_max = count + (universe >> shift)
    if not 0 < count <= min(universe, MARKS_MAX) or not 0 <= shift <= SHIFT_MAX or bits_max > UNARY_BITS_MAX:
        raise Malformed(f"patch: {count} marks in {universe} places with a shift of {shift} are outside the limits")
    ahead = np.frombuffer(unary.peek(-(-bits_max // 8)), np.uint8)
    ends = np.flatnonzero(np.unpackbits(ahead, bitorder="little"))[:count]
    if len(ends) < count:
        raise Malformed(f"patch: expected {count} marks in its unary stream, found {len(ends)}")
    unary.take(int(ends[-1]) // 8 + 1)
    gaps: Places = (np.diff(ends, prepend=-1) - 1) << shift
    if shift:
        packed = np.frombuffer(low.take(-(-count * shift // 8)), np.uint8)
        bits = np.unpackbits(packed, count=count * shift, bitorder="little").reshape(count, shift)
        octets = np.packbits(bits, axis=1, bitorder="little").astype(np.int64)
        for octet in range(octets.shape[1]):
            gaps += octets[:, octet] << (8 * octet)
    places: Places = np.cumsum(gaps + 1) - 1
    if places[-1] >= universe:
        raise Malformed(f"patch: a mark lies at {places[-1]}, outside its {universe} places")
    return places


def _shift_guess(count: int, universe: int) -> int:
    return min(max(universe // count, 1).bit_length(), SHIFT_MAX - 1)


# Steps


def write_steps(places: Places, steps: Bytes, universe: int) -> Parts:
    """The bytes `steps` (as two's complement, none zero) at `places` of `universe` bytes that are otherwise zero."""
    signed = steps.view(np.int8).astype(np.int16)
    sizes = np.abs(signed)
    control: list[int] = []
    unary, low = [], []
    marked, size = places, universe
    for level in range(1, LEVELS_MAX + 1):
        if not len(marked):
            break
        shift, unary_bytes, low_bytes = write_positions(marked, size)
        control += [len(marked), shift]
        unary.append(unary_bytes)
        low.append(low_bytes)
        sizes = sizes if level == 1 else sizes[marked]
        marked, size = np.flatnonzero(sizes > level), len(sizes)
    rest = (sizes - LEVELS_MAX).astype(np.uint8).tobytes() if len(control) == 2 * LEVELS_MAX else b""
    if len(control) < 2 * LEVELS_MAX:
        control.append(0)
    signs = np.packbits(signed < 0, bitorder="little").tobytes()
    return Parts(control, b"".join(unary), b"".join(low), signs, rest)


def read_steps(
    universe: int, control: Source, unary: Source, low: Source, signs: Source, rest: Source
) -> tuple[Places, Bytes]:
    """The places and steps that `write_steps` was given. Raises Malformed."""
    size, places, sizes = universe, np.zeros(0, np.int64), np.zeros(0, np.uint8)
    active: Places = places
    for level in range(1, LEVELS_MAX + 1):
        count = control.number()
        if not count:
            break
        marked = read_positions(count, size, control.number(), unary, low)
        size = count
        if level == 1:
            places, sizes, active = marked, np.ones(count, np.uint8), np.arange(count)
        else:
            active = active[marked]
            sizes[active] += np.uint8(1)
    else:
        sizes[active] += np.frombuffer(rest.take(len(active)), np.uint8)
    negative = np.unpackbits(
        np.frombuffer(signs.take(-(-len(places) // 8)), np.uint8), count=len(places), bitorder="little"
    )
    return places, np.where(negative.astype(bool), np.uint8(0) - sizes, sizes)


# Planes


class Planes(NamedTuple):
    """Differences of numbers: their divisor, their lowest four bits two a byte (empty when these did not go first), and
    one byte string for each byte of the number, lowest first."""

    divisor: int
    nibbles: bytes
    octets: list[bytes]


def write_planes(old: Bytes, new: Bytes, width: int, *, floats: bool) -> Planes:
    """The numbers in `new` against those in `old`, both little endian, `width` (2 or 4) bytes each, equally many."""
    before, after = _ranks(old.tobytes(), width, floats=floats), _ranks(new.tobytes(), width, floats=floats)
    steps = (after - before).view(before.dtype.str.replace("u", "i"))
    divisor = int(np.gcd.reduce(np.abs(steps.astype(np.int64)))) if len(steps) > 8 else 1
    if divisor > 1:
        steps = (steps.astype(np.int64) // divisor).astype(steps.dtype)
    folded = ((steps << 1) ^ (steps >> (8 * width - 1))).view(before.dtype)
    whole, cut = _octets(folded), _octets(folded >> before.dtype.type(4))
    if sum(map(prefix_bits, cut)) + 4 >= sum(map(prefix_bits, whole)):
        return Planes(max(divisor, 1), b"", [octets.tobytes() for octets in whole])
    low = np.zeros(len(folded) + len(folded) % 2, np.uint8)
    low[: len(folded)] = folded & before.dtype.type(15)
    return Planes(max(divisor, 1), (low[::2] | low[1::2] << 4).tobytes(), [octets.tobytes() for octets in cut])


def read_planes(old: bytes, planes: Planes, *, floats: bool) -> bytes:
    """The numbers that `write_planes` was given as `new`; arithmetic wraps around, so any input gives some bytes."""
    width = len(planes.octets)
    before = _ranks(old, width, floats=floats)
    octets = np.empty((len(before), width), np.uint8)
    for plane, data in enumerate(planes.octets):
        octets[:, plane] = np.frombuffer(data, np.uint8)
    folded = octets.view(before.dtype).reshape(-1)
    if planes.nibbles:
        pairs = np.frombuffer(planes.nibbles, np.uint8)
        folded <<= before.dtype.type(4)
        folded[::2] |= pairs[: len(folded[::2])] & np.uint8(15)
        folded[1::2] |= pairs[: len(folded[1::2])] >> np.uint8(4)
    one = before.dtype.type(1)
    steps = (folded >> one) ^ (before.dtype.type(0) - (folded & one))
    if planes.divisor != 1:
        steps *= before.dtype.type(planes.divisor)
    return _unranked(before + steps, floats=floats)


def _octets(folded: npt.NDArray[np.unsignedinteger]) -> list[Bytes]:
    width = folded.dtype.itemsize
    columns = folded.view(np.uint8).reshape(-1, width)
    return [columns[:, octet] for octet in range(width)]


def _ranks(data: bytes, width: int, *, floats: bool) -> npt.NDArray[np.unsignedinteger]:
    """The numbers' places in their order, as unsigned integers that wrap; equal for equal bits."""
    bits = np.frombuffer(data, f"<u{width}")
    if not floats:
        return bits
    top = bits.dtype.type(1 << (8 * width - 1))
    return np.where(bits & top, bits ^ (top - bits.dtype.type(1)), bits)


def _unranked(ranks: npt.NDArray[np.unsignedinteger], *, floats: bool) -> bytes:
    if not floats:
        return ranks.tobytes()
    top = ranks.dtype.type(1 << (8 * ranks.dtype.itemsize - 1))
    return np.where(ranks & top, ranks ^ (top - ranks.dtype.type(1)), ranks).tobytes()
