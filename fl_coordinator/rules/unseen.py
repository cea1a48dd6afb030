"""Who is chosen where distances stay hidden: from one bit a pair, or from nothing but the set itself.

`cluster` is a pure function of the bits "these two are close", which everybody has. DBSCAN (`outliers.density`) whose
core devices are close to more than half of all, itself counted: with f below half each of them is close to honest ones,
and no group of copies makes a cluster of its own. Of the cluster the n - f devices that are close to the most others
are kept, of equal ones those with the lower index, with equal weights. What the radius was may be unknown.

Of a selection computed on shares there is nothing left to decide here, only to say what came of it and whether it may
be opened at all, which follows from public numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fl_coordinator.rules import multikrum
from fl_coordinator.rules.history import Memory
from fl_coordinator.rules.outliers import density
from fl_coordinator.rules.policy import SHARE_MAX, Choice


def refusal_before(policy: str, count: int, hostile_max: int, selected_min: int) -> str:
    """Why `count` devices are too few to look at more than their validity; "" if they are enough."""
    needed = multikrum.contributions_min(hostile_max)
    if count < needed:
        return f"policy {policy} needs {needed} usable updates to stand {hostile_max} hostile ones, found {count}"
    return _too_few(kept_of(count, hostile_max), selected_min)


def kept_of(count: int, hostile_max: int) -> int:
    """How many of `count` devices Multi-Krum keeps, and `cluster` at most."""
    return count - hostile_max


def by_neighbours(near: NDArray[np.bool_], hostile_max: int, selected_min: int) -> tuple[Choice, NDArray[np.int64]]:
    """The choice of `cluster` among n devices, and their clusters (0 the largest, -1 none), from bits bool[n, n]."""
    count, most = len(near), kept_of(len(near), hostile_max)
    label = density(near, count // 2 + 1)
    close = (near.sum(axis=1) - np.diagonal(near)).tolist()
    inside = sorted(np.flatnonzero(label == 0).tolist(), key=lambda place: (-close[place], place))
    reasons = {
        place: f"close to {close[place]} of {count - 1} others"
        + (
            f", not among the {most} with the most"
            if label[place] == 0
            else ", outside the cluster of those close to most"
        )
        + "; distances were not revealed"
        for place in sorted(set(range(count)) - set(inside[:most]))
    }
    chosen = sorted(inside[:most])
    if not chosen:
        return _equally(count, [], reasons, "no device is close to more than half of all; nothing is opened"), label
    return _equally(count, chosen, reasons, _too_few(len(chosen), selected_min)), label


def by_selection(count: int, chosen: Sequence[int], selected_min: int) -> Choice:
    """What to say of a set that Multi-Krum chose on shares among n devices."""
    reasons = {
        place: f"Krum score not among the {len(chosen)} lowest of {count}; scores were not revealed"
        for place in sorted(set(range(count)) - set(chosen))
    }
    return _equally(count, chosen, reasons, _too_few(len(chosen), selected_min))


def nobody(count: int, refusal: str) -> Choice:
    """No choice among n devices, and why."""
    return _equally(count, [], {}, refusal)


def _too_few(kept: int, selected_min: int) -> str:
    if kept < selected_min:
        return f"{kept} updates selected, a sum of fewer than {selected_min} is not opened"
    if kept * SHARE_MAX < 1:
        return f"one device would carry {1 / max(kept, 1):.0%} of the sum, more than {SHARE_MAX:.0%} is not opened"
    return ""


def _equally(count: int, chosen: Sequence[int], reasons: Mapping[int, str], refusal: str) -> Choice:
    integers = np.zeros(count, dtype=np.int64)
    if not refusal:
        integers[list(chosen)] = 1
    return Choice(integers, int(integers.sum()), dict(reasons), (), Memory(), refusal)
