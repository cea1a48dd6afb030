"""What the coordinator must still know after somebody pulled the plug.

One SQLite file (WAL, synchronous FULL, exclusively locked: one writer) holds releases, plans, rollouts, rounds,
admitted contributions, devices with the sequence numbers of their outboxes, folded summaries, update outcomes and
events. Every method that writes is one transaction; when it returns, the change survives a kill and a power cut.
Whoever must not lose a record commits here first and acknowledges afterwards.

Rollouts and rounds are values that other modules own; they are kept as packed bytes beside the columns that are
searched. The schema's version is `PRAGMA user_version`; a file written by a newer program is refused by name.
"""

from __future__ import annotations

import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from fl_coordinator.forms import Form
from fl_coordinator.privacy import Spend
from model_delta.encoding import pack, unpack
from model_delta.errors import Malformed, NotFound, StorageFull, Unavailable
from model_delta.plan import DeviceTraits
from model_delta.task import AggregatorKey
from monitoring.collector import Fold, judge_range
from monitoring.telemetry import ModelSummary, Report, UpdateOutcome, merge_summaries

SCHEMA = 5
EVENTS_KEPT = 5_000

_SCHEMA_1 = """
CREATE TABLE releases (
    manifest TEXT PRIMARY KEY, model TEXT NOT NULL, release INTEGER NOT NULL, source TEXT NOT NULL,
    parent TEXT NOT NULL, withdrawn TEXT NOT NULL DEFAULT '', record BLOB NOT NULL,
    UNIQUE (model, release), UNIQUE (model, source, parent));
CREATE TABLE models (model TEXT PRIMARY KEY, stable TEXT NOT NULL DEFAULT '');
CREATE TABLE plans (
    model TEXT NOT NULL, serial INTEGER NOT NULL, rollout TEXT NOT NULL, issued REAL NOT NULL, envelope BLOB NOT NULL,
    PRIMARY KEY (model, serial));
CREATE TABLE rollouts (
    name TEXT PRIMARY KEY, model TEXT NOT NULL, state TEXT NOT NULL, created REAL NOT NULL, record BLOB NOT NULL);
CREATE TABLE stage_history (
    id INTEGER PRIMARY KEY AUTOINCREMENT, rollout TEXT NOT NULL, time REAL NOT NULL, stage INTEGER NOT NULL,
    serial INTEGER NOT NULL, event TEXT NOT NULL, text TEXT NOT NULL);
CREATE TABLE rounds (
    round_id TEXT PRIMARY KEY, model TEXT NOT NULL, state TEXT NOT NULL, created REAL NOT NULL, record BLOB NOT NULL);
CREATE TABLE round_results (round_id TEXT PRIMARY KEY, mean BLOB NOT NULL, transcript BLOB NOT NULL);
CREATE TABLE contributions (
    round_id TEXT NOT NULL, device_id TEXT NOT NULL, digest TEXT NOT NULL, log_offset INTEGER NOT NULL,
    size INTEGER NOT NULL, time REAL NOT NULL, PRIMARY KEY (round_id, device_id));
CREATE TABLE refusals (round_id TEXT NOT NULL, reason TEXT NOT NULL, count INTEGER NOT NULL,
    PRIMARY KEY (round_id, reason));
CREATE TABLE devices (
    device_id TEXT PRIMARY KEY, kind TEXT NOT NULL, tenant TEXT NOT NULL, device_class TEXT NOT NULL,
    region TEXT NOT NULL, labels BLOB NOT NULL, certificate BLOB NOT NULL, certificate_serial TEXT NOT NULL,
    enrolled REAL NOT NULL, last_seen REAL NOT NULL DEFAULT 0, running TEXT NOT NULL DEFAULT '',
    state TEXT NOT NULL DEFAULT '', safe_mode INTEGER NOT NULL DEFAULT 0, plan_serial INTEGER NOT NULL DEFAULT 0,
    dropped INTEGER NOT NULL DEFAULT 0, lost_requests INTEGER NOT NULL DEFAULT 0);
CREATE TABLE outboxes (
    device_id TEXT NOT NULL, epoch TEXT NOT NULL, sequence INTEGER NOT NULL, missing INTEGER NOT NULL DEFAULT 0,
    dropped INTEGER NOT NULL DEFAULT 0, lost_requests INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (device_id, epoch));
CREATE TABLE summaries (
    manifest TEXT NOT NULL, device_id TEXT NOT NULL, place TEXT NOT NULL, plan_serial INTEGER NOT NULL,
    record BLOB NOT NULL, PRIMARY KEY (manifest, device_id, place, plan_serial)) WITHOUT ROWID;
CREATE TABLE outcomes (
    id INTEGER PRIMARY KEY AUTOINCREMENT, device_id TEXT NOT NULL, manifest TEXT NOT NULL, event TEXT NOT NULL,
    received REAL NOT NULL, record BLOB NOT NULL);
CREATE INDEX outcomes_by_manifest ON outcomes (manifest);
CREATE TABLE aggregators (name TEXT PRIMARY KEY, url TEXT NOT NULL, record BLOB NOT NULL);
CREATE TABLE events (id INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, kind TEXT NOT NULL, text TEXT NOT NULL);
"""

