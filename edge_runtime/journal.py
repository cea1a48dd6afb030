"""The update's record on disk, and the outcomes that wait in it to be told.

An outcome (adopted, rolled back, refused, withdrawn, safe mode) is written in one go with the state that it belongs to,
and moves from the record to the outbox from there, so that it is told exactly once wherever the power goes off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from edge_runtime.fetching import Fetcher
from edge_runtime.outbox import Outbox
from edge_runtime.slots import Slots, UpdateRecord
from monitoring.telemetry import UpdateOutcome

GIVEN_UP_MAX = 16


class Journal:
    """Holds the record of one update. `clock` is wall time; `told` is called when an outcome is in the outbox."""

    def __init__(
        self,
        *,
        slots: Slots,
        fetcher: Fetcher,
        outbox: Outbox,
        clock: Callable[[], float],
        told: Callable[[], None],
    ) -> None:
        self._slots, self._fetcher, self._outbox = slots, fetcher, outbox
        self._clock, self._told = clock, told
        self.record = slots.read_record()

    def write(self, **changes: Any) -> None:
        """Change the record, durably. Raises StorageFull with nothing changed."""
        record: UpdateRecord = msgspec.structs.replace(self.record, **changes)
        self._slots.write_record(record)
        self.record = record

    def outcome(self, event: str, reason: str, *, active: bool = False) -> UpdateOutcome:
        """How the update to the target ended, as of now; `active` counts how long it answered."""
        now = self._clock()
        return UpdateOutcome(
            manifest=self.record.target,
            event=event,
            reason=reason,
            route=self.record.route,
            bytes_received=self.bytes_received(),
            seconds=max(0.0, now - self.record.started),
            seconds_active=max(0.0, now - self.record.switched) if active else 0.0,
            time=now,
        )

    def note(self, outcome: UpdateOutcome) -> dict[str, Any]:
        """The change that keeps `outcome` in the record until it is told."""
        return {"outcomes": (*self.record.outcomes, outcome), "told_after": self._outbox.last_sequence}

    def tell(self) -> None:
        """Move noted outcomes to the outbox: each once, also when the power goes off between the two writes."""
        if not self.record.outcomes:
            return
        there = [record for _, record in self._outbox.read(self.record.told_after + 1, self._outbox.last_sequence)]
        for outcome in self.record.outcomes:
            if outcome not in there:
                self._outbox.append(outcome)
        self.write(outcomes=())
        self._told()

    def give_up(self) -> dict[str, Any]:
        """The change that remembers the target as failed in this rollout."""
        kept = dict(list(self.record.given_up.items())[1 - GIVEN_UP_MAX :])
        return {"given_up": {**kept, self.record.target: self.record.rollout}}

    def bytes_received(self) -> int:
        """All bytes received for this update, those that are not in the record yet included."""
        return self.record.bytes_received + self._fetcher.bytes_received

    def count_received(self) -> None:
        """Move the fetcher's count into the record; losing it to a power cut costs a figure, not an update."""
        total, self._fetcher.bytes_received = self.bytes_received(), 0
        self.record = msgspec.structs.replace(self.record, bytes_received=total)
        self._slots.write_record(self.record, durable=False)

    def note_route(self, route: str) -> None:
        """Durable before the file is made: a power cut behind that must not forget how it was made."""
        if route != self.record.route:
            self.write(route=route)
