"""Where a region's versions come from.

The region follows the retained, signed plans of its tenants. What a plan names is fetched from the coordinator once
(manifest, delivery, sealed blobs), kept in the region's own store, taken only if the repository vouches for it
(`Vouching`) and `model_delta.release` has checked it, and opened. So the region goes on answering when broker and
coordinator are away, and also after its own restart: the last accepted plan with its trust state, which versions were
vouched for, the sealed blobs and the artifact keys are on disk. A key is kept sealed (HPKE) to the region's own X25519
key and asked for again only when that copy is missing or does not open.

A plan stays in force until a newer one arrives: its expiry guards what arrives, not what runs. A version that was
vouched for may run while nobody can be asked. A manifest's expiry counts whenever the version is loaded.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

import msgspec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from model_delta.digest import digest_of, require_digest, require_match
from model_delta.encoding import pack, unpack
from model_delta.errors import AtollError, Malformed, NotFound, NotVouchedFor, SignatureInvalid, Unavailable, Untrusted
from model_delta.keys.encryption import open_sealed, seal_to
from model_delta.manifest import Delivery, Manifest
from model_delta.patch.route import Route, plan_update
from model_delta.plan import RolloutPlan
from model_delta.release import open_release
from model_delta.store import ArtifactStore
from model_delta.topics import StoreKind, plan_topic
from model_delta.trust.updater import TrustAnchors, TrustState, accept_plan, check_release, read_manifest
from model_delta.version import show
from regional_gateway.pool import OpenModel, Pool, Version, open_version
from regional_gateway.protocol import UnknownModel
from regional_gateway.routing import wanted

log = logging.getLogger(__name__)

Fetch = Callable[[StoreKind, str], Awaitable[bytes]]
"""One stored object from the coordinator. Raises NotFound, Unavailable."""

ArtifactKey = Callable[[str], Awaitable[bytes]]
"""The artifact key of a manifest digest, from the coordinator. Raises Untrusted, Unavailable."""

KIND_PLAN = "plan"
KIND_KEY = "key"
KIND_VOUCHED = "vouched"
MODELS_MAX = 1_024
PLAN_BYTES_MAX = 256 * 1024
FETCHES_AT_ONCE = 4
RETRY_SECONDS_FIRST = 0.5
RETRY_SECONDS_MAX = 15.0


class Link(Protocol):
    """The connection to the broker."""

    @property
    def connected(self) -> bool:
        """Whether the broker is there now."""

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Hand over at QoS 1. Raises Unavailable after its deadline."""

    def subscribe(self, topic_filter: str, handler: Callable[[str, bytes], None]) -> None:
        """Call `handler` in the event loop for every message; renewed on every reconnect."""


class Vouching(Protocol):
    """Who says which versions of a tenant may run, and whose signature its plans need."""

    @property
    def anchors(self) -> TrustAnchors:
        """The tenant's role keys, as they were last heard of."""

    async def refresh(self) -> None:
        """Hear what is new. Raises Unavailable."""

    async def require(self, manifest: Manifest) -> None:
        """Return if `manifest` is vouched for now. Raises NotVouchedFor, Unavailable."""


class Followed(msgspec.Struct, frozen=True):
    """The plan in force, as it is kept on disk: whose it is, its envelope, when it was accepted, and the trust state
    after it."""

    tenant: str
    model: str
    envelope: bytes
    accepted: float
    state: TrustState


