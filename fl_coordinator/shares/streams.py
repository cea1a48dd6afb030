"""Secrets of 32 bytes as strings of words, read from left to right.

A share of an update is as long as the update, and an aggregator holds two for each device: kept in memory, a round of
512 devices and a million parameters would need four gigabytes. So an aggregator keeps the secrets, from which shares
follow (of a share that travelled encrypted: the secret, and the ciphertext wherever it lies), and computes them anew,
some thousand columns at a time, whenever it needs them: AES makes words faster than memory would deliver them.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

SEED_BYTES = 32
WORD_BYTES = 4
COLUMNS = 4_096
"""How many columns of all rows are in memory at a time."""

_SPARE_WORDS = 4  # the cipher wants room for 15 more bytes than it writes

Words = NDArray[np.uint32]
Words64 = NDArray[np.uint64]


class Stored(Protocol):
    """Bytes somewhere else, a span of a file for one, of which parts can be read."""

    def __getitem__(self, part: slice, /) -> bytes: ...

    def read_into(self, start: int, room: memoryview) -> None:
        """Fill `room` with the bytes from `start`."""


Octets = bytes | memoryview | Stored


class Streams(Protocol):
    """Many vectors of one length, uint32, read side by side."""

    def blocks(self, rows: Sequence[int]) -> Iterator[tuple[int, Words]]:
        """(first column, uint32[len(rows), COLUMNS], the last one narrower) from left to right. Valid until the next
        one is asked for; the receiver may change it."""


class Rows(Streams, Protocol):
    """Updates, or shares of them. Where a row was refused nothing may be read."""

    @property
    def length(self) -> int:
        """Words in a row."""

    def origin(self, row: int) -> bytes:
        """What the row follows from: rows are equal where their origins are."""


class SecretRows:
    """Rows that are AES-256-CTR key streams of `secrets`, or what `masked` decrypts to under them.

    Counters start at 0; words are little endian. `masked` are ciphertexts of 4 * length bytes each (None: the key
    stream itself), `labels` what identifies them (their digests).
    """

    def __init__(
        self, length: int, secrets: Sequence[bytes], masked: Sequence[Octets] | None = None, labels: Sequence[str] = ()
    ) -> None:
        self._length = length
        self._secrets = secrets
        self._masked = masked
        self._labels = labels

    @property
    def length(self) -> int:
        """Words in a row."""
        return self._length

    def origin(self, row: int) -> bytes:
        """The secret, and the ciphertext's digest where there is one."""
        return self._secrets[row] + (self._labels[row].encode() if self._masked is not None else b"")

    def blocks(self, rows: Sequence[int]) -> Iterator[tuple[int, Words]]:
        """See `Streams.blocks`."""
        ciphers = [_stream(self._secrets[row]) for row in rows]
        room = np.empty((len(rows), COLUMNS + _SPARE_WORDS), dtype=np.uint32)
        octets = [words.view(np.uint8).data for words in room]
        given = memoryview(bytearray(WORD_BYTES * COLUMNS))  # zeros, unless a file is read into it
        for start in range(0, self._length, COLUMNS):
            width = min(COLUMNS, self._length - start)
            part = given[: WORD_BYTES * width]
            for row, cipher, into in zip(rows, ciphers, octets, strict=True):
                taken = part if self._masked is None else _taken(self._masked[row], WORD_BYTES * start, part)
                cipher.update_into(taken, into)
            yield start, _native(room[:, :width])


def expand(seed: bytes, count: int) -> Words:
    """`count` pseudo-random words uint32, little endian: the AES-256-CTR key stream of `seed` (32 bytes).

    A seed must serve one purpose only.
    """
    return np.frombuffer(_stream(seed).update(bytes(WORD_BYTES * count)), dtype="<u4")


def expand_bytes(seed: bytes, count: int) -> bytes:
    """The first `count` bytes of the same key stream."""
    return _stream(seed).update(bytes(count))


class KeyStream:
    """The key stream of `seed`, taken in pieces. Words are valid until the next piece is asked for: memory that is
    written again costs a fraction of memory that is new."""

    def __init__(self, seed: bytes) -> None:
        self._cipher = _stream(seed)
        self._zeros = memoryview(b"")
        self._room = np.empty(0, dtype=np.uint32)

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        return self._cipher.update(bytes(count))

    def words(self, count: int) -> Words:
        """The next `count` words."""
        if len(self._zeros) < WORD_BYTES * count:
            self._zeros = memoryview(bytes(WORD_BYTES * count))
        return self._through(self._zeros[: WORD_BYTES * count], count)

    def masked(self, words: Words) -> Words:
        """`words` under the next piece of the key stream."""
        return self._through(words.astype("<u4", copy=False).view(np.uint8).data, words.size)

    def _through(self, data: bytes | memoryview, count: int) -> Words:
        if self._room.size < count + _SPARE_WORDS:
            self._room = np.empty(count + _SPARE_WORDS, dtype=np.uint32)
        self._cipher.update_into(data, self._room.view(np.uint8).data)
        return _native(self._room[:count])


class SummedRows:
    """Other rows, of which `total` uint32[length] becomes the sum, modulo 2^32, of those that `blocks` went through.

    To add up words that are in the cache anyway costs less than to make them anew. Rows are asked for once only.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self.total = np.zeros(rows.length, dtype=np.uint32)

    def blocks(self, rows: Sequence[int]) -> Iterator[tuple[int, Words]]:
        """See `Streams.blocks`."""
        for start, block in self._rows.blocks(rows):
            np.add.reduce(block, axis=0, out=self.total[start : start + block.shape[1]])
            yield start, block


def weighted_sum_from(total: Words, summed: Sequence[int], rows: Rows, weights: Mapping[int, int]) -> Words:
    """The same as `weighted_sum` of `weights` by row, all among the rows `summed` in `total`.

    `total` times the most frequent weight is corrected by the rows of another one, which are few where most updates
    are chosen.
    """
    (usual, _), *_ = Counter(weights.get(row, 0) for row in summed).most_common(1)
    differing = [row for row in summed if weights.get(row, 0) != usual]
    corrections = [(weights.get(row, 0) - usual) % (1 << 32) for row in differing]
    corrected: Words = total * np.uint32(usual)
    return corrected + weighted_sum(rows, differing, corrections) if differing else corrected


def weighted_sum(rows: Rows, chosen: Sequence[int], weights: Sequence[int]) -> Words:
    """Sum of weight * row over the chosen rows, modulo 2^32: uint32[length]."""
    total = np.zeros(rows.length, dtype=np.uint32)
    factors = np.array(weights, dtype=np.uint32)[:, None]
    plain = bool((factors == 1).all())
    for start, block in rows.blocks(chosen):
        if not plain:
            np.multiply(block, factors, out=block)
        np.add.reduce(block, axis=0, out=total[start : start + block.shape[1]])
    return total


def _taken(source: Octets, start: int, room: memoryview) -> memoryview:
    """As many bytes from `start` on as there is room for; where they are not in memory, they are read into `room`."""
    if isinstance(source, bytes | memoryview):
        return memoryview(source)[start : start + len(room)]
    source.read_into(start, room)
    return room


def _native(words: Words) -> Words:
    return words if sys.byteorder == "little" else words.byteswap()


def _stream(seed: bytes) -> CipherContext:
    return Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
