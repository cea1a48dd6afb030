"""How much of a voice the policy `history` leaves to a device that is suspicious.

Of n devices at most f are hostile, and nobody says which. So the 1.5 f most suspicious are doubted, the half beyond f
because suspicion mistakes one for another: a doubted device keeps a quarter of a voice, and none where it stands out by
far. What is found leaves nothing to mistake, and takes 1.5 of the 1.5 f along: every copy of an update beyond the
first, every device that is refused. To doubt honest devices on their account would only unlearn their data. A quarter
of the 1.5 f remains, since who stands out need not be all of f. Noise is certain and is taken from f itself.

Copies have one voice together, and are doubted, or believed, as the one device they may come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import fsum

import numpy as np
from numpy.typing import NDArray

VOICE = 1 << 7
"""The integer of a whole voice."""
DOUBTED_PART = 4
"""A suspicious device keeps one such part: enough to learn slowly from an honest one that differs."""
REFUSED_TIMES = 3.0
"""It keeps none when its suspicion is that many times the highest among those who are not doubted."""


@dataclass(frozen=True)
class Voices:
    """`integers` int64[n] of at most VOICE, and the highest suspicion among those who are not doubted, at least 1."""

    integers: NDArray[np.int64]
    believed: float


def voices(
    copies: NDArray[np.int64], suspicion: NDArray[np.float64], certain: NDArray[np.bool_], hostile_max: int
) -> Voices:
    """The voices of n devices by `suspicion` float64[n].

    `copies` int64[n]: how many sent the same update, itself counted. `certain` bool[n]: who is refused whatever its
    suspicion. `hostile_max` is f. Of equally suspicious devices the last is doubted first. Without copies no more than
    1.5 f devices, rounded up, lose their voice.
    """
    alone = -(-VOICE // copies)
    alone[certain] = 0
    rest = np.flatnonzero(~certain).tolist()
    order = sorted(rest, key=lambda index: (-float(suspicion[index]), -index))
    hostile_left = max(0, hostile_max - (len(copies) - len(rest)))
    found = VOICE * (len(rest) - round(fsum(1.0 / copies[rest])))
    suspects = _while_within(order, alone, _allowance(hostile_left, found))
    believed = max(1.0, float(suspicion[order[len(suspects)]]) if len(suspects) < len(order) else 1.0)
    refused = [index for index in suspects if suspicion[index] > REFUSED_TIMES * believed]
    left = [index for index in suspects if suspicion[index] <= REFUSED_TIMES * believed]
    found += int(alone[refused].sum())
    left = _while_within(left, alone, _allowance(hostile_left, found))
    alone[left] = -(-alone[left] // DOUBTED_PART)
    alone[refused] = 0
    return Voices(alone, believed)


def _allowance(hostile_max: int, found: int) -> int:
    """How many voices may be doubted when `found` are certain, both times VOICE."""
    every = 3 * hostile_max * VOICE
    return max(every - 3 * found, every // 4) // 2


def _while_within(order: list[int], alone: NDArray[np.int64], allowance: int) -> list[int]:
    """The first of `order` until their voices `alone` add up to the allowance."""
    taken: list[int] = []
    spent = 0
    for index in order:
        if spent >= allowance:
            break
        taken.append(index)
        spent += int(alone[index])
    return taken
