"""Three parties hold a number so that any two know it and no one does: replicated secret sharing.

x = x0 + x1 + x2 modulo 2^64 (or x0 ^ x1 ^ x2 for bits); party i holds the pair (x_i, x_{i+1}), indices modulo 3
(Araki, Furukawa, Lindell, Nof, Ohara: High-Throughput Semi-Honest Secure Three-Party Computation, CCS 2016). Addition
and public linear maps are local. A product costs one ring element sent per party: the local cross terms are an additive
share of it, a fresh sharing of zero (from keys that pairs of parties have in common) hides them, and each party passes
its term to the one that lacks it.

Code that needs the other two parties is a generator: it yields an `Exchange` (what to send, from whom to expect an
answer in the same step) and is resumed with the answers. No sockets, no clock: a test runs three of them in lock-step.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fl_coordinator.shares.fixed_point import WORD_BYTES, Words
from model_delta.encoding import pack
from model_delta.errors import Untrusted

PARTIES = 3
SEED_BYTES = 32
_LIMB_BITS = 22
_GRAM_BLOCK = 512
_PROJECT_BLOCK = 16_384

T = TypeVar("T")


@dataclass(frozen=True)
class Exchange:
    """One step with the peers: bytes to send by party index, and the indices whose message of this step is needed."""

    step: str
    outgoing: Mapping[int, bytes]
    expected: frozenset[int] = field(default_factory=frozenset)


Steps = Generator[Exchange, Mapping[int, bytes], T]


@dataclass(frozen=True)
class Pair:
    """What one party holds of a shared array: `first` is share i, `second` share i+1; uint64, equal shapes."""

    first: Words
    second: Words

    def __xor__(self, other: Pair) -> Pair:
        return Pair(self.first ^ other.first, self.second ^ other.second)

    def __lshift__(self, places: int) -> Pair:
        return Pair(self.first << np.uint64(places), self.second << np.uint64(places))

    def __rshift__(self, places: int) -> Pair:
        return Pair(self.first >> np.uint64(places), self.second >> np.uint64(places))

    def columns(self, start: int, stop: int) -> Pair:
        """Columns [start, stop) of a two-dimensional shared array."""
        return Pair(self.first[:, start:stop], self.second[:, start:stop])


@dataclass(frozen=True)
class Session:
    """One party's place in one attempt: its index, the parties' names, and a fresh secret with each peer.

    `secrets` maps peer index to 32 bytes that only this party and that peer know. Each step draws its own stream from
    them, so that no mask is ever used twice.
    """

    index: int
    names: tuple[str, str, str]
    secrets: Mapping[int, bytes]

    @property
    def following(self) -> int:
        """The party that holds (x_{i+1}, x_{i+2})."""
        return (self.index + 1) % PARTIES

    @property
    def preceding(self) -> int:
        """The party that holds (x_{i-1}, x_i)."""
        return (self.index - 1) % PARTIES

    @property
    def peers(self) -> frozenset[int]:
        """Both other parties."""
        return frozenset({self.following, self.preceding})

    def key(self, peer: int, purpose: str) -> bytes:
        """32 bytes for `purpose`, the same at `peer`."""
        return HKDF(hashes.SHA256(), SEED_BYTES, None, pack(["atoll mpc", purpose])).derive(self.secrets[peer])

    def mask(self, peer: int, step: str, shape: tuple[int, ...]) -> Words:
        """Pseudo-random words for `step`, the same at `peer` and unknown to the third party."""
        return expand(self.key(peer, step), math.prod(shape)).reshape(shape)

    def zero_bits(self, step: str, shape: tuple[int, ...]) -> Words:
        """This party's share of 0 under exclusive or."""
        return self.mask(self.following, step, shape) ^ self.mask(self.preceding, step, shape)

    def zero_sum(self, step: str, shape: tuple[int, ...]) -> Words:
        """This party's share of 0 under addition modulo 2^64."""
        return self.mask(self.following, step, shape) - self.mask(self.preceding, step, shape)

    def read_words(self, received: Mapping[int, bytes], peer: int, step: str, shape: tuple[int, ...]) -> Words:
        """A peer's message as uint64 words of `shape`. Raises Untrusted, naming the peer, for another length."""
        data, expected = received[peer], WORD_BYTES * math.prod(shape)
        if len(data) != expected:
            raise Untrusted(f"{self.names[peer]}: step {step!r}: expected {expected} bytes, found {len(data)}")
        return np.frombuffer(data, dtype="<u8").reshape(shape)


def expand(seed: bytes, count: int) -> Words:
    """`count` pseudo-random words: the AES-256-CTR key stream of `seed` (32 bytes), counter from 0, little endian.

    A seed must serve one purpose only.
    """
    stream = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(stream.update(bytes(WORD_BYTES * count)), dtype="<u8")


