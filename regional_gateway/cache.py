"""A gateway's store with a bound: what was used least recently goes first, and can be fetched again.

Only copies of what the coordinator has are dropped. Plans, keys and what else the region keeps for itself stay, and so
does what the versions in force are made of, because the region answers from it while the coordinator is away, also
after its own restart. Those alone may therefore take more than the bound.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable

from model_delta.encoding import unpack
from model_delta.errors import Malformed, NotFound
from model_delta.manifest import Delivery
from model_delta.store import BLOB, InventoriedStore
from monitoring.metrics import Metrics

COPIES = ("manifest", "delivery", "blob", "artifact", "tuf")
_LASTING = ("root.json", "timestamp.json")
"""Ends of names in kind `tuf` that stay: without them a device that was away cannot be told what is new."""

Place = tuple[str, str]


class BoundedStore:
    """An `ArtifactStore` over `store` whose copies take at most `bytes_max`; `in_force` names the manifests that the
    region answers with. Safe to call from several threads."""

    def __init__(
        self, store: InventoriedStore, *, bytes_max: int, in_force: Callable[[], Iterable[str]], metrics: Metrics
    ) -> None:
        self._store, self._bytes_max, self._in_force = store, bytes_max, in_force
        self._lock = threading.Lock()
        self._changing = threading.RLock()
        """Held while a copy comes or goes, so that what is counted is what is there. Readers do not wait for it."""
        listed = sorted((entry for kind in COPIES for entry in store.entries(kind)), key=lambda entry: entry.modified)
        self._sizes: OrderedDict[Place, int] = OrderedDict(
            ((entry.kind, entry.name), entry.size) for entry in listed if _may_go(entry.kind, entry.name)
        )
        self._total = sum(self._sizes.values())
        self._parts: dict[str, frozenset[Place]] = {}
        self._dropped = metrics.counter("cache_dropped_bytes", "Bytes dropped from the region's store.", ("kind",))
        metrics.gauge("cache_bytes", "Bytes of copies in the region's store.").read_from(lambda: float(self._total))
        self._make_room(None)

    def put(self, kind: str, name: str, data: bytes) -> None:
        """See `ArtifactStore.put`."""
        with self._changing:
            self._store.put(kind, name, data)
            if _may_go(kind, name):
                with self._lock:
                    self._total += len(data) - self._sizes.pop((kind, name), 0)
                    self._sizes[kind, name] = len(data)
                self._make_room((kind, name))

    def get(self, kind: str, name: str) -> bytes:
        """See `ArtifactStore.get`."""
        self._use(kind, name)
        return self._store.get(kind, name)

    def read(self, kind: str, name: str, offset: int, length: int) -> tuple[int, bytes]:
        """See `ArtifactStore.read`."""
        self._use(kind, name)
        return self._store.read(kind, name, offset, length)

    def has(self, kind: str, name: str) -> bool:
        """See `ArtifactStore.has`."""
        return self._store.has(kind, name)

    def names(self, kind: str) -> tuple[str, ...]:
        """See `ArtifactStore.names`."""
        return self._store.names(kind)

    def remove(self, kind: str, name: str) -> None:
        """See `ArtifactStore.remove`."""
        with self._changing:
            with self._lock:
                self._total -= self._sizes.pop((kind, name), 0)
            self._store.remove(kind, name)

    def _use(self, kind: str, name: str) -> None:
        with self._lock:
            if (kind, name) in self._sizes:
                self._sizes.move_to_end((kind, name))

    def _make_room(self, newest: Place | None) -> None:
        """Drop copies until the rest fits; what has just come stays, so that whoever asked for it can have it."""
        if self._total <= self._bytes_max:
            return
        pinned = {place for digest in self._in_force() for place in self._parts_of(digest)} | {newest}
        while True:
            with self._lock:
                oldest = next((place for place in self._sizes if place not in pinned), None)
                if self._total <= self._bytes_max or oldest is None:
                    return
                size = self._sizes.pop(oldest)
                self._total -= size
            self._store.remove(*oldest)
            self._dropped.add(size, oldest[0])

    def _parts_of(self, digest: str) -> frozenset[Place]:
        """What a version is made of: manifest, delivery, sealed segments."""
        if digest not in self._parts:
            places = {("manifest", digest), ("delivery", digest)}
            try:
                delivery = unpack(self._store.get("delivery", digest), Delivery)
            except (NotFound, Malformed):
                return frozenset(places)  # not fetched yet
            self._parts = {digest: frozenset(places | {(BLOB, blob.digest) for blob in delivery.segments})} | {
                known: parts for known, parts in self._parts.items() if known in set(self._in_force())
            }
        return self._parts[digest]


def _may_go(kind: str, name: str) -> bool:
    return kind in COPIES and not (kind == "tuf" and name.endswith(_LASTING))
