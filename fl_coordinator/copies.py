"""What an aggregator has read of the updates log: its own copies of contributions, and how far it has come.

While a round is open an aggregator follows the log (`following`) and keeps, in its own folder, what it will need of
each contribution: the signed claim in a table, the masked vector in a file per round. Copies and the place in the log
are written in one transaction, after the vectors are on the disk: a kill or a power cut leaves both as they were
before or both as they are after. So reading goes on where it ended, and what comes twice is kept once, by its digest.
Bytes behind the last vector that the table knows were never counted; the next vector is written over them.

A copy was verified when it came and is judged again when it counts (`shares.contribution.hold`), all but its vector's
digest, which takes the time. Of what an earlier process wrote that is checked once more before use, and a copy that
the disk has spoiled is given up, as if it had never come.

Nothing here is readable without the aggregator's key. Compatibility promise: a copy lives as long as its round; a
schema that was shipped is never edited (`tables.file`).
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fl_coordinator.shares.contribution import Claim, KeptContribution
from fl_coordinator.tables.file import DamagedFile, SqliteFile
from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack
from model_delta.errors import StorageFull, Unavailable

_SCHEMAS = (
    """
CREATE TABLE place (log TEXT PRIMARY KEY, next INTEGER NOT NULL);
CREATE TABLE rounds (round_id TEXT PRIMARY KEY, deadline INTEGER NOT NULL);
CREATE TABLE copies (
    round_id TEXT NOT NULL, digest TEXT NOT NULL, device_id TEXT NOT NULL, claim BLOB NOT NULL,
    signature BLOB NOT NULL, start INTEGER NOT NULL, size INTEGER NOT NULL, masked_bytes INTEGER NOT NULL,
    flaw TEXT NOT NULL, seal TEXT NOT NULL, PRIMARY KEY (round_id, digest));
