"""Is a shared number negative? Answered in bits that stay shared, for many numbers at once and in few messages.

x = x0 + x1 + x2 modulo 2^w: one party knows u, the sum of two shares, and the two others know the third, v. The sign of
x is the highest bit of u, of v, and the carry into it, added modulo 2. For the carry, both numbers are cut into digits
of four bits. A pair of digits passes a carry on if they add up to 15, and makes one if they add up to more. He who
knows u deals, for each digit a, a table of sixteen bits under exclusive or, of which only number 15 - a is 1: one part
to one of the others, the second one a mask that he and the third have in common. The two look up their common digit b:
the bits there are shares of [a + b = 15], and those below it add up to shares of [a + b > 15]. Then carries are joined
in a tree of conjunctions (as in a Kogge-Stone adder, but only the last carry is wanted).

Perfectly hiding as all of `sharing` is: what anybody receives is under a mask that he does not have and that is used
once. There is no statistical slack, because nothing is ever opened under noise of a finite width.

The three take turns at dealing, a third of the numbers each: everybody sends the same. A comparison of 48 bits costs
each party 8 + 3 + 3 bytes and six messages. Bits are kept in planes: packed along the numbers, eight to a byte.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_coordinator.shares.sharing import (
    PARTIES,
    Exchange,
    Pair,
    Ring,
    Session,
    Steps,
    conjunction,
    open_bits,
    to_bytes,
)

_DIGIT = 4
_TABLE = 1 << _DIGIT

Planes = NDArray[np.uint8]


def negative(session: Session, step: str, numbers: Pair, bits: int) -> Steps[Pair]:
    """Whether each of m shared numbers in [-2^(bits - 1), 2^(bits - 1)) is below 0: shared bits uint8[ceil(m / 8)].

    `numbers` are any shape, in a ring of at least `bits` bits, of which only the lowest `bits` count.
    """
    width = 8 * numbers.first.itemsize
    raised = Pair(numbers.first.reshape(-1), numbers.second.reshape(-1)) << (width - bits)
    turns = _Turns(session, raised.first.size)
    count = -(-(bits - 1) // _DIGIT)

    known = turns.dealt(raised)
    tables = np.uint16(1) << (np.uint16(_TABLE - 1) - _digits(known, count))
    part = turns.part(session.index)
    pad = session.mask(session.preceding, f"{step}-table", tables)
    received = yield Exchange(
        f"{step}-table", {session.following: to_bytes(tables ^ pad)}, frozenset({session.preceding})
    )
    carries = np.zeros((2, count, turns.count), dtype=np.bool_)
    signs = np.zeros(turns.count, dtype=np.bool_)
    signs[part] = _top(known)

    part = turns.part(session.preceding)
    common = raised.second[part]
    shape = np.empty((count, common.size), dtype=np.uint16)
    carries[:, :, part] = _looked_up(
        session.read_words(received, session.preceding, f"{step}-table", shape), _digits(common, count)
    )
    signs[part] = _top(common)

    part = turns.part(session.following)
    common = raised.first[part]
    shape = np.empty((count, common.size), dtype=np.uint16)
    pad = session.mask(session.following, f"{step}-table", shape)
    carries[:, :, part] = _looked_up(pad, _digits(common, count))

    planes = np.packbits(np.concatenate([*carries, signs[None]]), axis=1)
    shared = yield from share_bits(session, f"{step}-digits", planes)
    carry = yield from _last_carry(session, step, _planes(shared, slice(0, count)), _planes(shared, slice(count, -1)))
    return carry ^ Pair(shared.first[-1], shared.second[-1])


def share_bits(session: Session, step: str, own: Planes) -> Steps[Pair]:
    """Replicated shares of the exclusive or of all parties' `own`: one message of its size per party."""
    masked = own ^ session.zero_bits(step, own)
    received = yield Exchange(step, {session.preceding: to_bytes(masked)}, frozenset({session.following}))
    return Pair(masked, session.read_words(received, session.following, step, masked))


