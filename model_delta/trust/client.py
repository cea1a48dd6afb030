"""What a device may believe of the repository now: python-tuf's `Updater` over our sources.

`Trust` keeps the verified metadata in a folder and answers three questions: is there anything new (`refresh`), does the
repository vouch for this version (`target`), and which keys sign plans, rounds and baselines (`anchors`).

The library decides what to believe; four things are added. Time is handed in, so that a device with a clock of its own,
a test and a simulation run the same code. Downloads are bounded in bytes, in time and in rate (see `fetchers`). Files
are written aside, flushed and renamed, and the root in use is replaced without a moment in which there is none:
after a kill or a power cut the next refresh goes on from what was verified. Errors are ours, by what to do about them.

Past the timestamp's expiry a device keeps running what it has and takes nothing new. It says so: `stale` for
GRACE_S (the platform may be down, or the device away), `frozen` after that (somebody may be holding news back).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Literal

import msgspec
from tuf.api import exceptions
from tuf.api.metadata import Metadata, Root, TargetFile, Timestamp
from tuf.api.serialization import DeserializationError
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from model_delta.durable import replace_whole, storage_error, sync_folder
from model_delta.encoding import pack, unpack
from model_delta.errors import (
    DigestMismatch,
    Expired,
    Malformed,
    NotFound,
    RolledBack,
    SignatureInvalid,
    TooLarge,
    TooSlow,
    Unavailable,
    Untrusted,
)
from model_delta.trust.checkin import TIMESTAMP_BYTES_MAX, CheckIn, read_answer
from model_delta.trust.fetchers import Monotonic, Patience, Source, paced
from model_delta.trust.updater import TrustAnchors

GRACE_S = 7 * 86_400
METADATA, TARGETS = "metadata/", "targets/"
LIMITS = UpdaterConfig(
    max_root_rotations=256,
    max_delegations=32,
    root_max_length=65_536,
    timestamp_max_length=TIMESTAMP_BYTES_MAX,
    snapshot_max_length=262_144,
    targets_max_length=2_097_152,
)
ANCHORS_BYTES_MAX = 65_536


class VouchedTarget(msgspec.Struct, frozen=True):
    """A file that the repository vouches for: bytes, and SHA-256 in hexadecimal."""

    path: str
    length: int
    digest: str


class TrustStatus(msgspec.Struct, frozen=True):
    """Where a device stands: verified versions (0: none yet), when the timestamp expires (Unix seconds), and an alarm
    ("" when there is none)."""

    state: Literal["current", "stale", "frozen", "unknown"]
    root: int = 0
    timestamp: int = 0
    snapshot: int = 0
    targets: int = 0
    expires: int = 0
    alarm: str = ""


def judged(held: TrustStatus, now: float) -> TrustStatus:
    """What was true at some time, as it is to be seen at `now`: state and alarm anew."""
    late = now - held.expires
    if not held.timestamp:
        return msgspec.structs.replace(held, state="unknown", alarm="trust: nothing was ever verified")
    if late < 0:
        return msgspec.structs.replace(held, state="current", alarm="")
    alarm = f"trust: timestamp {held.timestamp} expired {late:.0f} s ago; nothing new is taken"
    if late < GRACE_S:
        return msgspec.structs.replace(held, state="stale", alarm=alarm)
    return msgspec.structs.replace(held, state="frozen", alarm=f"{alarm}; is somebody holding news back?")


class Trust:
    """The verified side of one repository, kept in `folder`. Calls block; one process at a time uses the folder.

    `root` is the root the device was provisioned with; later ones are learnt and kept. `metadata` and `targets` say
    where files come from (the same place by default). Nothing is fetched before `refresh`.
    """

    def __init__(
        self,
        folder: Path,
        root: bytes,
        metadata: Source,
        targets: Source | None = None,
        patience: Patience | None = None,
        monotonic: Monotonic = time.monotonic,
    ) -> None:
        self._folder = folder
        self._provisioned = root
        self._sources = {METADATA: metadata, TARGETS: targets or metadata}
        self._patience = patience or Patience()
        self._monotonic = monotonic
        self._updater: _Updater | None = None
        self._complete = False
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)

    def check_in(self, request: int) -> bytes:
        """The question to send a mirror when nothing else is known; hand its answer to `refresh`."""
        status = self._held()
        return pack(CheckIn(request, status.root, status.timestamp))

    def refresh(self, now: float, answer: bytes | None = None) -> TrustStatus:
        """Learn what is newest, `now` in Unix seconds. With a mirror's `answer` to `check_in` the exchanges that it
        makes unnecessary are left out.

        Raises SignatureInvalid, RolledBack, Expired, DigestMismatch, TooLarge, Malformed, Untrusted (the mirror or the
        repository is wrong), and Unavailable, TooSlow, StorageFull (try again, elsewhere). What was verified before
        remains.
        """
        self._complete = False
        hints = _Hints()
        if answer is not None:
            said, timestamp = read_answer(answer)
            held = self._file("timestamp.json")
            hints = _Hints(root=said.root, timestamp=timestamp if timestamp is not None else held)
        with _ours("refresh"):
            self._updater = self._make_updater(now, hints)
            self._updater.refresh()
        self._complete = True
        return self.status(now)

    def status(self, now: float) -> TrustStatus:
        """Where the device stands, without asking anybody."""
        return judged(self._held(), now)

    def target(self, path: str, now: float) -> VouchedTarget:
        """What the repository says of `path`, which may fetch a delegated role's file.

        Raises Expired (the timestamp ran out since the last `refresh`), Unavailable (there was none), Untrusted (nobody
        who may vouch for this path does), and what `refresh` raises.
        """
        found = self._target_file(path, now)
        digest = found.hashes.get("sha256")
        if digest is None:
            raise Malformed(f"target {path}: expected a sha256, found {', '.join(sorted(found.hashes))}")
        return VouchedTarget(path, found.length, digest)

    def download(self, path: str, now: float, folder: Path) -> Path:
        """Fetch a target into `folder` and check it; a good copy that lies there is not fetched again."""
        found = self._target_file(path, now)
        assert self._updater is not None
        with _ours(f"target {path}"):
            self._updater.target_dir = str(folder)
            held = self._updater.find_cached_target(found)
            return Path(held or self._updater.download_target(found))

    def anchors(self, tenant: str, now: float) -> TrustAnchors:
        """The tenant's role keys as the repository has them now. Raises what `target` raises, and Untrusted for another
        tenant's."""
        path = f"{tenant}/anchors"
        if self.target(path, now).length > ANCHORS_BYTES_MAX:
            raise TooLarge(f"target {path}: expected at most {ANCHORS_BYTES_MAX} bytes")
        anchors = unpack(self.download(path, now, self._folder / "targets").read_bytes(), TrustAnchors)
        if anchors.tenant != tenant:
            raise Untrusted(f"target {path}: expected the anchors of {tenant!r}, found those of {anchors.tenant!r}")
        return anchors

    # -- inside

    def _target_file(self, path: str, now: float) -> TargetFile:
        if self._updater is None or not self._complete:
            raise Unavailable(f"target {path}: no refresh succeeded since the start; refresh first")
        status = self.status(now)
        if status.state != "current":
            raise Expired(status.alarm)
        with _ours(f"target {path}"):
            found = self._updater.get_targetinfo(path)
        if found is None:
            raise Untrusted(f"target {path}: no role that may vouch for it does")
        return found

    def _make_updater(self, now: float, hints: _Hints) -> _Updater:
        fetcher = _Fetcher(self._sources, self._patience, self._monotonic, hints)
        try:
            updater = self._updater_from(self._newest_root(), fetcher)
        except exceptions.RepositoryError:
            # The kept root is damaged: the provisioned one leads to it again.
            updater = self._updater_from(self._provisioned, fetcher)
        # The library reads the clock when it is made and judges nothing by it before `refresh`.
        updater._trusted_set.reference_time = datetime.fromtimestamp(now, UTC)
        return updater

    def _updater_from(self, root: bytes, fetcher: _Fetcher) -> _Updater:
        return _Updater(str(self._folder), METADATA, None, TARGETS, fetcher, LIMITS, bootstrap=root)

    def _newest_root(self) -> bytes:
        """The root in use, so that a device does not verify twelve old ones on every refresh."""
        return self._file("root.json") or self._provisioned

    def _held(self) -> TrustStatus:
        """What the last refresh verified, or before the first one the versions in the folder: only `refresh` writes
        there, and only what it verified. A timestamp counts as long as the root's keys vouch for it: one that whoever
        took older keys dated far ahead must not outlast them."""
        if self._updater is not None and self._complete:
            trusted = self._updater._trusted_set
            return TrustStatus(
                "unknown",
                root=trusted.root.version,
                timestamp=trusted.timestamp.version,
                snapshot=trusted.snapshot.version,
                targets=trusted.targets.version,
                expires=int(trusted.timestamp.expires.timestamp()),
            )
        root = _root(self._newest_root()) or _root(self._provisioned)
        timestamp = _vouched_timestamp(root, self._file("timestamp.json") or b"")
        held = TrustStatus("unknown", root=root.version if root else 0)
        if timestamp is None:
            return held
        return msgspec.structs.replace(held, timestamp=timestamp.version, expires=int(timestamp.expires.timestamp()))

    def _file(self, name: str) -> bytes | None:
        try:
            return (self._folder / name).read_bytes()
        except OSError:
            return None


