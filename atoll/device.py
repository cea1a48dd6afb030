"""`atoll device run`: one device in a terminal, as a device team would embed it.

It is the real program with an identity of its own; only its payments are simulated, or come from a labelled CSV file,
and the tensors of a model of another signature come from a file or are made up (`device_tensors`). Which kind the model
is, its first version says, unless the command does. What happens is told line by line: every decision or inference, and
every change of what answers. A platform that is away is tried
until a deadline at the start; after that the device goes on alone, as a terminal at a till has to.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from atoll.control_client import ControlClient, reach
from atoll.device_lines import Teller
from atoll.device_tensors import TensorSource, serve_tensors
from atoll.enrolment import enrolled_identity
from atoll.entry import run_process
from atoll.events import Events
from atoll.fleet import broker_line, make_device
from atoll.platform import is_server, regions_from
from atoll.settings import MODEL, MODEL_OF_CSV, TENANT, ConfigurationError, DataFolder, Endpoints
from atoll.tensor_rows import read_rows
from device_sim.payments_csv import CSV_FEATURE_SET, read_csv
from device_sim.population import CLASSES, VirtualDevice
from device_sim.real_fleet import LabelledHistory, Member, Pace
from device_sim.real_fleet import run_fleet as run_members
from device_sim.scenario import Sample, Scenario, generated_world, replayed_rows
from edge_runtime.device import Device
from edge_runtime.identity import Identity
from edge_runtime.regions import RegionClient
from model_delta.keys.certificates import require_identity
from model_delta.patch.route import NO_LIMITS, DeviceLimits
from model_delta.plan import DeviceTraits
from model_delta.topics import require_model

Asked = Literal["payments", "tensors", ""]
"""What a device is asked; "" leaves it to its first version."""
TOWN = 20
"""Terminals in the simulated town; the device is the first of its class there."""


@dataclass(frozen=True)
class Stream:
    """A device's payments: what is known of the past, and what comes."""

    device: VirtualDevice
    history: LabelledHistory
    payments: Iterator[Sample]
    names: tuple[str, ...]


def run_device(
    path: Path,
    device_id: str,
    device_class: str,
    region: str,
    payments: Path | None,
    *,
    inputs: Path | None = None,
    rate: float,
    count: int,
    seed: int,
    model: str,
    contact_s: float,
    as_json: bool,
    limits: DeviceLimits = NO_LIMITS,
    cached_cost: float = 1.0,
) -> None:
    """Enrol the device, let it answer `count` times (0: until told to stop) and print what it does. With `inputs` it
    is asked the tensors of that file; with `payments`, and for the models of payments, it decides those.

    Options and files are checked before anything is made. Raises Malformed, and ConfigurationError also when
    coordinator or broker do not answer within `contact_s`.
    """
    data = DataFolder.open(path)
    endpoints = data.endpoints()
    require_identity(device_id)
    if is_server(device_id):
        raise ConfigurationError(f"--id: expected a device's name, such as pos-0001, found the server {device_id!r}")
    if device_class not in CLASSES:
        raise ConfigurationError(f"--class: expected one of {', '.join(CLASSES)}, found {device_class!r}")
    region = region or _only_region(endpoints)
    regions_from(endpoints, region)
    if inputs is not None and payments is not None:
        raise ConfigurationError(
            "--inputs: expected without --payments, found both; a device is asked one or the other"
        )
    rows = read_rows(inputs) if inputs is not None else []
    stream = _stream(device_id, device_class, region, payments, seed)
    wanted = require_model(model or (MODEL if payments is None else MODEL_OF_CSV))
    asked: Asked = "tensors" if rows else "payments" if payments or wanted in (MODEL, MODEL_OF_CSV) else ""
    source = TensorSource(rows, str(inputs), seed)
    teller = Teller(count, as_json=as_json)
    with data.locked(f"device-{device_id}.lock", f"device {device_id} runs on", "--id"):
        events = Events(device_id, as_json=as_json)
        run_process(
            _run(
                data,
                endpoints,
                stream,
                asked,
                source,
                wanted,
                rate,
                seed,
                contact_s,
                teller,
                events,
                limits,
                cached_cost,
            ),
            device_id,
            default_level="WARNING",
            events=events,
        )


