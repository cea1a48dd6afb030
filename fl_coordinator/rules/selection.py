"""From the opened Gram matrix to the set whose sum may be opened: norms against the clip first, then Multi-Krum.

Every aggregator runs this on the same integers, and the plain yardstick runs it on a Gram matrix computed in clear: the
answers are equal, always. An update that is longer than an honest one can be was not made by an honest device, so each
such refusal uses up one of the f hostile devices that Multi-Krum has to expect among the rest.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fl_coordinator.rules import multikrum, policy
from fl_coordinator.rules.history import Memory
from fl_coordinator.rules.policy import Choice


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


def decide(
    policy_name: str,
    gram: NDArray[np.int64],
    device_ids: Sequence[str],
    *,
    norm_max: int,
    clip_norm_l2: float,
    hostile_max: int,
    hostile_found: int,
    selected_min: int,
    memory: Memory | None = None,
    share_max: float = policy.SHARE_MAX,
) -> Choice:
    """The same by a round's policy (`policy.choose`): what is longer than the clip is refused first and uses up f.

    Weights and reasons are for all n rows, verdicts for those that were not refused for their norm, in their order.
    Raises Malformed as `policy.choose` does.
    """
    count = len(gram)
    scale = norm_max / clip_norm_l2
    lengths = [int(value) for value in np.diagonal(gram)]
    long = {
        index: f"norm {math.sqrt(value) / scale:.3g} exceeds the clip norm {clip_norm_l2:g}"
        for index, value in enumerate(lengths)
        if value > norm_max * norm_max
    }
    kept = [index for index in range(count) if index not in long]
    found = policy.choose(
        policy_name,
        gram[np.ix_(kept, kept)],
        max(0, hostile_max - hostile_found - len(long)),
        [device_ids[index] for index in kept],
        selected_min=selected_min,
        memory=memory,
        share_max=share_max,
    )
    integers = np.zeros(count, dtype=np.int64)
    integers[kept] = found.integers
    refused = long | {kept[place]: reason for place, reason in found.refused.items()}
    return replace(found, integers=integers, refused=dict(sorted(refused.items())))


def _sigmas(norms: list[float]) -> tuple[float, ...]:
    if not norms:
        return ()
    centre = statistics.median(norms)
    spread = 1.4826 * statistics.median(abs(norm - centre) for norm in norms)
    return tuple((norm - centre) / spread if spread > 0 else 0.0 for norm in norms)