_SCHEMA_2 = """
CREATE TABLE privacy_openings (
    round_id TEXT NOT NULL, attempt INTEGER NOT NULL, model TEXT NOT NULL, noise_multiplier REAL NOT NULL,
    sampling REAL NOT NULL, PRIMARY KEY (round_id, attempt));
CREATE TABLE privacy_devices (
    device_id TEXT NOT NULL, round_id TEXT NOT NULL, attempt INTEGER NOT NULL,
    PRIMARY KEY (device_id, round_id, attempt)) WITHOUT ROWID;
"""

_SCHEMA_3 = """
CREATE TABLE version_reports (
    device_id TEXT NOT NULL, model TEXT NOT NULL, counter INTEGER NOT NULL, serial INTEGER NOT NULL DEFAULT 0,
    heard REAL NOT NULL, report BLOB NOT NULL, plan BLOB NOT NULL DEFAULT x'', PRIMARY KEY (device_id, model));
"""

_SCHEMA_4 = """
CREATE TABLE retired (manifest TEXT PRIMARY KEY, time REAL NOT NULL);
CREATE TABLE identity (id TEXT NOT NULL);
INSERT INTO identity VALUES (lower(hex(randomblob(16))));
"""

_SCHEMA_5 = """
CREATE INDEX contributions_by_device ON contributions (device_id, time);
"""


class ReleaseRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A published version. `source` is the digest of the bytes that the publisher handed in, `source_blob` names those
    bytes sealed under the artifact's key, `wrapped_key` is that key under the keyring. Sizes in bytes of sealed form:
    `bytes_whole` for all segments, `bytes_patch` for the patch from each parent by manifest digest. `form`: see `forms`
    (None of releases before there were any)."""

    manifest: str
    model: str
    name: str
    version: dict[str, int]
    release: int
    parents: tuple[str, ...]
    created: float
    source: str
    source_blob: str
    wrapped_key: bytes
    file_bytes: int
    bytes_whole: int
    bytes_patch: dict[str, int]
    round_id: str = ""
    form: Form | None = None


class DeviceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An enrolled identity (`kind` is device, gateway or server) and what was last heard of it. Times: Unix seconds."""

    device_id: str
    kind: str
    tenant: str
    device_class: str
    region: str
    labels: dict[str, str]
    certificate: bytes
    certificate_serial: str
    enrolled: float
    last_seen: float = 0.0
    running: str = ""
    state: str = ""
    safe_mode: bool = False
    plan_serial: int = 0
    dropped: int = 0
    lost_requests: int = 0

    def trait(self, name: str) -> str:
        """The device's class, or one of its labels; "" when it was enrolled without."""
        return self.device_class if name == "device_class" else self.labels.get(name, "")

    @property
    def traits(self) -> DeviceTraits:
        """What a plan may ask about the device."""
        return DeviceTraits(self.device_id, self.tenant, self.device_class, self.region, self.labels)


class AdmittedContribution(msgspec.Struct, frozen=True):
    """A contribution that is in the updates log at `log_offset`."""

    device_id: str
    digest: str
    log_offset: int
    size: int
    time: float


class AggregatorRecord(msgspec.Struct, frozen=True):
    """An aggregator's public keys and the address of its mailbox."""

    key: AggregatorKey
    url: str


class StageEvent(msgspec.Struct, frozen=True):
    """One line of a rollout's history."""

    time: float
    stage: int
    serial: int
    event: str
    text: str


class Event(msgspec.Struct, frozen=True):
    """One line of the coordinator's own history."""

    id: int
    time: float
    kind: str
    text: str


class DeviceSummary(msgspec.Struct, frozen=True):
    """The folded decisions of one version, at one place, by one device, while it followed plan `plan_serial`."""

    device_id: str
    plan_serial: int
    summary: ModelSummary


