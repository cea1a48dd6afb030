"""Conjunctions that are checked: whoever lied in one is noticed before anything that follows from it is opened.

What a party sends for a conjunction is additive: a lie adds bits of its choice to the product, whatever the others
hold. So the products can be checked against products of random bits that were dealt in the same way, where a lie is
additive too. With ab = c to be checked and a random xy = z, rho = a + x and sigma = b + y are opened, which hides a and
b, and c + z + sigma a + rho b + rho sigma (modulo 2) has to be zero: it is the sum of both lies. A wrong product
passes only beside a random one that is wrong in the same bits.

Which random one that is, is decided by a coin tossed after all products are fixed: cut and choose in buckets
(Furukawa, Lindell, Nof, Weinstein, EUROCRYPT 2017), here by rotation instead of a shuffle. In each of k lanes as many
random products as there are real ones, and C more, stand in a ring that the coin turns to one of its N + C places.
Then C in a row are opened and looked at, and the others stand beside the real ones.

At least one real product be wrong. A lane passes at a place only if its wrong ones, turned, are the pattern W of the
real ones, with none among the C. The places at which one and the same lane passes differ by rotations that keep W, and
these form a group: W is periodic. As every period of W has a wrong one, and the C places are free of them, a period is
longer than C, so fewer than (N + C) / C such rotations exist, and the lane passes with probability below 1 / C. The
lanes are turned independently of each other: below C^-k, which is 2^-40 or 2^-42 (`_lanes`).

A lie is noticed, not named: the three are equally silent about whose summand is wrong.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from fl_coordinator.shares.sharing import (
    Pair,
    Ring,
    Session,
    Steps,
    are_zero_bits,
    conjunction,
    missing_share,
    plus_public_bits,
    to_bytes,
    toss,
)
from fl_coordinator.shares.streams import Words64
from model_delta.errors import Untrusted

_MANY = 1 << 15
"""From so many products on three lanes are shorter than four."""


class Conjunctions:
    """Conjunctions of one computation, the messages of whose check begin with the name `what`."""

    def __init__(self, session: Session, what: str) -> None:
        self._session = session
        self._what = what
        self._made: tuple[list[Pair], list[Pair], list[Pair]] = ([], [], [])

    def of(self, step: str, a: Pair, b: Pair) -> Steps[Pair]:
        """Bitwise a AND b on exclusive-or shares, not yet checked."""
        product = yield from conjunction(self._session, f"{self._what}-{step}", a, b)
        for pairs, pair in zip(self._made, (a, b, product), strict=True):
            pairs.append(pair)
        return product

    def check(self) -> Steps[None]:
        """Check all of them, in four messages. Raises Untrusted when somebody has lied in one."""
        session, what = self._session, self._what
        a, b, product = (Pair(_units(pairs, "first"), _units(pairs, "second")) for pairs in self._made)
        self._made = ([], [], [])
        count = a.first.size
        lanes, shown = _lanes(count)
        like = np.zeros((lanes, count + shown), dtype=np.uint64)
        x, y = session.random(f"{what}-spare-a", like), session.random(f"{what}-spare-b", like)
        z = yield from conjunction(session, f"{what}-spare", x, y)
        coin = yield from toss(session, f"{what}-coin")
        turns = (np.frombuffer(coin, dtype="<u8")[:lanes] % np.uint64(count + shown)).tolist()
        x, y, z = (_turned(pair, turns) for pair in (x, y, z))

        beside = x.columns(shown, None), y.columns(shown, None), z.columns(shown, None)
        opening = [x.columns(0, shown), y.columns(0, shown), z.columns(0, shown), a ^ beside[0], b ^ beside[1]]
        parts = yield from _opened(session, f"{what}-check", opening)
        if not np.array_equal(parts[0] & parts[1], parts[2]):
            raise _deviation(what)
        rho, sigma = parts[3:]
        left = product ^ beside[2] ^ (a & sigma) ^ (b & rho)
        if not (yield from are_zero_bits(session, f"{what}-zero", plus_public_bits(session, left, rho & sigma))):
            raise _deviation(what)


def _deviation(what: str) -> Untrusted:
    return Untrusted(
        f"step '{what}-check': a product of shared bits is wrong, an aggregator has deviated; nothing that follows "
        "from it was opened"
    )


def _lanes(count: int) -> tuple[int, int]:
    """How many lanes `count` products need, and how many of each lane are opened: 2^-42 and 2^-40."""
    return (3, (1 << 14)) if count > _MANY else (4, (1 << 10))


def _units(pairs: list[Pair], side: str) -> Words64:
    """Arrays of any type one after the other, as on the wire, in words of 64 bits; zeros at the end."""
    octets = b"".join(to_bytes(getattr(pair, side)) for pair in pairs)
    return np.frombuffer(octets + bytes(-len(octets) % 8), dtype="<u8")


def _turned(shared: Pair, turns: list[int]) -> Pair:
    def turned(share: Ring) -> Ring:
        return np.stack([np.roll(lane, -turn) for lane, turn in zip(share, turns, strict=True)])

    return Pair(turned(shared.first), turned(shared.second))


def _opened(session: Session, step: str, shared: list[Pair]) -> Steps[list[Ring]]:
    """Several arrays, revealed in one message."""
    flat = Pair(*(np.concatenate([getattr(pair, side).reshape(-1) for pair in shared]) for side in ("first", "second")))
    words = flat.first ^ flat.second ^ (yield from missing_share(session, step, flat))
    ends = np.cumsum([0, *(pair.first.size for pair in shared)]).tolist()
    spans = zip(pairwise(ends), shared, strict=True)
    return [words[start:stop].reshape(pair.first.shape) for (start, stop), pair in spans]
