"""Before anything is multiplied: does every update fit the ring?

A Gram matrix modulo 2^32 or 2^64 is worthless against a device that picks its numbers: one entry of 2^32 squares to
zero. So each frozen update is projected on 64 random directions r in {-1, 0, 0, 1}^d, from a coin tossed after the
freeze, and on shares it is checked that each of the 64 sums lies in [-B, B). One bit per device is opened: all 64, or
not.

An honest update passes but for a chance of 3e-14, whatever it is. What passes, except with probability 2^-64, has l2
norm below 5 B over the integers. In short (docs/decisions/0002-sketched-distances.md has the steps): an entry of
magnitude >= 2B makes each sum leave the range with probability >= 1/2, whatever the other entries are; and a vector
without such an entry but with norm >= 5 B spreads its sums so widely over Z_q, q = 2^32, that each lies in the range
with probability < 1/2 (an Esseen-type inequality: Fejer's kernel against a characteristic function that is nowhere
negative).

The comparison itself turns sums into bits as ABY3 does (Mohassel, Rindal, CCS 2018, section 5.3): y0 + y1, known to one
party, and y2, known to the two others, are two binary-shared inputs of a Kogge-Stone adder.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fl_coordinator.shares.sharing import Exchange, Pair, Ring, Session, Steps, conjunction, open_bits, to_bytes


def range_check(session: Session, sums: Pair, exponent: int) -> Steps[NDArray[np.bool_]]:
    """One bit per row, opened: whether all its sums lie in [-2^exponent, 2^exponent). bool[n] from shared [n, 64].

    The number of columns must be a power of two. Raises Untrusted when the peers disagree over the opened bits.
    """
    word = sums.first.dtype.type
    left, right = yield from _as_bits(session, sums, word(1 << exponent))
    shifted = yield from _add(session, left, right)
    inside = _negated_above(session, shifted, exponent + 1)
    width = sums.first.shape[1]
    while width > 1:
        width //= 2
        inside = yield from conjunction(
            session, f"every-sum-{width}", inside.columns(0, width), inside.columns(width, 2 * width)
        )
    places = _bits(sums.first) // 2
    while places:
        inside = yield from conjunction(session, f"every-bit-{places}", inside, inside >> places)
        places //= 2
    # Bits above the lowest hold partial results about single devices: they must not be opened.
    lowest = Pair(inside.first & word(1), inside.second & word(1))
    opened = yield from open_bits(session, "range", lowest)
    passed: NDArray[np.bool_] = opened[:, 0] == 1
    return passed


def _as_bits(session: Session, sums: Pair, bound: np.unsignedinteger) -> Steps[tuple[Pair, Pair]]:
    """Binary sharings of y0 + y1 + bound (known to party 0) and of y2 (known to parties 1 and 2)."""
    zeros = np.zeros_like(sums.first)
    if session.index == 0:
        pad = session.mask(2, "split", zeros)
        masked = (sums.first + sums.second + bound) ^ pad
        yield Exchange("split", {1: to_bytes(masked)})
        return Pair(pad, masked), Pair(zeros, zeros)
    if session.index == 1:
        received = yield Exchange("split", {}, frozenset({0}))
        return Pair(session.read_words(received, 0, "split", zeros), zeros), Pair(zeros, sums.second)
    yield Exchange("split", {})
    return Pair(zeros, session.mask(0, "split", zeros)), Pair(sums.first, zeros)


def _add(session: Session, a: Pair, b: Pair) -> Steps[Pair]:
    """Binary shares of a + b in their ring: Kogge-Stone, log2(bits) levels and one message more.

    Generate and propagate (as a ^ b) of a span exclude each other, so that their OR is an exclusive or, which is free.
    """
    difference = a ^ b
    generate = yield from conjunction(session, "carry-start", a, b)
    propagate, reach = difference, 1
    while reach < _bits(a.first):
        step = f"carry-{reach}"
        if 2 * reach == _bits(a.first):
            generate ^= yield from conjunction(session, step, propagate, generate << reach)
        else:
            both = yield from conjunction(
                session, step, _stack(propagate, propagate), _stack(generate << reach, propagate << reach)
            )
            rows = a.first.shape[0]
            generate ^= Pair(both.first[:rows], both.second[:rows])
            propagate = Pair(both.first[rows:], both.second[rows:])
        reach *= 2
    return difference ^ (generate << 1)


def _negated_above(session: Session, value: Pair, free_bits: int) -> Pair:
    """NOT value, with the lowest `free_bits` bits replaced by ones. Share 0 carries the negation."""
    word = value.first.dtype.type
    above, ones = ~word((1 << free_bits) - 1), ~word(0)

    def masked(share: Ring, number: int) -> Ring:
        return (share & above) ^ ones if number == 0 else share & above

    return Pair(masked(value.first, session.index), masked(value.second, session.following))


def _stack(a: Pair, b: Pair) -> Pair:
    return Pair(np.concatenate([a.first, b.first]), np.concatenate([a.second, b.second]))


def _bits(words: Ring) -> int:
    return 8 * words.itemsize
