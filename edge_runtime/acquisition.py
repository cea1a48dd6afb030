"""From a version's digest to its checked file, with as few bytes as may be.

The manifest is fetched and believed first, then the delivery says which blobs there are, then the cheapest route from
what the device holds is walked: a patch, a chain of patches, the segments that no file here has, or the whole. A file
that is damaged or was changed is no base, but its whole segments count: a device with a spoilt sector fetches the
segments it stands in. A route that turns out spoilt (a patch that does not open, a base that is not what it seemed) is
given up for the whole segments. Nothing here changes what runs.

The new file is made from files, beside the inactive slot's, in a thread: payments are answered meanwhile, and memory
does not grow with the model. Whether it fits is known before the first byte is fetched; if only the inactive slot's old
version is in the way, that goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Mapping

import msgspec

from edge_runtime.direction import Direction, held_files
from edge_runtime.fetching import Fetcher
from edge_runtime.slots import SLOTS, InstalledVersion, SlotName, SlotRoom, Slots
from edge_runtime.vouching import Vouching
from model_delta.assembly import MemoryRoom, Room, check_file, is_finished, pieces_of, root_of, write_release
from model_delta.encoding import unpack
from model_delta.errors import AtollError, Malformed, NotFound, StorageFull, Unavailable
from model_delta.manifest import Delivery, Manifest, late_delivery_name, manifest_digest
from model_delta.patch.access import BytesAccess, RandomAccess, require_match_at
from model_delta.patch.route import NO_LIMITS, DeviceLimits, LinkCosts, Route, plan_update
from model_delta.plan import RolloutPlan
from model_delta.release import with_offers
from model_delta.trust.director import HeldFile
from model_delta.trust.updater import TrustState, check_release, read_manifest

CHAIN_VERSIONS_MAX = 8
CACHE_QUESTIONS_MAX = 32

_log = logging.getLogger(__name__)


class Acquired(msgspec.Struct, frozen=True):
    """A version whose file is in the inactive slot's room, to be installed (or `stands` there already), the route taken
    ("none" for one that an interrupted attempt had finished), and the trust state to store before it is switched to."""

    envelope: bytes
    stands: bool
    route: str
    trust: TrustState


class Held(msgspec.Struct, frozen=True):
    """What is at hand: complete files by manifest digest, plain segments by their own, and the manifests of all files
    that stand in the slots, damaged ones too."""

    files: dict[str, RandomAccess]
    pieces: dict[str, RandomAccess]
    manifests: dict[str, Manifest]


class Acquisition:
    """Brings versions for one device. `received` hears of every blob, so that the byte count survives a power cut, and
    `chosen` of the route before its file is made. `limits`: what the device can apply and hold; `cached_cost`: what a
    byte that the region's mirror has already costs, when one from its origin costs 1 (1 where the device's own link is
    what is dear: then nobody is asked). `direction`: whom to ask for a route first."""

    def __init__(
        self,
        *,
        slots: Slots,
        fetcher: Fetcher,
        tenant: str,
        vouching: Vouching,
        clock: Callable[[], float],
        received: Callable[[], None],
        chosen: Callable[[str], None],
        limits: DeviceLimits = NO_LIMITS,
        cached_cost: float = 1.0,
        direction: Direction | None = None,
    ) -> None:
        self._slots, self._fetcher = slots, fetcher
        self._tenant, self._vouching = tenant, vouching
        self._clock, self._received, self._chosen = clock, received, chosen
        self._limits, self._cached_cost = limits, cached_cost
        self._direction = direction

    async def bring(self, target: str, plan: RolloutPlan, trust: TrustState) -> Acquired:
        """The version `target`, which `plan` asks for. Raises Unavailable (later may be better) and Untrusted or
        Malformed (never)."""
        inactive = self._slots.inactive()
        present = self._slots.installed(inactive)
        if present is not None and present.digest == target:
            manifest = await self._vouched_for(present.envelope, target)
            trust = check_release(manifest, plan, trust)
            with contextlib.suppress(AtollError):  # damaged on disk: what is whole of it is a start
                check_file(manifest, self._slots.read(present))
                return Acquired(present.envelope, True, "none", trust)
        envelope = await self._fetcher.object("manifest", target)
        manifest = await self._vouched_for(envelope, target)
        trust = check_release(manifest, plan, trust)
        room = self._slots.room(inactive)
        room.adopt(target)
        if await asyncio.to_thread(is_finished, manifest, room.read(target)):
            return Acquired(envelope, False, "none", trust)
        try:
            held = await asyncio.to_thread(self._held)
            route = await self._as_directed(manifest, held, room)
            route = route or await self._by_cheapest(target, manifest, held, room)
        except StorageFull:
            if present is None:
                raise
            active = await asyncio.to_thread(self._held, self._slots.pointer())
            route = await self._by_cheapest(target, manifest, active, room, given_up=present)
        return Acquired(envelope, False, route.kind, trust)

    async def file_of(self, target: str, also_held: Mapping[str, bytes]) -> bytes:
        """The checked file of a version that is read (trained from), not run, in memory; `also_held` are files by
        digest that are at hand beside those in the slots. Raises as `bring`."""
        held, room = await asyncio.to_thread(self._held), MemoryRoom()
        held.files.update({digest: BytesAccess(file) for digest, file in also_held.items()})
        file = held.files.get(target)
        if file is None:
            await self._by_cheapest(target, await self._believed(target), held, room)
            file = room.read(target)
        if file is None:
            raise NotFound(f"version {target[:16]}…: its file was not made")
        return file.pread(0, file.size)

    def held_files(self) -> tuple[HeldFile, ...]:
        """What stands in the slots, as the device tells it. Blocking: the files are read."""
        return self._told(self._held())

    def _told(self, held: Held) -> tuple[HeldFile, ...]:
        return held_files(held.manifests, held.files, held.pieces, self._root_there)

    def _root_there(self, digest: str) -> str:
        """The Merkle root of the file of a version in the slots as it stands; zeros when it cannot be read."""
        for version in map(self._slots.installed, SLOTS):
            if version is not None and version.digest == digest:
                with contextlib.suppress(AtollError):
                    return root_of(version.manifest, self._slots.read(version))
        return "0" * 64

    async def _as_directed(self, manifest: Manifest, held: Held, room: Room) -> Route | None:
        """The director's route, walked; None when there is none, or when it does not lead to the version: then the
        device plans for itself. Raises Unavailable where that would not help either."""
        if self._direction is None:
            return None
        route = await self._direction.route(
            manifest,
            held=await asyncio.to_thread(self._told, held),
            files=held.files,
            pieces=held.pieces,
            manifests=held.manifests,
            at_hand=self._slots.complete_blobs(),
        )
        if route is None:
            return None
        try:
            await self._walk(manifest, route, held, room, None)
        except AtollError as error:
            if isinstance(error, Unavailable) and not isinstance(error, NotFound):
                raise
            self._direction.failed(f"its {route.kind} route to {manifest_digest(manifest)[:12]} failed: {error}")
            return None
        return route

    async def _by_cheapest(
        self, target: str, manifest: Manifest, held: Held, room: Room, *, given_up: InstalledVersion | None = None
    ) -> Route:
        """Make the target's file in `room`; the route that was taken. `given_up`: what may go to make room for it."""
        deliveries = await self._ways_to(target, held)
        route = plan_update(
            {digest: file.size for digest, file in held.files.items()},
            manifest,
            deliveries,
            pieces=held.pieces,
            manifests=held.manifests,
            costs=await self._costs(deliveries, set(held.files)),
            limits=self._limits,
        )
        try:
            await self._walk(manifest, route, held, room, given_up)
            return route
        except AtollError as error:
            if isinstance(error, Unavailable) and not isinstance(error, NotFound):
                raise
            try:
                whole = plan_update({}, manifest, {target: deliveries[target]}, limits=self._limits)
            except NotFound:  # the whole does not fit this device
                raise error from None
            if whole == route:
                raise
            _log.warning("%s route to %s failed (%s): taking the whole", route.kind, target[:12], error)
            await self._walk(manifest, whole, Held({}, {}, {}), room, given_up)
            return whole

    async def _walk(
        self, manifest: Manifest, route: Route, held: Held, room: Room, given_up: InstalledVersion | None
    ) -> None:
        manifests = {
            step.target: held.manifests.get(step.target) or await self._believed(step.target)
            for step in route.steps[:-1]
        }
        if isinstance(room, SlotRoom):
            self._make_room(manifest, route, manifests, room, given_up)
            self._chosen(route.kind)
        keys = {step.target: await self._fetcher.artifact_key(step.target) for step in route.steps}
        blobs = {}
        for step in route.steps:
            for blob in step.blobs:
                blobs[blob.digest] = await self._fetcher.blob(blob)
                self._received()
        await _in_thread(
            lambda interrupted: write_release(
                manifest,
                route,
                blobs,
                keys,
                room,
                held=held.files,
                manifests=manifests,
                pieces=held.pieces,
                interrupted=interrupted,
            )
        )

    def _make_room(
        self,
        manifest: Manifest,
        route: Route,
        between: Mapping[str, Manifest],
        room: SlotRoom,
        given_up: InstalledVersion | None,
    ) -> None:
        """Raise StorageFull unless everything fits that is yet to be written: the rest of the blobs, the largest patch
        once more (opened), and the files, of which two in a row stand here at a time."""
        blobs = {blob.digest: blob.size for step in route.steps for blob in step.blobs}
        patches = [step.blobs[0].size for step in route.steps if step.kind == "patch"]
        sizes = [between[step.target].size for step in route.steps[:-1]] + [manifest.size]
        pairs = [sum(sizes[max(0, index - 1) : index + 1]) for index in range(len(sizes))]
        here = sum(room.size(step.target) for step in route.steps)
        needed = sum(max(0, size - self._slots.received(digest)) for digest, size in blobs.items())
        needed += max(patches, default=0) + max(0, max(pairs) - here)
        freed = 0 if given_up is None else self._slots.read(given_up).size
        self._slots.require_room(needed - freed, f"version {manifest_digest(manifest)[:12]} of {manifest.model}")
        if given_up is not None:
            self._slots.clear_slot(given_up.slot)

    async def _costs(self, deliveries: Mapping[str, Delivery], bases: set[str]) -> LinkCosts:
        """What the blobs cost here. The mirror is asked what it has only where that makes a difference, and only about
        patches: of the whole it has either all or, for a device, nothing of use."""
        at_hand = self._slots.complete_blobs()
        if self._cached_cost == 1.0:
            return LinkCosts(at_hand=at_hand)
        offers = [offer for delivery in deliveries.values() for offer in delivery.offers]
        near = [offer.blob for offer in offers if offer.base in deliveries or offer.base in bases][:CACHE_QUESTIONS_MAX]
        return LinkCosts(cached=self._cached_cost, in_region=await self._fetcher.in_region(near), at_hand=at_hand)

    def _held(self, *slots: SlotName | None) -> Held:
        """What the slots hold, both unless named; of a file that is not what its manifest says, the segments that are.
        Where both have a segment it is the active slot's."""
        held = Held({}, {}, {})
        for slot in slots or (self._slots.inactive(), self._slots.pointer()):
            version = self._slots.installed(slot)
            if version is None:
                continue
            with contextlib.suppress(AtollError):
                file = self._slots.read(version)
                held.pieces.update(pieces_of(version.manifest, file))
                held.manifests[version.digest] = version.manifest
                require_match_at(file, version.manifest.file_digest, f"model file of slot {slot}")
                held.files[version.digest] = file
        return held

    async def _ways_to(self, target: str, held: Held) -> dict[str, Delivery]:
        """The target's delivery; unless a patch there starts from a file at hand, a direct patch made for late devices
        and the deliveries of the versions its patches start from: stepping stones of a chain (these also where hops may
        be cached near by). Deliveries are small and believed by nobody; a stone's manifest is fetched, and judged, only
        when the route goes over it."""
        deliveries = {target: await self._delivery(target)}
        files = set(held.files)
        if files.isdisjoint(_bases(deliveries[target])):
            deliveries[target] = await self._with_late_patches(deliveries[target], files)
        edge = [target]
        while edge and (files or held.manifests):
            bases = _bases(deliveries[edge.pop(0)])
            if not files.isdisjoint(bases) and self._cached_cost == 1.0:
                break  # where every byte costs the same, two hops do not beat a direct patch
            for base in bases:
                if base in deliveries or len(deliveries) >= CHAIN_VERSIONS_MAX:
                    continue
                try:
                    deliveries[base] = await self._delivery(base)
                except NotFound:  # gone: this way is closed, others are not
                    continue
                edge.append(base)
        return deliveries

    async def _with_late_patches(self, delivery: Delivery, files: set[str]) -> Delivery:
        for base in sorted(files):
            with contextlib.suppress(NotFound, Malformed):
                late = await self._delivery(late_delivery_name(delivery.manifest, base))
                if late.manifest == delivery.manifest:
                    delivery = with_offers(delivery, late)
        return delivery

    async def _believed(self, digest: str) -> Manifest:
        """The manifest of a version on the way. Raises as `read_manifest` and `Vouching.require`."""
        return await self._vouched_for(await self._fetcher.object("manifest", digest), digest, patient=False)

    async def _vouched_for(self, envelope: bytes, digest: str, *, patient: bool = True) -> Manifest:
        """The manifest in `envelope`, if the repository vouches for it now."""
        manifest = read_manifest(envelope, digest, self._tenant, self._clock())
        await self._vouching.require(manifest, patient=patient)
        return manifest

    async def _delivery(self, digest: str) -> Delivery:
        return unpack(await self._fetcher.object("delivery", digest), Delivery)


def _bases(delivery: Delivery) -> list[str]:
    """What a version's patches start from, in the order of its delivery."""
    return list(dict.fromkeys(offer.base for offer in delivery.offers))


async def _in_thread(work: Callable[[Callable[[], bool]], object]) -> None:
    """Do blocking `work` beside the event loop. It is told when the caller is cancelled, and has ended when this has:
    two writers in one room would be one too many."""
    cancelled = threading.Event()
    task = asyncio.create_task(asyncio.to_thread(work, cancelled.is_set))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        cancelled.set()
        await asyncio.gather(task, return_exceptions=True)
        raise
