"""A SQLite file behind some tables: opened once, brought up to date, written by one transaction at a time.

WAL, synchronous FULL, exclusively locked: one writer, and what was committed survives a kill and a power cut. Every
part of the ledger is a `LedgerFile`, so that they share its connection and its lock; an aggregator's copies are another
`SqliteFile`.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fl_coordinator.tables.schema import SCHEMAS, statements
from model_delta.errors import Malformed, StorageFull, Unavailable


class DamagedFile(Malformed):
    """A file that SQLite cannot read as its own."""


class SqliteFile:
    """The connection. Safe to use from several threads; calls are serialised."""

    def __init__(self, path: Path, what: str, schemas: Sequence[str]) -> None:
        """Open or create the file, which messages call `what`; `schemas` are its tables, as each version added to them.

        Raises Malformed for a newer schema, DamagedFile for what is not SQLite's, Unavailable when another process
        holds it.
        """
        self._path = path
        self._what = what
        self._named = f"{what} {path}"
        self._schemas = schemas
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
            if found > len(self._schemas):
                raise Malformed(
                    f"{self._named}: schema {found} was written by a newer program, this one knows "
                    f"{len(self._schemas)}; run the newer atoll, or name another data folder"
                )
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("BEGIN EXCLUSIVE")
            for version, schema in enumerate(self._schemas, start=1):
                if found < version:
                    for statement in statements(schema):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA user_version = {version}")
            self._db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise Unavailable(f"{self._named}: another process holds it; stop that one first") from None
            raise _storage_error(self._named, error) from None
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the latter for a schema of random bytes
            raise DamagedFile(f"{self._named}: not a {self._what} ({error}); name another data folder") from None

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
                raise _storage_error(self._named, error) from None

    def _rows(self, query: str, arguments: Sequence[Any] = ()) -> list[Any]:
        with self._lock:
            try:
                return self._db.execute(query, arguments).fetchall()
            except sqlite3.Error as error:
                raise _storage_error(self._named, error) from None


class LedgerFile(SqliteFile):
    """The ledger's file."""

    def __init__(self, path: Path) -> None:
        """Open or create the ledger; see `SqliteFile`."""
        super().__init__(path, "ledger", SCHEMAS)


def _storage_error(named: str, error: sqlite3.Error) -> Unavailable:
    if "full" in str(error):
        return StorageFull(f"{named}: no room left to write; free some space, nothing was changed")
    return Unavailable(f"{named}: {error}")
