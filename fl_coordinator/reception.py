"""What devices say, but for contributions: reports, greetings and requests for keys.

    reports       -> fold (one transaction for many), hear who sits a round out -> acknowledge
    greetings     -> what the device runs, what file stands there, and that it is awake; a device that is many releases
                     behind gets a direct patch made
    key requests  -> verify the device's signature -> seal the artifact key to the device

Handlers of the link only put messages into bounded inboxes. A report is acknowledged after the ledger has it; whatever
is lost on the way, devices send again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Sequence

from fl_coordinator.absences import Absences
from fl_coordinator.inbox import Inbox
from fl_coordinator.ledger import Ledger
from fl_coordinator.ports import Clock, Link, Note
from fl_coordinator.publishing import Publisher
from fl_coordinator.tables.records import DeviceRecord, ReleaseRecord
from model_delta import topics
from model_delta.encoding import pack, unpack
from model_delta.errors import AtollError, Malformed, NotFound, Unavailable, Untrusted
from model_delta.keys.certificates import device_keys_of
from model_delta.keys.encryption import seal_to
from model_delta.keys.keyring import Keyring
from model_delta.plan import RolloutPlan, assign
from model_delta.trust.signing import key_id, open_envelope
from model_delta.trust.signing import verify as verify_envelope
from model_delta.version import private_branch, show
from monitoring.collector import REPORT_BYTES_MAX, LiveWindow, require_plausible
from monitoring.metrics import Metrics
from monitoring.telemetry import Report

QUEUE_MAX = 4_096
REQUEST_BYTES_MAX = 16_384
BATCH_MAX = 256
ALARMS_TOLD_MAX = 16
LATE_MAX = 64
"""How many direct patches may wait to be made; a device that finds none takes another way."""

_log = logging.getLogger("atoll.coordinator")


class Reception:
    """Two inboxes and what is done with each message. For one event loop; blocking work runs in threads.

    `window` has the last seconds' figures, `decided` the decisions of each device since its enrolment.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        keyring: Keyring,
        link: Link,
        publisher: Publisher,
        metrics: Metrics,
        clock: Clock,
        note: Note,
    ) -> None:
        self.window = LiveWindow()
        self.decided: Counter[str] = Counter()
        self.reports = Inbox(
            messages_max=QUEUE_MAX, per_device_max=32, message_bytes_max=REPORT_BYTES_MAX, bytes_max=64 << 20
        )
        self.requests = Inbox(
            messages_max=QUEUE_MAX, per_device_max=64, message_bytes_max=REQUEST_BYTES_MAX, bytes_max=16 << 20
        )
        self._ledger = ledger
        self._keyring = keyring
        self._link = link
        self._publisher = publisher
        self._clock, self._note = clock, note
        self._late: asyncio.Queue[tuple[str, str]] = asyncio.Queue(LATE_MAX)
        self._asked_late: set[tuple[str, str]] = set()
        self._absences = Absences(ledger=ledger, keyring=keyring, metrics=metrics)
        self._count_files = metrics.counter(
            "hello_files", "Greetings, by the file that stands on the device.", ("file",)
        )
        self._alarmed: set[str] = set()
        metrics.gauge("devices_alarmed", "Devices that say that their trust or their disk has a problem.").read_from(
            lambda: float(len(self._alarmed))
        )
        self._count_reports = metrics.counter("reports", "Reports folded, by verdict.", ("verdict",))
        self._count_keys = metrics.counter("key_requests", "Key requests, by answer.", ("answer",))

    def recall(self) -> None:
        """Take up the devices' decisions from the ledger, once, at the start. Blocking."""
        for row in self._ledger.summaries():
            self.decided[row.device_id] += row.summary.answers

    async def fold_reports(self) -> None:
        """Fold the reports that have arrived into the ledger, then acknowledge each; waits for one."""
        batch = [await self.reports.get()]
        while len(batch) < BATCH_MAX and not self.reports.empty():
            batch.append(self.reports.get_nowait())
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
            await self._hear_alarm(report)
            if verdict in ("new", "gap"):
                self.window.add(now, report.summaries)
                self.decided[report.device_id] += sum(summary.answers for summary in report.summaries)
            ack = topics.ReportAck(report.epoch, sequence)
            # A lost acknowledgement is repeated when the device repeats the report.
            with contextlib.suppress(Unavailable):
                await self._link.publish(topics.down(report.device_id, "ack"), pack(ack))

    async def _hear_alarm(self, report: Report) -> None:
        """Remember who raises an alarm; people hear of the first few, the metric counts the rest."""
        if not report.alarm:
            self._alarmed.discard(report.device_id)
        elif report.device_id not in self._alarmed:
            self._alarmed.add(report.device_id)
            if len(self._alarmed) <= ALARMS_TOLD_MAX:
                await asyncio.to_thread(self._note, "alert", f"{report.device_id}: {report.alarm[:200]}")

    def _fold(self, reports: Sequence[Report], now: float) -> list[tuple[Report, str, int]]:
        plans = [self._ledger.plan(model) for model in self._ledger.planned_models()]
        newest = max((plan[0] for plan in plans if plan is not None), default=0)
        known = self._valid_devices()
        enrolled = [report for report in reports if report.device_id in known]
        for report in reports:
            if report.device_id not in known:
                _log.warning("report of %s: not enrolled here, or revoked; not folded", report.device_id)
        folded = self._ledger.fold(enrolled, now, newest)
        self._absences.hear(enrolled, known, now)
        return [(report, fold.kind, sequence) for report, fold, sequence in folded]

    def _valid_devices(self) -> dict[str, DeviceRecord]:
        """Everybody enrolled whose certificate is not revoked, by name."""
        revoked = {str(serial) for serial in self._keyring.revoked()}
        found = self._ledger.devices()
        return {record.device_id: record for record in found if record.certificate_serial not in revoked}

    async def answer_request(self) -> None:
        """Hear one greeting, or answer one key request; waits for it."""
        topic, data = await self.requests.get()
        device_id = topics.device_of(topic)
        if topic.endswith("/hello"):
            try:
                late = await asyncio.to_thread(self._hear, device_id, data)
                if late is not None:
                    self.want_direct(*late)
            except (Malformed, Untrusted) as error:  # one bad hello must not hold up the requests behind it
                _log.warning("%s", error)
            return
        response = await asyncio.to_thread(self._key_response, device_id, data)
        self._count_keys.add(1, "refused" if response.error else "sealed")
        with contextlib.suppress(Unavailable):
            await self._link.publish(topics.down(device_id, "key"), pack(response))

    def want_direct(self, base: str, target: str) -> None:
        """Have a direct patch made soon, unless too many are waiting: devices then take another way."""
        if (base, target) not in self._asked_late and not self._late.full():
            self._asked_late.add((base, target))
            self._late.put_nowait((base, target))

    async def make_late_patch(self) -> None:
        """Make one direct patch that a late device can use; waits for the next such device."""
        base, target = await self._late.get()
        try:
            if await asyncio.to_thread(self._publisher.offer_direct, base, target):
                _log.info("a direct patch from %s to %s for late devices", base[:12], target[:12])
        finally:
            self._asked_late.discard((base, target))

    def _hear(self, device_id: str, data: bytes) -> tuple[str, str] | None:
        """Note a greeting; the version that the device has and the one that it should run, when they differ."""
        hello = unpack(data, topics.Hello)
        if hello.device_id != device_id:
            raise Malformed(f"hello of {device_id}: names {hello.device_id[:64]!r}")
        if device_id not in self._valid_devices():
            raise Untrusted(f"hello of {device_id}: not enrolled here, or revoked")
        record = self._ledger.device(device_id)
        running = hello.running[:64]
        self._ledger.heard(device_id, self._clock(), running=running, state=hello.state[:32], model=hello.model[:64])
        there = self._publisher.release_of_root(hello.root)
        self._look_at_file(record, hello.root[:64], there)
        base = there.manifest if there is not None else running
        target = self._target_of(record, base)
        return (base, target) if target and base != target else None

    def _look_at_file(self, device: DeviceRecord, root: str, there: ReleaseRecord | None) -> None:
        """Recognise a file that was damaged or changed, and a device that was set back. It fetches by itself what its
        plan says; this is for people."""
        before: ReleaseRecord | None = None
        with contextlib.suppress(NotFound):
            before = self._ledger.release(device.running)
        if not root:
            kind = "none"
        elif there is None:
            kind = "changed"
            own = private_branch(before.version if before is not None else {}, device.device_id)
            self._note("info", f"{device.device_id}: its file is no release but {show(own)}: damaged, or changed there")
        elif before is not None and before.model == there.model and there.release < before.release:
            kind = "older"
            self._note(
                "info", f"{device.device_id}: back with release {there.release} after {before.release}: set back?"
            )
        else:
            kind = "release"
        self._count_files.add(1, kind)

    def _target_of(self, device: DeviceRecord, base: str) -> str:
        """What the newest plan of the version's model says that the device should run; "" without a plan."""
        try:
            plan = self._ledger.plan(self._ledger.release(base).model)
        except NotFound:
            return ""
        if plan is None:
            return ""
        return assign(unpack(open_envelope(plan[1]).payload, RolloutPlan), device.traits).manifest

    def _key_response(self, device_id: str, data: bytes) -> topics.KeyResponse:
        """The answer to a key request. Its `time` is not checked: whoever repeats a request causes only that the same
        key is sealed to the same device once more, and a device back after months may have a wrong clock."""
        number = 0
        try:
            envelope = open_envelope(data)
            number = unpack(envelope.payload, topics.KeyRequest).request  # so that a refusal reaches whoever asked
            record = self._ledger.device(device_id)
            name, verifying, sealing = device_keys_of(
                record.certificate, self._keyring.ca_pem(), self._clock(), self._keyring.revoked()
            )
            payload = verify_envelope(envelope, "key-request", {key_id(verifying): verifying})
            request = unpack(payload, topics.KeyRequest)
            if request.device_id != device_id or name != device_id:
                raise Untrusted(f"key request on the line of {device_id}: names {request.device_id[:64]!r}")
            release = self._ledger.release(request.manifest)
            reason = self._ledger.withdrawn(release.model).get(request.manifest)
            if reason is not None:
                raise Untrusted(f"version {request.manifest[:16]}…: withdrawn ({reason})")
            key = self._publisher.key(request.manifest)
            sealed = seal_to(sealing, key, topics.artifact_key_info(device_id, request.manifest))
            return topics.KeyResponse(number, sealed)
        except AtollError as error:
            _log.warning("key request of %s refused: %s", device_id, error)
            return topics.KeyResponse(number, error=str(error)[:500])
