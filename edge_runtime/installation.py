"""Performing the update table's commands on a real device.

`Installation` holds the update's record, feeds events to `update.step`, writes the new state down, and only then
performs the command that the table gave. Every command can be performed again after a power cut: what it needs is in
the record, and what it did half is finished or repeated. An outcome (adopted, rolled back, refused, withdrawn, safe
mode) is written into the record together with the state that it belongs to, and moves to the outbox from there, so that
it is told exactly once whenever the power goes off.

What is fetched is believed only after `trust.updater` and `release.open_release` have agreed; the release floor is
stored before the pointer moves.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import msgspec
import numpy as np

from edge_runtime.answers import Running
from edge_runtime.fetching import Fetcher
from edge_runtime.inference import LoadedModel, OpenModel, array_of
from edge_runtime.outbox import Outbox
from edge_runtime.probation import LiveRecord, ProbationRules, Verdict, judge_golden, judge_live
from edge_runtime.slots import InstalledVersion, Slots, UpdateRecord, other_slot
from edge_runtime.update import Command, Event, Refusal, State, step
from model_delta.encoding import unpack
from model_delta.errors import AtollError, Expired, NotFound, Unavailable, Untrusted
from model_delta.manifest import Delivery, Manifest
from model_delta.patch.route import Route, plan_update
from model_delta.plan import DeviceTraits, RolloutPlan, assign
from model_delta.release import check_file, open_release
from model_delta.trust.updater import TrustAnchors, TrustState, accept_manifest, accept_plan, check_release
from monitoring.telemetry import UpdateOutcome

CHAIN_VERSIONS_MAX = 8
LIVE_RECORDS_MAX = 1_000

_log = logging.getLogger(__name__)


class Installation:
    """The update of one model on one device. `clock` is wall time; waits and durations use the monotonic clock."""

    def __init__(
        self,
        *,
        traits: DeviceTraits,
        model: str,
        slots: Slots,
        fetcher: Fetcher,
        outbox: Outbox,
        running: Running,
        anchors: TrustAnchors,
        open_model: OpenModel,
        clock: Callable[[], float],
        rng: random.Random,
        probation: ProbationRules,
        told: Callable[[], None],
        retry_first_s: float = 0.5,
        retry_most_s: float = 15.0,
    ) -> None:
        self._traits, self._model, self._anchors = traits, model, anchors
        self._slots, self._fetcher, self._outbox, self._running = slots, fetcher, outbox, running
        self._open_model, self._clock, self._rng = open_model, clock, rng
        self._rules, self._told = probation, told
        self._retry_first_s, self._retry_most_s = retry_first_s, retry_most_s
        self.record = slots.read_record()
        self.refused = 0
        self.last_refusal = ""
        self._plan: RolloutPlan | None = None
        self._plan_changed = asyncio.Event()
        self._live: LiveRecord | None = None
        self._live_since = 0.0
        self._answered = asyncio.Event()
        self._read_own_plan()

    # -- plans

    def offered(self, _topic: str, payload: bytes) -> None:
        """A rollout plan has arrived. What cannot be believed is counted and otherwise ignored."""
        try:
            plan, trust = accept_plan(payload, self._model, self._anchors, self.record.trust, self._clock())
            if trust != self.record.trust or payload != self.record.plan:
                self._write(trust=trust, plan=payload)
        except AtollError as error:
            self.refused += 1
            self.last_refusal = str(error)
            _log.warning("%s: plan refused: %s", self._traits.device_id, error)
            return
        self._follow(plan)

    def keep_trust(self, trust: TrustState) -> None:
        """Store a newer trust state (a round announcement was accepted)."""
        self._write(trust=trust)

    def observe(self, latency_ms: float, failed: bool) -> None:
        """One live answer of the running version; counts while it is on probation."""
        live = self._live
        if live is None:
            return
        if failed:
            self._live = msgspec.structs.replace(live, errors=live.errors + 1)
        elif len(live.latencies_ms) < LIVE_RECORDS_MAX:
            self._live = msgspec.structs.replace(live, latencies_ms=(*live.latencies_ms, latency_ms))
        self._answered.set()

    @property
    def plan_serial(self) -> int:
        """The serial of the newest accepted plan."""
        return self.record.trust.plan_serial

    def wanted(self) -> str:
        """The version this device should run by the newest plan; "" when no valid plan says anything."""
        plan = self._plan
        if plan is None or self._clock() >= plan.expires:
            return ""
        return assign(plan, self._traits).manifest

    def _follow(self, plan: RolloutPlan) -> None:
        self._plan = plan
        self._running.withdrawn = frozenset(plan.withdrawn)
        self._plan_changed.set()

    def _read_own_plan(self) -> None:
        """The plan that was accepted before the power went off; an expired one has no say."""
        if self.record.plan:
            with contextlib.suppress(AtollError):
                plan, _ = accept_plan(self.record.plan, self._model, self._anchors, self.record.trust, self._clock())
                self._follow(plan)

    # -- the life of the update

    async def run(self) -> None:
        """Live by the table, from BOOTED on, until cancelled."""
        event = Event.BOOTED
        self._tell()
        if self.record.state in (State.FETCHING, State.STAGED):
            self._run_pointed()  # the old version goes on answering meanwhile
        while True:
            event = await self._perform(self._advance(event))

    def _advance(self, event: Event, **changes: Any) -> Command:
        """Write the next state down and return its command."""
        found = step(self.record.state, event)
        if isinstance(found, Refusal):
            raise RuntimeError(found.reason)  # a bug in this file: events come from here only
        _log.info("%s: %s, %s -> %s, %s", self._traits.device_id, self.record.state, event, found.state, found.command)
        if found.state is not self.record.state or changes:
            self._write(state=found.state, **changes)
        return found.command

    async def _perform(self, command: Command) -> Event:
        """Perform a command; what came of it."""
        match command:
            case Command.RUN | Command.COMMIT | Command.REPORT:
                self._tell()
                self._run_pointed()
                return await self._next_offer()
            case Command.FALL_BACK:
                self._tell()
                self._running.clear()
                return await self._next_offer()
            case Command.FETCH:
                return await self._unless_withdrawn(self._fetch())
            case Command.SWITCH:
                return self._switch()
            case Command.JUDGE:
                return await self._unless_withdrawn(self._judge())
            case Command.RESTORE:
                return self._restore()

    async def _next_offer(self) -> Event:
        """Wait until the plan wants something else than what runs here, and note it as the target."""
        while True:
            self._plan_changed.clear()
            wanted, plan = self.wanted(), self._plan
            if plan is not None and wanted and wanted != self._running.digest:
                if self.record.given_up.get(wanted) != plan.name:
                    self._slots.clear_incoming()
                    self._fetcher.bytes_received = 0
                    self._write(
                        target=wanted,
                        slot="",
                        route="",
                        rollout=plan.name,
                        bytes_received=0,
                        started=self._clock(),
                    )
                    return Event.OFFERED
            await self._plan_changed.wait()

    async def _unless_withdrawn(self, work: Coroutine[Any, Any, Event]) -> Event:
        """Do `work`, unless a plan stops wanting the target before it is done."""
        task = asyncio.create_task(work, name=f"update {self._traits.device_id}")
        try:
            while not task.done():
                self._plan_changed.clear()
                if self.wanted() not in ("", self.record.target):
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
                    return self._withdraw()
                change = asyncio.create_task(self._plan_changed.wait())
                try:
                    await asyncio.wait({task, change}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    change.cancel()
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _withdraw(self) -> Event:
        self._live = None
        if self.record.state is not State.ON_PROBATION:
            self._note(self._outcome("withdrawn", "the plan no longer wants it here"))
        else:
            self._note(self._outcome("rolled_back", "withdrawn by the plan", active=True))
        return Event.WITHDRAWN

    # -- fetch

    async def _fetch(self) -> Event:
        """Bring the target into the inactive slot. Retries what may work later; refuses what is not believed."""
        wait_s = self._retry_first_s
        while True:
            try:
                await self._fetch_once()
                return Event.FETCHED
            except Unavailable as error:
                _log.info("%s: fetch of %s: %s", self._traits.device_id, self.record.target[:12], error)
                await asyncio.sleep(wait_s * (0.5 + self._rng.random() / 2))
                wait_s = min(2 * wait_s, self._retry_most_s)
            except AtollError as error:  # Untrusted or Malformed: the same bytes would be refused again
                self._note(self._outcome("refused", str(error)[:300]), give_up=True)
                return Event.REFUSED

    async def _fetch_once(self) -> None:
        target = self.record.target
        inactive = self._slots.inactive()
        present = self._slots.installed(inactive)
        if present is not None and present.digest == target:
            manifest = accept_manifest(present.envelope, target, self._anchors, self._clock())
            trust = self._checked(manifest)
            try:
                check_file(manifest, self._slots.read_file(present))
            except AtollError:
                self._slots.clear_slot(inactive)  # damaged on disk: fetch it
            else:
                self._write(slot=inactive, route="none", trust=trust)
                return
        envelope = await self._fetcher.object("manifest", target)
        manifest = accept_manifest(envelope, target, self._anchors, self._clock())
        trust = self._checked(manifest)
        file, route = await self._open_by_cheapest(manifest)
        self._slots.write_slot(inactive, envelope, file)
        self._write(slot=inactive, route=route, bytes_received=self._bytes_received(), trust=trust)
        self._slots.clear_incoming()

    async def _open_by_cheapest(self, manifest: Manifest) -> tuple[bytes, str]:
        """The target's file by the cheapest route; by the whole segments if that fails for what it delivered."""
        target = self.record.target
        held = self._held_files()
        manifests, deliveries = await self._ways_to(manifest, set(held))
        route = plan_update({digest: len(file) for digest, file in held.items()}, manifest, deliveries)
        try:
            return await self._open_route(manifest, route, held, manifests), route.kind
        except AtollError as error:
            whole = plan_update({}, manifest, {target: deliveries[target]})
            if isinstance(error, (Unavailable, Expired)) or whole == route:
                raise
            _log.warning("%s: %s route failed (%s); taking the whole", self._traits.device_id, route.kind, error)
            return await self._open_route(manifest, whole, {}, manifests), whole.kind

    async def _open_route(
        self, manifest: Manifest, route: Route, held: Mapping[str, bytes], manifests: Mapping[str, Manifest]
    ) -> bytes:
        keys = {step.target: await self._fetcher.artifact_key(step.target) for step in route.steps}
        blobs = {}
        for one in route.steps:
            for blob in one.blobs:
                blobs[blob.digest] = await self._fetcher.blob(blob)
                self._note_bytes()
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

    async def _ways_to(self, manifest: Manifest, held: set[str]) -> tuple[dict[str, Manifest], dict[str, Delivery]]:
        """The target's delivery and, as long as no patch starts from a file at hand, those of the versions it was made
        from: stepping stones of a chain."""
        target = self.record.target
        manifests, deliveries = {target: manifest}, {target: await self._delivery(target)}
        edge = [target]
        while edge and len(manifests) < CHAIN_VERSIONS_MAX:
            here = edge.pop(0)
            bases = [offer.base for offer in deliveries[here].patches]
            if not held or held & set(bases):
                break
            for base in bases:
                if base in manifests or len(manifests) >= CHAIN_VERSIONS_MAX:
                    continue
                try:
                    envelope = await self._fetcher.object("manifest", base)
                    manifests[base] = accept_manifest(envelope, base, self._anchors, self._clock())
                    deliveries[base] = await self._delivery(base)
                except (NotFound, Untrusted):  # gone or expired: this way is closed, others are not
                    manifests.pop(base, None)
                    continue
                edge.append(base)
        return manifests, deliveries

    async def _delivery(self, digest: str) -> Delivery:
        return unpack(await self._fetcher.object("delivery", digest), Delivery)

    def _checked(self, manifest: Manifest) -> TrustState:
        if self._plan is None:
            raise Unavailable("no plan at hand that asks for this version")
        return check_release(manifest, self._plan, self.record.trust)

    def _bytes_received(self) -> int:
        return self.record.bytes_received + self._take_bytes()

    def _note_bytes(self) -> None:
        self._write(bytes_received=self._bytes_received())

    def _take_bytes(self) -> int:
        taken, self._fetcher.bytes_received = self._fetcher.bytes_received, 0
        return taken

    # -- switch, judge, restore

    def _switch(self) -> Event:
        """Flip the pointer to the staged slot. Answers still come from the old version until the new one has passed its
        golden cases."""
        before = self._slots.installed(self._slots.pointer())
        slot = self.record.slot
        version = self._slots.installed("a" if slot == "a" else "b")
        if version is None or version.digest != self.record.target:
            raise RuntimeError(f"slot {slot}: expected {self.record.target[:12]} staged, found something else")
        left_by_order = before is not None and before.digest in self._running.withdrawn
        if left_by_order and before is not None and before.digest != version.digest:
            self._note(
                UpdateOutcome(
                    manifest=before.digest,
                    event="rolled_back",
                    reason="withdrawn by the plan",
                    seconds_active=max(0.0, self._clock() - self.record.switched),
                    time=self._clock(),
                )
            )
            self._tell()
        self._slots.point_to(version.slot)
        self._write(switched=self._clock())
        return Event.SWITCHED

    async def _judge(self) -> Event:
        """Golden cases first, then live answers."""
        version = self._pointed()
        verdict, loaded = self._judge_golden(version)
        if loaded is None or version is None:
            return self._condemn(verdict)
        self._running.use(loaded, version.manifest, version.digest)
        self._live, self._live_since = LiveRecord(), time.monotonic()
        try:
            while True:
                self._answered.clear()
                live = msgspec.structs.replace(self._live, seconds=time.monotonic() - self._live_since)
                verdict = judge_live(live, version.manifest.requirements, self._rules)
                if verdict.outcome == "healthy":
                    break
                if verdict.outcome == "unhealthy":
                    return self._condemn(verdict, active=True)
                left = max(0.01, self._rules.seconds - live.seconds)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._answered.wait(), left)
        finally:
            self._live = None
        given_up = {key: value for key, value in self.record.given_up.items() if key != version.digest}
        self._note(self._outcome("adopted", verdict.reason), given_up=given_up, adopted=self.record.adopted + 1)
        return Event.HEALTHY

    def _judge_golden(self, version: InstalledVersion | None) -> tuple[Verdict, LoadedModel | None]:
        if version is None:
            return Verdict("unhealthy", "the slot is empty"), None
        cases = version.manifest.golden
        try:
            loaded = self._open_model(version.manifest, self._slots.read_file(version))
            found = [
                loaded.run({name: np.array(array_of(tensor, name)) for name, tensor in case.inputs.items()})
                for case in cases
            ]
            verdict = judge_golden(cases, found)
        except AtollError as error:
            return Verdict("unhealthy", str(error)[:300]), None
        return verdict, loaded if verdict.outcome == "healthy" else None

    def _condemn(self, verdict: Verdict, *, active: bool = False) -> Event:
        self._note(
            self._outcome("rolled_back", verdict.reason, active=active),
            give_up=True,
            rolled_back=self.record.rolled_back + 1,
        )
        return Event.UNHEALTHY

    def _restore(self) -> Event:
        """Point back to the slot that answered before. Idempotent: it is the one that the target is not in."""
        self._tell()
        self._running.clear()
        slot = other_slot(self.record.slot)
        version = self._slots.installed(slot)
        reason = "nothing was installed before"
        if version is not None:
            try:
                loaded = self._open_checked(version)
            except AtollError as error:
                reason = str(error)[:300]
            else:
                self._slots.point_to(slot)
                self._running.use(loaded, version.manifest, version.digest)
                return Event.RESTORED
        self._slots.point_to(None)
        self._note(self._outcome("safe_mode", reason))
        return Event.RESTORE_FAILED

    def _run_pointed(self) -> None:
        """Answer with the committed version; with the safe answer if there is none or it cannot be opened."""
        version = self._pointed()
        if version is not None and version.digest == self._running.digest:
            return
        self._running.clear()
        if version is None:
            return
        try:
            self._running.use(self._open_checked(version), version.manifest, version.digest)
        except AtollError as error:
            _log.error("%s: slot %s cannot run: %s", self._traits.device_id, version.slot, error)

    def _open_checked(self, version: InstalledVersion) -> LoadedModel:
        """Open a slot's version after checking its signature and file. Expiry is judged at each answer instead."""
        with contextlib.suppress(Expired):
            accept_manifest(version.envelope, version.digest, self._anchors, self._clock())
        return self._open_model(version.manifest, self._slots.read_file(version))

    def _pointed(self) -> InstalledVersion | None:
        return self._slots.installed(self._slots.pointer())

    # -- the record

    def _outcome(self, event: str, reason: str, *, active: bool = False) -> UpdateOutcome:
        now = self._clock()
        return UpdateOutcome(
            manifest=self.record.target,
            event=event,
            reason=reason,
            route=self.record.route,
            bytes_received=self._bytes_received(),
            seconds=max(0.0, now - self.record.started),
            seconds_active=max(0.0, now - self.record.switched) if active else 0.0,
            time=now,
        )

    def _note(self, outcome: UpdateOutcome, *, give_up: bool = False, **changes: Any) -> None:
        """Put an outcome into the record; `_tell` moves it to the outbox."""
        if give_up:
            kept = dict(list(self.record.given_up.items())[-15:])
            changes["given_up"] = {**kept, self.record.target: self.record.rollout}
        outcomes = (*self.record.outcomes, outcome)
        self._write(outcomes=outcomes, told_after=self._outbox.last_sequence, **changes)

    def _tell(self) -> None:
        """Move noted outcomes to the outbox: each once, also when the power went off between the two writes."""
        if not self.record.outcomes:
            return
        first = self.record.told_after + 1
        there = [record for _, record in self._outbox.read(first, self._outbox.last_sequence)]
        for outcome in self.record.outcomes:
            if outcome not in there:
                self._outbox.append(outcome)
        self._write(outcomes=())
        self._told()

    def _write(self, **changes: Any) -> None:
        record: UpdateRecord = msgspec.structs.replace(self.record, **changes)
        self._slots.write_record(record)
        self.record = record
