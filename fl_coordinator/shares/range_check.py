"""Before anything is multiplied: does every update fit the ring, and may this round be announced at all?

A Gram matrix modulo 2^64 is worthless against a device that picks its numbers: one entry of 2^32 squares to zero. So
each frozen update is first projected on 64 random subsets of its coordinates, chosen by a coin tossed after the freeze,
and on shares it is checked that each of the 64 sums lies in [-B, B). One bit per device is opened: all 64, or not.

An honest update always passes: a subset sum is at most sqrt(d) times the norm. What passes, except with probability
2^-64, has l2 norm below 16 B over the integers. In short (docs/decisions/0001-secure-selection.md has the steps):
an entry of magnitude >= 2B makes each sum leave the range with probability >= 1/2, whatever the other entries are; and
a vector without such an entry but with norm >= 16 B spreads its subset sums so widely (Erdős' theorem on the
Littlewood-Offord problem) that each lies in the range with probability < 1/2. Hence with 256 B^2 <= 2^62 no entry of
the Gram matrix can wrap.

The comparison itself turns sums into bits as ABY3 does (Mohassel, Rindal, CCS 2018, section 5.3): y0 + y1, known to one
party, and y2, known to the two others, are two binary-shared inputs of a Kogge-Stone adder.
"""

from __future__ import annotations

import math

import numpy as np

from fl_coordinator.shares.fixed_point import Words, norm_max
from fl_coordinator.shares.sharing import PARTIES, Exchange, Pair, Session, Steps, conjunction, open_bits, to_bytes
from model_delta.errors import Malformed
from model_delta.task import RoundTask

EXPONENT_MAX = 27
FRACTION_BITS_MAX = 40
_WORD_BITS = 64
_ONES = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


def bound_exponent(task: RoundTask) -> int:
    """b of the bound B = 2^b: the least power of two above every subset sum of an honestly clipped update."""
    reach = norm_max(task.clip_norm_l2, task.fraction_bits, task.length) * (math.isqrt(task.length) + 1)
    return reach.bit_length()


def require_announceable(task: RoundTask) -> None:
    """Raise Malformed, with the numbers, for a round in which a check could fail or an opening could say too much.

    To be asked before a round is signed; devices and aggregators ask again.
    """
    what = f"round {task.round_id!r}"
    if task.length < 1:
        raise Malformed(f"{what}: expected at least 1 parameter, found {task.length}")
    if not 0 < task.clip_norm_l2 < math.inf:
        raise Malformed(f"{what}: expected a clip norm above 0, found {task.clip_norm_l2}")
    if not 0 <= task.fraction_bits <= FRACTION_BITS_MAX:
        raise Malformed(f"{what}: expected 0 to {FRACTION_BITS_MAX} fraction bits, found {task.fraction_bits}")
    exponent = bound_exponent(task)
    if exponent > EXPONENT_MAX:
        raise Malformed(
            f"{what}: {task.length} parameters, clip norm {task.clip_norm_l2:g}, {task.fraction_bits} fraction bits: "
            f"a subset sum can reach 2^{exponent}, at most 2^{EXPONENT_MAX} keeps the distances from wrapping; "
            f"lower fraction_bits to {max(0, task.fraction_bits - (exponent - EXPONENT_MAX))} or the clip norm"
        )
    keys = {key.sealing for key in task.aggregators} | {key.verifying for key in task.aggregators}
    if len(task.aggregators) != PARTIES or len(keys) != 2 * PARTIES or len({key.name for key in task.aggregators}) != 3:
        raise Malformed(f"{what}: expected three aggregators of different name and keys, found {len(task.aggregators)}")
    if task.hostile_max < 0 or task.selected_min < task.hostile_max + 2:
        raise Malformed(
            f"{what}: expected selected_min of at least hostile_max + 2 = {task.hostile_max + 2} (hostile devices can "
            f"subtract their own updates from the opened sum), found {task.selected_min}"
        )


def range_check(session: Session, sums: Pair, exponent: int) -> Steps[np.ndarray[tuple[int, ...], np.dtype[np.bool_]]]:
    """One bit per row, opened: whether all its sums lie in [-2^exponent, 2^exponent). bool[n] from shared [n, 64].

    Raises Untrusted when the peers disagree over the opened bits.
    """
    left, right = yield from _as_bits(session, sums, np.uint64(1 << exponent))
    shifted = yield from _add(session, left, right)
    inside = _negated_above(session, shifted, exponent + 1)
    width = sums.first.shape[1]
    while width > 1:
        width //= 2
        inside = yield from conjunction(
            session, f"every-sum-{width}", inside.columns(0, width), inside.columns(width, 2 * width)
        )
    places = _WORD_BITS // 2
    while places:
        inside = yield from conjunction(session, f"every-bit-{places}", inside, inside >> places)
        places //= 2
    # Bits above the lowest hold partial results about single devices: they must not be opened.
    lowest = Pair(inside.first & np.uint64(1), inside.second & np.uint64(1))
    opened = yield from open_bits(session, "range", lowest)
    passed: np.ndarray[tuple[int, ...], np.dtype[np.bool_]] = opened[:, 0] == 1
    return passed


def _as_bits(session: Session, sums: Pair, bound: np.uint64) -> Steps[tuple[Pair, Pair]]:
    """Binary sharings of y0 + y1 + bound (known to party 0) and of y2 (known to parties 1 and 2)."""
    zeros = np.zeros_like(sums.first)
    if session.index == 0:
        pad = session.mask(2, "split", zeros.shape)
        masked = (sums.first + sums.second + bound) ^ pad
        yield Exchange("split", {1: to_bytes(masked)})
        return Pair(pad, masked), Pair(zeros, zeros)
    if session.index == 1:
        received = yield Exchange("split", {}, frozenset({0}))
        return Pair(session.read_words(received, 0, "split", zeros.shape), zeros), Pair(zeros, sums.second)
    yield Exchange("split", {})
    return Pair(zeros, session.mask(0, "split", zeros.shape)), Pair(sums.first, zeros)


def _add(session: Session, a: Pair, b: Pair) -> Steps[Pair]:
    """Binary shares of a + b modulo 2^64: Kogge-Stone, six levels, seven messages.

    Generate and propagate (as a ^ b) of a span exclude each other, so that their OR is an exclusive or, which is free.
    """
    difference = a ^ b
    generate = yield from conjunction(session, "carry-start", a, b)
    propagate, reach = difference, 1
    while reach < _WORD_BITS:
        step = f"carry-{reach}"
        if 2 * reach == _WORD_BITS:
            generate ^= yield from conjunction(session, step, propagate, generate << reach)
        else:
            both = yield from conjunction(
                session, step, _stack(propagate, propagate), _stack(generate << reach, propagate << reach)
            )
            rows = a.first.shape[0]
            generate ^= Pair(both.first[:rows], both.second[:rows])
            propagate = Pair(both.first[rows:], both.second[rows:])
        reach *= 2
    return difference ^ (generate << 1)


def _negated_above(session: Session, value: Pair, free_bits: int) -> Pair:
    """NOT value, with the lowest `free_bits` bits replaced by ones. Share 0 carries the negation."""
    above = ~np.uint64((1 << free_bits) - 1)

    def masked(share: Words, number: int) -> Words:
        return (share & above) ^ _ONES if number == 0 else share & above

    return Pair(masked(value.first, session.index), masked(value.second, session.following))


def _stack(a: Pair, b: Pair) -> Pair:
    return Pair(np.concatenate([a.first, b.first]), np.concatenate([a.second, b.second]))
