"""What the opened distances of earlier rounds say about a device: the memory of the policy `history`.

A device that pushes gently every round hides in the noise of one round. The Gram matrices opened anyway add
up to the Gram matrix of everything a device sent lately, laid end to end; noise of single rounds cancels in it, a
common purpose does not. So the memory holds, by pairs of devices, decayed sums of the clipped Gram matrices and the
decayed number of rounds in which the pair met (devices need not take part in every round); and by device, how far its
updates went along with what was opened. From it come three kinds of evidence (`suspicion`), each of which an attacker
can avoid at the price of showing in another:

    apart     loud or alone: the distance to the nearer half of the honest, updates up to three medians long keeping
              their length
    together  one of a group that moves as one: the spectrum of the updates clipped at one median
    against   works against the others: the inner product with what was opened, the device's own part taken out

One thing needs no weighing (`unrelated`): updates that are orthogonal to all others, round for round, are noise.
Whatever its data are, a device that learns the task has something in common with another, or works against it.

All of it is integers, follows from the signed transcripts alone, and reveals nothing that they do not.

Compatibility: the packed form of a Memory is kept by coordinator and aggregators; fields are only ever added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from fl_coordinator.rules import spectral
from fl_coordinator.rules.geometry import UNIT, Floats, Gram, clipped, median, robust_sigmas, squared_distances
from model_delta.errors import Malformed

FORGETTING_BITS = 7
"""A round's weight shrinks by 1/2^7 with every later one: after 88 rounds it counts half."""

LOUD_MEDIANS = 3.0
REMEMBERED_MAX = 1_024
SIGMAS_MAX = 6.0
"""No evidence in sigmas counts for more, so that none of the three silences the others."""
SPREAD_MIN = 0.05
"""A sigma is at least this part of the median: where all devices are alike, tiny differences are no evidence."""
UNRELATED_PART = 16
"""Who has less than a 16th of what the median device has in common with the others has nothing to do with them. On the
digits that constants are chosen on, noise has a 60th in its first round and a thousandth after ten; the least of any
honest device is a fifth."""


class Memory(msgspec.Struct, frozen=True, omit_defaults=True):
    """Decayed sums over rounds, int64 little endian: [m, m] Gram entries clipped at three medians (`sums`; units 2^-20)
    and at one (`close`), [m, m] meetings (2^-20), and [m] inner products with the opened means (`along`; 2^-20)."""

    device_ids: tuple[str, ...] = ()
    sums: bytes = b""
    meetings: bytes = b""
    close: bytes = b""
    along: bytes = b""


