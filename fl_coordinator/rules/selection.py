"""From the opened Gram matrix to the set whose sum may be opened: norms against the clip first, then Multi-Krum.

Every aggregator runs this on the same integers, and the plain yardstick runs it on a Gram matrix computed in clear: the
answers are equal, always. An update that is longer than an honest one can be was not made by an honest device, so each
such refusal uses up one of the f hostile devices that Multi-Krum has to expect among the rest.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fl_coordinator.rules import multikrum


@dataclass(frozen=True)
class Selection:
    """`selected` indices, ascending; `rejected` index -> reason for all others; Krum `scores` (-1 where none);
    `norm_sigma`: how far each norm is from the median norm, in robust standard deviations (1.4826 MAD; 0 when that is
    0); `refusal`: why nothing may be opened ("" when it may)."""

    selected: tuple[int, ...]
    rejected: dict[int, str]
    scores: tuple[int, ...]
    norm_sigma: tuple[float, ...]
    refusal: str


def select(
    gram: NDArray[np.int64], norm_max: int, clip_norm_l2: float, hostile_max: int, hostile_found: int, selected_min: int
) -> Selection:
    """Judge n updates by their inner products (int64[n, n], squared fixed-point units).

    `norm_max`: the longest honest update in fixed-point units; `hostile_found`: updates already refused for something
    that no honest device does.
    """
    count = gram.shape[0]
    norms_squared = [int(value) for value in np.diagonal(gram)]
    scale = norm_max / clip_norm_l2
    rejected = {
        index: f"norm {math.sqrt(value) / scale:.3g} exceeds the clip norm {clip_norm_l2:g}"
        for index, value in enumerate(norms_squared)
        if value > norm_max * norm_max
    }
    hostile_left = max(0, hostile_max - hostile_found - len(rejected))
    kept = [index for index in range(count) if index not in rejected]
    scores = [-1] * count
    selected: tuple[int, ...] = ()
    needed = multikrum.contributions_min(hostile_left)
    if len(kept) < needed:
        refusal = f"Multi-Krum needs {needed} usable updates to stand {hostile_left} hostile ones, found {len(kept)}"
    else:
        verdict = multikrum.select(gram[np.ix_(kept, kept)], hostile_left)
        selected = tuple(kept[position] for position in verdict.selected)
        rejected |= {kept[position]: reason for position, reason in verdict.rejected.items()}
        for position, score in enumerate(verdict.scores):
            scores[kept[position]] = score
        few = len(selected) < selected_min
        refusal = f"{len(selected)} updates selected, a sum of fewer than {selected_min} is not opened" if few else ""
    return Selection(
        selected=() if refusal else selected,
        rejected=rejected,
        scores=tuple(scores),
        norm_sigma=_sigmas([math.sqrt(max(value, 0)) for value in norms_squared]),
        refusal=refusal,
    )


def _sigmas(norms: list[float]) -> tuple[float, ...]:
    if not norms:
        return ()
    centre = statistics.median(norms)
    spread = 1.4826 * statistics.median(abs(norm - centre) for norm in norms)
    return tuple((norm - centre) / spread if spread > 0 else 0.0 for norm in norms)
