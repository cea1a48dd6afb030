"""What is left of a round for whoever doubts it: the transcript, and its replay without any of the programs that ran.

    announcement   the task as it was announced, signed by the role `round`
    openings       one from each aggregator, signed: the frozen list, coin, validity of each contribution, Gram matrix,
                   weights and verdicts, and the digests of its two shares of the weighted sum
    shares         the three shares of that sum, each once; together they are the sum, alone they are random
    settlement     signed by the role `round`: the mean's digest, what was spent of a privacy budget, and the epsilons

The replay takes nothing from the coordinator's word but who the aggregators are (the announcement) and which openings
were made before (the settlement's list of spends). It checks signatures, recomputes the root from the list, the weights
and verdicts from the Gram matrix by the rules, the sum from the shares, the norm that the matrix foretells for it, the
mean's digest, and the epsilons. It cannot show that the Gram matrix is of the contributions that were frozen: those are
deleted, and only the three aggregators together ever held them.

Compatibility promise: see `model_delta.encoding`; packed transcripts are kept in the ledger and in files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fl_coordinator.aggregation import Aggregate, Opening, combine_openings
from fl_coordinator.privacy import Spend, epsilon
from fl_coordinator.shares.party import Decision, judge, read_gram
from fl_coordinator.shares.sharing import PARTIES
from model_delta import merkle
from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack
from model_delta.errors import AtollError, Malformed, Untrusted
from model_delta.task import TASK_TYPE, RoundTask
from model_delta.trust.signing import open_envelope, verify
from model_delta.trust.updater import TrustAnchors, role_keys

SETTLEMENT_TYPE = "round-settlement"
FORMAT = 1
BYTES_MAX = 2 << 30
_EPSILON_SLACK = 1e-6


class Settlement(msgspec.Struct, frozen=True, kw_only=True):
    """What the coordinator vouches for beside the aggregators: `mean` is the digest of the mean update, float32[d]
    little endian ("" when nothing was opened). With privacy: this opening's `spend`, all openings before it that the
    model's releases descend from, those of the most burdened device in it, and the epsilons at `delta` after it."""

    tenant: str
    model: str
    round_id: str
    root: str
    mean: str
    spend: Spend | None = None
    before_release: tuple[Spend, ...] = ()
    before_device: tuple[Spend, ...] = ()
    delta: float = 0.0
    epsilon_release: float = 0.0
    epsilon_device: float = 0.0


class Transcript(msgspec.Struct, frozen=True, kw_only=True):
    """See the module. `openings` in the order of the task's aggregators; `shares` are empty when nothing was opened."""

    format: int = FORMAT
    announcement: bytes
    openings: tuple[bytes, ...]
    shares: tuple[bytes, ...]
    settlement: bytes


