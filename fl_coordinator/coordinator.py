"""The coordinator's shell: the one place of this program that has a clock, a line to the broker, and tasks.

It performs what the rules decide and feeds back what happened. Devices are answered only after the ledger (or the
updates log) has made durable what the answer promises: a report's acknowledgement, a contribution's receipt, a plan
that is published. So a `kill -9` at any point is followed by a start that continues: plans and announcements are
published again, rounds go on in the state in which they were, devices repeat what was not acknowledged.

Handlers of the link only put messages into bounded inboxes; what does not fit is dropped, and devices send it again.
Blocking work (SQLite, the log, signatures, quantization, evaluation) runs in threads, from here and nowhere else.

    reports        -> fold (one transaction for many) -> acknowledge
    key requests   -> verify the device's signature -> seal the artifact key to the device
    contributions  -> verify -> admit -> append and flush -> record -> receipt
    every second   -> judge the rollouts, publish what is not published yet
    each round     -> one task that walks the table in `rounds`
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec
import numpy as np

from fl_coordinator import masters
from fl_coordinator import rollout as rollouts
from fl_coordinator.admission import Offered, OpenRound, Refusal, already_in, refuse
from fl_coordinator.aggregation import Opening, combine_openings
from fl_coordinator.cohorts import RolloutSpec, read_rollout
from fl_coordinator.inbox import Inbox
from fl_coordinator.ledger import (
    AdmittedContribution,
    AggregatorRecord,
    DeviceRecord,
    Ledger,
    ReleaseRecord,
    StageEvent,
)
from fl_coordinator.promotion import Evaluate, Limits, failed, judge
from fl_coordinator.publishing import Publisher
from fl_coordinator.rollout import Advance, Rollout
from fl_coordinator.rounds import ATTEMPTS_MAX, Command, Event, Round, RoundSpec, State, step
from fl_coordinator.shares.contribution import CONTRIBUTIONS_MAX, Claim, mismatch, parse, size_max, verify
from fl_coordinator.shares.party import Decision
from fl_coordinator.shares.range_check import require_announceable
from model_delta import merkle, topics
from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack
from model_delta.errors import (
    AtollError,
    Expired,
    Malformed,
    NotFound,
    SignatureInvalid,
    Unavailable,
    Untrusted,
)
from model_delta.keys.certificates import days_left, device_keys_of, require_identity, same_keys, serial_of
from model_delta.keys.encryption import seal_to
from model_delta.keys.keyring import Keyring
from model_delta.manifest import Lineage
from model_delta.plan import PLAN_TYPE, DeviceTraits, RolloutPlan, assign, matches
from model_delta.store import ArtifactStore
from model_delta.task import TASK_TYPE, RoundTask
from model_delta.trust.signing import key_id, open_envelope, seal_envelope
from model_delta.trust.signing import verify as verify_envelope
from model_delta.version import show
from monitoring.collector import REPORT_BYTES_MAX, LiveWindow, require_plausible
from monitoring.health import CohortHealth, DeviceStanding, cohort_health
from monitoring.metrics import Metrics
from monitoring.snapshot import (
    DeviceState,
    Note,
    RejectedDevice,
    ReleaseState,
    RolloutEvent,
    RolloutState,
    RoundState,
    Snapshot,
)
from monitoring.telemetry import Report, latency_quantile_us

TICK_S = 1.0
REPUBLISH_S = 60.0
QUEUE_MAX = 4_096
CONTRIBUTION_QUEUE_MAX = 128
REQUEST_BYTES_MAX = 16_384
CONTRIBUTION_BYTES_MAX = 64 << 20
BATCH_MAX = 256
SNAPSHOT_KEPT_S = 0.25
RENEW_DAYS = 60
AGGREGATORS = 3
AWAKE_S = 30.0
"""A device heard within this time may be chosen for a stage of a few devices."""
ROLE_PLAN, ROLE_ROUND = "plan", "round"

_log = logging.getLogger("atoll.coordinator")

Clock = Callable[[], float]


class Link(Protocol):
    """The line to the broker; see `edge_runtime.link`."""

    @property
    def connected(self) -> bool:
        """Whether the broker can be reached now."""

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Returns after the broker's acknowledgement; raises Unavailable after its own deadline."""

    def subscribe(self, topic_filter: str, handler: Callable[[str, bytes], None]) -> None:
        """`handler(topic, payload)` runs in the event loop; renewed on every reconnect."""


class Bridge(Protocol):
    """How commands reach the aggregators; see `flower_bridge`."""

    async def command(
        self, payload: Mapping[str, Any], nodes: Sequence[str], deadline_s: float
    ) -> dict[str, dict[str, Any]]:
        """Every node's answer by name. Raises Unavailable naming the nodes that did not answer."""


class UpdatesLog(Protocol):
    """See `updates_log`."""

    def append(self, records: Sequence[bytes]) -> list[int]:
        """Make records durable; their offsets."""

    def read(self, offset: int) -> bytes:
        """The record at an offset."""


class Enrolment(msgspec.Struct, frozen=True, kw_only=True):
    """A request for an identity. `traits` may hold device_class, region and labels."""

    csr_pem: str
    sealing_public: bytes
    kind: str
    common_name: str
    traits: dict[str, str] = {}


class Enrolled(msgspec.Struct, frozen=True):
    """The answer: certificate and CA as PEM, the packed trust anchors."""

    certificate_pem: bytes
    ca_pem: bytes
    anchors: bytes


