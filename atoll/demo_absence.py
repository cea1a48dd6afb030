"""The demo's device that is away for 120 days: its factory version, its return by radio, its way back to today.

Before it leaves, the device gets the version of 120 days ago as a factory does it: written into its first slot. It is
valid for 90 days, so on its return it may not answer. A baseline of some 400 bytes comes over a simulated LoRaWAN link;
then the network is there again and the ordinary update takes the smallest path. The device is the real program, in this
process; only its clock (while it is away) and the radio are made up.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from atoll.control_client import ControlClient, answered
from atoll.enrolment import enrolled_identity
from atoll.fleet import open_device
from atoll.platform import open_keyring, read_anchors, read_root
from atoll.settings import MODEL, TENANT, DataFolder, Endpoints
from device_sim import fraud_model
from device_sim.network import DATA_RATES, Transfer, transfer
from device_sim.payments import DAY
from device_sim.population import VirtualDevice
from device_sim.scenario import Sample, World
from device_sim.terminal_features import FEATURE_SET
from edge_runtime.device import Device
from edge_runtime.identity import Identity
from edge_runtime.onnx_model import open_model
from edge_runtime.regions import RegionClient
from edge_runtime.slots import Slots
from edge_runtime.update import State
from model_delta.baseline import BASELINE_TYPE, BaselineModel, sealed_form
from model_delta.errors import AtollError, Unavailable
from model_delta.graphs.int8 import quantize_weights
from model_delta.graphs.mlp import mlp_model
from monitoring.quality import average_precision
from monitoring.telemetry import Decision

DAYS_AWAY = 120
VALID_DAYS = 90
PAYMENTS = 20
RADIO, RADIO_LOSS = "DR0", 0.1
CATCH_UP_S = 40.0
CALL_S = 30.0

Float32 = npt.NDArray[np.float32]
Labels = npt.NDArray[np.bool_]


class AbsenceFailed(AtollError):
    """The device did not do what its return promises."""


class OfflineLink:
    """A line to a broker that is out of reach."""

    connected = False

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Always Unavailable."""
        raise Unavailable(f"{topic}: the network is away")

    def subscribe(self, topic_filter: str, handler: Callable[[str, bytes], None]) -> None:
        """Nothing will ever arrive."""


