"""A store in a bucket: S3 and what speaks like it, Google Cloud Storage, Azure, or this process's memory.

Objects lie under `PREFIX/KIND/NAME`. A put is whole or not at all, also in parts (multipart from PART_BYTES on; the
object appears when its last part is confirmed), so a writer that is killed leaves nothing that a reader sees; parts of
a broken upload are the bucket's to expire. Several writers of one name: the last one wins, and an object named by its
digest is the same whoever wins. A long object is read in ranges that all hold for one version of it (If-Match).

Credentials, region and endpoint come from the environment variables that the provider's own tools read, never from the
URL; neither they nor what a server says in an error's body is ever shown. This module alone imports obstore.
"""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, PreconditionError, UnauthenticatedError
from obstore.store import MemoryStore, from_url

from model_delta.errors import AtollError, Malformed, NotFound, StorageFull, Unavailable
from model_delta.store import StoredObject, is_name, require_kind, require_place, require_range

PART_BYTES = 8 << 20
REQUEST_S = 60.0
"""How long one request, which carries at most PART_BYTES, may take."""
RETRY_S = 60.0
"""How long a request is tried again after server errors and broken connections, with growing pauses."""
RETRIES_MAX = 8
_ALLOW_HTTP = ("AWS_ALLOW_HTTP", "AZURE_ALLOW_HTTP", "GOOGLE_ALLOW_HTTP")
_RESTARTS = 4
_STATUS = re.compile(r"status(?: code)?:? (\d{3})")
_NO_ROOM = re.compile(r"<Code>(QuotaExceeded|StorageFull|InsufficientStorage)|no space left", re.IGNORECASE)
"""Beside status 507. Errors name the object and the time they took too, so that no bare word or number will do."""


