"""Tells each device how to get to the version that its rollout plan gives it.

A device that is due signs what it has (`VersionReport`); the answer is a `DevicePlan` for it alone: the cheapest steps
within its limits, made with more knowledge than a device has. The director sees all deliveries at once, so a device
fetches none; it makes a direct patch on the spot for a device whose base has none; and it knows which blobs it has sent
other devices of a region for, so that what lies in the mirror already is preferred where it is cheaper.

Nothing depends on an answer: a device that hears none in time plans for itself from the deliveries (see
`edge_runtime.direction`), so this part may be slow, dropped or switched off. What a device reported and was told is in
the ledger before it is sent, so that no counter is taken twice and no serial given twice after a kill.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping

import msgspec

from fl_coordinator.inbox import Inbox
from fl_coordinator.ledger import Ledger
from fl_coordinator.ports import Clock, Link, Note
from fl_coordinator.publishing import Publisher
from fl_coordinator.tables.records import DeviceRecord, Directed
from model_delta import topics
from model_delta.encoding import pack, unpack
from model_delta.errors import AtollError, Malformed, NotFound, Unavailable, Untrusted
from model_delta.keys.certificates import device_keys_of
from model_delta.keys.keyring import Keyring
from model_delta.manifest import Delivery, Manifest, late_delivery_name
from model_delta.patch.route import DeviceLimits, LinkCosts, Route, plan_update
from model_delta.plan import RolloutPlan, assign
from model_delta.release import with_offers
from model_delta.trust.director import (
    DEVICE_PLAN_TYPE,
    PLAN_LIFETIME_S,
    ROLE_DIRECTOR,
    DevicePlan,
    HeldFile,
    VersionReport,
    accept_version_report,
    chosen,
)
from model_delta.trust.signing import open_envelope, seal_envelope
from monitoring.metrics import Metrics

QUEUE_MAX = 4_096
REPORT_BYTES_MAX = 65_536
BATCH_MAX = 64
COMPOSE_BYTES_MAX = 32 << 20
"""Up to which file size a direct patch is made while the device waits (about half a second); larger ones come later."""
CHAIN_VERSIONS_MAX = 8
REGION_BLOBS_MAX = 4_096
MANIFESTS_MAX = 32
"""How many manifests stay parsed: a fleet that is due asks for the same few, one device after the other."""

_log = logging.getLogger("atoll.coordinator")


class Answered(msgspec.Struct, frozen=True):
    """What one report leads to: the answer (None when nothing was asked), and what the ledger keeps of it."""

    device_id: str
    answer: topics.PlanAnswer | None
    record: Directed | None
    verdict: str


class Director:
    """An inbox and what is done with each report. For one event loop; blocking work runs in a thread.

    `want_direct` has a direct patch made later: from one version to another.
    """

    def __init__(
        self,
        *,
        tenant: str,
        ledger: Ledger,
        keyring: Keyring,
        link: Link,
        publisher: Publisher,
        metrics: Metrics,
        clock: Clock,
        note: Note,
        want_direct: Callable[[str, str], None],
    ) -> None:
        self.inbox = Inbox(
            messages_max=QUEUE_MAX, per_device_max=4, message_bytes_max=REPORT_BYTES_MAX, bytes_max=16 << 20
        )
        self._tenant, self._ledger, self._keyring, self._link = tenant, ledger, keyring, link
        self._publisher, self._clock, self._note, self._want_direct = publisher, clock, note, want_direct
        self._manifest = functools.lru_cache(MANIFESTS_MAX)(publisher.manifest)
        self._later: list[tuple[str, str]] = []
        self._in_region: dict[str, OrderedDict[str, None]] = {}
        self._count = metrics.counter(
            "version_reports", "Version reports of devices, by what came of them.", ("verdict",)
        )

    def recall(self) -> None:
        """Take up from the ledger what regions were sent, once, at the start. Blocking."""
        regions = {device.device_id: device.region for device in self._ledger.devices()}
        for known in self._ledger.all_directed():
            if known.plan and known.device_id in regions:
                plan = unpack(open_envelope(known.plan).payload, DevicePlan)
                self._sent(regions[known.device_id], plan)

    async def answer(self) -> None:
        """Answer the reports that have arrived; waits for one."""
        batch = [await self.inbox.get()]
        while len(batch) < BATCH_MAX and not self.inbox.empty():
            batch.append(self.inbox.get_nowait())
        answers = await asyncio.to_thread(self._answer_all, batch)
        while self._later:
            self._want_direct(*self._later.pop())
        for answered in answers:
            self._count.add(1, answered.verdict)
            if answered.answer is not None:
                with contextlib.suppress(Unavailable):  # a device that hears nothing plans for itself
                    await self._link.publish(topics.down(answered.device_id, "plan"), pack(answered.answer))

    def _answer_all(self, batch: list[tuple[str, bytes]]) -> list[Answered]:
        """Answers in order, after what they promise is durable. Two reports of one device see each other."""
        fresh: dict[str, dict[str, Directed]] = {}
        answers = []
        for topic, data in batch:
            device_id = topics.device_of(topic)
            known = fresh.get(device_id) or self._ledger.directed(device_id)
            try:
                answered = self._answer_one(device_id, data, known)
            except AtollError as error:
                _log.warning("version report on the line of %s refused: %s", device_id, error)
                answered = Answered(device_id, None, None, f"refused: {type(error).__name__}")
            if answered.record is not None:
                fresh[device_id] = {**known, answered.record.model: answered.record}
            answers.append(answered)
        self._ledger.save_directed(one.record for one in answers if one.record is not None)
        return answers

    def _answer_one(self, device_id: str, data: bytes, known: Mapping[str, Directed]) -> Answered:
        now = self._clock()
        device = self._ledger.device(device_id)
        name, verifying, _ = device_keys_of(device.certificate, self._keyring.ca_pem(), now, self._keyring.revoked())
        if name != device_id:
            raise Untrusted(f"version report on the line of {device_id}: its certificate names {name[:64]!r}")
        seen = {model: record.counter for model, record in known.items()}
        report = accept_version_report(data, self._tenant, device_id, verifying, seen, now)
        newest = self._ledger.plan(report.model)
        if newest is None:
            raise NotFound(f"version report of {device_id}: no plan of {report.model[:64]!r} was issued")
        before = known.get(report.model)
        self._hear_alarm(device_id, report, before)
        record = Directed(
            device_id=device_id,
            model=report.model,
            counter=report.counter,
            serial=before.serial if before is not None else 0,
            heard=now,
            report=data,
            plan=before.plan if before is not None else b"",
        )
        if not report.wanted:
            return Answered(device_id, None, record, "told")
        serial, envelope = newest
        rollout = envelope if report.plan_serial < serial else b""
        try:
            plan = self._plan(device, report, unpack(open_envelope(envelope).payload, RolloutPlan), record.serial, now)
            sealed = seal_envelope(self._keyring.sign(ROLE_DIRECTOR, DEVICE_PLAN_TYPE, pack(plan)))
        except AtollError as error:
            _log.info("no device plan for %s: %s", device_id, error)
            refusal = topics.PlanAnswer(report.nonce, b"", rollout, str(error)[:500])
            return Answered(device_id, refusal, record, "no plan")
        self._sent(device.region, plan)
        record = msgspec.structs.replace(record, serial=plan.serial, plan=sealed)
        return Answered(device_id, topics.PlanAnswer(report.nonce, sealed, rollout), record, "planned")

    def _hear_alarm(self, device_id: str, report: VersionReport, before: Directed | None) -> None:
        """Tell people once of what looked like an attack to the device."""
        last = unpack(open_envelope(before.report).payload, VersionReport).alarm if before is not None else ""
        if report.alarm and report.alarm != last:
            self._note("alert", f"{device_id}: {report.alarm}")

    def _plan(
        self, device: DeviceRecord, report: VersionReport, rollout: RolloutPlan, serial: int, now: float
    ) -> DevicePlan:
        """The plan for one device. A ledger that was restored from a copy goes on above what the device has seen."""
        target = assign(rollout, device.traits).manifest
        route = self.route(report, target, device.region)
        return DevicePlan(
            tenant=self._tenant,
            device_id=device.device_id,
            model=report.model,
            target=target,
            steps=chosen(route.steps),
            nonce=report.nonce,
            serial=max(serial, report.director_serial) + 1,
            issued=int(now),
            expires=int(now) + PLAN_LIFETIME_S,
        )

    def route(self, report: VersionReport, target: str, region: str) -> Route:
        """The cheapest steps to `target` from what `report` says that the device holds. Raises NotFound when none fit
        it, or when nothing is to be fetched."""
        want = self._manifest(target)
        files, pieces, manifests = self._standing(report)
        if target in files:
            raise NotFound(f"version {target[:16]}…: stands on {report.device_id} already")
        deliveries = self._ways_to(want, target, files)
        return plan_update(
            files,
            want,
            deliveries,
            pieces=pieces,
            manifests=manifests,
            costs=LinkCosts(
                cached=report.cached_cost,
                in_region=frozenset(self._in_region.get(region, ())),
                at_hand=frozenset(report.at_hand),
            ),
            limits=DeviceLimits(report.memory_bytes or None, report.flash_bytes or None, frozenset(report.formats)),
        )

    def _standing(self, report: VersionReport) -> tuple[dict[str, int], frozenset[str], dict[str, Manifest]]:
        """What the device holds, as far as it is of releases known here: complete files, whole segments, manifests."""
        files: dict[str, int] = {}
        pieces: set[str] = set()
        manifests: dict[str, Manifest] = {}
        for held in report.held:
            manifest = self._known(held, report.model)
            if manifest is None:
                continue
            manifests[held.manifest] = manifest
            if held.root == manifest.merkle_root and not held.damaged:
                files[held.manifest] = manifest.size
            elif not held.damaged:
                continue  # not what its manifest says, and the device does not know where
            damaged = set(held.damaged)
            pieces.update(item.digest for index, item in enumerate(manifest.segments) if index not in damaged)
        return files, frozenset(pieces), manifests

    def _known(self, held: HeldFile, model: str) -> Manifest | None:
        with contextlib.suppress(NotFound):
            if self._ledger.release(held.manifest).model == model:
                return self._manifest(held.manifest)
        return None

    def _ways_to(self, want: Manifest, target: str, files: Mapping[str, int]) -> dict[str, Delivery]:
        """The target's delivery, with a direct patch from each file of the device where one can be had, and those of
        the versions that a chain may pass through."""
        delivery = self._publisher.delivery(target)
        for base, size in sorted(files.items()):
            if base not in {offer.base for offer in delivery.offers}:
                delivery = self._with_direct(delivery, base, small=max(size, want.size) <= COMPOSE_BYTES_MAX)
        deliveries = {target: delivery}
        edge = [target]
        while edge and files:
            for base in dict.fromkeys(offer.base for offer in deliveries[edge.pop(0)].offers):
                if base in deliveries or base in files or len(deliveries) >= CHAIN_VERSIONS_MAX:
                    continue
                with contextlib.suppress(NotFound):
                    deliveries[base] = self._publisher.delivery(base)
                    edge.append(base)
        return deliveries

    def _with_direct(self, delivery: Delivery, base: str, *, small: bool) -> Delivery:
        """`delivery` with a direct patch from `base`: one that is there, or one made now; else it is asked for."""
        target = delivery.manifest
        if not small and not self._publisher.has_direct(base, target):
            self._later.append((base, target))
            return delivery
        try:
            self._publisher.offer_direct(base, target)
            return with_offers(delivery, self._publisher.delivery(late_delivery_name(target, base)))
        except (NotFound, Untrusted, Malformed) as error:  # a base whose file or key is gone: other ways are left
            _log.info("no direct patch from %s to %s: %s", base[:12], target[:12], error)
            return delivery

    def _sent(self, region: str, plan: DevicePlan) -> None:
        """Remember what a region's mirror has, or will have when the next device asks."""
        blobs = self._in_region.setdefault(region, OrderedDict())
        for step in plan.steps:
            for blob in step.blobs:
                blobs[blob.digest] = None
                blobs.move_to_end(blob.digest)
        while len(blobs) > REGION_BLOBS_MAX:
            blobs.popitem(last=False)
