"""The ledger's tables, as each version of this program added to them.

A schema that was shipped is never edited: a ledger of any age gets the ones that it has not seen yet, in order. Its
version is `PRAGMA user_version`.
"""

from __future__ import annotations

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

_SCHEMA_6 = """
CREATE TABLE round_memories (
    name TEXT PRIMARY KEY, model TEXT NOT NULL, policy TEXT NOT NULL, rounds INTEGER NOT NULL, memory BLOB NOT NULL);
"""

_SCHEMA_7 = """
ALTER TABLE devices ADD COLUMN model TEXT NOT NULL DEFAULT '';
"""

_SCHEMA_8 = """
CREATE TABLE aborted_rounds (round_id TEXT PRIMARY KEY);
"""

_SCHEMA_9 = """
CREATE TABLE sitting_out (
    round_id TEXT NOT NULL, device_id TEXT NOT NULL, reason TEXT NOT NULL, PRIMARY KEY (round_id, device_id))
    WITHOUT ROWID;
"""

_SCHEMA_10 = """
CREATE TABLE maybe_opened (round_id TEXT PRIMARY KEY) WITHOUT ROWID;
"""

_SCHEMA_11 = """
CREATE TABLE sat_out (
    round_id TEXT NOT NULL, reason TEXT NOT NULL, count INTEGER NOT NULL, PRIMARY KEY (round_id, reason))
    WITHOUT ROWID;
"""

SCHEMAS = (
    *(_SCHEMA_1, _SCHEMA_2, _SCHEMA_3, _SCHEMA_4, _SCHEMA_5),
    *(_SCHEMA_6, _SCHEMA_7, _SCHEMA_8, _SCHEMA_9, _SCHEMA_10, _SCHEMA_11),
)
"""In order; the first makes an empty file a ledger of version 1."""


def statements(schema: str) -> list[str]:
    """The statements of a schema, one by one, so that they can run within a transaction."""
    return [statement for statement in schema.split(";\n") if statement.strip()]
