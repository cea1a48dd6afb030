"""TUF metadata as files in an `ArtifactStore`, under TUF's own names (`3.root.json`, `timestamp.json`).

Read, written and checked one role at a time; who may change what, and when, is `repository`'s business.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from securesystemslib.signer import Signer
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Signed, Snapshot, Targets, Timestamp

from model_delta.errors import Malformed, NotFound, SignatureInvalid
from model_delta.store import ArtifactStore
from model_delta.trust.paths import KIND

KEEP_VERSIONS = 8
"""How many versions of snapshot and targets stay, for clients in the middle of a refresh."""
_FILE = re.compile(r"(\d{1,9})\.([A-Za-z0-9][A-Za-z0-9._-]*)\.json")
S = TypeVar("S", Root, Targets, Snapshot, Timestamp)


class MetadataFiles:
    """The published metadata in a store, by role and version."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    def put(self, role: str, metadata: Metadata[Any]) -> None:
        """Publish a role's metadata. Clients find a root by its number, all else once a timestamp leads there."""
        self._store.put(KIND, f"{metadata.signed.version}.{role}.json", metadata.to_bytes())

    def newest_version(self, role: str) -> int:
        """The number of a role's newest file, in force or not; 0 when there is none."""
        found = (_FILE.fullmatch(name) for name in self._store.names(KIND))
        return max((int(match[1]) for match in found if match and match[2] == role), default=0)

    def newest(self, kind: type[S], role: str = "") -> Metadata[S] | None:
        """The newest metadata of `role` (by default the one that is called as its kind); None when there is none."""
        role = role or kind.type
        version = self.newest_version(role)
        if not version:
            return None
        name = f"{version}.{role}.json"
        return parsed(kind, self._store.get(KIND, name), name)

    def require(self, kind: type[S]) -> Metadata[S]:
        """The newest metadata of a top-level role. Raises NotFound."""
        found = self.newest(kind)
        if found is None:
            raise NotFound(f"TUF repository: no {kind.type} yet; hold the ceremony first: `atoll trust init`")
        return found

    def timestamp(self) -> Metadata[Timestamp] | None:
        """The timestamp in force; None before the first."""
        try:
            data = self._store.get(KIND, "timestamp.json")
        except NotFound:
            return None
        return parsed(Timestamp, data, "timestamp.json")

    def put_timestamp(self, metadata: Metadata[Timestamp]) -> None:
        """Put `metadata`, and everything it leads to, in force."""
        self._store.put(KIND, "timestamp.json", metadata.to_bytes())

    def bytes_of(self, role: str, version: int) -> bytes:
        """A role's file as published. Raises NotFound."""
        return self._store.get(KIND, f"{version}.{role}.json")

    def meta(self, role: str) -> MetaFile:
        """What a snapshot says of a role's newest file."""
        version = self.newest_version(role)
        data = self.bytes_of(role, version)
        return MetaFile.from_data(version, data, ["sha256"])

    def prune(self) -> None:
        """Forget all but the newest versions of everything but root."""
        versions: dict[str, list[int]] = {}
        for match in map(_FILE.fullmatch, self._store.names(KIND)):
            if match and match[2] != "root":
                versions.setdefault(match[2], []).append(int(match[1]))
        for role, numbers in versions.items():
            for number in sorted(numbers)[:-KEEP_VERSIONS]:
                self._store.remove(KIND, f"{number}.{role}.json")


def signed(metadata: Metadata[S], signers: Sequence[Signer]) -> Metadata[S]:
    """`metadata` with the signatures of `signers` added."""
    for signer in signers:
        metadata.sign(signer, append=True)
    return metadata


def verified(delegator: Root | Targets, role: str, metadata: Metadata[Any]) -> bool:
    """Whether enough of the keys that `delegator` names for `role` have signed."""
    return bool(delegator.get_verification_result(role, metadata.signed_bytes, metadata.signatures))


def require_verified(delegator: Root | Targets, role: str, metadata: Metadata[Any]) -> None:
    """Raise SignatureInvalid unless `verified`."""
    result = delegator.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
    if not result:
        found = len(result.signed)
        raise SignatureInvalid(f"{role}: expected {result.threshold} signature(s) by its keys, found {found}")


def parsed(kind: type[S], data: bytes, what: str) -> Metadata[S]:
    """Bytes as metadata of one kind. Raises Malformed."""
    try:
        metadata = Metadata[S].from_bytes(data)
    except RepositoryError as error:
        raise Malformed(f"{what}: {error}") from None
    inside: Signed = metadata.signed
    if not isinstance(inside, kind):
        raise Malformed(f"{what}: expected {kind.type} metadata, found {inside.type}")
    return metadata


def date(seconds: float) -> datetime:
    """Unix seconds as TUF dates."""
    return datetime.fromtimestamp(int(seconds), UTC)
