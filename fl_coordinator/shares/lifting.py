"""From shares modulo 2^32 to shares modulo 2^64 of the same small integers, so that their products do not wrap.

Let |s| < 2^29 and s = y0 + y1 + y2 modulo 2^32. As integers the three add up to s + 2^32 T, where T counts how often
they pass 2^32, and y_i - 2^32 T_i are shares modulo 2^64 for any shares T_i of T modulo 2^32. So only T is dealt anew:
whatever a party does, what comes out differs from s by a multiple of 2^32.

To count: z = s + 2^29 = u + y2 modulo 2^32, u = y0 + y1 + 2^29 modulo 2^32 being known to party 0, and so whether it
passed 2^32, and y2 to parties 1 and 2. As z < 2^30, the integers u + y2 pass 2^32 exactly if one of them has its
highest bit set: without the carry both are below 2^30, with it one is at least 2^31. With a and b for these two bits,
T is the carry in u, plus a + b - ab, and the only product of secrets that no party can form alone is ab. Party 0 splits
its bit, a = a1 + a2 modulo 2^32, a2 being a mask that it has in common with party 2, a1 going to party 1; then parties
1 and 2, who know b, each have a part of the product. Two messages, of 4 bytes a word each.

Then a lie is looked for: in 40 random sums of 8 rows at a time, with coefficients -1, 0, 0 and 1 from a coin tossed
afterwards. If any word is off by a multiple of 2^32 that is not 0 modulo 2^64, of the two values that its coefficient,
0 or not, gives a sum, at most one is in [-2^31, 2^31): wrong rows pass with probability at most 2^-40. Rows as they
should be have two copies shorter than 2^27 each (`bounds`), 8 of them are shorter than 2^29, and a sum leaves that
range with probability at most 2 exp(-16) (Hoeffding), were all updates as long as what passes the range check with
probability 2^-48; if they are a fifth of that, and honest ones are a thirtieth, it is 2 exp(-400).

Small sums have highest halves of zero. What a lie of party 0 about its bits leaves there depends on bits of the others,
one for each word, and from a digest of it party 0 could find many by trying. So all halves together give 64 parities of
bits that the coin chooses, and these 48 parities of bits that nobody knows: the digest is of those. If a half is not
zero they are random, all zero with probability 2^-64 + 2^-48.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fl_coordinator.shares.binary import binary
from fl_coordinator.shares.gram import multiply_by_small
from fl_coordinator.shares.sharing import (
    Exchange,
    Pair,
    Ring,
    Session,
    Steps,
    are_zero_bits,
    plus_public,
    reshare,
    to_bytes,
    toss,
)
from fl_coordinator.shares.streams import KeyStream, Words64
from fl_coordinator.shares.verifying import Conjunctions
from model_delta.errors import Untrusted

SMALL_BITS = 29
_OFFSET = 1 << SMALL_BITS
_ROWS, _SUMS = 8, 40
_PUBLIC, _HIDDEN = 64, 48


def lift(session: Session, small: Pair) -> Steps[Pair]:
    """Shares uint64 of the integers (below 2^29 in magnitude, or the result means nothing) behind shares
    uint32[n, w].

    Raises Untrusted when somebody has lied on the way to them.
    """
    shape = np.zeros(small.first.shape, dtype=np.uint32)
    if session.index == 0:
        below = small.first + np.uint32(_OFFSET)
        u = below + small.second
        high = u >> np.uint32(31)
        passed = (below < small.first).astype(np.uint32) + (u < below)
        yield Exchange("lift-bit", {1: to_bytes(high - session.mask(2, "lift-bit", shape))})
        own = passed + high
    elif session.index == 1:
        received = yield Exchange("lift-bit", {}, frozenset({0}))
        part = session.read_words(received, 0, "lift-bit", shape)
        high = small.second >> np.uint32(31)
        own = high - part * high
    else:
        yield Exchange("lift-bit", {})
        own = np.uint32(0) - session.mask(0, "lift-bit", shape) * (small.first >> np.uint32(31))
    carries = yield from reshare(session, "lift", own)
    lifted = Pair(_with_carries(small.first, carries.first), _with_carries(small.second, carries.second))
    yield from _require_small(session, lifted)
    return lifted


def _with_carries(words: Ring, carries: Ring) -> Words64:
    return words.astype(np.uint64) - (carries.astype(np.uint64) << np.uint64(32))


def _require_small(session: Session, lifted: Pair) -> Steps[None]:
    coin = KeyStream((yield from toss(session, "lift-sums")))
    octets = coin.take(_ROWS * lifted.first.shape[1] * _SUMS // 4)
    bits = np.unpackbits(np.frombuffer(octets, dtype=np.uint8)).view(np.int8)
    ternary = (bits[0::2] - bits[1::2]).astype(np.float64).reshape(-1, _SUMS)
    sums = Pair(_summed(lifted.first, ternary), _summed(lifted.second, ternary))
    made = Conjunctions(session, "lift")
    raised = yield from binary(session, made, plus_public(session, sums, np.uint64(1 << 31)))
    counted = np.frombuffer(coin.take(8 * _PUBLIC * sums.first.size), dtype="<u8").reshape(_PUBLIC, -1)
    told = Pair(*(_gathered(share >> np.uint64(32), counted) for share in (raised.first, raised.second)))
    hidden = session.random("lift-hidden", np.zeros(_HIDDEN, dtype=np.uint64))
    kept = yield from made.of("kept", told, hidden)
    yield from made.check()
    if not (yield from are_zero_bits(session, "lift-small", Pair(_parity(kept.first), _parity(kept.second)))):
        raise Untrusted(
            "step 'lift': a lifted sketch is no small integer, an aggregator has deviated; nothing of it was opened"
        )


def _gathered(words: Ring, counted: Words64) -> Ring:
    """The parities of the bits of `words` that each row of `counted` has, bit k of a word from row k; it 48 times."""
    parities = _parity(np.bitwise_xor.reduce(counted & words.reshape(-1), axis=1))
    word = np.bitwise_or.reduce(parities << np.arange(_PUBLIC, dtype=np.uint64))
    return np.full(_HIDDEN, word, dtype=np.uint64)


def _parity(words: Ring) -> Ring:
    """Of each word of 64 bits the sum of its bits modulo 2."""
    return (np.bitwise_count(words) & 1).astype(np.uint64)


def _summed(words: Words64, coefficients: NDArray[np.float64]) -> Words64:
    """uint64[ceil(n / 8), 40] of uint64[n, w]."""
    count, width = words.shape
    padded = np.zeros((-(-count // _ROWS) * _ROWS, width), dtype=np.uint64)
    padded[:count] = words
    return multiply_by_small(padded.reshape(-1, _ROWS * width), coefficients)
