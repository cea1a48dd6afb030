"""Drives rollouts: begins and aborts them, looks at each every second, and writes down each step with its signed plan.

What to do is decided by `rollout`, which has no clock and no files; here are the ledger, the keyring and the lock
that lets one decision at a time be taken.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec

from fl_coordinator import rollout as rollouts
from fl_coordinator.cohorts import PAYMENT_RATES, RolloutSpec, read_rollout
from fl_coordinator.ledger import Ledger
from fl_coordinator.ports import Clock, Note
from fl_coordinator.publishing import Publisher
from fl_coordinator.rollout import Advance, Rollout
from fl_coordinator.tables.records import StageEvent
from model_delta.encoding import pack, unpack
from model_delta.errors import Malformed, NotFound
from model_delta.keys.keyring import Keyring
from model_delta.plan import PLAN_TYPE, RolloutPlan
from model_delta.signature import payment_width, shown
from model_delta.trust.signing import open_envelope, seal_envelope
from monitoring.health import CohortHealth, DeviceStanding, cohort_health

AWAKE_S = 30.0
"""A device heard within this time may be chosen for a stage of a few devices."""
ROLE_PLAN = "plan"


class RolloutDriver:
    """Every rollout of this coordinator. For one event loop; `publish_soon` puts a new plan onto the broker."""

    def __init__(
        self,
        *,
        tenant: str,
        ledger: Ledger,
        keyring: Keyring,
        publisher: Publisher,
        clock: Clock,
        note: Note,
        publish_soon: Callable[[], Awaitable[None]],
    ) -> None:
        self._tenant = tenant
        self._ledger = ledger
        self._keyring = keyring
        self._publisher = publisher
        self._clock = clock
        self._note = note
        self._publish_soon = publish_soon
        self._deciding = asyncio.Lock()

    async def start(self, text: str, target: str = "", file: str = "rollout.yaml", name: str = "") -> Rollout:
        """Begin the rollout that a YAML describes, or return it if this very rollout has begun already.

        `target` and `name` override the YAML's. Raises Malformed (with the line), NotFound, and Malformed when another
        rollout of the model is under way.
        """
        spec = read_rollout(text, file)
        if name:
            spec = msgspec.structs.replace(spec, name=name)
        async with self._deciding:
            begun = await asyncio.to_thread(self._begin, spec, text, target)
        await self._publish_soon()
        return begun

    def _begin(self, spec: RolloutSpec, text: str, target: str) -> Rollout:
        manifest = self._publisher.resolve(spec.model, target or spec.target).manifest
        every = [unpack(packed, Rollout) for packed in self._ledger.rollouts()]
        known = next((found for found in every if found.name == spec.name), None)
        if known is not None:
            if known.yaml == text and known.target == manifest:
                return known
            raise Malformed(f"rollout {spec.name}: the name was used for another rollout; choose a new metadata.name")
        self._require_measurable(spec, manifest)
        followers = self._ledger.followers(spec.model)
        blocking = [
            found
            for found in every
            if followers and found.model == spec.model and rollouts.holds_devices(found) and found.target != manifest
        ]
        newest = next((found for found in reversed(every) if found.model == spec.model), None)
        if blocking and (blocking[-1].live or blocking[-1] == newest):
            raise Malformed(
                f"rollout {spec.name}: rollout {blocking[-1].name} of {spec.model} is {blocking[-1].state} and decides "
                "what devices run; let it complete for everybody, or abort it"
            )
        now = self._clock()
        begun = rollouts.begin(
            spec,
            yaml=text,
            tenant=self._tenant,
            target=manifest,
            stable=self._ledger.stable(spec.model),
            devices=[(device.traits, now - device.last_seen <= AWAKE_S) for device in followers],
            serial=self._next_serial(spec.model),
            withdrawn=self._ledger.withdrawn(spec.model),
            now=now,
        )
        for found in every:  # one of the same target to some cohorts gives way to this one, as does one without devices
            if found.model == spec.model and found.live:
                ended = msgspec.structs.replace(found, state="completed", reason="")
                self._save(Advance(ended, None, rollouts.SUPERSEDED, f"by {spec.name}"), now)
        self._save(begun, now)
        return begun.rollout

    def _require_measurable(self, spec: RolloutSpec, digest: str) -> None:
        """Raise Malformed for a guardrail that no answer of the target could meet or breach: the rollout would wait for
        evidence that cannot come."""
        manifest = self._publisher.manifest(digest)
        useless = [rail.metric for rail in spec.guardrails if rail.metric in PAYMENT_RATES]
        if useless and payment_width(manifest.inputs, manifest.outputs) is None:
            raise Malformed(
                f"rollout {spec.name}: guardrail {useless[0]}: expected a version that decides payments, found one "
                f"that takes {shown(manifest.inputs)}; leave it out: error_rate, latencies and rolled_back hold for "
                "any model"
            )

    def last_yaml(self, model: str) -> str:
        """The YAML of the model's last rollout; "" when there was none. Blocking."""
        every = [unpack(packed, Rollout) for packed in self._ledger.rollouts()]
        mine = [found for found in every if found.model == model]
        return max(mine, key=lambda found: found.created).yaml if mine else ""

    async def abort(self, name: str, reason: str = "an operator aborted it") -> Rollout:
        """Stop a rollout: its target is withdrawn and devices return. Raises NotFound; ended ones stay as they are."""
        async with self._deciding:
            found = unpack(await asyncio.to_thread(self._ledger.rollout, name), Rollout)
            if found.live or rollouts.holds_devices(found):
                serial = self._next_serial(found.model)
                withdrawn = self._ledger.withdrawn(found.model)
                now = self._clock()
                ended = rollouts.stop(found, "aborted", reason, now=now, serial=serial, withdrawn=withdrawn)
                await asyncio.to_thread(self._save, ended, now)
                found = ended.rollout
        await self._publish_soon()
        return found

    async def advance(self) -> None:
        """Look at every running rollout once; what changes is written down, then published."""
        async with self._deciding:
            changed = await asyncio.to_thread(self._advance_all)
        if changed:
            await self._publish_soon()

    def _advance_all(self) -> bool:
        changed = False
        for packed in self._ledger.rollouts():
            found = unpack(packed, Rollout)
            if found.state != "running":
                continue
            now = self._clock()
            health = self.health(found, now)
            looked = rollouts.advance(
                found,
                health,
                now=now,
                serial=self._next_serial(found.model),
                withdrawn=self._ledger.withdrawn(found.model),
            )
            if looked.rollout != found:
                self._save(looked, now)
                changed = changed or looked.plan is not None
        return changed

    def health(self, found: Rollout, now: float) -> CohortHealth:
        """How the arms of this rollout do, at `now`. Blocking."""
        devices = [
            DeviceStanding(record.traits, record.last_seen, record.running, record.safe_mode)
            for record in self._ledger.followers(found.model)
        ]
        summaries = self._ledger.summaries([found.target, found.stable], found.first_serial)
        outcomes = [o for o in self._ledger.outcomes(found.target) if o.received >= found.created]
        return cohort_health(
            self._plan(found.model),
            devices,
            [(row.device_id, row.summary) for row in summaries],
            [(o.device_id, o.outcome) for o in outcomes],
            now=now,
            silent_after=rollouts.silent_after(found.spec),
        )

    def _plan(self, model: str) -> RolloutPlan:
        newest = self._ledger.plan(model)
        if newest is None:
            raise NotFound(f"plan of {model!r}: none was issued; apply a rollout first")
        return unpack(open_envelope(newest[1]).payload, RolloutPlan)

    def _next_serial(self, model: str) -> int:
        newest = self._ledger.plan(model)
        return 1 if newest is None else newest[0] + 1

    def _save(self, moved: Advance, now: float) -> None:
        """Write down a step of a rollout, with its signed plan, in one transaction."""
        found = moved.rollout
        plan = None
        if moved.plan is not None:
            envelope = seal_envelope(self._keyring.sign(ROLE_PLAN, PLAN_TYPE, pack(moved.plan)))
            plan = (moved.plan.serial, envelope)
        ended_badly = found.state in ("stopped", "aborted") and found.stable != found.target
        self._ledger.save_rollout(
            name=found.name,
            model=found.model,
            state=found.state,
            created=found.created,
            record=pack(found),
            history=StageEvent(now, found.stage, found.serial, moved.event, moved.text) if moved.event else None,
            plan=plan,
            stable=rollouts.next_stable(found) if plan is not None else None,
            withdrawn={found.target: found.reason} if ended_badly else None,
            needs=(found.target, found.stable) if moved.event == "begun" else (),
        )
        if moved.event:
            kind = "alert" if found.state in ("stopped", "aborted", "paused") else "info"
            self._note(kind, f"rollout {found.name}: {moved.event}: {moved.text}")