class Check(msgspec.Struct, frozen=True):
    """One thing that was looked at; `problem` is "" when it holds."""

    name: str
    problem: str


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """What a transcript turned out to be. `checks` in their order; after one that reads something, those that need it
    are left out. Devices by name; epsilons of an opening with privacy."""

    round_id: str = ""
    model: str = ""
    base: str = ""
    root: str = ""
    policy: str = ""
    mean: str = ""
    aggregators: tuple[str, ...] = ()
    chosen: tuple[str, ...] = ()
    refused: dict[str, str] = {}
    refusal: str = ""
    epsilon_release: float = 0.0
    epsilon_device: float = 0.0
    delta: float = 0.0
    checks: tuple[Check, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether every check was made and holds."""
        return [check.name for check in self.checks] == list(CHECKS) and not any(c.problem for c in self.checks)


CHECKS = ("transcript", "announcement", "openings", "root", "validity", "weights", "aggregate", "settlement", "epsilon")


def transcript_of(announcement: bytes, replies: Sequence[dict[str, Any]], settlement: bytes) -> Transcript:
    """The transcript of a round from its aggregators' replies, in the order of the task."""
    return Transcript(
        announcement=announcement,
        openings=tuple(bytes(reply["opening"]) for reply in replies),
        shares=tuple(bytes(reply["first"]) for reply in replies),
        settlement=settlement,
    )


def decision_in(data: bytes) -> Decision:
    """The decision in a packed transcript that is our own; nothing is verified. Raises Malformed."""
    return _decision(unpack(data, Transcript))


def mean_digest(mean: NDArray[np.float32] | None) -> str:
    """How a settlement names a mean update; "" for none."""
    return "" if mean is None else digest_of(mean.astype("<f4").tobytes())


def replay(data: bytes, anchors: TrustAnchors) -> Replay:
    """Check a packed transcript against the keys in `anchors`. Never raises: what does not hold is in the checks."""
    found = Replay()
    transcript = Transcript(announcement=b"", openings=(), shares=(), settlement=b"")
    task = decision = settlement = aggregate = None

    def looked(name: str, problem: str = "") -> Replay:
        return msgspec.structs.replace(found, checks=(*found.checks, Check(name, problem)))

    try:
        transcript = _read(data)
        found = looked("transcript")
        task = _announced(transcript.announcement, anchors)
        found = msgspec.structs.replace(looked("announcement"), **_of_task(task))
        decision = _decision(transcript)
        found = msgspec.structs.replace(found, **_of_decision(decision))
        aggregate, problem = _combined(transcript, task)
        found = looked("openings", problem)
    except AtollError as error:
        return looked(CHECKS[len(found.checks)], str(error))
    for name, check in (
        ("root", lambda: _root(decision)),
        ("validity", lambda: _validity(decision, task)),
        ("weights", lambda: _weights(decision, task)),
        ("aggregate", lambda: _aggregate(transcript, decision, aggregate)),
    ):
        found = looked(name, _problem(check))
    try:
        settlement = _settled(transcript.settlement, anchors)
        found = looked("settlement", _settlement(settlement, decision, task, aggregate))
    except AtollError as error:
        return looked("settlement", str(error))
    found = msgspec.structs.replace(
        found,
        mean=settlement.mean,
        epsilon_release=settlement.epsilon_release,
        epsilon_device=settlement.epsilon_device,
        delta=settlement.delta,
    )
    return looked("epsilon", _problem(lambda: _epsilons(settlement)))


_NONSENSE = (ArithmeticError, LookupError, TypeError, ValueError)
"""What computing with signed nonsense (an index that no list has) may raise."""


def _problem(check: Callable[[], str]) -> str:
    try:
        return check()
    except AtollError as error:
        return str(error)
    except _NONSENSE as error:
        return f"cannot be computed: {type(error).__name__}: {error}"


def _read(data: bytes) -> Transcript:
    if len(data) > BYTES_MAX:
        raise Malformed(f"transcript: expected at most {BYTES_MAX} bytes, found {len(data)}")
    transcript = unpack(data, Transcript)
    if transcript.format != FORMAT:
        raise Malformed(f"transcript: format {transcript.format}, this reader knows {FORMAT}")
    if len(transcript.openings) != PARTIES or len(transcript.shares) != PARTIES:
        raise Malformed(
            f"transcript: expected {PARTIES} openings and shares, found {len(transcript.openings)} and "
            f"{len(transcript.shares)}"
        )
    return transcript


def _announced(announcement: bytes, anchors: TrustAnchors) -> RoundTask:
    keys, threshold = role_keys(anchors, "round")
    task = unpack(verify(open_envelope(announcement), TASK_TYPE, keys, threshold), RoundTask)
    if task.tenant != anchors.tenant:
        raise Untrusted(f"announcement: expected tenant {anchors.tenant!r}, found {task.tenant!r}")
    return task


def _settled(settlement: bytes, anchors: TrustAnchors) -> Settlement:
    keys, threshold = role_keys(anchors, "round")
    return unpack(verify(open_envelope(settlement), SETTLEMENT_TYPE, keys, threshold), Settlement)


def _decision(transcript: Transcript) -> Decision:
    opening = unpack(open_envelope(transcript.openings[0]).payload, Opening)
    return unpack(opening.decision, Decision)


def _combined(transcript: Transcript, task: RoundTask) -> tuple[Aggregate | None, str]:
    """The mean that the signed shares add up to. Each aggregator signed its own share and its follower's, which are
    the first ones of both."""
    replies = [
        {"opening": opening, "first": transcript.shares[index], "second": transcript.shares[(index + 1) % PARTIES]}
        for index, opening in enumerate(transcript.openings)
    ]
    try:
        return combine_openings(replies, task), ""
    except AtollError as error:
        return None, str(error)
    except _NONSENSE as error:
        return None, f"cannot be computed: {type(error).__name__}: {error}"


def _of_task(task: RoundTask) -> dict[str, Any]:
    return {
        "round_id": task.round_id,
        "model": task.model,
        "base": task.base,
        "policy": task.policy,
        "aggregators": tuple(key.name for key in task.aggregators),
    }


def _of_decision(decision: Decision) -> dict[str, Any]:
    return {
        "root": decision.root,
        "chosen": tuple(device.device_id for device in decision.devices if device.selected),
        "refused": {device.device_id: device.reason for device in decision.devices if not device.selected},
        "refusal": decision.refusal,
    }


def _root(decision: Decision) -> str:
    root = merkle.root([bytes.fromhex(device.contribution) for device in decision.devices])
    return (
        "" if root == decision.root else f"the list of contributions has root {root[:16]}…, not {decision.root[:16]}…"
    )


def _validity(decision: Decision, task: RoundTask) -> str:
    """Who was measured is who passed, nobody twice, and only who was measured has a weight."""
    if decision.policy != task.policy:
        return f"policy {decision.policy}, announced was {task.policy}"
    measured = list(decision.measured)
    if measured != sorted(set(measured)) or not all(0 <= index < len(decision.devices) for index in measured):
        return "the measured devices are no ascending indices of the frozen list"
    for index, device in enumerate(decision.devices):
        if device.selected != (index in decision.selected) or device.selected != (device.weight > 0):
            return f"{device.device_id}: selected and not selected at once"
        if index not in decision.measured and device.selected:
            return f"{device.device_id}: selected without having passed the checks"
        if not device.selected and not device.reason:
            return f"{device.device_id}: refused without a reason"
    return ""


def _weights(decision: Decision, task: RoundTask) -> str:
    """The rules again, from the opened matrix alone."""
    if not decision.measured:
        return "" if decision.refusal and not decision.selected else "nothing was measured, and something selected"
    names = [decision.devices[index].device_id for index in decision.measured]
    failed = sum(device.reason.startswith("range check") for device in decision.devices)
    judged = judge(task, read_gram(decision), names, failed)
    weights = [decision.devices[index].weight for index in decision.measured]
    if judged.choice.integers.tolist() != weights or judged.choice.divisor != decision.divisor:
        place = next((at for at, (a, b) in enumerate(zip(judged.choice.integers, weights, strict=True)) if a != b), -1)
        who = f"{names[place]} has weight {weights[place]}, the rules give {judged.choice.integers[place]}"
        return who if place >= 0 else f"the divisor is {decision.divisor}, the rules give {judged.choice.divisor}"
    if judged.choice.refusal != decision.refusal:
        return f"refusal {decision.refusal!r}, the rules say {judged.choice.refusal!r}"
    for place, reason in judged.choice.refused.items():
        told = decision.devices[decision.measured[place]].reason
        if not judged.choice.refusal and told != reason:
            return f"{names[place]} was refused because {told!r}, the rules say {reason!r}"
    return ""


def _aggregate(transcript: Transcript, decision: Decision, aggregate: Aggregate | None) -> str:
    if aggregate is None:
        return "not one sum: see openings"
    if decision.selected and not all(transcript.shares):
        return "a share of the sum is missing"
    return ""


def _settlement(settled: Settlement, decision: Decision, task: RoundTask, aggregate: Aggregate | None) -> str:
    for what, expected, found in (
        ("tenant", task.tenant, settled.tenant),
        ("model", task.model, settled.model),
        ("round", task.round_id, settled.round_id),
        ("root", decision.root, settled.root),
    ):
        if expected != found:
            return f"settles {what} {found[:48]!r}, expected {expected[:48]!r}"
    paid = settled.spend.noise_multiplier if settled.spend is not None else 0.0
    if paid != task.noise_multiplier:
        return f"settles a noise multiplier of {paid:g}, announced was {task.noise_multiplier:g}"
    mean = mean_digest(None if aggregate is None else aggregate.mean)
    if mean != settled.mean:
        return f"the mean has digest {mean[:16] or 'none'}…, settled was {settled.mean[:16] or 'none'}…"
    return ""


def _epsilons(settled: Settlement) -> str:
    if settled.spend is None:
        return "" if settled.epsilon_release == settled.epsilon_device == 0 else "epsilons without a spend"
    for what, before, told in (
        ("release", settled.before_release, settled.epsilon_release),
        ("device", settled.before_device, settled.epsilon_device),
    ):
        found = epsilon([*before, settled.spend], settled.delta)
        if not math.isclose(found, told, rel_tol=_EPSILON_SLACK):
            return f"epsilon of the {what} is {found:.6g} at delta {settled.delta:g}, settled was {told:.6g}"
    return ""


def pack_transcript(transcript: Transcript) -> bytes:
    """As it is kept and exported."""
    return pack(transcript)
