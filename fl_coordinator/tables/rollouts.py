"""Rollouts in the ledger: plans, states and what happened in which stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fl_coordinator.tables.file import LedgerFile
from fl_coordinator.tables.records import StageEvent
from fl_coordinator.tables.versions import require_kept
from model_delta.errors import NotFound


class Rollouts(LedgerFile):
    """Plans and the rollouts that they come from. A rollout is a value of `rollout`, kept as packed bytes."""

    def plan(self, model: str) -> tuple[int, bytes] | None:
        """Serial and signed bytes of the newest plan."""
        rows = self._rows("SELECT serial, envelope FROM plans WHERE model = ? ORDER BY serial DESC LIMIT 1", (model,))
        return (int(rows[0][0]), bytes(rows[0][1])) if rows else None

    def plans(self) -> list[bytes]:
        """The signed bytes of every plan, oldest first."""
        return [bytes(row[0]) for row in self._rows("SELECT envelope FROM plans ORDER BY model, serial")]

    def planned_models(self) -> list[str]:
        """Models that have a plan."""
        return [row[0] for row in self._rows("SELECT DISTINCT model FROM plans ORDER BY model")]

    def save_rollout(
        self,
        *,
        name: str,
        model: str,
        state: str,
        created: float,
        record: bytes,
        history: StageEvent | None = None,
        plan: tuple[int, bytes] | None = None,
        stable: str | None = None,
        withdrawn: Mapping[str, str] | None = None,
        needs: Iterable[str] = (),
    ) -> None:
        """Write a rollout's state with everything that follows from it, together or not at all. Raises Malformed when
        one of the versions that it `needs` was given up."""
        with self._write() as db:
            require_kept(db, needs)
            db.execute(
                "INSERT INTO rollouts (name, model, state, created, record) VALUES (?,?,?,?,?) "
                "ON CONFLICT (name) DO UPDATE SET state = excluded.state, record = excluded.record",
                (name, model, state, created, record),
            )
            if plan is not None:
                time = history.time if history is not None else created
                db.execute("INSERT INTO plans VALUES (?,?,?,?,?)", (model, plan[0], name, time, plan[1]))
            if history is not None:
                db.execute(
                    "INSERT INTO stage_history (rollout, time, stage, serial, event, text) VALUES (?,?,?,?,?,?)",
                    (name, history.time, history.stage, history.serial, history.event, history.text),
                )
            if stable is not None:
                db.execute("INSERT OR REPLACE INTO models (model, stable) VALUES (?,?)", (model, stable))
            for manifest, reason in (withdrawn or {}).items():
                db.execute("UPDATE releases SET withdrawn = ? WHERE manifest = ?", (reason or "withdrawn", manifest))

    def rollouts(self) -> list[bytes]:
        """Packed rollouts, oldest first."""
        return [bytes(row[0]) for row in self._rows("SELECT record FROM rollouts ORDER BY created, rowid")]

    def rollout(self, name: str) -> bytes:
        """The packed rollout. Raises NotFound."""
        rows = self._rows("SELECT record FROM rollouts WHERE name = ?", (name,))
        if not rows:
            raise NotFound(f"rollout {name!r}: there is none of that name")
        return bytes(rows[0][0])

    def stage_history(self, rollout: str) -> list[StageEvent]:
        """What happened to a rollout, oldest first."""
        rows = self._rows(
            "SELECT time, stage, serial, event, text FROM stage_history WHERE rollout = ? ORDER BY id", (rollout,)
        )
        return [StageEvent(*row) for row in rows]
