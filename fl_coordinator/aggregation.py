"""From the aggregators' openings to the mean update.

Each share of the weighted sum arrives from two aggregators and must be the same; the norm of its sketch must be the one
that the opened Gram matrix foretells, or that was opened alone where the matrix was not. The plain mean of plain
updates stands beside it as the yardstick: what an undefended round would have produced.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fl_coordinator.rules.reveals import DISTANCES
from fl_coordinator.shares.bounds import bounds_of, noise_std
from fl_coordinator.shares.decision import Decision, read_decision, read_gram
from fl_coordinator.shares.fixed_point import decode
from fl_coordinator.shares.measuring import Coefficients
from fl_coordinator.shares.sharing import PARTIES
from fl_coordinator.shares.streams import WORD_BYTES, Words
from model_delta.digest import digest_of
from model_delta.encoding import unpack
from model_delta.errors import Malformed, Untrusted
from model_delta.task import RoundTask
from model_delta.trust.signing import key_id, load_public_key, open_envelope, verify

OPENING_TYPE = "round-opening"


class Opening(msgspec.Struct, frozen=True):
    """What an aggregator signs (Ed25519, an Envelope of type `round-opening`): the packed Decision, its own place, and
    digests of its two shares of the weighted sum ("" when nothing was opened)."""

    aggregator: str
    index: int
    decision: bytes
    first: str
    second: str


@dataclass(frozen=True)
class Aggregate:
    """What a round produced: the decision all three signed, and the mean update float32[d] (None when refused)."""

    decision: Decision
    mean: NDArray[np.float32] | None


def combine_openings(replies: Sequence[Mapping[str, Any]], task: RoundTask) -> Aggregate:
    """Verify three aggregators' replies (see `Aggregator.run_round`) and add up the shares of the sum.

    Raises Untrusted, naming the aggregator (or the two of which one is wrong), for a signature that does not hold, for
    decisions or shares that differ, and for a sum whose norm is not the one that was opened with the choice.
    """
    if len(replies) != PARTIES:
        raise Malformed(f"round {task.round_id!r}: expected {PARTIES} openings, found {len(replies)}")
    openings: dict[int, Opening] = {}
    shares: dict[int, tuple[bytes, bytes]] = {}
    for reply in replies:
        opening, first, second = _verified(reply, task)
        if opening.index in openings:
            raise Untrusted(f"{opening.aggregator}: opened round {task.round_id!r} twice")
        openings[opening.index] = opening
        shares[opening.index] = (first, second)
    names = [key.name for key in task.aggregators]
    _require_same_decision([openings[index].decision for index in range(PARTIES)], names)
    decision = read_decision(openings[0].decision)
    if (decision.round_id, decision.base, decision.tenant) != (task.round_id, task.base, task.tenant):
        raise Untrusted(f"round {task.round_id!r}: the aggregators decided about round {decision.round_id!r}")
    if not decision.selected:
        given = [names[index] for index in range(PARTIES) if any(shares[index])]
        if given:
            raise Untrusted(f"{' and '.join(given)}: opened a share of a sum, though nobody was selected")
        return Aggregate(decision, None)
    total = _sum_of_shares(shares, names, task)
    if task.noise_multiplier > 0 and not _has_plausible_noise(total, decision, task):
        raise Untrusted(
            f"round {task.round_id!r}: the opened sum is longer or shorter than its noise can make it; one of "
            f"{', '.join(names)} deviated"
        )
    if task.noise_multiplier == 0 and 2 * _norm_squared(total, decision, task) % 2**64 != _foretold_doubled(decision):
        foretold = "Gram matrix" if decision.reveal == DISTANCES else "decision"
        raise Untrusted(
            f"round {task.round_id!r}: the opened sum has another norm than the {foretold} foretells; one of "
            f"{', '.join(names)} deviated"
        )
    return Aggregate(decision, (decode(total, task.fraction_bits) / decision.divisor).astype(np.float32))


def _verified(reply: Mapping[str, Any], task: RoundTask) -> tuple[Opening, bytes, bytes]:
    opening, first, second = (reply.get(key) for key in ("opening", "first", "second"))
    if not (isinstance(opening, bytes) and isinstance(first, bytes) and isinstance(second, bytes)):
        raise Malformed(
            f"{str(reply.get('aggregator'))[:64]!r}: round {task.round_id!r}: expected a reply with the bytes of "
            "opening, first and second"
        )
    envelope = open_envelope(opening)
    keys = {key_id(key): key for key in (load_public_key(entry.verifying) for entry in task.aggregators)}
    opened = unpack(verify(envelope, OPENING_TYPE, keys), Opening)
    if not 0 <= opened.index < PARTIES or task.aggregators[opened.index].name != opened.aggregator:
        raise Untrusted(f"{opened.aggregator}: is not aggregator {opened.index} of round {task.round_id!r}")
    own = load_public_key(task.aggregators[opened.index].verifying)
    verify(envelope, OPENING_TYPE, {key_id(own): own})
    for number, data, digest in ((1, first, opened.first), (2, second, opened.second)):
        if digest != (digest_of(data) if data else ""):
            raise Untrusted(f"{opened.aggregator}: share {number} of the sum is not the one it signed")
        if data and len(data) != WORD_BYTES * task.length:
            raise Untrusted(
                f"{opened.aggregator}: share {number} of the sum: expected {WORD_BYTES * task.length} bytes, "
                f"found {len(data)}"
            )
    return opened, first, second


def _require_same_decision(decisions: list[bytes], names: list[str]) -> None:
    if len(set(decisions)) == 1:
        return
    odd = [name for name, value in zip(names, decisions, strict=True) if decisions.count(value) == 1]
    raise Untrusted(f"{' and '.join(odd)}: signed another decision than the rest")


def _sum_of_shares(shares: Mapping[int, tuple[bytes, bytes]], names: list[str], task: RoundTask) -> Words:
    """Share i is aggregator i's first and aggregator i-1's second. Two mismatches point at their common holder."""
    differing = [index for index in range(PARTIES) if shares[index][0] != shares[(index - 1) % PARTIES][1]]
    if differing:
        holders = [{index, (index - 1) % PARTIES} for index in differing]
        suspects = set.intersection(*holders) or set().union(*holders)
        who = " or ".join(names[index] for index in sorted(suspects))
        raise Untrusted(f"{who}: a share of the opened sum differs from what its other holder sent")
    total = np.zeros(task.length, dtype=np.uint32)
    for index in range(PARTIES):
        if not shares[index][0]:
            raise Untrusted(f"{names[index]}: signed a selection but sent no share of its sum")
        total = total + np.frombuffer(shares[index][0], dtype="<u4")
    return total


def _norm_squared(total: Words, decision: Decision, task: RoundTask) -> int:
    """Of the sketch of a sum of accepted updates (of the sum itself where distances are exact), modulo 2^64."""
    sketch = Coefficients(decision.coin, task.length, bounds_of(task)).sketch_exact(
        total.view(np.int32).astype(np.int64)
    )
    return int(np.sum(sketch.view(np.uint64) * sketch.view(np.uint64), dtype=np.uint64))


_NEVER = 30.0
"""Minus the logarithm of a chance that is none: 1e-13."""


def _has_plausible_noise(total: Words, decision: Decision, task: RoundTask) -> bool:
    """Whether a sum with noise is about as long as it must be: what an aggregator deals as its noise nobody sees.

    The k values of a copy of the sketch (of a small vector itself) carry normal noise of variance v each. Their squares
    add up to v k, not less than by 2 v sqrt(k t) nor more than by 2 v (sqrt(k t) + t), but for a chance of exp(-t) each
    (Laurent and Massart, Annals of Statistics 28, 2000), and their product with the sum beneath is normal. Where
    distances were not opened the sum beneath is bounded by the clip.
    """
    bounds = bounds_of(task)
    sketch = Coefficients(decision.coin, task.length, bounds).sketch_exact(total.view(np.int32).astype(np.int64))
    found = float(np.dot(sketch.astype(np.float64), sketch.astype(np.float64)))
    count, copies = bounds.measured / bounds.scale, bounds.scale
    # A part is rounded to whole units, which adds 1/12 to its variance; a bucket holds `piled` entries at most.
    variance = PARTIES * (noise_std(task) ** 2 + 1 / 12)
    most, least = bounds.piled * variance, (task.length / count) * variance
    weights = np.array([decision.devices[index].weight for index in decision.measured], dtype=np.float64)
    if decision.reveal != DISTANCES:
        beneath = math.sqrt(bounds.squared_max) * float(weights.sum())
        slack = math.sqrt(count) + math.sqrt(2 * _NEVER)
        return math.sqrt(found) <= beneath + math.sqrt(copies * most) * slack
    beneath = max(0.0, float(weights @ read_gram(decision).astype(np.float64) @ weights))
    product = 2 * math.sqrt(2 * _NEVER * copies * beneath * most)
    above = copies * (most * count + 2 * most * (math.sqrt(count * _NEVER) + _NEVER)) + product
    below = copies * (least * count - 2 * most * math.sqrt(count * _NEVER)) - product
    return below <= found - beneath <= above


def _foretold_doubled(decision: Decision) -> int:
    """Twice the same, from weights and Gram matrix (sketches are linear), or as the aggregators opened it."""
    if decision.reveal != DISTANCES:
        return decision.doubled_norm
    weights = np.array([decision.devices[index].weight for index in decision.measured], dtype=np.uint64)
    gram = read_gram(decision).view(np.uint64)
    return 2 * int(np.sum(gram * weights[:, None] * weights[None, :], dtype=np.uint64)) % 2**64
