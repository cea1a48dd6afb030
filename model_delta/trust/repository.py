"""The authority's side of TUF: who may vouch for what, and until when (TUF specification 1.0.31).

    root        offline, 2 of 3 people   names every other role's keys; 1 year; every version is kept for ever
    targets     offline, 2 of 3 people   names the regional coordinators and holds the tenants' anchors; 90 days
    REGION.TENANT  one coordinator       its models' versions, under REGION/TENANT/MODEL/DIGEST only; 90 days
    snapshot    online                   which versions of all of these belong together; 7 days
    timestamp   online                   which snapshot is the newest; 1 day

A version's target is the manifest's packed bytes, so that the target's hash, the manifest's digest and the last part of
the target's path are one and the same. `*` in a path pattern does not cross a `/`: a coordinator that is taken over can
vouch for nothing outside its region and tenant.

Offline roles change in three steps, which may lie days and machines apart: `stage_*` writes what is to be signed, each
holder adds a signature with `sign_staged`, `finish` checks the thresholds and publishes. Online roles are signed in one
go by `publish`. Files appear in the order targets, snapshot, timestamp: a crash in between leaves the old repository in
force, and the next `publish` takes up what was left. All state lies in an `ArtifactStore`; file names are TUF's own
(`3.root.json`, `timestamp.json`), so that a mirror serves them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from securesystemslib.signer import Key, Signer
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Role,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from model_delta.digest import digest_of, require_digest
from model_delta.encoding import pack
from model_delta.errors import Malformed, NotFound, SignatureInvalid, Untrusted
from model_delta.store import ArtifactStore
from model_delta.trust.metadata_files import MetadataFiles, date, parsed, require_verified, signed, verified
from model_delta.trust.paths import KIND, anchors_path, delegated_role
from model_delta.trust.signers import tuf_key
from model_delta.trust.updater import RoleKeys, TrustAnchors

STAGED = "tuf-staged"
DAY_S = 86_400
TOP_ROLES = ("root", "targets", "snapshot", "timestamp")


class Expiries(msgspec.Struct, frozen=True):
    """How long signed metadata stays believable, in seconds. `targets_s` is also the compatibility window."""

    root_s: int = 365 * DAY_S
    targets_s: int = 90 * DAY_S
    snapshot_s: int = 7 * DAY_S
    timestamp_s: int = DAY_S


class Delegation(msgspec.Struct, frozen=True):
    """What one regional coordinator may vouch for, and by which keys."""

    region: str
    tenant: str
    keys: RoleKeys

    @property
    def role(self) -> str:
        """The delegated role's name."""
        return delegated_role(self.region, self.tenant)


class Target(msgspec.Struct, frozen=True):
    """A vouched-for file: bytes and SHA-256."""

    length: int
    digest: str


class RoleStatus(msgspec.Struct, frozen=True):
    """One role: its published version, Unix seconds of expiry, the ids of the keys that count, and the threshold.

    `in_force` is false when the published file is not signed by enough of the present keys: sign it anew.
    """

    role: str
    version: int
    expires: int
    keys: tuple[str, ...]
    threshold: int
    in_force: bool


class Progress(msgspec.Struct, frozen=True):
    """A staged role: who signed, and how many signatures each set of keys that must agree still misses."""

    role: str
    version: int
    signed: tuple[str, ...]
    may_sign: tuple[str, ...]
    missing: int