class ObjectStore:
    """An `InventoriedStore` in a bucket. Any number of processes may share it; `remove_unchanged` is safe against
    puts of this process only, since buckets have no conditional removal."""

    def __init__(self, url: str, *, retry_s: float = RETRY_S, request_s: float = REQUEST_S) -> None:
        """`url` names provider, bucket and prefix; nothing is asked of the bucket yet. Raises Malformed for a URL that
        obstore cannot use."""
        self._label = url
        self._lock = threading.Lock()
        self._writing: Counter[str] = Counter()
        if url.startswith("memory:"):
            self._bucket: Any = MemoryStore()
            return
        try:
            self._bucket = from_url(
                url,
                client_options={
                    "timeout": timedelta(seconds=request_s),
                    "connect_timeout": timedelta(seconds=10),
                    # Options given here make the library forget what the environment says about plain HTTP.
                    "allow_http": any(os.environ.get(name, "").lower() in ("1", "true") for name in _ALLOW_HTTP),
                },
                retry_config={"max_retries": RETRIES_MAX, "retry_timeout": timedelta(seconds=retry_s)},
            )
        except (BaseError, ValueError) as error:
            raise Malformed(
                f"store {url}: expected a bucket and the provider's environment variables, found: {_first_line(error)}"
            ) from None

    def put(self, kind: str, name: str, data: bytes) -> None:
        """See `ArtifactStore.put`. Raises Unavailable after the deadline."""
        path = require_place(kind, name)
        with self._lock:
            self._writing[path] += 1
        try:
            with self._told(f"{kind} {name[:16]}", f"no room for {len(data)} bytes of "):
                obstore.put(self._bucket, path, data, chunk_size=PART_BYTES)
        finally:
            with self._lock:
                self._writing[path] -= 1
                if not self._writing[path]:
                    del self._writing[path]

    def get(self, kind: str, name: str) -> bytes:
        """See `ArtifactStore.get`. Raises Unavailable after the deadline."""
        path = require_place(kind, name)
        with self._told(f"{kind} {name[:16]}"):
            for _ in range(_RESTARTS):
                try:
                    return self._whole(path)
                except PreconditionError:
                    continue  # replaced while it was read: read the new one
        raise Unavailable(f"store {self._label}: {kind} {name[:16]}: replaced again and again while it was read")

    def read(self, kind: str, name: str, offset: int, length: int) -> tuple[int, bytes]:
        """See `ArtifactStore.read`. Raises Malformed for a negative offset or length."""
        path = require_place(kind, name)
        require_range(kind, name, offset, length)
        with self._told(f"{kind} {name[:16]}"):
            size, _, data = self._range(path, offset, length)
            return size, data

    def has(self, kind: str, name: str) -> bool:
        """See `ArtifactStore.has`."""
        path = require_place(kind, name)
        try:
            with self._told(f"{kind} {name[:16]}"):
                obstore.head(self._bucket, path)
        except NotFound:
            return False
        return True

    def names(self, kind: str) -> tuple[str, ...]:
        """See `ArtifactStore.names`."""
        return tuple(entry.name for entry in self.entries(kind))

    def remove(self, kind: str, name: str) -> None:
        """See `ArtifactStore.remove`."""
        path = require_place(kind, name)
        try:
            with self._told(f"{kind} {name[:16]}"):
                obstore.delete(self._bucket, path)
        except NotFound:
            pass

    def entries(self, kind: str) -> tuple[StoredObject, ...]:
        """See `InventoriedStore.entries`."""
        require_kind(kind)
        found = []
        with self._told(f"list of kind {kind}"):
            for page in obstore.list(self._bucket, kind):
                for meta in page:
                    name = meta["path"].removeprefix(f"{kind}/")
                    if is_name(name):
                        found.append(StoredObject(kind, name, meta["size"], meta["last_modified"].timestamp()))
        return tuple(sorted(found, key=lambda entry: entry.name))

    def remove_unchanged(self, entry: StoredObject) -> bool:
        """See `InventoriedStore.remove_unchanged`."""
        path = require_place(entry.kind, entry.name)
        try:
            with self._lock, self._told(f"{entry.kind} {entry.name[:16]}"):  # no put begins or ends meanwhile
                if self._writing[path]:
                    return False
                meta = obstore.head(self._bucket, path)
                if (meta["size"], meta["last_modified"].timestamp()) != (entry.size, entry.modified):
                    return False
                obstore.delete(self._bucket, path)
        except NotFound:
            return False
        return True

    def _whole(self, path: str) -> bytes:
        size, tag, data = self._range(path, 0, PART_BYTES)
        parts = [data]
        read = len(data)
        while read < size:
            _, _, data = self._range(path, read, PART_BYTES, tag)
            if not data:
                raise Unavailable(f"store {self._label}: {path[:40]}: expected {size} bytes, found {read}")
            parts.append(data)
            read += len(data)
        return b"".join(parts) if len(parts) > 1 else parts[0]

    def _range(self, path: str, offset: int, length: int, tag: str | None = None) -> tuple[int, str | None, bytes]:
        """Size and tag of an object, and a range of its bytes. With `tag`, of that version of it alone."""
        if length:
            options: Any = {"range": (offset, offset + length), **({"if_match": tag} if tag else {})}
            try:
                found = obstore.get(self._bucket, path, options=options)
                return found.meta["size"], found.meta["e_tag"], bytes(found.bytes())
            except PreconditionError:
                raise
            except BaseError:
                meta = obstore.head(self._bucket, path)
                if offset < meta["size"]:
                    raise
                return meta["size"], meta["e_tag"], b""  # providers refuse a range that begins at or after the end
        meta = obstore.head(self._bucket, path)
        return meta["size"], meta["e_tag"], b""

    @contextmanager
    def _told(self, what: str, full: str = "no room for ") -> Iterator[None]:
        """Turn the library's errors into ours, without what the server said: it may repeat an access key."""
        try:
            yield
        except AtollError:
            raise
        except FileNotFoundError:
            raise NotFound(f"store {self._label}: no {what}") from None
        except (PermissionDeniedError, UnauthenticatedError, PermissionError):
            raise Unavailable(
                f"store {self._label}: {what}: the bucket's owner does not let this login do that; expected permission "
                "to get, put, list and delete objects: correct the policy or the provider's environment variables"
            ) from None
        except PreconditionError:
            raise
        except (BaseError, OSError) as error:
            status = _STATUS.search(str(error))
            if (status and status[1] == "507") or _NO_ROOM.search(str(error)):
                raise StorageFull(
                    f"store {self._label}: {full}{what}; nothing was changed, free some space or raise the quota"
                ) from None
            said = f"HTTP status {status[1]}" if status else "no answer in time, or none that could be understood"
            raise Unavailable(f"store {self._label}: {what}: {said}; check endpoint, bucket and network") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["no reason given"])[0][:200]
