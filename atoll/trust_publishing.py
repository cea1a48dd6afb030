"""Keeping the TUF repository fresh without people: what a running coordinator uses of it.

Versions are vouched for by the keyring's release key. The online keys (`snapshot.pem`, `timestamp.pem` in DATA/trust)
are files of this platform; while they are being replaced the next ones (`*.next.pem`) sign beside them, so that no
device meets a root that does not fit. Whoever publishes holds the lock in DATA/trust meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from atoll.platform import open_keyring
from atoll.settings import ConfigurationError, DataFolder, write_private
from atoll.stores import coordinator_store
from model_delta.digest import digest_of
from model_delta.encoding import pack
from model_delta.errors import NotFound
from model_delta.keys.keyring import Keyring
from model_delta.store import ArtifactStore
from model_delta.trust.paths import delegated_role
from model_delta.trust.repository import DAY_S, Delegation, Repository, Target
from model_delta.trust.signers import CallableSigner, signer_of
from model_delta.trust.signing import load_public_key
from model_delta.trust.updater import RoleKeys, TrustAnchors

ONLINE_ROLES = ("snapshot", "timestamp")


class Publishing:
    """Signs what may be signed without people: versions by the keyring's release key, snapshot and timestamp."""

    def __init__(self, store: ArtifactStore, folder: Path, keyring: Keyring) -> None:
        self.repository = Repository(store)
        self._folder = folder
        self._keyring = keyring

    def release_signer(self) -> CallableSigner:
        """A signer by the keyring's release key."""
        public = load_public_key(self._keyring.public_key("release"))
        return CallableSigner(public, lambda data: self._keyring.sign_bytes("release", data)[1])

    def vouched(self, region: str) -> frozenset[str]:
        """The target paths that are vouched for in `region`. Raises NotFound when no ceremony named the region."""
        role = delegated_role(region, self._keyring.tenant)
        if all(status.role != role for status in self.repository.status()):
            raise NotFound(f"role {role!r}: named by no ceremony; `atoll trust rotate targets --region {region}`")
        return self.repository.vouched(role)

    def vouch(self, region: str, add: Mapping[str, Target], now: float, revoke: Sequence[str] = ()) -> int:
        """Add targets of `region` and drop others, in force when this returns; the timestamp's version."""
        role = delegated_role(region, self._keyring.tenant)
        with self.exclusive():
            self.repository.add_targets(role, now, [self.release_signer()], add, revoke)
            return self.publish(now)

    def delegations(self, regions: Sequence[str] = ()) -> list[Delegation]:
        """The regions there are and those of `regions`, with the keyring's release key of today."""
        tenant = self._keyring.tenant
        with contextlib.suppress(NotFound):
            held = [status.role for status in self.repository.status() if status.role.endswith(f".{tenant}")]
            regions = [*(role.removesuffix(f".{tenant}") for role in held), *regions]
        keys = RoleKeys((self._keyring.public_key("release"),))
        return [Delegation(region, tenant, keys) for region in dict.fromkeys(regions)]

    @property
    def tenant(self) -> str:
        """Whose versions these are."""
        return self._keyring.tenant

    def anchors(self) -> TrustAnchors:
        """The tenant's role keys as the keyring has them."""
        return self._keyring.anchors()

    def outdated(self, region: str) -> bool:
        """Whether the targets in force name other keys than the keyring's: the anchors', or the region's."""
        role, ours = delegated_role(region, self.tenant), self.release_signer().public_key.keyid
        named = {status.role: status.keys for status in self.repository.status()}.get(role, ())
        return named != (ours,) or self.repository.anchored(self.tenant) != digest_of(pack(self.anchors()))

    def publish(self, now: float) -> int:
        """Sign snapshot and timestamp anew where that is due; the timestamp's version."""
        return self.repository.publish(now, self._online("snapshot"), self._online("timestamp"))

    def days_left(self, now: float) -> dict[str, float]:
        """Days until each role's metadata runs out."""
        return {status.role: (status.expires - now) / DAY_S for status in self.repository.status()}

    def keep_fresh(self, now: float) -> tuple[str, ...]:
        """Sign anew what this process may and what has less than half its time left; the other roles that are due, for
        people to sign. Nothing happens before the ceremony."""
        ours = self.release_signer().public_key.keyid
        with self.exclusive():
            try:
                due = self.repository.due(now)
            except NotFound:
                return ()
            regional = [status.role for status in self.repository.status() if ours in status.keys]
            for role in set(regional) & set(due):
                self.repository.add_targets(role, now, [self.release_signer()])
            if set(due) & {*regional, *ONLINE_ROLES}:
                self.publish(now)
        return tuple(role for role in due if role not in regional and role not in ONLINE_ROLES)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the repository's lock; waits for another process that publishes."""
        with (self._folder / "lock").open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _online(self, role: str) -> list[Any]:
        paths = [self._folder / f"{role}.pem", self._folder / f"{role}.next.pem"]
        keys = [read_online(path) for path in paths if path.exists()]
        if not keys:
            raise NotFound(f"{paths[0]}: no online key; hold the ceremony first: `atoll trust init`")
        return [signer_of(key) for key in keys]


def trust_of(data: DataFolder, keyring: Keyring | None = None) -> Publishing:
    """The platform's TUF repository, in the coordinator's store; the folder's keyring is opened if none is given."""
    return Publishing(coordinator_store(data), data.child("trust"), keyring or open_keyring(data))


def make_online(path: Path) -> None:
    """A key for a process to use; one that is there already, from an attempt that broke off, is kept."""
    if not path.exists():
        key = Ed25519PrivateKey.generate()
        encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        write_private(path, key.private_bytes(encoding, form, serialization.NoEncryption()))


def read_online(path: Path) -> Ed25519PrivateKey:
    """An online key. Raises ConfigurationError for a file that is none."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except ValueError:
        raise ConfigurationError(f"{path}: expected an unencrypted Ed25519 key, PEM; restore it, or rotate") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigurationError(f"{path}: expected an Ed25519 key, found {type(key).__name__}")
    return key
