"""A transcript checked again, without any of the programs that ran.

The replay takes nothing from the coordinator's word but who the aggregators are (the announcement) and which openings
were made before (the settlement's list of spends). It checks signatures, recomputes the root from the list, the coin
from parts that were committed to under that root, the weights and verdicts from the Gram matrix by the rules, the sum
from the shares, the norm that the matrix foretells for it, the mean's digest, and the epsilons. A round whose policy
remembers earlier ones is replayed with their transcripts (`replay_chain`), back to the first of them. It cannot show
that the Gram matrix is of the contributions that were frozen: those are deleted, and only the three aggregators
together ever held them. Of a round that revealed a graph it recomputes clusters and weights from the bits; of one that
revealed nothing but the selection the choice itself cannot be recomputed: what is left is that three aggregators signed
it, that its size is the rule's, and that the sum is of those chosen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from fl_coordinator.aggregation import Aggregate, combine_openings
from fl_coordinator.memory_chain import after
from fl_coordinator.privacy import Spent, miscounted
from fl_coordinator.rules.policy import remembers
from fl_coordinator.rules.reveals import DISTANCES, GRAPH, SELECTION
from fl_coordinator.shares.bounds import contributions_max, require_announceable
from fl_coordinator.shares.decision import (
    Decision,
    DeviceVerdict,
    failed_checks,
    judge,
    judge_hidden,
    read_gram,
    restated,
)
from fl_coordinator.shares.freezing import joint_coin, read_statement, require_opening
from fl_coordinator.shares.remembering import RoundMemory, empty_memory, memory_name, require_announced
from fl_coordinator.shares.sharing import PARTIES
from fl_coordinator.transcript import SETTLEMENT_TYPE, Settlement, Transcript, decision_of, mean_digest, read_transcript
from model_delta import merkle
from model_delta.digest import digest_of
from model_delta.encoding import unpack
from model_delta.errors import AtollError, Untrusted
from model_delta.task import TASK_TYPE, RoundTask
from model_delta.trust.signing import open_envelope, verify
from model_delta.trust.updater import TrustAnchors, role_keys


class Check(msgspec.Struct, frozen=True):
    """One thing that was looked at; `problem` is "" when it holds."""

    name: str
    problem: str


_ON_TRUST = {
    DISTANCES: "that the Gram matrix is of the contributions that were frozen",
    GRAPH: "that the bits are of the contributions that were frozen",
    SELECTION: "that these are the lowest Krum scores: no score was revealed",
}


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """What a transcript turned out to be. `checks` in their order; after one that reads something, those that need it
    are left out. Devices by name; epsilons of an opening with privacy. A policy that remembers began with the memory
    that `memory_round` left, and left `memory` (digest). `on_trust`: what no replay can compute, whatever it finds."""

    round_id: str = ""
    model: str = ""
    base: str = ""
    issued: int = 0
    root: str = ""
    policy: str = ""
    reveal: str = ""
    on_trust: str = ""
    mean: str = ""
    aggregators: tuple[str, ...] = ()
    chosen: tuple[str, ...] = ()
    refused: dict[str, str] = {}
    refusal: str = ""
    memory_round: str = ""
    memory: str = ""
    epsilon_release: float = 0.0
    epsilon_device: float = 0.0
    delta: float = 0.0
    checks: tuple[Check, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether every check was made and holds."""
        return [check.name for check in self.checks] == list(CHECKS) and not any(c.problem for c in self.checks)


CHECKS = (
    "transcript",
    "announcement",
    "openings",
    "root",
    "freeze",
    "validity",
    "memory",
    "weights",
    "aggregate",
    "settlement",
    "epsilon",
)


def replay(data: bytes, anchors: TrustAnchors) -> Replay:
    """Check a packed transcript against the keys in `anchors`. Never raises: what does not hold is in the checks."""
    return replay_chain([data], anchors)[0]