def to_bytes(words: Words) -> bytes:
    """Words on the wire: little endian, row by row."""
    return np.ascontiguousarray(words, dtype="<u8").tobytes()


def conjunction(session: Session, step: str, a: Pair, b: Pair) -> Steps[Pair]:
    """Bitwise a AND b on exclusive-or shares (Araki et al. 2016, section 2.2): one message of their size per party."""
    own = (a.first & b.first) ^ (a.first & b.second) ^ (a.second & b.first) ^ session.zero_bits(step, a.first.shape)
    received = yield Exchange(step, {session.preceding: to_bytes(own)}, frozenset({session.following}))
    return Pair(own, session.read_words(received, session.following, step, own.shape))


def open_bits(session: Session, step: str, shared: Pair) -> Steps[Words]:
    """Reveal an exclusive-or shared array to all three. Each missing share arrives from both peers and is compared.

    Raises Untrusted, naming the two peers, when they disagree.
    """
    outgoing = {session.following: to_bytes(shared.first), session.preceding: to_bytes(shared.second)}
    received = yield Exchange(step, outgoing, session.peers)
    missing = session.read_words(received, session.preceding, step, shared.first.shape)
    again = session.read_words(received, session.following, step, shared.first.shape)
    if not np.array_equal(missing, again):
        names = " and ".join(sorted(session.names[peer] for peer in session.peers))
        raise Untrusted(f"step {step!r}: {names} sent different values for the share they both hold")
    return shared.first ^ shared.second ^ missing


def gram_share(rows: Pair) -> Words:
    """This party's additive share of 2 X X^T modulo 2^64, not yet masked: uint64[n, n] from shares uint64[n, d].

    With M_i = X_i (X_i + 2 X_{i+1})^T the sum over i of M_i + M_i^T is 2 (X_0 + X_1 + X_2)(X_0 + X_1 + X_2)^T: one
    product instead of two. Twice the matrix is opened and halved, so its entries must lie in [-2^62, 2^62).
    """
    product = multiply_transposed(rows.first, rows.first + (rows.second << np.uint64(1)))
    return product + product.T


def multiply_transposed(a: Words, b: Words) -> Words:
    """a b^T modulo 2^64, exactly: uint64[n, m] from uint64[n, d] and uint64[m, d].

    NumPy multiplies integers without BLAS. Here each word is three balanced limbs (22, 22, 20 bits, magnitude at most
    2^21) in float64; of the nine limb products the three above 2^64 vanish. In blocks of 512 columns no sum exceeds
    3 * 512 * 2^42 < 2^53, hence nothing is rounded.
    """
    total = np.zeros((a.shape[0], b.shape[0]), dtype=np.uint64)
    for start in range(0, a.shape[1], _GRAM_BLOCK):
        left = _limbs(a[:, start : start + _GRAM_BLOCK])
        right = _limbs(b[:, start : start + _GRAM_BLOCK])
        for order in range(3):
            x = np.concatenate(left[: order + 1], axis=1)
            y = np.concatenate(right[order::-1], axis=1)
            exact = (x @ y.T).astype(np.int64).view(np.uint64)
            total += exact << np.uint64(_LIMB_BITS * order)
    return total


def project(rows: Words, selectors: Words) -> Words:
    """64 sums of a subset of columns each, modulo 2^64: uint64[n, 64] from uint64[n, d].

    Bit k of `selectors[c]` (uint64[d]) says whether column c belongs to sum k. Words are split into 32-bit halves;
    16,384 of them sum to less than 2^46, exact in float64.
    """
    count = rows.shape[0]
    total = np.zeros((count, 64), dtype=np.uint64)
    for start in range(0, rows.shape[1], _PROJECT_BLOCK):
        block = rows[:, start : start + _PROJECT_BLOCK]
        octets = np.ascontiguousarray(selectors[start : start + _PROJECT_BLOCK], dtype="<u8").view(np.uint8)
        chosen = np.unpackbits(octets.reshape(-1, WORD_BYTES), axis=1, bitorder="little").astype(np.float64)
        halves = np.concatenate([block & np.uint64(0xFFFF_FFFF), block >> np.uint64(32)]).astype(np.float64)
        sums = (halves @ chosen).astype(np.uint64)
        total += sums[:count] + (sums[count:] << np.uint64(32))
    return total


def _limbs(block: Words) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    """Balanced digits in base 2^22, lowest first: float64 of magnitude at most 2^21."""
    half = 1 << (_LIMB_BITS - 1)
    mask = np.uint64((1 << _LIMB_BITS) - 1)
    raised = block + np.uint64(half + (half << _LIMB_BITS) + (1 << 63))
    low = (raised & mask).astype(np.float64) - half
    middle = ((raised >> np.uint64(_LIMB_BITS)) & mask).astype(np.float64) - half
    high = (raised >> np.uint64(2 * _LIMB_BITS)).astype(np.float64) - float(1 << 19)
    return [low, middle, high]