class AbsentDevice:
    """One device of the population, its payments, and its two journeys."""

    def __init__(self, data: DataFolder, endpoints: Endpoints, world: World, device: VirtualDevice) -> None:
        self._data, self._endpoints, self._world, self._device = data, endpoints, world, device
        self._payments: Iterator[Sample] = world.live(device.index)
        self.device_id = device.device_id

    async def leave(self, client: ControlClient) -> tuple[fraud_model.TrainedModel, dict[str, Any]]:
        """Enrol, install the factory version of 120 days ago, decide with it, and go offline. Returns that version's
        model, from which later ones descend."""
        features, fraud = self._world.history()
        early = slice(0, len(features) // 2)
        model = await asyncio.to_thread(fraud_model.train, features[early], fraud[early], seed=1, steps=600)
        source = mlp_model(model.weights, model.mean, model.scale)
        then = time.time() - DAYS_AWAY * DAY
        release = await self._ask(
            lambda: client.post(
                "/v1/models",
                source,
                model=MODEL,
                name="factory",
                feature_set=FEATURE_SET,
                threshold=str(model.decision_threshold),
                created=str(int(then)),
                valid_days=str(VALID_DAYS),
                quantize="int8",
            )
        )
        manifest = release["manifest"]
        envelope = await self._ask(lambda: client.get_bytes(f"/v1/store/manifest/{manifest}"))
        await self._ask(lambda: self._enrol(client))
        slots = Slots(self._data.child("devices", self.device_id))
        if slots.pointer() is None:
            slots.write_slot("a", envelope, quantize_weights(source))
            slots.point_to("a")
        async with self._offline(clock=lambda: time.time() - DAYS_AWAY * DAY) as device:
            decisions = await self._decide(device)
        if any(decision.where != "device" for decision in decisions):
            raise AbsenceFailed(f"{self.device_id}: expected its factory version to answer, found {_where(decisions)}")
        return model, {"name": self.device_id, "version": release["version"]}

    async def come_back(
        self,
        client: ControlClient,
        teacher: fraud_model.TrainedModel,
        features: Float32,
        fraud: Labels,
        target: str,
        tell: Callable[[str], None],
    ) -> dict[str, Any]:
        """Baseline by radio, then the newest version by the smallest path; what each took."""
        tell("training and signing a baseline")
        baseline, precision = await asyncio.to_thread(self._baseline, teacher, features, fraud)
        sealed = sealed_form(open_keyring(self._data).sign("baseline", BASELINE_TYPE, baseline.encode()))
        async with self._offline(clock=time.time) as device:
            stranded = await self._decide(device)
            tell("baseline over LoRaWAN")
            radio = self._radio(device, sealed)
            by_baseline = await self._decide(device)
        if any(decision.where != "baseline" or not decision.manifest for decision in by_baseline):
            raise AbsenceFailed(f"{self.device_id}: expected the baseline to answer, found {_where(by_baseline)}")
        caught_up = await self._catch_up(client, target, tell)
        held_features, held_fraud = self._world.held_out()
        return {
            "device": self.device_id,
            "days_away": DAYS_AWAY,
            "why_it_may_not_answer": stranded[0].fallback,
            "baseline_bytes": len(sealed),
            "baseline_average_precision": precision,
            "baseline_average_precision_today": average_precision(baseline.scores(held_features), held_fraud),
            "radio": f"LoRaWAN EU868 {RADIO}, {RADIO_LOSS:.0%} loss",
            "radio_frames_sent": radio.frames_sent,
            "radio_frames_lost": radio.frames_lost,
            "radio_air_seconds": round(radio.air_seconds, 2),
            "radio_wall_seconds": round(radio.wall_seconds, 1),
            "payments_by_baseline": len(by_baseline),
            **caught_up,
        }

    def _baseline(
        self, teacher: fraud_model.TrainedModel, features: Float32, fraud: Labels
    ) -> tuple[BaselineModel, float]:
        return fraud_model.train_baseline(
            teacher,
            features,
            fraud,
            tenant=TENANT,
            model=MODEL,
            release=1,
            created=int(time.time()),
            feature_set=FEATURE_SET,
            seed=1,
        )

    def _radio(self, device: Device, sealed: bytes) -> Transfer:
        """Send the baseline; the device puts the frames together itself."""

        def receive(frame: bytes) -> bytes | None:
            return sealed if device.receive_frame(frame) is not None else None

        sent = transfer(sealed, DATA_RATES[RADIO], receive, np.random.default_rng(1), loss=RADIO_LOSS)
        if sent.blob is None:
            raise AbsenceFailed(f"{self.device_id}: the baseline did not arrive in {sent.frames_sent} frames")
        return sent

    async def _catch_up(self, client: ControlClient, target: str, tell: Callable[[str], None]) -> dict[str, Any]:
        started = time.monotonic()
        identity = await self._ask(lambda: self._enrol(client))
        async with (
            RegionClient(self._endpoints.gateways, self._data.tokens()["tenant"]) as regions,
            open_device(
                self._data,
                self._endpoints,
                identity,
                self._device,
                self._world.names,
                regions,
            ) as device,
            _living(device),
        ):
            while device.running.digest != target or device.state != State.IDLE.value:
                tell(f"the network is back: {device.state.lower().replace('_', ' ')}")
                if time.monotonic() - started > CATCH_UP_S:
                    raise AbsenceFailed(
                        f"{self.device_id}: expected version {target[:12]} within {CATCH_UP_S:.0f} s, "
                        f"found {device.running.digest[:12] or 'none'} in state {device.state}"
                    )
                await self._decide(device, 2)
                await asyncio.sleep(0.2)
            seconds = time.monotonic() - started
            after = await self._decide(device)
            outcome = await self._outcome(client, target)
        release = await self._ask(lambda: client.get(f"/v1/releases/{target}"))
        if not any(decision.where == "device" and decision.manifest == target for decision in after):
            raise AbsenceFailed(f"{self.device_id}: expected the new version to answer, found {_where(after)}")
        return {
            "catch_up_route": outcome["route"],
            "catch_up_bytes": outcome["bytes_received"],
            "catch_up_bytes_whole": release["bytes_whole"],
            "catch_up_seconds": round(seconds, 2),
        }

    async def _outcome(self, client: ControlClient, target: str) -> dict[str, Any]:
        """What the coordinator heard of this update."""
        deadline = time.monotonic() + CALL_S
        while True:
            outcomes = await self._ask(lambda: client.get(f"/v1/releases/{target}/outcomes"))
            mine = [one for one in outcomes if one["device_id"] == self.device_id and one["event"] == "adopted"]
            if mine:
                return dict(mine[-1])
            if time.monotonic() > deadline:
                raise AbsenceFailed(f"{self.device_id}: the coordinator never heard of its update")
            await asyncio.sleep(0.3)

    def _enrol(self, client: ControlClient) -> Identity:
        traits = self._device.traits
        named = {"device_class": traits.device_class, "region": traits.region, **traits.labels}
        return enrolled_identity(self._data.identity(self.device_id), self.device_id, "device", client, named)

    @contextlib.asynccontextmanager
    async def _offline(self, clock: Callable[[], float]) -> AsyncIterator[Device]:
        """The device without any network."""
        identity = Identity.load(self._data.identity(self.device_id), self.device_id)
        device = Device(
            identity=identity,
            traits=self._device.traits,
            model=MODEL,
            directory=self._data.child("devices", self.device_id),
            link=OfflineLink(),
            root=read_root(identity.folder),
            anchors=read_anchors(identity.folder),
            feature_names=self._world.names,
            open_model=open_model,
            rng=random.Random(),
            clock=clock,
        )
        async with _living(device):
            await asyncio.sleep(0.2)  # it boots: the slot's version is opened
            yield device

    async def _decide(self, device: Device, count: int = PAYMENTS) -> list[Decision]:
        return [await device.decide(next(self._payments).features) for _ in range(count)]

    async def _ask(self, call: Callable[[], Any]) -> Any:
        return await answered(call, CALL_S)


@contextlib.asynccontextmanager
async def _living(device: Device) -> AsyncIterator[None]:
    """Run the device's own tasks around a block."""
    life = asyncio.create_task(device.run(), name=f"{device.device_id} life")
    try:
        yield
    finally:
        life.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await life


def _where(decisions: list[Decision]) -> str:
    return ", ".join(sorted({decision.where for decision in decisions}))
