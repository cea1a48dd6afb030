"""Wiring of a fleet process: a shard of a scenario's devices, each the real program with its own identity and line.

All shards build the same world from the same seed, of generated payments or of the rows of a labelled CSV file, which
then follows a model of its own. The process also answers `/metrics`, where requests to regions and
fail-overs can be read; those are counted from the data folder's beginning, however often the process was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import numpy as np

from atoll.control_client import ControlClient, retry_until
from atoll.enrolment import enrolled_identity
from atoll.entry import run_process
from atoll.events import Events
from atoll.http_server import serving
from atoll.metrics_page import metrics_app
from atoll.platform import read_anchors, read_root, regions_from
from atoll.region_counts import CountedRegions, RegionCounts
from atoll.settings import LOOPBACK, MODEL, MODEL_OF_CSV, ConfigurationError, DataFolder, Endpoints
from device_sim.faults import Observe, ObservedUpdates, attack, tampered
from device_sim.payments_csv import read_csv
from device_sim.population import VirtualDevice
from device_sim.real_fleet import FleetCounts, LabelledHistory, Member, Pace
from device_sim.real_fleet import run_fleet as run_members
from device_sim.scenario import Scenario, World, generated_world, world_of_rows
from edge_runtime.device import Device
from edge_runtime.identity import Identity
from edge_runtime.link import MqttLink
from edge_runtime.onnx_model import open_model, run_graph
from edge_runtime.probation import ProbationRules
from edge_runtime.regions import AskRegion, RegionClient
from fl_coordinator.shares.client import make_contribution
from model_delta.patch.route import NO_LIMITS, DeviceLimits
from model_delta.task import RoundTask
from model_delta.topics import require_model
from monitoring.metrics import Metrics

ENROL_DEADLINE_S = 60.0
REPORT_INTERVAL_S = 1.0
PROBATION = ProbationRules(decisions=8, seconds=4.0)
ATTACK, ATTACK_STRENGTH = "scaled", 12.0
MARGIN = 0.1
"""Scores this close to the threshold are put to the region."""


def run_fleet(
    path: Path,
    *,
    devices: int,
    shard: str,
    seed: int,
    hostile: float,
    rate: float,
    absent: str,
    observe: bool,
    metrics_port: int,
    payments: Path | None = None,
    model: str = "",
    as_json: bool = False,
) -> None:
    """Run the devices of shard `I/N` until told to stop; with `payments` the rows of that file are dealt to them.

    Options and the file are checked before anything is made. Raises ConfigurationError for options that do not fit,
    Malformed for a file that cannot be dealt.
    """
    data = DataFolder.open(path)
    endpoints = data.endpoints()
    index, count = _shard(shard)
    scenario = Scenario(seed=seed, devices=devices, regions=tuple(endpoints.gateways), hostile_share=hostile)
    left_out = {name for name in absent.split(",") if name}
    if payments is not None:
        world = world_of_rows(scenario, read_csv(payments))
    else:
        world = generated_world(scenario, only={number for number in range(devices) if number % count == index})
    wanted = require_model(model or (MODEL if payments is None else MODEL_OF_CSV))
    mine = [d for d in world.devices if d.index % count == index and d.device_id not in left_out]
    watch = ObservedUpdates(data.child("observed")).write if observe else None
    if observe:
        kept = f"fleet: --observe: raw updates of these simulated devices are kept in {data.path / 'observed'}"
        print(kept, file=sys.stderr, flush=True)
    events = Events(f"fleet-{index}", as_json=as_json)
    with contextlib.ExitStack() as held:
        for device in mine:
            name = device.device_id
            way = f"--data, or --absent {name}"
            held.enter_context(data.locked(f"device-{name}.lock", f"device {name} runs on", way))
        asked = held.enter_context(RegionCounts(data.child("fleet") / f"shard-{index}-of-{count}.counts"))
        run_process(
            _fleet(data, endpoints, world, mine, wanted, seed, rate, watch, metrics_port, events, asked),
            events.name,
            events=events,
        )


async def _fleet(
    data: DataFolder,
    endpoints: Endpoints,
    world: World,
    mine: Sequence[VirtualDevice],
    model: str,
    seed: int,
    rate: float,
    observe: Observe | None,
    metrics_port: int,
    events: Events,
    asked: RegionCounts,
) -> None:
    tokens = data.tokens()
    client = ControlClient(endpoints.coordinator, tokens["join"])
    counts, metrics = FleetCounts(), Metrics()
    async with RegionClient(endpoints.gateways, tokens["tenant"], model=model) as region_client:
        regions = CountedRegions(region_client, asked)
        _measure(metrics, asked, counts)
        members = [
            await asyncio.to_thread(_member, data, endpoints, client, world, device, model, regions, observe)
            for device in mine
        ]
        async with contextlib.AsyncExitStack() as stack:
            if metrics_port:
                await stack.enter_async_context(serving(metrics_app(metrics), metrics_port, "fleet metrics"))
            url = f"http://{LOOPBACK}:{metrics_port}/metrics" if metrics_port else ""
            events.say("ready", devices=len(members), coordinator=endpoints.coordinator, metrics=url)
            await run_members(members, Pace(payments_per_second=rate), seed, counts)


def _member(
    data: DataFolder,
    endpoints: Endpoints,
    client: ControlClient,
    world: World,
    device: VirtualDevice,
    model: str,
    regions: AskRegion,
    observe: Observe | None,
) -> Member:
    """One device, enrolled, with what it has seen of its own payments so far."""
    deadline = time.monotonic() + ENROL_DEADLINE_S
    traits = device.traits
    named = {"device_class": traits.device_class, "region": traits.region, **traits.labels}
    folder = data.identity(device.device_id)
    identity = retry_until(deadline, lambda: enrolled_identity(folder, device.device_id, "device", client, named))
    history = LabelledHistory(world.names)
    history.add_rows(*world.local(device.index))
    payments = world.live(device.index)

    def opened() -> contextlib.AbstractAsyncContextManager[Device]:
        return open_device(
            data,
            endpoints,
            identity,
            device,
            world.names,
            regions,
            history.arrays if device.trains else None,
            model=model,
            observe=observe,
        )

    return Member(device.device_id, opened, payments, history)


@contextlib.asynccontextmanager
async def open_device(
    data: DataFolder,
    endpoints: Endpoints,
    identity: Identity,
    device: VirtualDevice,
    names: Sequence[str],
    regions: AskRegion,
    history: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None,
    *,
    model: str = MODEL,
    observe: Observe | None = None,
    clock: Callable[[], float] = time.time,
    report_interval_s: float = REPORT_INTERVAL_S,
) -> AsyncIterator[Device]:
    """The real device program of one member of the population, with its line to the broker."""
    async with broker_line(endpoints, identity) as link:
        yield make_device(
            data,
            endpoints,
            identity,
            device,
            names,
            link,
            regions,
            history,
            model=model,
            observe=observe,
            clock=clock,
            report_interval_s=report_interval_s,
        )


def broker_line(endpoints: Endpoints, identity: Identity) -> MqttLink:
    """The line of an enrolled identity to the platform's broker, not open yet."""
    return MqttLink(host=endpoints.broker.host, port=endpoints.broker.port, client_id=identity.name, tls=identity.tls())


