"""What a device has left is spent once, whoever opens at that moment."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fl_coordinator.ledger import Ledger
from fl_coordinator.privacy import Spend
from fl_coordinator.round_opening import Opening
from fl_coordinator.rounds import Event, Privacy, Round, State
from fl_coordinator.tables.records import AdmittedContribution
from fl_coordinator.updates_log import SegmentLog
from model_delta.digest import digest_of
from model_delta.errors import Malformed, Unavailable
from model_delta.keys.keyring import EmbeddedKeyring
from model_delta.store import DirectoryStore
from tests.fakes.secure_round import SecureRound
from tests.fl_coordinator.learning_platform import asked


class MeetingLedger(Ledger):
    """Has two who ask for the accounts at the same moment both read before either writes, where nothing keeps them
    apart."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.meeting = threading.Barrier(2)

    def privacy_of_devices(self, device_ids: Iterable[str], other_than: str = "") -> dict[str, list[Spend]]:
        found = super().privacy_of_devices(device_ids, other_than)
        with contextlib.suppress(threading.BrokenBarrierError):
            self.meeting.wait(0.15)
        return found


class NobodyThere:
    """A bridge on which no aggregator answers."""

    async def command(
        self, payload: Any, nodes: Any, deadline_s: float, fetched: Any = None
    ) -> dict[str, dict[str, Any]]:
        raise Unavailable("no aggregator is there")


@pytest.mark.slow
def test_two_models_that_open_at_the_same_moment_do_not_both_spend_a_devices_last_budget(tmp_path: Path) -> None:
    ledger = MeetingLedger(tmp_path / "ledger.sqlite")
    store = DirectoryStore(tmp_path / "store")
    keyring = EmbeddedKeyring.create(tmp_path / "keyring", "acme", lambda: 1.0)
    settings: dict[str, Any] = {"log": SegmentLog(tmp_path / "log"), "store": store, "keyring": keyring}
    opening = Opening(ledger=ledger, bridge=NobodyThere(), tick_s=0.0, note=lambda kind, text: None, **settings)
    budget = Privacy(epsilon=100, epsilon_device=2.5, delta=1e-5, noise_multiplier=2.0)

    def frozen(model: str) -> Round:
        task = msgspec.structs.replace(SecureRound(length=4).task, model=model, round_id=f"{model}-1")
        digests = {name: digest_of(f"{model} {name}".encode()) for name in ("pos-1", "pos-2")}
        entries = [AdmittedContribution(name, digest, 0, 9, 1.0) for name, digest in digests.items()]
        ledger.admit(task.round_id, entries)
        return Round(
            round_id=task.round_id,
            spec=asked(model=model, privacy=budget),
            task=task,
            announcement=b"",
            state=State.AGGREGATING.value,
            opened=1.0,
            frozen=tuple(digests.values()),
        )

    async def both() -> list[Any]:
        attempts = [opening.attempt(frozen(model), asyncio.Event()) for model in ("fraud", "digits")]
        return await asyncio.gather(*attempts, return_exceptions=True)

    paid, refused = sorted(asyncio.run(both()), key=lambda found: isinstance(found, Exception))
    assert paid[1] is Event.ATTEMPT_FAILED, "it was paid for before anybody was asked"
    assert isinstance(refused, Malformed)
    assert "would bring 2 of 2 devices (first: pos-1) to epsilon" in str(refused)
    assert ledger.privacy_of_devices(["pos-1", "pos-2"]) == {"pos-1": [Spend(2.0)], "pos-2": [Spend(2.0)]}
    ledger.close()
