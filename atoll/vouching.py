"""The coordinator vouches for its versions: what the ledger has, the TUF repository says.

It compares, at every publication and every few seconds: every version in the ledger that is not withdrawn has a target
REGION/TENANT/MODEL/DIGEST, and nothing else has. So a version that was published before the ceremony, while the
disk was full or just before a crash is vouched for a moment later, and a withdrawn or shredded one is not any more.
Along the way it signs anew what runs out and says which roles people have to renew, or renews those too while their
keys lie in the data folder (see `trust`). Before the ceremony it waits.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from atoll.trust import renew_automatically
from atoll.trust_publishing import Publishing
from model_delta.errors import AtollError, NotFound
from model_delta.store import ArtifactStore
from model_delta.trust.paths import version_path
from model_delta.trust.repository import Target
from model_delta.trust.signing import open_envelope

EVERY_S = 5.0
_log = logging.getLogger("atoll.vouching")


class Release(Protocol):
    """A published version."""

    @property
    def manifest(self) -> str: ...

    @property
    def model(self) -> str: ...


class Releases(Protocol):
    """What the ledger knows of versions."""

    def releases(self, model: str | None = None) -> Sequence[Release]:
        """Every version of `model`, or of all models."""

    def withdrawn(self, model: str) -> Mapping[str, str]:
        """Withdrawn versions of a model by manifest digest."""


class Vouching:
    """Keeps the repository's `region` in step with `ledger`; manifests lie in `store`, the platform's own sticks in
    `folder` if anywhere. `note` is told what people should know; `days_left` and `failing` are for those who measure.
    """

    def __init__(
        self,
        publishing: Publishing,
        ledger: Releases,
        store: ArtifactStore,
        region: str,
        folder: Path,
    ) -> None:
        self._publishing, self._ledger, self._store, self._region = publishing, ledger, store, region
        self._folder = folder
        self.note: Callable[[str], None] = lambda text: None
        self._told: tuple[str, ...] = ()
        self._one_at_a_time = threading.Lock()
        self.failing = ""
        self.days_left: dict[str, float] = {}

    def published(self) -> None:
        """Vouch now for what the ledger has. What fails is logged, and tried again soon."""
        self._compare()

    async def run(self, every_s: float = EVERY_S) -> None:
        """Compare until cancelled. What fails is logged and tried again."""
        while True:
            await asyncio.to_thread(self._compare)
            await asyncio.sleep(every_s)

    def _compare(self) -> None:
        try:
            self.once(time.time())
            self.failing = ""
        except (AtollError, OSError) as error:
            if not self.failing:
                _log.warning("versions are not vouched for: %s", error)
                self.note(f"TUF repository: versions are not vouched for: {error}")
            self.failing = str(error)

    def once(self, now: float) -> tuple[str, ...]:
        """Bring the repository up to date; the roles that people have to renew. `now` in Unix seconds."""
        with self._one_at_a_time:
            return self._once(now)

    def _once(self, now: float) -> tuple[str, ...]:
        try:
            held = self._publishing.vouched(self._region)
        except NotFound as error:
            _log.debug("nothing to vouch by yet: %s", error)
            return ()
        wanted = self._wanted()
        new, old = sorted(wanted.keys() - held), sorted(held - wanted.keys())
        if new or old:
            self._publishing.vouch(self._region, {path: self._target(wanted[path]) for path in new}, now, revoke=old)
            _log.info("vouched for %d version(s), no longer for %d", len(new), len(old))
        due = self._publishing.keep_fresh(now)
        outdated = self._publishing.outdated(self._region)
        if (due or outdated) and renew_automatically(self._publishing, self._folder, self._region, due, now):
            due, outdated = self._publishing.keep_fresh(now), False
        self.days_left = self._publishing.days_left(now)
        if outdated:
            due = (*due, "targets, for the keyring has other keys")
        if due != self._told:
            self._told = due
            if due:
                _log.warning("to be signed by people soon: %s; see `atoll trust status`", ", ".join(due))
                self.note(f"TUF repository: to be signed by people soon: {', '.join(due)}; see `atoll trust status`")
        return due

    def _wanted(self) -> dict[str, str]:
        """Manifest digests by the target paths that should be there."""
        every = self._ledger.releases()
        withdrawn = self._withdrawn(release.model for release in every)
        return {
            version_path(self._region, self._publishing.tenant, release.model, release.manifest): release.manifest
            for release in every
            if release.manifest not in withdrawn
        }

    def _withdrawn(self, models: Iterable[str]) -> set[str]:
        return {digest for model in set(models) for digest in self._ledger.withdrawn(model)}

    def _target(self, digest: str) -> Target:
        return Target(len(open_envelope(self._store.get("manifest", digest)).payload), digest)
