"""What the coordinator must still know after somebody pulled the plug.

One SQLite file (WAL, synchronous FULL, exclusively locked: one writer) holds releases, plans, rollouts, rounds,
admitted contributions, devices with the sequence numbers of their outboxes, folded summaries, update outcomes and
events. Every method that writes is one transaction; when it returns, the change survives a kill and a power cut.
Whoever must not lose a record commits here first and acknowledges afterwards.

Rollouts and rounds are values that other modules own; they are kept as packed bytes beside the columns that are
searched. `tables` has a file for each subject; a ledger is all of them on one connection. A file written by a newer
program is refused by name.
"""

from __future__ import annotations

from fl_coordinator.tables.identities import Identities
from fl_coordinator.tables.records import Event
from fl_coordinator.tables.reports import Reports
from fl_coordinator.tables.rollouts import Rollouts
from fl_coordinator.tables.rounds import Rounds
from fl_coordinator.tables.versions import Versions

EVENTS_KEPT = 5_000


class Ledger(Versions, Rollouts, Rounds, Identities, Reports):
    """The coordinator's durable memory. Safe to call from several threads; calls are serialised.

    Every writing method raises StorageFull when the disk is full (nothing was changed) and Unavailable when SQLite
    cannot write for another reason.
    """

    def identity(self) -> str:
        """This ledger's own id, 32 hex digits; a copy of the ledger has the same."""
        return str(self._rows("SELECT id FROM identity")[0][0])

    def add_event(self, time: float, kind: str, text: str) -> None:
        """Add a line to the history; only the newest lines are kept."""
        with self._write() as db:
            cursor = db.execute("INSERT INTO events (time, kind, text) VALUES (?,?,?)", (time, kind, text[:500]))
            db.execute("DELETE FROM events WHERE id <= ?", ((cursor.lastrowid or 0) - EVENTS_KEPT,))

    def events(self, limit: int = 50) -> list[Event]:
        """The newest lines, oldest first."""
        rows = self._rows("SELECT id, time, kind, text FROM events ORDER BY id DESC LIMIT ?", (limit,))
        return [Event(*row) for row in reversed(rows)]
