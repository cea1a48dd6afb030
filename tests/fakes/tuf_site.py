"""A TUF repository in memory, the mirror before it, and an attacker who may rewrite what the mirror hands out.

`Site` holds every key, so that a test makes a release, a rotation or a compromise in a line; `Mirror` serves the site's
files unless the test put others in their place, and remembers what was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import Signer
from tuf.api.metadata import Metadata

from model_delta.digest import digest_of
from model_delta.errors import NotFound
from model_delta.trust.paths import KIND, version_path
from model_delta.trust.repository import DAY_S, Delegation, Repository, Target
from model_delta.trust.signers import signer_of
from model_delta.trust.signing import public_bytes
from model_delta.trust.updater import RoleKeys, TrustAnchors

NOW = 1_800_000_000.0
REGION, TENANT, MODEL = "eu-west", "acme", "fraud"
ROLE = f"{REGION}.{TENANT}"
DAY = DAY_S


class MemoryStore:
    """An `ArtifactStore` in a dict."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], bytes] = {}

    def put(self, kind: str, name: str, data: bytes) -> None:
        self.objects[kind, name] = data

    def get(self, kind: str, name: str) -> bytes:
        try:
            return self.objects[kind, name]
        except KeyError:
            raise NotFound(f"store: no {kind} named {name[:16]}") from None

    def read(self, kind: str, name: str, offset: int, length: int) -> tuple[int, bytes]:
        data = self.get(kind, name)
        return len(data), data[offset : offset + length]

    def has(self, kind: str, name: str) -> bool:
        return (kind, name) in self.objects

    def names(self, kind: str) -> tuple[str, ...]:
        return tuple(sorted(name for found, name in self.objects if found == kind))

    def remove(self, kind: str, name: str) -> None:
        self.objects.pop((kind, name), None)


def new_key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def keys_of(private: Sequence[Ed25519PrivateKey], threshold: int = 1) -> RoleKeys:
    return RoleKeys(tuple(public_bytes(key.public_key()) for key in private), threshold)


def signers(*private: Ed25519PrivateKey) -> list[Signer]:
    return [signer_of(key) for key in private]


