"""Which verdicts decide: a round's policy, from the opened Gram matrix to integer weights.

Every round computes all verdicts for every device, since they cost next to nothing; its policy says which of them have
consequences:

    krum     refuses what is 3 sigma above the median (norm or distance) or outside DBSCAN's largest cluster, at most f
             devices in all, then Multi-Krum with what is left of f. Equal weights.
    robust   clips at the median norm and drops the 1.5 f highest spectral scores (`spectral`). The default.
    history  counts copies as one voice, clips at the median norm, and drops the f highest spectral scores over the
             remembered rounds (`history`), in which updates up to three medians long keep their length, so that loud
             ones stand out; every copy beyond the first uses up one of the f, down to a quarter of f.
    multikrum  Multi-Krum and nothing else. Equal weights. It can be computed without opening distances too; `unseen`
             has what decides where they stay hidden, and `reveals` which policy goes with what is opened.

A weight is an integer of WEIGHT_BITS bits at most, because sums are opened in a ring; the mean is the weighted sum over
`divisor`. The functions are pure, and equal bit for bit on every machine (see `geometry`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum

import numpy as np
from numpy.typing import NDArray

from fl_coordinator.rules import history, multikrum, outliers, spectral
from fl_coordinator.rules.geometry import Gram, checked, clip_factors, clipped
from fl_coordinator.rules.history import Memory
from model_delta.errors import Malformed

WEIGHT_BITS = 7
WEIGHT_FULL = 1 << WEIGHT_BITS
SHARE_MAX = 0.25
"""No opening gives one device more than this part of the sum of weights."""

LOUD_MEDIANS = 3.0


@dataclass(frozen=True)
class Verdicts:
    """All verdicts on one device. Sigmas are robust (1.4826 MAD) around the median; `cluster` and `cosine_cluster` are
    DBSCAN's, 0 the largest, -1 none; `spectral` and `history` are in units of the mean score (this round, remembered
    rounds); `copies` is the number of devices that sent this update; `krum_score` in squared fixed-point units."""

    norm_sigma: float
    distance_sigma: float
    krum_score: int
    cluster: int
    cosine_cluster: int
    spectral: float
    history: float
    copies: int


@dataclass(frozen=True)
class Choice:
    """`integers` int64[n], the weights in the ring; the mean is the weighted sum over `divisor`. `refused`: index ->
    why, in words, for every weight of 0. `refusal`: why nothing may be opened ("" when it may; then all weights are 0).
    `memory` is what the next round must be given, whether this one opens or not."""

    integers: NDArray[np.int64]
    divisor: int
    refused: Mapping[int, str]
    verdicts: tuple[Verdicts, ...]
    memory: Memory
    refusal: str = ""

    @property
    def weights(self) -> NDArray[np.float64]:
        """Weights of the mean, float64[n]: integers / divisor. They sum to less than 1 where updates were clipped."""
        return self.integers / max(self.divisor, 1)

    @property
    def selected(self) -> tuple[int, ...]:
        """Indices with a weight, ascending."""
        return tuple(int(index) for index in np.flatnonzero(self.integers))


@dataclass(frozen=True)
class Weighing:
    """One rule's answer: integer weights, the divisor, and the deciding reason for each device of weight 0."""

    integers: NDArray[np.int64]
    divisor: int
    reasons: Mapping[int, str] = field(default_factory=dict)