def _only_region(endpoints: Endpoints) -> str:
    if len(endpoints.gateways) != 1:
        raise ConfigurationError(f"--region: expected one of {', '.join(endpoints.gateways)}, found none; pass it")
    return next(iter(endpoints.gateways))


def _stream(device_id: str, device_class: str, region: str, payments: Path | None, seed: int) -> Stream:
    """Simulated payments of one terminal, different for each device id; or the rows of a file, over and over."""

    def placed(index: int, merchant: str, compute: float) -> VirtualDevice:
        traits = DeviceTraits(device_id, TENANT, device_class, region, {"merchant": merchant})
        return VirtualDevice(index, traits, merchant, compute)

    if payments is not None:
        rows = read_csv(payments)
        device = placed(0, CSV_FEATURE_SET, CLASSES[device_class].compute)
        return Stream(device, LabelledHistory(rows.names), replayed_rows(rows, np.arange(len(rows))), rows.names)
    mixed = int.from_bytes(hashlib.sha256(f"{seed}:{device_id}".encode()).digest()[:4])
    scenario = Scenario(seed=mixed, devices=TOWN, regions=(region,), hostile_share=0.0)
    town = generated_world(scenario, only=range(len(CLASSES) * 3)).devices
    one = next(device for device in town if device.traits.device_class == device_class)
    world = generated_world(scenario, only={one.index})
    history = LabelledHistory(world.names)
    history.add_rows(*world.local(one.index))
    return Stream(placed(one.index, one.merchant, one.compute), history, world.live(one.index), world.names)


async def _run(
    data: DataFolder,
    endpoints: Endpoints,
    stream: Stream,
    asked: Asked,
    source: TensorSource,
    model: str,
    rate: float,
    seed: int,
    contact_s: float,
    teller: Teller,
    events: Events,
    limits: DeviceLimits,
    cached_cost: float,
) -> None:
    tokens, device = data.tokens(), stream.device
    identity = await asyncio.to_thread(
        _enrol, data, ControlClient(endpoints.coordinator, tokens["join"]), device, contact_s
    )
    teller.done = asyncio.get_running_loop().create_future()
    async with RegionClient(endpoints.gateways, tokens["tenant"], model=model) as regions:

        @contextlib.asynccontextmanager
        async def opened() -> AsyncIterator[Device]:
            async with broker_line(endpoints, identity) as link:
                await teller.first_connection(link, contact_s)
                broker = f"mqtts://{endpoints.broker.host}:{endpoints.broker.port}"
                events.say("ready", broker=broker, gateways=list(endpoints.gateways.values()))
                one = make_device(
                    data,
                    endpoints,
                    identity,
                    device,
                    stream.names,
                    link,
                    regions,
                    stream.history.arrays,
                    model=model,
                    limits=limits,
                    cached_cost=cached_cost,
                )
                watch = asyncio.create_task(teller.watch(one, link), name=f"watch {identity.name}")
                try:
                    yield one
                finally:
                    watch.cancel()

        async def lives() -> None:
            if asked != "payments":
                either = None if asked else len(stream.names)
                async with opened() as one:
                    if await serve_tensors(one, source, rate, random.Random(seed), teller, unless_payments_of=either):
                        return
            member = Member(identity.name, opened, stream.payments, stream.history)
            await run_members([member], Pace(payments_per_second=rate), seed, note=teller.decided)

        life = asyncio.create_task(lives(), name=identity.name)
        try:
            await asyncio.wait({life, teller.done}, return_when=asyncio.FIRST_COMPLETED)
            if life.done():
                life.result()
            teller.done.result()
        finally:
            life.cancel()
            await asyncio.gather(life, return_exceptions=True)
            teller.last_words()


def _enrol(data: DataFolder, client: ControlClient, device: VirtualDevice, contact_s: float) -> Identity:
    traits = device.traits
    named = {"device_class": traits.device_class, "region": traits.region, **traits.labels}
    folder = data.identity(device.device_id)
    return reach(contact_s, lambda: enrolled_identity(folder, device.device_id, "device", client, named))
