"""Performing the update table's commands on a real device.

`Installation` feeds events to `update.step`, writes the new state down, and only then performs the command that the
table gave. Every command can be performed again after a power cut: what it needs is in the record (`journal`), and what
it did half is finished or repeated. The release floor is stored before the pointer moves. Which version is wanted is
said by the plan that the device follows (`plans`).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import msgspec
import numpy as np

from edge_runtime.acquisition import Acquisition
from edge_runtime.direction import Direction, Standing
from edge_runtime.fetching import Fetcher
from edge_runtime.inference import LoadedModel, OpenModel, array_of
from edge_runtime.journal import Journal
from edge_runtime.outbox import Outbox
from edge_runtime.plans import Plans
from edge_runtime.probation import LiveRecord, ProbationRules, Verdict, judge_golden, judge_live
from edge_runtime.running import Running
from edge_runtime.slots import InstalledVersion, SlotName, Slots, UpdateRecord, other_slot
from edge_runtime.update import Command, Event, Refusal, State, step
from edge_runtime.vouching import Vouching
from edge_runtime.waiting import wait_at_most
from model_delta.assembly import root_of
from model_delta.errors import AtollError, StorageFailed, Unavailable
from model_delta.patch.route import NO_LIMITS, DeviceLimits
from model_delta.plan import DeviceTraits
from model_delta.trust.director import HeldFile
from model_delta.trust.updater import TrustState, read_manifest
from monitoring.telemetry import UpdateOutcome

LIVE_RECORDS_MAX = 1_000

_log = logging.getLogger(__name__)


class Happened(msgspec.Struct, frozen=True):
    """An event, the outcome to be told with it, and what else changes in the record at the same moment."""

    event: Event
    outcome: UpdateOutcome | None = None
    changes: dict[str, Any] = {}


class Installation:
    """The update of one model on one device. `clock` is wall time; waits and durations use the monotonic clock. `told`
    is called when an outcome is in the outbox. `alarm` says what is wrong with the disk ("" while nothing is)."""

    def __init__(
        self,
        *,
        traits: DeviceTraits,
        model: str,
        slots: Slots,
        fetcher: Fetcher,
        outbox: Outbox,
        running: Running,
        vouching: Vouching,
        open_model: OpenModel,
        clock: Callable[[], float],
        rng: random.Random,
        probation: ProbationRules,
        told: Callable[[], None],
        retry_first_s: float = 0.5,
        retry_most_s: float = 15.0,
        limits: DeviceLimits = NO_LIMITS,
        cached_cost: float = 1.0,
        direction: Direction | None = None,
    ) -> None:
        self._traits = traits
        self._slots, self._fetcher, self._running = slots, fetcher, running
        self._open_model, self._clock, self._rng = open_model, clock, rng
        self._rules = probation
        self._retry_first_s, self._retry_most_s = retry_first_s, retry_most_s
        self._journal = Journal(slots=slots, fetcher=fetcher, outbox=outbox, clock=clock, told=told)
        self._acquisition = Acquisition(
            slots=slots,
            fetcher=fetcher,
            tenant=traits.tenant,
            vouching=vouching,
            clock=clock,
            received=self._journal.count_received,
            chosen=self._journal.note_route,
            limits=limits,
            cached_cost=cached_cost,
            direction=direction,
        )
        self._direction = direction
        self.plans = Plans(
            traits=traits,
            model=model,
            journal=self._journal,
            vouching=vouching,
            running=running,
            clock=clock,
            retry_s=retry_most_s,
        )
        self.alarm = ""
        self._opened: SlotName | None = None
        self._live: LiveRecord | None = None
        self._answered = asyncio.Event()

    @property
    def record(self) -> UpdateRecord:
        """Where the update stands."""
        return self._journal.record

    def keep_trust(self, trust: TrustState) -> None:
        """Store a newer trust state (a round announcement was accepted). Raises StorageFailed."""
        self._journal.write(trust=trust)

    def standing(self) -> Standing:
        """What the device tells its director of itself, beside its files."""
        return Standing(self._running.digest, self.record.trust.release_floor, self.plans.serial)

    def held_files(self) -> tuple[HeldFile, ...]:
        """What stands in the slots; see `Acquisition.held_files`. Blocking."""
        return self._acquisition.held_files()

    def file_root(self) -> str:
        """The Merkle root of the file in the slot that the pointer names, as it stands on disk; "" without one."""
        try:
            version = self._slots.installed(self._slots.pointer())
            return "" if version is None else root_of(version.manifest, self._slots.read(version))
        except (AtollError, OSError):
            return ""

    # -- the life of the update

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

    async def run(self) -> None:
        """Live by the table, from BOOTED on, until cancelled. A disk that is full, read-only or broken ends nothing:
        what runs goes on answering, and what could not be written is done again later, as after a power cut. Only a
        verdict is kept meanwhile: nobody is to be judged by live answers twice."""
        happened = Happened(Event.BOOTED)
        while True:
            try:
                if happened.event is Event.BOOTED and not self._running.digest:
                    self._run_slot(self._answering_slot())
                if self.alarm:
                    self._journal.write()
                    self._disk_works()
                self._journal.tell()
                command = self._advance(happened)
                happened = Happened(Event.BOOTED)
                self._journal.tell()
                happened = await self._perform(command)
            except (StorageFailed, OSError) as error:
                self._disk_fails(str(error))
                if happened.event is Event.UNHEALTHY:
                    self._run_slot(other_slot(self.record.slot))
                elif happened.event is not Event.HEALTHY:
                    happened = Happened(Event.BOOTED)
                await asyncio.sleep(self._retry_most_s)

    def _disk_fails(self, reason: str) -> None:
        """Tell it once, here and in the reports."""
        if reason != self.alarm:
            _log.error("%s: %s; what runs goes on answering", self._traits.device_id, reason)
        self.alarm = reason

    def _disk_works(self) -> None:
        _log.info("%s: the disk takes what is written again", self._traits.device_id)
        self.alarm = ""

    def _advance(self, happened: Happened) -> Command:
        """Write down the next state and everything else that changes at this moment; return the command."""
        before = self.record.state
        found = step(before, happened.event)
        if isinstance(found, Refusal):
            raise RuntimeError(found.reason)  # events come from `_perform` only: a bug there
        why = f" ({happened.outcome.reason})" if happened.outcome is not None and happened.outcome.reason else ""
        device = self._traits.device_id
        _log.info("%s: %s, %s%s: %s, %s", device, before, happened.event, why, found.state, found.command)
        changes = dict(happened.changes)
        if happened.outcome is not None:
            changes |= self._journal.note(happened.outcome)
        if found.state is not before or changes:
            self._journal.write(state=found.state, **changes)
        return found.command

    async def _perform(self, command: Command) -> Happened:
        """Perform a command; what came of it."""
        match command:
            case Command.RUN | Command.COMMIT | Command.REPORT:
                self._run_slot(self._slots.pointer())
                if command is not Command.RUN:
                    self._tell_director()
                return await self._next_offer()
            case Command.FALL_BACK:
                self._running.clear()
                self._tell_director()
                return await self._next_offer()
            case Command.FETCH:
                return await self._unless_withdrawn(self._fetch())
            case Command.SWITCH:
                return self._switch()
            case Command.JUDGE:
                return await self._unless_withdrawn(self._judge())
            case Command.RESTORE:
                return self._restore()

    async def _next_offer(self) -> Happened:
        """Wait until the plan wants something else than what runs here. What failed here is not tried again in the
        same rollout."""
        while True:
            self.plans.changed.clear()
            wanted, plan = self.plans.wanted(), self.plans.current
            new = wanted not in ("", self._running.digest)
            if plan is not None and new and self.record.given_up.get(wanted) != plan.name:
                self._slots.clear_incoming()
                self._fetcher.bytes_received = 0
                changes = {"target": wanted, "slot": "", "route": "", "rollout": plan.name, "bytes_received": 0}
                return Happened(Event.OFFERED, changes={**changes, "started": self._clock()})
            await self.plans.changed.wait()

    async def _unless_withdrawn(self, work: Coroutine[Any, Any, Happened]) -> Happened:
        """Do `work`, unless a plan stops wanting the target before it is done."""
        task = asyncio.create_task(work, name=f"update {self._traits.device_id}")
        try:
            while not task.done():
                self.plans.changed.clear()
                if self.plans.wanted() not in ("", self.record.target):
                    return self._withdrawn()
                change = asyncio.create_task(self.plans.changed.wait())
                try:
                    await asyncio.wait({task, change}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    change.cancel()
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _withdrawn(self) -> Happened:
        if self.record.state is State.ON_PROBATION:
            active = self._running.digest == self.record.target
            return Happened(
                Event.WITHDRAWN, self._journal.outcome("rolled_back", "withdrawn by the plan", active=active)
            )
        return Happened(Event.WITHDRAWN, self._journal.outcome("withdrawn", "the plan no longer wants it here"))

    def _tell_director(self) -> None:
        if self._direction is not None:
            self._direction.installed()

    # -- fetch

    async def _fetch(self) -> Happened:
        """Bring the target into the inactive slot. Retries what may work later; refuses what is not believed."""
        wait_s = self._retry_first_s
        while True:
            try:
                return Happened(Event.FETCHED, changes=await self._fetch_once())
            except Unavailable as error:
                if isinstance(error, StorageFailed):
                    self._disk_fails(str(error))
                elif self.alarm:
                    self._disk_works()
                _log.info("%s: fetch of %s: %s", self._traits.device_id, self.record.target[:12], error)
                await asyncio.sleep(wait_s * (0.5 + self._rng.random() / 2))
                wait_s = min(2 * wait_s, self._retry_most_s)
            except AtollError as error:  # Untrusted or Malformed: the same bytes would be refused again
                return Happened(
                    Event.REFUSED, self._journal.outcome("refused", str(error)[:300]), self._journal.give_up()
                )

    async def _fetch_once(self) -> dict[str, Any]:
        """What changes in the record once the inactive slot holds the target."""
        if self.plans.current is None:
            raise Unavailable("no valid plan at hand that asks for this version")
        slot = self._slots.inactive()
        acquired = await self._acquisition.bring(self.record.target, self.plans.current, self.record.trust)
        if not acquired.stands:
            self._slots.install(slot, acquired.envelope)
        self._slots.clear_incoming()
        return {
            "slot": slot,
            "route": self.record.route or acquired.route,
            "trust": msgspec.structs.replace(self.record.trust, release_floor=acquired.trust.release_floor),
            "bytes_received": self._journal.bytes_received(),
        }

    async def file_to_train_from(self, target: str, also_held: Mapping[str, bytes]) -> bytes:
        """The file of a round's base version, whether or not it is the one that answers; see `Acquisition.file_of`."""
        return await self._acquisition.file_of(target, also_held)

    # -- switch, judge, restore

    def _switch(self) -> Happened:
        """Flip the pointer to the staged slot. Answers still come from the old version until the new one has passed its
        golden cases. A version that is left because it was withdrawn is told of as rolled back."""
        answering = other_slot(self.record.slot)
        before = self._slots.installed(answering)
        left = None
        now = self._clock()
        if before is not None and before.digest in self._running.withdrawn and self.record.switched:
            active = max(0.0, now - self.record.switched)
            left = UpdateOutcome(
                manifest=before.digest,
                event="rolled_back",
                reason="withdrawn by the plan",
                seconds_active=active,
                time=now,
            )
        self._slots.point_to(other_slot(answering))
        return Happened(Event.SWITCHED, left, {"switched": now})

    async def _judge(self) -> Happened:
        """Golden cases first, then live answers."""
        version = self._slots.installed(self._slots.pointer())
        verdict, loaded = self._judge_golden(version)
        if loaded is None or version is None:
            return self._condemned(verdict)
        self._use(version, loaded)
        self._live, since = LiveRecord(), time.monotonic()
        try:
            while True:
                self._answered.clear()
                live = msgspec.structs.replace(self._live, seconds=time.monotonic() - since)
                verdict = judge_live(live, version.manifest.requirements, self._rules)
                if verdict.outcome != "wait":
                    break
                await wait_at_most(self._answered, max(0.01, self._rules.seconds - live.seconds))
        finally:
            self._live = None
        if verdict.outcome == "unhealthy":
            return self._condemned(verdict, active=True)
        given_up = {key: value for key, value in self.record.given_up.items() if key != version.digest}
        changes = {"given_up": given_up, "adopted": self.record.adopted + 1}
        return Happened(Event.HEALTHY, self._journal.outcome("adopted", verdict.reason), changes)

    def _judge_golden(self, version: InstalledVersion | None) -> tuple[Verdict, LoadedModel | None]:
        """Run the golden cases; the loaded version only if they agree."""
        if version is None or version.digest != self.record.target:
            return Verdict("unhealthy", "the slot does not hold the version that was staged"), None
        cases = version.manifest.golden
        try:
            loaded = self._open_checked(version)
            found = [
                loaded.run({name: np.array(array_of(tensor, name)) for name, tensor in case.inputs.items()})
                for case in cases
            ]
            verdict = judge_golden(cases, found)
        except AtollError as error:
            return Verdict("unhealthy", str(error)[:300]), None
        return verdict, loaded if verdict.outcome == "healthy" else None

    def _condemned(self, verdict: Verdict, *, active: bool = False) -> Happened:
        changes = {**self._journal.give_up(), "rolled_back": self.record.rolled_back + 1}
        return Happened(Event.UNHEALTHY, self._journal.outcome("rolled_back", verdict.reason, active=active), changes)

    def _restore(self) -> Happened:
        """Point back to the slot that answered before, which answers from now on, also while the pointer cannot be
        written. Idempotent: it is the one that the target is not in."""
        slot = other_slot(self.record.slot)
        version = self._slots.installed(slot)
        reason = "nothing was installed before"
        if version is not None:
            try:
                self._use(version, self._open_checked(version))
            except (AtollError, OSError) as error:
                reason = str(error)[:300]
            else:
                self._slots.point_to(slot)
                return Happened(Event.RESTORED)
        self._running.clear()
        self._slots.point_to(None)
        return Happened(Event.RESTORE_FAILED, self._journal.outcome("safe_mode", reason))

    def _answering_slot(self) -> SlotName | None:
        """Which slot answers right after a start: one that has not passed its golden cases must not."""
        match self.record.state:
            case State.STAGED:
                return other_slot(self.record.slot)
            case State.ON_PROBATION | State.RESTORING | State.SAFE:
                return None  # the command that follows says what answers
            case _:
                return self._slots.pointer()

    def _run_slot(self, slot: SlotName | None) -> None:
        """Answer with the version in `slot`; with the safe answer if there is none or it cannot be opened."""
        version = self._slots.installed(slot)
        if version is not None and version.digest == self._running.digest:
            return
        if version is None and slot is not None and self._running.digest and slot == self._opened:
            return  # it cannot be read now; what runs was checked when it was opened
        self._running.clear()
        if version is None:
            return
        try:
            self._use(version, self._open_checked(version))
        except (AtollError, OSError) as error:
            _log.error("%s: slot %s cannot run: %s", self._traits.device_id, version.slot, error)

    def _use(self, version: InstalledVersion, loaded: LoadedModel) -> None:
        self._opened = version.slot
        self._running.use(loaded, version.manifest, version.digest)

    def _open_checked(self, version: InstalledVersion) -> LoadedModel:
        """Open a slot's version after checking its file. It was vouched for when it was written there: that the keys
        or the repository changed since ends no version that runs. Expiry is judged at each answer."""
        read_manifest(version.envelope, version.digest, self._traits.tenant, 0.0)
        return self._open_model(version.manifest, self._slots.model_file(version))
