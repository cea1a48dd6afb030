"""May this round be announced at all? Every number that a later step relies on, from the announcement alone.

The proofs behind the numbers are in docs/decisions/0002-sketched-distances.md. In units of 2^-fraction_bits: an honest
update is at most N long; what passes the range check is shorter than 5 B over the integers, B = 2^exponent >= 6 N.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from fl_coordinator.privacy import HONEST_MIN, headroom_units, part_std_units
from fl_coordinator.rules import reveals
from fl_coordinator.rules.policy import remembers, weight_bits
from fl_coordinator.shares.fixed_point import norm_max
from fl_coordinator.shares.sharing import PARTIES
from model_delta.errors import Malformed
from model_delta.task import RoundTask
from model_delta.trust.updater import RECORD_FORMAT

CONTRIBUTIONS_MAX = 1_024
"""The most that one round takes."""

PROJECTIONS = 48
COPIES, BUCKETS = 2, 1_024
"""A sketch: that many independent copies of that many sums. Its products are off by sqrt(2 / 2048) = 3.1 %."""

EXPONENT_MAX = 24
FRACTION_BITS_MAX = 24
LENGTH_MAX = 1 << 26
NOISE_MAX = 10_000
_SKETCH_BITS, _SUM_BITS = 27, 31
"""Of a copy in a sketch, its l2 norm and so each word, and of one in the opened sum, without the sign. An inner product
of sketches, of which twice is opened modulo 2^64, is then below COPIES * 2^54 and needs no bound of its own."""
_SKETCH_BITS_ONCE = 29
"""Before lifted sketches were checked; rounds of that time can be replayed."""


@dataclass(frozen=True)
class Bounds:
    """Of one round. `norm`: N; `exponent`: b of B = 2^b; `copies`: of the sketch, 0 when distances are exact;
    `measured`: how many words of a device are multiplied; `piled`: how many coordinates add up in one of them."""

    norm: int
    exponent: int
    copies: int
    measured: int
    piled: int

    @property
    def scale(self) -> int:
        """The opened Gram matrix is that many times the inner products (their estimate, when sketched)."""
        return max(1, self.copies)

    @property
    def squared_max(self) -> int:
        """The largest diagonal entry of the opened matrix that is not refused as longer than the clip. A sketched norm
        is an estimate: twice the square is let through, so that chance refuses no honest device."""
        return self.scale * self.norm * self.norm * (2 if self.copies else 1)

    @property
    def doubled_distance_max(self) -> int:
        """Twice the largest squared distance of two updates whose squared norms are at most `squared_max`. With an
        exponent that can be checked it is below 2^48, so that 1,024 of them add up to less than 2^58."""
        return 8 * self.squared_max

    @property
    def norm_accepted(self) -> int:
        """The length of what is not refused: N, or the root of 2 times N, rounded up, where it is estimated."""
        return math.isqrt(2 * self.norm * self.norm) + 1 if self.copies else self.norm


def bounds_of(task: RoundTask) -> Bounds:
    """The numbers of `task`, checked or not."""
    norm = norm_max(task.clip_norm_l2, task.fraction_bits, task.length)
    exponent = (6 * norm - 1).bit_length()
    if task.length <= COPIES * BUCKETS:
        return Bounds(norm, exponent, 0, task.length, 1)
    return Bounds(norm, exponent, COPIES, COPIES * BUCKETS, -(-task.length // BUCKETS))


def require_announceable(task: RoundTask, *, once: bool = False) -> None:
    """Raise Malformed, with the numbers, for a round in which a check could fail or an opening could say too much.

    To be asked before a round is signed; devices and aggregators ask again. `once`: whether it could be announced at
    any time, for a round that is over.
    """
    what = f"round {task.round_id!r}"
    if task.format > RECORD_FORMAT:
        raise Malformed(f"{what}: format {task.format}, this reader knows up to {RECORD_FORMAT}")
    if not 1 <= task.length <= LENGTH_MAX:
        raise Malformed(f"{what}: expected 1 to {LENGTH_MAX} parameters, found {task.length}")
    if not 0 < task.clip_norm_l2 < math.inf:
        raise Malformed(f"{what}: expected a clip norm above 0, found {task.clip_norm_l2}")
    if not 0 <= task.fraction_bits <= FRACTION_BITS_MAX:
        raise Malformed(f"{what}: expected 0 to {FRACTION_BITS_MAX} fraction bits, found {task.fraction_bits}")
    if not 0 <= task.contributions_max <= CONTRIBUTIONS_MAX:
        raise Malformed(
            f"{what}: expected at most {CONTRIBUTIONS_MAX} contributions, found {task.contributions_max} announced"
        )
    _require_revealable(task, what)
    if task.memory and not remembers(task.policy):
        raise Malformed(f"{what}: policy: expected one that remembers rounds, found {task.policy!r} with a memory")
    if not 0 <= task.noise_multiplier <= NOISE_MAX:
        raise Malformed(f"{what}: noise_multiplier: expected 0 to {NOISE_MAX}, found {task.noise_multiplier}")
    overflow = _overflow(task, _SKETCH_BITS_ONCE if once else _SKETCH_BITS)
    if overflow:
        fitting = fitted(task)
        advice = f"lower fraction_bits to {fitting.fraction_bits}" if not _overflow(fitting) else "lower the clip norm"
        raise Malformed(f"{what}: {overflow}; {advice} or take fewer contributions")
    noise_std(task)
    keys = {key.sealing for key in task.aggregators} | {key.verifying for key in task.aggregators}
    if len(task.aggregators) != PARTIES or len(keys) != 2 * PARTIES or len({key.name for key in task.aggregators}) != 3:
        raise Malformed(f"{what}: expected three aggregators of different name and keys, found {len(task.aggregators)}")
    if task.hostile_max < 0 or task.selected_min < task.hostile_max + 2:
        raise Malformed(
            f"{what}: expected selected_min of at least hostile_max + 2 = {task.hostile_max + 2} (hostile devices can "
            f"subtract their own updates from the opened sum), found {task.selected_min}"
        )


def _require_revealable(task: RoundTask, what: str) -> None:
    problem = reveals.problem(task.reveal, task.policy)
    if problem:
        raise Malformed(f"{what}: {problem[0]}: {problem[1]}")
    if task.contributions_max > most(task.reveal):
        raise Malformed(
            f"{what}: expected at most {most(task.reveal)} contributions with `reveal: {task.reveal}`, found "
            f"{task.contributions_max} announced"
        )
    if task.eps_l2 and (task.reveal != reveals.GRAPH or not 0 < task.eps_l2 < 2 * task.clip_norm_l2):
        raise Malformed(
            f"{what}: eps_l2: expected 0, or with `reveal: graph` a distance below twice the clip norm "
            f"{task.clip_norm_l2:g}, found {task.eps_l2}"
        )


def noise_std(task: RoundTask) -> float:
    """Standard deviation, in fixed-point units, of each aggregator's part of the noise; 0.0 for a round without.

    Raises Malformed for noise so small that its rounding shows.
    """
    if task.noise_multiplier == 0:
        return 0.0
    return part_std_units(task.noise_multiplier, bounds_of(task).norm, 1 << weight_bits(task.policy))


def contributions_max(task: RoundTask) -> int:
    """How many contributions the round's numbers were chosen for."""
    return task.contributions_max or most(task.reveal)