def make_device(
    data: DataFolder,
    endpoints: Endpoints,
    identity: Identity,
    device: VirtualDevice,
    names: Sequence[str],
    link: MqttLink,
    regions: AskRegion | None,
    history: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None,
    *,
    model: str = MODEL,
    observe: Observe | None = None,
    clock: Callable[[], float] = time.time,
    report_interval_s: float = REPORT_INTERVAL_S,
    limits: DeviceLimits = NO_LIMITS,
    cached_cost: float = 1.0,
) -> Device:
    """The real device program on an open `link`; without `regions` it decides alone."""
    return Device(
        identity=identity,
        traits=device.traits,
        model=model,
        directory=data.child("devices", identity.name),
        link=link,
        root=read_root(identity.folder),
        anchors=read_anchors(identity.folder),
        feature_names=names,
        open_model=open_model,
        rng=random.SystemRandom(),
        clock=clock,
        mirrors=regions_from(endpoints, device.traits.region),
        regions=regions,
        data=history,
        contribute=_contribute(identity, device, observe),
        run_graph=run_graph,
        probation=PROBATION,
        margin=MARGIN,
        report_interval_s=report_interval_s,
        limits=limits,
        cached_cost=cached_cost,
    )


def _contribute(
    identity: Identity, device: VirtualDevice, observe: Observe | None
) -> Callable[[np.ndarray, RoundTask], bytes]:
    """How this device turns an update into a contribution; a hostile one tampers with it first."""

    def honest(update: np.ndarray, task: RoundTask) -> bytes:
        return make_contribution(update, task, identity.sign, identity.certificate_pem, identity.name, os.urandom)

    transform = attack(ATTACK, ATTACK_STRENGTH, seed=device.index) if device.hostile else None
    if transform is None and observe is None:
        return honest
    return tampered(honest, identity.name, np.random.default_rng(device.index), transform, observe)


def _measure(metrics: Metrics, asked: RegionCounts, counts: FleetCounts) -> None:
    """Publish what the process counts anyway."""
    for name, meaning, read in (
        ("fleet_decisions", "Payments decided by this process's devices.", lambda: counts.decisions),
        ("fleet_restarts", "Devices opened again after a crash.", lambda: sum(counts.restarts.values())),
        ("region_requests", "Payments put to a region.", lambda: asked.read("requests")),
        ("region_requests_lost", "Payments that no region answered.", lambda: asked.read("lost")),
        ("region_requests_cut_short", "Payments whose device died while it asked.", lambda: asked.read("cut_short")),
        ("region_failovers", "Failures of a region that another one answered for.", lambda: asked.read("failovers")),
    ):  # fmt: skip
        metrics.gauge(name, meaning).read_from(lambda read=read: float(read()))  # type: ignore[misc]


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and 0 <= int(index) < int(count)):
        raise ConfigurationError(f"--shard: expected I/N with I below N, such as 0/2, found {text!r}")
    return int(index), int(count)