def krum(gram: Gram, hostile_max: int) -> Weighing:
    """Multi-Krum behind DBSCAN and the 3-sigma rule. Raises Malformed for n < 2 f + 3."""
    sigma = np.maximum(outliers.norm_sigmas(gram), outliers.distance_sigmas(gram))
    apart = (sigma > outliers.SIGMAS_MAX) | (outliers.clusters(gram) != 0)
    # At most f: what stands apart may be an unusual honest device, and two thirds of them often do on uneven data.
    order = sorted(np.flatnonzero(apart).tolist(), key=lambda index: (-float(sigma[index]), index))[:hostile_max]
    kept = [index for index in range(len(gram)) if index not in order]
    if len(gram) < multikrum.contributions_min(hostile_max):
        return Weighing(np.zeros(len(gram), dtype=np.int64), 0)
    verdict = multikrum.select(gram[np.ix_(kept, kept)], hostile_max - len(order))
    integers = np.zeros(len(gram), dtype=np.int64)
    integers[kept] = verdict.weights
    reasons = dict.fromkeys(order, "") | {kept[place]: reason for place, reason in verdict.rejected.items()}
    return Weighing(integers, int(integers.sum()), reasons)


def plain_multikrum(gram: Gram, hostile_max: int) -> Weighing:
    """Multi-Krum alone (`multikrum.select`). Raises Malformed for n < 2 f + 3."""
    verdict = multikrum.select(gram, hostile_max)
    return Weighing(verdict.weights, int(verdict.weights.sum()), verdict.rejected)


