"""What one tenant's devices and regions believe: versions that the repository vouches for, and the tenant's role keys.

A signature of its own makes no version acceptable: `require` accepts a manifest only as a target of the metadata that
is in force now, under the path REGION/TENANT/MODEL/DIGEST of a region that the manifest names: a coordinator that
is taken over makes nobody run what its region's role does not vouch for, and a version that was withdrawn is not
taken any more. The keys of the roles plan, round, baseline and director are a target too (`anchors`): they rotate with
the repository, and the newest that were verified are kept for the time in which no mirror answers. What a holder was
provisioned with counts until then.

A clock that was set back must not make old metadata fresh: `now` is never before the newest time at which something
verified was signed.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack
from model_delta.errors import AtollError, Expired, Malformed, NotVouchedFor, Unavailable, Untrusted
from model_delta.manifest import Manifest
from model_delta.trust.checkin import CheckIn
from model_delta.trust.client import Trust, TrustStatus, judged, write_durably
from model_delta.trust.fetchers import Monotonic, Patience, Source
from model_delta.trust.paths import anchors_path, version_path
from model_delta.trust.updater import TrustAnchors

TIMESTAMP_LIFE_S = 86_400
"""No timestamp is signed for longer (`repository.Expiries`): what expires at T was signed at T - this or later."""
REGIONS_MAX = 32
_ANCHORS = "anchors.cbor"


class Authority:
    """The authority over one tenant, as its holder knows it in `folder`. `refresh` and `require` block, one at a time;
    the others answer at once, also while those wait for a mirror.

    `root` and `anchors` are what the holder was provisioned with, `source` is where TUF files come from. `now` is Unix
    seconds in every call, by the holder's clock.
    """

    def __init__(
        self,
        folder: Path,
        tenant: str,
        root: bytes,
        anchors: TrustAnchors,
        source: Source,
        patience: Patience | None = None,
        monotonic: Monotonic = time.monotonic,
    ) -> None:
        self._tenant, self._path = tenant, folder / _ANCHORS
        self._trust = Trust(folder, root, source, patience=patience, monotonic=monotonic)
        self._one_at_a_time = threading.Lock()
        self._anchors = _kept(self._path, tenant) or anchors
        self._held = self._trust.status(0.0)
        self.problem = ""

    @property
    def anchors(self) -> TrustAnchors:
        """The tenant's role keys, as the repository last had them."""
        return self._anchors

    def now(self, clock: float) -> float:
        """The time, which cannot be before the newest time that something verified was signed at."""
        return max(clock, float(self._held.expires - TIMESTAMP_LIFE_S))

    def check_in(self, request: int) -> bytes:
        """The question for a mirror; hand its answer to `refresh`."""
        return pack(CheckIn(request, self._held.root, self._held.timestamp))

    def refresh(self, now: float, answer: bytes | None = None) -> TrustStatus:
        """Learn what is newest; see `Trust.refresh` for what it raises. What was wrong is kept in `problem`."""
        with self._one_at_a_time:
            try:
                status = self._trust.refresh(self.now(now), answer)
                self._learn_anchors(self.now(now))
            except (Untrusted, Malformed) as error:
                self.problem = str(error)
                raise
            finally:
                self._held = self._trust.status(self.now(now))
            self.problem = ""
            return status

    def status(self, now: float) -> TrustStatus:
        """Where the holder stands, without asking anybody."""
        return judged(self._held, self.now(now))

    def alarm(self, now: float) -> str:
        """What a person should know: news held back for longer than the grace, or metadata that does not verify; ""
        when there is nothing."""
        status = self.status(now)
        return status.alarm if status.state == "frozen" else self.problem

    def require(self, manifest: Manifest, now: float) -> None:
        """Return if the repository vouches for `manifest` now, by the role of a region that it names.

        Raises NotVouchedFor; Unavailable while nothing can be known (no refresh succeeded yet, or the timestamp ran
        out).
        """
        payload = pack(manifest)
        digest = digest_of(payload)
        if manifest.tenant != self._tenant:
            raise NotVouchedFor(f"version {digest[:16]}…: expected tenant {self._tenant!r}, found {manifest.tenant!r}")
        with self._one_at_a_time:
            for region in sorted(manifest.version)[:REGIONS_MAX]:
                try:
                    path = version_path(region, manifest.tenant, manifest.model, digest)
                    target = self._trust.target(path, self.now(now))
                except Expired as error:
                    raise Unavailable(f"version {digest[:16]}…: {error}") from None
                except (Untrusted, Malformed):
                    continue
                if (target.length, target.digest) == (len(payload), digest):
                    return
        regions = ", ".join(sorted(manifest.version)[:REGIONS_MAX]) or "no region"
        raise NotVouchedFor(f"version {digest[:16]}… of {manifest.model}: no role of {regions} vouches for it")

    def _learn_anchors(self, now: float) -> None:
        """Take over role keys that changed. A repository that names none leaves those that are known."""
        try:
            target = self._trust.target(anchors_path(self._tenant), now)
        except Untrusted:
            return
        if target.digest != digest_of(pack(self._anchors)):
            found = self._trust.anchors(self._tenant, now)
            write_durably(self._path, pack(found))
            self._anchors = found


def _kept(path: Path, tenant: str) -> TrustAnchors | None:
    try:
        found = unpack(path.read_bytes(), TrustAnchors)
    except (OSError, AtollError):
        return None
    return found if found.tenant == tenant else None
