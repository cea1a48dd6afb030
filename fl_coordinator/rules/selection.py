"""From the opened Gram matrix to the weights of the sum that may be opened: the clip first, then the round's policy.

Every aggregator runs this on the same integers, and the plain yardstick runs it on a Gram matrix computed in clear: the
answers are equal, always. An update that is longer than an honest one can be was not made by an honest device, so each
such refusal uses up one of the f hostile devices that the policy has to expect among the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fl_coordinator.rules import policy
from fl_coordinator.rules.history import Memory
from fl_coordinator.rules.policy import Choice


@dataclass(frozen=True)
class Judged:
    """`choice` with weights and reasons for all rows; its verdicts are for the rows `kept`, in that order."""

    choice: Choice
    kept: tuple[int, ...]


def decide(
    policy_name: str,
    gram: NDArray[np.int64],
    device_ids: Sequence[str],
    *,
    squared_max: int,
    unit: float,
    clip_norm_l2: float,
    hostile_max: int,
    hostile_found: int,
    selected_min: int,
    memory: Memory | None = None,
) -> Judged:
    """Judge n updates by their inner products, int64[n, n], by a round's policy (`policy.choose`).

    `squared_max` is the largest squared norm of an honest update, `unit` the norm of an update of length 1, both as the
    matrix has them; `hostile_found`: updates already refused for something that no honest device does. Raises Malformed
    as `policy.choose` does.
    """
    count = len(gram)
    long = {
        index: f"norm {math.sqrt(value) / unit:.3g} exceeds the clip norm {clip_norm_l2:g}"
        for index, value in enumerate(int(value) for value in np.diagonal(gram))
        if value > squared_max
    }
    kept = [index for index in range(count) if index not in long]
    found = policy.choose(
        policy_name,
        gram[np.ix_(kept, kept)],
        max(0, hostile_max - hostile_found - len(long)),
        [device_ids[index] for index in kept],
        selected_min=selected_min,
        memory=memory,
    )
    integers = np.zeros(count, dtype=np.int64)
    integers[kept] = found.integers
    refused = long | {kept[place]: reason for place, reason in found.refused.items()}
    choice = Choice(integers, found.divisor, dict(sorted(refused.items())), found.verdicts, found.memory, found.refusal)
    return Judged(choice, tuple(kept))