class Repository:
    """TUF metadata in a store. Every method that signs or dates takes `now`, Unix seconds.

    One process publishes at a time; any number may read.
    """

    def __init__(self, store: ArtifactStore, expiries: Expiries | None = None) -> None:
        self._store = store
        self._files = MetadataFiles(store)
        self._expiries = expiries or Expiries()

    # -- offline roles

    def stage_root(self, now: float, roles: Mapping[str, RoleKeys]) -> Progress:
        """Write down a next root in which `roles` have new keys and the others keep theirs, for the holders to sign.

        The first root needs all of TOP_ROLES. What was staged before is replaced, its signatures with it. Raises
        Malformed for an unknown or missing role, or a threshold that could not protect or could never be met.
        """
        unknown = sorted(set(roles) - set(TOP_ROLES))
        if unknown:
            raise Malformed(f"root: expected roles {', '.join(TOP_ROLES)}, found {', '.join(unknown)}")
        current = self._files.newest(Root)
        root = Root(version=1, consistent_snapshot=True) if current is None else current.signed
        if current is not None:
            root.version += 1
        root.expires = date(now + self._expiries.root_s)
        for role, keys in roles.items():
            _require_threshold(role, keys)
            for key_id in list(root.roles[role].keyids):
                root.revoke_key(key_id, role)
            for key in map(tuf_key, keys.keys):
                root.add_key(key, role)
            root.roles[role].threshold = keys.threshold
        empty = [role for role in TOP_ROLES if not root.roles[role].keyids]
        if empty:
            raise Malformed(f"root {root.version}: expected keys for every role, found none for {', '.join(empty)}")
        self._stage("root", Metadata(root))
        return self.progress("root")

    def stage_targets(
        self,
        now: float,
        delegations: Sequence[Delegation] | None = None,
        anchors: TrustAnchors | None = None,
        without: Sequence[str] = (),
    ) -> Progress:
        """Write down next top-level targets: `delegations` are added or replaced by role name, the tenant's `anchors`
        replaced, and the roles or target paths of `without` dropped. With nothing given only the expiry moves."""
        current = self._files.newest(Targets)
        targets = Targets(version=1) if current is None else current.signed
        if current is not None:
            targets.version += 1
        targets.expires = date(now + self._expiries.targets_s)
        for gone in without:
            targets.targets.pop(gone, None)
            _drop_delegation(targets, gone)
        for delegation in delegations or ():
            _add_delegation(targets, delegation)
        if anchors is not None:
            data, path = pack(anchors), anchors_path(anchors.tenant)
            self._store.put(KIND, f"{digest_of(data)}.anchors", data)
            targets.targets[path] = TargetFile(len(data), {"sha256": digest_of(data)}, path)
        self._stage("targets", Metadata(targets))
        return self.progress("targets")

    def sign_staged(self, role: str, signer: Signer) -> Progress:
        """Add one holder's signature to the staged `role`. Raises NotFound, and Untrusted for a key that has no say."""
        metadata = self._staged(role)
        allowed = {key_id for keys in self._judges(role, metadata) for key_id in keys.keyids}
        if signer.public_key.keyid not in allowed:
            raise Untrusted(f"{role} {metadata.signed.version}: key {signer.public_key.keyid[:16]}… has no say in it")
        metadata.sign(signer, append=True)
        self._stage(role, metadata)
        return self.progress(role)

    def progress(self, role: str) -> Progress:
        """Who has signed the staged `role` and how many signatures are missing. Raises NotFound when none is staged."""
        metadata = self._staged(role)
        judges = self._judges(role, metadata)
        agreed, missing = set(), 0
        for judge in judges:
            good = {key_id for key_id in judge.keyids if self._signed_by(role, metadata, key_id)}
            agreed |= good
            missing = max(missing, judge.threshold - len(good))
        may_sign = sorted({key_id for judge in judges for key_id in judge.keyids} - agreed)
        return Progress(role, metadata.signed.version, tuple(sorted(agreed)), tuple(may_sign), max(missing, 0))

    def finish(self, role: str) -> int:
        """Publish the staged `role` and return its version. Raises SignatureInvalid below a threshold."""
        progress = self.progress(role)
        if progress.missing:
            raise SignatureInvalid(
                f"{role} {progress.version}: {progress.missing} signature(s) missing, {len(progress.signed)} there"
            )
        metadata = self._staged(role)
        self._files.put(role, metadata)
        self._store.remove(STAGED, f"{role}.json")
        return progress.version

    def discard(self, role: str) -> None:
        """Forget what was staged for `role`."""
        self._store.remove(STAGED, f"{role}.json")

    def staged(self) -> tuple[str, ...]:
        """The roles that wait for signatures."""
        return tuple(name.removesuffix(".json") for name in self._store.names(STAGED))

    # -- a coordinator's role

    def add_targets(
        self,
        role: str,
        now: float,
        signers: Sequence[Signer],
        add: Mapping[str, Target] | None = None,
        revoke: Sequence[str] = (),
    ) -> int:
        """Vouch for the paths of `add`, no longer for those of `revoke`, as the delegated `role`; its new version.

        Nothing is in force before `publish`. Raises NotFound for a role that was not delegated, Untrusted for a path
        outside of its pattern, SignatureInvalid when `signers` are not enough.
        """
        parent = self._files.require(Targets)
        delegation = (parent.signed.delegations.roles or {}).get(role) if parent.signed.delegations else None
        if delegation is None:
            raise NotFound(f"role {role!r}: not delegated by targets {parent.signed.version}; name it in the ceremony")
        current = self._files.newest(Targets, role)
        targets = Targets(version=1) if current is None else current.signed
        if current is not None:
            targets.version += 1
        targets.expires = date(now + self._expiries.targets_s)
        for path in revoke:
            targets.targets.pop(path, None)
        for path, target in (add or {}).items():
            if not delegation.is_delegated_path(path):
                raise Untrusted(f"role {role!r}: expected a path like {(delegation.paths or ['?'])[0]}, found {path!r}")
            require_digest(target.digest, f"target {path}")
            targets.targets[path] = TargetFile(target.length, {"sha256": target.digest}, path)
        metadata = signed(Metadata(targets), signers)
        require_verified(parent.signed, role, metadata)
        self._files.put(role, metadata)
        return targets.version

    def vouched(self, role: str) -> frozenset[str]:
        """The target paths in the newest metadata of a delegated role, in force or not; empty when it has none."""
        current = self._files.newest(Targets, role)
        return frozenset() if current is None else frozenset(current.signed.targets)

    def anchored(self, tenant: str) -> str:
        """The SHA-256 of the tenant's anchors in the newest targets; "" when they hold none."""
        found = self._files.require(Targets).signed.targets.get(anchors_path(tenant))
        return "" if found is None else found.hashes["sha256"]

    # -- online roles

    def publish(self, now: float, snapshot: Sequence[Signer], timestamp: Sequence[Signer]) -> int:
        """Put everything newest in force and return the timestamp's version; also what keeps the repository fresh.

        The snapshot is signed anew when something in it changed, half its time is over, or its keys were replaced; the
        timestamp always. While online keys are being replaced pass the old and the new signers, publish, and only then
        `finish` the root: then there is no moment at which either root's clients are refused.
        """
        root = self._files.require(Root)
        metas = {"targets.json": self._files.meta("targets")}
        parent = self._files.require(Targets)
        for role in (parent.signed.delegations.roles or {}) if parent.signed.delegations else {}:
            if self._files.newest(Targets, role) is not None:
                metas[f"{role}.json"] = self._files.meta(role)
        current = self._files.newest(Snapshot)
        new = self._next_snapshot(now, current, metas, root.signed, snapshot)
        if new is not None:
            self._files.put("snapshot", new)
            current = new
        assert current is not None
        size = len(current.to_bytes())
        held = self._files.timestamp()
        version = 1 if held is None else held.signed.version + 1
        fresh = Timestamp(
            version=version,
            expires=date(now + self._expiries.timestamp_s),
            snapshot_meta=MetaFile(version=current.signed.version, length=size),
        )
        metadata = signed(Metadata(fresh), timestamp)
        require_verified(root.signed, "timestamp", metadata)
        self._files.put_timestamp(metadata)
        self._files.prune()
        return version

    def due(self, now: float) -> tuple[str, ...]:
        """The roles of which less than half the time is left: online ones to `publish`, offline ones to sign anew."""
        lives = {"root": self._expiries.root_s, "timestamp": self._expiries.timestamp_s}
        lives["snapshot"] = self._expiries.snapshot_s
        return tuple(
            status.role
            for status in self.status()
            if not status.in_force or status.expires - now < lives.get(status.role, self._expiries.targets_s) / 2
        )

    def status(self) -> tuple[RoleStatus, ...]:
        """Every role, root first; version 0 for one that has published nothing yet. Raises NotFound before the
        ceremony."""
        root = self._files.require(Root)
        keys = root.signed.roles
        found = [_status("root", root, root.signed, keys["root"])]
        parent = self._files.newest(Targets)
        found.append(_status("targets", parent, root.signed, keys["targets"]))
        if parent is not None and parent.signed.delegations is not None:
            for name, role in (parent.signed.delegations.roles or {}).items():
                found.append(_status(name, self._files.newest(Targets, name), parent.signed, role))
        timestamp = self._files.timestamp()
        found.append(_status("snapshot", self._files.newest(Snapshot), root.signed, keys["snapshot"]))
        found.append(_status("timestamp", timestamp, root.signed, keys["timestamp"]))
        return tuple(found)

    def root_bytes(self, version: int | None = None) -> bytes:
        """A root as published, the newest by default: what a device is provisioned with. Raises NotFound."""
        number = version or self._files.newest_version("root")
        return self._files.bytes_of("root", number)

    # -- inside

    def _next_snapshot(
        self,
        now: float,
        current: Metadata[Snapshot] | None,
        metas: dict[str, MetaFile],
        root: Root,
        signers: Sequence[Signer],
    ) -> Metadata[Snapshot] | None:
        if current is not None:
            kept = {name: meta for name, meta in current.signed.meta.items() if name not in metas}
            metas = kept | metas  # clients refuse a snapshot that forgets a role
            left = current.signed.expires.timestamp() - now
            asked = {signer.public_key.keyid for signer in signers}
            same = current.signed.meta == metas and asked <= set(current.signatures)
            if same and left >= self._expiries.snapshot_s / 2 and verified(root, "snapshot", current):
                return None
        version = 1 if current is None else current.signed.version + 1
        fresh = Snapshot(version=version, expires=date(now + self._expiries.snapshot_s), meta=metas)
        metadata = signed(Metadata(fresh), signers)
        require_verified(root, "snapshot", metadata)
        return metadata

    def _judges(self, role: str, metadata: Metadata[Any]) -> list[Role]:
        """The sets of keys that must each agree: the root's in force and the staged root's, which for a root is itself.
        So targets that are signed while their keys are being replaced are good under either root."""
        return [root.roles[role] for root in self._roots(role, metadata)]

    def _signed_by(self, role: str, metadata: Metadata[Any], key_id: str) -> bool:
        signature = metadata.signatures.get(key_id)
        key = self._known_key(role, metadata, key_id)
        if signature is None or key is None:
            return False
        try:
            key.verify_signature(signature, metadata.signed_bytes)
        except Exception:  # several unrelated kinds, by key type
            return False
        return True

    def _known_key(self, role: str, metadata: Metadata[Any], key_id: str) -> Key | None:
        return next((root.keys[key_id] for root in self._roots(role, metadata) if key_id in root.keys), None)

    def _roots(self, role: str, metadata: Metadata[Any]) -> list[Root]:
        current = self._files.newest(Root)
        roots = [] if current is None else [current.signed]
        if role == "root":
            roots.append(metadata.signed)
        elif "root" in self.staged():
            roots.append(self._staged("root").signed)
        return roots

    def _stage(self, role: str, metadata: Metadata[Any]) -> None:
        self._store.put(STAGED, f"{role}.json", metadata.to_bytes())

    def _staged(self, role: str) -> Metadata[Any]:
        try:
            data = self._store.get(STAGED, f"{role}.json")
        except NotFound:
            raise NotFound(f"{role}: nothing waits to be signed") from None
        return parsed(Root if role == "root" else Targets, data, f"staged {role}")


