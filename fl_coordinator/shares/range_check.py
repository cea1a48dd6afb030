"""Before anything is multiplied: does every update fit the ring?

A Gram matrix modulo 2^32 or 2^64 is worthless against a device that picks its numbers: one entry of 2^32 squares to
zero. So each frozen update is projected on 48 random directions r in {-1, 0, 0, 1}^d, from a coin tossed after the
freeze, and on shares it is checked that each of the 48 sums lies in [-B, B). One bit per device is opened: all 48, or
not.

An honest update passes but for a chance of 3e-14, whatever it is. What passes, except with probability 2^-48, has l2
norm below 5 B over the integers. In short (docs/decisions/0002-sketched-distances.md has the steps): an entry of
magnitude >= 2B makes each sum leave the range with probability >= 1/2, whatever the other entries are; and a vector
without such an entry but with norm >= 5 B spreads its sums so widely over Z_q, q = 2^32, that each lies in the range
with probability < 1/2 (an Esseen-type inequality: Fejer's kernel against a characteristic function that is nowhere
negative).

The comparison itself turns sums into bits (`binary`), and its products are checked (`verifying`) before the bits are
opened.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fl_coordinator.shares.binary import binary
from fl_coordinator.shares.sharing import (
    Pair,
    Session,
    Steps,
    beside,
    open_bits,
    plus_public,
    plus_public_bits,
)
from fl_coordinator.shares.verifying import Conjunctions


def range_check(session: Session, sums: Pair, exponent: int) -> Steps[NDArray[np.bool_]]:
    """One bit per row, opened: whether all its sums lie in [-2^exponent, 2^exponent). bool[n] from shared [n, k].

    Raises Untrusted when the peers disagree over the opened bits, or somebody has lied on the way to them.
    """
    word = sums.first.dtype.type
    made = Conjunctions(session, "range")
    shifted = yield from binary(session, made, plus_public(session, sums, word(1 << exponent)))
    inside = _negated_above(session, shifted, exponent + 1)
    width = sums.first.shape[1]
    while width > 1:
        half = width // 2
        both = yield from made.of(f"sum-{width}", inside.columns(0, half), inside.columns(half, 2 * half))
        inside = beside(both, inside.columns(2 * half, None))
        width -= half
    places = 4 * sums.first.itemsize
    while places:
        inside = yield from made.of(f"bit-{places}", inside, inside >> places)
        places //= 2
    yield from made.check()
    # The bits above are zero by now, as zeros were moved in; that nothing else is opened does not rest on it.
    opened = yield from open_bits(session, "range", inside & word(1))
    passed: NDArray[np.bool_] = opened[:, 0] == 1
    return passed


def _negated_above(session: Session, value: Pair, free_bits: int) -> Pair:
    """NOT value, with the lowest `free_bits` bits replaced by ones. Share 0 carries the negation."""
    word = value.first.dtype.type
    return plus_public_bits(session, value & ~word((1 << free_bits) - 1), ~word(0))
