"""Federated rounds in the ledger: states, admitted contributions, what was opened and what that cost in privacy."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable

from fl_coordinator.privacy import Spend
from fl_coordinator.tables.file import LedgerFile
from fl_coordinator.tables.records import AdmittedContribution, MemoryRecord
from fl_coordinator.tables.versions import require_kept
from model_delta.errors import Malformed, NotFound
from model_delta.task import PASSING

_OPENED = "SELECT round_id FROM round_results WHERE length(mean) > 0 UNION SELECT round_id FROM maybe_opened"


class Rounds(LedgerFile):
    """Rounds by their id. A round is a value of `rounds`, kept as packed bytes."""

    def save_round(
        self, *, round_id: str, model: str, state: str, created: float, record: bytes, needs: Iterable[str] = ()
    ) -> None:
        """Write a round's state. Raises Malformed when one of the versions that it `needs` was given up."""
        with self._write() as db:
            require_kept(db, needs)
            db.execute(
                "INSERT INTO rounds VALUES (?,?,?,?,?) "
                "ON CONFLICT (round_id) DO UPDATE SET state = excluded.state, record = excluded.record",
                (round_id, model, state, created, record),
            )

    def rounds(self) -> list[bytes]:
        """Packed rounds in the order in which they were announced, whatever the clock did meanwhile."""
        return [bytes(row[0]) for row in self._rows("SELECT record FROM rounds ORDER BY rowid")]

    def newest_round(self, model: str) -> bytes | None:
        """The packed round of a model that was announced last."""
        rows = self._rows("SELECT record FROM rounds WHERE model = ? ORDER BY rowid DESC LIMIT 1", (model,))
        return bytes(rows[0][0]) if rows else None

    def round(self, round_id: str) -> bytes:
        """The packed round. Raises NotFound."""
        rows = self._rows("SELECT record FROM rounds WHERE round_id = ?", (round_id,))
        if not rows:
            raise NotFound(f"round {round_id!r}: there is none of that name")
        return bytes(rows[0][0])

    def abort_round(self, round_id: str) -> None:
        """Write down that a round is to end, before whoever asked for it is told so."""
        with self._write() as db:
            db.execute("INSERT OR IGNORE INTO aborted_rounds VALUES (?)", (round_id,))

    def aborted_rounds(self) -> set[str]:
        """The rounds that somebody wanted to end."""
        return {row[0] for row in self._rows("SELECT round_id FROM aborted_rounds")}

    def save_round_result(
        self, round_id: str, mean: bytes, transcript: bytes, memory: MemoryRecord | None = None
    ) -> None:
        """Keep what a round opened: the mean update (float32 little-endian), the signed transcript, and the memory that
        its policy leaves. The first result stays: a round opens once, since two openings of different sets would give
        away their difference."""
        with self._write() as db:
            db.execute("INSERT OR IGNORE INTO round_results VALUES (?,?,?)", (round_id, mean, transcript))
            if memory is not None:
                row = (memory.name, memory.model, memory.policy, memory.rounds, memory.packed)
                db.execute("INSERT OR REPLACE INTO round_memories VALUES (?,?,?,?,?)", row)
                db.execute(
                    "DELETE FROM round_memories WHERE model = ? AND policy = ? AND rounds < ?",
                    (memory.model, memory.policy, memory.rounds - 1),
                )

    def whole_results(self) -> list[str]:
        """The rounds that have ended and opened something, and were not trimmed, oldest first."""
        query = (
            "SELECT round_id FROM round_results JOIN rounds USING (round_id) WHERE length(mean) > 0 AND "
            "state IN ('PUBLISHED', 'REFUSED', 'FAILED') ORDER BY rounds.rowid"
        )
        return [row[0] for row in self._rows(query)]

    def trim_round_result(self, round_id: str, transcript: bytes) -> None:
        """Keep of an ended round that opened something this transcript, and that it did."""
        with self._write() as db:
            db.execute("INSERT OR IGNORE INTO maybe_opened VALUES (?)", (round_id,))
            db.execute("UPDATE round_results SET mean = x'', transcript = ? WHERE round_id = ?", (transcript, round_id))

    def may_open(self, round_id: str) -> bool:
        """Write down, before they are asked, that aggregators may let go of their shares of a round's sum, whether a
        result comes here or not. False when that stands there already, of an earlier attempt."""
        with self._write() as db:
            return db.execute("INSERT OR IGNORE INTO maybe_opened VALUES (?)", (round_id,)).rowcount == 1

    def did_not_open(self, round_id: str) -> None:
        """Take `may_open` back: it is known that they let go of nothing."""
        with self._write() as db:
            db.execute("DELETE FROM maybe_opened WHERE round_id = ?", (round_id,))

    def round_memory(self, name: str) -> bytes | None:
        """A packed memory by its digest; only the newest two of a model and policy are kept."""
        rows = self._rows("SELECT memory FROM round_memories WHERE name = ?", (name,))
        return bytes(rows[0][0]) if rows else None

    def round_result(self, round_id: str) -> tuple[bytes, bytes] | None:
        """Mean update and packed transcript, if the aggregators have decided; the mean is empty when they refused, and
        once the result was trimmed, as the transcript's shares are."""
        rows = self._rows("SELECT mean, transcript FROM round_results WHERE round_id = ?", (round_id,))
        return (bytes(rows[0][0]), bytes(rows[0][1])) if rows else None

    def spend_privacy(self, round_id: str, attempt: int, model: str, spend: Spend, device_ids: Iterable[str]) -> None:
        """Write down what an opening costs, before it opens; `attempt` tells several of one round apart, if they ever
        open different noise. Raises Malformed when this one was paid for already."""
        try:
            with self._write() as db:
                db.execute(
                    "INSERT INTO privacy_openings VALUES (?, ?, ?, ?, ?)",
                    (round_id, attempt, model, spend.noise_multiplier, spend.sampling),
                )
                rows = [(name, round_id, attempt) for name in device_ids]
                db.executemany("INSERT INTO privacy_devices VALUES (?, ?, ?)", rows)
        except sqlite3.IntegrityError:
            raise Malformed(f"round {round_id!r}: attempt {attempt} was paid for already; begin another") from None

    def privacy_paid(self, round_id: str) -> bool:
        """Whether a round's opening was written down."""
        return bool(self._rows("SELECT 1 FROM privacy_openings WHERE round_id = ?", (round_id,)))

    def privacy_of_release(self, model: str, other_than: str = "") -> list[Spend]:
        """All openings that the model's releases descend from, but those of one round, in order of round."""
        query = (
            "SELECT noise_multiplier, sampling FROM privacy_openings WHERE model = ? AND round_id <> ? "
            "ORDER BY round_id, attempt"
        )
        return [Spend(*row) for row in self._rows(query, (model, other_than))]

    def opened_without_noise(self, model: str) -> list[str]:
        """The rounds of a model whose sums were opened as they were, or may have been, or may be at this moment, oldest
        first."""
        query = (
            f"SELECT round_id FROM rounds WHERE model = ? AND round_id IN ({_OPENED}) AND "
            "round_id NOT IN (SELECT round_id FROM privacy_openings) ORDER BY rounds.rowid"
        )
        return [row[0] for row in self._rows(query, (model,))]

    def privacy_of_devices(self, device_ids: Iterable[str], other_than: str = "") -> dict[str, list[Spend]]:
        """All openings that each device was frozen into, of any model, but those of one round; those without noise as
        spends of noise 0."""
        query = (
            "SELECT noise_multiplier, sampling FROM privacy_devices JOIN privacy_openings USING (round_id, attempt) "
            "WHERE device_id = ? AND round_id <> ? ORDER BY round_id, attempt"
        )
        bare = (
            "SELECT 0.0, 1.0 FROM contributions WHERE device_id = ? AND round_id <> ? AND "
            f"round_id IN ({_OPENED}) AND round_id NOT IN (SELECT round_id FROM privacy_openings)"
        )
        return {
            name: [Spend(*row) for one in (query, bare) for row in self._rows(one, (name, other_than))]
            for name in device_ids
        }

    def admit(self, round_id: str, admitted: Iterable[AdmittedContribution]) -> None:
        """Record contributions that are durable in the updates log. A device's first one in a round stays."""
        with self._write() as db:
            db.executemany(
                "INSERT OR IGNORE INTO contributions VALUES (?,?,?,?,?,?)",
                [(round_id, c.device_id, c.digest, c.log_offset, c.size, c.time) for c in admitted],
            )

    def contributions(self, round_id: str) -> list[AdmittedContribution]:
        """The admitted contributions of a round in the order of the log."""
        rows = self._rows(
            "SELECT device_id, digest, log_offset, size, time FROM contributions WHERE round_id = ?"
            " ORDER BY log_offset",
            (round_id,),
        )
        return [AdmittedContribution(*row) for row in rows]

    def contributions_of(self, device_id: str, since: float, other_than: str) -> int:
        """How many rounds but one have admitted a device since a time (Unix seconds)."""
        query = "SELECT COUNT(*) FROM contributions WHERE device_id = ? AND time > ? AND round_id <> ?"
        return int(self._rows(query, (device_id, since, other_than))[0][0])

    def sit_out(self, sitting: Iterable[tuple[str, str, str]]) -> None:
        """Write down (round, device, reason) of devices that take no part, one reason for each: the newest until one
        that lasts, and that one then. Of rounds that no longer collect, or are none, nothing."""
        with self._write() as db:
            db.executemany(
                "INSERT INTO sitting_out SELECT round_id, ?2, ?3 FROM rounds WHERE round_id = ?1 AND "
                "state IN ('ANNOUNCED', 'COLLECTING') ON CONFLICT (round_id, device_id) DO UPDATE SET "
                f"reason = excluded.reason WHERE reason IN ({', '.join('?' * len(PASSING))})",
                [(*one, *PASSING) for one in sitting],
            )

    def sitting_out(self, round_id: str) -> dict[str, str]:
        """The devices that take no part in a round, with the reason; not those that contributed after all."""
        rows = self._rows(
            "SELECT device_id, reason FROM sitting_out WHERE round_id = ?1 AND device_id NOT IN "
            "(SELECT device_id FROM contributions WHERE round_id = ?1) ORDER BY device_id",
            (round_id,),
        )
        return dict(rows)

    def sat_out(self, round_id: str) -> dict[str, int]:
        """How many devices take no part in a round, by reason."""
        counted = Counter(dict(self._rows("SELECT reason, count FROM sat_out WHERE round_id = ?", (round_id,))))
        return dict(sorted((counted + Counter(self.sitting_out(round_id).values())).items()))

    def count_sat_out(self) -> None:
        """Keep, of the devices that sat out of rounds that have ended, how many they were by reason, not which."""
        ended = "round_id IN (SELECT round_id FROM rounds WHERE state IN ('PUBLISHED', 'REFUSED', 'FAILED'))"
        with self._write() as db:
            db.execute(
                f"INSERT INTO sat_out SELECT round_id, reason, COUNT(*) FROM sitting_out WHERE {ended} AND "
                "(round_id, device_id) NOT IN (SELECT round_id, device_id FROM contributions) "
                "GROUP BY round_id, reason ON CONFLICT (round_id, reason) DO UPDATE SET count = count + excluded.count"
            )
            db.execute(f"DELETE FROM sitting_out WHERE {ended}")

    def count_refusal(self, round_id: str, reason: str) -> None:
        """Count a refused contribution by its reason."""
        with self._write() as db:
            db.execute(
                "INSERT INTO refusals VALUES (?,?,1) ON CONFLICT (round_id, reason) DO UPDATE SET count = count + 1",
                (round_id, reason),
            )

    def refusals(self, round_id: str) -> dict[str, int]:
        """How many contributions of a round were refused, by reason."""
        rows = self._rows("SELECT reason, count FROM refusals WHERE round_id = ? ORDER BY reason", (round_id,))
        return {row[0]: int(row[1]) for row in rows}
