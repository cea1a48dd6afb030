"""What the opened distances of earlier rounds say about a device: the memory of the policy `history`.

A device that pushes gently every round hides in the noise of one round. The Gram matrices opened anyway add
up to the Gram matrix of everything a device sent lately, laid end to end; noise of single rounds cancels in it, a
common purpose does not. So the memory is a decayed sum of clipped Gram matrices, by pairs of devices, with the decayed
number of rounds in which the pair met: devices need not take part in every round. All of it is integers, follows from
the signed transcripts alone, and reveals nothing that they do not.

Compatibility: the packed form of a Memory is kept by coordinator and aggregators; fields are only ever added.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from fl_coordinator.rules.geometry import UNIT, Gram
from model_delta.errors import Malformed

FORGETTING_BITS = 7
"""A round's weight shrinks by 1/2^7 with every later one: after 88 rounds it counts half."""

REMEMBERED_MAX = 1_024


class Memory(msgspec.Struct, frozen=True):
    """Decayed sums over rounds, int64 little endian [m, m]: clipped Gram entries (units 2^-20) and meetings (same)."""

    device_ids: tuple[str, ...] = ()
    sums: bytes = b""
    meetings: bytes = b""


def remember(memory: Memory, device_ids: Sequence[str], clipped: Gram) -> tuple[Memory, Gram]:
    """The memory after a round with `device_ids` and their clipped Gram matrix; and their mean one, int64[n, n].

    Keeps the 1,024 devices that took part last. Raises Malformed for a memory that is not square, for repeated ids, and
    for a matrix that does not fit the ids.
    """
    if len(set(device_ids)) != len(device_ids) or clipped.shape != (len(device_ids), len(device_ids)):
        raise Malformed(f"history: {len(set(device_ids))} devices do not fit a matrix of shape {clipped.shape}")
    sums, meetings = _matrix(memory.sums, memory), _matrix(memory.meetings, memory)
    absent = [index for index, name in enumerate(memory.device_ids) if name not in set(device_ids)]
    room = max(0, REMEMBERED_MAX - len(device_ids))
    absent = absent[:room]
    names = [*device_ids, *(memory.device_ids[index] for index in absent)]
    place = {name: index for index, name in enumerate(memory.device_ids)}
    origin = np.array([place.get(name, -1) for name in names], dtype=np.int64)
    sums, meetings = _moved(sums, origin), _moved(meetings, origin)
    sums -= sums >> FORGETTING_BITS
    meetings -= meetings >> FORGETTING_BITS
    here = slice(0, len(device_ids))
    sums[here, here] += clipped
    meetings[here, here] += UNIT
    mean = np.rint(sums[here, here] / meetings[here, here] * UNIT).astype(np.int64)
    return Memory(tuple(names), sums.astype("<i8").tobytes(), meetings.astype("<i8").tobytes()), mean


def _matrix(data: bytes, memory: Memory) -> NDArray[np.int64]:
    count = len(memory.device_ids)
    if len(data) != 8 * count * count:
        raise Malformed(f"history: expected {8 * count * count} bytes for {count} devices, found {len(data)}")
    return np.frombuffer(data, dtype="<i8").astype(np.int64).reshape(count, count)


def _moved(matrix: NDArray[np.int64], origin: NDArray[np.int64]) -> NDArray[np.int64]:
    moved = np.zeros((origin.size, origin.size), dtype=np.int64)
    known = np.flatnonzero(origin >= 0)
    moved[np.ix_(known, known)] = matrix[np.ix_(origin[known], origin[known])]
    return moved
