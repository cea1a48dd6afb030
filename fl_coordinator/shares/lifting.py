"""From shares modulo 2^32 to shares modulo 2^64 of the same small integers, so that their products do not wrap.

Let |s| < 2^29 and z = s + 2^29 = u + y2 modulo 2^32, u = y0 + y1 + 2^29 being known to party 0 and y2 to parties 1 and
2. As z < 2^30, the integers u + y2 pass 2^32 exactly if one of them has its highest bit set: without the carry both are
below 2^30, with it one is at least 2^31. With a and b for these two bits, z = u + y2 - 2^32 (a + b - ab) over the
integers, and the only product of secrets that no party can form alone is ab. Party 0 splits its bit, a = a1 + a2 modulo
2^32, a2 being a mask that it has in common with party 2, a1 going to party 1; then parties 1 and 2, who know b, each
have a part of the product, and each party one summand of z. Two messages, of 4 and of 8 bytes a word.
"""

from __future__ import annotations

import numpy as np

from fl_coordinator.shares.sharing import Exchange, Pair, Session, Steps, reshare, to_bytes

SMALL_BITS = 29
_OFFSET = 1 << SMALL_BITS


def lift(session: Session, small: Pair) -> Steps[Pair]:
    """Shares uint64 of the integers (below 2^29 in magnitude, or the result means nothing) behind shares uint32."""
    shape = np.zeros(small.first.shape, dtype=np.uint32)
    if session.index == 0:
        u = small.first + small.second + np.uint32(_OFFSET)
        high = u >> np.uint32(31)
        yield Exchange("lift-bit", {1: to_bytes(high - session.mask(2, "lift-bit", shape))})
        own = u.astype(np.uint64) - (high.astype(np.uint64) << np.uint64(32)) - np.uint64(_OFFSET)
    elif session.index == 1:
        received = yield Exchange("lift-bit", {}, frozenset({0}))
        part = session.read_words(received, 0, "lift-bit", shape)
        y2 = small.second
        high = y2 >> np.uint32(31)
        own = y2.astype(np.uint64) - ((high - part * high).astype(np.uint64) << np.uint64(32))
    else:
        yield Exchange("lift-bit", {})
        part = session.mask(0, "lift-bit", shape) * (small.first >> np.uint32(31))
        own = part.astype(np.uint64) << np.uint64(32)
    return (yield from reshare(session, "lift", own))
