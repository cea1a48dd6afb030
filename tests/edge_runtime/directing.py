"""A director for the small world: it plans from the same store, and an attacker may hold its key.

desk = Desk(world)                      # after world.start()
desk.spoil = lambda plan: msgspec.structs.replace(plan, target=other)      # signed rightly all the same
"""

from __future__ import annotations

from collections.abc import Callable

from model_delta.encoding import pack, unpack
from model_delta.manifest import Delivery
from model_delta.patch.route import Route, plan_update
from model_delta.topics import PlanAnswer, device_of, down
from model_delta.trust.director import (
    DEVICE_PLAN_TYPE,
    PLAN_LIFETIME_S,
    DevicePlan,
    VersionReport,
    accept_version_report,
    chosen,
)
from model_delta.trust.signing import seal_envelope
from tests.edge_runtime.world import TENANT, World


class Desk:
    """Answers version reports on the world's broker. `silent`: says nothing. `spoil` and `spoil_route` change what is
    answered before it is signed."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.reports: list[VersionReport] = []
        self.silent = False
        self.spoil: Callable[[DevicePlan], DevicePlan] = lambda plan: plan
        self.spoil_route: Callable[[Route], Route] = lambda route: route
        self._counters: dict[str, dict[str, int]] = {}
        self._serial = 0
        world.coordinator.subscribe("atoll/1/dev/+/up/version", self._heard)

    def _heard(self, topic: str, payload: bytes) -> None:
        device = device_of(topic)
        seen = self._counters.setdefault(device, {})
        verifying = self.world.devices[device].private.public_key()
        report = accept_version_report(payload, TENANT, device, verifying, seen, self.world.now)
        seen[report.model] = report.counter
        self.reports.append(report)
        if report.wanted and not self.silent:
            answer = PlanAnswer(report.nonce, self._plan(report))
            self.world.broker.deliver(down(device, "plan"), pack(answer))

    def _plan(self, report: VersionReport) -> bytes:
        world = self.world
        deliveries = {digest: unpack(world.store[("delivery", digest)], Delivery) for digest in world.releases}
        whole = [held for held in report.held if not held.damaged]
        pieces = {
            segment.digest
            for held in report.held
            for index, segment in enumerate(world.releases[held.manifest].manifest.segments)
            if index not in held.damaged
        }
        route = plan_update(
            {held.manifest: world.releases[held.manifest].manifest.size for held in whole},
            world.releases[report.wanted].manifest,
            deliveries,
            pieces=pieces,
            manifests={held.manifest: world.releases[held.manifest].manifest for held in report.held},
        )
        self._serial += 1
        plan = DevicePlan(
            tenant=TENANT,
            device_id=report.device_id,
            model=report.model,
            target=report.wanted,
            steps=chosen(self.spoil_route(route).steps),
            nonce=report.nonce,
            serial=self._serial,
            issued=int(world.now),
            expires=int(world.now) + PLAN_LIFETIME_S,
        )
        return seal_envelope(world.keyring.sign("director", DEVICE_PLAN_TYPE, pack(self.spoil(plan))))
