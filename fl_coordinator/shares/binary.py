"""A shared number as shared bits.

The three summands of x = x0 + x1 + x2 are each known to two parties, so they are shares of their own bits already, two
of them zero. A carry-save adder turns three summands into two with one conjunction (whose words are zero in all but
two shares), a Kogge-Stone adder adds these: log2(bits) levels and one message more. Nobody enters a number of his own,
as in ABY3 (Mohassel, Rindal, CCS 2018, section 5.3), where one party adds two summands first: it could lie about them.
"""

from __future__ import annotations

import numpy as np

from fl_coordinator.shares.sharing import Pair, Ring, Session, Steps
from fl_coordinator.shares.verifying import Conjunctions


def binary(session: Session, made: Conjunctions, shared: Pair) -> Steps[Pair]:
    """Exclusive-or shares of the numbers behind additive ones, in the same ring."""
    # As shares under exclusive or, (x0, x1, x2) stand for x0 ^ x1 ^ x2 as they are; the majority of three bits is
    # (x0 ^ x2)(x1 ^ x2) ^ x2, and x0 ^ x2, say, is (x0, 0, x2).
    without_one, without_zero = _without(session, shared, 1), _without(session, shared, 0)
    two = _without(session, without_zero, 1)
    carries = (yield from made.of("carries", without_one, without_zero)) ^ two
    return (yield from _add(made, shared, carries << 1))


def _without(session: Session, shared: Pair, number: int) -> Pair:
    """The same with zeros for share `number`."""

    def kept(share: Ring, own: int) -> Ring:
        return np.zeros_like(share) if own == number else share

    return Pair(kept(shared.first, session.index), kept(shared.second, session.following))


def _add(made: Conjunctions, a: Pair, b: Pair) -> Steps[Pair]:
    """Binary shares of a + b in their ring.

    Generate and propagate (as a ^ b) of a span exclude each other, so that their OR is an exclusive or, which is free.
    """
    difference, bits = a ^ b, 8 * a.first.itemsize
    generate = yield from made.of("carry-start", a, b)
    propagate, reach = difference, 1
    while reach < bits:
        step = f"carry-{reach}"
        if 2 * reach == bits:
            generate ^= yield from made.of(step, propagate, generate << reach)
        else:
            both = yield from made.of(step, _stack(propagate, propagate), _stack(generate << reach, propagate << reach))
            rows = a.first.shape[0]
            generate ^= Pair(both.first[:rows], both.second[:rows])
            propagate = Pair(both.first[rows:], both.second[rows:])
        reach *= 2
    return difference ^ (generate << 1)


def _stack(a: Pair, b: Pair) -> Pair:
    return Pair(np.concatenate([a.first, b.first]), np.concatenate([a.second, b.second]))
