"""Published versions in the ledger: their records, what was withdrawn, and what the store no longer holds."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping

import msgspec

from fl_coordinator.tables.file import LedgerFile
from fl_coordinator.tables.records import ReleaseRecord
from model_delta.encoding import pack, unpack
from model_delta.errors import Malformed, NotFound

_STANDING = (
    "SELECT (SELECT COUNT(*) FROM releases) || ' ' || (SELECT COUNT(*) FROM plans) || ' ' ||"
    " (SELECT COALESCE(GROUP_CONCAT(name || state), '') FROM rollouts) || ' ' ||"
    " (SELECT COALESCE(GROUP_CONCAT(round_id || state), '') FROM rounds) || ' ' ||"
    " (SELECT COALESCE(GROUP_CONCAT(model || stable), '') FROM models)"
)


class Versions(LedgerFile):
    """Releases of every model."""

    def add_release(self, record: ReleaseRecord) -> None:
        """Record a published version. Raises Malformed when its release counter or its (bytes, parent) is taken."""
        parent = record.parents[0] if record.parents else ""
        try:
            with self._write() as db:
                db.execute(
                    "INSERT INTO releases (manifest, model, release, source, parent, record) VALUES (?,?,?,?,?,?)",
                    (record.manifest, record.model, record.release, record.source, parent, pack(record)),
                )
                db.execute("INSERT OR IGNORE INTO models (model) VALUES (?)", (record.model,))
        except sqlite3.IntegrityError as error:
            raise Malformed(f"release {record.release} of {record.model}: already recorded ({error})") from None

    def release(self, manifest: str) -> ReleaseRecord:
        """The version named by its manifest digest. Raises NotFound."""
        rows = self._rows("SELECT record FROM releases WHERE manifest = ?", (manifest,))
        if not rows:
            raise NotFound(f"release {manifest[:16]}…: not published here")
        return unpack(rows[0][0], ReleaseRecord)

    def releases(self, model: str | None = None) -> list[ReleaseRecord]:
        """All versions (of `model`), oldest first."""
        rows = self._rows(
            "SELECT record FROM releases WHERE ? IS NULL OR model = ? ORDER BY model, release", (model, model)
        )
        return [unpack(row[0], ReleaseRecord) for row in rows]

    def replace_wrapped_keys(self, wrapped: Mapping[str, bytes]) -> None:
        """Store artifact keys wrapped anew, by manifest digest; all or none. b"" drops a key, and withdraws a version
        for good. Raises NotFound for a version that is not recorded."""
        with self._write() as db:
            for manifest, key in wrapped.items():
                found = db.execute("SELECT record FROM releases WHERE manifest = ?", (manifest,)).fetchone()
                if found is None:
                    raise NotFound(f"release {manifest[:16]}…: not published here")
                record = msgspec.structs.replace(unpack(found[0], ReleaseRecord), wrapped_key=key)
                db.execute("UPDATE releases SET record = ? WHERE manifest = ?", (pack(record), manifest))
                if not key:
                    db.execute("UPDATE releases SET withdrawn = 'shredded' WHERE manifest = ?", (manifest,))

    def release_from(self, model: str, source: str, parent: str) -> ReleaseRecord | None:
        """The version that was made from these published bytes on this parent ("" when it has none), if there is."""
        rows = self._rows(
            "SELECT record FROM releases WHERE model = ? AND source = ? AND parent = ?", (model, source, parent)
        )
        return unpack(rows[0][0], ReleaseRecord) if rows else None

    def withdrawn(self, model: str) -> dict[str, str]:
        """Versions that must never be a target again, with the reason, oldest first."""
        rows = self._rows(
            "SELECT manifest, withdrawn FROM releases WHERE model = ? AND withdrawn <> '' ORDER BY release", (model,)
        )
        return {row[0]: row[1] for row in rows}

    def stable(self, model: str) -> str:
        """The manifest that everybody may fall back to; "" before the first rollout."""
        rows = self._rows("SELECT stable FROM models WHERE model = ?", (model,))
        return str(rows[0][0]) if rows else ""

    def retired(self) -> frozenset[str]:
        """Versions whose objects were given up: no rollout or round can name them any more."""
        return frozenset(row[0] for row in self._rows("SELECT manifest FROM retired"))

    def standing(self) -> str:
        """A text that changes whenever a version, plan, rollout or round is added, or one of them changes its state."""
        return str(self._rows(_STANDING)[0][0])

    def retire(self, manifests: Iterable[str], standing: str, now: float) -> bool:
        """Give versions up, unless something was added since `standing`; whether they are given up now."""
        with self._write() as db:
            if str(db.execute(_STANDING).fetchone()[0]) != standing:
                return False
            db.executemany("INSERT OR IGNORE INTO retired VALUES (?,?)", [(digest, now) for digest in manifests])
        return True


def require_kept(db: sqlite3.Connection, manifests: Iterable[str]) -> None:
    """Raise Malformed when one of the versions was given up. Called within the transaction that will name them."""
    for digest in manifests:
        if db.execute("SELECT 1 FROM retired WHERE manifest = ?", (digest,)).fetchone():
            raise Malformed(
                f"version {digest[:16]}…: nothing needed it any more, so its files were removed from the store; "
                "publish a new version"
            )