def replay_chain(transcripts: Sequence[bytes], anchors: TrustAnchors) -> list[Replay]:
    """Check packed transcripts, in any order; those of a policy that remembers with what the earlier ones among them
    leave. Never raises. A transcript that is needed and not among them is named in the check `memory`."""
    found: dict[int, Replay] = {}
    memories: dict[str, RoundMemory] = {}
    left = {place: _begins_with(data) for place, data in enumerate(transcripts)}
    while left:
        ready = [place for place, name in left.items() if not name or name in memories] or list(left)
        for place in ready:
            found[place], memory = _replayed(transcripts[place], anchors, memories.get(left.pop(place)))
            if memory is not None:
                memories[memory_name(memory)] = memory
    return _without_gaps([found[place] for place in range(len(transcripts))])


def _begins_with(data: bytes) -> str:
    """The memory that a transcript's round begins with, by its own unchecked word."""
    with contextlib.suppress(AtollError):
        return unpack(open_envelope(read_transcript(data).announcement).payload, RoundTask).memory
    return ""


def _without_gaps(every: Sequence[Replay]) -> list[Replay]:
    """The same, with a word on rounds that left out one which began with the same memory and moved it."""
    first: dict[tuple[str, str, str], Replay] = {}
    for found in sorted(every, key=lambda one: one.issued):
        if found.memory and found.holds:
            first.setdefault((found.model, found.policy, found.memory_round), found)
    told = []
    for found in every:
        other = first.get((found.model, found.policy, found.memory_round), found)
        if not remembers(found.policy) or other.round_id == found.round_id or other.issued >= found.issued:
            told.append(found)
            continue
        problem = f"leaves out round {other.round_id!r}, which began with the same memory and has a transcript too"
        checks = [Check(one.name, problem if one.name == "memory" else one.problem) for one in found.checks]
        told.append(msgspec.structs.replace(found, checks=tuple(checks)))
    return told


def _replayed(data: bytes, anchors: TrustAnchors, memory: RoundMemory | None) -> tuple[Replay, RoundMemory | None]:
    """One transcript, and the memory that its round leaves if all holds so far; `memory` is what it begins with."""
    found = Replay()
    transcript = Transcript(announcement=b"", openings=(), shares=(), settlement=b"")
    task = decision = settlement = aggregate = None
    announced = ""

    def looked(name: str, problem: str = "") -> Replay:
        return msgspec.structs.replace(found, checks=(*found.checks, Check(name, problem)))

    try:
        transcript = read_transcript(data)
        found = looked("transcript")
        task, announced = _announced(transcript.announcement, anchors)
        found = msgspec.structs.replace(looked("announcement"), **_of_task(task))
        decision = decision_of(transcript)
        found = msgspec.structs.replace(found, **_of_decision(decision))
        aggregate, problem = _combined(transcript, task)
        found = looked("openings", problem)
    except AtollError as error:
        return looked(CHECKS[len(found.checks)], str(error)), None
    memory = memory if task.memory else empty_memory(task)
    for name, check in (
        ("root", lambda: _root(decision)),
        ("freeze", lambda: _freeze(decision, task, announced)),
        ("validity", lambda: _validity(decision, task)),
        ("memory", lambda: _memory(memory, task)),
        ("weights", lambda: _weights(decision, task, memory)),
        ("aggregate", lambda: _aggregate(transcript, decision, aggregate)),
    ):
        found = looked(name, _problem(check))
    try:
        settlement = _settled(transcript.settlement, anchors)
        found = looked("settlement", _settlement(settlement, decision, task, aggregate))
    except AtollError as error:
        return looked("settlement", str(error)), None
    found = msgspec.structs.replace(
        found,
        mean=settlement.mean,
        epsilon_release=settlement.epsilon_release,
        epsilon_device=settlement.epsilon_device,
        delta=settlement.delta,
    )
    found = looked("epsilon", _problem(lambda: _epsilons(settlement, decision, task)))
    left = after(memory, task, decision) if found.holds and memory is not None else None
    return found, left if remembers(task.policy) else None


