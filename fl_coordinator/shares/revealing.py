"""Rounds that open less than distances: `graph`, one bit a pair; `selection`, nothing but who is chosen.

Both start where the Gram matrix of `party` would be opened, from this party's additive share of twice the matrix, and
compare on shares (`comparing`, `ranking`). What is opened, and nothing besides:

    over   one bit for each device: is its squared norm above what an honest update can have? Such a device counts as
           one of the f, and none of its other bits is ever opened.
    near   in `graph`: one bit for each pair of those that are left: is their squared distance at most eps^2?
    chosen in `selection`: one bit for each: is its Krum score among the n - f lowest? Variant and ties as in
           `rules.multikrum`, to the last bit.
    sum    twice the squared norm of the sum of the chosen ones' sketches, which anybody can compute from the sum that
           is opened next. A lie about that sum shows in it. Left out in a round with noise.

Without an announced eps, `graph` finds one: 1.2 times a quantile of the distances of up to 128 pairs that the coin
picks. It is never opened. The quantile is the median of the pairs of honest devices, were all pairs with one of the f
hostile ones far apart: C(n - f, 2) / C(n, 2) / 2 of the way up. That many far ones or copies cannot push it beyond the
honest distances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from fl_coordinator.rules import multikrum, reveals, unseen
from fl_coordinator.rules.policy import Choice
from fl_coordinator.shares.bounds import Bounds, bounds_of
from fl_coordinator.shares.comparing import negative, open_planes
from fl_coordinator.shares.gram import gram_share
from fl_coordinator.shares.lifting import lift
from fl_coordinator.shares.measuring import coin_key
from fl_coordinator.shares.ranking import LENGTH_MAX, below, sums_where
from fl_coordinator.shares.sharing import Exchange, Pair, Ring, Session, Steps, reshare, to_bytes
from fl_coordinator.shares.streams import Words64, expand_bytes
from model_delta.errors import Malformed, Untrusted
from model_delta.task import RoundTask

SAMPLE_MAX = LENGTH_MAX
"""Pairs from which a radius is found."""

_WORD_BITS = 64
_RADIUS_SQUARED = (36, 25)
"""1.2^2 in whole numbers: chosen among 1, 1.2 and 1.5 for what was left of learning (digits, Dirichlet 0.3, seeds that
no table uses)."""


@dataclass(frozen=True)
class Revealed:
    """What came of n measured devices. `kept`: places of those within the clip norm; `near`: the bits of their pairs,
    the upper triangle row by row, eight to a byte, highest first (b"" but in `graph`); `choice` is for all n places,
    `clusters` for those kept; `doubled_norm`: see `sum` in the module, 0 when it was not opened."""

    kept: tuple[int, ...]
    near: bytes
    choice: Choice
    clusters: tuple[int, ...]
    doubled_norm: int


def reveal(session: Session, task: RoundTask, coin: bytes, sketches: Pair, hostile_found: int) -> Steps[Revealed]:
    """Choose among the devices of shared `sketches` uint32[n, w], after `hostile_found` failed the range check."""
    lifted = yield from lift(session, sketches)
    doubled = gram_share(lifted.first, lifted.second)
    count, hostile = len(doubled), max(0, task.hostile_max - hostile_found)
    if task.reveal == reveals.GRAPH and task.eps_l2:
        kept, near = yield from _announced_graph(session, task, doubled, hostile)
    else:
        kept, near = (yield from _within(session, bounds_of(task), doubled)), None
    hostile = max(0, hostile - (count - len(kept)))
    inner = doubled[np.ix_(kept, kept)]
    clusters: tuple[int, ...] = ()
    refusal = unseen.refusal_before(task.policy, len(kept), hostile, task.selected_min)
    if refusal:
        choice, near = unseen.nobody(len(kept), refusal), None
    elif task.reveal == reveals.GRAPH:
        if near is None:
            near = yield from _found_graph(session, task, coin, inner, hostile)
        choice, labels = unseen.by_neighbours(near_matrix(near, len(kept)), hostile, task.selected_min)
        clusters = tuple(labels.tolist())
    else:
        chosen = yield from _selected(session, bounds_of(task), inner, hostile)
        choice = unseen.by_selection(len(kept), chosen, task.selected_min)
    norm = 0
    if choice.selected and task.noise_multiplier == 0:
        norm = yield from _open_number(session, "sum", inner[np.ix_(choice.selected, choice.selected)].sum())
    packed = b"" if near is None else np.packbits(near).tobytes()
    return Revealed(tuple(kept), packed, spread(choice, kept, count, task.clip_norm_l2), clusters, norm)


def judge_kept(
    task: RoundTask, hostile_max: int, count: int, near: bytes, chosen: Sequence[int]
) -> tuple[Choice, tuple[int, ...]]:
    """The choice among `count` devices within the clip norm, at most `hostile_max` of them hostile, and the clusters of
    a graph, again from what was opened: the bits `near` of a graph, or the places `chosen` of a selection. Raises
    Malformed for bits or a set of the wrong size."""
    refusal = unseen.refusal_before(task.policy, count, hostile_max, task.selected_min)
    if (refusal or task.reveal != reveals.GRAPH) and near:
        raise Malformed(f"decision: expected no bits of pairs, found {len(near)} bytes")
    if refusal:
        return unseen.nobody(count, refusal), ()
    if task.reveal == reveals.GRAPH:
        bits = near_matrix(unpacked(near, count), count)
        choice, labels = unseen.by_neighbours(bits, hostile_max, task.selected_min)
        return choice, tuple(labels.tolist())
    wanted = unseen.kept_of(count, hostile_max)
    if len(chosen) != wanted:
        raise Malformed(f"selection: expected {wanted} of {count} selected, found {len(chosen)}")
    return unseen.by_selection(count, chosen, task.selected_min), ()


def spread(choice: Choice, kept: Sequence[int], count: int, clip_norm_l2: float) -> Choice:
    """A choice among those `kept`, told of all `count` places: the others are too long."""
    integers = np.zeros(count, dtype=np.int64)
    integers[list(kept)] = choice.integers
    long = f"norm exceeds the clip norm {clip_norm_l2:g}; by how much was not revealed"
    refused = dict.fromkeys(sorted(set(range(count)) - set(kept)), long)
    refused |= {kept[place]: reason for place, reason in choice.refused.items()}
    return Choice(
        integers, choice.divisor, dict(sorted(refused.items())), choice.verdicts, choice.memory, choice.refusal
    )


def near_matrix(bits: NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
    """The bits of the pairs as a symmetric matrix bool[n, n] that is true on its diagonal."""
    near = np.zeros((count, count), dtype=np.bool_)
    near[np.triu_indices(count, 1)] = bits
    return near | near.T | np.eye(count, dtype=np.bool_)


def unpacked(near: bytes, count: int) -> NDArray[np.bool_]:
    """Bits bool[n (n - 1) / 2] of a Decision. Raises Malformed for another number of bytes."""
    pairs = count * (count - 1) // 2
    if len(near) != -(-pairs // 8):
        raise Malformed(f"graph: expected {-(-pairs // 8)} bytes of bits for {count} devices, found {len(near)}")
    return np.unpackbits(np.frombuffer(near, dtype=np.uint8), count=pairs).astype(np.bool_)


def eps_doubled(task: RoundTask) -> int:
    """Twice the announced eps^2, rounded down to the units of the Gram matrix; the same on every machine."""
    units = Fraction(task.eps_l2) * 2**task.fraction_bits
    return 2 * int(bounds_of(task).scale * units * units)


def _within(session: Session, bounds: Bounds, doubled: Words64) -> Steps[list[int]]:
    """Places of the devices that are not too long."""
    margins = yield from reshare(session, "over-margin", _plus(session, 2 * bounds.squared_max, -np.diagonal(doubled)))
    over = yield from negative(session, "over-sign", margins, _WORD_BITS)
    opened = yield from open_planes(session, "over", over, len(doubled))
    return np.flatnonzero(~opened).tolist()


def _announced_graph(
    session: Session, task: RoundTask, doubled: Words64, hostile_max: int
) -> Steps[tuple[list[int], NDArray[np.bool_] | None]]:
    """The devices that are not too long and, compared in the same messages, which of them are close."""
    count, bounds = len(doubled), bounds_of(task)
    own = np.concatenate(
        [
            _plus(session, 2 * bounds.squared_max, -np.diagonal(doubled)),
            _plus(session, eps_doubled(task), -_distances(doubled)),
        ]
    )
    margins = yield from reshare(session, "near-margin", own)
    # Distances to a device that is too long may wrap around; their bits are thrown away unopened.
    beyond = yield from negative(session, "near-sign", margins, _WORD_BITS)
    over = yield from open_planes(session, "over", beyond, count)
    kept = np.flatnonzero(~over).tolist()
    hostile = max(0, hostile_max - (count - len(kept)))
    if unseen.refusal_before(task.policy, len(kept), hostile, task.selected_min):
        return kept, None
    former, latter = np.triu_indices(count, 1)
    wanted = count + np.flatnonzero(~(over[former] | over[latter]))
    far = yield from open_planes(session, "near", _picked(beyond, count + former.size, wanted), wanted.size)
    return kept, ~far


def _found_graph(
    session: Session, task: RoundTask, coin: bytes, doubled: Words64, hostile_max: int
) -> Steps[NDArray[np.bool_]]:
    """Which pairs are close, by a radius that nobody learns."""
    limit = bounds_of(task).doubled_distance_max
    distances = yield from reshare(session, "distances", _distances(doubled))
    count, pairs = len(doubled), distances.first.size
    sample = _sampled(coin, pairs)
    drawn = Pair(distances.first[None, sample], distances.second[None, sample])
    place = quantile_place(sample.size, count, hostile_max)
    ranks = yield from below(session, "radius", drawn, _bits(limit), (place, place + 1))
    one = _picked(ranks, 2 * sample.size, np.arange(sample.size))
    other = _picked(ranks, 2 * sample.size, np.arange(sample.size, 2 * sample.size))
    radius = yield from reshare(
        session, "radius-sum", (yield from sums_where(session, "radius-chosen", one ^ other, drawn))
    )
    times, over = (np.uint64(factor) for factor in _RADIUS_SQUARED)
    margins = Pair(
        times * radius.first - over * distances.first,
        times * radius.second - over * distances.second,
    )
    far = yield from negative(session, "near-sign", margins, _bits(_RADIUS_SQUARED[0] * limit))
    opened = yield from open_planes(session, "near", far, pairs)
    return ~opened


def quantile_place(drawn: int, count: int, hostile_max: int) -> int:
    """Which of `drawn` ordered distances is taken for the radius (see the module); they are counted from 0."""
    honest = count - hostile_max
    return drawn * honest * (honest - 1) // (2 * count * (count - 1))


def _sampled(coin: bytes, pairs: int) -> NDArray[np.int64]:
    """Up to 128 of all pairs, in the order of their numbers."""
    draws = np.frombuffer(expand_bytes(coin_key(coin, "pairs"), 8 * pairs), dtype="<u8")
    return np.asarray(np.sort(np.argsort(draws, kind="stable")[:SAMPLE_MAX]))


def _selected(session: Session, bounds: Bounds, doubled: Words64, hostile_max: int) -> Steps[list[int]]:
    """Places of the n - f lowest Krum scores. Raises Untrusted for another number of them: ranks are a permutation."""
    count, limit = len(doubled), bounds.doubled_distance_max
    pairs = yield from reshare(session, "distances", _distances(doubled))
    rows = Pair(_rows(pairs.first, count), _rows(pairs.second, count))
    neighbours = multikrum.neighbours_of(count, hostile_max)
    nearest = yield from below(session, "nearest", rows, _bits(limit), (neighbours,))
    own = yield from sums_where(session, "nearest-chosen", nearest, rows)
    scores = yield from reshare(session, "scores", own[None])
    kept = unseen.kept_of(count, hostile_max)
    lowest = yield from below(session, "lowest", scores, _bits(neighbours * limit), (kept,))
    opened = yield from open_planes(session, "chosen", lowest, count)
    chosen: list[int] = np.flatnonzero(opened).tolist()
    if len(chosen) != kept:
        raise Untrusted(
            f"step 'chosen': {len(chosen)} devices have one of the {kept} lowest scores; an aggregator has deviated"
        )
    return chosen


def _open_number(session: Session, step: str, own: np.uint64) -> Steps[int]:
    """The sum of all parties' `own`, modulo 2^64."""
    share = np.array([own], dtype=np.uint64)
    share = share + session.zero_sum(step, share)
    received = yield Exchange(step, dict.fromkeys(session.peers, to_bytes(share)), session.peers)
    for peer in sorted(session.peers):
        share = share + session.read_words(received, peer, step, share)
    return int(share[0])