def _status(role: str, metadata: Metadata[Any] | None, delegator: Root | Targets, keys: Role) -> RoleStatus:
    return RoleStatus(
        role=role,
        version=0 if metadata is None else metadata.signed.version,
        expires=0 if metadata is None else int(metadata.signed.expires.timestamp()),
        keys=tuple(keys.keyids),
        threshold=keys.threshold,
        in_force=metadata is not None and verified(delegator, role, metadata),
    )


def _add_delegation(targets: Targets, delegation: Delegation) -> None:
    name = delegation.role
    _require_threshold(name, delegation.keys)
    _drop_delegation(targets, name)
    if targets.delegations is None:
        targets.delegations = Delegations({}, {})
    roles = targets.delegations.roles
    if roles is None:
        raise Malformed("targets: expected delegations by name, found succinct ones")
    pattern = f"{delegation.region}/{delegation.tenant}/*/*"
    roles[name] = DelegatedRole(name, [], delegation.keys.threshold, terminating=True, paths=[pattern])
    for key in map(tuf_key, delegation.keys.keys):
        targets.add_key(key, name)


def _drop_delegation(targets: Targets, name: str) -> None:
    delegations = targets.delegations
    if delegations is None or not delegations.roles or name not in delegations.roles:
        return
    for key_id in list(delegations.roles[name].keyids):
        targets.revoke_key(key_id, name)
    del delegations.roles[name]


def _require_threshold(role: str, keys: RoleKeys) -> None:
    different = len(set(keys.keys))
    if not 1 <= keys.threshold <= different:
        raise Malformed(f"role {role!r}: expected a threshold from 1 to {different}, found {keys.threshold}")
