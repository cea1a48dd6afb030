"""Three parties hold a number so that any two know it and no one does: replicated secret sharing.

x = x0 + x1 + x2 modulo 2^32 or 2^64 (or x0 ^ x1 ^ x2 for bits); party i holds the pair (x_i, x_{i+1}), indices modulo 3
(Araki, Furukawa, Lindell, Nof, Ohara: High-Throughput Semi-Honest Secure Three-Party Computation, CCS 2016). Addition
and public linear maps are local. A product costs one ring element sent per party: the local cross terms are an additive
share of it, a fresh sharing of zero (from keys that pairs of parties have in common) hides them, and each party passes
its term to the one that lacks it. The ring is that of the words' type.

Code that needs the other two parties is a generator: it yields an `Exchange` (what to send, from whom to expect an
answer in the same step) and is resumed with the answers. No sockets, no clock: a test runs three of them in lock-step.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fl_coordinator.shares.streams import SEED_BYTES, expand_bytes
from model_delta.encoding import pack
from model_delta.errors import Untrusted

PARTIES = 3

T = TypeVar("T")
Ring = NDArray[np.unsignedinteger[Any]]
"""uint32 or uint64: the type says modulo what."""


@dataclass(frozen=True)
class Exchange:
    """One step with the peers: bytes to send by party index, and the indices whose message of this step is needed."""

    step: str
    outgoing: Mapping[int, bytes]
    expected: frozenset[int] = field(default_factory=frozenset)


Steps = Generator[Exchange, Mapping[int, bytes], T]


@dataclass(frozen=True)
class Pair:
    """What one party holds of a shared array: `first` is share i, `second` share i+1; equal shapes and types."""

    first: Ring
    second: Ring

    def __xor__(self, other: Pair) -> Pair:
        return Pair(self.first ^ other.first, self.second ^ other.second)

    def __and__(self, public: Any) -> Pair:
        """With bits that everybody knows."""
        return Pair(self.first & public, self.second & public)

    def __lshift__(self, places: int) -> Pair:
        by = self.first.dtype.type(places)
        return Pair(self.first << by, self.second << by)

    def __rshift__(self, places: int) -> Pair:
        by = self.first.dtype.type(places)
        return Pair(self.first >> by, self.second >> by)

    def rows(self, chosen: NDArray[np.bool_]) -> Pair:
        """Some rows of a shared array."""
        return Pair(self.first[chosen], self.second[chosen])

    def columns(self, start: int, stop: int | None) -> Pair:
        """Columns [start, stop) of a two-dimensional shared array, or all from `start` on."""
        return Pair(self.first[:, start:stop], self.second[:, start:stop])


@dataclass(frozen=True)
class Session:
    """One party's place in one attempt: its index, the parties' names, and a fresh secret with each peer.

    `secrets` maps peer index to 32 bytes that only this party and that peer know. Each step draws its own stream from
    them; one that draws it again, which would use a mask twice or toss a known coin, is a mistake and raises
    RuntimeError.
    """

    index: int
    names: tuple[str, str, str]
    secrets: Mapping[int, bytes]
    _drawn: set[tuple[int, str]] = field(default_factory=set, init=False, repr=False)

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

    def mask(self, peer: int, step: str, like: Ring) -> Ring:
        """Pseudo-random words for `step`, shaped as `like`, the same at `peer` and unknown to the third party."""
        if (peer, step) in self._drawn:
            raise RuntimeError(f"the mask of step {step!r} with party {peer} was drawn before")
        self._drawn.add((peer, step))
        words: Ring = np.frombuffer(expand_bytes(self.key(peer, step), like.nbytes), _little(like)).reshape(like.shape)
        return words

    def zero_bits(self, step: str, like: Ring) -> Ring:
        """This party's share of 0 under exclusive or."""
        return self.mask(self.following, step, like) ^ self.mask(self.preceding, step, like)

    def zero_sum(self, step: str, like: Ring) -> Ring:
        """This party's share of 0 under addition in the ring of `like`."""
        return self.mask(self.following, step, like) - self.mask(self.preceding, step, like)

    def random(self, step: str, like: Ring) -> Pair:
        """Shares of random words that nobody knows, shaped as `like`; no message. Each share follows from the secret of
        its two holders (Cramer, Damgard, Ishai, TCC 2005)."""
        return Pair(self.mask(self.preceding, step, like), self.mask(self.following, step, like))

    def read_words(self, received: Mapping[int, bytes], peer: int, step: str, like: Ring) -> Ring:
        """A peer's message as words shaped as `like`. Raises Untrusted, naming the peer, for another length."""
        data, expected = received[peer], like.itemsize * math.prod(like.shape)
        if len(data) != expected:
            raise Untrusted(f"{self.names[peer]}: step {step!r}: expected {expected} bytes, found {len(data)}")
        words: Ring = np.frombuffer(data, dtype=_little(like)).reshape(like.shape)
        return words


def to_bytes(words: Ring) -> bytes:
    """Words on the wire: little endian, row by row."""
    return np.ascontiguousarray(words, dtype=_little(words)).tobytes()


def reshare(session: Session, step: str, own: Ring) -> Steps[Pair]:
    """Replicated shares of the sum of all parties' `own`: one message of its size per party."""
    masked = own + session.zero_sum(step, own)
    received = yield Exchange(step, {session.preceding: to_bytes(masked)}, frozenset({session.following}))
    return Pair(masked, session.read_words(received, session.following, step, masked))


