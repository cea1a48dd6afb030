"""What the demo's acts share: the platform and the world, asking and waiting, who died meanwhile.

An act drives the platform only through what a user has: the control API, the data folder, signals to processes. It
raises ActFailed when something that it promises was not seen before its deadline. Everything it asks may be asked
twice, so that an act survives the death of any process.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from atoll.control_client import ControlClient, answered
from atoll.demo_absence import AbsentDevice
from atoll.processes import ProcessEvent, Program, Supervisor
from atoll.settings import MODEL, DataFolder, Endpoints
from device_sim import fraud_model
from device_sim.scenario import World
from device_sim.terminal_features import FEATURE_SET
from model_delta.errors import AtollError
from model_delta.segments import read_tensor, stored_tensors
from monitoring.quality import average_precision
from monitoring.snapshot import DeviceState, Snapshot

POLL_S = 0.4

Float32 = npt.NDArray[np.float32]
Figures = dict[str, Any]
T = TypeVar("T")


class ActFailed(AtollError):
    """An act did not see what it promises."""


class Deaths:
    """Processes that died in this run without being told to."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._missing: set[str] = set()
        self._last: dict[str, tuple[float, str]] = {}
        self._changed = clock()

    def hear(self, event: ProcessEvent) -> None:
        """What the supervisor says."""
        if event.kind == "died":
            self._missing.add(event.name)
            self._last[event.name] = (self._clock(), event.message)
        elif event.kind == "ready":
            self._missing.discard(event.name)
        if event.kind in ("died", "ready"):
            self._changed = self._clock()

    def calm_s(self) -> float:
        """Seconds since a process last died or came (back); 0 while one is missing."""
        return 0.0 if self._missing else self._clock() - self._changed

    def told(self, within_s: float = 90.0) -> str:
        """Who died lately, the last one first, in words; "" when nobody did."""
        ages = {name: (self._clock() - at, why) for name, (at, why) in self._last.items()}
        return ", ".join(
            f"{name} died {age:.0f} s before: {why}"
            for name, (age, why) in sorted(ages.items(), key=lambda item: item[1][0])
            if age < within_s
        )


@dataclass
class Stage:
    """What acts share: the platform, the world, and what earlier acts made."""

    data: DataFolder
    endpoints: Endpoints
    client: ControlClient
    devices: int
    rounds: int
    seed: int
    shards: int
    metrics_ports: Sequence[int]
    tell: Callable[[str], None]
    deaths: Deaths = field(default_factory=Deaths)
    supervisor: Supervisor = field(init=False)
    programs: dict[str, Program] = field(init=False)
    world: World = field(init=False)
    absent: AbsentDevice = field(init=False)
    model: fraud_model.TrainedModel = field(init=False)
    versions: dict[str, str] = field(default_factory=dict)

    async def call(self, ask: Callable[[], T], seconds: float = 30.0) -> T:
        """An answer of the coordinator; tried again while it is away, for at most `seconds`."""
        return await answered(ask, seconds)

    async def snapshot(self) -> Snapshot:
        """The platform's state now."""
        found = await self.call(lambda: self.client.get_bytes("/v1/state"))
        return msgspec.json.decode(found, type=Snapshot)

    async def until(
        self, what: str, seconds: float, done: Callable[[Snapshot], bool], told: Callable[[Snapshot], str]
    ) -> Snapshot:
        """The first state that is `done`. Raises ActFailed with the last thing `told` after `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            found = await self.snapshot()
            if done(found):
                return found
            self.tell(told(found))
            if time.monotonic() > deadline:
                raise ActFailed(f"{what}: not seen within {seconds:.0f} s; last: {told(found)}")
            await asyncio.sleep(POLL_S)

    async def note(self, text: str) -> None:
        """Tell the live page which act this is."""
        await self.call(lambda: self.client.post("/v1/notes", {"kind": "act", "text": text}))

    def fleet(self, found: Snapshot) -> list[DeviceState]:
        """The devices of the fleet: all but the absent one."""
        return [device for device in found.devices if device.device_id != self.absent.device_id]


async def publish_version(stage: Stage, source: bytes, name: str, **options: Any) -> dict[str, Any]:
    """Publish a model file under a name; the same bytes twice are one version."""
    query = {"model": MODEL, "name": name, "feature_set": FEATURE_SET, **{k: str(v) for k, v in options.items()}}
    answer: dict[str, Any] = await stage.call(
        lambda: stage.client.post("/v1/models", source, timeout_s=60.0, **query), 60
    )
    return answer


async def apply_rollout(stage: Stage, text: str) -> None:
    """Begin a rollout; the same text twice is one rollout."""
    await stage.call(lambda: stage.client.post("/v1/rollouts", text, file="demo.yaml"))


def running(stage: Stage, found: Snapshot, manifest: str) -> int:
    """How many devices of the fleet run a version now."""
    return sum(device.running == manifest for device in stage.fleet(found))


async def get_json(stage: Stage, path: str) -> dict[str, Any]:
    """What the control API answers to `path`."""
    found: dict[str, Any] = await stage.call(lambda: stage.client.get(path))
    return found


async def master(stage: Stage, manifest: str) -> bytes:
    """The float32 file behind a version, by the operator's right."""
    return await stage.call(lambda: stage.client.get_bytes(f"/v1/releases/{manifest}/source"))


async def outcomes_of(stage: Stage, manifest: str) -> list[dict[str, Any]]:
    """How the update to a version ended, a line a device."""
    found: list[dict[str, Any]] = await stage.call(lambda: stage.client.get(f"/v1/releases/{manifest}/outcomes"))
    return found


def precision_of(source: bytes, features: Float32, fraud: npt.NDArray[np.bool_]) -> float:
    """Average precision of a float32 model file on payments."""
    return average_precision(scores_of(source, features), fraud)


def scores_of(source: bytes, features: Float32) -> Float32:
    """The scores, float32[n], that a float32 model file of our own layout gives to features, float32[n, F]."""
    tensors = {tensor.name: tensor for tensor in stored_tensors(source)}
    read: Callable[[str], Float32] = lambda name: np.asarray(read_tensor(source, tensors[name]), np.float32)  # noqa: E731
    layers: list[tuple[Float32, Float32]] = []
    while f"layer{len(layers)}.weight" in tensors:
        index = len(layers)
        layers.append((read(f"layer{index}.weight"), read(f"layer{index}.bias")))
    return fraud_model.score(layers, read("input.mean"), read("input.scale"), features)