class Coordinator:
    """Everything between the control API, the broker, the aggregators and the ledger. Use `run` as its life."""

    def __init__(
        self,
        *,
        tenant: str,
        model: str,
        ledger: Ledger,
        log: UpdatesLog,
        store: ArtifactStore,
        keyring: Keyring,
        link: Link,
        publisher: Publisher,
        evaluate: Evaluate | None,
        bridge: Bridge,
        limits: Limits | None = None,
        metrics: Metrics | None = None,
        clock: Clock = time.time,
        tick_s: float = TICK_S,
    ) -> None:
        """`model` is the one that the page shows; any number may be published. `evaluate` measures candidates on a
        held-out set; without it every candidate of a round is released, and the canary alone judges it."""
        self.tenant = tenant
        self.model = model
        self.ledger = ledger
        self.store = store
        self.keyring = keyring
        self.publisher = publisher
        self.metrics = metrics or Metrics()
        self._log = log
        self._link = link
        self._bridge = bridge
        self._evaluate = evaluate
        self._limits = limits or Limits()
        self._clock = clock
        self._tick_s = tick_s
        self._act = ""
        self._window = LiveWindow()
        self._published: dict[str, bytes] = {}
        self._was_connected = False
        self._republish_at = 0.0
        self._reports = Inbox(
            messages_max=QUEUE_MAX, per_device_max=32, message_bytes_max=REPORT_BYTES_MAX, bytes_max=64 << 20
        )
        self._requests = Inbox(
            messages_max=QUEUE_MAX, per_device_max=64, message_bytes_max=REQUEST_BYTES_MAX, bytes_max=16 << 20
        )
        self._contributions = Inbox(
            messages_max=CONTRIBUTION_QUEUE_MAX,
            per_device_max=2,
            message_bytes_max=CONTRIBUTION_BYTES_MAX,
            bytes_max=256 << 20,
        )
        self._deciding = asyncio.Lock()
        self._publishing = asyncio.Lock()
        self._admitting = asyncio.Lock()
        self._decided: Counter[str] = Counter()
        self._admitted = asyncio.Condition()
        self._aborted: set[str] = set()
        self._rounds_due: asyncio.Queue[str] = asyncio.Queue()
        self._driving: set[str] = set()
        self._snapshot: tuple[float, Snapshot] | None = None
        self._count_reports = self.metrics.counter("reports", "Reports folded, by verdict.", ("verdict",))
        self._count_refused = self.metrics.counter("contributions_refused", "Refused contributions.", ("reason",))
        self._count_admitted = self.metrics.counter("contributions_admitted", "Admitted contributions.")
        self._count_keys = self.metrics.counter("key_requests", "Key requests, by answer.", ("answer",))
        self._count_dropped = self.metrics.counter(
            "messages_dropped", "Messages dropped: a queue was full.", ("queue",)
        )
        self._count_failures = self.metrics.counter("failures", "Failures of a background task.", ("task",))
        self._gauge_devices = self.metrics.gauge("devices", "Enrolled devices.")
        missing = self.metrics.gauge("records_missing", "Outbox records that no report will ever cover.")
        missing.read_from(lambda: float(self.ledger.missing_records()))

    # The process's life

    async def run(self) -> None:
        """Serve until cancelled. A failing step is logged, counted and tried again; it does not end the process."""
        base = f"{topics.ROOT}/dev/+/up"
        self._link.subscribe(f"{base}/hello", lambda topic, data: self._enqueue("requests", topic, data))
        self._link.subscribe(f"{base}/key", lambda topic, data: self._enqueue("requests", topic, data))
        self._link.subscribe(f"{base}/report", lambda topic, data: self._enqueue("reports", topic, data))
        self._link.subscribe(f"{base}/contribution", lambda topic, data: self._enqueue("contributions", topic, data))
        for row in await asyncio.to_thread(self.ledger.summaries):
            self._decided[row.device_id] += row.summary.decisions
        for packed in await asyncio.to_thread(self.ledger.rounds):
            found = unpack(packed, Round)
            if found.live:
                self._rounds_due.put_nowait(found.round_id)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._forever("reports", self._fold_reports), name="reports")
            tasks.create_task(self._forever("requests", self._answer_request), name="requests")
            tasks.create_task(self._forever("contributions", self._take_contributions), name="contributions")
            tasks.create_task(self._forever("tick", self._tick), name="tick")
            while True:
                round_id = await self._rounds_due.get()
                if round_id not in self._driving:
                    self._driving.add(round_id)
                    tasks.create_task(self._drive(round_id), name=f"round {round_id}")

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

    def _enqueue(self, queue: str, topic: str, data: bytes) -> None:
        inboxes = {"reports": self._reports, "requests": self._requests, "contributions": self._contributions}
        if not inboxes[queue].put(topic, data):
            self._count_dropped.add(1, queue)

    async def _tick(self) -> None:
        await asyncio.sleep(self._tick_s)
        await self._advance_rollouts()
        await self._publish_retained()

    def note(self, kind: str, text: str) -> None:
        """Add a line to the history that the page shows; kind `act` also names the act."""
        if kind == "act":
            self._act = text
        self.ledger.add_event(self._clock(), kind, text)

    async def _say(self, kind: str, text: str) -> None:
        await asyncio.to_thread(self.note, kind, text)

    # Retained desired state

    async def _publish_retained(self) -> None:
        """Publish newest plans and announcements that this broker may not have: new ones, and all after a reconnect.

        One at a time, so that an older plan never overtakes a newer one."""
        async with self._publishing:
            await self._publish_missing()

    async def _publish_missing(self) -> None:
        if not self._link.connected:
            self._was_connected = False
            return
        now = self._clock()
        if not self._was_connected or now >= self._republish_at:
            self._published.clear()
            self._republish_at = now + REPUBLISH_S
        self._was_connected = True
        wanted = await asyncio.to_thread(self._retained)
        for topic, payload in wanted.items():
            if self._published.get(topic) != payload:
                await self._link.publish(topic, payload, retain=True)
                self._published[topic] = payload

    def _retained(self) -> dict[str, bytes]:
        wanted: dict[str, bytes] = {}
        for model in self.ledger.planned_models():
            newest = self.ledger.plan(model)
            if newest is not None:
                wanted[topics.plan_topic(self.tenant, model)] = newest[1]
        for packed in self.ledger.rounds():
            found = unpack(packed, Round)
            wanted[topics.round_topic(self.tenant, found.task.model)] = found.announcement
        return wanted

    # Reports, hellos, keys

    async def _fold_reports(self) -> None:
        batch = [await self._reports.get()]
        while len(batch) < BATCH_MAX and not self._reports.empty():
            batch.append(self._reports.get_nowait())
        reports = []
        for topic, data in batch:
            try:
                report = unpack(data, Report)
                if report.device_id != topics.device_of(topic):
                    raise Malformed(f"report on {topic}: names {report.device_id[:64]!r}")
                require_plausible(report)
                reports.append(report)
            except Malformed as error:
                self._count_reports.add(1, "malformed")
                _log.warning("%s", error)
        if not reports:
            return
        now = self._clock()
        folded = await asyncio.to_thread(self._fold, reports, now)
        for report, verdict, sequence in folded:
            self._count_reports.add(1, verdict)
            if verdict in ("new", "gap"):
                self._window.add(now, report.summaries)
                self._decided[report.device_id] += sum(summary.decisions for summary in report.summaries)
            ack = topics.ReportAck(report.epoch, sequence)
            # A lost acknowledgement is repeated when the device repeats the report.
            with contextlib.suppress(Unavailable):
                await self._link.publish(topics.down(report.device_id, "ack"), pack(ack))

    def _fold(self, reports: Sequence[Report], now: float) -> list[tuple[Report, str, int]]:
        newest = max((self._next_serial(model) - 1 for model in self.ledger.planned_models()), default=0)
        known = self._valid_devices()
        enrolled = [report for report in reports if report.device_id in known]
        for report in reports:
            if report.device_id not in known:
                _log.warning("report of %s: not enrolled here, or revoked; not folded", report.device_id)
        folded = self.ledger.fold(enrolled, now, newest)
        return [(report, fold.kind, sequence) for report, fold, sequence in folded]

    def _valid_devices(self) -> set[str]:
        """Everybody enrolled whose certificate is not revoked."""
        revoked = {str(serial) for serial in self.keyring.revoked()}
        return {record.device_id for record in self.ledger.devices() if record.certificate_serial not in revoked}

    async def _answer_request(self) -> None:
        topic, data = await self._requests.get()
        device_id = topics.device_of(topic)
        if topic.endswith("/hello"):
            try:
                await asyncio.to_thread(self._hear, device_id, data)
            except (Malformed, Untrusted) as error:  # one bad hello must not hold up the requests behind it
                _log.warning("%s", error)
            return
        response = await asyncio.to_thread(self._key_response, device_id, data)
        self._count_keys.add(1, "refused" if response.error else "sealed")
        with contextlib.suppress(Unavailable):
            await self._link.publish(topics.down(device_id, "key"), pack(response))

    def _hear(self, device_id: str, data: bytes) -> None:
        hello = unpack(data, dict[str, Any])
        if hello.get("device_id") != device_id:
            raise Malformed(f"hello of {device_id}: names {str(hello.get('device_id'))[:64]!r}")
        if device_id not in self._valid_devices():
            raise Untrusted(f"hello of {device_id}: not enrolled here, or revoked")
        running, state = str(hello.get("running", ""))[:64], str(hello.get("state", ""))[:32]
        self.ledger.heard(device_id, self._clock(), running=running, state=state)

    def _key_response(self, device_id: str, data: bytes) -> topics.KeyResponse:
        """The answer to a key request. Its `time` is not checked: whoever repeats a request causes only that the same
        key is sealed to the same device once more, and a device back after months may have a wrong clock."""
        number = 0
        try:
            envelope = open_envelope(data)
            number = unpack(envelope.payload, topics.KeyRequest).request  # so that a refusal reaches whoever asked
            record = self.ledger.device(device_id)
            name, verifying, sealing = device_keys_of(
                record.certificate, self.keyring.ca_pem(), self._clock(), self.keyring.revoked()
            )
            payload = verify_envelope(envelope, "key-request", {key_id(verifying): verifying})
            request = unpack(payload, topics.KeyRequest)
            if request.device_id != device_id or name != device_id:
                raise Untrusted(f"key request on the line of {device_id}: names {request.device_id[:64]!r}")
            release = self.ledger.release(request.manifest)
            reason = self.ledger.withdrawn(release.model).get(request.manifest)
            if reason is not None:
                raise Untrusted(f"version {request.manifest[:16]}…: withdrawn ({reason})")
            key = self.publisher.key(request.manifest)
            sealed = seal_to(sealing, key, topics.artifact_key_info(device_id, request.manifest))
            return topics.KeyResponse(number, sealed)
        except AtollError as error:
            _log.warning("key request of %s refused: %s", device_id, error)
            return topics.KeyResponse(number, error=str(error)[:500])

    # Enrolment and registration

    def enrol(self, wanted: Enrolment, *, replace: bool) -> Enrolled:
        """Issue a certificate. Blocking. Raises Malformed, and Untrusted when the identity belongs to another key.

        A device may not take a name that the broker's access rules give more rights to. An identity that is enrolled
        gets a new certificate for another key only with `replace` (an operator's token): the old one is then revoked.
        """
        require_identity(wanted.common_name)
        if wanted.kind not in ("device", "gateway", "server"):
            raise Malformed(f"enrolment: kind: expected device, gateway or server, found {wanted.kind[:32]!r}")
        _require_name(wanted.kind, wanted.common_name)
        before: DeviceRecord | None = None
        with contextlib.suppress(NotFound):
            before = self.ledger.device(wanted.common_name)
        certificate = self.keyring.issue_certificate(
            wanted.csr_pem.encode(),
            wanted.common_name,
            wanted.sealing_public or None,
            server=wanted.kind in ("server", "gateway"),
        )
        if before is not None:
            if not replace and int(before.certificate_serial) in self.keyring.revoked():
                raise Untrusted(
                    f"identity {wanted.common_name}: its certificate was revoked; "
                    "use another name, or let an operator enrol it again with the admin token"
                )
            if same_keys(before.certificate, certificate) and before.kind == wanted.kind:
                revoked = int(before.certificate_serial) in self.keyring.revoked()
                if days_left(before.certificate, self._clock()) > RENEW_DAYS and not revoked:
                    certificate = before.certificate  # the answer was lost on its way: give it again
            elif replace:
                self.keyring.revoke(int(before.certificate_serial))
            else:
                raise Untrusted(
                    f"identity {wanted.common_name}: enrolled already with another key; "
                    "use another name, or let an operator enrol it again with the admin token"
                )
        traits = dict(wanted.traits)
        record = DeviceRecord(
            device_id=wanted.common_name,
            kind=wanted.kind,
            tenant=self.tenant,
            device_class=traits.pop("device_class", "")[:64],
            region=traits.pop("region", "")[:64],
            labels={key[:64]: value[:64] for key, value in list(traits.items())[:32]},
            certificate=certificate,
            certificate_serial=str(serial_of(certificate)),
            enrolled=self._clock(),
        )
        self.ledger.enrol(record)
        return Enrolled(certificate, self.keyring.ca_pem(), pack(self.keyring.anchors()))

    def revoke(self, name: str) -> None:
        """End an identity's certificate: it gets no keys, and what it says or contributes no longer counts.

        Durable when it returns; the embedded broker and the aggregators hear of it within seconds. Raises NotFound."""
        record = self.ledger.device(name)
        self.keyring.revoke(int(record.certificate_serial))
        self.note("alert", f"{name}: its certificate was revoked")

    def register_aggregator(self, record: AggregatorRecord, *, replace: bool = False) -> None:
        """Remember an aggregator's keys and address; rounds take the first three by name.

        The first keys of a name stay, and three names are enough: all three aggregators hold the same token, and one
        that could register keys in another's name would be sent the shares of both. `replace` (an operator's token)
        overrides. Raises Malformed and Untrusted.
        """
        require_identity(record.key.name)
        known = {one.key.name: one.key for one in self.ledger.aggregators()}
        before = known.get(record.key.name)
        if not replace and before is None and len(known) >= AGGREGATORS:
            raise Untrusted(
                f"aggregator {record.key.name}: expected one of {', '.join(sorted(known))}; "
                "let an operator register another one with the admin token"
            )
        if not replace and before is not None and before != record.key:
            raise Untrusted(
                f"aggregator {record.key.name}: registered already with other keys; restore its folder, or let an "
                "operator register the new keys with the admin token"
            )
        self.ledger.save_aggregator(record)

    # Publishing and rollouts

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
            await self._say("info", f"published {label}: {record.file_bytes} bytes")
        self._snapshot = None
        return record

    async def start_rollout(self, text: str, target: str = "", file: str = "rollout.yaml") -> Rollout:
        """Begin the rollout that a YAML describes, or return it if this very rollout has begun already.

        `target` overrides the YAML's. Raises Malformed (with the line), NotFound, and Malformed when another rollout of
        the model is under way.
        """
        spec = read_rollout(text, file)
        async with self._deciding:
            begun = await asyncio.to_thread(self._begin_rollout, spec, text, target)
        await self._publish_soon()
        return begun

    def _begin_rollout(self, spec: RolloutSpec, text: str, target: str) -> Rollout:
        manifest = self.publisher.resolve(spec.model, target or spec.target).manifest
        every = [unpack(packed, Rollout) for packed in self.ledger.rollouts()]
        known = next((found for found in every if found.name == spec.name), None)
        if known is not None:
            if known.yaml == text and known.target == manifest:
                return known
            raise Malformed(f"rollout {spec.name}: the name was used for another rollout; choose a new metadata.name")
        blocking = [
            found
            for found in every
            if found.model == spec.model and rollouts.holds_devices(found) and found.target != manifest
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
            tenant=self.tenant,
            target=manifest,
            stable=self.ledger.stable(spec.model),
            devices=[(device.traits, now - device.last_seen <= AWAKE_S) for device in self.ledger.devices()],
            serial=self._next_serial(spec.model),
            withdrawn=self.ledger.withdrawn(spec.model),
            now=now,
        )
        for found in every:  # a rollout of the same target to some cohorts gives way to this one
            if found.model == spec.model and found.live:
                self._save(
                    Advance(msgspec.structs.replace(found, state="completed"), None, "superseded", spec.name), now
                )
        self._save(begun, now)
        return begun.rollout

    async def abort_rollout(self, name: str, reason: str = "an operator aborted it") -> Rollout:
        """Stop a rollout: its target is withdrawn and devices return. Raises NotFound; ended ones stay as they are."""
        async with self._deciding:
            found = unpack(await asyncio.to_thread(self.ledger.rollout, name), Rollout)
            if found.live or rollouts.holds_devices(found):
                serial = self._next_serial(found.model)
                withdrawn = self.ledger.withdrawn(found.model)
                now = self._clock()
                ended = rollouts.stop(found, "aborted", reason, now=now, serial=serial, withdrawn=withdrawn)
                await asyncio.to_thread(self._save, ended, now)
                found = ended.rollout
        await self._publish_soon()
        return found

    async def _publish_soon(self) -> None:
        # The tick publishes it in any case; this only saves the wait.
        with contextlib.suppress(Unavailable):
            await self._publish_retained()
        self._snapshot = None

    async def _advance_rollouts(self) -> None:
        async with self._deciding:
            changed = await asyncio.to_thread(self._advance_all)
        if changed:
            await self._publish_soon()

    def _advance_all(self) -> bool:
        changed = False
        for packed in self.ledger.rollouts():
            found = unpack(packed, Rollout)
            if found.state != "running":
                continue
            now = self._clock()
            health = self._health(found, now)
            looked = rollouts.advance(
                found,
                health,
                now=now,
                serial=self._next_serial(found.model),
                withdrawn=self.ledger.withdrawn(found.model),
            )
            if looked.rollout != found:
                self._save(looked, now)
                changed = changed or looked.plan is not None
        return changed

    def _health(self, found: Rollout, now: float) -> CohortHealth:
        devices = [
            DeviceStanding(record.traits, record.last_seen, record.running, record.safe_mode)
            for record in self.ledger.devices()
        ]
        summaries = self.ledger.summaries([found.target, found.stable], found.first_serial)
        outcomes = [o for o in self.ledger.outcomes(found.target) if o.received >= found.created]
        return cohort_health(
            self._plan(found.model),
            devices,
            [(row.device_id, row.summary) for row in summaries],
            [(o.device_id, o.outcome) for o in outcomes],
            now=now,
            silent_after=rollouts.silent_after(found.spec),
        )

    def _plan(self, model: str) -> RolloutPlan:
        newest = self.ledger.plan(model)
        if newest is None:
            raise NotFound(f"plan of {model!r}: none was issued; apply a rollout first")
        return unpack(open_envelope(newest[1]).payload, RolloutPlan)

    def _next_serial(self, model: str) -> int:
        newest = self.ledger.plan(model)
        return 1 if newest is None else newest[0] + 1

    def _save(self, moved: Advance, now: float) -> None:
        """Write down a step of a rollout, with its signed plan, in one transaction."""
        found = moved.rollout
        plan = None
        if moved.plan is not None:
            envelope = seal_envelope(self.keyring.sign(ROLE_PLAN, PLAN_TYPE, pack(moved.plan)))
            plan = (moved.plan.serial, envelope)
        ended_badly = found.state in ("stopped", "aborted") and found.stable != found.target
        self.ledger.save_rollout(
            name=found.name,
            model=found.model,
            state=found.state,
            created=found.created,
            record=pack(found),
            history=StageEvent(now, found.stage, found.serial, moved.event, moved.text) if moved.event else None,
            plan=plan,
            stable=rollouts.next_stable(found) if plan is not None else None,
            withdrawn={found.target: found.reason} if ended_badly else None,
        )
        if moved.event:
            kind = "alert" if found.state in ("stopped", "aborted", "paused") else "info"
            self.note(kind, f"rollout {found.name}: {moved.event}: {moved.text}")

    # Rounds

    async def open_round(self, spec: RoundSpec) -> Round:
        """Announce a federated round, or find the one of this name. Raises Malformed for a spec that cannot work,
        Unavailable while another one is open."""
        opened = await asyncio.to_thread(self._open_round, spec.checked())
        self._rounds_due.put_nowait(opened.round_id)
        return opened

    def _open_round(self, spec: RoundSpec) -> Round:
        if spec.name:
            every = (unpack(packed, Round) for packed in self.ledger.rounds())
            named = next((one for one in every if (one.task.model, one.spec.name) == (spec.model, spec.name)), None)
            if named is not None:
                return named
        open_now = self._newest_round(spec.model)
        if open_now is not None and open_now.live:
            raise Unavailable(f"round {open_now.round_id} of {spec.model} is {open_now.state}; wait for its end")
        base = spec.base or self.ledger.stable(spec.model)
        if not base:
            raise Malformed(f"round: model {spec.model!r} has no stable version; publish one and roll it out first")
        manifest, source = self.publisher.manifest(base), self.publisher.source(base)
        parameters = masters.parameters_of(manifest)
        graph = masters.training_graph(source, spec.positive_weight)
        self.store.put("artifact", digest_of(graph), graph)
        now = self._clock()
        aggregators = tuple(record.key for record in self.ledger.aggregators()[:AGGREGATORS])
        issued = int(now)
        if open_now is not None:
            issued = max(issued, open_now.task.issued + 1)
        task = RoundTask(
            tenant=self.tenant,
            model=spec.model,
            round_id=f"{spec.model}-{issued}-{secrets.token_hex(3)}",
            base=base,
            training_graph=digest_of(graph),
            parameters=parameters,
            length=sum(int(np.prod(parameter.shape, dtype=np.int64)) for parameter in parameters),
            steps=spec.steps,
            batch_size=spec.batch_size,
            learning_rate=spec.learning_rate,
            clip_norm_l2=spec.clip_norm_l2,
            hostile_max=spec.hostile_max,
            selected_min=spec.selected_min,
            aggregators=aggregators,
            issued=issued,
            deadline=int(now + spec.deadline_s),
        )
        require_announceable(task)
        opened = Round(
            round_id=task.round_id,
            spec=msgspec.structs.replace(spec, base=base),
            task=task,
            announcement=seal_envelope(self.keyring.sign(ROLE_ROUND, TASK_TYPE, pack(task))),
            state=State.ANNOUNCED.value,
            opened=now,
        )
        self._save_round(opened)
        self.note("info", f"round {opened.round_id}: announced on {base[:16]}…, {task.length} parameters")
        return opened

    def _newest_round(self, model: str) -> Round | None:
        every = [unpack(packed, Round) for packed in self.ledger.rounds()]
        return next((found for found in reversed(every) if found.task.model == model), None)

    def _save_round(self, found: Round) -> None:
        self.ledger.save_round(
            round_id=found.round_id,
            model=found.task.model,
            state=found.state,
            created=found.opened,
            record=pack(found),
        )
        self._snapshot = None

    async def abort_round(self, round_id: str) -> Round:
        """Stop a round before its result is published. Raises NotFound."""
        found = await asyncio.to_thread(self.round, round_id)
        if found.live:
            self._aborted.add(round_id)
            async with self._admitted:
                self._admitted.notify_all()
        return found

    def round(self, round_id: str) -> Round:
        """A round as it stands. Raises NotFound."""
        return unpack(self.ledger.round(round_id), Round)

    def frozen_contributions(self, round_id: str) -> list[bytes]:
        """The contributions of a round in the frozen order. Blocking. NotFound, and Unavailable before the freeze."""
        found = self.round(round_id)
        if not found.root:
            raise Unavailable(f"round {round_id}: not frozen yet, it is {found.state}")
        offsets = {entry.digest: entry.log_offset for entry in self.ledger.contributions(round_id)}
        return [self._log.read(offsets[digest]) for digest in found.frozen]

    async def _drive(self, round_id: str) -> None:
        """Walk one round to its end. When its state cannot be written down, the walk starts over from what is there."""
        try:
            while True:
                try:
                    await self._walk(round_id)
                    return
                except Unavailable as error:
                    self._count_failures.add(1, "round")
                    _log.warning("round %s: %s", round_id, error)
                    await asyncio.sleep(self._tick_s)
                except AtollError:
                    self._count_failures.add(1, "round")
                    _log.exception("round %s is left as it is", round_id)
                    return
        finally:
            self._driving.discard(round_id)
            self._aborted.discard(round_id)

    async def _walk(self, round_id: str) -> None:
        """Take a round through the table until it rests. Each command is idempotent, so that BOOTED may repeat it."""
        found = await asyncio.to_thread(self.round, round_id)
        state, command = step(found.at, Event.BOOTED)
        while command is not Command.REST:
            before = self._clock()
            found, event = await self._perform(command, found)
            if round_id in self._aborted:
                event = Event.ABORTED if event is not Event.RELEASED else event
                reason = found.reason or "an operator aborted it"
                found = msgspec.structs.replace(found, reason=reason)
            state, command = step(found.at, event)
            taken = {
                **found.seconds,
                found.state: round(found.seconds.get(found.state, 0.0) + self._clock() - before, 3),
            }
            found = msgspec.structs.replace(found, state=state.value, seconds=taken)
            if not found.live or state is State.FROZEN:
                found = self._closed(found)
            await asyncio.to_thread(self._save_round, found)
            if event is not Event.ATTEMPT_FAILED:
                kind = "alert" if state in (State.FAILED, State.REFUSED) else "info"
                told = f": {found.reason}" if found.reason and not found.live else ""
                await self._say(kind, f"round {round_id}: {state.name.lower()}{told}")
            if not found.live or state is State.FROZEN:
                await self._publish_soon()

    def _closed(self, found: Round) -> Round:
        """The round with an announcement that says so; devices stop training and sending."""
        if not unpack(open_envelope(found.announcement).payload, RoundTask).open:
            return found
        task = msgspec.structs.replace(found.task, open=False, issued=max(int(self._clock()), found.task.issued + 1))
        return msgspec.structs.replace(
            found, announcement=seal_envelope(self.keyring.sign(ROLE_ROUND, TASK_TYPE, pack(task)))
        )

    async def _perform(self, command: Command, found: Round) -> tuple[Round, Event]:
        """Do what the table asks for; failures that no retry cures end the round with their name."""
        perform = {
            Command.ANNOUNCE: self._announce,
            Command.COLLECT: self._collect,
            Command.FREEZE: self._freeze,
            Command.AGGREGATE: self._aggregate,
            Command.JUDGE: self._judge,
            Command.PUBLISH: self._release,
        }[command]
        while True:
            try:
                return await perform(found)
            except Unavailable as error:
                # The disk is full or the broker away: nothing is decided, so the same command is tried again.
                self._count_failures.add(1, "round")
                _log.warning("round %s: %s", found.round_id, error)
                if found.round_id in self._aborted:
                    return found, Event.ABORTED
                await asyncio.sleep(self._tick_s)
            except AtollError as error:
                return msgspec.structs.replace(found, reason=f"{type(error).__name__}: {error}"), Event.BROKEN
            except Exception as error:
                _log.exception("round %s failed", found.round_id)
                return msgspec.structs.replace(found, reason=f"{type(error).__name__}: {error}"), Event.BROKEN

    async def _announce(self, found: Round) -> tuple[Round, Event]:
        if self._clock() > found.task.deadline:
            return msgspec.structs.replace(
                found, reason="the deadline passed before it could be announced"
            ), Event.TOO_FEW
        await self._link.publish(topics.round_topic(self.tenant, found.task.model), found.announcement, retain=True)
        return found, Event.HEARD

    async def _collect(self, found: Round) -> tuple[Round, Event]:
        """Wait until all that can come have come, or the deadline."""
        while True:
            admitted = len(await asyncio.to_thread(self.ledger.contributions, found.round_id))
            wanted = found.spec.contributions_max or await asyncio.to_thread(self._able, found)
            left = found.task.deadline - self._clock()
            if found.round_id in self._aborted:
                return found, Event.ABORTED
            if admitted >= found.spec.quorum and (admitted >= wanted or left <= 0):
                return found, Event.COLLECTED
            if left <= 0:
                reason = f"expected a quorum of {found.spec.quorum} contributions, found {admitted} at the deadline"
                return msgspec.structs.replace(found, reason=reason), Event.TOO_FEW
            async with self._admitted:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._admitted.wait(), min(left, self._tick_s))

    def _able(self, found: Round) -> int:
        """How many devices may take part: those heard lately that run the base. The quorum is always waited for."""
        since = self._clock() - AWAKE_S
        able = [record for record in self.ledger.devices() if record.last_seen >= since]
        return max(found.spec.quorum, sum(record.running == found.task.base for record in able))

    async def _freeze(self, found: Round) -> tuple[Round, Event]:
        """Fix the ordered list. The state is FROZEN already, so whatever is not admitted by now is refused as late;
        the lock waits for a batch that began to be admitted before."""
        async with self._admitting:
            admitted = await asyncio.to_thread(self.ledger.contributions, found.round_id)
        frozen = found.frozen or tuple(entry.digest for entry in admitted)
        root = merkle.root([bytes.fromhex(digest) for digest in frozen])
        figures = {**found.figures, "bytes_uploaded": sum(entry.size for entry in admitted)}
        return msgspec.structs.replace(found, frozen=frozen, root=root, figures=figures), Event.BEGUN

    async def _aggregate(self, found: Round) -> tuple[Round, Event]:
        """One attempt on the frozen set. The result is durable before the state says so; a result that is there already
        (the coordinator died in between) is taken instead of a second opening."""
        result = await asyncio.to_thread(self.ledger.round_result, found.round_id)
        if result is not None:
            opening = unpack(open_envelope(unpack(result[1], tuple[bytes, ...])[0]).payload, Opening)
            return _with_verdicts(found, unpack(opening.decision, Decision)), Event.OPENED
        if found.attempt >= ATTEMPTS_MAX:
            return msgspec.structs.replace(
                found,
                reason=found.failures[-1] if found.failures else f"{ATTEMPTS_MAX} attempts were begun, none ended",
            ), Event.EXHAUSTED
        # The attempt's number is durable before anybody hears it: a number is used once.
        found = msgspec.structs.replace(found, attempt=found.attempt + 1)
        await asyncio.to_thread(self._save_round, found)
        payload = {
            "round_id": found.round_id,
            "attempt": found.attempt,
            "task": seal_envelope(self.keyring.sign(ROLE_ROUND, TASK_TYPE, pack(found.task))),
            "contributions": list(found.frozen),
            "root": found.root,
        }
        names = [key.name for key in found.task.aggregators]
        try:
            replies = await self._bridge.command(payload, names, found.spec.aggregation_s)
        except Unavailable as error:
            failures = (*found.failures, str(error)[:500])
            await self._say("alert", f"round {found.round_id}: attempt {found.attempt} failed: {error}")
            await asyncio.sleep(self._tick_s * found.attempt)
            return msgspec.structs.replace(found, failures=failures), Event.ATTEMPT_FAILED
        ordered = [replies[name] for name in names]
        aggregate = await asyncio.to_thread(combine_openings, ordered, found.task)
        decision = aggregate.decision
        found = _with_verdicts(found, decision)
        if aggregate.mean is None:
            return msgspec.structs.replace(found, reason=f"the aggregators refused: {decision.refusal}"), Event.BROKEN
        transcript = pack([reply["opening"] for reply in ordered])
        mean = aggregate.mean.astype("<f4").tobytes()
        await asyncio.to_thread(self.ledger.save_round_result, found.round_id, mean, transcript)
        return found, Event.OPENED

    def _candidate_source(self, found: Round) -> bytes:
        result = self.ledger.round_result(found.round_id)
        if result is None:
            raise NotFound(f"round {found.round_id}: its result is not in the ledger")
        return masters.apply_mean(self.publisher.source(found.task.base), np.frombuffer(result[0], dtype="<f4"))

    async def _judge(self, found: Round) -> tuple[Round, Event]:
        return await asyncio.to_thread(self._judge_now, found)

    def _judge_now(self, found: Round) -> tuple[Round, Event]:
        source = self._candidate_source(found)
        candidate = self.publisher.prepare(source, model=found.task.model, now=self._clock(), parent=found.task.base)
        if self._evaluate is None:
            return found, Event.PASSED
        base = self.publisher.manifest(found.task.base)
        before = self._evaluate(base, self.publisher.file(found.task.base))
        after = self._evaluate(candidate.draft, candidate.file)
        gates = judge(after, before, self._limits)
        figures = {
            **found.figures,
            "average_precision_base": before.average_precision,
            "average_precision_candidate": after.average_precision,
            "gates": {gate.name: gate.reason for gate in gates},
        }
        found = msgspec.structs.replace(found, figures=figures)
        refused = failed(gates)
        if refused:
            return msgspec.structs.replace(found, reason=refused), Event.GATE_CLOSED
        return found, Event.PASSED

    async def _release(self, found: Round) -> tuple[Round, Event]:
        source = await asyncio.to_thread(self._candidate_source, found)
        record = await self.publish(
            source,
            model=found.task.model,
            name=found.round_id,
            parent=found.task.base,
            lineage=Lineage(round_id=found.round_id, contributions_root=found.root),
        )
        return msgspec.structs.replace(found, candidate=record.manifest), Event.RELEASED

    async def _take_contributions(self) -> None:
        batch = [await self._contributions.get()]
        while len(batch) < 16 and not self._contributions.empty():
            batch.append(self._contributions.get_nowait())
        async with self._admitting:
            receipts = await asyncio.to_thread(self._admit, batch)
        async with self._admitted:
            self._admitted.notify_all()
        for device_id, receipt in receipts:
            with contextlib.suppress(Unavailable):
                await self._link.publish(topics.down(device_id, "receipt"), pack(receipt))

    def _admit(self, batch: Sequence[tuple[str, bytes]]) -> list[tuple[str, topics.ContributionReceipt]]:
        """Verify, ask every question, append with one flush, record; only then are there receipts.

        A crash between the log and the ledger leaves records in the log that nothing names; their devices have no
        receipt and send again.
        """
        now = self._clock()
        receipts: list[tuple[str, topics.ContributionReceipt]] = []
        fresh: dict[str, list[tuple[Offered, bytes]]] = {}
        for topic, data in batch:
            device_id = topics.device_of(topic)
            offered, round_ = self._offered(device_id, data, now)
            if round_ is not None:
                pending = {entry.device_id: entry.digest for entry, _ in fresh.get(round_.round_id, [])}
                round_ = msgspec.structs.replace(round_, admitted={**pending, **round_.admitted})
            refusal = refuse(offered, round_, now)
            if refusal is not None:
                receipts.append((device_id, self._refused(offered, refusal)))
                continue
            if round_ is not None and not already_in(offered, round_):
                fresh.setdefault(round_.round_id, []).append((offered, data))
            receipts.append((device_id, topics.ContributionReceipt(offered.round_id, True)))
        for round_id, entries in fresh.items():
            offsets = self._log.append([data for _, data in entries])
            self.ledger.admit(
                round_id,
                [
                    AdmittedContribution(offered.device_id, offered.digest, offset, len(data), now)
                    for (offered, data), offset in zip(entries, offsets, strict=True)
                ],
            )
            self._count_admitted.add(len(entries))
        return receipts

    def _refused(self, offered: Offered, refusal: Refusal) -> topics.ContributionReceipt:
        self._count_refused.add(1, refusal.reason)
        with contextlib.suppress(NotFound):
            self.ledger.round(offered.round_id)
            self.ledger.count_refusal(offered.round_id, refusal.reason)
        _log.info("contribution of %s refused: %s: %s", offered.device_id, refusal.reason, refusal.text)
        return topics.ContributionReceipt(offered.round_id, False, f"{refusal.reason}: {refusal.text}"[:500])

    def _offered(self, device_id: str, data: bytes, now: float) -> tuple[Offered, OpenRound | None]:
        """What the bytes turn out to be, and the round that they claim to be for."""
        digest = digest_of(data)
        try:
            claim = unpack(parse(data).claim, Claim)
            newest = self._newest_round(claim.model)
            if newest is not None and len(data) > size_max(newest.task):
                raise Malformed(f"expected at most {size_max(newest.task)} bytes, found {len(data)}")
        except Malformed as error:
            return Offered(device_id=device_id, digest=digest, flaw="malformed", flaw_text=str(error)), None
        claimed = Offered(
            device_id=device_id, digest=digest, round_id=claim.round_id, base=claim.base, length=claim.length
        )
        round_ = None
        if newest is not None:
            entries = self.ledger.contributions(newest.round_id)
            round_ = OpenRound(
                round_id=newest.round_id,
                base=newest.task.base,
                length=newest.task.length,
                collecting=newest.at in (State.ANNOUNCED, State.COLLECTING),
                deadline=float(newest.task.deadline),
                contributions_max=newest.spec.contributions_max or CONTRIBUTIONS_MAX,
                admitted={entry.device_id: entry.digest for entry in entries},
            )
        try:
            record = self.ledger.device(device_id)
            revoked = self.keyring.revoked()
            if serial_of(claim.certificate) in revoked:
                return _flawed(claimed, "revoked certificate", f"certificate of {device_id}: revoked"), round_
            verified = verify(data, self.keyring.ca_pem(), revoked, now)
            if verified.device_id != device_id or record.kind != "device":
                text = f"sent on the line of {device_id}, signed by {verified.device_id}"
                return _flawed(claimed, "unknown certificate", text), round_
        except SignatureInvalid as error:
            return _flawed(claimed, "bad signature", str(error)), round_
        except Expired as error:
            return _flawed(claimed, "expired certificate", str(error)), round_
        except (NotFound, Untrusted) as error:
            return _flawed(claimed, "unknown certificate", str(error)), round_
        except Malformed as error:
            return _flawed(claimed, "malformed", str(error)), round_
        if newest is not None and claim.round_id == newest.round_id:
            claimed = msgspec.structs.replace(claimed, mismatch=mismatch(verified, newest.task))
        return claimed, round_

    # What the page and the command line see

    def snapshot(self) -> Snapshot:
        """Everything at this moment. Blocking; cached for a quarter of a second, so that viewers cost nothing."""
        made = time.monotonic()
        if self._snapshot is not None and made - self._snapshot[0] < SNAPSHOT_KEPT_S:
            return self._snapshot[1]
        now = self._clock()
        live = self._window.rate(now)
        releases = self.ledger.releases()
        labels = {record.manifest: show(record.version) for record in releases}
        devices = self.ledger.devices()
        decided = Counter(self._decided)
        withdrawn = {digest for model in {r.model for r in releases} for digest in self.ledger.withdrawn(model)}
        running = Counter(record.running for record in devices)
        self._gauge_devices.set(len(devices))
        found = Snapshot(
            time=now,
            tenant=self.tenant,
            model=self.model,
            act=self._act,
            decisions=sum(decided.values()),
            decisions_per_second=live.decisions_per_second,
            latency_p50_us=live.latency_p50_us,
            latency_p95_us=live.latency_p95_us,
            latency_p99_us=live.latency_p99_us,
            latency=live.latency,
            devices=tuple(
                DeviceState(
                    device_id=record.device_id,
                    device_class=record.device_class,
                    region=record.region,
                    running=record.running,
                    version=labels.get(record.running, ""),
                    state=record.state,
                    safe_mode=record.safe_mode,
                    plan_serial=record.plan_serial,
                    last_seen=record.last_seen,
                    decisions=decided[record.device_id],
                    lost_requests=record.lost_requests,
                    dropped=record.dropped,
                    reported=record.device_id in decided,
                )
                for record in devices
            ),
            releases=tuple(
                ReleaseState(
                    manifest=record.manifest,
                    version=labels[record.manifest],
                    release=record.release,
                    created=record.created,
                    file_bytes=record.file_bytes,
                    whole_bytes=record.bytes_whole,
                    patch_bytes=record.bytes_patch,
                    devices=running[record.manifest],
                    withdrawn=record.manifest in withdrawn,
                    round_id=record.round_id,
                )
                for record in releases
            ),
            rollouts=tuple(self._rollout_state(unpack(packed, Rollout), now) for packed in self.ledger.rollouts()),
            rounds=tuple(self._round_state(unpack(packed, Round)) for packed in self.ledger.rounds()),
            notes=tuple(Note(time=event.time, text=event.text, kind=event.kind) for event in self.ledger.events()),
            broker_connected=self._link.connected,
        )
        self._snapshot = (made, found)
        return found

    def _rollout_state(self, found: Rollout, now: float) -> RolloutState:
        plan = rollouts.plan_of(found, self.ledger.withdrawn(found.model), now)
        records = self.ledger.devices()
        traits: list[DeviceTraits] = [record.traits for record in records]
        eligible = [one for one in traits if any(matches(cohort, one) for cohort in plan.cohorts)]
        in_stage = {one.device_id for one in eligible if assign(plan, one).arm == "target"}
        health: dict[str, dict[str, float]] = {}
        if found.live:
            counted = self._health(found, now)
            for arm, figures in (("target", counted.target), ("control", counted.control)):
                decided = figures.decided
                health[arm] = {
                    "devices": figures.devices,
                    "silent": figures.silent,
                    "adopted": figures.adopted,
                    "decisions": decided.decisions,
                    "errors": decided.errors,
                    "latency_p95_ms": latency_quantile_us(decided.latency, 0.95) / 1000,
                    "false_positive_rate": decided.false_positives / max(1, decided.labelled_legitimate),
                    "rolled_back": figures.rolled_back,
                }
        return RolloutState(
            name=found.name,
            state=found.state,
            stage=found.stage,
            stages=tuple(
                f"{stage.devices} devices" if stage.devices is not None else f"{stage.share or 0.0:.0%}"
                for stage in found.spec.stages
            ),
            target=found.target,
            stable=found.stable,
            serial=found.serial,
            eligible=len(eligible),
            in_stage=len(in_stage),
            adopted=sum(record.running == found.target and record.device_id in in_stage for record in records),
            health=health,
            history=tuple(
                RolloutEvent(time=entry.time, event=entry.event, stage=entry.stage, reason=entry.text)
                for entry in self.ledger.stage_history(found.name)
            ),
        )

    def _round_state(self, found: Round) -> RoundState:
        return RoundState(
            round_id=found.round_id,
            state=found.state,
            base=found.task.base,
            candidate=found.candidate,
            quorum=found.spec.quorum,
            admitted=len(self.ledger.contributions(found.round_id)),
            refused=self.ledger.refusals(found.round_id),
            chosen=found.chosen,
            rejected=tuple(
                RejectedDevice(device_id=device_id, reason=reason) for device_id, reason in found.rejected.items()
            ),
            attempt=found.attempt,
            reason=found.reason,
            opened=found.opened,
            figures={**found.figures, "seconds": found.seconds},
        )


def _require_name(kind: str, name: str) -> None:
    """Names decide what the broker allows, so a kind may not take another's. Raises Malformed."""
    if kind not in ("device", "gateway", "server"):
        raise Malformed(f"enrolment: kind: expected device, gateway or server, found {kind[:32]!r}")
    if name.startswith("gateway-") != (kind == "gateway") or (kind == "device" and name == "coordinator"):
        wanted = "a name that begins with gateway-" if kind == "gateway" else "another name"
        raise Malformed(f"enrolment: common_name of a {kind}: expected {wanted}, found {name!r}")


def _with_verdicts(found: Round, decision: Decision) -> Round:
    return msgspec.structs.replace(
        found,
        chosen=tuple(device.device_id for device in decision.devices if device.selected),
        rejected={device.device_id: device.reason for device in decision.devices if not device.selected},
    )


def _flawed(offered: Offered, flaw: str, text: str) -> Offered:
    return msgspec.structs.replace(offered, flaw=flaw, flaw_text=text)