def conjunction(session: Session, step: str, a: Pair, b: Pair) -> Steps[Pair]:
    """Bitwise a AND b on exclusive-or shares (Araki et al. 2016, section 2.2): one message of their size per party."""
    own = (a.first & b.first) ^ (a.first & b.second) ^ (a.second & b.first) ^ session.zero_bits(step, a.first)
    received = yield Exchange(step, {session.preceding: to_bytes(own)}, frozenset({session.following}))
    return Pair(own, session.read_words(received, session.following, step, own))


def open_bits(session: Session, step: str, shared: Pair) -> Steps[Ring]:
    """Reveal an exclusive-or shared array to all three. Each missing share arrives from both peers and is compared.

    Raises Untrusted, naming the two peers, when they disagree.
    """
    outgoing = {session.following: to_bytes(shared.first), session.preceding: to_bytes(shared.second)}
    received = yield Exchange(step, outgoing, session.peers)
    missing = session.read_words(received, session.preceding, step, shared.first)
    again = session.read_words(received, session.following, step, shared.first)
    if not np.array_equal(missing, again):
        raise _different(session, step)
    return shared.first ^ shared.second ^ missing


def missing_share(session: Session, step: str, shared: Pair) -> Steps[Ring]:
    """The share that this party lacks, so that all three can reveal an array: from the preceding party as it is, from
    the following one its digest. For what is too long to be sent twice.

    Raises Untrusted, naming the two peers, when they disagree.
    """
    outgoing = {session.following: to_bytes(shared.first), session.preceding: _digest(step, to_bytes(shared.second))}
    received = yield Exchange(step, outgoing, session.peers)
    missing = session.read_words(received, session.preceding, step, shared.first)
    if _digest(step, received[session.preceding]) != received[session.following]:
        raise _different(session, step)
    return missing


def are_zero_bits(session: Session, step: str, shared: Pair) -> Steps[bool]:
    """Whether all words of an exclusive-or shared array are zero. None is opened: zero means that the share which a
    party lacks is what its two are together, and the peers have the digest of that."""
    return (yield from _is_lacking(session, step, shared, shared.first ^ shared.second))


def are_zero(session: Session, step: str, shared: Pair, public: bytes = b"") -> Steps[bool]:
    """The same of an additively shared array, and whether all three have the same `public` bytes. (Numbers that are
    added to shares stand on one, which a party that lacks it has from another's numbers.)"""
    return (yield from _is_lacking(session, step, shared, -(shared.first + shared.second), public))


def _is_lacking(session: Session, step: str, shared: Pair, lacking: Ring, public: bytes = b"") -> Steps[bool]:
    expected, first, second = (
        _digest(step, public + to_bytes(words)) for words in (lacking, shared.first, shared.second)
    )
    outgoing = {session.following: first, session.preceding: second}
    received = yield Exchange(step, outgoing, session.peers)
    return all(hmac.compare_digest(received[peer], expected) for peer in session.peers)


def toss(session: Session, step: str) -> Steps[bytes]:
    """32 random bytes that nobody could know before both other parties have come to this step, hence had all that they
    need for the steps before it. No commitments: the shares lay ready since the attempt began, each at two parties.

    A share alone would come too early: of its two holders one may have nothing to wait for from the third party, who
    would know the coin with a message still to send. So two random words are opened: what a party lacks of one it has
    from the preceding party, of the other from the following one, and from the other of the two the digest.

    Raises Untrusted, naming a peer for a message of another length, the two when they disagree.
    """
    like = np.zeros(SEED_BYTES // 8, dtype=np.uint64)
    names = (step, f"{step}-after")
    one, other = (session.random(name, like) for name in names)
    outgoing = {
        session.following: to_bytes(one.first) + _digest(names[1], to_bytes(other.first)),
        session.preceding: to_bytes(other.second) + _digest(names[0], to_bytes(one.second)),
    }
    received = yield Exchange(step, outgoing, session.peers)
    lacking, digests = [], []
    for peer in (session.preceding, session.following):
        data = received[peer]
        if len(data) != 2 * SEED_BYTES:
            raise Untrusted(f"{session.names[peer]}: step {step!r}: expected {2 * SEED_BYTES} bytes, found {len(data)}")
        lacking.append(data[:SEED_BYTES])
        digests.append(data[SEED_BYTES:])
    if [_digest(name, data) for name, data in zip(names, lacking, strict=True)] != digests[::-1]:
        raise _different(session, step)
    words = one.first ^ one.second ^ other.first ^ other.second
    for data in lacking:
        words = words ^ np.frombuffer(data, dtype=_little(like))
    return to_bytes(words)


def beside(a: Pair, b: Pair) -> Pair:
    """Two shared arrays of as many rows, side by side."""
    return Pair(np.concatenate([a.first, b.first], axis=1), np.concatenate([a.second, b.second], axis=1))


def plus_public(session: Session, shared: Pair, public: Any) -> Pair:
    """Additive shares of the same with public words added: share 0 carries them."""
    return Pair(
        shared.first + public if session.index == 0 else shared.first,
        shared.second + public if session.following == 0 else shared.second,
    )


def plus_public_bits(session: Session, shared: Pair, public: Any) -> Pair:
    """Exclusive-or shares of the same with public bits added: share 0 carries them."""
    return Pair(
        shared.first ^ public if session.index == 0 else shared.first,
        shared.second ^ public if session.following == 0 else shared.second,
    )


def _different(session: Session, step: str) -> Untrusted:
    names = " and ".join(sorted(session.names[peer] for peer in session.peers))
    return Untrusted(f"step {step!r}: {names} sent different values for the share they both hold")


def _digest(step: str, data: bytes) -> bytes:
    return hashlib.sha256(pack(["atoll share", step]) + data).digest()


def _little(words: Ring) -> str:
    return f"<u{words.itemsize}"
