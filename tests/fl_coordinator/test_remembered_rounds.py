"""A policy that remembers, over a whole coordinator: what is handed on, lost, rebuilt and replayed."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from pathlib import Path

import msgspec

from fl_coordinator.memory_chain import proven
from fl_coordinator.remembered_rounds import memory_of, newest_memory
from fl_coordinator.replay import replay, replay_chain
from fl_coordinator.rounds import Round, RoundSpec
from fl_coordinator.shares.remembering import memory_name
from fl_coordinator.transcript import decision_in
from tests.fl_coordinator.platform_in_memory import Platform
from tests.fl_coordinator.test_control import Call, calling
from tests.fl_coordinator.test_coordinator import adopt_first
from tests.fl_coordinator.test_round_end_to_end import SPEC, Aggregators, contribute_all, fleet
from tests.fl_coordinator.test_round_life import learned

REMEMBERING = msgspec.structs.replace(SPEC, policy="history")


def asked(name: str, **changes: object) -> RoundSpec:
    return msgspec.structs.replace(REMEMBERING, name=name, **changes)


def transcripts(platform: Platform, *rounds: Round) -> list[bytes]:
    results = [platform.ledger.round_result(one.round_id) for one in rounds]
    return [result[1] for result in results if result is not None]


def test_rounds_hand_on_their_memory_whoever_loses_it(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    devices = fleet(platform)
    aggregators = Aggregators(platform)

    async def story() -> None:
        async with platform.running() as coordinator, aggregators.serving():
            await adopt_first(platform, devices)
            first = await learned(platform, devices, asked("one"))
            assert (first.state, first.reason, first.task.memory) == ("PUBLISHED", "", "")
            # A round that fails leaves no transcript and moves nothing.
            aggregators.down = {"a0", "a1", "a2"}
            failed = await coordinator.open_round(asked("failed", aggregation_s=1, quorum=6))
            await contribute_all(devices, failed.round_id)
            await coordinator.abort_round(failed.round_id)
            while coordinator.round(failed.round_id).live:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            aggregators.down = set()
            other = await learned(platform, devices, msgspec.structs.replace(SPEC, name="krum", policy="krum"))
            assert (other.state, other.task.memory) == ("PUBLISHED", "")
            # One aggregator has a new disk for what it remembers; it is shown and believes.
            shutil.rmtree(tmp_path / "a1" / "memory")
            second = await learned(platform, devices, asked("two"))
            assert second.state == "PUBLISHED", second.reason
            assert second.task.memory_round == first.round_id
            assert aggregators.memories_asked == 1
        # The coordinator's copies are lost with it: they follow from the transcripts.
        platform.reopen()
        platform.ledger.close()
        with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
            assert db.execute("SELECT COUNT(*) FROM round_memories").fetchone() == (2,)
            db.execute("DELETE FROM round_memories")
        db.close()
        platform.log.close()
        platform.open()
        async with platform.running(), aggregators.serving():
            third = await learned(platform, devices, asked("three"))
            assert third.state == "PUBLISHED", third.reason
            assert third.task.memory_round == second.round_id
            assert memory_of(platform.ledger, third.task).rounds == 2
            assert aggregators.memories_asked == 1
        every = transcripts(platform, first, second, third, other)
        told = replay_chain(every, platform.keyring.anchors())
        assert [found.holds for found in told] == [True] * 4, told
        assert decision_in(every[1]).memory == third.task.memory != memory_name(memory_of(platform.ledger, first.task))
        alone = replay(every[2], platform.keyring.anchors())
        assert second.round_id in next(check.problem for check in alone.checks if check.name == "memory")

    asyncio.run(story())


def test_the_proof_of_a_memory_is_given_to_aggregators(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    devices = fleet(platform)
    aggregators = Aggregators(platform)

    async def story(call: Call) -> None:
        async with aggregators.serving():
            await adopt_first(platform, devices)
            first = await learned(platform, devices, asked("one"))
            second = await platform.coordinator.open_round(asked("two"))
            given = await call("GET", f"/v1/rounds/{second.round_id}/memory", "aggregator")
            assert given.status_code == 200
            memory = proven(given.content, second.task, platform.keyring.anchors())
            assert (memory.round_id, memory.rounds) == (first.round_id, 1)
            assert (await call("GET", f"/v1/rounds/{second.round_id}/memory", "gateway")).status_code == 403
            none = await call("GET", f"/v1/rounds/{first.round_id}/memory", "aggregator")
            assert (none.status_code, "begins with no memory" in none.text) == (404, True)

    calling(platform, story)


def test_aggregators_take_no_part_in_a_round_that_forgets(tmp_path: Path) -> None:
    """A coordinator that lost its results (or lies) would begin anew; a memory is not wound back behind them."""
    platform = Platform(tmp_path)
    devices = fleet(platform)
    aggregators = Aggregators(platform)

    async def story() -> None:
        async with platform.running() as coordinator, aggregators.serving():
            await adopt_first(platform, devices)
            first = await learned(platform, devices, asked("one"))
            keys = first.task.aggregators
            assert newest_memory(platform.ledger, [first], "fraud", "history", keys[:2]) is not None
            assert newest_memory(platform.ledger, [first], "fraud", "history", keys[:1]) is None
            assert newest_memory(platform.ledger, [first], "fraud", "robust", keys) is None
            assert (await learned(platform, devices, asked("two"))).task.memory_round == first.round_id
            with platform.ledger._write() as db:
                db.execute("DELETE FROM round_results")
            forgetful = await learned(platform, devices, asked("three"))
            assert (forgetful.state, forgetful.task.memory) == ("FAILED", "")
            assert "with a memory of 0 rounds, the last one here had 1; a memory is never wound" in forgetful.reason
            assert coordinator.ledger.round_result(forgetful.round_id) is None

    asyncio.run(story())


def test_an_aggregator_that_is_shown_nothing_says_what_it_lacks(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    devices = fleet(platform)
    aggregators = Aggregators(platform)

    async def story() -> None:
        async with platform.running() as coordinator, aggregators.serving():
            await adopt_first(platform, devices)
            assert (await learned(platform, devices, asked("one"))).state == "PUBLISHED"
            shutil.rmtree(tmp_path / "a2" / "memory")
            aggregators.members["a2"]._fetch_memory = None
            lacking = await coordinator.open_round(asked("two"))
            await contribute_all(devices, lacking.round_id)
            while not coordinator.round(lacking.round_id).failures:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            told = coordinator.round(lacking.round_id).failures[0]
            assert "the memory that it begins with is not at a2" in told

    asyncio.run(story())
