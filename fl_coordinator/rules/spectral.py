"""The direction in which the updates differ most, and how much each device contributes to it.

Divide and conquer (DnC; Shejwalkar and Houmansadr, NDSS 2021): attackers that push together become the top direction of
the centred updates, so the square of a device's entry in the top eigenvector of the centred Gram matrix is its score.
Differences from the paper: the Gram matrix stands for all coordinates instead of random subsets of them, and the
eigenvector comes from power iteration: the matrix is squared eight times, rounded to 20-bit integers each time, and
the heaviest column taken. All sums stay below 2^53, so float64 holds them exactly in whatever order they are added:
every machine gets the same bits. When the two largest eigenvalues are close, the result is a mixture of their
directions, and it is the same mixture everywhere, which a library's eigenvectors are not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fl_coordinator.rules.geometry import Gram

SQUARINGS = 8
_BITS = 20


def scores(gram: Gram) -> NDArray[np.int64]:
    """Squared entries int64[n] (0..2^40) of the top eigenvector of the centred Gram matrix; zeros if all are equal.

    `gram` int64[n, n] with entries up to 2^36 in magnitude, n <= 4,096.
    """
    power = _reduced(centred(gram).astype(np.float64))
    for _ in range(SQUARINGS):
        power = _reduced(power @ power)
    if not power.size:
        return np.zeros(0, dtype=np.int64)
    vector = _reduced(power[:, int(np.argmax(np.diagonal(power)))]).astype(np.int64)
    return np.asarray(vector * vector)


def weight(gram: Gram) -> NDArray[np.int64]:
    """How much each device adds to the spectrum, int64[n]: the diagonal of the fourth power of the centred matrix.

    Directions count by the fourth power of their eigenvalue: more than one matters, unlike for `scores`, and a group
    that moves as one far outweighs as many devices that differ each in its own way. `gram` as there.
    """
    once = _reduced(centred(gram).astype(np.float64))
    twice = _reduced(once @ once).astype(np.int64)
    return np.asarray((twice * twice).sum(axis=1))


def centred(gram: Gram) -> Gram:
    """Gram matrix of n times the updates minus their sum: int64[n, n], exact."""
    count = len(gram)
    rows = gram.sum(axis=1)
    # n^2 times the usual centred matrix would need 2 log2(n) more bits; n times it, floored once, loses less than 1/n.
    return np.asarray(count * gram - rows[:, None] - rows[None, :] + int(rows.sum()) // max(count, 1))


def relative(found: NDArray[np.int64]) -> NDArray[np.float64]:
    """Scores in units of their mean, float64[n] rounded to three decimals: 1 is ordinary."""
    total = int(found.sum())
    return np.round(found * (len(found) / total), 3) if total else np.zeros(len(found))


def highest(found: NDArray[np.int64], count: int) -> list[int]:
    """Indices of the `count` highest scores, ascending; of equal ones the higher index goes first."""
    order = sorted(range(len(found)), key=lambda index: (-int(found[index]), -index))
    return sorted(order[:count])


def _reduced(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """`values` times the power of two that brings the largest to 20 bits, rounded to integers."""
    peak = float(np.abs(values).max(initial=0.0))
    return np.asarray(np.rint(np.ldexp(values, _BITS - int(np.frexp(peak)[1])))) if peak else values
