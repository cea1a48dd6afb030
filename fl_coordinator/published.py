"""The versions that were published, read back: manifest, delivery, key, the file that devices run, the bytes handed in.

Devices many releases behind get a direct patch each, beside the version's delivery so that nobody else pays for it:
from the last releases soon after publication (`late_bases`, `offer_direct`), from older ones when such a device says
hello.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from fl_coordinator.ledger import Ledger
from fl_coordinator.tables.records import ReleaseRecord
from model_delta.encoding import pack, unpack
from model_delta.errors import AtollError, Malformed, NotFound, Untrusted
from model_delta.keys.encryption import open_blob
from model_delta.keys.keyring import Keyring
from model_delta.manifest import Delivery, Manifest, late_delivery_name, parse_manifest
from model_delta.patch.route import plan_update
from model_delta.release import offer_patches, open_release
from model_delta.store import ArtifactStore
from model_delta.topics import require_model
from model_delta.trust.signing import open_envelope

MODEL_BYTES_MAX = 512 * 2**20
LATE_PATCHES_FROM = 16
"""From how many earlier versions a direct patch is made soon after publication. Devices further behind get theirs on
demand, or take a chain or the whole."""
LATEST = "latest"
SOURCE_LABEL = "source"
"""What the bytes handed in are sealed under, beside the version's digest."""


class Published:
    """One tenant's versions as the store, the ledger and the keyring have them. Blocking."""

    def __init__(self, *, tenant: str, ledger: Ledger, store: ArtifactStore, keyring: Keyring) -> None:
        self._tenant = tenant
        self._ledger = ledger
        self._store = store
        self._keyring = keyring

    def manifest(self, manifest: str) -> Manifest:
        """A published manifest. Raises NotFound."""
        return parse_manifest(open_envelope(self._store.get("manifest", manifest)).payload)

    def delivery(self, manifest: str) -> Delivery:
        """What carries a published version. Raises NotFound."""
        return unpack(self._store.get("delivery", manifest), Delivery)

    def key(self, manifest: str) -> bytes:
        """The artifact key of a published version. Raises NotFound, Untrusted."""
        record = self._ledger.release(manifest)
        if not record.wrapped_key:
            raise Untrusted(f"version {manifest[:16]}…: was shredded; its key is destroyed")
        return self._keyring.unwrap(self._context(manifest), record.wrapped_key)

    def file(self, manifest: str) -> bytes:
        """The plain, checked file that devices run. Raises NotFound, Untrusted, Malformed."""
        described, delivery = self.manifest(manifest), self.delivery(manifest)
        route = plan_update({}, described, {manifest: msgspec.structs.replace(delivery, patches=())})
        blobs = {blob.digest: self._store.get("blob", blob.digest) for step in route.steps for blob in step.blobs}
        return open_release(described, route, blobs, {manifest: self.key(manifest)})

    def source(self, manifest: str) -> bytes:
        """The bytes that the publisher handed in. Raises NotFound, Untrusted."""
        record = self._ledger.release(manifest)
        sealed = self._store.get("blob", record.source_blob)
        return open_blob(self.key(manifest), manifest, SOURCE_LABEL, sealed, MODEL_BYTES_MAX)

    def release_of_root(self, root: str) -> ReleaseRecord | None:
        """The release whose file has this Merkle root, or None: a look-up, no search. Of several releases of the same
        file it is the first."""
        try:
            return self._ledger.release(self._store.get("root", root).decode())
        except (NotFound, Malformed, UnicodeDecodeError):
            return None

    def resolve(self, model: str, wanted: str) -> ReleaseRecord:
        """The version called `wanted`: a manifest digest, a release number, a name, or `latest`. Raises NotFound."""
        releases = self._ledger.releases(model)
        withdrawn = self._ledger.withdrawn(model)
        if wanted == LATEST:
            found = [record for record in releases if record.manifest not in withdrawn]
        else:
            found = [record for record in releases if wanted in (record.manifest, str(record.release), record.name)]
        if not found:
            listed = ", ".join(f"{record.release} {record.name}".strip() for record in releases[-5:]) or "none"
            raise NotFound(f"version {wanted!r} of model {model!r}: not published; the newest releases are: {listed}")
        return found[-1]

    def late_bases(self, target: str) -> tuple[str, ...]:
        """From which of the last releases a direct patch to `target` is worth making before a device asks: those that
        its delivery has none from, and whose file is as large as its own, so that nothing has to be searched."""
        record, delivery = self._ledger.release(target), self.delivery(target)
        offered = {target, *(offer.base for offer in delivery.offers), *self._ledger.retired()}
        return tuple(
            other.manifest
            for other in self._ledger.releases(record.model)[-1 - LATE_PATCHES_FROM :]
            if other.manifest not in offered and other.file_bytes == record.file_bytes
        )

    def has_direct(self, base: str, target: str) -> bool:
        """Whether a direct patch for late devices was tried already; see `offer_direct`."""
        return self._store.has("delivery", late_delivery_name(target, base))

    def offer_direct(self, base: str, target: str) -> bool:
        """Make a direct patch from `base` to `target` for late devices; whether one was made. None is where there is
        one already, where it saves nothing, and between models. Blocking. Raises NotFound, Untrusted, StorageFull."""
        name = late_delivery_name(target, base)
        if base == target or self._store.has("delivery", name):
            return False
        if self._ledger.release(base).model != self._ledger.release(target).model:
            return False
        delivery = self.delivery(target)
        if base in {offer.base for offer in delivery.offers}:
            return False
        whole = sum(blob.size for blob in delivery.segments)
        offered, blobs = offer_patches(
            self.manifest(target), self.file(target), self.key(target), self.manifest(base), self.file(base), whole
        )
        self._store_all(
            {**{("blob", digest): data for digest, data in blobs.items()}, ("delivery", name): pack(offered)}
        )
        return bool(offered.offers)

    def _store_all(self, objects: Mapping[tuple[str, str], bytes]) -> None:
        """Keep every object or, when the disk is full, none that was not there before."""
        new = [place for place in objects if not self._store.has(*place)]
        try:
            for (kind, name), data in objects.items():
                self._store.put(kind, name, data)
        except AtollError:
            for kind, name in new:
                self._store.remove(kind, name)
            raise

    def _context(self, manifest: str) -> str:
        return f"{self._tenant}/{manifest}"


def require_names(model: str, name: str) -> None:
    """Raise Malformed for names that no rollout could mean. A model's is part of a topic and of a path as well."""
    require_model(model)
    if name == LATEST or name.isdigit():
        raise Malformed(f"name: expected a word of your own, found {name!r}, which a rollout takes for another version")