def as_numbers(
    session: Session, step: str, shared: Pair, count: int, kind: type[np.unsignedinteger[Any]]
) -> Steps[Ring]:
    """This party's additive share, not yet masked, of the first `count` shared bits as numbers 0 and 1, `kind`[count].

    b + c - 2 b c is the exclusive or of b, which one party knows, and c, which the two others know; b is split by its
    owner, so that these two have a part of the product each. The same idea, and the same turns, as in `negative`.
    """
    first, second = (np.unpackbits(share, count=count).astype(kind) for share in (shared.first, shared.second))
    turns = _Turns(session, count)
    own = np.empty(count, dtype=kind)
    known = turns.dealt(Pair(first, second), lambda a, b: a ^ b)
    masked = known - session.mask(session.preceding, step, known)
    received = yield Exchange(step, {session.following: to_bytes(masked)}, frozenset({session.preceding}))
    own[turns.part(session.index)] = known

    part = turns.part(session.preceding)
    common = second[part]
    given = session.read_words(received, session.preceding, step, common)
    own[part] = common - (given * common << kind(1))

    part = turns.part(session.following)
    common = first[part]
    own[part] = kind(0) - (session.mask(session.following, step, common) * common << kind(1))
    return own


def open_planes(session: Session, step: str, shared: Pair, count: int) -> Steps[NDArray[np.bool_]]:
    """Reveal the first `count` shared bits to all three: bool[count]. Raises Untrusted as `open_bits` does.

    Bits beyond `count` in the last byte are not part of the answer; they are sent as zero.
    """
    wanted = np.packbits(np.ones(count, dtype=np.bool_))
    only = Pair(shared.first[: wanted.size] & wanted, shared.second[: wanted.size] & wanted)
    opened = yield from open_bits(session, step, only)
    return np.unpackbits(opened.astype(np.uint8), count=count).astype(np.bool_)


class _Turns:
    """Who deals which numbers: party r those of the r-th third, with u = x_r + x_{r+1}."""

    def __init__(self, session: Session, count: int) -> None:
        self._index = session.index
        self._third = -(-count // PARTIES)
        self.count = count

    def part(self, dealer: int) -> slice:
        """The numbers for which `dealer` deals."""
        return slice(dealer * self._third, min((dealer + 1) * self._third, self.count))

    def dealt(self, shared: Pair, joined: Callable[[Ring, Ring], Ring] = lambda a, b: a + b) -> Ring:
        """What this party knows of the numbers for which it deals."""
        part = self.part(self._index)
        return joined(shared.first[part], shared.second[part])


def _digits(words: Ring, count: int) -> NDArray[np.uint16]:
    """The `count` digits below the highest bit, lowest first: uint16[count, m], zeros where they run out of bits."""
    width = 8 * words.itemsize
    below = words << words.dtype.type(1)
    shifts = [width - _DIGIT * (count - place) for place in range(count)]
    return np.stack([(below >> words.dtype.type(shift)).astype(np.uint16) & np.uint16(_TABLE - 1) for shift in shifts])


def _top(words: Ring) -> NDArray[np.bool_]:
    return (words >> words.dtype.type(8 * words.itemsize - 1)).astype(np.bool_)


def _looked_up(tables: NDArray[np.uint16], digits: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """Shares of [a + b > 15] and of [a + b = 15] from shares of a's tables, bool[2, count, m]."""
    sums = tables
    for reach in (1, 2, 4, 8):
        sums = sums ^ (sums << np.uint16(reach))
    made = (sums << np.uint16(1)) >> digits
    return np.stack([(made & np.uint16(1)).astype(np.bool_), (tables >> digits & np.uint16(1)).astype(np.bool_)])


def _last_carry(session: Session, step: str, made: Pair, passed: Pair) -> Steps[Pair]:
    """The carry out of the highest of shared digits, lowest first, planes uint8[count, w]: uint8[w].

    A carry that two neighbours make: the higher one makes it, or passes on what the lower one makes, never both.
    """
    level = 0
    while (count := made.first.shape[0]) > 1:
        odd, pairs = count % 2, count // 2
        low, high = slice(odd, None, 2), slice(odd + 1, None, 2)
        left, right = _planes(passed, high), _planes(made, low)
        if count > 2:
            left, right = _both(left, left), _both(right, _planes(passed, low))
        joined = yield from conjunction(session, f"{step}-carry-{level}", left, right)
        made = _both(_planes(made, slice(0, odd)), _planes(made, high) ^ _planes(joined, slice(0, pairs)))
        passed = _both(_planes(passed, slice(0, odd)), _planes(joined, slice(pairs, None)))
        level += 1
    return Pair(made.first[0], made.second[0])


def _planes(shared: Pair, chosen: slice) -> Pair:
    return Pair(shared.first[chosen], shared.second[chosen])


def _both(a: Pair, b: Pair) -> Pair:
    return Pair(np.concatenate([a.first, b.first]), np.concatenate([a.second, b.second]))