def most(reveal: str) -> int:
    """The most contributions of any round that reveals so much."""
    return reveals.SELECTION_MAX if reveal == reveals.SELECTION else CONTRIBUTIONS_MAX


def fitted(task: RoundTask) -> RoundTask:
    """The same round with as many of its fraction bits as fit (possibly 0, and not even those)."""
    bits = task.fraction_bits
    while bits > 0 and _overflow(msgspec.structs.replace(task, fraction_bits=bits)):
        bits -= 1
    return msgspec.structs.replace(task, fraction_bits=bits)


def _overflow(task: RoundTask, sketch_bits: int = _SKETCH_BITS) -> str:
    """Which number leaves the ring, in words; "" when all stay in it."""
    found, count, bits = bounds_of(task), contributions_max(task), weight_bits(task.policy)
    largest = 5 << found.exponent
    given = f"{task.length} parameters, clip norm {task.clip_norm_l2:g}, {task.fraction_bits} fraction bits: "
    total = count * found.norm_accepted << bits
    if task.noise_multiplier > 0:
        # Not `noise_std`: whether its rounding shows is another question, asked once the bits are settled.
        total += headroom_units(task.noise_multiplier * (found.norm << bits) / math.sqrt(HONEST_MIN))
    noise = " and noise" if task.noise_multiplier else ""
    if total >= 1 << _SUM_BITS:
        return given + (
            f"the sum of {count} updates with weights of {bits} bits{noise} can reach 2^{total.bit_length()}, at most "
            f"2^{_SUM_BITS} fits"
        )
    if found.exponent > EXPONENT_MAX:
        return given + f"a projection can reach 2^{found.exponent}, at most 2^{EXPONENT_MAX} can be checked"
    if found.piled * largest * largest >= 1 << 2 * sketch_bits:
        return given + f"a sum of {found.piled} coordinates in the sketch can reach 2^{sketch_bits}"
    return ""
