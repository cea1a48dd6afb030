"""What stays of rounds that have ended, and that it is enough."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from fl_coordinator.privacy import Spend
from fl_coordinator.replay import replay
from fl_coordinator.retention import TRANSCRIPT
from fl_coordinator.rounds import State
from model_delta.encoding import pack
from model_delta.errors import NotFound
from tests.fl_coordinator.control_calls import calls
from tests.fl_coordinator.learning_platform import asked, contribute_all, learning
from tests.fl_coordinator.platform_in_memory import on_a_loop


@on_a_loop
async def test_an_ended_round_leaves_the_ledger_small_its_accounts_as_they_were_and_a_transcript_that_replays(
    tmp_path: Path,
) -> None:
    async with learning(tmp_path) as at:
        ended = await at.learned(asked(name="one"))
        whole = at.transcript(ended)
        live = await at.coordinator.open_round(asked(name="two"))
        assert at.coordinator.clean_store(dry_run=True).trimmed == 0
        assert at.mean(ended).size > 0
        at.platform.store.remove(TRANSCRIPT, ended.transcript)  # as if the power had gone off before it was there
        for trimmed in (1, 0):
            assert at.coordinator.clean_store(dry_run=False).trimmed == trimmed
            assert at.mean(ended).size == 0
            assert len(at.transcript(ended)) < len(whole) - 3 * 4 * ended.task.length
            assert at.ledger.opened_without_noise("fraud") == [ended.round_id]
            assert at.ledger.privacy_of_devices(["pos-0000"]) == {"pos-0000": [Spend(0.0)]}
        given = await calls(at.platform)("GET", f"/v1/rounds/{ended.round_id}/transcript", "gateway")
        assert given.content == whole
        assert replay(given.content, at.platform.keyring.anchors()).holds
        assert not replay(at.transcript(ended), at.platform.keyring.anchors()).holds
        await contribute_all(at.devices, live.round_id)
        assert (await at.ended(live.round_id)).state == "PUBLISHED"


@on_a_loop
async def test_a_result_that_a_live_round_needs_stays_whole(tmp_path: Path) -> None:
    async with learning(tmp_path) as at:
        ended = await at.learned(asked())
    again = msgspec.structs.replace(ended, state=State.OPENED.value, candidate="")
    at.ledger.save_round(
        round_id=ended.round_id, model="fraud", state=again.state, created=ended.opened, record=pack(again)
    )
    at.platform.reopen()
    assert at.coordinator.clean_store(dry_run=False).trimmed == 0
    assert at.mean(ended).size > 0


@on_a_loop
async def test_a_transcript_goes_after_its_days_and_that_is_said(tmp_path: Path) -> None:
    async with learning(tmp_path) as at:
        ended = await at.learned(asked())
        exported = at.coordinator.transcript(ended.round_id)
    at.platform.clock.now += 401 * 86_400
    cleaned = at.coordinator.clean_store(dry_run=False)
    assert (cleaned.trimmed, cleaned.removed["transcript"]) == (1, 1)
    with pytest.raises(NotFound, match=r"its transcript was removed by its age \(`transcript_days`\)"):
        at.coordinator.transcript(ended.round_id)
    assert replay(exported, at.platform.keyring.anchors()).holds
    assert at.ledger.opened_without_noise("fraud") == [ended.round_id]
