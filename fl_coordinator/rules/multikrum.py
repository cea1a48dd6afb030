"""Multi-Krum on a Gram matrix of integers (Blanchard, El Mhamdi, Guerraoui, Stainer, NeurIPS 2017).

The variant, since libraries differ: the score of an update is the sum of its squared distances to its n - f - 2 nearest
others (itself not counted); the m = n - f lowest scores are selected; ties go to the lower index; the selected are
averaged with equal weights. All arithmetic is on exact integers, so that three aggregators and the plain yardstick
cannot differ by a rounding error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model_delta.errors import Malformed

_ENTRY_MAX = 1 << 58


@dataclass(frozen=True)
class Verdict:
    """One rule's answer about n updates: `weights` (1 selected, 0 not), Krum `scores` (-1 where none was computed),
    and for every update that was not selected why, in words."""

    weights: NDArray[np.int64]
    scores: tuple[int, ...]
    rejected: dict[int, str]

    @property
    def selected(self) -> tuple[int, ...]:
        """Indices with a weight, ascending."""
        return tuple(int(index) for index in np.flatnonzero(self.weights))


def contributions_min(hostile_max: int) -> int:
    """The fewest updates for which Krum's guarantee holds: 2 f + 3."""
    return 2 * hostile_max + 3


def select(gram: NDArray[np.int64], hostile_max: int) -> Verdict:
    """Select n - f of n updates from their inner products, int64[n, n] of magnitude at most 2^58.

    Raises Malformed for a matrix that is not square and symmetric, for larger entries, and for n < 2 f + 3.
    """
    count = gram.shape[0]
    if gram.shape != (count, count) or not np.array_equal(gram, gram.T):
        raise Malformed(f"Multi-Krum: expected a symmetric matrix, found one of shape {gram.shape}")
    if count and int(np.abs(gram).max()) > _ENTRY_MAX:
        raise Malformed(f"Multi-Krum: expected entries up to 2^58, found {int(np.abs(gram).max())}")
    if hostile_max < 0 or count < contributions_min(hostile_max):
        raise Malformed(
            f"Multi-Krum: expected at least {contributions_min(hostile_max)} updates for {hostile_max} hostile ones, "
            f"found {count}"
        )
    norms = np.diagonal(gram)
    distances = np.sort(norms[:, None] + norms[None, :] - 2 * gram, axis=1)
    # Column 0 is the update itself (distance 0, or a copy of it at the same distance).
    neighbours = distances[:, 1 : count - hostile_max - 1]
    scores = tuple(sum(int(value) for value in row) for row in neighbours)
    order = sorted(range(count), key=lambda index: (scores[index], index))
    kept = count - hostile_max
    weights = np.zeros(count, dtype=np.int64)
    weights[order[:kept]] = 1
    median = sorted(scores)[count // 2]
    rejected = {
        index: f"Krum score {_ratio(scores[index], median)} the median; the {kept} lowest of {count} are kept"
        for index in order[kept:]
    }
    return Verdict(weights, scores, rejected)


def _ratio(score: int, median: int) -> str:
    if median == 0:
        return "above" if score else "equal to"
    ratio = score / median
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.2g}x"
