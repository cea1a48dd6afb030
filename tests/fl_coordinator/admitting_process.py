"""A coordinator that admits contributions and stops at a chosen place, for a test that kills it there.

    python -m tests.fl_coordinator.admitting_process FOLDER LOG PLACE COUNT

The COUNT-th batch stops at PLACE: `appended` (in the log, not in the ledger), `recorded` (in the ledger, without a
receipt) or `never`. Contributions are in FOLDER/sent before they are sent; a line on standard output names each device
that has its receipt, and `stopped` says that the place was reached.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from fl_coordinator.kafka_log import KafkaLog
from fl_coordinator.ledger import Ledger
from fl_coordinator.ports import UpdatesLog
from fl_coordinator.tables.records import AdmittedContribution
from fl_coordinator.updates_log import SegmentLog
from tests.fl_coordinator.learning_platform import Aggregators, asked, honest
from tests.fl_coordinator.platform_in_memory import Platform, adopt_first, fleet, until

DEVICES = 12


def log_at(place: str) -> UpdatesLog:
    """The log at a topic's URL or in a folder."""
    return KafkaLog(place) if place.startswith("kafka:") else SegmentLog(Path(place))


class Stop:
    """Stops the thread that comes by for the n-th time: says so, and waits to be killed."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            print("stopped", flush=True)
            time.sleep(60)


class StoppingLog:
    """Any log, which stops after an append."""

    def __init__(self, inner: UpdatesLog, stop: Stop) -> None:
        self._inner, self._stop = inner, stop
        self.read, self.remove_before, self.close = inner.read, inner.remove_before, inner.close

    @property
    def end(self) -> int:
        return self._inner.end

    def append(self, records: Sequence[bytes]) -> list[int]:
        offsets = self._inner.append(records)
        self._stop()
        return offsets


class StoppingLedger(Ledger):
    """A ledger that stops after contributions were recorded."""

    stop = Stop(0)

    def admit(self, round_id: str, admitted: Iterable[AdmittedContribution]) -> None:
        super().admit(round_id, admitted)
        self.stop()


class Place(Platform):
    """A platform in a folder whose log is elsewhere, and which stops as it was told."""

    def __init__(self, folder: Path, log: str, stop_at: str = "never", count: int = 0) -> None:
        self._log_place, self._stop_at, self._stop = log, stop_at, Stop(count)
        super().__init__(folder)

    def open_ledger(self) -> Ledger:
        if self._stop_at != "recorded":
            return super().open_ledger()
        ledger = StoppingLedger(self.folder / "ledger.sqlite")
        ledger.stop = self._stop
        return ledger

    def open_log(self) -> UpdatesLog:
        log = log_at(self._log_place)
        return StoppingLog(log, self._stop) if self._stop_at == "appended" else log


async def admit(platform: Place, sent: Path) -> None:
    """Open a round, and have every device send its contribution, one after the other."""
    devices = fleet(platform, DEVICES)
    Aggregators(platform)
    async with platform.running() as coordinator:
        await adopt_first(platform, devices)
        await coordinator.open_round(asked(quorum=DEVICES, contributions_max=DEVICES))
        await until(lambda: all(device.task is not None for device in devices))
        for number, device in enumerate(devices):
            (sent / device.device_id).write_bytes(device.contribution(honest(number)))
        for device in devices:
            await device.contribute((sent / device.device_id).read_bytes())
            await until(lambda device=device: device.receipts)  # type: ignore[misc]
            print(device.device_id, flush=True)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    (place / "sent").mkdir(parents=True)
    asyncio.run(admit(Place(place / "platform", sys.argv[2], sys.argv[3], int(sys.argv[4])), place / "sent"))
