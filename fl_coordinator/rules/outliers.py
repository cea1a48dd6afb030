"""Updates that stand apart: density clusters, distance from the median in sigmas, and copies.

DBSCAN (Ester, Kriegel, Sander and Xu, KDD 1996) on distances from the Gram matrix. The variant: the radius is 1.5 times
the median distance between two devices, a core device has at least a quarter of all devices (itself counted) within the
radius, and clusters are numbered by size, the largest 0, equal ones by their lowest index; -1 stands apart.

Copies: updates of two honest devices never coincide, since they come from other rows and are rounded at random. Devices
whose updates are closer than a tenth of their length are copies of each other; a policy may count them as one voice.
An attacker who knows this adds private noise, and has to spend a tenth of its length on it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fl_coordinator.rules.geometry import UNIT, Floats, Gram, clipped, median, norms, robust_sigmas, squared_distances

RADIUS_MEDIANS = 1.5
SIGMAS_MAX = 3.0
COPY_DISTANCE = 0.1


def clusters(gram: Gram, metric: str = "euclidean") -> NDArray[np.int64]:
    """Cluster numbers int64[n]: 0 the largest, -1 none. `metric` is `euclidean` or `cosine` (1 - cosine)."""
    distances = _distances(gram, metric)
    count = len(gram)
    radius = RADIUS_MEDIANS * median(distances[np.triu_indices(count, 1)])
    return density(distances <= radius, max(2, count // 4))


def density(near: NDArray[np.bool_], core_min: int) -> NDArray[np.int64]:
    """Cluster numbers int64[n] of devices of which bits bool[n, n], symmetric and true for a device itself, say who is
    within the radius of whom; a core device has at least `core_min` within it, itself counted."""
    count = len(near)
    core = near.sum(axis=1) >= core_min
    label = np.full(count, -1, dtype=np.int64)
    found = 0
    for start in np.flatnonzero(core):
        if label[start] >= 0:
            continue
        front = np.zeros(count, dtype=np.bool_)
        front[start] = True
        while front.any():
            label[front] = found
            reached = near[front & core].any(axis=0)
            front = reached & (label < 0)
        found += 1
    sizes = [(-int((label == number).sum()), number) for number in range(found)]
    rank = {number: place for place, (_, number) in enumerate(sorted(sizes))}
    return np.array([rank.get(int(number), -1) for number in label], dtype=np.int64)


def norm_sigmas(gram: Gram) -> Floats:
    """How far each norm is from the median norm, in robust standard deviations (1.4826 MAD); float64[n]."""
    return robust_sigmas(norms(gram))


def distance_sigmas(gram: Gram) -> Floats:
    """The same for each device's median distance to the others."""
    distances = _distances(gram, "euclidean")
    others = [np.delete(row, index) for index, row in enumerate(distances)]
    return robust_sigmas(np.array([median(row) for row in others]))


def copies(gram: Gram) -> NDArray[np.int64]:
    """How many devices sent (nearly) the same direction and clipped length, itself counted: int64[n], 1 is alone.

    Compared after clipping at the median norm. Updates of length zero are copies of each other.
    """
    short = clipped(gram)
    lengths = np.diagonal(short)
    # Rounding moved each of the four entries of a squared distance by at most 1/2: 3 units cannot tell copies apart.
    bound = np.rint(COPY_DISTANCE**2 * np.minimum(lengths[:, None], lengths[None, :])).astype(np.int64)
    return np.asarray((squared_distances(short) <= np.maximum(bound, 3)).sum(axis=1))


def _distances(gram: Gram, metric: str) -> Floats:
    if metric == "euclidean":
        return np.asarray(np.sqrt(np.maximum(squared_distances(gram), 0).astype(np.float64)))
    lengths = norms(gram)
    scale = np.where(lengths > 0, lengths, 1.0)
    cosine = np.rint(gram / scale[:, None] / scale[None, :] * UNIT) / UNIT
    np.fill_diagonal(cosine, 1.0)
    return np.asarray(np.maximum(1.0 - cosine, 0.0))