class Site:
    """The repository after its ceremony, with one release of one model in force at `NOW`."""

    def __init__(self, now: float = NOW, anchors: TrustAnchors | None = None, tenant: str = TENANT) -> None:
        self.tenant, self.role = tenant, f"{REGION}.{tenant}"
        self.now = now
        self.store = MemoryStore()
        self.repository = Repository(self.store)
        self.root = [new_key() for _ in range(3)]
        self.targets = [new_key() for _ in range(3)]
        self.snapshot, self.timestamp, self.region = new_key(), new_key(), new_key()
        self.anchors = anchors or TrustAnchors(tenant, {"plan": keys_of([new_key()])})
        self.files: dict[str, bytes] = {}
        self.repository.stage_root(
            now,
            {
                "root": keys_of(self.root, 2),
                "targets": keys_of(self.targets, 2),
                "snapshot": keys_of([self.snapshot]),
                "timestamp": keys_of([self.timestamp]),
            },
        )
        self.finish("root", self.root[:2])
        self.repository.stage_targets(now, [Delegation(REGION, self.tenant, keys_of([self.region]))], self.anchors)
        self.finish("targets", self.targets[:2])
        self.first = self.release(b"the first version's manifest")
        self.publish()

    def finish(self, role: str, holders: Sequence[Ed25519PrivateKey]) -> int:
        for signer in signers(*holders):
            self.repository.sign_staged(role, signer)
        return self.repository.finish(role)

    def release(self, data: bytes, model: str = MODEL) -> str:
        """Vouch for a version; it is in force after `publish`."""
        path = version_path(REGION, self.tenant, model, digest_of(data))
        self.files[path] = data
        self.repository.add_targets(
            self.role, self.now, signers(self.region), {path: Target(len(data), digest_of(data))}
        )
        return path

    def withdraw(self, data: bytes) -> None:
        """Vouch for a version no more; in force after `publish`."""
        path = version_path(REGION, self.tenant, MODEL, digest_of(data))
        self.repository.add_targets(self.role, self.now, signers(self.region), revoke=[path])

    def rotate_region(self) -> None:
        """Another key for the region, named by the holders of targets; what it vouched for is signed anew."""
        self.region = new_key()
        self.repository.stage_targets(self.now, [Delegation(REGION, self.tenant, keys_of([self.region]))])
        self.finish("targets", self.targets[:2])
        self.repository.add_targets(self.role, self.now, signers(self.region))
        self.publish()

    def rotate_anchors(self, anchors: TrustAnchors) -> None:
        """Other keys for plans, rounds and baselines."""
        self.anchors = anchors
        self.repository.stage_targets(self.now, anchors=anchors)
        self.finish("targets", self.targets[:2])
        self.publish()

    def keep_fresh(self, now: float) -> None:
        """What a coordinator does all the time: sign anew what runs out."""
        if now - self.now >= DAY / 4:
            self.now = now
            due = self.repository.due(now)
            if "targets" in due:
                self.repository.stage_targets(now)
                self.finish("targets", self.targets[:2])
            if self.role in due:
                self.repository.add_targets(self.role, now, signers(self.region))
            if "root" in due:
                self.rotate_root()
            self.publish()

    def publish(self) -> int:
        return self.repository.publish(self.now, signers(self.snapshot), signers(self.timestamp))

    def rotate_root(self, **keys: list[Ed25519PrivateKey]) -> int:
        """A next root; with `root=[...]` the holders change too, and two old and two new ones sign."""
        old = self.root[:2]
        self.repository.stage_root(
            self.now, {role: keys_of(new, 2 if role in ("root", "targets") else 1) for role, new in keys.items()}
        )
        for role, new in keys.items():
            setattr(self, role, new if role in ("root", "targets") else new[0])
        return self.finish("root", [*old, *([] if self.root[:2] == old else self.root[:2])])

    def provisioned(self) -> bytes:
        return self.repository.root_bytes(1)

    def name_of(self, role: str) -> str:
        """The newest file of a role."""
        if role == "timestamp":
            return "timestamp.json"
        status = {found.role: found for found in self.repository.status()}
        return f"{status[role].version}.{role}.json"

    def metadata(self, role: str) -> Metadata[Any]:
        return Metadata[Any].from_bytes(self.store.get(KIND, self.name_of(role)))

    def forged(self, role: str, edit: Callable[[Any], None], *by: Ed25519PrivateKey) -> Metadata[Any]:
        """The newest metadata of `role`, changed by `edit` and signed by nobody but `by`."""
        metadata = self.metadata(role)
        edit(metadata.signed)
        metadata.signatures.clear()
        for signer in signers(*by):
            metadata.sign(signer, append=True)
        return metadata


class Mirror:
    """A `Source` before a site. `instead` maps names to other bytes, or to None for not there."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.instead: dict[str, bytes | None] = {}
        self.asked: list[str] = []

    def open(self, name: str, timeout_s: float) -> Iterator[bytes]:
        self.asked.append(name)
        data = self.instead.get(name, b"") if name in self.instead else self._kept(name)
        if data is None:
            raise NotFound(f"mirror: no {name}")
        for at in range(0, len(data), 1024):
            yield data[at : at + 1024]

    def put(self, metadata: Metadata[Any]) -> None:
        """Hand out `metadata` in place of what its version and type name."""
        signed = metadata.signed
        name = "timestamp.json" if signed.type == "timestamp" else f"{signed.version}.{signed.type}.json"
        self.instead[name] = metadata.to_bytes()

    def _kept(self, name: str) -> bytes | None:
        if self.site.store.has(KIND, name):
            return self.site.store.get(KIND, name)
        last = name.rpartition("/")[2]
        if self.site.store.has(KIND, last):
            return self.site.store.get(KIND, last)
        for path, data in self.site.files.items():
            folder, _, base = path.rpartition("/")
            if name == f"{folder}/{digest_of(data)}.{base}":
                return data
        return None
