"""A coordinator on a broker in memory, with real keys, ledger, log and store, and devices that behave."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ParamSpec

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fl_coordinator.coordinator import Coordinator
from fl_coordinator.enrolment import Enrolment
from fl_coordinator.flower_bridge import FlowerBridge
from fl_coordinator.ledger import Ledger
from fl_coordinator.ports import Tell, UpdatesLog
from fl_coordinator.promotion import Evaluate
from fl_coordinator.publishing import Publisher
from fl_coordinator.shares.client import make_contribution
from fl_coordinator.updates_log import SegmentLog
from model_delta import topics
from model_delta.encoding import pack, unpack
from model_delta.graphs.mlp import mlp_model
from model_delta.keys.certificates import make_request
from model_delta.keys.encryption import open_sealed
from model_delta.keys.keyring import EmbeddedKeyring
from model_delta.manifest import Manifest, TensorSpec
from model_delta.plan import DeviceTraits, assign
from model_delta.store import DirectoryStore
from model_delta.task import RoundTask
from model_delta.trust.signing import seal_envelope, sign
from model_delta.trust.updater import TrustState, accept_plan, accept_task
from monitoring.telemetry import ModelSummary, Report, UpdateOutcome, latency_bucket
from regional_gateway.relay import Ask, Relay
from tests.fakes.link import FakeBroker, FakeLink

Arguments = ParamSpec("Arguments")

FEATURES = 6
START = 1_800_000_000.0

FIRST = """
apiVersion: atoll/v1
kind: Rollout
metadata: {name: first}
spec:
  model: fraud
  cohorts: [{name: everyone}]
  strategy: {canary: {stages: [{share: 100%}]}}
"""

CANARY = """
apiVersion: atoll/v1
kind: Rollout
metadata: {name: NAME}
spec:
  model: fraud
  cohorts: [{name: everyone}]
  strategy:
    canary:
      stages:
        - {devices: 1, hold: {minDecisions: 20}}
        - {share: 50%, hold: {minDecisions: 20}}
        - {share: 100%, hold: {minDecisions: 20}}
  guardrails:
    - {metric: latency_p95_ms, ratioToControl: 4}
    - {metric: false_positive_rate, maxIncrease: 10%}
    - {metric: rolled_back, max: 0}
"""


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


class SumModel:
    """Answers the logistic function of each row's sum, whatever the file says."""

    def __init__(self, manifest: Manifest) -> None:
        self.digest = manifest.file_digest

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        total = np.asarray(inputs["features"], dtype=np.float32).sum(axis=1, keepdims=True)
        return {"score": (1 / (1 + np.exp(-total))).astype(np.float32)}


def golden_inputs(model: str, inputs: Sequence[TensorSpec]) -> Sequence[Mapping[str, Any]]:
    return [{"features": np.linspace(-1, 1, 3 * FEATURES, dtype=np.float32).reshape(3, FEATURES)}]


def fraud_model(seed: int = 0, hidden: int = 4) -> bytes:
    """A small model of our own layout, as it would be published."""
    rng = np.random.default_rng(seed)
    sizes = [FEATURES, hidden, 1]
    weights = [
        (rng.normal(size=(a, b)).astype(np.float32), rng.normal(size=b).astype(np.float32)) for a, b in pairwise(sizes)
    ]
    return mlp_model(weights, np.zeros(FEATURES, np.float32), np.ones(FEATURES, np.float32))


