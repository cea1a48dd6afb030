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

from fl_coordinator.rules.geometry import Gram, checked, squared_distances
from model_delta.errors import Malformed


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


def neighbours_of(count: int, hostile_max: int) -> int:
    """How many distances a score adds up: n - f - 2, but at least one, if there is one."""
    return min(max(1, count - hostile_max - 2), max(0, count - 1))


def scores(gram: Gram, hostile_max: int) -> tuple[int, ...]:
    """Sum of squared distances to the n - f - 2 nearest others (at least one, if there is one), exact."""
    neighbours = neighbours_of(len(gram), hostile_max)
    # Column 0 is the update itself (distance 0, or a copy of it at the same distance).
    nearest = np.sort(squared_distances(gram), axis=1)[:, 1 : 1 + neighbours]
    return tuple(sum(row) for row in nearest.tolist())


def select(gram: NDArray[np.int64], hostile_max: int) -> Verdict:
    """Select n - f of n updates from their inner products, int64[n, n] of magnitude at most 2^58.

    Raises Malformed for a matrix that is not square and symmetric, for larger entries, and for n < 2 f + 3.
    """
    gram = checked(gram)
    count = len(gram)
    if hostile_max < 0 or count < contributions_min(hostile_max):
        raise Malformed(
            f"Multi-Krum: expected at least {contributions_min(hostile_max)} updates for {hostile_max} hostile ones, "
            f"found {count}"
        )
    found = scores(gram, hostile_max)
    order = sorted(range(count), key=lambda index: (found[index], index))
    kept = count - hostile_max
    weights = np.zeros(count, dtype=np.int64)
    weights[order[:kept]] = 1
    middle = sorted(found)[count // 2]
    rejected = {
        index: f"Krum score {_ratio(found[index], middle)} the median; the {kept} lowest of {count} are kept"
        for index in order[kept:]
    }
    return Verdict(weights, found, rejected)


def _ratio(score: int, median: int) -> str:
    if median == 0:
        return "above" if score else "equal to"
    ratio = score / median
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.2g}x"
