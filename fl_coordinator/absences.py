"""Devices that say that they sit a round out, and whether they are believed.

Such a word has an effect: a round no longer waits for a device that will not come. So it is signed by the key of the
device's certificate over the round, its base and the reason, and reports pass through a broker that can invent or alter
them. A word that is not signed, of no round that collects, or not the device's own is counted and dropped; the rest of
its report counts as ever. Said again it changes nothing and costs no signature check, and a reason that lasts stays:
whoever repeats an earlier word moves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from fl_coordinator.ledger import Ledger
from fl_coordinator.recorded_rounds import recorded_round
from fl_coordinator.rounds import Round, State
from fl_coordinator.tables.records import DeviceRecord
from model_delta.errors import AtollError, NotFound
from model_delta.keys.certificates import device_keys_of
from model_delta.keys.keyring import Keyring
from model_delta.task import PASSING, SatOut
from model_delta.trust.sitting_out import require_own_word
from monitoring.metrics import Metrics
from monitoring.telemetry import Report

CHECKS_MAX = 64
"""Signatures that are checked for one batch of reports, one of a device: reports must not wait for a fleet that sits
out. Who is put off says it again in the next report."""


class Absences:
    """What devices' reports say of rounds that they sit out. Blocking."""

    def __init__(self, *, ledger: Ledger, keyring: Keyring, metrics: Metrics, checks_max: int = CHECKS_MAX) -> None:
        self._ledger = ledger
        self._checks_max = checks_max
        self._keyring = keyring
        self._count = metrics.counter(
            "sitting_out", "What devices said of rounds that they sit out, by verdict.", ("verdict",)
        )

    def hear(self, reports: Sequence[Report], devices: Mapping[str, DeviceRecord], now: float) -> None:
        """Write down who sits out, of those among the authors of `reports` that can be believed. `devices` are the
        enrolled by name, `now` is Unix seconds. Raises StorageFull."""
        told = {one.device_id: one.sitting_out for one in reports if one.sitting_out is not msgspec.UNSET}
        if not told:
            return
        names = {said.round_id for said in told.values()}
        rounds = {name: self._collecting(name) for name in names}
        known = {name: self._ledger.sitting_out(name) for name in names}
        ca_pem, revoked = self._keyring.ca_pem(), self._keyring.revoked()
        believed: list[tuple[str, str, str]] = []
        checks = 0
        for device_id, said in told.items():
            found = rounds[said.round_id]
            reason, before = _known_reason(said.reason), known[said.round_id].get(device_id)
            if found is None:
                verdict = "stale"
            elif before == reason or (before is not None and before not in PASSING):
                verdict = "no news"
            elif not said.signature:
                verdict = "unsigned"
            elif checks == self._checks_max:
                verdict = "put off"
            else:
                checks += 1
                try:
                    keys = device_keys_of(devices[device_id].certificate, ca_pem, now, revoked)
                    require_own_word(found.task, device_id, said.reason, said.signature, keys.verifying)
                    verdict = "taken"
                    known[said.round_id][device_id] = reason
                    believed.append((said.round_id, device_id, reason))
                except AtollError:
                    verdict = "not believed"
            self._count.add(1, verdict)
        if believed:
            self._ledger.sit_out(believed)

    def _collecting(self, round_id: str) -> Round | None:
        try:
            found = recorded_round(self._ledger, round_id)
        except NotFound:
            return None
        return found if found.at in (State.ANNOUNCED, State.COLLECTING) else None


def _known_reason(reason: str) -> SatOut:
    """One of the reasons, whatever a newer device or a hostile one says."""
    try:
        return SatOut(reason)
    except ValueError:
        return SatOut.OTHER