class Supply:
    """Follows the plans of the tenants in `vouching` and keeps `pool` able to answer with the versions they name.

    `store` holds what was fetched, and in kinds of its own the plans and the sealed keys. `clock` is Unix seconds.
    """

    def __init__(
        self,
        *,
        store: ArtifactStore,
        link: Link,
        vouching: Mapping[str, Vouching],
        fetch: Fetch,
        artifact_key: ArtifactKey,
        open_model: OpenModel,
        sealing: X25519PrivateKey,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._link, self._vouching = store, link, vouching
        self._fetch, self._artifact_key, self._open_model = fetch, artifact_key, open_model
        self._sealing, self._clock = sealing, clock
        self._plans: dict[tuple[str, str], RolloutPlan] = {}
        self._followed: dict[tuple[str, str], Followed] = {}
        self._arrived: dict[tuple[str, str], bytes] = {}
        self._news = asyncio.Event()
        self._changed = asyncio.Event()
        self._advancing = asyncio.Lock()
        self.pool = Pool(self._load)

    def plan(self, tenant: str, model: str) -> RolloutPlan | None:
        """The plan in force, or None if none was ever accepted."""
        return self._plans.get((tenant, model))

    def plans(self, tenant: str = "") -> tuple[RolloutPlan, ...]:
        """The plans in force, of one tenant or ("") of all."""
        return tuple(plan for plan in self._plans.values() if tenant in ("", plan.tenant))

    def ready(self) -> bool:
        """Whether there is a plan and the region can answer for every one: its versions are in memory, or (while a
        canary is still loading) at least the stable one."""
        return bool(self._plans) and all(
            any(self.pool.get(digest) is not None for digest in wanted(plan)[:1]) for plan in self._plans.values()
        )

    async def run(self) -> None:
        """Follow the plans until cancelled. A plan that is refused changes nothing; what cannot be had is retried."""
        await asyncio.to_thread(self._restore)
        self._changed.set()
        for tenant in self._vouching:
            self._link.subscribe(plan_topic(tenant, "+"), self._on_plan)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._accept_arrivals(), name="accept plans")
                tasks.create_task(self._keep_loaded(), name="keep versions loaded")
        finally:
            await self.pool.close()

    def _on_plan(self, topic: str, payload: bytes) -> None:
        tenant, model = topic.split("/")[3], topic.rpartition("/")[2]
        key = (tenant, model)
        models = self._followed.keys() | self._arrived.keys()
        if len(payload) > PLAN_BYTES_MAX or (key not in models and len(models) >= MODELS_MAX):
            log.warning("plan of %s/%s refused: larger than %d bytes, or too many models", *key, PLAN_BYTES_MAX)
            return
        if payload and tenant in self._vouching:
            self._arrived[key] = payload
            self._news.set()

    async def _accept_arrivals(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            arrived, self._arrived = self._arrived, {}
            for key, envelope in arrived.items():
                try:
                    await self._accept(key, envelope)
                except AtollError as error:
                    log.warning("plan of %s/%s refused: %s", *key, error)

    async def _accept(self, key: tuple[str, str], envelope: bytes) -> None:
        tenant, model = key
        known = self._followed.get(key)
        if known is not None and known.envelope == envelope:
            return  # a retained message returns on every reconnect
        now = self._clock()
        vouching = self._vouching[tenant]
        try:
            accept_plan(envelope, model, vouching.anchors, TrustState(), now)
        except SignatureInvalid:
            await vouching.refresh()  # the keys may be new
        async with self._advancing:
            known = self._followed.get(key)
            state = known.state if known else TrustState()
            plan, state = accept_plan(envelope, model, vouching.anchors, state, now)
            await self._keep(Followed(tenant, model, envelope, now, state))
        self._plans[key] = plan
        self._changed.set()

    async def _raise_floor(self, key: tuple[str, str], floor: int) -> None:
        """A version of release `floor` is taken: none older is, from now on."""
        async with self._advancing:
            followed = self._followed[key]
            if floor > followed.state.release_floor:
                raised = msgspec.structs.replace(followed.state, release_floor=floor)
                await self._keep(msgspec.structs.replace(followed, state=raised))

    async def _keep(self, followed: Followed) -> None:
        """Store durably, then believe: a power cut between repeats a step and forgets none. Under the lock: a floor
        written next to a newer plan would bring the older one back."""
        key = (followed.tenant, followed.model)
        # Models may have names that no file can have, so the file is named by their digest.
        await asyncio.to_thread(self._store.put, KIND_PLAN, digest_of(pack(key)), pack(followed))
        self._followed[key] = followed

    async def _keep_loaded(self) -> None:
        pause = RETRY_SECONDS_FIRST
        while True:
            await self._changed.wait()
            self._changed.clear()
            needed = [digest for plan in self._plans.values() for digest in wanted(plan)]
            self.pool.keep_only(needed)
            complete = True
            for digest in needed:
                try:
                    await self.pool.ready(digest, wait_seconds=60.0)
                except AtollError as error:
                    # Untrusted too is asked again: the next plan, or a repaired object, may bring another answer.
                    complete = False
                    log.warning("version %s: %s", digest[:12], error)
            if complete:
                pause = RETRY_SECONDS_FIRST
                continue
            try:
                async with asyncio.timeout(pause):
                    await self._changed.wait()
                pause = RETRY_SECONDS_FIRST
            except TimeoutError:
                self._changed.set()
                pause = min(2 * pause, RETRY_SECONDS_MAX)

    async def _load(self, digest: str) -> Version:
        """Fetch, check and open one version that a plan in force names."""
        key = next((key for key, plan in self._plans.items() if digest in wanted(plan)), None)
        if key is None:
            raise UnknownModel(f"version {digest[:12]}: expected one that a plan in force names")
        plan = self._plans[key]
        envelope = await self._obtain("manifest", digest)
        manifest = read_manifest(envelope, digest, key[0], self._clock())
        await self._require(digest, manifest)
        state = check_release(manifest, plan, self._followed[key].state)
        delivery = unpack(await self._obtain("delivery", digest), Delivery)
        route = plan_update({}, manifest, {digest: delivery})
        blobs = await self._obtain_all([blob.digest for step in route.steps for blob in step.blobs])
        artifact_key = await self._key(digest)
        version = await asyncio.to_thread(self._open, digest, manifest, route, blobs, artifact_key)
        await self._raise_floor(key, state.release_floor)
        return version

    async def _require(self, digest: str, manifest: Manifest) -> None:
        """Return if the repository vouches for a version, or did when it was last heard. Raises NotVouchedFor (which
        counts from then on, whoever falls silent), Unavailable."""
        try:
            await self._vouching[manifest.tenant].require(manifest)
        except Unavailable:
            if not await asyncio.to_thread(self._store.has, KIND_VOUCHED, digest):
                raise
        except NotVouchedFor:
            await asyncio.to_thread(self._store.remove, KIND_VOUCHED, digest)
            raise
        else:
            await asyncio.to_thread(self._store.put, KIND_VOUCHED, digest, b"vouched for")

    def _open(self, digest: str, manifest: Manifest, route: Route, blobs: Mapping[str, bytes], key: bytes) -> Version:
        file = open_release(manifest, route, blobs, {digest: key})
        name = f"{show(manifest.version)}@{digest[:12]}"
        return open_version(digest, name, manifest, file, self._open_model, time.perf_counter)

    async def _obtain(self, kind: StoreKind, name: str) -> bytes:
        """An object from the region's store, fetched first if need be. Only what is named by its digest is checked."""
        require_digest(name, kind)
        if await asyncio.to_thread(self._store.has, kind, name):
            return await asyncio.to_thread(self._store.get, kind, name)
        data = await self._fetch(kind, name)
        if kind in ("blob", "artifact"):
            require_match(data, name, f"{kind} {name[:12]}")
        await asyncio.to_thread(self._store.put, kind, name, data)
        return data

    async def _obtain_all(self, names: Sequence[str]) -> dict[str, bytes]:
        """Blobs by digest; a few are fetched at once."""
        gate = asyncio.Semaphore(FETCHES_AT_ONCE)
        blobs: dict[str, bytes] = {}

        async def one(name: str) -> None:
            async with gate:
                blobs[name] = await self._obtain("blob", name)

        for failure in await asyncio.gather(*map(one, names), return_exceptions=True):
            if failure is not None:
                raise failure
        return blobs

    async def _key(self, digest: str) -> bytes:
        context = b"atoll region key " + digest.encode()
        try:
            return open_sealed(self._sealing, await asyncio.to_thread(self._store.get, KIND_KEY, digest), context)
        except NotFound:
            pass
        except (Untrusted, Malformed) as error:
            log.warning("kept key of version %s: %s; asking for it again", digest[:12], error)
        key = await self._artifact_key(digest)
        sealed = seal_to(self._sealing.public_key().public_bytes_raw(), key, context)
        await asyncio.to_thread(self._store.put, KIND_KEY, digest, sealed)
        return key

    def _restore(self) -> None:
        """Take up the plans that were in force before a restart, verified as of the time they were accepted."""
        for name in self._store.names(KIND_PLAN):
            try:
                followed = unpack(self._store.get(KIND_PLAN, name), Followed)
                vouching = self._vouching.get(followed.tenant)
                if vouching is None:
                    continue
                anchors, accepted = vouching.anchors, followed.accepted
                plan, _ = accept_plan(followed.envelope, followed.model, anchors, followed.state, accepted)
            except AtollError as error:
                log.warning("kept plan %s: %s; waiting for a newer one", name[:12], error)
                continue
            key = (followed.tenant, followed.model)
            self._followed[key], self._plans[key] = followed, plan