class _Hints(msgspec.Struct, frozen=True):
    """What a mirror's answer to the check-in said: its newest root, its timestamp's bytes."""

    root: int | None = None
    timestamp: bytes | None = None


class _Fetcher(FetcherInterface):
    """Bytes for the library: by name from a source, within bounds."""

    def __init__(self, sources: dict[str, Source], patience: Patience, monotonic: Monotonic, hints: _Hints) -> None:
        self._sources, self._patience, self._monotonic, self._hints = sources, patience, monotonic, hints
        self._started = monotonic()
        self._size_max = 0

    @contextlib.contextmanager
    def download_file(self, url: str, max_length: int) -> Iterator[IO[bytes]]:
        """As in the library, which tells its limit only here."""
        self._size_max = max_length
        with super().download_file(url, max_length) as file:
            yield file

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """Metadata, which its limits keep small: in memory, where the library makes a temporary file."""
        self._size_max = max_length
        return b"".join(self._fetch(url))

    def _fetch(self, url: str) -> Iterator[bytes]:
        prefix, _, name = url.partition("/")
        hinted = self._hinted(name) if f"{prefix}/" == METADATA else None
        if hinted is not None:
            yield hinted
            return
        started = self._monotonic()
        left = min(self._patience.file_s, self._patience.refresh_s - (started - self._started))
        if left <= 0:
            raise TooSlow(f"{name}: expected a refresh within {self._patience.refresh_s:g} s")
        pieces = self._sources[f"{prefix}/"].open(name, left)
        patience = msgspec.structs.replace(self._patience, file_s=left)
        try:
            yield from paced(pieces, name, self._size_max, patience, self._monotonic, started)
        except NotFound as error:
            raise exceptions.DownloadHTTPError(str(error), 404) from None

    def _hinted(self, name: str) -> bytes | None:
        number = name.removesuffix(".root.json")
        if self._hints.root is not None and number.isdecimal() and int(number) > self._hints.root:
            raise exceptions.DownloadHTTPError(f"{name}: the mirror has none", 404)
        return self._hints.timestamp if name == "timestamp.json" else None


