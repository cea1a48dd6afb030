"""A small world around a device: a publisher with a TUF repository, a coordinator and mirrors on the broker in memory.
All crypto is real.

world = World(tmp_path)
first = world.publish(world.model(seed=1))
world.plan(target=first)
device = world.device("pos-0001", tmp_path / "pos-0001")
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.device import Device
from edge_runtime.identity import KEY_REQUEST_TYPE, Identity
from edge_runtime.onnx_model import open_model, run_graph
from edge_runtime.probation import ProbationRules
from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack
from model_delta.errors import NotFound
from model_delta.graphs.int8 import quantize_weights
from model_delta.graphs.mlp import mlp_model, mlp_training_graph
from model_delta.keys.encryption import new_key, seal_to
from model_delta.keys.keyring import EmbeddedKeyring
from model_delta.manifest import GoldenCase, Manifest, Requirements, Tensor
from model_delta.plan import BUCKETS, PLAN_TYPE, Cohort, DeviceTraits, RolloutPlan
from model_delta.release import Release, build_release
from model_delta.task import TASK_TYPE, RoundTask
from model_delta.topics import (
    ChunkRequest,
    ChunkResponse,
    ContributionReceipt,
    KeyRequest,
    KeyResponse,
    ReportAck,
    artifact_key_info,
    device_of,
    down,
    plan_topic,
    round_topic,
)
from model_delta.trust.checkin import answer_check_in
from model_delta.trust.paths import KIND as TUF
from model_delta.trust.signing import key_id, open_envelope, seal_envelope, verify
from monitoring.telemetry import Report, UpdateOutcome
from tests.fakes.link import FakeBroker, FakeLink
from tests.fakes.tuf_site import Site

TENANT, MODEL = "acme", "fraud"
FEATURES = ("amount", "hour", "ratio", "count")
NOW = 1_790_000_000.0
FAST = ProbationRules(decisions=3, seconds=0.15)
QUIET = dict.fromkeys(FEATURES, 0.0)


class World:
    """Publisher, coordinator and mirrors. `now` is everybody's wall clock; mutate anything."""

    def __init__(self, folder: Path, regions: tuple[str, ...] = ("eu-west", "ap-south")) -> None:
        self.broker = FakeBroker()
        self.now = NOW
        self.keyring = EmbeddedKeyring.create(folder / "keys", TENANT, clock=lambda: self.now)
        self.site = Site(self.now, self.keyring.anchors())
        self.frozen = False
        self.store: dict[tuple[str, str], bytes] = {}
        self.keys: dict[str, bytes] = {}
        self.releases: dict[str, Release] = {}
        self.files: dict[str, bytes] = {}
        self.devices: dict[str, Identity] = {}
        self.reports: list[Report] = []
        self.outcomes: list[UpdateOutcome] = []
        self.known: dict[tuple[str, int], int] = {}
        self.contributions: list[tuple[str, bytes]] = []
        self.chunks: dict[str, int] = dict.fromkeys(regions, 0)
        self.kept: dict[str, set[str]] = {region: set() for region in regions}
        self.dead: set[str] = set()
        self.spoil: Callable[[str, ChunkRequest, bytes], bytes] = lambda region, request, data: data
        self.acknowledge = True
        self.receipts = True
        self.serial = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.task: RoundTask | None = None

    def start(self) -> None:
        """Connect the servers (needs a running loop)."""
        coordinator = self.broker.link("coordinator")
        coordinator.subscribe("atoll/1/dev/+/up/key", self._in_task(coordinator, self._answer_key))
        coordinator.subscribe("atoll/1/dev/+/up/report", self._in_task(coordinator, self._fold))
        coordinator.subscribe("atoll/1/dev/+/up/contribution", self._in_task(coordinator, self._receive))
        self.coordinator = coordinator
        for region in self.chunks:
            gateway = self.broker.link(f"gateway-{region}")
            gateway.subscribe(f"atoll/1/dev/+/up/req/{region}", self._in_task(gateway, self._mirror(region)))
            gateway.subscribe(f"atoll/1/dev/+/up/trust/{region}", self._in_task(gateway, self._check_in(region)))

    def _in_task(
        self, link: FakeLink, handle: Callable[[FakeLink, str, bytes], Awaitable[None]]
    ) -> Callable[[str, bytes], None]:
        async def run(topic: str, payload: bytes) -> None:
            await handle(link, device_of(topic), payload)

        def on_message(topic: str, payload: bytes) -> None:
            task = asyncio.create_task(run(topic, payload))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        return on_message

    # -- servers

    def _mirror(self, region: str) -> Callable[[FakeLink, str, bytes], Awaitable[None]]:
        async def answer(link: FakeLink, device: str, payload: bytes) -> None:
            if region in self.dead:
                return
            request = unpack(payload, ChunkRequest)
            if request.kind == "tuf":
                data = self._tuf(request.name)
            else:
                self.chunks[region] += 1
                data = self.store.get((request.kind, request.name))
            if request.kept_only and request.name not in self.kept[region]:
                data = None
            if data is None:
                response = ChunkResponse(request.request, error=f"{request.kind} {request.name[:8]} is not here")
            else:
                self.kept[region].add(request.name)
                part = self.spoil(region, request, data[request.offset : request.offset + request.length])
                response = ChunkResponse(request.request, len(data), request.offset, part)
            await link.publish(down(device, "res"), pack(response))

        return answer

    def _check_in(self, region: str) -> Callable[[FakeLink, str, bytes], Awaitable[None]]:
        async def answer(link: FakeLink, device: str, payload: bytes) -> None:
            if region not in self.dead:
                self._keep_fresh()
                await link.publish(down(device, "trust"), answer_check_in(payload, self.site.store, TUF))

        return answer

    def _tuf(self, name: str) -> bytes | None:
        self._keep_fresh()
        try:
            return self.site.store.get(TUF, name)
        except NotFound:
            return None

    def _keep_fresh(self) -> None:
        if not self.frozen:
            self.site.keep_fresh(self.now)

    async def _answer_key(self, link: FakeLink, device: str, payload: bytes) -> None:
        identity = self.devices[device]
        public = identity.private.public_key()
        request = unpack(verify(open_envelope(payload), KEY_REQUEST_TYPE, {key_id(public): public}), KeyRequest)
        key = self.keys.get(request.manifest)
        if key is None or request.device_id != device:
            response = KeyResponse(request.request, error="no such key")
        else:
            info = artifact_key_info(device, request.manifest)
            response = KeyResponse(request.request, seal_to(identity.sealing_public, key, info))
        await link.publish(down(device, "key"), pack(response))

    async def _fold(self, link: FakeLink, device: str, payload: bytes) -> None:
        report = unpack(payload, Report)
        self.reports.append(report)
        known = self.known.get((device, report.epoch), 0)
        if report.last_sequence >= report.first_sequence and report.first_sequence > known:
            self.outcomes.extend(report.outcomes)
            known = self.known[(device, report.epoch)] = report.last_sequence
        if self.acknowledge:
            await link.publish(down(device, "ack"), pack(ReportAck(report.epoch, known)))

    async def _receive(self, link: FakeLink, device: str, payload: bytes) -> None:
        self.contributions.append((device, payload))
        if self.receipts:
            round_id = payload.split(b"|")[0].decode()
            await link.publish(down(device, "receipt"), pack(ContributionReceipt(round_id, True)))

    # -- the publisher

    def model(self, seed: int, like: bytes | None = None) -> bytes:
        """A small quantized MLP over FEATURES; near `seed` 1's weights, so that patches are small."""
        weights = mlp_weights(np.random.default_rng(1))
        nudge = np.random.default_rng(seed)
        moved = [(w + 0.02 * nudge.standard_normal(w.shape).astype(np.float32) * (seed != 1), b) for w, b in weights]
        return quantize_weights(mlp_model(moved, np.zeros(4, np.float32), np.ones(4, np.float32)), like)

    def publish(
        self,
        file: bytes,
        *parents: Release,
        golden_shift: float = 0.0,
        golden_inputs: dict[str, NDArray[Any]] | None = None,
        vouched: bool = True,
        **options: Any,
    ) -> Release:
        """Build, sign, store and vouch for a release of `file`; `golden_shift` makes its golden case wrong."""
        inputs = golden_inputs or {"features": np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)}
        outputs: dict[str, NDArray[Any]] = dict(run_graph(file, inputs))
        if golden_shift:
            outputs = {name: value + np.float32(golden_shift) for name, value in outputs.items()}
        golden = GoldenCase(
            {name: tensor(value) for name, value in inputs.items()},
            {name: tensor(np.asarray(value)) for name, value in outputs.items()},
        )
        key = new_key()
        release = build_release(
            file,
            tenant=TENANT,
            model=MODEL,
            version={"eu-west": len(self.releases) + 1},
            release=len(self.releases) + 1,
            parents=[(parent.manifest, self.files[parent.digest]) for parent in parents],
            keyring=self.keyring,
            key=key,
            golden=(golden,),
            now=self.now,
            **options,
        )
        self.store[("manifest", release.digest)] = release.envelope
        self.store[("delivery", release.digest)] = pack(release.delivery)
        self.store.update({("blob", digest): data for digest, data in release.blobs.items()})
        self.keys[release.digest] = key
        self.releases[release.digest] = release
        self.files[release.digest] = file
        if vouched:
            self.vouch(release)
        return release

    def vouch(self, release: Release) -> None:
        """Name a release in the repository."""
        self.site.now = self.now
        self.site.release(open_envelope(release.envelope).payload)
        self.site.publish()

    def withdraw(self, release: Release) -> None:
        """Name a release no more."""
        self.site.now = self.now
        self.site.withdraw(open_envelope(release.envelope).payload)
        self.site.publish()

    def plan(
        self, target: Release, stable: Release | None = None, *, share: float = 1.0, name: str = "", **options: Any
    ) -> None:
        """Sign and retain the next plan."""
        self.serial += 1
        plan = RolloutPlan(
            tenant=TENANT,
            model=MODEL,
            name=name or f"rollout-{self.serial}",
            serial=self.serial,
            salt="salt",
            cohorts=(Cohort("all"),),
            target_buckets=int(share * BUCKETS),
            target=target.digest,
            stable=(stable or target).digest,
            issued=int(self.now),
            expires=int(self.now) + 30 * 86_400,
            **options,
        )
        self._retain(plan_topic(TENANT, MODEL), self.keyring.sign("plan", PLAN_TYPE, pack(plan)))

    def round(self, base: Release, sizes: tuple[int, ...] = (4, 16, 1), **options: Any) -> RoundTask:
        """Announce a round on `base`."""
        momentum = options.get("momentum", 0.0) > 0
        graph = mlp_training_graph(sizes, np.zeros(4, np.float32), np.ones(4, np.float32), 2.0, momentum=momentum)
        self.store[("artifact", digest_of(graph))] = graph
        parameters, length = parameters_of(base.manifest, sizes)
        task = RoundTask(
            **{
                "tenant": TENANT,
                "model": MODEL,
                "round_id": "round-1",
                "base": base.digest,
                "training_graph": digest_of(graph),
                "parameters": parameters,
                "length": length,
                "steps": 5,
                "batch_size": 16,
                "issued": int(self.now),
                "deadline": int(self.now) + 600,
                **options,
            }
        )
        self.task = task
        self._retain(round_topic(TENANT, MODEL), self.keyring.sign("round", TASK_TYPE, pack(task)))
        return task

    def _retain(self, topic: str, envelope: Any) -> None:
        self.broker.deliver(topic, seal_envelope(envelope), retain=True)

    # -- devices

    def device(self, device_id: str, folder: Path, **options: Any) -> Device:
        """A device on its folder; a second call on the same folder is the device after a power cut."""
        identity = Identity.create(folder / "identity", device_id)
        self.devices[device_id] = identity
        settings: dict[str, Any] = {
            "mirrors": tuple(self.chunks),
            "open_model": open_model,
            "run_graph": run_graph,
            "probation": FAST,
            "margin": 0.0,
            "report_interval_s": 0.05,
            "answer_deadline_s": 0.15,
            "retry_first_s": 0.02,
            "receipt_deadline_s": 0.1,
            "vouching_patience_s": 0.3,
            "check_in_s": 3600.0,
            "data": local_data,
            "contribute": lambda update, task: task.round_id.encode() + b"|" + update.tobytes(),
        }
        return Device(
            identity=identity,
            traits=DeviceTraits(device_id, TENANT, "pos", next(iter(self.chunks))),
            model=MODEL,
            directory=folder / "state",
            link=self.broker.link(device_id),
            root=self.site.provisioned(),
            anchors=self.keyring.anchors(),
            feature_names=FEATURES,
            rng=random.Random(device_id),
            clock=lambda: self.now,
            **{**settings, **options},
        )


