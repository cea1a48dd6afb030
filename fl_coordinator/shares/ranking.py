"""The lowest few of shared numbers, and their sum, without anybody learning an order.

Every number of a row is compared with every other one of it, all at once, and its rank is how many others come first.
That is quadratic in the row, where a sorting network is n log^2 n; but the network is 28 comparisons deep at n = 128,
and a comparison is six messages. At 14 bytes a comparison the quadratic way costs 15 MB for 128 rows of 128 numbers
and a tenth of the messages.

Equal numbers are ordered by their place, the lower one first: `rules.multikrum` has the same rule.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fl_coordinator.shares.comparing import as_numbers, negative
from fl_coordinator.shares.sharing import Pair, Ring, Session, Steps, reshare

LENGTH_MAX = 128
"""Numbers in a row: ranks are computed modulo 2^8."""

_RANK_BITS = 8


def below(session: Session, step: str, rows: Pair, bits: int, ranks: Sequence[int]) -> Steps[Pair]:
    """Shared bits, by rank, row and place: does a number have a rank (from 0) below that one?

    `rows` are shared uint64[r, n] of numbers whose differences lie in [-2^(bits - 1), 2^(bits - 1)), n <= 128; every
    one of `ranks` is from 0 to 128.
    """
    count, length = rows.first.shape
    former, latter = np.triu_indices(length, 1)
    differences = Pair(*(share[:, latter] - share[:, former] for share in (rows.first, rows.second)))
    passed = yield from negative(session, f"{step}-order", differences, bits)
    found = yield from as_numbers(session, f"{step}-order-numbers", passed, differences.first.size, np.uint8)
    # [i, j, k]: this party's part of 1 if k comes before j in row i though it stands behind it.
    behind = np.zeros((count, length, length), dtype=np.uint8)
    behind[:, former, latter] = found.reshape(count, -1)
    own = behind.sum(axis=2, dtype=np.uint8) - behind.sum(axis=1, dtype=np.uint8)
    if session.index == 0:
        own = own + np.arange(length, dtype=np.uint8)
    rank = yield from reshare(session, f"{step}-ranks", own)
    return (yield from negative(session, f"{step}-below", _less(session, rank, ranks), _RANK_BITS))


def sums_where(session: Session, step: str, chosen: Pair, numbers: Pair) -> Steps[Ring]:
    """This party's additive share, not yet masked, of each row's sum over its chosen numbers: uint64[r].

    `chosen` are shared bits by row and place, `numbers` shared uint64[r, n].
    """
    own = yield from as_numbers(session, f"{step}-numbers", chosen, numbers.first.size, np.uint64)
    factor = yield from reshare(session, f"{step}-factors", own.reshape(numbers.first.shape))
    products = factor.first * (numbers.first + numbers.second) + factor.second * numbers.first
    summed: Ring = products.sum(axis=1, dtype=np.uint64)
    return summed


def _less(session: Session, rank: Pair, ranks: Sequence[int]) -> Pair:
    """rank - r for each r, the public number being taken from share 0."""
    taken = np.array(ranks, dtype=np.uint8)[:, None, None]
    none = np.zeros_like(taken)
    return Pair(
        rank.first[None] - (taken if session.index == 0 else none),
        rank.second[None] - (taken if session.following == 0 else none),
    )