_NONSENSE = (ArithmeticError, LookupError, TypeError, ValueError)
"""What computing with signed nonsense (an index that no list has) may raise."""


def _problem(check: Callable[[], str]) -> str:
    try:
        return check()
    except AtollError as error:
        return str(error)
    except _NONSENSE as error:
        return f"cannot be computed: {type(error).__name__}: {error}"


def _announced(announcement: bytes, anchors: TrustAnchors) -> tuple[RoundTask, str]:
    """The task, and the digest of its bytes as they were signed."""
    keys, threshold = role_keys(anchors, "round")
    payload = verify(open_envelope(announcement), TASK_TYPE, keys, threshold)
    task = unpack(payload, RoundTask)
    if task.tenant != anchors.tenant:
        raise Untrusted(f"announcement: expected tenant {anchors.tenant!r}, found {task.tenant!r}")
    require_announceable(task, once=True)
    return task, digest_of(payload)


def _settled(settlement: bytes, anchors: TrustAnchors) -> Settlement:
    keys, threshold = role_keys(anchors, "round")
    return unpack(verify(open_envelope(settlement), SETTLEMENT_TYPE, keys, threshold), Settlement)


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
        "reveal": task.reveal,
        "on_trust": _ON_TRUST.get(task.reveal, ""),
        "aggregators": tuple(key.name for key in task.aggregators),
        "memory_round": task.memory_round,
        "issued": task.issued,
    }


def _of_decision(decision: Decision) -> dict[str, Any]:
    return {
        "root": decision.root,
        "chosen": tuple(device.device_id for device in decision.devices if device.selected),
        "refused": {device.device_id: device.reason for device in decision.devices if not device.selected},
        "refusal": decision.refusal,
        "memory": decision.memory,
    }


def _root(decision: Decision) -> str:
    root = merkle.root([bytes.fromhex(device.contribution) for device in decision.devices])
    return (
        "" if root == decision.root else f"the list of contributions has root {root[:16]}…, not {decision.root[:16]}…"
    )


def _freeze(decision: Decision, task: RoundTask, announced: str) -> str:
    """The three signed statements over announcement and list, and a coin from what they committed to."""
    if decision.format < 3:
        return ""  # written before statements were kept
    if decision.task != announced:
        return f"decided about announcement {decision.task[:16]}…, this one is {announced[:16]}…"
    if not len(decision.frozen) == len(decision.parts) == PARTIES:
        return f"expected {PARTIES} statements and parts, found {len(decision.frozen)} and {len(decision.parts)}"
    expected = (task.tenant, task.round_id, decision.attempt, announced, decision.root, len(decision.devices))
    tosses = set()
    for index, (sealed, part) in enumerate(zip(decision.frozen, decision.parts, strict=True)):
        said, name = read_statement(sealed, task, index), task.aggregators[index].name
        if (said.tenant, said.round_id, said.attempt, said.task, said.root, said.count) != expected:
            return f"{name} signed a freeze of another announcement, attempt or list"
        require_opening(said, part, name)
        tosses.add(said.toss)
    if [decision.coin] != [joint_coin(task.round_id, decision.root, decision.parts, toss) for toss in tosses]:
        return "the coin is not the one that the parts make"
    return ""


def _validity(decision: Decision, task: RoundTask) -> str:
    """Who was measured is who passed, nobody twice, and only who was measured has a weight."""
    if decision.policy != task.policy:
        return f"policy {decision.policy}, announced was {task.policy}"
    if len(decision.devices) > contributions_max(task):
        return f"{len(decision.devices)} contributions, announced were {contributions_max(task)} at most"
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
        if decision.format >= 3 and decision.measured and (device.valid == 1) != (index in decision.measured):
            return f"{device.device_id}: its validity bit is {device.valid}, and it was measured all the same or not"
    return ""


def _memory(memory: RoundMemory | None, task: RoundTask) -> str:
    """Whether the memory that a round begins with is known, from the transcript of the round that left it."""
    if memory is None:
        return (
            f"begins with the memory {task.memory[:16]}… that round {task.memory_round!r} left; give the transcript of "
            "that round too, and of those before it under this policy"
        )
    require_announced(memory, task)
    return ""


