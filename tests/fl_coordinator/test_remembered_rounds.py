"""A policy that remembers, over a whole coordinator: what is handed on, lost, rebuilt and replayed."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from typing import Any

from fl_coordinator.memory_chain import proven
from fl_coordinator.remembered_rounds import memory_of, newest_memory
from fl_coordinator.replay import replay, replay_chain
from fl_coordinator.rounds import Round, RoundSpec
from fl_coordinator.shares.remembering import memory_name
from fl_coordinator.transcript import decision_in
from tests.fl_coordinator.control_calls import calls
from tests.fl_coordinator.learning_platform import asked, contribute_all, learning
from tests.fl_coordinator.platform_in_memory import Platform, on_a_loop, until


def remembering(name: str, **changes: Any) -> RoundSpec:
    return asked(policy="history", name=name, **changes)


def transcripts(platform: Platform, *rounds: Round) -> list[bytes]:
    return [platform.coordinator.transcript(one.round_id) for one in rounds]


@on_a_loop
async def test_rounds_hand_on_their_memory_whoever_loses_it(tmp_path: Path) -> None:
    async with learning(tmp_path) as at:
        first = await at.learned(remembering("one"))
        assert (first.state, first.reason, first.task.memory) == ("PUBLISHED", "", "")
        # A round that fails leaves no transcript and moves nothing.
        at.aggregators.down = {"a0", "a1", "a2"}
        failed = await at.coordinator.open_round(remembering("failed", aggregation_s=1, quorum=6))
        await contribute_all(at.devices, failed.round_id)
        await at.coordinator.abort_round(failed.round_id)
        await at.ended(failed.round_id)
        at.aggregators.down = set()
        other = await at.learned(asked(name="krum", policy="krum"))
        assert (other.state, other.task.memory) == ("PUBLISHED", "")
        # One aggregator has a new disk for what it remembers; it is shown and believes.
        shutil.rmtree(tmp_path / "a1" / "memory")
        second = await at.learned(remembering("two"))
        assert second.state == "PUBLISHED", second.reason
        assert second.task.memory_round == first.round_id
        assert at.aggregators.memories_asked == 1
        assert at.coordinator.clean_store(dry_run=False).trimmed == 3
    # The coordinator's copies are lost with it: they follow from the transcripts, of which shares are no part any more.
    at.platform.reopen()
    at.ledger.close()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        assert db.execute("SELECT COUNT(*) FROM round_memories").fetchone() == (2,)
        db.execute("DELETE FROM round_memories")
    db.close()
    at.platform.log.close()
    at.platform.open()
    async with at.platform.running(), at.aggregators.serving():
        third = await at.learned(remembering("three"))
        assert third.state == "PUBLISHED", third.reason
        assert third.task.memory_round == second.round_id
        assert memory_of(at.ledger, third.task).rounds == 2
        assert at.aggregators.memories_asked == 1
    every = transcripts(at.platform, first, second, third, other)
    told = replay_chain(every, at.platform.keyring.anchors())
    assert [found.holds for found in told] == [True] * 4, told
    assert decision_in(every[1]).memory == third.task.memory != memory_name(memory_of(at.ledger, first.task))
    alone = replay(every[2], at.platform.keyring.anchors())
    assert second.round_id in next(check.problem for check in alone.checks if check.name == "memory")


@on_a_loop
async def test_the_proof_of_a_memory_is_given_to_aggregators(tmp_path: Path) -> None:
    async with learning(tmp_path) as at:
        call = calls(at.platform)
        first = await at.learned(remembering("one"))
        second = await at.coordinator.open_round(remembering("two"))
        given = await call("GET", f"/v1/rounds/{second.round_id}/memory", "aggregator")
        assert given.status_code == 200
        memory = proven(given.content, second.task, at.platform.keyring.anchors())
        assert (memory.round_id, memory.rounds) == (first.round_id, 1)
        assert (await call("GET", f"/v1/rounds/{second.round_id}/memory", "gateway")).status_code == 403
        none = await call("GET", f"/v1/rounds/{first.round_id}/memory", "aggregator")
        assert (none.status_code, "begins with no memory" in none.text) == (404, True)


@on_a_loop
async def test_aggregators_take_no_part_in_a_round_that_forgets(tmp_path: Path) -> None:
    """A coordinator that lost its results (or lies) would begin anew; a memory is not wound back behind them."""
    async with learning(tmp_path) as at:
        first = await at.learned(remembering("one"))
        keys = first.task.aggregators
        assert newest_memory(at.ledger, [first], "fraud", "history", keys[:2]) is not None
        assert newest_memory(at.ledger, [first], "fraud", "history", keys[:1]) is None
        assert newest_memory(at.ledger, [first], "fraud", "robust", keys) is None
        assert (await at.learned(remembering("two"))).task.memory_round == first.round_id
        with at.ledger._write() as db:
            db.execute("DELETE FROM round_results")
        forgetful = await at.learned(remembering("three"))
        assert (forgetful.state, forgetful.task.memory) == ("FAILED", "")
        assert "with a memory of 0 rounds, the last one here had 1; a memory is never wound" in forgetful.reason
        assert at.ledger.round_result(forgetful.round_id) is None


@on_a_loop
async def test_an_aggregator_that_is_shown_nothing_says_what_it_lacks(tmp_path: Path) -> None:
    async with learning(tmp_path) as at:
        assert (await at.learned(remembering("one"))).state == "PUBLISHED"
        shutil.rmtree(tmp_path / "a2" / "memory")
        at.aggregators.members["a2"]._fetch_memory = None
        lacking = await at.coordinator.open_round(remembering("two"))
        await contribute_all(at.devices, lacking.round_id)
        await until(lambda: at.coordinator.round(lacking.round_id).failures)
        told = at.coordinator.round(lacking.round_id).failures[0]
        assert "the memory that it begins with is not at a2" in told