""",
)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HASHED_BYTES = 1 << 20
_TABLE = "copies.sqlite"

_log = logging.getLogger("atoll.aggregator")


class HeldRound(msgspec.Struct, frozen=True):
    """A round with copies, and its deadline in Unix seconds."""

    round_id: str
    deadline: int


class Reached(msgspec.Struct, frozen=True):
    """A place in a log: everything below the offset `next` of the log called `log` was read."""

    log: str
    next: int


class Copies(SqliteFile):
    """An aggregator's copies in `folder`, for one process; safe to use from several threads, calls are serialised."""

    def __init__(self, folder: Path) -> None:
        """Open or create; a damaged table is begun anew. Raises Malformed, Unavailable; see `SqliteFile`."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._sound: set[tuple[str, str]] = set()
        try:
            self._open_table()
        except DamagedFile as error:
            _log.warning("%s; it is begun anew, and what was copied is read or fetched again", error)
            for path in folder.glob(f"{_TABLE}*"):
                path.unlink()
            self._open_table()
        self._sweep()

    def _open_table(self) -> None:
        super().__init__(self._folder / _TABLE, "table of copies", _SCHEMAS)
        try:
            found = str(self._rows("PRAGMA integrity_check")[0][0])
            self._rows("SELECT round_id, digest, device_id, flaw FROM copies")  # text that is none is not found above
        except (Unavailable, UnicodeDecodeError) as error:
            found = str(error)
        if found != "ok":
            self.close()
            raise DamagedFile(f"table of copies {self._path}: damaged ({found[:200]})")

    def reached(self, log: str) -> int:
        """The offset from which `log` was not read yet; 0 for a log that this aggregator never read."""
        rows = self._rows("SELECT next FROM place WHERE log = ?", (log,))
        return int(rows[0][0]) if rows else 0

    def rounds(self) -> tuple[HeldRound, ...]:
        """The rounds that copies are kept for."""
        return tuple(HeldRound(*row) for row in self._rows("SELECT round_id, deadline FROM rounds ORDER BY round_id"))

    def begin(self, found: HeldRound) -> None:
        """Keep copies for a round from now on; nothing changes for one that is known."""
        with self._write() as db:
            db.execute("INSERT OR IGNORE INTO rounds VALUES (?, ?)", (found.round_id, found.deadline))

    def devices(self, round_id: str) -> dict[str, str]:
        """The copies of a round: device id by digest."""
        return dict(self._rows("SELECT digest, device_id FROM copies WHERE round_id = ? ORDER BY rowid", (round_id,)))

    def keep(self, arrived: Mapping[str, Sequence[KeptContribution]], reached: Reached | None = None) -> int:
        """Keep what `arrived`, by round id, and that the log was read so far; all of it or nothing. How many were new.

        Raises StorageFull and Unavailable with nothing changed.
        """
        with self._lock:
            rows: list[tuple[str, str, str, bytes, bytes, int, int, int, str, str]] = []
            for round_id, entries in arrived.items():
                known = self.devices(round_id)
                fresh = {entry.digest: entry for entry in entries if entry.digest not in known}
                for entry, (start, size) in zip(
                    fresh.values(), self._write_vectors(round_id, fresh.values()), strict=True
                ):
                    signed = (entry.device_id, entry.claim, entry.signature)
                    told = (entry.masked_bytes, entry.flaw, _seal_of(entry))
                    rows.append((round_id, entry.digest, *signed, start, size, *told))
            with self._write() as db:
                db.executemany("INSERT INTO copies VALUES (?,?,?,?,?,?,?,?,?,?)", rows)
                if reached is not None:
                    db.execute("DELETE FROM place WHERE log <> ?", (reached.log,))
                    db.execute("INSERT OR REPLACE INTO place VALUES (?, ?)", (reached.log, reached.next))
            self._sound |= {(row[0], row[1]) for row in rows}
            return len(rows)

    def missing(self, round_id: str, digests: Iterable[str]) -> list[str]:
        """Which of `digests` there is no copy of, after the disk was asked for those that an earlier process wrote."""
        known = self.devices(round_id)
        wanted = list(digests)
        unchecked = [digest for digest in wanted if digest in known and (round_id, digest) not in self._sound]
        if unchecked:
            seals = dict(self._rows("SELECT digest, seal FROM copies WHERE round_id = ?", (round_id,)))
            with self.opened(round_id, unchecked) as entries:
                spoiled = {
                    entry.digest: entry.device_id
                    for entry in entries
                    if seals[entry.digest] != _seal_of(entry) or not _is_sound(entry)
                }
            for digest, device_id in spoiled.items():
                _log.warning(
                    "round %s: the copy of %s's contribution in %s is damaged; it is fetched again",
                    *(round_id, device_id, self._folder),
                )
                del known[digest]
            self.drop(round_id, spoiled)
            self._sound |= {(round_id, digest) for digest in unchecked if digest not in spoiled}
        return [digest for digest in wanted if digest not in known]

    @contextmanager
    def opened(self, round_id: str, digests: Sequence[str]) -> Iterator[list[KeptContribution]]:
        """The copies of `digests`, in their order; their vectors are read from the file as long as the block runs.

        Raises Unavailable when one is not there.
        """
        path = self._vectors(round_id)
        path.touch(0o600)
        with path.open("rb", buffering=0) as file:
            found = self._all(round_id, file.fileno())
            absent = [digest for digest in digests if digest not in found]
            if absent:
                raise Unavailable(f"round {round_id!r}: no copy of contribution {absent[0][:16]}…")
            yield [found[digest] for digest in digests]

    def drop(self, round_id: str, digests: Iterable[str]) -> None:
        """Forget some copies of a round; their bytes go with the round."""
        with self._write() as db:
            db.executemany(
                "DELETE FROM copies WHERE round_id = ? AND digest = ?", [(round_id, digest) for digest in digests]
            )

    def forget(self, round_id: str) -> None:
        """Remove all copies of a round."""
        with self._write() as db:
            db.execute("DELETE FROM copies WHERE round_id = ?", (round_id,))
            db.execute("DELETE FROM rounds WHERE round_id = ?", (round_id,))
        with self._lock:
            self._vectors(round_id).unlink(missing_ok=True)
            self._sound = {entry for entry in self._sound if entry[0] != round_id}

    def _all(self, round_id: str, file: int) -> dict[str, KeptContribution]:
        rows = self._rows(
            "SELECT digest, device_id, claim, signature, start, size, masked_bytes, flaw "
            "FROM copies WHERE round_id = ?",
            (round_id,),
        )
        return {
            digest: KeptContribution(
                *(digest, device_id, bytes(claim), bytes(signature)),
                *(Span(file, start, size) if size else b"", masked_bytes, flaw),
            )
            for digest, device_id, claim, signature, start, size, masked_bytes, flaw in rows
        }

    def _write_vectors(self, round_id: str, entries: Iterable[KeptContribution]) -> list[tuple[int, int]]:
        """Write the vectors behind those that count, durably; where each begins, and its size."""
        [(found,)] = self._rows("SELECT MAX(start + size) FROM copies WHERE round_id = ?", (round_id,))
        end, places = found or 0, []
        try:
            file = os.open(self._vectors(round_id), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                for entry in entries:
                    left = memoryview(entry.masked[:])
                    places.append((end, len(left)))
                    while left:
                        written = os.pwrite(file, left, end)
                        end, left = end + written, left[written:]
                os.fsync(file)
            finally:
                os.close(file)
        except OSError as error:
            text = f"contributions of round {round_id!r} cannot be kept in {self._folder}: {error.strerror}"
            if error.errno in _NO_ROOM:
                raise StorageFull(f"{text}; free some space, what is kept already stays") from None
            raise Unavailable(text) from None
        return places

    def _sweep(self) -> None:
        """Files of rounds that the table does not know: a crash came between two steps of `forget`, or of `keep`."""
        known = {self._vectors(found.round_id).name for found in self.rounds()}
        for path in self._folder.glob("*.vectors"):
            if path.name not in known:
                path.unlink(missing_ok=True)

    def _vectors(self, round_id: str) -> Path:
        return self._folder / f"{digest_of(round_id.encode())}.vectors"


@dataclass(frozen=True)
class Span:
    """`size` bytes of an open file from `start`, of which parts can be read."""

    file: int
    start: int
    size: int

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self.size)
        data = bytearray(stop - start)
        self.read_into(start, memoryview(data))
        return bytes(data)

    def read_into(self, start: int, room: memoryview) -> None:
        """Fill `room` with the bytes from `start`. Raises Unavailable when the file or the span has fewer."""
        size = max(0, min(len(room), self.size - start))
        found = os.preadv(self.file, [room[:size]], self.start + start)
        if found != len(room):
            raise Unavailable(f"kept contribution: expected {len(room)} bytes, found {found}")


def _seal_of(entry: KeptContribution) -> str:
    """What a copy's row must still have, which SQLite does not check: all but the vector, and where that lies."""
    return digest_of(
        pack([entry.digest, entry.device_id, entry.claim, entry.signature, entry.masked_bytes, entry.flaw])
    )


def _is_sound(entry: KeptContribution) -> bool:
    """Whether a copy's vector still has the digest that its claim says."""
    if not isinstance(entry.masked, Span):
        return True
    found = hashlib.sha256()
    try:
        for start in range(0, entry.masked.size, _HASHED_BYTES):
            found.update(entry.masked[start : start + _HASHED_BYTES])
    except Unavailable:
        return False
    return found.hexdigest() == unpack(entry.claim, Claim).masked