def _weights(decision: Decision, task: RoundTask, memory: RoundMemory | None) -> str:
    """The rules again, from the opened matrix and what the policy remembers alone."""
    if memory is None:
        return "cannot be computed without the memory that the round begins with"
    if decision.reveal != task.reveal:
        return f"reveals {decision.reveal[:48]!r}, announced was {task.reveal!r}"
    if not decision.measured:
        if not decision.refusal or decision.selected:
            return "nothing was measured, and something selected"
        return _follows(decision, task, memory)
    names = [decision.devices[index].device_id for index in decision.measured]
    if task.reveal == DISTANCES:
        choice = judge(task, read_gram(decision), names, failed_checks(decision), memory.memory).choice
    else:
        choice = judge_hidden(task, decision, failed_checks(decision)).choice
    weights = [decision.devices[index].weight for index in decision.measured]
    if choice.integers.tolist() != weights or choice.divisor != decision.divisor:
        place = next((at for at, (a, b) in enumerate(zip(choice.integers, weights, strict=True)) if a != b), -1)
        who = f"{names[place]} has weight {weights[place]}, the rules give {choice.integers[place]}"
        return who if place >= 0 else f"the divisor is {decision.divisor}, the rules give {choice.divisor}"
    after(memory, task, decision)
    if choice.refusal != decision.refusal:
        return f"refusal {decision.refusal!r}, the rules say {choice.refusal!r}"
    for place, reason in choice.refused.items():
        told = decision.devices[decision.measured[place]].reason
        if not choice.refusal and told != reason:
            return f"{names[place]} was refused because {told!r}, the rules say {reason!r}"
    return _follows(decision, task, memory)


def _follows(decision: Decision, task: RoundTask, memory: RoundMemory) -> str:
    """Whether every other value of a decision, each verdict on each device among them, is what the rules give. The
    suspicion of `history` is left alone where it does not decide: it was counted otherwise at first."""
    if decision.format < 3:
        return ""  # written before validity bits were kept
    rules = restated(task, decision, memory.memory)
    ignored = {"history"} if task.reveal == DISTANCES and not remembers(task.policy) else set()
    for said, told in zip(decision.devices, rules.devices, strict=True):
        for name in DeviceVerdict.__struct_fields__:
            if name in ignored:
                continue
            found, expected = getattr(said, name), getattr(told, name)
            if found != expected:
                return f"{said.device_id}: {name} {found!r}, the rules give {expected!r}"
    for name in Decision.__struct_fields__:
        if name != "devices" and getattr(decision, name) != getattr(rules, name):
            return f"{name} is {str(getattr(decision, name))[:48]}, the rules give {str(getattr(rules, name))[:48]}"
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


def _epsilons(settled: Settlement, decision: Decision, task: RoundTask) -> str:
    """The epsilons again, whether they are within the announced budget, and whether the aggregators signed the same
    account."""
    if settled.spend is None:
        if settled.epsilon_release or settled.epsilon_device or settled.delta:
            return "epsilons without a spend"
        if settled.before_release or settled.before_device or decision.spent is not None:
            return "an account without a spend"
        return ""
    spent = Spent(**{name: getattr(settled, name) for name in Spent.__struct_fields__})
    problem = miscounted(spent)
    if problem or decision.format < 3:
        return problem
    if decision.spent != spent:
        return "the account is not the one that the aggregators signed"
    if (spent.delta, spent.spend.sampling) != (task.delta, 1):
        return f"counted at delta {spent.delta:g}, sampling {spent.spend.sampling:g}; announced was {task.delta:g}, 1"
    for whose, found, budget in (
        ("release", spent.epsilon_release, task.epsilon),
        ("device", spent.epsilon_device, task.epsilon_device),
    ):
        if found > budget:
            return f"epsilon of the {whose} is {found:.6g}, the announced budget is {budget:g}"
    return ""
