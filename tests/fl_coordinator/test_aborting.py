"""A round that is aborted ends at once, and what nobody can know of its sum counts against privacy."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from fl_coordinator.kept_spends import KIND as SPENT
from fl_coordinator.kept_spends import KeptSpends
from fl_coordinator.privacy import Spend
from fl_coordinator.rounds import State
from model_delta.errors import StorageFull
from model_delta.store import DirectoryStore
from tests.fl_coordinator.learning_platform import SPEC, Learning, asked, contribute_all, learning
from tests.fl_coordinator.platform_in_memory import adopt_first, on_a_loop, until


@on_a_loop
async def test_an_abort_does_not_wait_for_the_aggregators_and_drops_what_they_still_answer(tmp_path: Path) -> None:
    async with learning(tmp_path, 6) as at:
        asked_for, go_on = at.aggregators._run, asyncio.Event()

        async def slow(name: str, command: dict[str, Any]) -> dict[str, Any] | str:
            answer = await asked_for(name, command)  # it has decided and opened its part, and nobody has heard of it
            await go_on.wait()
            return answer

        at.aggregators._run = slow  # type: ignore[method-assign]
        opened = await at.coordinator.open_round(asked(aggregation_s=3600))
        await contribute_all(at.devices, opened.round_id)
        await until(lambda: at.aggregators.commands)
        await at.coordinator.abort_round(opened.round_id)
        async with asyncio.timeout(5):
            ended = await at.ended(opened.round_id)
        assert (ended.state, ended.reason, ended.attempt) == ("FAILED", "an operator aborted it", 1)
        go_on.set()
        await until(lambda: at.aggregators.answered == 1)
        assert at.ledger.round_result(opened.round_id) is None
        # Nobody knows here whether two of them have opened: no epsilon is promised for what they may have.
        assert at.ledger.opened_without_noise("fraud") == [opened.round_id]
        assert at.ledger.privacy_of_devices(["pos-0000"]) == {"pos-0000": [Spend(0.0)]}
        assert (await at.learned(asked(name="next"))).state == "PUBLISHED", "the next round does not wait for it"


@on_a_loop
async def test_a_round_that_is_to_end_asks_no_aggregator_after_a_restart(
    tmp_path: Path,
) -> None:
    async with learning(tmp_path, 6) as at:
        at.aggregators.down = {"a1"}
        opened = await at.coordinator.open_round(SPEC)
        await contribute_all(at.devices, opened.round_id)
        await until(lambda: at.coordinator.round(opened.round_id).at is State.AGGREGATING)
        await until(lambda: at.aggregators.commands)
    asked_before = len(at.aggregators.commands)
    at.ledger.abort_round(opened.round_id)
    at.platform.reopen()
    async with at.platform.running(), at.aggregators.serving():
        assert (await at.ended(opened.round_id)).reason == "an operator aborted it"
    assert len(at.aggregators.commands) == asked_before


@on_a_loop
async def test_what_was_opening_when_the_coordinator_died_counts_as_opened_also_if_the_round_is_aborted(
    tmp_path: Path,
) -> None:
    async with learning(tmp_path, 6) as at:
        asked_for, never = at.aggregators._run, asyncio.Event()

        async def opened_but_unheard(name: str, command: dict[str, Any]) -> dict[str, Any] | str:
            answer = await asked_for(name, command)
            await never.wait()
            return answer

        at.aggregators._run = opened_but_unheard  # type: ignore[method-assign]
        opened = await at.coordinator.open_round(SPEC)
        await contribute_all(at.devices, opened.round_id)
        await until(lambda: at.aggregators.commands)
    at.ledger.abort_round(opened.round_id)
    at.platform.reopen()
    async with at.platform.running():
        assert (await at.ended(opened.round_id)).reason == "an operator aborted it"
    assert at.ledger.opened_without_noise("fraud") == [opened.round_id]


@on_a_loop
async def test_answers_that_never_come_count_as_an_opening(tmp_path: Path) -> None:
    async with learning(tmp_path, 6) as at:
        asked_for, never = at.aggregators._run, asyncio.Event()

        async def unheard(name: str, command: dict[str, Any]) -> dict[str, Any] | str:
            await asked_for(name, command)
            await never.wait()
            return "never said"

        at.aggregators._run = unheard  # type: ignore[method-assign]
        opened = await at.coordinator.open_round(asked(aggregation_s=1))
        await contribute_all(at.devices, opened.round_id)
        await until(lambda: at.coordinator.round(opened.round_id).failures)
        assert "did not answer within 1 s" in at.coordinator.round(opened.round_id).failures[0]
        assert at.ledger.opened_without_noise("fraud") == [opened.round_id]


@on_a_loop
async def test_a_round_that_is_aborted_before_any_aggregator_could_hear_of_it_opened_nothing(tmp_path: Path) -> None:
    at = Learning(tmp_path, 6)
    async with at.platform.running():  # without a ServerApp that would fetch commands
        await adopt_first(at.platform, at.devices)
        opened = await at.coordinator.open_round(SPEC)
        await contribute_all(at.devices, opened.round_id)
        await until(lambda: at.coordinator.round(opened.round_id).attempt == 1)
        await at.coordinator.abort_round(opened.round_id)
        assert (await at.ended(opened.round_id)).reason == "an operator aborted it"
        assert await at.platform.bridge.next_command(0.0) is None, "nobody is asked any more"
        assert at.ledger.opened_without_noise("fraud") == []


@on_a_loop
async def test_a_round_that_fails_after_some_let_go_of_their_shares_counts_as_opened(tmp_path: Path) -> None:
    async with learning(tmp_path, 6) as at:
        asked_for = at.aggregators._run

        async def lost(name: str, command: dict[str, Any]) -> dict[str, Any] | str:
            answer = await asked_for(name, command)
            return answer if name == "a0" else "its answer was lost"

        at.aggregators._run = lost  # type: ignore[method-assign]
        assert (await at.learned(asked(name="lost"))).state == "FAILED"
        assert len(at.ledger.opened_without_noise("fraud")) == 1
        at.aggregators._run = asked_for  # type: ignore[method-assign]
        at.aggregators.down = {"a0", "a1", "a2"}
        assert (await at.learned(asked(name="nobody there"))).state == "FAILED"
        assert len(at.ledger.opened_without_noise("fraud")) == 1, "nobody was there to open anything"


class FullDisk(DirectoryStore):
    """An aggregator's store that has no room for some kinds of objects."""

    full: frozenset[str] = frozenset()

    def put(self, kind: str, name: str, data: bytes) -> None:
        if kind in self.full:
            raise StorageFull(f"no room for {len(data)} bytes of {kind}")
        super().put(kind, name, data)


