"""A small file as radio frames, any sufficient number of which give it back.

LoRaWAN frames and text messages hold 51 to 222 bytes and get lost one by one. The file is cut into `needed` pieces,
one a frame, and further frames carry parity: a systematic Reed-Solomon code over GF(256) built on a Cauchy matrix
(Bloemer et al., 1995), so that any `needed` different frames of up to 256 rebuild the file, in any order, duplicates
included.

    frame = transfer (2 bytes, CRC-16 of the file) | index (1) | needed (1) | piece
    the pieces joined = length (2 bytes) | CRC-32 (4) | file | zeros

The radio layer's own integrity code drops damaged frames, so a frame is whole or missing. The CRC-32 tells that pieces
of two files were mixed up; whether the file is believed is decided by its signature. Integers are big-endian.
"""

from __future__ import annotations

import binascii
import zlib
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from model_delta.errors import Malformed

HEADER_BYTES = 4
FRAMES_MAX = 256
NEEDED_MAX = 127
TRANSFERS_MAX = 4

_PREFIX_BYTES = 6
Bytes = npt.NDArray[np.uint8]


class Fragments:
    """The frames of one file, each at most `frame_bytes` long.

    `needed` frames suffice; `frame(i)` gives any of the FRAMES_MAX. Raises ValueError when the file needs more than
    NEEDED_MAX frames of that size.
    """

    def __init__(self, blob: bytes, frame_bytes: int) -> None:
        room = frame_bytes - HEADER_BYTES
        self.needed = -(-(len(blob) + _PREFIX_BYTES) // room) if room > 0 else FRAMES_MAX
        if self.needed > NEEDED_MAX:
            raise ValueError(
                f"frames: {len(blob)} bytes need more than {NEEDED_MAX} frames of {frame_bytes} bytes; send it by MQTT"
            )
        self._transfer = binascii.crc_hqx(blob, 0xFFFF)
        size = -(-(len(blob) + _PREFIX_BYTES) // self.needed)  # no longer than they must be
        whole = len(blob).to_bytes(2, "big") + zlib.crc32(blob).to_bytes(4, "big") + blob
        self._pieces = np.frombuffer(whole.ljust(size * self.needed, b"\0"), dtype=np.uint8).reshape(self.needed, size)

    def frame(self, index: int) -> bytes:
        """Frame `index` in [0, FRAMES_MAX): a piece of the file below `needed`, parity from there on."""
        if not 0 <= index < FRAMES_MAX:
            raise ValueError(f"frames: expected an index below {FRAMES_MAX}, found {index}")
        row = _coefficients(index, self.needed)
        piece = bytes(np.bitwise_xor.reduce(_times(row[:, None], self._pieces), axis=0))
        return self._transfer.to_bytes(2, "big") + bytes((index, self.needed)) + piece


class Reassembly:
    """The receiving end. It keeps the frames of at most TRANSFERS_MAX unfinished files and forgets the oldest first."""

    def __init__(self) -> None:
        self._pieces: OrderedDict[tuple[int, int, int], dict[int, Bytes]] = OrderedDict()

    def add(self, frame: bytes) -> bytes | None:
        """Take a frame; return the file when this frame completes it, else None.

        Raises Malformed for a frame without its header, or when the pieces do not give a sound file (all of them are
        then dropped, and the transfer starts anew).
        """
        if len(frame) <= HEADER_BYTES or not 1 <= frame[3] <= NEEDED_MAX:
            raise Malformed(f"frames: expected more than {HEADER_BYTES} bytes with a frame count, found {len(frame)}")
        index, needed, piece = frame[2], frame[3], np.frombuffer(frame, dtype=np.uint8, offset=HEADER_BYTES)
        transfer = (int.from_bytes(frame[:2], "big"), needed, len(piece))
        pieces = self._pieces.setdefault(transfer, {})
        self._pieces.move_to_end(transfer)
        if len(self._pieces) > TRANSFERS_MAX:
            self._pieces.popitem(last=False)
        pieces[index] = piece
        if len(pieces) < needed:
            return None
        del self._pieces[transfer]
        return _joined(pieces, needed)


def _joined(pieces: dict[int, Bytes], needed: int) -> bytes:
    chosen = sorted(pieces)[:needed]
    whole = _solved(
        np.stack([_coefficients(index, needed) for index in chosen]), np.stack([pieces[index] for index in chosen])
    ).tobytes()
    length, check = int.from_bytes(whole[:2], "big"), int.from_bytes(whole[2:6], "big")
    blob = whole[_PREFIX_BYTES : _PREFIX_BYTES + length]
    padding = whole[_PREFIX_BYTES + length :]
    if len(blob) != length or zlib.crc32(blob) != check or any(padding):
        raise Malformed(f"frames: {needed} frames were joined, but they do not give one sound file")
    return blob


def _coefficients(index: int, needed: int) -> Bytes:
    """Row `index` of the generator: the identity, then the Cauchy matrix 1 / (index + column) in GF(256)."""
    if index < needed:
        return np.asarray(np.arange(needed) == index, dtype=np.uint8)
    return np.asarray(_EXP[255 - _LOG[np.arange(needed) ^ index]], dtype=np.uint8)


def _solved(matrix: Bytes, values: Bytes) -> Bytes:
    """The X with matrix X = values over GF(256), by Gauss-Jordan elimination. The matrix is regular by construction."""
    matrix, values = matrix.copy(), values.copy()
    for column in range(len(matrix)):
        pivot = column + int(np.flatnonzero(matrix[column:, column])[0])
        if pivot != column:
            matrix[[column, pivot]], values[[column, pivot]] = matrix[[pivot, column]], values[[pivot, column]]
        inverse = _EXP[255 - _LOG[matrix[column, column]]]
        matrix[column], values[column] = _times(matrix[column], inverse), _times(values[column], inverse)
        factors = matrix[:, column].copy()
        factors[column] = 0
        matrix ^= _times(factors[:, None], matrix[column][None, :])
        values ^= _times(factors[:, None], values[column][None, :])
    return values


def _times(left: Bytes, right: npt.NDArray[np.uint8] | np.uint8) -> Bytes:
    """Element-wise product in GF(256)."""
    product = _EXP[_LOG[left].astype(np.int64) + _LOG[right]]
    return np.where((left == 0) | (right == 0), np.uint8(0), product)


def _tables() -> tuple[Bytes, npt.NDArray[np.int64]]:
    """Powers of the generator 2 modulo x^8 + x^4 + x^3 + x^2 + 1, twice over, and their logarithms."""
    powers, value = [], 1
    for _ in range(255):
        powers.append(value)
        value = (value << 1) ^ (0x11D if value & 0x80 else 0)
    logarithms = np.zeros(256, dtype=np.int64)
    logarithms[powers] = np.arange(255)
    return np.array([*powers, *powers, *powers[:2]], dtype=np.uint8), logarithms


_EXP, _LOG = _tables()