class Platform:
    """One platform in a folder. `start` may be called again after `stop` or a crash: everything is read from disk."""

    def __init__(
        self,
        folder: Path,
        evaluate: Evaluate | None = None,
        segment_bytes: int = 256 * 2**20,
        bridge: FlowerBridge | None = None,
    ) -> None:
        self.folder = folder
        self.clock = Clock()
        self.broker = FakeBroker()
        self.evaluate = evaluate
        self.segment_bytes = segment_bytes
        keys = folder / "keyring"
        folder.mkdir(parents=True, exist_ok=True)
        opened = (
            EmbeddedKeyring.open if keys.exists() else lambda path, clock: EmbeddedKeyring.create(path, "acme", clock)
        )
        self.keyring = opened(keys, self.clock)
        self.store = DirectoryStore(folder / "store")
        self.bridge = bridge or FlowerBridge()
        self.devices: dict[str, Device] = {}
        self.open()

    def open(self) -> None:
        """Open ledger and log, and make a coordinator on them."""
        self.ledger = self.open_ledger()
        self.log = self.open_log()
        self.publisher = Publisher(
            tenant="acme",
            region="eu-west",
            ledger=self.ledger,
            store=self.store,
            keyring=self.keyring,
            open_model=lambda manifest, file: SumModel(manifest),
            golden_inputs=golden_inputs,
            feature_counts={"fraud": FEATURES},
        )
        link = self.broker.link("coordinator")
        self.own_relay = self.relay("", link)
        self.coordinator = Coordinator(
            tenant="acme",
            model="fraud",
            ledger=self.ledger,
            log=self.log,
            store=self.store,
            keyring=self.keyring,
            link=link,
            publisher=self.publisher,
            evaluate=self.evaluate,
            bridge=self.bridge,
            relays=self.relays(),
            clock=self.clock,
            tick_s=0.02,
        )

    def relays(self) -> Mapping[str, Tell]:
        """The coordinator's own relay, or others."""
        return {"": self.own_relay.carry_out}

    def relay(self, region: str, link: FakeLink, ask: Ask | None = None) -> Relay:
        """A relay of `region` on a line to the broker."""
        return Relay(
            tenant="acme",
            region=region,
            link=link,
            folder=self.folder / f"relay {region}",
            anchors=self.keyring.anchors,
            ask=ask,
            clock=self.clock,
            tick_s=0.02,
        )

    def open_ledger(self) -> Ledger:
        """The ledger in this folder; a test may have it behave in its own way."""
        return Ledger(self.folder / "ledger.sqlite")

    def open_log(self) -> UpdatesLog:
        """The embedded log, or another one."""
        return SegmentLog(self.folder / "log", self.segment_bytes)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Coordinator]:
        """The coordinator at work; leaving is a crash: nothing is flushed or said goodbye to."""
        tasks = [asyncio.create_task(self.coordinator.run()), asyncio.create_task(self.own_relay.run())]
        try:
            yield self.coordinator
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def frozen_contributions(self, round_id: str) -> list[bytes]:
        """A round's contributions in the frozen order, as aggregators get them."""
        frozen = self.coordinator.round(round_id).frozen
        return [self.coordinator.frozen_contribution(round_id, digest) for digest in frozen]

    def reopen(self) -> None:
        """What a start after a crash sees."""
        self.ledger.close()
        self.log.close()
        self.open()

    def device(self, device_id: str, model: str = "fraud", **traits: str) -> Device:
        """Enrol a device and connect it."""
        self.devices[device_id] = Device(self, device_id, traits, model)
        return self.devices[device_id]


