"""The device: its parts put together, and what it says to the world.

    Answers         a payment in, a decision out                           answers.py
    Inferences      named tensors in and out, of a model of any signature  inferences.py
    Installation    which version answers, and how the next one gets here  installation.py
    Plans           which rollout plan says so                             plans.py
    Direction       asks the director how to get to a version              direction.py
    Participation   one step of training for a federated round             participation.py
    Vouching        what the platform's repository says of versions, keys  vouching.py
    Outbox          what happened, until the coordinator has it            outbox.py

The device is given everything it touches: a link to the broker, a folder, a clock, runtimes as callables. Waits use the
monotonic clock; wall time (`clock`) only judges expiry and dates records, so a jump of it delays nothing.

    device = Device(identity=..., traits=..., ...)
    async with asyncio.TaskGroup() as group:
        group.create_task(device.run())
        decision = await device.decide(features)            # a model of payments
        inferred = await device.infer({"pixels": pixels})   # a model of any signature
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime import training
from edge_runtime.answers import Answers
from edge_runtime.direction import Direction
from edge_runtime.fetching import Fetcher
from edge_runtime.identity import Identity
from edge_runtime.inference import OpenModel, RunGraph
from edge_runtime.inferences import Inferences, Inferred
from edge_runtime.installation import Installation
from edge_runtime.link import Link
from edge_runtime.outbox import Outbox, Record, fold
from edge_runtime.participation import Contribute, Data, Learning, Participation, Train
from edge_runtime.probation import ProbationRules
from edge_runtime.regions import AskRegion
from edge_runtime.running import Running
from edge_runtime.safe_mode import Baseline, OpenBaseline, SafeMode, verified_baseline
from edge_runtime.slots import Slots
from edge_runtime.vouching import EVERY_S, PATIENCE_S, Vouching
from edge_runtime.waiting import wait_at_most
from model_delta.encoding import pack, unpack
from model_delta.errors import AtollError, StorageFailed, Unavailable
from model_delta.patch.route import NO_LIMITS, DeviceLimits
from model_delta.plan import DeviceTraits
from model_delta.topics import Hello, ReportAck, down, plan_topic, round_topic, up
from model_delta.trust.updater import TrustAnchors
from monitoring.telemetry import Decision, Feedback, Report

CONNECTION_POLL_S = 0.25

_log = logging.getLogger(__name__)


class Device:
    """One device and one model.

    `directory` is its own and survives restarts. `mirrors`: regions whose mirrors serve it, home first (its own region
    when not given). `feature_names`: of payments, in the order in which `decide` hands them to the model; none where
    nobody decides payments. `data` gives local training payments (features float32[n, F], labels float32[n]);
    `contribute` turns a clipped update into the bytes of a contribution. `regions` answers unsure payments. Optional
    parts may be None: a device without `data`, `contribute` or `run_graph` takes no part in rounds. `limits`,
    `cached_cost`: what updates may take here, see `Acquisition`. `root` (the TUF root) and `anchors` (the role keys of
    the day) are what the device was enrolled with; `check_in_s` and `vouching_patience_s`: see `Vouching`.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        traits: DeviceTraits,
        model: str,
        directory: Path,
        link: Link,
        root: bytes,
        anchors: TrustAnchors,
        feature_names: Sequence[str],
        open_model: OpenModel,
        rng: random.Random,
        clock: Callable[[], float] = time.time,
        mirrors: Sequence[str] = (),
        regions: AskRegion | None = None,
        open_baseline: OpenBaseline | None = None,
        data: Callable[[], Data] | None = None,
        contribute: Contribute | None = None,
        run_graph: RunGraph | None = None,
        train: Train = training.train,
        probation: ProbationRules | None = None,
        margin: float = 0.02,
        amount_feature: str = "amount",
        amount_limit: float = 50.0,
        report_interval_s: float = 5.0,
        answer_deadline_s: float = 3.0,
        retry_first_s: float = 0.5,
        retry_most_s: float = 15.0,
        receipt_deadline_s: float = 5.0,
        limits: DeviceLimits = NO_LIMITS,
        cached_cost: float = 1.0,
        check_in_s: float = EVERY_S,
        vouching_patience_s: float = PATIENCE_S,
    ) -> None:
        self.device_id, self.traits, self.model = identity.name, traits, model
        self._link, self._rng = link, rng
        self._report_interval_s = report_interval_s
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        slots = Slots(directory)
        self.outbox = Outbox(directory / "outbox", draw_epoch=rng.getrandbits(48))
        self.running = Running()
        self.fetcher = Fetcher(
            link=link,
            identity=identity,
            regions=tuple(mirrors) or (traits.region,),
            slots=slots,
            rng=rng,
            clock=clock,
            answer_deadline_s=answer_deadline_s,
        )
        self.vouching = Vouching(
            folder=directory / "trust",
            tenant=traits.tenant,
            root=root,
            anchors=anchors,
            fetcher=self.fetcher,
            connected=lambda: link.connected,
            clock=clock,
            rng=rng,
            every_s=check_in_s,
            patience_s=vouching_patience_s,
        )
        self._clock = clock = self.vouching.now
        self.safe_mode = SafeMode(
            directory / "baseline",
            open_baseline=open_baseline or verified_baseline(lambda: self.vouching.anchors, model),
            amount_feature=amount_feature,
            amount_limit=amount_limit,
        )
        self._disk = ""
        self._report_now = asyncio.Event()
        self.direction = Direction(
            identity=identity,
            traits=traits,
            model=model,
            link=link,
            path=directory / "direction.record",
            anchors=lambda: self.vouching.anchors,
            rollout=lambda: self.installation.plans.current,
            offered=lambda sealed: self.installation.plans.offered(plan_topic(traits.tenant, model), sealed),
            standing=lambda: self.installation.standing(),
            held=lambda: self.installation.held_files(),
            clock=clock,
            limits=limits,
            cached_cost=cached_cost,
            answer_deadline_s=answer_deadline_s,
        )
        self.installation = Installation(
            traits=traits,
            model=model,
            slots=slots,
            fetcher=self.fetcher,
            outbox=self.outbox,
            running=self.running,
            vouching=self.vouching,
            open_model=open_model,
            clock=clock,
            rng=rng,
            probation=probation or ProbationRules(),
            told=self._report_now.set,
            retry_first_s=retry_first_s,
            retry_most_s=retry_most_s,
            limits=limits,
            cached_cost=cached_cost,
            direction=self.direction,
        )
        learning: Learning | None = None
        if data is not None and contribute is not None and run_graph is not None:
            learning = Learning(data, train, contribute, run_graph)
        self.participation = Participation(
            device_id=self.device_id,
            model=model,
            path=directory / "round.record",
            link=link,
            fetcher=self.fetcher,
            running=self.running,
            base_file=self.installation.file_to_train_from,
            vouching=self.vouching,
            clock=clock,
            rng=np.random.default_rng(rng.getrandbits(64)),
            learning=learning,
            sign=identity.sign,
            trust=lambda: self.installation.record.trust,
            keep_trust=self.installation.keep_trust,
            told=self._report_now.set,
            receipt_deadline_s=receipt_deadline_s,
        )
        self._answers = Answers(
            device_id=self.device_id,
            region=traits.region,
            feature_names=feature_names,
            running=self.running,
            safe_mode=self.safe_mode,
            outbox=self.outbox,
            regions=regions,
            clock=clock,
            observe=self.installation.observe,
            margin=margin,
        )
        self._inferences = Inferences(
            model=model, running=self.running, outbox=self.outbox, clock=clock, observe=self.installation.observe
        )

    # -- a model of any signature

    async def infer(self, inputs: Mapping[str, NDArray[np.generic]]) -> Inferred:
        """Answer named tensors by the running version, one call at a time. Raises NoVersion when none may answer,
        Malformed for inputs that do not fit its manifest, ModelFailed when the version itself fails."""
        return await self._inferences.infer(inputs)

    # -- payments

    async def decide(self, features: Mapping[str, float]) -> Decision:
        """Answer one payment, in every state. Raises Malformed for features that are missing or not finite."""
        return await self._answers.decide(features)

    def feedback(self, decision_id: str, fraud: bool) -> Feedback:
        """What a payment turned out to be. Raises NotFound when the decision is too old, Malformed for a foreign id."""
        return self._answers.feedback(decision_id, fraud)

    # -- the baseline, which may come by another line

    def receive_baseline(self, data: bytes) -> Baseline:
        """A signed baseline as a whole. Raises Untrusted, Malformed, StorageFull."""
        return self.safe_mode.receive(data)

    def receive_frame(self, frame: bytes) -> Baseline | None:
        """One frame of a baseline; the baseline once it is complete. Raises as `receive_baseline`."""
        return self.safe_mode.receive_frame(frame)

    # -- what the fleet sees

    @property
    def state(self) -> str:
        """The update's state."""
        return str(self.installation.record.state)

    @property
    def in_safe_mode(self) -> bool:
        """Whether no full model may answer now."""
        return bool(self.running.blocked(self._clock()))

    async def run(self) -> None:
        """Live until cancelled: follow plans, report, take part in rounds."""
        tenant = self.traits.tenant
        self.fetcher.start()
        self.direction.start()
        self._link.subscribe(down(self.device_id, "ack"), self._acknowledged)
        self.participation.start()
        for region in dict.fromkeys(("", self.traits.region)):
            self._link.subscribe(round_topic(tenant, self.model, region), self.participation.announced)
        self._link.subscribe(plan_topic(tenant, self.model), self.installation.plans.offered)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.installation.run(), name=f"{self.device_id} installation")
                group.create_task(self.vouching.run(), name=f"{self.device_id} repository")
                group.create_task(self.direction.run(), name=f"{self.device_id} version reports")
                group.create_task(self._greet(), name=f"{self.device_id} hello")
                group.create_task(self._report(), name=f"{self.device_id} report")
                group.create_task(self.participation.run(), name=f"{self.device_id} participation")
        finally:
            with contextlib.suppress(OSError):  # of a broken disk: no concern of whoever stops the device
                self.outbox.close()

    async def _greet(self) -> None:
        """Say hello once per connection."""
        greeted = False
        while True:
            if not self._link.connected:
                greeted = False
            elif not greeted:
                with contextlib.suppress(Unavailable):
                    await self._link.publish(up(self.device_id, "hello"), pack(self._hello()))
                    greeted = True
            await asyncio.sleep(CONNECTION_POLL_S)

    def _hello(self) -> Hello:
        return Hello(
            device_id=self.device_id,
            device_class=self.traits.device_class,
            region=self.traits.region,
            running=self.running.digest,
            state=self.state,
            root=self.installation.file_root(),
            model=self.model,
        )

    async def _report(self) -> None:
        """Report every interval (an eighth of jitter keeps a fleet from marching in step), at once after an outcome."""
        while True:
            pause = self._report_interval_s * (1 + (self._rng.random() - 0.5) / 4)
            await wait_at_most(self._report_now, pause)
            self._report_now.clear()
            if not self._link.connected:
                continue
            try:
                await self._link.publish(up(self.device_id, "report"), pack(self._next_report()))
            except AtollError as error:  # the broker went away: the next interval tries again
                _log.info("%s: report: %s", self.device_id, error)

    def _next_report(self) -> Report:
        first, last = self._range_to_report()
        records: list[Record] = [record for _, record in self.outbox.read(first, last)]
        folded = fold(records)
        marks = self.outbox.marks
        sitting_out = self.participation.sitting_out
        return Report(
            device_id=self.device_id,
            epoch=marks.epoch,
            first_sequence=first,
            last_sequence=last,
            time=self._clock(),
            state=self.state,
            running=self.running.digest,
            safe_mode=self.in_safe_mode,
            plan_serial=self.installation.plans.serial,
            dropped=marks.dropped,
            lost_requests=marks.lost_requests,
            summaries=folded.summaries,
            outcomes=folded.outcomes,
            alarm=(self.vouching.alarm or self.direction.alarm or self.installation.alarm or self._disk)[:300],
            sitting_out=msgspec.UNSET if sitting_out is None else sitting_out,
        )

    def _range_to_report(self) -> tuple[int, int]:
        """What the next report tells; no records while the disk cannot note that they are told, only the state."""
        try:
            found = self.outbox.next_range()
        except StorageFailed as error:
            if not self._disk:
                _log.error("%s: %s; reports tell the state alone", self.device_id, error)
            self._disk = str(error)
            return self.outbox.marks.acked + 1, self.outbox.marks.acked
        self._disk = ""
        return found

    def _acknowledged(self, _topic: str, payload: bytes) -> None:
        try:
            ack = unpack(payload, ReportAck)
            self.outbox.acknowledge(ack.epoch, ack.sequence)
        except (AtollError, OSError) as error:
            _log.warning("%s: acknowledgement: %s", self.device_id, error)