def mlp_weights(rng: np.random.Generator) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Weights of a 4-16-1 perceptron."""
    return [
        (rng.standard_normal((4, 16)).astype(np.float32), rng.standard_normal(16).astype(np.float32)),
        ((rng.standard_normal((16, 1)) / 4).astype(np.float32), np.zeros(1, np.float32)),
    ]


def parameters_of(manifest: Manifest, sizes: tuple[int, ...]) -> tuple[list[Any], int]:
    """The flat vector's parameters as RoundTask names them, and their length."""
    from model_delta.task import Parameter

    stored = {item.name: item for item in manifest.tensors}
    parameters, length = [], 0
    for layer, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        weight = f"layer{layer}.weight"
        scale = f"{weight}_scale" if f"{weight}_scale" in stored else ""
        parameters.append(Parameter(weight, (rows, columns), scale))
        parameters.append(Parameter(f"layer{layer}.bias", (columns,)))
        length += rows * columns + columns
    return parameters, length


def local_data() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A device's own payments: fraud when the amount is high."""
    rng = np.random.default_rng(7)
    features = rng.standard_normal((200, 4)).astype(np.float32)
    return features, (features[:, 0] > 0.5).astype(np.float32)


def tensor(array: NDArray[Any]) -> Tensor:
    """An array as a manifest's tensor."""
    return Tensor(str(array.dtype), array.shape, array.tobytes())


def requirements(latency_ms_max: float) -> Requirements:
    """Requirements that differ only in the latency allowed."""
    return Requirements(latency_ms_max=latency_ms_max)


async def eventually(condition: Callable[[], bool], deadline_s: float = 30.0, what: str = "") -> None:
    """Wait until `condition` holds; fail after `deadline_s`."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not reached in {deadline_s} s: {what or condition}"
        await asyncio.sleep(0.005)


class Life:
    """Runs a device as a task, with payments, until the block ends or `cut` is called."""

    def __init__(self, device: Device, payments: bool = True) -> None:
        self.device, self._payments = device, payments
        self._tasks: list[asyncio.Task[Any]] = []

    async def __aenter__(self) -> Device:
        self._tasks.append(asyncio.create_task(self.device.run()))
        if self._payments:
            self._tasks.append(asyncio.create_task(self._pay()))
        return self.device

    async def _pay(self) -> None:
        while True:
            await self.device.decide(QUIET)
            await asyncio.sleep(0.01)

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result