def _distances(doubled: Words64) -> Words64:
    """Additive shares of twice the squared distances of all pairs, uint64[n (n - 1) / 2], from those of the matrix."""
    former, latter = np.triu_indices(len(doubled), 1)
    lengths = np.diagonal(doubled)
    return np.asarray(lengths[former] + lengths[latter] - (doubled[former, latter] << np.uint64(1)))


def _rows(pairs: Ring, count: int) -> Ring:
    """For each device its distances to the others, uint64[n, n - 1]."""
    square = np.zeros((count, count), dtype=pairs.dtype)
    upper = np.triu_indices(count, 1)
    square[upper] = pairs
    square.T[upper] = pairs
    return square[~np.eye(count, dtype=np.bool_)].reshape(count, count - 1)


def _plus(session: Session, public: int, own: Words64) -> Words64:
    """An additive share of `public` plus what `own` is one of."""
    return own + np.uint64(public) if session.index == 0 else own


def _picked(shared: Pair, count: int, wanted: NDArray[np.int64]) -> Pair:
    """Some of `count` shared bits, packed anew."""
    first, second = (
        np.packbits(np.unpackbits(share.astype(np.uint8), count=count)[wanted])
        for share in (shared.first, shared.second)
    )
    return Pair(first, second)


def _bits(magnitude: int) -> int:
    """Enough for numbers from -magnitude to magnitude."""
    return magnitude.bit_length() + 1