class _Updater(Updater):
    """The library's client with files that survive a power cut."""

    def _persist_file(self, filename: str, data: bytes) -> None:
        write_durably(Path(filename), data)

    def _update_root_symlink(self) -> None:
        version = self._trusted_set.root.version
        _link(Path(self._dir) / "root.json", f"root_history/{version}.root.json")


def _root(data: bytes) -> Root | None:
    try:
        found = Metadata[Root].from_bytes(data).signed
    except exceptions.RepositoryError:
        return None
    return found if isinstance(found, Root) else None


def _vouched_timestamp(root: Root | None, data: bytes) -> Timestamp | None:
    try:
        found = Metadata[Timestamp].from_bytes(data)
        if root is not None and isinstance(found.signed, Timestamp):
            root.verify_delegate(Timestamp.type, found.signed_bytes, found.signatures)
            return found.signed
    except exceptions.RepositoryError:
        pass
    return None


def _sweep(folder: Path) -> None:
    """Remove what a power cut left half written."""
    for leftover in (*folder.glob(".*.part"), *folder.glob("root_history/.*.part")):
        leftover.unlink(missing_ok=True)


def write_durably(path: Path, data: bytes) -> None:
    """Replace a file durably; nothing happens when it holds these bytes already."""
    try:
        if path.read_bytes() == data:
            return
    except OSError:
        pass
    replace_whole(path, data, aside=path.with_name(f".{path.name}.part"))


def _link(link: Path, target: str) -> None:
    """Point a symbolic link elsewhere in one step."""
    with contextlib.suppress(OSError):
        if link.readlink() == Path(target):
            return
    aside = link.with_name(f".{link.name}.part")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    aside.replace(link)
    sync_folder(link.parent)


@contextlib.contextmanager
def _ours(what: str) -> Iterator[None]:
    """The library's errors as ours. Order matters: its leaves come before their parents."""
    try:
        yield
    except exceptions.ExpiredMetadataError as error:
        raise Expired(f"{what}: {error}") from None
    except exceptions.BadVersionNumberError as error:
        raise RolledBack(f"{what}: {error}") from None
    except exceptions.UnsignedMetadataError as error:
        raise SignatureInvalid(f"{what}: {error}") from None
    except exceptions.LengthOrHashMismatchError as error:
        raise DigestMismatch(f"{what}: {error}") from None
    except DeserializationError as error:
        raise Malformed(f"{what}: {error}") from None
    except exceptions.RepositoryError as error:
        raise Untrusted(f"{what}: {error}") from None
    except exceptions.DownloadLengthMismatchError as error:
        raise TooLarge(f"{what}: {error}") from None
    except exceptions.DownloadHTTPError as error:
        raise NotFound(f"{what}: {error}") from None
    except exceptions.DownloadError as error:
        raise Unavailable(f"{what}: {error}") from None
    except OSError as error:
        raise storage_error(f"verified metadata ({what})", error) from None
