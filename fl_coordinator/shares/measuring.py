"""What is computed of each update without the other parties: 48 projections for the check, a sketch for the distances.

Both are linear with coefficients from the joint coin, hence the same on shares as in clear, and both are made in one
pass over the columns. The projections are dense: every coordinate counts in each with -1, 0, 0 or 1. The sketch is a
count sketch (Charikar, Chen, Farach-Colton, 2002) that suits memory: the vector is cut into blocks of k = 1,024; every
coordinate gets a random sign, and in each of two copies each block another sign and a random rotation, and the blocks
are added up. The inner product of two sketches, over the number of copies, estimates that of the vectors without bias
and with variance at most 2 |x|^2 |y|^2 / (2 k): coordinates of one block never meet, those of two blocks meet with
probability 1/k, and products of different pairs have independent signs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fl_coordinator.shares.bounds import BUCKETS, PROJECTIONS, Bounds
from fl_coordinator.shares.streams import COLUMNS, SEED_BYTES, KeyStream, Streams, Words, expand, expand_bytes
from model_delta.encoding import pack

_OCTETS = PROJECTIONS // 4


def _ternary_table() -> NDArray[np.uint64]:
    octets = np.arange(1 << 16, dtype="<u2").view(np.uint8).reshape(-1, 2)
    bits = np.unpackbits(octets, axis=1, bitorder="little").astype(np.int8)
    return np.ascontiguousarray(bits[:, 0::2] - bits[:, 1::2]).view(np.uint64).reshape(-1)


_TERNARY = _ternary_table()
"""Coefficients of eight projections, one a byte, by two octets: the difference of two bits each."""


@dataclass(frozen=True)
class Measured:
    """`projections` uint32[n, 48]; `sketch` uint32[n, w], or the vectors themselves where distances are exact."""

    projections: Words
    sketch: Words

    @property
    def joined(self) -> Words:
        """Side by side, uint32[n, 48 + w]."""
        return np.concatenate([self.projections, self.sketch], axis=1)


class Coefficients:
    """The public coefficients of one round, from its coin (32 bytes)."""

    def __init__(self, coin: bytes, length: int, bounds: Bounds) -> None:
        self._length = length
        self._copies = bounds.copies
        self._seed = coin_key(coin, "projections")
        if self._copies:
            blocks = -(-length // BUCKETS)
            random = np.frombuffer(expand_bytes(coin_key(coin, "signs"), -(-length // 8)), dtype=np.uint8)
            bits = np.unpackbits(random, bitorder="little")[:length].astype(np.uint32)
            self._signs = (bits << np.uint32(1)) - np.uint32(1)
            turns = expand(coin_key(coin, "rotations"), self._copies * blocks).reshape(self._copies, blocks)
            self._offsets: list[list[int]] = (turns % np.uint32(BUCKETS)).tolist()
            self._added: list[list[int]] = (turns >> np.uint32(31)).tolist()
        self.width = self._copies * BUCKETS if self._copies else length

    def ternary(self) -> NDArray[np.float64]:
        """All coefficients of the projections, -1, 0 or 1, float64[d, 64]; for small d."""
        return _coefficients(expand_bytes(self._seed, _OCTETS * self._length))

    def measure(self, *wanted: tuple[Streams, Sequence[int]]) -> list[Measured]:
        """Projections and sketches, modulo 2^32, of the chosen ones of some rows, in one pass over all of them."""
        streams = [rows.blocks(chosen) for rows, chosen in wanted]
        ends = np.cumsum([0, *(len(chosen) for _, chosen in wanted)]).tolist()
        spans = [slice(*pair) for pair in pairwise(ends)]
        sums = np.zeros((ends[-1], PROJECTIONS))
        sketches = [np.zeros((len(chosen), self.width), dtype=np.uint32) for _, chosen in wanted]
        # Memory that is written again costs a fraction of memory that is new.
        drawn, room, reals = KeyStream(self._seed), np.empty((COLUMNS, PROJECTIONS)), np.empty(ends[-1] * COLUMNS)
        for start in range(0, self._length, COLUMNS):
            width = min(COLUMNS, self._length - start)
            real = reals[: ends[-1] * width].reshape(-1, width)
            for stream, span, sketch in zip(streams, spans, sketches, strict=True):
                _, block = next(stream)
                np.copyto(real[span], block.view(np.int32))
                self._add_to_sketch(sketch, block, start)
            # Magnitudes up to 2^31 in at most 2^12 columns: each product is below 2^43, and 512 of them below 2^52.
            sums += real @ _coefficients(drawn.take(_OCTETS * width), room)
            if start // COLUMNS % 512 == 511:
                sums = _reduced(sums)
        projections = _reduced(sums).astype(np.int64).astype(np.uint32)
        return [Measured(projections[span], sketch) for span, sketch in zip(spans, sketches, strict=True)]

    def sketch_exact(self, vector: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sketch of one vector of integers, int64[d], over the integers: int64[w]."""
        if not self._copies:
            return vector
        sketch = np.zeros((self._copies, BUCKETS), dtype=np.int64)
        signed = vector * self._signs.view(np.int32)
        for block in range(-(-self._length // BUCKETS)):
            part = np.zeros(BUCKETS, dtype=np.int64)
            given = signed[block * BUCKETS : (block + 1) * BUCKETS]
            part[: given.size] = given
            for copy in range(self._copies):
                turned = np.roll(part, -self._offsets[copy][block])
                sketch[copy] += turned if self._added[copy][block] else -turned
        return sketch.reshape(-1)

    def _add_to_sketch(self, sketch: Words, words: Words, start: int) -> None:
        """Add the columns from `start` on to a sketch; `words` are changed."""
        if not self._copies:
            sketch[:, start : start + words.shape[1]] = words
            return
        np.multiply(words, self._signs[start : start + words.shape[1]], out=words)
        for column in range(0, words.shape[1], BUCKETS):
            signed = words[:, column : column + BUCKETS]
            block = (start + column) // BUCKETS
            for copy in range(self._copies):
                combine = np.add if self._added[copy][block] else np.subtract
                own = sketch[:, copy * BUCKETS : (copy + 1) * BUCKETS]
                turn, size = self._offsets[copy][block], signed.shape[1]
                if size > turn:
                    combine(own[:, : size - turn], signed[:, turn:], out=own[:, : size - turn])
                low = own[:, BUCKETS - turn : BUCKETS - turn + min(turn, size)]
                combine(low, signed[:, : min(turn, size)], out=low)


def _coefficients(octets: bytes, room: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    """Coefficients float64[d, 64] from 16 octets for each coordinate, in `room` if that is given."""
    drawn = np.take(_TERNARY, np.frombuffer(octets, dtype="<u2")).view(np.int8).reshape(-1, PROJECTIONS)
    if room is None:
        return drawn.astype(np.float64)
    np.copyto(room[: len(drawn)], drawn)
    return room[: len(drawn)]


def _reduced(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same modulo 2^32, exactly, in [-2^31, 2^31]."""
    return sums - 2.0**32 * np.rint(sums * 2.0**-32)


def coin_key(coin: bytes, purpose: str) -> bytes:
    """32 public bytes of a round for one purpose, from its coin."""
    return HKDF(hashes.SHA256(), SEED_BYTES, None, pack(["atoll coin", purpose])).derive(coin)
