"""The demo's seven acts in order: the first and the last here, the others by subject beside it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from atoll.demo_absence import AbsentDevice
from atoll.demo_learning import learn
from atoll.demo_regions import region_loss
from atoll.demo_rollouts import bad_version, canary, publish
from atoll.demo_stage import (
    Figures,
    Stage,
)
from atoll.held_out import ANY_MODEL, write_rows
from atoll.platform import COORDINATOR, READY_SECONDS, atoll_argv
from atoll.ports import port_answers
from atoll.processes import Program
from atoll.settings import quiet_environment
from device_sim.population import VirtualDevice
from device_sim.scenario import Scenario, generated_world

RATE = 4.0
HOSTILE_SHARE = 0.1


async def up(stage: Stage, figures: Figures) -> None:
    """Broker, coordinator, gateways, Flower, aggregators and fleet are running; every device has said hello."""
    stage.tell("making payments")
    stage.world = await asyncio.to_thread(generated_world, scenario_of(stage))
    await asyncio.to_thread(_write_held_out, stage)
    stage.absent = AbsentDevice(stage.data, stage.endpoints, stage.world, _absent_device(stage.world.devices))
    stage.tell("starting broker and coordinator")
    for name in ("broker", COORDINATOR):
        await stage.supervisor.start(stage.programs[name])
    await stage.note("act 1: up")
    stage.tell("starting regions, aggregators, fleet")
    others = [program for name, program in stage.programs.items() if name not in ("broker", COORDINATOR)]
    fleets = [_fleet_program(stage, index) for index in range(stage.shards)]
    await asyncio.gather(*(stage.supervisor.start(program) for program in (*others, *fleets)))
    expected = stage.devices - 1
    await stage.until(
        "every device says hello",
        60,
        lambda found: sum(device.reported for device in stage.fleet(found)) >= expected,
        lambda found: f"{sum(device.reported for device in stage.fleet(found))} of {expected} devices",
    )
    figures.update(
        broker=stage.endpoints.broker.kind,
        regions=len(stage.endpoints.gateways),
        aggregators=len(stage.endpoints.aggregators),
        processes=len(stage.programs) + len(fleets),
        devices=stage.devices,
        device_classes=dict(Counter(device.traits.device_class for device in stage.world.devices)),
        hostile_devices=sum(device.hostile for device in stage.world.devices),
    )


def scenario_of(stage: Stage) -> Scenario:
    """The world that the demo and its fleets build, each for itself."""
    regions = tuple(stage.endpoints.gateways)
    return Scenario(seed=stage.seed, devices=stage.devices, regions=regions, hostile_share=HOSTILE_SHARE)


def _absent_device(devices: Sequence[VirtualDevice]) -> VirtualDevice:
    """The one that will be away: the last honest terminal."""
    return [device for device in devices if not device.hostile and device.traits.device_class == "pos"][-1]


def _fleet_program(stage: Stage, index: int) -> Program:
    name, port = f"fleet-{index}", stage.metrics_ports[index]
    options = {
        "--devices": stage.devices,
        "--shard": f"{index}/{stage.shards}",
        "--seed": stage.seed,
        "--hostile": HOSTILE_SHARE,
        "--rate": RATE,
        "--absent": stage.absent.device_id,
        "--metrics-port": port,
        "--data": stage.data.path,
    }
    argv = atoll_argv("fleet", "run", "--observe", *(str(part) for pair in options.items() for part in pair))
    log = stage.data.child("logs") / f"{name}.log"
    return Program(
        name,
        argv,
        log,
        env=quiet_environment(),
        ready=port_answers(port),
        ready_seconds=READY_SECONDS,
        stop_seconds=10.0,
    )


def _write_held_out(stage: Stage) -> None:
    """Give the coordinator the payments on which it measures candidates, by kind of merchant."""
    features, fraud = stage.world.held_out()
    merchants = np.array([device.merchant for device in stage.world.devices])[stage.world.held_out_owner()]
    write_rows(stage.data.child("coordinator") / ANY_MODEL, features, fraud, merchants)


async def long_absence(stage: Stage, figures: Figures) -> None:
    """A device comes back after 120 days: its version has expired, the baseline comes by radio, then the network."""
    await stage.note("act 7: 120 days away")
    features, fraud = stage.world.history()
    figures.update(
        await stage.absent.come_back(stage.client, stage.model, features, fraud, stage.versions["v2"], stage.tell)
    )


Act = Callable[[Stage, Figures], Awaitable[None]]
ACTS: tuple[tuple[str, tuple[Act, frozenset[str]]], ...] = (
    ("up", (up, frozenset())),
    ("publish", (publish, frozenset({"up"}))),
    ("learn", (learn, frozenset({"up", "publish"}))),
    ("canary", (canary, frozenset({"up", "publish", "learn"}))),
    ("bad_version", (bad_version, frozenset({"up", "publish", "learn", "canary"}))),
    ("region_loss", (region_loss, frozenset({"up", "publish"}))),
    ("long_absence", (long_absence, frozenset({"up", "publish", "learn", "canary"}))),
)
"""Every act with what it needs to have worked, in order."""