def robust(gram: Gram, hostile_max: int) -> Weighing:
    """Clip at the median norm, then DnC: drop the 1.5 f highest spectral scores, equal weight times the clip factor."""
    scores = spectral.scores(clipped(gram))
    return _without_highest(scores, -(-3 * hostile_max // 2), clip_factors(gram), "spectral score")


def remembering(gram: Gram, mean: Gram, hostile_max: int) -> Weighing:
    """The policy `history`: `mean` is the remembered Gram matrix, this round included, int64[n, n]."""
    voices = 1.0 / outliers.copies(gram)
    spent = len(gram) - round(fsum(voices))
    left = max(hostile_max - spent, -(-hostile_max // 4))
    scores = spectral.scores(mean)
    return _without_highest(
        scores, left, clip_factors(gram) * voices, "spectral score over the remembered rounds", voices
    )


def _without_highest(
    scores: NDArray[np.int64],
    dropped: int,
    factors: NDArray[np.float64],
    name: str,
    voices: NDArray[np.float64] | None = None,
) -> Weighing:
    relative = spectral.relative(scores)
    gone = spectral.highest(scores, dropped)
    integers = np.maximum(np.rint(factors * WEIGHT_FULL), 1).astype(np.int64)
    integers[gone] = 0
    parts = np.where(integers > 0, 1.0 if voices is None else voices, 0.0)
    reasons = {
        index: f"{name} {relative[index]:.2g} times the average; the {dropped} highest of {len(scores)} are dropped"
        for index in gone
    }
    return Weighing(integers, round(fsum(parts) * WEIGHT_FULL), reasons)


POLICIES: Mapping[str, Callable[[Gram, Gram, int], Weighing]] = {
    "krum": lambda gram, _mean, hostile_max: krum(gram, hostile_max),
    "robust": lambda gram, _mean, hostile_max: robust(gram, hostile_max),
    "history": remembering,
    "multikrum": lambda gram, _mean, hostile_max: plain_multikrum(gram, hostile_max),
}
EQUAL = ("krum", "multikrum", "cluster")
"""Policies whose weights are 0 or 1."""
DEFAULT = "robust"
REMEMBERING = frozenset({"history"})


def weight_bits(policy: str) -> int:
    """How many bits a weight of `policy` adds to an opened sum: 0 when weights are 0 or 1."""
    return 0 if policy in EQUAL else WEIGHT_BITS


def remembers(policy: str) -> bool:
    """Whether what `policy` chooses depends on earlier rounds."""
    return policy in REMEMBERING


def contributions_min(policy: str, hostile_max: int) -> int:
    """The fewest devices for which `policy` can choose. Raises Malformed for an unknown policy."""
    known = {*POLICIES, *EQUAL}
    if policy not in known:
        raise Malformed(f"policy: expected one of {', '.join(sorted(known))}, found {policy!r}")
    return multikrum.contributions_min(hostile_max)


def weigh(
    policy: str, gram: NDArray[np.int64], hostile_max: int, memory: Memory, device_ids: Sequence[str]
) -> Weighing:
    """Only the weights, for simulations. Arguments as in `choose`; the memory is not moved on."""
    gram = checked(gram)
    return POLICIES[policy](gram, history.remember(memory, device_ids, clipped(gram, LOUD_MEDIANS))[1], hostile_max)


def choose(
    policy: str,
    gram: NDArray[np.int64],
    hostile_max: int,
    device_ids: Sequence[str],
    *,
    selected_min: int,
    memory: Memory | None = None,
    share_max: float = SHARE_MAX,
) -> Choice:
    """All verdicts, and the weights that `policy` draws from them.

    `gram` int64[n, n] in squared fixed-point units, rows as `device_ids`; `hostile_max` is f. Nothing may be opened
    for n < 2 f + 3, for fewer than `selected_min` weights, or when one device has more than `share_max` of them.
    Raises Malformed for an unknown policy and for a matrix that is none (`geometry.checked`).
    """
    gram = checked(gram)
    count, needed = len(gram), contributions_min(policy, hostile_max)
    if len(device_ids) != count or hostile_max < 0:
        raise Malformed(f"policy {policy}: {len(device_ids)} devices, {hostile_max} hostile, {count} rows do not fit")
    memory, mean = history.remember(memory or Memory(), device_ids, clipped(gram, LOUD_MEDIANS))
    verdicts = _verdicts(gram, mean, hostile_max)
    nothing = np.zeros(count, dtype=np.int64)
    if count < needed:
        refusal = f"policy {policy} needs {needed} usable updates to stand {hostile_max} hostile ones, found {count}"
        return Choice(nothing, 0, {}, verdicts, memory, refusal)
    found = POLICIES[policy](gram, mean, hostile_max)
    refused = {index: _explained(verdicts[index], reason) for index, reason in sorted(found.reasons.items())}
    kept = int(np.count_nonzero(found.integers))
    if kept < selected_min:
        refusal = f"{kept} updates selected, a sum of fewer than {selected_min} is not opened"
        return Choice(nothing, 0, refused, verdicts, memory, refusal)
    largest, total = int(found.integers.max(initial=0)), int(found.integers.sum())
    if largest > share_max * total:
        refusal = f"one device would carry {largest / total:.0%} of the sum, more than {share_max:.0%} is not opened"
        return Choice(nothing, 0, refused, verdicts, memory, refusal)
    return Choice(found.integers, found.divisor, refused, verdicts, memory)


def _verdicts(gram: Gram, mean: Gram, hostile_max: int) -> tuple[Verdicts, ...]:
    if not len(gram):
        return ()
    columns = zip(
        outliers.norm_sigmas(gram).tolist(),
        outliers.distance_sigmas(gram).tolist(),
        multikrum.scores(gram, hostile_max),
        outliers.clusters(gram).tolist(),
        outliers.clusters(gram, "cosine").tolist(),
        spectral.relative(spectral.scores(clipped(gram))).tolist(),
        spectral.relative(spectral.scores(mean)).tolist(),
        outliers.copies(gram).tolist(),
        strict=True,
    )
    return tuple(Verdicts(*column) for column in columns)


def _explained(verdict: Verdicts, reason: str) -> str:
    """The deciding reason, and whatever else is striking about the device."""
    said = [reason] if reason else []
    if verdict.norm_sigma > outliers.SIGMAS_MAX:
        said.append(f"norm {verdict.norm_sigma:.1f} sigma above the median")
    if verdict.distance_sigma > outliers.SIGMAS_MAX:
        said.append(f"distance from the others {verdict.distance_sigma:.1f} sigma above the median")
    if verdict.cluster != 0:
        said.append("outside the largest DBSCAN cluster")
    if verdict.copies > 1:
        said.append(f"the same update as {verdict.copies - 1} other{'s' if verdict.copies > 2 else ''}")
    return "; ".join(said)