@dataclass(frozen=True)
class Past:
    """A memory with this round's Gram matrix in it, rows in this round's order and then those who are absent; `along`
    lacks this round's part, which the choice decides. `now` is this round's matrix clipped at one median."""

    device_ids: tuple[str, ...]
    sums: Gram
    meetings: Gram
    close: Gram
    along: NDArray[np.int64]
    now: Gram

    def mean(self, sums: Gram) -> Gram:
        """This round's devices only: their mean remembered Gram matrix, int64[n, n]."""
        count = len(self.now)
        return np.asarray(np.rint(sums[:count, :count] / self.meetings[:count, :count] * UNIT).astype(np.int64))

    def followed(self, voices: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64[n]: how far each update went along with the mean of the others, were `voices` int64[n] its weights."""
        total = max(int(voices.sum()), 1)
        return np.asarray((self.now @ voices - np.diagonal(self.now) * voices) // total)

    def memory(self, voices: NDArray[np.int64]) -> Memory:
        """What the next round is given when this one gave the devices `voices`; all zero when nothing was opened."""
        along = self.along.copy()
        along[: len(self.now)] += self.followed(voices)
        packed = [part.astype("<i8").tobytes() for part in (self.sums, self.meetings, self.close, along)]
        return Memory(self.device_ids, *packed)


def recall(memory: Memory, device_ids: Sequence[str], gram: Gram) -> Past:
    """The memory, decayed by a round, with the Gram matrix int64[n, n] of this round's `device_ids` added to it.

    Keeps the 1,024 devices that took part last. Raises Malformed for a memory that is not square, for repeated ids, and
    for a matrix that does not fit the ids.
    """
    count = len(device_ids)
    if len(set(device_ids)) != count or gram.shape != (count, count):
        raise Malformed(f"history: {len(set(device_ids))} devices do not fit a matrix of shape {gram.shape}")
    here = set(device_ids)
    absent = [name for name in memory.device_ids if name not in here][: max(0, REMEMBERED_MAX - count)]
    names = (*device_ids, *absent)
    place = {name: index for index, name in enumerate(memory.device_ids)}
    origin = np.array([place.get(name, -1) for name in names], dtype=np.int64)
    now = clipped(gram)
    parts = []
    for data, added in ((memory.sums, clipped(gram, LOUD_MEDIANS)), (memory.meetings, UNIT), (memory.close, now)):
        kept = _moved(_array(data, memory, 2), origin)
        kept -= kept >> FORGETTING_BITS
        kept[:count, :count] += added
        parts.append(kept)
    along = _moved(_array(memory.along, memory, 1), origin)
    along -= along >> FORGETTING_BITS
    return Past(names, parts[0], parts[1], parts[2], along, now)


def apart(past: Past, hostile_max: int) -> Floats:
    """Sigmas by which a device's summed distance to its (n - f) / 2 nearest is above the median, float64[n]."""
    neighbours = max(1, (len(past.now) - hostile_max) // 2)
    nearest = np.sort(np.maximum(squared_distances(past.mean(past.sums)), 0), axis=1)[:, 1 : 1 + neighbours]
    return robust_sigmas(np.sqrt(nearest.sum(axis=1).astype(np.float64)), SPREAD_MIN)


def together(past: Past) -> Floats:
    """How much a device adds to what the spectrum shows, in units of the mean device, float64[n]."""
    return spectral.relative(spectral.weight(past.mean(past.close)))


def against(past: Past, voices: NDArray[np.int64]) -> Floats:
    """Sigmas by which a device went less along with the others than the median device, float64[n]: in remembered rounds
    as they were opened, in this one as `voices` int64[n] would open it."""
    count = len(past.now)
    met = np.diagonal(past.meetings)[:count].astype(np.float64)
    return -robust_sigmas((past.along[:count] + past.followed(voices)) / met, SPREAD_MIN)


def unrelated(past: Past, hostile_max: int) -> NDArray[np.bool_]:
    """Who has next to nothing in common with any other device, bool[n]; at most f, those with the least.

    Only updates of half the median length and more: what is left of a device that has learned its rows is rounding.
    Measured by the sum of squared cosines with the others in the mean remembered Gram matrix, beside the median one.
    """
    mean = past.mean(past.close)
    lengths = np.sqrt(np.maximum(np.diagonal(mean), 1).astype(np.float64))
    # Pairs that met in different rounds may seem to have more than all in common.
    cosines = np.clip(np.rint(mean / lengths[:, None] / lengths[None, :] * UNIT), -UNIT, UNIT).astype(np.int64)
    np.fill_diagonal(cosines, 0)
    common = (cosines * cosines).sum(axis=1)
    found = np.zeros(len(common), dtype=np.bool_)
    few = UNRELATED_PART * common.astype(np.float64) < median(common.astype(np.float64))
    low = np.flatnonzero(few & (4 * np.diagonal(mean) >= UNIT))
    found[sorted(low.tolist(), key=lambda index: (int(common[index]), -index))[:hostile_max]] = True
    return found


def suspicion(*sigmas: Floats, groups: Floats) -> Floats:
    """The evidence added up, float64[n]: `groups` plus sigmas between 0 and six, since good conduct in one respect does
    not excuse another."""
    total = groups
    for one in sigmas:
        total = total + np.clip(one, 0.0, SIGMAS_MAX)
    return total


def _array(data: bytes, memory: Memory, dimensions: int) -> NDArray[np.int64]:
    count = len(memory.device_ids)
    if len(data) != 8 * count**dimensions:
        raise Malformed(f"history: expected {8 * count**dimensions} bytes for {count} devices, found {len(data)}")
    return np.frombuffer(data, dtype="<i8").astype(np.int64).reshape((count,) * dimensions)


def _moved(values: NDArray[np.int64], origin: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows (and columns) `origin` int64[m] of `values`, zeros where it is -1."""
    if np.array_equal(origin, np.arange(len(values))):
        return values
    moved = np.zeros((origin.size,) * values.ndim, dtype=np.int64)
    known = np.flatnonzero(origin >= 0)
    moved[np.ix_(*[known] * values.ndim)] = values[np.ix_(*[origin[known]] * values.ndim)]
    return moved
