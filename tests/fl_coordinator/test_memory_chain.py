"""A policy that remembers: every round begins with what the last one left, and whoever doubts it can follow."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import pytest

from fl_coordinator.kept_memories import KeptMemories
from fl_coordinator.memory_chain import MemoryProof, after, packed_memory, proven
from fl_coordinator.replay import Replay, replay, replay_chain
from fl_coordinator.rules.policy import WEIGHT_FULL
from fl_coordinator.shares.decision import Decision
from fl_coordinator.shares.remembering import RoundMemory, empty_memory, memory_name
from fl_coordinator.transcript import Transcript
from model_delta.encoding import pack, unpack
from model_delta.errors import AtollError, Malformed, SignatureInvalid, Untrusted
from model_delta.store import DirectoryStore
from model_delta.task import RoundTask
from tests.fakes.secure_round import SecureRound

LENGTH, DEVICES = 24, 9


class Chain:
    """Rounds one after the other, each with what the last one left."""

    def __init__(self, rounds: int = 0) -> None:
        self.world = SecureRound(
            length=LENGTH, hostile_max=1, selected_min=4, policy="history", contributions_max=16, round_id="fraud-0"
        )
        self.memory = empty_memory(self.world.task)
        self.tasks: list[RoundTask] = []
        self.transcripts: list[bytes] = []
        self.memories: list[RoundMemory] = []
        self.begin()
        for _ in range(rounds):
            self.run()

    def begin(self, **changes: object) -> None:
        """Announce the next round."""
        number = len(self.tasks) + 1
        self.world.task = msgspec.structs.replace(
            self.world.task,
            round_id=f"fraud-{number}",
            memory=memory_name(self.memory),
            memory_round=self.memory.round_id,
            issued=self.world.task.issued + 1,
            **changes,
        )

    def run(self, seed: int = 0) -> Decision:
        rng = np.random.default_rng([seed, len(self.tasks)])
        common = rng.normal(size=LENGTH)
        updates = [0.1 * (common + rng.normal(size=LENGTH)) for _ in range(DEVICES)]
        rows = np.stack([self.world.encode(update) for update in updates])
        outcomes, _, decision = self.world.run_rows(rows, seed=seed, memory=self.memory)
        self.memory = after(self.memory, self.world.task, decision)
        self.tasks.append(self.world.task)
        self.transcripts.append(self.world.transcript(outcomes))
        self.memories.append(self.memory)
        self.begin()
        return decision

    def proof(self, **changes: object) -> MemoryProof:
        """Of what the coming round begins with."""
        last = unpack(self.transcripts[-1], Transcript)
        good = MemoryProof(memory=packed_memory(self.memory), announcement=last.announcement, openings=last.openings)
        return msgspec.structs.replace(good, **changes)


@cache
def three_rounds() -> Chain:
    return Chain(3)


def problems(found: Replay) -> dict[str, str]:
    return {check.name: check.problem for check in found.checks if check.problem}


def test_rounds_hand_on_what_they_remember_and_all_of_it_is_replayed() -> None:
    chain = three_rounds()
    assert [memory.rounds for memory in chain.memories] == [1, 2, 3]
    assert chain.tasks[2].memory == memory_name(chain.memories[1])
    for order in ([0, 1, 2], [2, 0, 1]):
        found = replay_chain([chain.transcripts[place] for place in order], chain.world.anchors)
        assert [problems(one) for one in found] == [{}, {}, {}]
        assert [one.round_id for one in found] == [f"fraud-{place + 1}" for place in order]
    assert found[0].memory == memory_name(chain.memory)


def test_a_missing_transcript_is_named() -> None:
    chain = three_rounds()
    assert replay(chain.transcripts[0], chain.world.anchors).holds
    first, third = replay_chain([chain.transcripts[0], chain.transcripts[2]], chain.world.anchors)
    assert first.holds
    assert "that round 'fraud-2' left; give the transcript of that round too" in problems(third)["memory"]
    assert problems(third).keys() == {"memory", "weights"}


def test_weights_that_no_memory_explains_do_not_hold() -> None:
    """All three aggregators forgot the first round and signed what follows from nothing."""
    chain = Chain(1)
    honest = chain.memory
    chain.memory = empty_memory(chain.world.task)
    chain.begin()
    chain.run()
    task = chain.world.task = msgspec.structs.replace(
        chain.tasks[1], memory=memory_name(honest), memory_round="fraud-1"
    )
    last = unpack(chain.transcripts[1], Transcript)
    swapped = pack(msgspec.structs.replace(last, announcement=chain.world.announcement(task)))
    found = replay_chain([chain.transcripts[0], swapped], chain.world.anchors)[1]
    assert "decided about announcement" in problems(found)["freeze"]
    assert "the rules give" in problems(found)["weights"]


def test_a_round_that_leaves_another_one_out_is_told() -> None:
    chain = Chain(2)
    left_out = chain.memories[0]
    chain.memory = left_out
    chain.begin()
    chain.run(seed=5)
    alone = replay_chain([chain.transcripts[0], chain.transcripts[2]], chain.world.anchors)
    assert all(found.holds for found in alone)
    told = replay_chain(chain.transcripts, chain.world.anchors)
    assert [found.holds for found in told] == [True, True, False]
    assert problems(told[2])["memory"].startswith("leaves out round 'fraud-2', which began with the same memory")


def test_a_party_begins_with_no_other_memory_than_the_announced() -> None:
    chain = Chain(2)
    holdings = np.zeros((5, LENGTH), dtype=np.uint32)
    for memory in (None, chain.memories[0], msgspec.structs.replace(chain.memory, rounds=7)):
        with pytest.raises(Untrusted, match=r"expected the memory|was announced with the memory"):
            chain.world.run_rows(holdings, memory=memory)


def test_what_is_remembered_changes_who_is_chosen() -> None:
    """A push too gentle for one round: remembered, it gives its sender away, who keeps a quarter of a voice."""
    chain, rng = Chain(), np.random.default_rng(4)
    push = np.ones(LENGTH) / np.sqrt(LENGTH)
    weights = []
    for _ in range(12):
        updates = [0.1 * rng.normal(size=LENGTH) for _ in range(DEVICES)]
        updates[3] = updates[3] + 0.25 * push
        rows = np.stack([chain.world.encode(update) for update in updates])
        _, _, decision = chain.world.run_rows(rows, memory=chain.memory)
        chain.memory = after(chain.memory, chain.world.task, decision)
        chain.tasks.append(chain.world.task)
        chain.begin()
        weights.append(decision.devices[3].weight)
    assert weights[0] > WEIGHT_FULL // 4 >= max(weights[-3:])


# --- an aggregator that has to be shown ------------------------------------------------------------------------------


def test_a_memory_is_believed_with_the_three_openings_that_left_it() -> None:
    chain = three_rounds()
    assert proven(pack(chain.proof()), chain.world.task, chain.world.anchors) == chain.memory


def of_another_round(chain: Chain) -> MemoryProof:
    earlier = unpack(chain.transcripts[1], Transcript)
    return chain.proof(announcement=earlier.announcement, openings=earlier.openings)


def openings_of_another_round(chain: Chain) -> MemoryProof:
    return chain.proof(openings=unpack(chain.transcripts[1], Transcript).openings)


def other_bytes(chain: Chain) -> MemoryProof:
    return chain.proof(memory=packed_memory(msgspec.structs.replace(chain.memory, rounds=4)))


def unsigned(chain: Chain) -> MemoryProof:
    openings = chain.proof().openings
    return chain.proof(openings=(openings[0], openings[1], openings[1]))


def one_too_few(chain: Chain) -> MemoryProof:
    return chain.proof(openings=chain.proof().openings[:2])


def by_strangers(chain: Chain) -> MemoryProof:
    """Whoever holds the role `round` announces a round of the past with aggregators of its own."""
    stranger = Chain()
    stranger.world.round_key = chain.world.round_key
    for _ in range(3):
        stranger.run(seed=9)
    chain.world.task = msgspec.structs.replace(chain.world.task, memory=memory_name(stranger.memory))
    return stranger.proof()


@pytest.mark.parametrize(
    ("forge", "kind", "words"),
    [
        (of_another_round, Untrusted, "expected the announcement of round 'fraud-3', found 'fraud-2'"),
        (openings_of_another_round, Untrusted, "the openings are of another announcement"),
        (other_bytes, Untrusted, "was announced with the memory"),
        (unsigned, SignatureInvalid, "expected 1 valid signature"),
        (one_too_few, Malformed, "expected 3 openings, found 2"),
        (by_strangers, Untrusted, "0 of the aggregators that signed it are still the same, expected 2"),
    ],
)
def test_a_memory_that_is_not_proven_is_refused(
    forge: Callable[[Chain], MemoryProof], kind: type[AtollError], words: str
) -> None:
    shared = three_rounds()
    kept = shared.world.task
    try:
        proof = forge(shared)
        with pytest.raises(kind, match=words):
            proven(pack(proof), shared.world.task, shared.world.anchors)
    finally:
        shared.world.task = kept


def test_an_aggregator_keeps_two_memories_and_goes_back_to_none(tmp_path: Path) -> None:
    chain = three_rounds()
    kept = KeptMemories(DirectoryStore(tmp_path))
    began = empty_memory(chain.tasks[0])
    assert kept.announced(chain.tasks[0]) == began
    for task, left in zip(chain.tasks, chain.memories, strict=True):
        assert kept.announced(task) == began
        kept.left(task, left)
        began = left
    again = KeptMemories(DirectoryStore(tmp_path))  # after a kill
    assert again.announced(chain.world.task) == chain.memory
    assert again.announced(chain.tasks[1]) is None  # not at hand, and shown it is not taken either
    for task, memory in ((chain.tasks[1], chain.memories[0]), (chain.tasks[0], None)):
        with pytest.raises(Untrusted, match=r"with a memory of \d rounds, the last one here had 3; a memory is never"):
            kept.announced(task) if memory is None else kept.accept(task, memory)
    other = msgspec.structs.replace(chain.memory, memory=chain.memories[0].memory)
    forked = msgspec.structs.replace(chain.world.task, memory=memory_name(other))
    with pytest.raises(Untrusted, match="never wound back or exchanged"):
        kept.accept(forked, other)
    assert len(list((tmp_path / "memory").iterdir())) == 1
