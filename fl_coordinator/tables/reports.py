"""What devices report, in the ledger: each record of an outbox is counted once, whatever the network repeats."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

from fl_coordinator.tables.file import LedgerFile
from fl_coordinator.tables.records import DeviceOutcome, DeviceSummary
from model_delta.encoding import pack, unpack
from monitoring.collector import Fold, judge_range
from monitoring.telemetry import ModelSummary, Report, UpdateOutcome, merge_summaries


class Reports(LedgerFile):
    """Folded summaries, outcomes of updates, and how far each outbox was read."""

    def fold(self, reports: Sequence[Report], now: float, plan_serial_max: int) -> list[tuple[Report, Fold, int]]:
        """Fold reports into the totals, each at most once, all in one transaction.

        Returns for each report its verdict and the sequence number up to which its epoch is now durable. A duplicate
        changes nothing; an overlap changes nothing either, and the returned number tells the device where to go on.
        Summaries are kept by the plan that the device followed, at most `plan_serial_max`.
        """
        results: list[tuple[Report, Fold, int]] = []
        with self._write() as db:
            for report in reports:
                row = db.execute(
                    "SELECT sequence, dropped, lost_requests FROM outboxes WHERE device_id = ? AND epoch = ?",
                    (report.device_id, str(report.epoch)),
                ).fetchone()
                known = None if row is None else int(row[0])
                verdict = judge_range(known, report.first_sequence, report.last_sequence)
                if verdict.kind in ("duplicate", "overlap"):
                    results.append((report, verdict, known or 0))
                    continue
                self._fold_one(db, report, verdict, now, min(report.plan_serial, plan_serial_max), row)
                results.append((report, verdict, (known or 0) if verdict.kind == "empty" else report.last_sequence))
        return results

    def _fold_one(
        self, db: sqlite3.Connection, report: Report, verdict: Fold, now: float, plan_serial: int, row: Any
    ) -> None:
        # `dropped` and `lost_requests` count since the outbox was created, so only their growth is added.
        known, dropped_before, lost_before = (int(value) for value in row) if row is not None else (0, 0, 0)
        sequence = known if verdict.kind == "empty" else report.last_sequence
        db.execute(
            "INSERT INTO outboxes VALUES (?,?,?,?,?,?) ON CONFLICT (device_id, epoch) DO UPDATE SET"
            " sequence = excluded.sequence, missing = missing + excluded.missing, dropped = excluded.dropped,"
            " lost_requests = excluded.lost_requests",
            (
                report.device_id,
                str(report.epoch),
                sequence,
                verdict.missing,
                max(report.dropped, dropped_before),
                max(report.lost_requests, lost_before),
            ),
        )
        db.execute(
            "UPDATE devices SET last_seen = MAX(last_seen, ?), running = ?, state = ?, safe_mode = ?, plan_serial = ?,"
            " dropped = dropped + ?, lost_requests = lost_requests + ? WHERE device_id = ?",
            (
                now,
                report.running,
                report.state,
                int(report.safe_mode),
                plan_serial,
                max(0, report.dropped - dropped_before),
                max(0, report.lost_requests - lost_before),
                report.device_id,
            ),
        )
        if verdict.kind == "empty":
            return  # a range without records cannot be told from its repetition: only the state above is taken
        for summary in report.summaries:
            key = (summary.manifest, report.device_id, summary.where, plan_serial)
            before = db.execute(
                "SELECT record FROM summaries WHERE manifest = ? AND device_id = ? AND place = ? AND plan_serial = ?",
                key,
            ).fetchone()
            total = summary if before is None else merge_summaries(unpack(before[0], ModelSummary), summary)
            db.execute("INSERT OR REPLACE INTO summaries VALUES (?,?,?,?,?)", (*key, pack(total)))
        for outcome in report.outcomes:
            db.execute(
                "INSERT INTO outcomes (device_id, manifest, event, received, record) VALUES (?,?,?,?,?)",
                (report.device_id, outcome.manifest, outcome.event, now, pack(outcome)),
            )

    def summaries(self, manifests: Sequence[str] | None = None, plan_serial_min: int = 0) -> list[DeviceSummary]:
        """Folded summaries of some versions (None: of all), of plans not older than `plan_serial_min`."""
        query = "SELECT device_id, plan_serial, record FROM summaries WHERE plan_serial >= ?"
        arguments: list[Any] = [plan_serial_min]
        if manifests is not None:
            query += f" AND manifest IN ({','.join('?' * len(manifests))})"
            arguments.extend(manifests)
        return [DeviceSummary(row[0], row[1], unpack(row[2], ModelSummary)) for row in self._rows(query, arguments)]

    def outcomes(self, manifest: str | None = None) -> list[DeviceOutcome]:
        """How updates (to `manifest`) ended, in the order in which the coordinator heard of them."""
        rows = self._rows(
            "SELECT device_id, received, record FROM outcomes WHERE ? IS NULL OR manifest = ? ORDER BY id",
            (manifest, manifest),
        )
        return [DeviceOutcome(row[0], row[1], unpack(row[2], UpdateOutcome)) for row in rows]

    def missing_records(self) -> int:
        """Outbox records that no report will ever cover (dropped by a full outbox)."""
        return int(self._rows("SELECT COALESCE(SUM(missing), 0) FROM outboxes")[0][0])
