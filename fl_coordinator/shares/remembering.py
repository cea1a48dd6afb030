"""The memory that a policy keeps over rounds, as rounds hand it on.

Some policies (`rules.policy.remembers`) judge a device by the opened distances of earlier rounds too. Three aggregators
must then begin a round with the same bytes, or they would choose different devices. So a memory has a name, the digest
of its packed form; a round's announcement names the memory it begins with and the round that left it, and the decision
that all three sign names the memory after it. A memory is computed from decisions alone: whoever has the transcripts of
the rounds in between can compute it again, and whoever has one signed decision can check the bytes of the memory that
it left.

A round moves the memory when its three openings were put together into a transcript, whether it opened a sum or refused
to: distances were opened either way. A round that failed without a transcript does not, whatever single aggregators may
know of it: the next round begins with the memory that this one began with. One memory belongs to one tenant, model and
policy; rounds of the same model under another policy leave it alone.

Compatibility: packed memories are kept by coordinator and aggregators and named in what is signed; fields are only ever
added.
"""

from __future__ import annotations

import msgspec

from fl_coordinator.rules.history import Memory
from model_delta.digest import digest_of
from model_delta.encoding import pack
from model_delta.errors import Untrusted
from model_delta.task import RoundTask


class RoundMemory(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What `policy` remembers of `model` after `rounds` rounds, the last of which was `round_id`; of none at first."""

    format: int = 1
    tenant: str
    model: str
    policy: str
    rounds: int = 0
    round_id: str = ""
    memory: Memory = Memory()


def empty_memory(task: RoundTask) -> RoundMemory:
    """The memory of a policy that has seen no round."""
    return RoundMemory(tenant=task.tenant, model=task.model, policy=task.policy)


def memory_name(memory: RoundMemory) -> str:
    """How announcements and decisions name a memory: its digest, "" for one of no round."""
    return digest_of(pack(memory)) if memory.rounds else ""


def moved(before: RoundMemory, task: RoundTask, memory: Memory) -> RoundMemory:
    """The memory after a round of `task` in which the policy came to `memory`."""
    return msgspec.structs.replace(before, rounds=before.rounds + 1, round_id=task.round_id, memory=memory)


def require_announced(memory: RoundMemory, task: RoundTask) -> None:
    """Raise Untrusted when a round was announced to begin with another memory than this one."""
    whose = (memory.tenant, memory.model, memory.policy)
    if whose != (task.tenant, task.model, task.policy) or memory.round_id != task.memory_round:
        raise Untrusted(
            f"round {task.round_id!r}: expected the memory of {task.tenant!r}, {task.model!r}, {task.policy!r} after "
            f"round {task.memory_round!r}, found one of {', '.join(map(repr, whose))} after {memory.round_id!r}"
        )
    if memory_name(memory) != task.memory:
        raise Untrusted(
            f"round {task.round_id!r}: was announced with the memory {task.memory[:16] or 'of no round'}…, found "
            f"{memory_name(memory)[:16] or 'one of no round'}…"
        )
