"""How one round's memory becomes the next one's, from what all three aggregators signed.

The coordinator and whoever replays transcripts compute a memory from the memory before it and the decision in between
(`after`). An aggregator that has no copy of the memory a round begins with (it was away, or has a new disk) need not go
back to the first round: the decision of the round that left it names it, three aggregators signed that decision, and at
least one of them is honest. So it takes the bytes from the coordinator with those three openings as proof (`proven`).

The openings must be by keys of which two are among this round's aggregators. Otherwise whoever holds the role `round`
could announce a round of the past with keys of its own, and have it leave any memory.

Compatibility: a packed `MemoryProof` travels between programs of different age; fields are only ever added.
"""

from __future__ import annotations

import msgspec

from fl_coordinator.aggregation import OPENING_TYPE, Opening
from fl_coordinator.rules.policy import remembers
from fl_coordinator.shares.decision import Decision, failed_checks, judge, read_decision, read_gram
from fl_coordinator.shares.remembering import RoundMemory, memory_name, moved, require_announced
from fl_coordinator.shares.sharing import PARTIES
from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack
from model_delta.errors import Malformed, Untrusted
from model_delta.task import TASK_TYPE, RoundTask
from model_delta.trust.signing import key_id, load_public_key, open_envelope, verify
from model_delta.trust.updater import TrustAnchors, role_keys

KNOWN_MIN = 2
"""How many of the aggregators that signed a memory must still be the same: one alone may be corrupt."""


class MemoryProof(msgspec.Struct, frozen=True, kw_only=True):
    """A packed `RoundMemory`, the signed announcement of the round that left it, and its three signed openings."""

    memory: bytes
    announcement: bytes
    openings: tuple[bytes, ...]


def after(before: RoundMemory, task: RoundTask, decision: Decision) -> RoundMemory:
    """The memory that a decided round leaves; `before` itself when it opened no distances or its policy keeps none.

    Raises Untrusted when the decision, which is believed to be signed, names another one.
    """
    found = before
    if remembers(task.policy) and decision.measured:
        names = [decision.devices[index].device_id for index in decision.measured]
        judged = judge(task, read_gram(decision), names, failed_checks(decision), before.memory)
        found = moved(before, task, judged.choice.memory)
    if memory_name(found) != decision.memory:
        raise Untrusted(
            f"round {task.round_id!r}: leaves the memory {memory_name(found)[:16] or 'of no round'}…, the aggregators "
            f"signed {decision.memory[:16] or 'that of no round'}…"
        )
    return found


def proven(data: bytes, task: RoundTask, anchors: TrustAnchors) -> RoundMemory:
    """The memory that `task` begins with, from a packed `MemoryProof`. Raises Untrusted and Malformed."""
    proof = unpack(data, MemoryProof)
    what = f"memory of round {task.round_id!r}"
    memory = unpack(proof.memory, RoundMemory)
    require_announced(memory, task)
    keys, threshold = role_keys(anchors, "round")
    payload = verify(open_envelope(proof.announcement), TASK_TYPE, keys, threshold)
    last = unpack(payload, RoundTask)
    if (last.tenant, last.model, last.policy, last.round_id) != (
        task.tenant,
        task.model,
        task.policy,
        task.memory_round,
    ):
        raise Untrusted(f"{what}: expected the announcement of round {task.memory_round!r}, found {last.round_id!r}")
    decision = read_decision(_signed_by_all(proof.openings, last, what))
    if (decision.round_id, decision.task) != (last.round_id, digest_of(payload)):
        raise Untrusted(f"{what}: the openings are of another announcement than round {last.round_id!r} had")
    if decision.memory != task.memory:
        raise Untrusted(f"{what}: the aggregators signed {decision.memory[:16]}…, announced was {task.memory[:16]}…")
    known = {(key.name, key.verifying) for key in task.aggregators}
    same = sum((key.name, key.verifying) in known for key in last.aggregators)
    if same < KNOWN_MIN:
        raise Untrusted(
            f"{what}: {same} of the aggregators that signed it are still the same, expected {KNOWN_MIN}; a policy "
            "that remembers has to begin anew"
        )
    return memory


def _signed_by_all(openings: tuple[bytes, ...], task: RoundTask, what: str) -> bytes:
    """The packed decision that each of the task's aggregators signed."""
    if len(openings) != PARTIES or len(task.aggregators) != PARTIES:
        raise Malformed(f"{what}: expected {PARTIES} openings, found {len(openings)}")
    decisions: set[bytes] = set()
    for index, (sealed, entry) in enumerate(zip(openings, task.aggregators, strict=True)):
        key = load_public_key(entry.verifying)
        opening = unpack(verify(open_envelope(sealed), OPENING_TYPE, {key_id(key): key}), Opening)
        if opening.index != index:
            raise Untrusted(f"{what}: expected the opening of aggregator {index}, found that of {opening.index}")
        decisions.add(opening.decision)
    if len(decisions) != 1:
        raise Untrusted(f"{what}: the aggregators signed different decisions")
    return decisions.pop()


def packed_memory(memory: RoundMemory) -> bytes:
    """As it is kept; its digest is its name."""
    return pack(memory)