@pytest.mark.parametrize("full", ["reply", SPENT])
@on_a_loop
async def test_an_opening_that_the_disks_have_no_room_for_is_none_by_any_account(tmp_path: Path, full: str) -> None:
    """Had an aggregator counted what it then could not answer, it would refuse every later round with noise."""
    async with learning(tmp_path, 6) as at:
        disks = {name: FullDisk(tmp_path / name) for name in at.aggregators.members}
        for name, member in at.aggregators.members.items():
            disks[name].full = frozenset({full})
            member._state.store, member._spends = disks[name], KeptSpends(disks[name])
        ended = await at.learned(asked(name="no room"))
        assert (ended.state, f"bytes of {full}" in ended.reason) == ("FAILED", True)
        assert at.ledger.opened_without_noise("fraud") == []
        assert [disk.names(SPENT) for disk in disks.values()] == [(), (), ()]
        for disk in disks.values():
            disk.full = frozenset()
        assert (await at.learned(asked(name="room"))).state == "PUBLISHED"
        assert len(at.ledger.opened_without_noise("fraud")) == 1
        assert [len(disk.names(SPENT)) for disk in disks.values()] == [1, 1, 1]


@on_a_loop
async def test_an_aggregator_alone_that_has_no_room_counts_what_its_answer_let_go(tmp_path: Path) -> None:
    async with learning(tmp_path, 6) as at:
        disk = FullDisk(tmp_path / "a1")
        disk.full = frozenset({SPENT})
        at.aggregators.members["a1"]._spends = KeptSpends(disk)
        opened = await at.coordinator.open_round(asked())
        await contribute_all(at.devices, opened.round_id)
        await until(lambda: at.coordinator.round(opened.round_id).failures)
        assert at.ledger.opened_without_noise("fraud") == [opened.round_id], "the other two have let go"
        disk.full = frozenset()
        assert (await at.ended(opened.round_id)).state == "PUBLISHED"
        assert disk.names(SPENT) == DirectoryStore(tmp_path / "a0").names(SPENT)