class Device:
    """A device as the coordinator sees it: follows plans at once, reports, asks for keys, contributes."""

    def __init__(self, platform: Platform, device_id: str, traits: dict[str, str], model: str = "fraud") -> None:
        self.platform, self.device_id, self.model = platform, device_id, model
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.sealing = X25519PrivateKey.generate()
        self.traits = {"device_class": "pos", "region": "eu-west", **traits}
        self.enrol()
        self.trust = TrustState()
        self.running = self.root = ""
        self.sequence = 0
        self.epoch = int.from_bytes(os.urandom(8), "big")
        self.acked = 0
        self.receipts: list[topics.ContributionReceipt] = []
        self.answers: list[topics.KeyResponse] = []
        self.task: RoundTask | None = None
        self.plan_serial = 0
        self.link = platform.broker.link(device_id)
        self.link.subscribe(topics.plan_topic("acme", model), self._on_plan)
        for region in ("", self.traits["region"]):
            self.link.subscribe(topics.round_topic("acme", model, region), self._on_task)
        for channel in ("ack", "receipt", "key"):
            self.link.subscribe(topics.down(device_id, channel), self._on_down)

    def enrol(self, *, replace: bool = False) -> None:
        enrolled = self.platform.coordinator.enrol(
            Enrolment(
                csr_pem=make_request(self.key, self.device_id).decode(),
                sealing_public=self.sealing.public_key().public_bytes_raw(),
                kind="device",
                common_name=self.device_id,
                traits=self.traits,
            ),
            replace=replace,
        )
        self.certificate, self.ca = enrolled.certificate_pem, enrolled.ca_pem

    def _on_plan(self, topic: str, data: bytes) -> None:
        anchors = self.platform.keyring.anchors()
        plan, self.trust = accept_plan(data, self.model, anchors, self.trust, self.platform.clock())
        traits = DeviceTraits(self.device_id, "acme", self.traits["device_class"], self.traits["region"])
        self.running, self.plan_serial = assign(plan, traits).manifest, plan.serial

    def _on_task(self, topic: str, data: bytes) -> None:
        anchors = self.platform.keyring.anchors()
        self.task, self.trust = accept_task(data, self.model, anchors, self.trust, self.platform.clock())

    def _on_down(self, topic: str, data: bytes) -> None:
        channel = topic.rsplit("/", 1)[1]
        if channel == "ack":
            self.acked = unpack(data, topics.ReportAck).sequence
        elif channel == "receipt":
            self.receipts.append(unpack(data, topics.ContributionReceipt))
        else:
            self.answers.append(unpack(data, topics.KeyResponse))

    def next_report(
        self, decisions: int = 0, latency_us: float = 300.0, events: Sequence[str] = (), **counts: int
    ) -> Report:
        """What the device did since the last report: at least one outbox record."""
        first, self.sequence = self.sequence + 1, self.sequence + max(1, decisions)
        summary = ModelSummary(
            manifest=self.running,
            where="device",
            decisions=decisions,
            latency={latency_bucket(latency_us): decisions},
            labelled_legitimate=decisions,
            **counts,
        )
        return Report(
            device_id=self.device_id,
            epoch=self.epoch,
            first_sequence=first,
            last_sequence=self.sequence,
            time=self.platform.clock(),
            state="IDLE",
            running=self.running,
            plan_serial=self.plan_serial,
            summaries=(summary,) if decisions else (),
            outcomes=tuple(UpdateOutcome(manifest=self.running, event=event) for event in events),
        )

    async def report(self, *arguments: Any, **options: Any) -> None:
        await self.link.publish(topics.up(self.device_id, "report"), pack(self.next_report(*arguments, **options)))

    async def hello(self) -> None:
        hello = {
            "device_id": self.device_id,
            "running": self.running,
            "root": self.root,
            "state": "IDLE",
            "model": self.model,
            **self.traits,
        }
        await self.link.publish(topics.up(self.device_id, "hello"), pack(hello))

    async def ask_key(self, manifest: str, *, signed_by: ec.EllipticCurvePrivateKey | None = None) -> None:
        request = topics.KeyRequest(7, self.device_id, manifest, 0)
        envelope = seal_envelope(sign("key-request", pack(request), [signed_by or self.key]))
        await self.link.publish(topics.up(self.device_id, "key"), envelope)

    def open_key(self, answer: topics.KeyResponse, manifest: str) -> bytes:
        return open_sealed(self.sealing, answer.sealed, topics.artifact_key_info(self.device_id, manifest))

    def contribution(self, update: Any) -> bytes:
        assert self.task is not None
        return make_contribution(
            np.asarray(update, dtype=np.float32),
            self.task,
            lambda message: self.key.sign(message, ec.ECDSA(hashes.SHA256())),
            self.certificate,
            self.device_id,
            os.urandom,
        )

    async def contribute(self, data: bytes) -> None:
        await self.link.publish(topics.up(self.device_id, "contribution"), data)


async def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    """Give the loop time until `condition` holds; fails after a deadline of real time."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event of its own
            await asyncio.sleep(0.005)


def fleet(platform: Platform, count: int = 8) -> list[Device]:
    return [platform.device(f"pos-{number:04}") for number in range(count)]


async def adopt_first(platform: Platform, devices: list[Device]) -> str:
    """Publish a first version and have every device run it."""
    record = await platform.coordinator.publish(fraud_model(1), model="fraud")
    await platform.coordinator.start_rollout(FIRST)
    await until(lambda: all(device.running == record.manifest for device in devices))
    await report_all(platform, devices)
    await until(lambda: state_of(platform, "first") == "completed")
    return record.manifest


async def report_all(platform: Platform, devices: list[Device], decisions: int = 30, **options: object) -> None:
    for device in devices:
        await device.report(decisions, **options)
    await until(lambda: all(device.acked == device.sequence for device in devices))


def state_of(platform: Platform, name: str) -> str:
    return next(one.state for one in platform.coordinator.snapshot().rollouts if one.name == name)


def on_a_loop(test: Callable[Arguments, Coroutine[Any, Any, None]]) -> Callable[Arguments, None]:
    """Make a plain test of one that awaits."""

    @functools.wraps(test)
    def run(*arguments: Arguments.args, **options: Arguments.kwargs) -> None:
        asyncio.run(test(*arguments, **options))

    return run