class DeviceOutcome(msgspec.Struct, frozen=True):
    """How an update ended on a device; `received` is the coordinator's time."""

    device_id: str
    received: float
    outcome: UpdateOutcome


class Directed(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of a device's directing: its newest version report (`counter`, `heard` in Unix seconds, and
    the signed bytes), and the newest plan that it was sent (`serial`, and the signed bytes; b"" before the first)."""

    device_id: str
    model: str
    counter: int
    serial: int = 0
    heard: float
    report: bytes
    plan: bytes = b""


class Ledger:
    """The coordinator's durable memory. Safe to call from several threads; calls are serialised.

    Every writing method raises StorageFull when the disk is full (nothing was changed) and Unavailable when SQLite
    cannot write for another reason.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the ledger. Raises Malformed for a newer schema or a file that is no ledger, Unavailable when
        another process holds it."""
        self._path = path
        self._lock = threading.RLock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, timeout=2.0, isolation_level=None, check_same_thread=False)
        try:
            self._open()
        except BaseException:
            self._db.close()
            raise

    def _open(self) -> None:
        try:
            found = self._db.execute("PRAGMA user_version").fetchone()[0]
            if found > SCHEMA:
                raise Malformed(
                    f"ledger {self._path}: schema {found} was written by a newer program, this one knows {SCHEMA}; "
                    "run the newer atoll, or name another data folder"
                )
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("BEGIN EXCLUSIVE")
            for version, schema in ((1, _SCHEMA_1), (2, _SCHEMA_2), (3, _SCHEMA_3), (4, _SCHEMA_4), (5, _SCHEMA_5)):
                if found < version:
                    for statement in schema.split(";\n"):
                        if statement.strip():
                            self._db.execute(statement)
                    self._db.execute(f"PRAGMA user_version = {version}")
            self._db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise Unavailable(f"ledger {self._path}: another coordinator holds it; stop that one first") from None
            raise _storage_error(self._path, error) from None
        except sqlite3.DatabaseError as error:
            raise Malformed(f"ledger {self._path}: not a ledger ({error}); name another data folder") from None

    def close(self) -> None:
        """Close the file; everything committed is already durable."""
        with self._lock:
            self._db.close()

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
            except sqlite3.IntegrityError:
                raise
            except sqlite3.Error as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise _storage_error(self._path, error) from None

    def _rows(self, query: str, arguments: Sequence[Any] = ()) -> list[Any]:
        with self._lock:
            try:
                return self._db.execute(query, arguments).fetchall()
            except sqlite3.Error as error:
                raise _storage_error(self._path, error) from None

    # Releases

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

    # What the store no longer holds

    def identity(self) -> str:
        """This ledger's own id, 32 hex digits; a copy of the ledger has the same."""
        return str(self._rows("SELECT id FROM identity")[0][0])

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

    def _require_kept(self, db: sqlite3.Connection, manifests: Iterable[str]) -> None:
        for digest in manifests:
            if db.execute("SELECT 1 FROM retired WHERE manifest = ?", (digest,)).fetchone():
                raise Malformed(
                    f"version {digest[:16]}…: nothing needed it any more, so its files were removed from the store; "
                    "publish a new version"
                )

    # Plans and rollouts

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
            self._require_kept(db, needs)
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

    # Rounds

    def save_round(
        self, *, round_id: str, model: str, state: str, created: float, record: bytes, needs: Iterable[str] = ()
    ) -> None:
        """Write a round's state. Raises Malformed when one of the versions that it `needs` was given up."""
        with self._write() as db:
            self._require_kept(db, needs)
            db.execute(
                "INSERT INTO rounds VALUES (?,?,?,?,?) "
                "ON CONFLICT (round_id) DO UPDATE SET state = excluded.state, record = excluded.record",
                (round_id, model, state, created, record),
            )

    def rounds(self) -> list[bytes]:
        """Packed rounds, oldest first."""
        return [bytes(row[0]) for row in self._rows("SELECT record FROM rounds ORDER BY created, rowid")]

    def round(self, round_id: str) -> bytes:
        """The packed round. Raises NotFound."""
        rows = self._rows("SELECT record FROM rounds WHERE round_id = ?", (round_id,))
        if not rows:
            raise NotFound(f"round {round_id!r}: there is none of that name")
        return bytes(rows[0][0])

    def save_round_result(self, round_id: str, mean: bytes, transcript: bytes) -> None:
        """Keep what a round opened: the mean update (float32 little-endian) and the signed transcript. The first result
        stays: a round opens once, since two openings of different sets would give away their difference."""
        with self._write() as db:
            db.execute("INSERT OR IGNORE INTO round_results VALUES (?,?,?)", (round_id, mean, transcript))

    def round_result(self, round_id: str) -> tuple[bytes, bytes] | None:
        """Mean update and packed transcript, if the aggregators have decided; the mean is empty when they refused."""
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

    def privacy_of_devices(self, device_ids: Iterable[str], other_than: str = "") -> dict[str, list[Spend]]:
        """All openings that each device was frozen into, of any model, but those of one round."""
        query = (
            "SELECT noise_multiplier, sampling FROM privacy_devices JOIN privacy_openings USING (round_id, attempt) "
            "WHERE device_id = ? AND round_id <> ? ORDER BY round_id, attempt"
        )
        return {name: [Spend(*row) for row in self._rows(query, (name, other_than))] for name in device_ids}

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

    def groups_of(self, round_id: str, trait: str) -> dict[str, int]:
        """How many contributions of a round came from devices that were enrolled with each value of a trait."""
        query = f"SELECT {_DEVICE_COLUMNS} FROM devices JOIN contributions USING (device_id) WHERE round_id = ?"
        return dict(Counter(_device(row).trait(trait) for row in self._rows(query, (round_id,))))

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

    # Devices and what they report

    def enrol(self, record: DeviceRecord) -> None:
        """Record an issued certificate. An identity that enrols again keeps its history, with the new certificate."""
        with self._write() as db:
            db.execute(
                "INSERT INTO devices (device_id, kind, tenant, device_class, region, labels, certificate,"
                " certificate_serial, enrolled) VALUES (?,?,?,?,?,?,?,?,?) ON CONFLICT (device_id) DO UPDATE SET"
                " kind = excluded.kind, device_class = excluded.device_class, region = excluded.region,"
                " labels = excluded.labels, certificate = excluded.certificate,"
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

    def heard(self, device_id: str, now: float, *, running: str, state: str) -> None:
        """A device said hello. Its traits are those of its enrolment: a hello cannot move it to another cohort."""
        with self._write() as db:
            db.execute(
                "UPDATE devices SET last_seen = MAX(last_seen, ?), running = ?, state = ? WHERE device_id = ?",
                (now, running, state, device_id),
            )

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

    # Aggregators and events

    def save_aggregator(self, record: AggregatorRecord) -> None:
        """Register an aggregator, or replace its keys and address."""
        with self._write() as db:
            db.execute("INSERT OR REPLACE INTO aggregators VALUES (?,?,?)", (record.key.name, record.url, pack(record)))

    def aggregators(self) -> list[AggregatorRecord]:
        """Registered aggregators by name."""
        return [unpack(row[0], AggregatorRecord) for row in self._rows("SELECT record FROM aggregators ORDER BY name")]

    def add_event(self, time: float, kind: str, text: str) -> None:
        """Add a line to the history; only the newest lines are kept."""
        with self._write() as db:
            cursor = db.execute("INSERT INTO events (time, kind, text) VALUES (?,?,?)", (time, kind, text[:500]))
            db.execute("DELETE FROM events WHERE id <= ?", ((cursor.lastrowid or 0) - EVENTS_KEPT,))

    def events(self, limit: int = 50) -> list[Event]:
        """The newest lines, oldest first."""
        rows = self._rows("SELECT id, time, kind, text FROM events ORDER BY id DESC LIMIT ?", (limit,))
        return [Event(*row) for row in reversed(rows)]


_STANDING = (
    "SELECT (SELECT COUNT(*) FROM releases) || ' ' || (SELECT COUNT(*) FROM plans) || ' ' ||"
    " (SELECT COALESCE(GROUP_CONCAT(name || state), '') FROM rollouts) || ' ' ||"
    " (SELECT COALESCE(GROUP_CONCAT(round_id || state), '') FROM rounds) || ' ' ||"
    " (SELECT COALESCE(GROUP_CONCAT(model || stable), '') FROM models)"
)
_DEVICE_COLUMNS = (
    "device_id, kind, tenant, device_class, region, labels, certificate, certificate_serial, enrolled, last_seen,"
    " running, state, safe_mode, plan_serial, dropped, lost_requests"
)


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
    )


def _storage_error(path: Path, error: sqlite3.Error) -> Unavailable:
    if "full" in str(error):
        return StorageFull(f"ledger {path}: no room left to write; free some space, nothing was changed")
    return Unavailable(f"ledger {path}: {error}")
