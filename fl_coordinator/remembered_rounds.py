"""The memory of a model's rounds, from the coordinator's ledger: what the next round begins with, and the proof of it.

The ledger keeps the newest two memories of each model and policy, written in one transaction with the transcript of the
round that left them. Should they be lost, they follow again from the transcripts, which are all there.
"""

from __future__ import annotations

from collections.abc import Sequence

from fl_coordinator.ledger import Ledger
from fl_coordinator.memory_chain import KNOWN_MIN, MemoryProof, after, packed_memory
from fl_coordinator.recorded_rounds import recorded_round
from fl_coordinator.rounds import Round
from fl_coordinator.shares.decision import Decision
from fl_coordinator.shares.remembering import RoundMemory, empty_memory, memory_name
from fl_coordinator.tables.records import MemoryRecord
from fl_coordinator.transcript import Transcript, decision_in
from model_delta.encoding import pack, unpack
from model_delta.errors import NotFound
from model_delta.task import AggregatorKey, RoundTask


def newest_memory(
    ledger: Ledger, rounds: Sequence[Round], model: str, policy: str, aggregators: Sequence[AggregatorKey]
) -> RoundMemory | None:
    """What the next round of `model` under `policy` begins with, from all `rounds`, oldest first; None for a memory of
    no round. It begins anew when fewer than two of the aggregators that signed it are still the same. Blocking."""
    for found in reversed(rounds):
        if (found.task.model, found.task.policy) != (model, policy):
            continue
        result = ledger.round_result(found.round_id)
        if result is None:
            continue
        memory = _left_by(ledger, found.task, decision_in(result[1]))
        if not memory.rounds:
            return None
        signed = recorded_round(ledger, memory.round_id).task.aggregators
        known = {(key.name, key.verifying) for key in aggregators}
        return memory if sum((key.name, key.verifying) in known for key in signed) >= KNOWN_MIN else None
    return None


def memory_of(ledger: Ledger, task: RoundTask) -> RoundMemory:
    """What a round began with. Blocking. Raises NotFound when neither it nor a transcript that leads to it is there."""
    lacking: list[tuple[RoundTask, Decision]] = []
    while task.memory:
        packed = ledger.round_memory(task.memory)
        if packed is not None:
            found = unpack(packed, RoundMemory)
            break
        result = ledger.round_result(task.memory_round)
        if result is None:
            raise NotFound(f"round {task.memory_round!r}: its transcript, which leads to {task.memory[:16]}…, is gone")
        task = recorded_round(ledger, task.memory_round).task
        lacking.append((task, decision_in(result[1])))
    else:
        found = empty_memory(task)
    for earlier, decision in reversed(lacking):
        found = after(found, earlier, decision)
    return found


def memory_record(ledger: Ledger, task: RoundTask, decision: Decision) -> MemoryRecord | None:
    """What a decided round leaves, to be kept with its transcript; None when that is nothing new. Blocking. Raises
    Untrusted when the aggregators signed another one than follows."""
    memory = after(memory_of(ledger, task), task, decision)
    if memory_name(memory) == task.memory:
        return None
    return MemoryRecord(memory_name(memory), task.model, task.policy, memory.rounds, packed_memory(memory))


def proof_for(ledger: Ledger, task: RoundTask) -> bytes:
    """The packed `MemoryProof` of what a round begins with. Blocking. Raises NotFound for a round without memory."""
    result = ledger.round_result(task.memory_round) if task.memory else None
    if result is None:
        raise NotFound(f"round {task.round_id!r}: begins with no memory of earlier rounds")
    transcript = unpack(result[1], Transcript)
    return pack(
        MemoryProof(
            memory=packed_memory(memory_of(ledger, task)),
            announcement=transcript.announcement,
            openings=transcript.openings,
        )
    )


def _left_by(ledger: Ledger, task: RoundTask, decision: Decision) -> RoundMemory:
    packed = ledger.round_memory(decision.memory) if decision.memory else None
    if packed is not None:
        return unpack(packed, RoundMemory)
    return after(memory_of(ledger, task), task, decision)
