"""A device's word that it sits a round out counts if it is its own, and of this round."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fl_coordinator.absences import Absences
from fl_coordinator.recorded_rounds import save_round
from fl_coordinator.rounds import Round, RoundSpec
from monitoring.metrics import Metrics
from monitoring.telemetry import SittingOut
from tests.fakes.secure_round import SecureRound
from tests.fl_coordinator.learning_platform import sitting_out
from tests.fl_coordinator.platform_in_memory import Device, Platform

SPEC = RoundSpec(model="fraud", quorum=6)
TASK = msgspec.structs.replace(SecureRound(length=4).task, model="fraud", round_id="fraud-1", base="b" * 64)


class Coordinator:
    """What hears reports: a ledger with a round that collects and one that was frozen, and two devices."""

    def __init__(self, folder: Path) -> None:
        self.platform = Platform(folder)
        self.first, self.second = (self.platform.device(name) for name in ("pos-0001", "pos-0002"))
        self.first.task = self.second.task = TASK
        self.ledger = self.platform.ledger
        for round_id, state in (("fraud-1", "COLLECTING"), ("fraud-0", "FROZEN")):
            task = msgspec.structs.replace(TASK, round_id=round_id)
            save_round(
                self.ledger, Round(round_id=round_id, state=state, spec=SPEC, task=task, announcement=b"", opened=1.0)
            )
        self.metrics = Metrics()
        self.absences = Absences(ledger=self.ledger, keyring=self.platform.keyring, metrics=self.metrics)

    def hears(self, device: Device, said: SittingOut) -> str:
        """The verdict on what one report says."""
        before = self._counted()
        report = msgspec.structs.replace(device.next_report(), sitting_out=said)
        records = {record.device_id: record for record in self.ledger.devices()}
        self.absences.hear([device.next_report(), report], records, self.platform.clock())
        return (self._counted() - before).pop()[0]

    def _counted(self) -> set[tuple[str, str]]:
        lines = [line for line in self.metrics.render().decode().splitlines() if line.startswith("atoll_sitting_out_")]
        return {(line.split('"')[1], line.split()[-1]) for line in lines if "_total{" in line}


@pytest.fixture
def at(tmp_path: Path) -> Iterator[Coordinator]:
    coordinator = Coordinator(tmp_path)
    yield coordinator
    coordinator.ledger.close()


def test_a_word_counts_once_and_a_reason_that_lasts_stays(at: Coordinator) -> None:
    full, lost = (sitting_out(at.first, "fraud-1", reason) for reason in ("disk full", "own record lost"))
    assert [at.hears(at.first, said) for said in (full, full)] == ["taken", "no news"]
    assert at.ledger.sitting_out("fraud-1") == {"pos-0001": "disk full"}
    assert [at.hears(at.first, said) for said in (lost, full)] == ["taken", "no news"]
    assert at.ledger.sitting_out("fraud-1") == {"pos-0001": "own record lost"}
    assert at.hears(at.second, sitting_out(at.second, "fraud-1", "a reason of a later program")) == "taken"
    assert at.ledger.sitting_out("fraud-1")["pos-0002"] == "another reason"


def of_another_base(at: Coordinator) -> SittingOut:
    at.first.task = msgspec.structs.replace(TASK, base="c" * 64)
    return sitting_out(at.first, "fraud-1", "no data")


def of_another_model(at: Coordinator) -> SittingOut:
    at.first.task = msgspec.structs.replace(TASK, model="digits")
    return sitting_out(at.first, "fraud-1", "no data")


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        (lambda at: SittingOut("fraud-1", "no data"), "unsigned"),
        (lambda at: sitting_out(at.second, "fraud-1", "no data"), "not believed"),
        (lambda at: msgspec.structs.replace(sitting_out(at.first, "fraud-1", "disk full"), reason="no data"), None),
        (lambda at: msgspec.structs.replace(sitting_out(at.first, "fraud-0", "no data"), round_id="fraud-1"), None),
        (of_another_base, "not believed"),
        (of_another_model, "not believed"),
        (lambda at: SittingOut("fraud-1", "no data", b"\x30\x00"), "not believed"),
        (lambda at: sitting_out(at.first, "fraud-0", "no data"), "stale"),
        (lambda at: sitting_out(at.first, "fraud-9", "no data"), "stale"),
    ],
)
def test_what_is_not_the_devices_own_word_of_this_round_counts_for_nothing(
    at: Coordinator, said: Any, verdict: str | None
) -> None:
    assert at.hears(at.first, said(at)) == (verdict or "not believed")
    assert at.ledger.sitting_out("fraud-1") == at.ledger.sitting_out("fraud-0") == {}


def test_a_certificate_that_ran_out_speaks_for_nobody(at: Coordinator) -> None:
    said = sitting_out(at.first, "fraud-1", "no data")
    at.platform.clock.now += 500 * 86_400
    assert at.hears(at.first, said) == "not believed"


def test_a_fleet_that_sits_out_is_heard_bit_by_bit(at: Coordinator) -> None:
    few = Absences(ledger=at.ledger, keyring=at.platform.keyring, metrics=Metrics(), checks_max=1)
    reports = [
        msgspec.structs.replace(device.next_report(), sitting_out=sitting_out(device, "fraud-1", "does not train"))
        for device in (at.first, at.second)
    ]
    records = {record.device_id: record for record in at.ledger.devices()}
    for heard in (["pos-0001"], ["pos-0001", "pos-0002"]):
        few.hear(reports, records, at.platform.clock())
        assert list(at.ledger.sitting_out("fraud-1")) == heard
