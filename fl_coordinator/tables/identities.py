"""Who is enrolled, in the ledger: devices, gateways, servers and aggregators; and where each device was directed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from fl_coordinator.tables.file import LedgerFile
from fl_coordinator.tables.records import AggregatorRecord, DeviceRecord, Directed
from model_delta.encoding import pack, unpack
from model_delta.errors import NotFound

REVOKED = "REVOKED"
"""What stands for the state of an identity whose certificate was ended."""

_DEVICE_COLUMNS = (
    "device_id, kind, tenant, device_class, region, labels, certificate, certificate_serial, enrolled, last_seen,"
    " running, state, safe_mode, plan_serial, dropped, lost_requests, model"
)


class Identities(LedgerFile):
    """Enrolled identities by their id."""

    def enrol(self, record: DeviceRecord) -> None:
        """Record an issued certificate. An identity that enrols again keeps its history, with the new certificate."""
        with self._write() as db:
            db.execute(
                "INSERT INTO devices (device_id, kind, tenant, device_class, region, labels, certificate,"
                " certificate_serial, enrolled) VALUES (?,?,?,?,?,?,?,?,?) ON CONFLICT (device_id) DO UPDATE SET"
                " kind = excluded.kind, device_class = excluded.device_class, region = excluded.region,"
                " labels = excluded.labels, certificate = excluded.certificate,"
                f" state = CASE state WHEN '{REVOKED}' THEN '' ELSE state END,"
                " certificate_serial = excluded.certificate_serial, enrolled = excluded.enrolled",
                (
                    record.device_id,
                    record.kind,
                    record.tenant,
                    record.device_class,
                    record.region,
                    pack(record.labels),
                    record.certificate,
                    record.certificate_serial,
                    record.enrolled,
                ),
            )

    def device(self, device_id: str) -> DeviceRecord:
        """An enrolled identity. Raises NotFound."""
        rows = self._rows(f"SELECT {_DEVICE_COLUMNS} FROM devices WHERE device_id = ?", (device_id,))
        if not rows:
            raise NotFound(f"device {device_id!r}: not enrolled here; enrol it with a join token first")
        return _device(rows[0])

    def devices(self, kind: str = "device") -> list[DeviceRecord]:
        """All enrolled identities of a kind, by id."""
        rows = self._rows(f"SELECT {_DEVICE_COLUMNS} FROM devices WHERE kind = ? ORDER BY device_id", (kind,))
        return [_device(row) for row in rows]

    def followers(self, model: str = "") -> list[DeviceRecord]:
        """All devices but the revoked, by id; with a `model` those that its plans may mean: who follows it, and who
        never said what it follows."""
        return [
            record
            for record in self.devices()
            if record.state != REVOKED and (not model or record.model in ("", model))
        ]

    def mark_revoked(self, device_id: str) -> None:
        """An identity's certificate was ended; it counts no more until it enrols again."""
        with self._write() as db:
            db.execute("UPDATE devices SET state = ? WHERE device_id = ?", (REVOKED, device_id))

    def groups_of(self, round_id: str, trait: str) -> dict[str, int]:
        """How many contributions of a round came from devices that were enrolled with each value of a trait."""
        query = f"SELECT {_DEVICE_COLUMNS} FROM devices JOIN contributions USING (device_id) WHERE round_id = ?"
        return dict(Counter(_device(row).trait(trait) for row in self._rows(query, (round_id,))))

    def heard(self, device_id: str, now: float, *, running: str, state: str, model: str = "") -> None:
        """A device said hello. Its traits are those of its enrolment: a hello cannot move it to another cohort, only
        (by another `model`) out of every cohort of a model."""
        with self._write() as db:
            db.execute(
                "UPDATE devices SET last_seen = MAX(last_seen, ?), running = ?, state = ?, model = ?"
                " WHERE device_id = ?",
                (now, running, state, model, device_id),
            )

    def directed(self, device_id: str) -> dict[str, Directed]:
        """By model: the newest version report of a device, and the plan that it was sent."""
        rows = self._rows(
            "SELECT device_id, model, counter, serial, heard, report, plan FROM version_reports WHERE device_id = ?",
            (device_id,),
        )
        return {row[1]: _directed(row) for row in rows}

    def all_directed(self) -> list[Directed]:
        """The newest version report and plan of every device and model, the longest unheard first."""
        return [
            _directed(row)
            for row in self._rows(
                "SELECT device_id, model, counter, serial, heard, report, plan FROM version_reports ORDER BY heard"
            )
        ]

    def save_directed(self, records: Iterable[Directed]) -> None:
        """Keep reports and plans, all in one transaction. Counters and serials never sink: an older record changes
        nothing."""
        with self._write() as db:
            db.executemany(
                "INSERT INTO version_reports VALUES (?,?,?,?,?,?,?) ON CONFLICT (device_id, model) DO UPDATE SET"
                " counter = excluded.counter, serial = excluded.serial, heard = excluded.heard,"
                " report = excluded.report, plan = excluded.plan"
                " WHERE excluded.counter > counter AND excluded.serial >= serial",
                [(r.device_id, r.model, r.counter, r.serial, r.heard, r.report, r.plan) for r in records],
            )

    def save_aggregator(self, record: AggregatorRecord) -> None:
        """Register an aggregator, or replace its keys and address."""
        with self._write() as db:
            db.execute("INSERT OR REPLACE INTO aggregators VALUES (?,?,?)", (record.key.name, record.url, pack(record)))

    def aggregators(self) -> list[AggregatorRecord]:
        """Registered aggregators by name."""
        return [unpack(row[0], AggregatorRecord) for row in self._rows("SELECT record FROM aggregators ORDER BY name")]


def _directed(row: Any) -> Directed:
    return Directed(
        device_id=row[0],
        model=row[1],
        counter=int(row[2]),
        serial=int(row[3]),
        heard=float(row[4]),
        report=bytes(row[5]),
        plan=bytes(row[6]),
    )


def _device(row: Any) -> DeviceRecord:
    return DeviceRecord(
        device_id=row[0],
        kind=row[1],
        tenant=row[2],
        device_class=row[3],
        region=row[4],
        labels=unpack(row[5], dict[str, str]),
        certificate=bytes(row[6]),
        certificate_serial=row[7],
        enrolled=row[8],
        last_seen=row[9],
        running=row[10],
        state=row[11],
        safe_mode=bool(row[12]),
        plan_serial=row[13],
        dropped=row[14],
        lost_requests=row[15],
        model=row[16],
    )
