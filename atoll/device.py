"""`atoll device run`: one device in a terminal, as a device team would embed it.

It is the real program with an identity of its own; only its payments are simulated, or come from a labelled CSV file.
What happens is told line by line: every decision, and every change of what answers. A platform that is away is tried
until a deadline at the start; after that the device goes on alone, as a terminal at a till has to.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import typer

from atoll.control_client import ControlClient, reach
from atoll.enrolment import enrolled_identity
from atoll.entry import run_process
from atoll.events import Events
from atoll.fleet import broker_line, make_device
from atoll.platform import is_server, regions_from
from atoll.settings import MODEL, MODEL_OF_CSV, TENANT, ConfigurationError, DataFolder, Endpoints
from device_sim.payments_csv import CSV_FEATURE_SET, read_csv
from device_sim.population import CLASSES, VirtualDevice
from device_sim.real_fleet import LabelledHistory, Member, Pace
from device_sim.real_fleet import run_fleet as run_members
from device_sim.scenario import Sample, Scenario, generated_world, replayed_rows
from edge_runtime.device import Device
from edge_runtime.identity import Identity
from edge_runtime.link import MqttLink
from edge_runtime.regions import RegionClient
from model_delta.errors import Unavailable
from model_delta.keys.certificates import require_identity
from model_delta.patch.route import NO_LIMITS, DeviceLimits
from model_delta.plan import DeviceTraits
from monitoring.telemetry import Decision, UpdateOutcome

TOWN = 20
"""Terminals in the simulated town; the device is the first of its class there."""
WATCH_S = 0.1


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
    rate: float,
    count: int,
    seed: int,
    model: str,
    contact_s: float,
    as_json: bool,
    limits: DeviceLimits = NO_LIMITS,
    cached_cost: float = 1.0,
) -> None:
    """Enrol the device, let it decide `count` payments (0: until told to stop) and print what it does.

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
    stream = _stream(device_id, device_class, region, payments, seed)
    wanted = model or (MODEL if payments is None else MODEL_OF_CSV)
    teller = Teller(count, as_json=as_json)
    with data.locked(f"device-{device_id}.lock", f"device {device_id} runs on", "--id"):
        events = Events(device_id, as_json=as_json)
        run_process(
            _run(data, endpoints, stream, wanted, rate, seed, contact_s, teller, events, limits, cached_cost),
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
    async with RegionClient(endpoints.gateways, tokens["tenant"]) as regions:

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
                    regions if model == MODEL else None,  # regions take the features of the default model only
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

        member = Member(identity.name, opened, stream.payments, stream.history)
        life = asyncio.create_task(
            run_members([member], Pace(payments_per_second=rate), seed, note=teller.decided), name=identity.name
        )
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


class Teller:
    """Says what the device does, one line each, and knows when enough was decided.

    With `as_json` each line is an object whose `event` is decision, state, outcome, connection or safe_mode.
    """

    def __init__(self, count: int, *, as_json: bool, write: Callable[[str], None] = typer.echo) -> None:
        self._count, self._as_json, self._write = count, as_json, write
        self._decisions = self._declined = 0
        self._reached = self._said_safe = False
        self.done: asyncio.Future[None]  # made when the loop runs

    async def first_connection(self, link: MqttLink, contact_s: float) -> None:
        """Wait for the broker at the start only: a device that has begun goes on without it."""
        if self._reached:
            return
        try:
            await link.wait_connected(contact_s)
        except Unavailable as error:
            away = ConfigurationError(str(error))
            self._finish(away)
            raise away from None
        self._reached = True

    def decided(self, device_id: str, decision: Decision, payment: Sample) -> None:
        """One decision of the device."""
        if self.done.done():
            return
        if decision.where == "baseline" and not self._said_safe:
            self._said_safe = True
            rule = "the baseline" if decision.manifest else "the built-in rule"
            self._say(
                f"safe mode: no version may answer ({decision.fallback or 'no model'}); {rule} decides until one does",
                event="safe_mode",
                reason=decision.fallback,
            )
        verdict = "approve" if decision.approved else "decline"
        notes = [note for note in (decision.fallback, decision.error) if note]
        self._say(
            f"{time.strftime('%H:%M:%S', time.localtime(decision.time))}  {decision.decision_id}  {verdict}  "
            f"{decision.score:.4f}  {decision.manifest[:12] or '-':<12}  {decision.region or decision.where}  "
            f"{decision.latency_us:.0f} us{'  (' + '; '.join(notes) + ')' if notes else ''}",
            event="decision",
            time=decision.time,
            device_id=device_id,
            decision_id=decision.decision_id,
            decision=verdict,
            score=decision.score,
            version=decision.manifest,
            where=decision.where,
            region=decision.region,
            latency_us=decision.latency_us,
            fallback=decision.fallback,
            error=decision.error,
        )
        self._decisions += 1
        self._declined += not decision.approved
        if self._count and self._decisions >= self._count:
            self._finish()

    async def watch(self, device: Device, link: MqttLink) -> None:
        """Tell changes of the update's state, its outcomes, and the line to the broker, until cancelled."""
        state, connected, seen = device.state, True, device.outbox.last_sequence
        if device.running.digest:
            self._say(f"runs version {device.running.digest[:12]}", event="state", state=state)
        while True:
            await asyncio.sleep(WATCH_S)
            record = device.installation.record
            if record.state != state:
                state = str(record.state)
                target = record.target
                self._say(
                    f"{state.replace('_', ' ')}{' ' + target[:12] if target else ''}",
                    event="state",
                    state=state,
                    version=target,
                )
            last = device.outbox.last_sequence
            for _, entry in device.outbox.read(seen + 1, last):
                if isinstance(entry, UpdateOutcome):
                    self._outcome(entry)
            seen = last
            if link.connected != connected:
                connected = link.connected
                text = "the broker answers again" if connected else "the broker is away; the device goes on alone"
                self._say(text, event="connection", connected=connected)

    def last_words(self) -> None:
        """How it was, on standard error, for a person."""
        if not self._as_json and self._decisions:
            typer.echo(f"{self._decisions} decisions, {self._declined} declined", err=True)

    def _outcome(self, outcome: UpdateOutcome) -> None:
        ways = {
            "patch": " by patch",
            "chain": " by a chain of patches",
            "replace": " by the segments that it lacked",
            "whole": " whole",
        }
        way = ways.get(outcome.route, "")
        reason = f": {outcome.reason}" if outcome.reason else ""
        self._say(
            f"{outcome.event.replace('_', ' ')} version {outcome.manifest[:12]}{way}, "
            f"{outcome.bytes_received} B in {outcome.seconds:.1f} s{reason}",
            event="outcome",
            outcome=outcome.event,
            version=outcome.manifest,
            route=outcome.route,
            bytes=outcome.bytes_received,
            seconds=outcome.seconds,
            reason=outcome.reason,
        )

    def _say(self, text: str, **fields: Any) -> None:
        if self.done.done():
            return
        try:
            self._write(json.dumps(fields) if self._as_json else text)
        except BrokenPipeError:  # the reader has seen enough, as in `atoll device run | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self._finish()

    def _finish(self, error: ConfigurationError | None = None) -> None:
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)
