"""The records that programs leave about what they did.

A `Decision` is left wherever a model answered a payment, an `Inference` where a device answered anything else. A device
keeps both and its update outcomes in its outbox and sends them folded into `Report`s; a report names the range of
outbox sequence numbers it covers, so that a duplicate is recognised and a gap is seen. Latencies are counted in fixed
buckets, so that reports add up without losing a quantile by more than one bucket's width (12 buckets a decade: 21 %).

No feature values, tensors, amounts, keys or certificates appear in any record.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Literal

import msgspec

Where = Literal["device", "region", "baseline"]

LATENCY_BOUNDS_US: tuple[float, ...] = tuple(round(10 ** (exponent / 12), 3) for exponent in range(0, 12 * 7 + 1))
"""Upper bounds of the latency buckets: 1 us to 10 s, twelve a decade; one more bucket takes everything above."""


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """One answer: `score` in [0, 1], `approved`, by which version (`manifest`), where, how long it took
    (`latency_us`, from the features to the answer), and `fallback`: why it was not the device's own full model."""

    decision_id: str
    manifest: str
    where: Where
    score: float
    approved: bool
    latency_us: float
    fallback: str = ""
    region: str = ""
    error: str = ""
    time: float = 0.0


class Inference(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a version of any signature on a device: by which version (`manifest`), how long it took (`latency_us`,
    from the tensors to the answer), and `error`: why there was no answer ("" when there was one)."""

    inference_id: str
    manifest: str
    latency_us: float
    error: str = ""
    time: float = 0.0


class Feedback(msgspec.Struct, frozen=True):
    """What a decision turned out to be: the chargeback, or the customer who came back."""

    decision_id: str
    manifest: str
    declined: bool
    fraud: bool


class UpdateOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """How one update ended: `event` is adopted, rolled_back, refused, withdrawn or safe_mode. `seconds_active` is how
    long the version answered on the device (rolled_back only); `route` is patch, chain, replace, whole or
    none."""

    manifest: str
    event: str
    reason: str = ""
    route: str = ""
    bytes_received: int = 0
    seconds: float = 0.0
    seconds_active: float = 0.0
    time: float = 0.0


class ModelSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What one version answered at one place, folded: `decisions` about payments, of which `declined`, and `inferences`
    of a version of any signature, which approve and decline nothing. `errors`, `fallbacks` and `latency` (bucket index
    to count) are of both. `inferences` came later; older records have none."""

    manifest: str
    where: Where
    decisions: int = 0
    declined: int = 0
    errors: int = 0
    fallbacks: int = 0
    latency: dict[int, int] = {}
    labelled_legitimate: int = 0
    labelled_fraud: int = 0
    false_positives: int = 0
    true_positives: int = 0
    inferences: int = 0

    @property
    def answers(self) -> int:
        """Decisions and inferences: how often the version was asked there."""
        return self.decisions + self.inferences


class SittingOut(msgspec.Struct, frozen=True):
    """The open round that a device takes no part in, one of the reasons of `model_delta.task.SatOut`, and the ECDSA
    P-256 SHA-256 `signature` (DER) of `model_delta.trust.sitting_out` by the key of its certificate. Older devices did
    not sign; what is not signed counts for nothing."""

    round_id: str
    reason: str
    signature: bytes = b""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a device did between outbox records `first_sequence` and `last_sequence` of its outbox `epoch` (a random
    number drawn when the outbox was created). `state` is the update's state; `running` the manifest in use; `alarm`
    what a person should know of the device's trust, "" when there is nothing. `sitting_out` is left out of the packed
    form but while a round is open that the device sits out."""

    device_id: str
    epoch: int
    first_sequence: int
    last_sequence: int
    time: float
    state: str
    running: str
    safe_mode: bool = False
    plan_serial: int = 0
    dropped: int = 0
    lost_requests: int = 0
    summaries: tuple[ModelSummary, ...] = ()
    outcomes: tuple[UpdateOutcome, ...] = ()
    alarm: str = ""
    sitting_out: SittingOut | msgspec.UnsetType = msgspec.UNSET


def latency_bucket(latency_us: float) -> int:
    """Index of the bucket that counts `latency_us`."""
    return bisect_left(LATENCY_BOUNDS_US, latency_us)


def latency_quantile_us(counts: Mapping[int, int], q: float) -> float:
    """The upper bound of the bucket in which the `q` quantile lies, in microseconds; 0.0 when nothing was counted."""
    total = sum(counts.values())
    if total == 0:
        return 0.0
    rank = q * total
    seen = 0
    for index in sorted(counts):
        seen += counts[index]
        if seen >= rank:
            return LATENCY_BOUNDS_US[min(index, len(LATENCY_BOUNDS_US) - 1)]
    return LATENCY_BOUNDS_US[-1]


def merge_counts(first: Mapping[int, int], second: Mapping[int, int]) -> dict[int, int]:
    """Two latency histograms as one."""
    return {index: first.get(index, 0) + second.get(index, 0) for index in first.keys() | second.keys()}


def merge_summaries(first: ModelSummary, second: ModelSummary) -> ModelSummary:
    """Two summaries of the same version and place as one."""
    return ModelSummary(
        manifest=first.manifest,
        where=first.where,
        decisions=first.decisions + second.decisions,
        declined=first.declined + second.declined,
        errors=first.errors + second.errors,
        fallbacks=first.fallbacks + second.fallbacks,
        latency=merge_counts(first.latency, second.latency),
        labelled_legitimate=first.labelled_legitimate + second.labelled_legitimate,
        labelled_fraud=first.labelled_fraud + second.labelled_fraud,
        false_positives=first.false_positives + second.false_positives,
        true_positives=first.true_positives + second.true_positives,
        inferences=first.inferences + second.inferences,
    )
