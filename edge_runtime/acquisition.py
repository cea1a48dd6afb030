"""From a version's digest to its checked file, with as few bytes as may be.

The manifest is fetched and believed first, then the delivery says which blobs there are, then the cheapest route from
what the device holds is walked: a patch, a chain of patches, or the whole. A route that turns out spoilt (a patch that
does not open, a base that is not what it seemed) is given up for the whole segments. Nothing here changes what runs.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping

import msgspec

from edge_runtime.fetching import Fetcher
from edge_runtime.slots import Slots
from model_delta.encoding import unpack
from model_delta.errors import AtollError, NotFound, Unavailable
from model_delta.manifest import Delivery, Manifest
from model_delta.patch.route import Route, plan_update
from model_delta.plan import RolloutPlan
from model_delta.release import check_file, open_release
from model_delta.trust.updater import TrustAnchors, TrustState, accept_manifest, check_release

CHAIN_VERSIONS_MAX = 8

_log = logging.getLogger(__name__)


class Acquired(msgspec.Struct, frozen=True):
    """A version ready to be written to a slot (`file` None: it stands there already), the route taken, and the trust
    state to store before it is switched to."""

    envelope: bytes
    file: bytes | None
    route: str
    trust: TrustState


class Acquisition:
    """Brings versions for one device. `received` hears of every blob, so that the byte count survives a power cut."""

    def __init__(
        self,
        *,
        slots: Slots,
        fetcher: Fetcher,
        anchors: TrustAnchors,
        clock: Callable[[], float],
        received: Callable[[], None],
    ) -> None:
        self._slots, self._fetcher, self._anchors = slots, fetcher, anchors
        self._clock, self._received = clock, received

    async def bring(self, target: str, plan: RolloutPlan, trust: TrustState) -> Acquired:
        """The version `target`, which `plan` asks for. Raises Unavailable (later may be better) and Untrusted or
        Malformed (never)."""
        inactive = self._slots.inactive()
        present = self._slots.installed(inactive)
        if present is not None and present.digest == target:
            manifest = accept_manifest(present.envelope, target, self._anchors, self._clock())
            trust = check_release(manifest, plan, trust)
            try:
                check_file(manifest, self._slots.read_file(present))
                return Acquired(present.envelope, None, "none", trust)
            except AtollError:
                self._slots.clear_slot(inactive)  # damaged on disk: fetch it
        envelope = await self._fetcher.object("manifest", target)
        manifest = accept_manifest(envelope, target, self._anchors, self._clock())
        trust = check_release(manifest, plan, trust)
        file, route = await self._by_cheapest(target, manifest, self._held_files())
        return Acquired(envelope, file, route, trust)

    async def file_of(self, target: str, also_held: Mapping[str, bytes]) -> bytes:
        """The checked file of a version that is read (trained from), not run; `also_held` are files by digest that are
        at hand beside those in the slots. Raises as `bring`."""
        held = {**self._held_files(), **also_held}
        if target in held:
            return held[target]
        return (await self._by_cheapest(target, await self._believed(target), held))[0]

    async def _by_cheapest(self, target: str, manifest: Manifest, held: Mapping[str, bytes]) -> tuple[bytes, str]:
        deliveries = await self._ways_to(target, set(held))
        route = plan_update({digest: len(file) for digest, file in held.items()}, manifest, deliveries)
        try:
            return await self._walk(manifest, route, held), route.kind
        except AtollError as error:
            whole = plan_update({}, manifest, {target: deliveries[target]})
            if (isinstance(error, Unavailable) and not isinstance(error, NotFound)) or whole == route:
                raise
            _log.warning("%s route to %s failed (%s): taking the whole", route.kind, target[:12], error)
            return await self._walk(manifest, whole, {}), whole.kind

    async def _walk(self, manifest: Manifest, route: Route, held: Mapping[str, bytes]) -> bytes:
        manifests = {
            step.target: await self._believed(step.target)
            for step in route.steps
            if step.target != route.steps[-1].target
        }
        keys = {step.target: await self._fetcher.artifact_key(step.target) for step in route.steps}
        blobs = {}
        for step in route.steps:
            for blob in step.blobs:
                blobs[blob.digest] = await self._fetcher.blob(blob)
                self._received()
        return open_release(manifest, route, blobs, keys, held=held, manifests=manifests)

    def _held_files(self) -> dict[str, bytes]:
        """The files in both slots that are what their manifests say."""
        held: dict[str, bytes] = {}
        for slot in (self._slots.pointer(), self._slots.inactive()):
            version = self._slots.installed(slot)
            if version is not None:
                with contextlib.suppress(AtollError):
                    held[version.digest] = self._slots.read_file(version)
        return held

    async def _ways_to(self, target: str, held: set[str]) -> dict[str, Delivery]:
        """The target's delivery and, as long as no patch starts from a file at hand, those of the versions its patches
        start from: stepping stones of a chain. Deliveries are small and believed by nobody; a stone's manifest is
        fetched, and judged, only when the route goes over it."""
        deliveries = {target: await self._delivery(target)}
        edge = [target]
        while edge and held:
            bases = [offer.base for offer in deliveries[edge.pop(0)].patches]
            if held & set(bases):
                break
            for base in bases:
                if base in deliveries or len(deliveries) >= CHAIN_VERSIONS_MAX:
                    continue
                try:
                    deliveries[base] = await self._delivery(base)
                except NotFound:  # gone: this way is closed, others are not
                    continue
                edge.append(base)
        return deliveries

    async def _believed(self, digest: str) -> Manifest:
        """The manifest of a version on the way. Raises as `accept_manifest`."""
        envelope = await self._fetcher.object("manifest", digest)
        return accept_manifest(envelope, digest, self._anchors, self._clock())

    async def _delivery(self, digest: str) -> Delivery:
        return unpack(await self._fetcher.object("delivery", digest), Delivery)
