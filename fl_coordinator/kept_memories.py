"""The memories that one aggregator keeps on its disk, for the policies that look at earlier rounds.

For each tenant, model and policy it keeps two: the one that was announced with the last round it took part in, and the
one that this round left as far as it saw. That is a copy for speed; what counts is what three aggregators signed, and a
memory that is missing is proven anew (`memory_chain.proven`). What it alone must not lose is how far it has come: a
round that is announced with an older memory, or with another one of the same age, is refused, since whoever could wind
a memory back could have its own devices forgiven.
"""

from __future__ import annotations

import msgspec

from fl_coordinator.memory_chain import packed_memory
from fl_coordinator.shares.remembering import RoundMemory, empty_memory, memory_name, require_announced
from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack
from model_delta.errors import NotFound, Untrusted
from model_delta.store import ArtifactStore
from model_delta.task import RoundTask

KIND = "memory"


class _Kept(msgspec.Struct, frozen=True):
    """`announced` names the memory of the last announcement, after `rounds` rounds; `memories` are packed."""

    announced: str = ""
    rounds: int = 0
    memories: tuple[bytes, ...] = ()
    format: int = 1


class KeptMemories:
    """Of one aggregator, in its own store. Blocking."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    def announced(self, task: RoundTask) -> RoundMemory | None:
        """The memory that `task` begins with; None if it is not here. Raises Untrusted for one that goes back."""
        kept = self._kept(task)
        if not task.memory:
            found = empty_memory(task)
        else:
            packed = next((data for data in kept.memories if digest_of(data) == task.memory), None)
            if packed is None:
                return None
            found = unpack(packed, RoundMemory)
        self.accept(task, found)
        return found

    def accept(self, task: RoundTask, memory: RoundMemory) -> None:
        """From now on no older memory is accepted, nor another one of this age. Raises Untrusted for one that is."""
        require_announced(memory, task)
        kept = self._kept(task)
        if memory.rounds < kept.rounds or (memory.rounds == kept.rounds and task.memory != kept.announced):
            raise Untrusted(
                f"round {task.round_id!r}: was announced with a memory of {memory.rounds} rounds, the last one here "
                f"had {kept.rounds}; a memory is never wound back or exchanged. To begin anew on purpose, remove "
                f"{KIND}/{_file_name(task)} at all three aggregators"
            )
        if (kept.announced, kept.rounds) != (task.memory, memory.rounds):
            self._put(task, _Kept(task.memory, memory.rounds, (packed_memory(memory),)))

    def left(self, task: RoundTask, memory: RoundMemory) -> None:
        """Keep what the round of `task` left, if it is still the last one."""
        kept = self._kept(task)
        if kept.announced != task.memory or memory_name(memory) == task.memory:
            return
        begun = tuple(data for data in kept.memories if digest_of(data) == task.memory)
        self._put(task, msgspec.structs.replace(kept, memories=(*begun, packed_memory(memory))))

    def _kept(self, task: RoundTask) -> _Kept:
        try:
            return unpack(self._store.get(KIND, _file_name(task)), _Kept)
        except NotFound:
            return _Kept()

    def _put(self, task: RoundTask, kept: _Kept) -> None:
        self._store.put(KIND, _file_name(task), pack(kept))


def _file_name(task: RoundTask) -> str:
    return digest_of(pack([task.tenant, task.model, task.policy]))
