"""Which verdicts decide: a round's policy, from the opened Gram matrix to integer weights.

Every round computes all verdicts for every device, since they cost next to nothing; its policy says which of them have
consequences:

    krum     refuses what is 3 sigma above the median (norm or distance) or outside DBSCAN's largest cluster, at most f
             devices in all, then Multi-Krum with what is left of f. Equal weights.
    robust   clips at the median norm and drops the 1.5 f highest spectral scores (`spectral`). The default.
    history  counts copies as one voice, clips at the median norm, refuses what has nothing in common with anybody, and
             doubts the 1.5 f devices that are most suspicious over the remembered rounds (`history`): they have a
             quarter of a voice, and none where they stand out by far; the more are found for certain, the fewer are
             doubted (`doubt`). Where data differ much some of the doubted are honest, and whoever is left out
             altogether differs more and more.
    multikrum  Multi-Krum and nothing else. Equal weights. It can be computed without opening distances too; `unseen`
             has what decides where they stay hidden, and `reveals` which policy goes with what is opened.

A weight is an integer of WEIGHT_BITS bits at most, because sums are opened in a ring; the mean is the weighted sum over
`divisor`. The functions are pure, and equal bit for bit on every machine (see `geometry`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fl_coordinator.rules import doubt, history, multikrum, outliers, spectral
from fl_coordinator.rules.geometry import Gram, checked, clip_factors, clipped
from fl_coordinator.rules.history import Memory, Past
from model_delta.errors import Malformed

WEIGHT_FULL = doubt.VOICE
WEIGHT_BITS = WEIGHT_FULL.bit_length() - 1
SHARE_MAX = 0.25
"""No opening gives one device more than this part of the sum of weights."""


@dataclass(frozen=True)
class Verdicts:
    """All verdicts on one device. Sigmas are robust (1.4826 MAD) around the median; `cluster` and `cosine_cluster` are
    DBSCAN's, 0 the largest, -1 none; `spectral` is in units of the mean score, `history` the suspicion that the
    remembered rounds add up to (`history.suspicion`; 1 is ordinary); `copies` is the number of devices that sent this
    update; `krum_score` in squared fixed-point units."""

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


@dataclass(frozen=True)
class Remembered:
    """The answer of `history`, the voices int64[n] in it (before clipping), and every device's suspicion float64[n]."""

    weighing: Weighing
    voices: NDArray[np.int64]
    suspicion: NDArray[np.float64]


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


def remembering(gram: Gram, past: Past, hostile_max: int) -> Remembered:
    """The policy `history`, in two passes: what a device does against the others is measured against those whom the
    first pass believes."""
    copies, noise = outliers.copies(gram), history.unrelated(past, hostile_max)
    apart, groups = history.apart(past, hostile_max), history.together(past)
    first = doubt.voices(copies, history.suspicion(apart, groups=groups), noise, hostile_max)
    suspicion = history.suspicion(apart, history.against(past, first.integers), groups=groups)
    heard = doubt.voices(copies, suspicion, noise, hostile_max)
    voices = heard.integers
    integers = np.where(voices > 0, np.maximum(np.rint(clip_factors(gram) * voices), 1), 0).astype(np.int64)
    reasons = {
        int(index): "nothing in common with any other device over the remembered rounds"
        if noise[index]
        else f"suspicion {suspicion[index]:.2g} over the remembered rounds; the highest of those believed is "
        f"{heard.believed:.2g}"
        for index in np.flatnonzero(voices == 0)
    }
    return Remembered(Weighing(integers, int(voices.sum()), reasons), voices, suspicion)


def _without_highest(scores: NDArray[np.int64], dropped: int, factors: NDArray[np.float64], name: str) -> Weighing:
    relative = spectral.relative(scores)
    gone = spectral.highest(scores, dropped)
    integers = np.maximum(np.rint(factors * WEIGHT_FULL), 1).astype(np.int64)
    integers[gone] = 0
    reasons = {
        index: f"{name} {relative[index]:.2g} times the average; the {dropped} highest of {len(scores)} are dropped"
        for index in gone
    }
    return Weighing(integers, int(np.count_nonzero(integers)) * WEIGHT_FULL, reasons)


POLICIES: Mapping[str, Callable[[Gram, Remembered, int], Weighing]] = {
    "krum": lambda gram, _remembered, hostile_max: krum(gram, hostile_max),
    "robust": lambda gram, _remembered, hostile_max: robust(gram, hostile_max),
    "history": lambda _gram, remembered, _hostile_max: remembered.weighing,
    "multikrum": lambda gram, _remembered, hostile_max: plain_multikrum(gram, hostile_max),
}
EQUAL = ("krum", "multikrum", "cluster")
"""Policies whose weights are 0 or 1."""
_NOTHING = Remembered(Weighing(np.zeros(0, dtype=np.int64), 0), np.zeros(0, dtype=np.int64), np.zeros(0))
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
) -> tuple[Weighing, Memory]:
    """Only the weights and the next memory, for simulations. Arguments as in `choose`."""
    gram = checked(gram)
    if not remembers(policy):
        return POLICIES[policy](gram, _NOTHING, hostile_max), memory
    past = history.recall(memory, device_ids, gram)
    remembered = remembering(gram, past, hostile_max)
    return remembered.weighing, past.memory(remembered.voices)


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
    past = history.recall(memory or Memory(), device_ids, gram)
    remembered = remembering(gram, past, hostile_max)
    verdicts = _verdicts(gram, remembered.suspicion, hostile_max)
    nothing = np.zeros(count, dtype=np.int64)
    unopened = past.memory(nothing)
    if count < needed:
        refusal = f"policy {policy} needs {needed} usable updates to stand {hostile_max} hostile ones, found {count}"
        return Choice(nothing, 0, {}, verdicts, unopened, refusal)
    found = POLICIES[policy](gram, remembered, hostile_max)
    refused = {index: _explained(verdicts[index], reason) for index, reason in sorted(found.reasons.items())}
    kept = int(np.count_nonzero(found.integers))
    if kept < selected_min:
        refusal = f"{kept} updates selected, a sum of fewer than {selected_min} is not opened"
        return Choice(nothing, 0, refused, verdicts, unopened, refusal)
    largest, total = int(found.integers.max(initial=0)), int(found.integers.sum())
    if largest > share_max * total:
        refusal = f"one device would carry {largest / total:.0%} of the sum, more than {share_max:.0%} is not opened"
        return Choice(nothing, 0, refused, verdicts, unopened, refusal)
    return Choice(found.integers, found.divisor, refused, verdicts, past.memory(remembered.voices))


def _verdicts(gram: Gram, suspicion: NDArray[np.float64], hostile_max: int) -> tuple[Verdicts, ...]:
    if not len(gram):
        return ()
    columns = zip(
        outliers.norm_sigmas(gram).tolist(),
        outliers.distance_sigmas(gram).tolist(),
        multikrum.scores(gram, hostile_max),
        outliers.clusters(gram).tolist(),
        outliers.clusters(gram, "cosine").tolist(),
        spectral.relative(spectral.scores(clipped(gram))).tolist(),
        np.round(suspicion, 3).tolist(),
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
