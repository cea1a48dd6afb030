"""The coordinator's shell: the one place of this program where its parts meet, and where its tasks run.

It performs what the rules decide and feeds back what happened. Devices are answered only after the ledger (or the
updates log) has made durable what the answer promises: a report's acknowledgement, a contribution's receipt, a plan
that is published. So a `kill -9` at any point is followed by a start that continues: plans and announcements are
published again, rounds go on in the state in which they were, devices repeat what was not acknowledged.

    reception        reports, greetings and key requests of devices
    director         which steps a device takes to its version
    intake           contributions, until they are in the updates log
    round_driver     each round through the table in `rounds`, a task per round
    rollout_driver   judges the rollouts every second
    relaying         has rounds announced in every region
    standing         has the aggregators stand by meanwhile
    desired_state    publishes plans that are not published yet
    enrolment        identities, on request
    cleaning         removes from the store what nothing needs any more
    overview         what the page and the command line see

Handlers of the link only put messages into bounded inboxes; what does not fit is dropped, and devices send it again.
Blocking work (SQLite, the log, signatures, quantization, evaluation) runs in threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from fl_coordinator.cleaning import EVERY_S, FIRST_S, Cleaned, Cleaning
from fl_coordinator.desired_state import DesiredState
from fl_coordinator.director import Director
from fl_coordinator.enrolment import Enrolled, Enrolment, Registrar
from fl_coordinator.inbox import Inbox
from fl_coordinator.intake import Intake
from fl_coordinator.ledger import Ledger
from fl_coordinator.overview import Overview
from fl_coordinator.ports import Clock, Link, StandingBridge, Tell, UpdatesLog
from fl_coordinator.promotion import Evaluate, Limits
from fl_coordinator.publishing import Publisher
from fl_coordinator.reception import Reception
from fl_coordinator.relaying import Relaying, RelayQuestion
from fl_coordinator.remembered_rounds import proof_for
from fl_coordinator.retention import Terms
from fl_coordinator.rollout import Rollout
from fl_coordinator.rollout_driver import RolloutDriver
from fl_coordinator.round_announcing import Announcing
from fl_coordinator.round_candidate import Candidates
from fl_coordinator.round_driver import RoundDriver
from fl_coordinator.round_opening import Opening
from fl_coordinator.rounds import Round, RoundSpec
from fl_coordinator.standing import Standing
from fl_coordinator.tables.records import AggregatorRecord, ReleaseRecord
from fl_coordinator.trimming import whole_transcript
from fl_coordinator.updates_log import LogPart
from model_delta import topics
from model_delta.errors import AtollError, Malformed, NotFound
from model_delta.keys.keyring import Keyring
from model_delta.store import InventoriedStore
from model_delta.version import show
from monitoring.metrics import Metrics
from monitoring.snapshot import Snapshot

TICK_S = 1.0

_log = logging.getLogger("atoll.coordinator")


class Coordinator:
    """Everything between the control API, the broker, the aggregators and the ledger. Use `run` as its life."""

    def __init__(
        self,
        *,
        tenant: str,
        model: str,
        ledger: Ledger,
        log: UpdatesLog,
        store: InventoriedStore,
        keyring: Keyring,
        link: Link,
        publisher: Publisher,
        evaluate: Evaluate | None,
        bridge: StandingBridge,
        relays: Mapping[str, Tell],
        limits: Limits | None = None,
        terms: Terms | None = None,
        clean_every_s: float = EVERY_S,
        metrics: Metrics | None = None,
        clock: Clock = time.time,
        tick_s: float = TICK_S,
    ) -> None:
        """`model` is the one that the page shows; any number may be published. `evaluate` measures candidates on a
        held-out set; without it every candidate of a round is released, and the canary alone judges it. `relays` tell
        each region's devices of rounds, by region; the coordinator's own relay, if it is the only one, is "". `terms`
        say how long the store keeps what only age speaks against."""
        self.tenant = tenant
        self.model = model
        self.ledger = ledger
        self.store = store
        self.keyring = keyring
        self.publisher = publisher
        self.metrics = metrics or Metrics()
        self._link = link
        self._clock = clock
        self._tick_s = tick_s
        self._count_dropped = self.metrics.counter(
            "messages_dropped", "Messages dropped: a queue was full.", ("queue",)
        )
        self._count_failures = self.metrics.counter("failures", "Failures of a background task.", ("task",))
        missing = self.metrics.gauge("records_missing", "Outbox records that no report will ever cover.")
        missing.read_from(lambda: float(self.ledger.missing_records()))
        self._registrar = Registrar(
            tenant=tenant, ledger=ledger, store=store, keyring=keyring, clock=clock, note=self.note
        )
        self._desired = DesiredState(tenant=tenant, ledger=ledger, link=link, clock=clock)
        self._reception = Reception(
            ledger=ledger,
            keyring=keyring,
            link=link,
            publisher=publisher,
            metrics=self.metrics,
            clock=clock,
            note=self.note,
        )
        self._director = Director(
            tenant=tenant,
            ledger=ledger,
            keyring=keyring,
            link=link,
            publisher=publisher,
            metrics=self.metrics,
            clock=clock,
            note=self.note,
            want_direct=self._reception.want_direct,
        )
        self._intake = Intake(ledger=ledger, log=log, keyring=keyring, link=link, metrics=self.metrics, clock=clock)
        self._rollouts = RolloutDriver(
            tenant=tenant,
            ledger=ledger,
            keyring=keyring,
            publisher=publisher,
            clock=clock,
            note=self.note,
            publish_soon=self._publish_soon,
        )
        self._standing = Standing(bridge, tick_s)
        self._relaying = Relaying(ledger=ledger, relays=relays, clock=clock, tick_s=tick_s)
        self._rounds = RoundDriver(
            ledger=ledger,
            log=log,
            keyring=keyring,
            relaying=self._relaying,
            standing=self._standing,
            intake=self._intake,
            announcing=Announcing(
                tenant=tenant,
                ledger=ledger,
                store=store,
                keyring=keyring,
                publisher=publisher,
                rollouts=self._rollouts,
                clock=clock,
                note=self.note,
            ),
            opening=Opening(
                ledger=ledger,
                log=log,
                store=store,
                keyring=keyring,
                bridge=self._standing,
                tick_s=tick_s,
                note=self.note,
            ),
            candidates=Candidates(
                ledger=ledger,
                publisher=publisher,
                publish=self.publish,
                evaluate=evaluate,
                limits=limits or Limits(),
                rollouts=self._rollouts,
                clock=clock,
                note=self.note,
            ),
            failures=self._count_failures,
            clock=clock,
            tick_s=tick_s,
            note=self.note,
            publish_soon=self._publish_soon,
        )
        self._cleaning = Cleaning(ledger=ledger, store=store, metrics=self.metrics, clock=clock, terms=terms)
        self._clean_every_s = clean_every_s
        self._clean_pause_s = min(FIRST_S, clean_every_s)
        self._overview = Overview(
            tenant=tenant,
            model=model,
            ledger=ledger,
            window=self._reception.window,
            decided=self._reception.decided,
            health=self._rollouts.health,
            connected=lambda: link.connected,
            devices=self.metrics.gauge("devices", "Enrolled devices, without those that were revoked."),
            clock=clock,
        )

    # The process's life

    async def run(self) -> None:
        """Serve until cancelled. A failing step is logged, counted and tried again; it does not end the process."""
        base = f"{topics.ROOT}/dev/+/up"
        for leaf, queue, inbox in (
            ("hello", "requests", self._reception.requests),
            ("key", "requests", self._reception.requests),
            ("report", "reports", self._reception.reports),
            ("version", "versions", self._director.inbox),
            ("contribution", "contributions", self._intake.inbox),
        ):
            self._link.subscribe(f"{base}/{leaf}", self._into(inbox, queue))
        await asyncio.to_thread(self._reception.recall)
        await asyncio.to_thread(self._director.recall)
        for round_id in await asyncio.to_thread(self._rounds.recall):
            self._rounds.due.put_nowait(round_id)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._forever("reports", self._reception.fold_reports), name="reports")
            tasks.create_task(self._forever("requests", self._reception.answer_request), name="requests")
            tasks.create_task(self._forever("director", self._director.answer), name="director")
            tasks.create_task(self._forever("late patches", self._reception.make_late_patch), name="late patches")
            tasks.create_task(self._forever("contributions", self._intake.take), name="contributions")
            tasks.create_task(self._forever("cleaning", self._clean), name="cleaning")
            tasks.create_task(self._forever("tick", self._tick), name="tick")
            self._relaying.start(tasks)
            await self._rounds.run(tasks)

    def _into(self, inbox: Inbox, queue: str) -> Callable[[str, bytes], None]:
        def put(topic: str, data: bytes) -> None:
            if not inbox.put(topic, data):
                self._count_dropped.add(1, queue)

        return put

    async def _forever(self, name: str, once: Callable[[], Any]) -> None:
        while True:
            try:
                await once()
            except AtollError as error:
                self._count_failures.add(1, name)
                _log.warning("%s: %s", name, error)
                await asyncio.sleep(self._tick_s)
            except Exception:
                self._count_failures.add(1, name)
                _log.exception("%s failed", name)
                await asyncio.sleep(self._tick_s)

    async def _tick(self) -> None:
        await asyncio.sleep(self._tick_s)
        await self._rollouts.advance()
        await self._desired.publish()

    async def _clean(self) -> None:
        await asyncio.sleep(self._clean_pause_s)
        self._clean_pause_s = self._clean_every_s
        cleaned = await asyncio.to_thread(self._cleaning.run)
        if cleaned.freed_bytes:
            said = f"{sum(cleaned.removed.values())} objects, {cleaned.freed_bytes} bytes"
            await asyncio.to_thread(self.note, "info", f"removed from the store: {said}")

    async def _publish_soon(self) -> None:
        await self._desired.publish_soon()
        self._overview.changed()

    # What the control API asks for

    def note(self, kind: str, text: str) -> None:
        """Add a line to the history that the page shows; kind `act` also names the act. Blocking."""
        if kind == "act":
            self._overview.act = text
        self.ledger.add_event(self._clock(), kind, text)
        self._overview.changed()

    def snapshot(self) -> Snapshot:
        """Everything at this moment; see `Overview.snapshot`. Blocking."""
        return self._overview.snapshot()

    def enrol(self, wanted: Enrolment, *, replace: bool) -> Enrolled:
        """Issue a certificate; see `Registrar.enrol`. Blocking."""
        return self._registrar.enrol(wanted, replace=replace)

    def revoke(self, name: str) -> None:
        """End an identity's certificate; see `Registrar.revoke`. Blocking."""
        self._registrar.revoke(name)

    def register_aggregator(self, record: AggregatorRecord, *, replace: bool = False) -> None:
        """Remember an aggregator's keys and address; see `Registrar.register_aggregator`. Blocking."""
        self._registrar.register_aggregator(record, replace=replace)

    async def publish(self, source: bytes, *, created: float | None = None, **options: Any) -> ReleaseRecord:
        """Publish a model file; see `Publisher.publish` for options and errors. `created` (Unix seconds, in the past)
        dates a version that is older than its publication."""
        now = self._clock()
        if created is not None and created > now:
            raise Malformed(f"publish: created: expected a time in the past, found {created - now:.0f} s from now")
        known = {record.manifest for record in await asyncio.to_thread(self.ledger.releases, options["model"])}
        record = await asyncio.to_thread(
            self.publisher.publish, source, now=now if created is None else created, **options
        )
        if record.manifest not in known:
            label = f"{record.model} {show(record.version)}" + (f" ({record.name})" if record.name else "")
            await asyncio.to_thread(self.note, "info", f"published {label}: {record.file_bytes} bytes")
            await self._serve_late_devices(record)
        self._overview.changed()
        return record

    async def join_releases(self, model: str, name: str = "") -> ReleaseRecord:
        """One release of all that were made apart; see `Publisher.join_siblings`."""
        record = await asyncio.to_thread(self.publisher.join_siblings, model=model, now=self._clock(), name=name)
        manifest = await asyncio.to_thread(self.publisher.manifest, record.manifest)
        await asyncio.to_thread(self.note, "info", f"{manifest.lineage.code} is {model} {show(record.version)}")
        await self._serve_late_devices(record)
        self._overview.changed()
        return record

    async def _serve_late_devices(self, record: ReleaseRecord) -> None:
        for base in reversed(await asyncio.to_thread(self.publisher.late_bases, record.manifest)):
            self._reception.want_direct(base, record.manifest)

    async def start_rollout(self, text: str, target: str = "", file: str = "rollout.yaml") -> Rollout:
        """Begin the rollout that a YAML describes; see `RolloutDriver.start`."""
        return await self._rollouts.start(text, target, file)

    async def abort_rollout(self, name: str, reason: str = "an operator aborted it") -> Rollout:
        """Stop a rollout; see `RolloutDriver.abort`."""
        return await self._rollouts.abort(name, reason)

    async def open_round(self, spec: RoundSpec) -> Round:
        """Announce a federated round; see `RoundDriver.open`."""
        return await self._rounds.open(spec)

    async def abort_round(self, round_id: str) -> Round:
        """Stop a round before its result is published. Raises NotFound."""
        return await self._rounds.abort(round_id)

    def round(self, round_id: str) -> Round:
        """A round as it stands. Raises NotFound. Blocking."""
        return self._rounds.round(round_id)

    def clean_store(self, *, dry_run: bool) -> Cleaned:
        """Remove from the store what nothing needs any more; see `Cleaning.run`. Blocking."""
        return self._cleaning.run(dry_run=dry_run)

    def memory_proof(self, round_id: str) -> bytes:
        """The packed `MemoryProof` of what a round begins with. Blocking. Raises NotFound."""
        return proof_for(self.ledger, self.round(round_id).task)

    def transcript(self, round_id: str) -> bytes:
        """The packed transcript of a round that the aggregators have decided. Blocking. Raises NotFound."""
        whole = whole_transcript(self.ledger, self.store, round_id)
        if whole is not None:
            return whole
        if self.ledger.round_result(round_id) is None:
            raise NotFound(f"round {round_id}: has not opened anything")
        raise NotFound(
            f"round {round_id}: its transcript was removed by its age (`transcript_days`); one that was exported "
            "before can be replayed as ever"
        )

    def announcement(self, round_id: str) -> bytes:
        """The signed announcement of a round that has not ended; see `RoundDriver`. Blocking."""
        return self._rounds.announcement(round_id)

    async def attempt_for(self, round_id: str, aggregator: str, wait_s: float) -> bytes | None:
        """What an aggregator stands by for; see `Standing.attempt_for`."""
        return await self._standing.attempt_for(round_id, aggregator, wait_s)

    async def round_ends(self, region: str, question: RelayQuestion, wait_s: float) -> dict[str, bytes]:
        """What a region's relay asks for while its rounds are open; see `Relaying.ends`."""
        return await self._relaying.ends(region, question, wait_s)

    def frozen_contribution(self, round_id: str, digest: str) -> bytes:
        """One contribution of a frozen round; see `RoundDriver`. Blocking."""
        return self._rounds.frozen_contribution(round_id, digest)

    async def log_from(self, offset: int, wait_s: float) -> LogPart:
        """What the updates log holds from an offset on; see `Intake.log_from`."""
        return await self._intake.log_from(offset, wait_s)
