"""The demo's seven acts. Each is told by what it promises; what it measured goes into its figures.

An act drives the platform only through what a user has: the control API, the data folder, signals to processes. It
raises ActFailed when something that it promises was not seen before its deadline. Everything it asks may be asked
twice, so that an act survives the death of any process.
"""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from atoll.control_client import ControlClient, answered
from atoll.demo_absence import AbsentDevice
from atoll.platform import COORDINATOR, READY_SECONDS, atoll_argv, gateway_name
from atoll.processes import ProcessEvent, Program, Supervisor, port_answers
from atoll.settings import MODEL, DataFolder, Endpoints, quiet_environment
from device_sim import fraud_model
from device_sim.faults import ObservedUpdates, plain_average
from device_sim.payments import FEATURE_SET
from device_sim.population import VirtualDevice
from device_sim.scenario import Scenario, World, generated_world
from edge_runtime.regions import RegionClient
from fl_coordinator.masters import apply_mean
from model_delta import graphs
from model_delta.errors import AtollError, Unavailable
from model_delta.segments import read_tensor, stored_tensors
from monitoring.quality import at_threshold, average_precision
from monitoring.snapshot import DeviceState, RolloutState, Snapshot

RATE = 4.0
HOSTILE_SHARE = 0.1
POLL_S = 0.4
ROUND = {"steps": 60, "learning_rate": 0.1, "clip_norm_l2": 2.0}
ROUND_DEADLINE_S = 40.0
AGGREGATION_S = 45.0
FAULT_SHIFT, FAULT_WORK = 8.0, 700
WATCH_S = 11.0
WATCH_DEADLINE_S = 90.0
REGION_DOWN_S = 5.0
TERMINAL_RATE = 25.0

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


# --- act 1 ------------------------------------------------------------------------------------------------------------


async def up(stage: Stage, figures: Figures) -> None:
    """Broker, coordinator, gateways, Flower, aggregators and fleet are running; every device has said hello."""
    scenario = Scenario(
        seed=stage.seed, devices=stage.devices, regions=tuple(stage.endpoints.gateways), hostile_share=HOSTILE_SHARE
    )
    stage.tell("making payments")
    stage.world = await asyncio.to_thread(generated_world, scenario)
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
    path = stage.data.child("coordinator") / "held_out.npz"
    np.savez(path, features=features, fraud=fraud, slice=merchants)


# --- act 2 ------------------------------------------------------------------------------------------------------------


async def publish(stage: Stage, figures: Figures) -> None:
    """A model trained on history is published; every device fetches, verifies and runs it on live payments."""
    await stage.note("act 2: publish")
    stage.tell("a device takes its factory version, 120 days ago")
    factory, told = await stage.absent.leave(stage.client)
    figures.update({f"absent_device_{key}": value for key, value in told.items()})
    stage.tell("training on history")
    features, fraud = stage.world.history()
    stage.model = await asyncio.to_thread(
        fraud_model.train, features, fraud, seed=stage.seed, start=factory, steps=200, learning_rate=1e-4
    )
    source = graphs.mlp_model(stage.model.weights, stage.model.mean, stage.model.scale)
    stage.tell("publishing")
    release = await publish_version(stage, source, "historical", threshold=stage.model.decision_threshold)
    stage.versions["v1"] = release["manifest"]
    started = time.monotonic()
    await apply_rollout(stage, _rollout_yaml("first-version", release["manifest"], canary=False))
    everybody = stage.devices - 1
    await stage.until(
        "every device runs the first version",
        60,
        lambda found: running(stage, found, release["manifest"]) == everybody,
        lambda found: f"{running(stage, found, release['manifest'])} of {everybody} devices run it",
    )
    adopted = time.monotonic() - started
    last = await _watch(stage)
    held_features, held_fraud = stage.world.held_out()
    figures.update(
        parameters=sum(weight.size + bias.size for weight, bias in stage.model.weights),
        bytes_float32=len(source),
        bytes_int8=release["bytes_file"],
        bytes_download=release["bytes_whole"],
        average_precision_history=stage.model.average_precision,
        average_precision_today=average_precision(stage.model.score(held_features), held_fraud),
        seconds_until_all_adopted=round(adopted, 2),
        decisions_per_second=last.decisions_per_second,
        latency_p50_us=last.latency_p50_us,
        latency_p95_us=last.latency_p95_us,
        latency_p99_us=last.latency_p99_us,
        plot_latency={str(bucket): count for bucket, count in sorted(last.latency.items())},
    )


async def _watch(stage: Stage) -> Snapshot:
    """The state after one whole window of live figures, with neither the adoption nor a death in it."""
    started = time.monotonic()
    while (watched := min(time.monotonic() - started, stage.deaths.calm_s())) < WATCH_S:
        if time.monotonic() - started > WATCH_DEADLINE_S:
            raise ActFailed(f"live payments: no {WATCH_S:.0f} s without a death within {WATCH_DEADLINE_S:.0f} s")
        stage.tell(f"live payments, {watched:.0f} of {WATCH_S:.0f} s")
        await asyncio.sleep(1.0)
    return await stage.snapshot()


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


def _rollout_yaml(name: str, target: str, *, canary: bool) -> str:
    """The demo's cohort YAML: one device, a quarter, everybody; or everybody at once for the first version, which has
    nothing to be compared with."""
    stages, compared = "", ""
    if canary:
        stages = """
        - devices: 1
          hold: {minSeconds: 8, minDecisions: 40}
        - share: 25%
          hold: {minSeconds: 3, minDecisions: 60, minAdopted: 90%}"""
        compared = """
    - {metric: latency_p95_ms, max: 50, ratioToControl: 5}
    - {metric: false_positive_rate, maxIncrease: 10%, ratioToControl: 3}"""
    return f"""apiVersion: atoll/v1
kind: Rollout
metadata: {{name: {name}}}
spec:
  model: {MODEL}
  target: {target}
  cohorts:
    - {{name: everyone, match: {{}}}}
  strategy:
    canary:
      control: {"mirrored" if canary else "none"}
      stages:{stages}
        - share: 100%
          hold: {{minSeconds: 2, minDecisions: 100, minAdopted: 90%}}
  guardrails:{compared}
    - {{metric: error_rate, max: 1%}}
    - {{metric: rolled_back, max: 0}}
  rollback: {{auto: true}}
"""


# --- act 3 ------------------------------------------------------------------------------------------------------------


async def learn(stage: Stage, figures: Figures) -> None:
    """Federated rounds with hostile devices: precision rises, the hostile are named, nobody's update is read."""
    await stage.note("act 3: learn")
    hostile = {device.device_id for device in stage.world.devices if device.hostile}
    able = [device for device in stage.world.devices if device.trains and device.device_id != stage.absent.device_id]
    features, fraud = stage.world.held_out()
    stale = average_precision(stage.model.score(features), fraud)
    base, rejected = stage.versions["v1"], Counter[str]()
    rows: list[dict[str, Any]] = []
    for number in range(1, stage.rounds + 1):
        found = await _round(stage, number, base, able, len(hostile))
        outcome = dict(found["rejected"])
        rejected.update(outcome.keys())
        before = await _master(stage, base)
        observed = ObservedUpdates(stage.data.child("observed")).read(found["round_id"])
        updates = [update for device, update, _ in observed if device in found["admitted"]]
        fedavg = apply_mean(before, plain_average(updates))
        candidate = await _master(stage, found["candidate"])
        rows.append(
            {
                "round": number,
                "average_precision": precision_of(candidate, features, fraud),
                "average_precision_fedavg": precision_of(fedavg, features, fraud),
                "average_precision_stale": stale,
                "contributions": len(found["admitted"]),
                "chosen": len(found["chosen"]),
                "hostile_rejected": len(hostile & outcome.keys()),
                "hostile_present": len(hostile & set(found["admitted"])),
                "honest_rejected": len(outcome.keys() - hostile),
                "seconds": round(sum(dict(found["seconds"]).values()), 2) if found["seconds"] else 0.0,
                "rejected": [f"{device}: {reason}" for device, reason in outcome.items()],
            }
        )
        base = found["candidate"]
    stage.versions["v2"] = base
    figures.update(
        average_precision_stale=stale,
        average_precision_after=rows[-1]["average_precision"],
        average_precision_fedavg=rows[-1]["average_precision_fedavg"],
        devices_in_rounds=len(able),
        hostile=sorted(hostile),
        rejected=[f"{device} ({count} of {len(rows)} rounds)" for device, count in sorted(rejected.items())],
        rounds=rows,
    )
    if rows[-1]["average_precision"] <= stale:
        raise ActFailed(f"average precision {rows[-1]['average_precision']:.3f} did not rise above {stale:.3f}")
    missed = [row["round"] for row in rows if row["hostile_rejected"] < row["hostile_present"]]
    if missed:
        raise ActFailed(f"hostile devices were chosen in round {', '.join(map(str, missed))}")


async def _round(stage: Stage, number: int, base: str, able: Sequence[VirtualDevice], hostile: int) -> dict[str, Any]:
    """Open one round and follow it to its end; a failed round is opened once more."""
    spec = {
        "model": MODEL,
        "base": base,
        "quorum": max(8, 2 * hostile + 3, len(able) // 2),
        "contributions_max": len(able),
        "deadline_s": ROUND_DEADLINE_S,
        "aggregation_s": AGGREGATION_S,
        "hostile_max": max(1, hostile),
        "positive_weight": fraud_model.POSITIVE_WEIGHT,
        **ROUND,
    }
    reason = ""
    for attempt in (1, 2):
        named = {**spec, "name": f"demo-{number}-{attempt}"}
        opened = await stage.call(lambda named=named: stage.client.post("/v1/rounds", named))  # type: ignore[misc]
        deadline = time.monotonic() + ROUND_DEADLINE_S + 4 * AGGREGATION_S
        while True:
            found = await _get(stage, f"/v1/rounds/{opened['round_id']}")
            state = found["state"].lower()
            stage.tell(
                f"round {number} of {stage.rounds}: {state}, {len(found['admitted'])} of {len(able)} contributions"
            )
            if state == "published":
                return dict(found)
            if state in ("failed", "refused"):
                reason = found["reason"]
                break
            if time.monotonic() > deadline:
                raise ActFailed(f"round {opened['round_id']}: still {state} at its deadline")
            await asyncio.sleep(POLL_S)
    raise ActFailed(f"round {number} failed twice: {reason}")


async def _get(stage: Stage, path: str) -> dict[str, Any]:
    found: dict[str, Any] = await stage.call(lambda: stage.client.get(path))
    return found


async def _master(stage: Stage, manifest: str) -> bytes:
    """The float32 file behind a version, by the operator's right."""
    return await stage.call(lambda: stage.client.get_bytes(f"/v1/releases/{manifest}/source"))


def precision_of(source: bytes, features: Float32, fraud: npt.NDArray[np.bool_]) -> float:
    """Average precision of a float32 model file on payments."""
    return average_precision(_scores(source, features), fraud)


def _scores(source: bytes, features: Float32) -> Float32:
    tensors = {tensor.name: tensor for tensor in stored_tensors(source)}
    read: Callable[[str], Float32] = lambda name: np.asarray(read_tensor(source, tensors[name]), np.float32)  # noqa: E731
    layers: list[tuple[Float32, Float32]] = []
    while f"layer{len(layers)}.weight" in tensors:
        index = len(layers)
        layers.append((read(f"layer{index}.weight"), read(f"layer{index}.bias")))
    return fraud_model.score(layers, read("input.mean"), read("input.scale"), features)


# --- act 4 ------------------------------------------------------------------------------------------------------------


async def canary(stage: Stage, figures: Figures) -> None:
    """The learned version goes out: one device, a quarter, everybody, by patches."""
    await stage.note("act 4: canary")
    target = stage.versions["v2"]
    await apply_rollout(stage, _rollout_yaml("learned", target, canary=True))
    timeline, found = await _follow(stage, "learned", target, ("completed",), 90)
    await _all_run(stage, target)
    adopted = await _adopted_by_all(stage, target)
    release = await stage.call(lambda: stage.client.get(f"/v1/releases/{target}"))
    sent = sum(one["bytes_received"] for one in adopted)
    full = release["bytes_whole"] * len(adopted)
    ran = [sample["devices"].get(release["version"], 0) for sample in timeline]
    figures.update(
        canary_devices=next((count for count in ran if count), 0),
        devices_adopted=len(adopted),
        by_patch=sum(one["route"] in ("patch", "chain") for one in adopted),
        bytes_sent=sent,
        bytes_full_downloads=full,
        bytes_per_device=round(sent / max(1, len(adopted))),
        bytes_whole=release["bytes_whole"],
        share_of_full=round(sent / full, 3) if full else 0.0,
        stages=[f"{event.event} {event.reason}".strip() for event in found.history],
        plot_timeline=timeline,
    )
    if figures["canary_devices"] != 1:
        raise ActFailed(f"expected 1 device in the canary, found {figures['canary_devices']}")
    if sent >= full:
        raise ActFailed(f"patches were no smaller than full downloads: {sent} against {full} bytes")


async def _follow(
    stage: Stage, name: str, target: str, ends: tuple[str, ...], seconds: float
) -> tuple[list[dict[str, Any]], RolloutState]:
    """Watch a rollout until one of its end states; who ran what, over time."""
    started, timeline = time.monotonic(), list[dict[str, Any]]()
    while True:
        found = await stage.snapshot()
        elapsed = time.monotonic() - started
        by_version = Counter(device.version or "none" for device in stage.fleet(found))
        timeline.append({"seconds": round(elapsed, 2), "devices": dict(by_version)})
        rollout = next((one for one in found.rollouts if one.name == name), None)
        if rollout is not None:
            if rollout.state in ends:
                return timeline, rollout
            if rollout.state not in ("running", "paused"):
                reason = rollout.history[-1].reason if rollout.history else ""
                raise ActFailed(f"rollout {name}: expected {' or '.join(ends)}, found {rollout.state}: {reason}")
            stage.tell(f"stage {rollout.stage + 1} of {len(rollout.stages)}, {running(stage, found, target)} run it")
        if elapsed > seconds:
            raise ActFailed(f"rollout {name}: not {' or '.join(ends)} within {seconds:.0f} s")
        await asyncio.sleep(POLL_S)


async def _all_run(stage: Stage, manifest: str, seconds: float = 40.0) -> Snapshot:
    everybody = stage.devices - 1
    return await stage.until(
        "every device runs the version",
        seconds,
        lambda found: running(stage, found, manifest) == everybody,
        lambda found: f"{running(stage, found, manifest)} of {everybody} devices run it",
    )


async def _adopted_by_all(stage: Stage, manifest: str, seconds: float = 20.0) -> list[dict[str, Any]]:
    """The outcome of every device of the fleet; reports of the last ones are waited for."""
    deadline = time.monotonic() + seconds
    while True:
        adopted = [one for one in await _outcomes(stage, manifest) if one["event"] == "adopted"]
        heard = {one["device_id"] for one in adopted}
        if len(heard) >= stage.devices - 1:
            return adopted
        if time.monotonic() > deadline:
            raise ActFailed(f"{len(heard)} of {stage.devices - 1} devices told how their update ended")
        await asyncio.sleep(POLL_S)


async def _outcomes(stage: Stage, manifest: str) -> list[dict[str, Any]]:
    """How the update to a version ended, a line a device."""
    found: list[dict[str, Any]] = await stage.call(lambda: stage.client.get(f"/v1/releases/{manifest}/outcomes"))
    return found


# --- act 5 ------------------------------------------------------------------------------------------------------------


async def bad_version(stage: Stage, figures: Figures) -> None:
    """A version that ranks as well as the good one but is slow and cries wolf: stopped at the canary, then undone."""
    await stage.note("act 5: a bad version")
    good = stage.versions["v2"]
    source = await _master(stage, good)
    bad_source = await asyncio.to_thread(graphs.faulty_variant, source, FAULT_SHIFT, FAULT_WORK)
    release = await publish_version(stage, bad_source, "faulty")
    bad = release["manifest"]
    features, fraud = stage.world.held_out()
    scores = _scores(source, features)
    shifted = fraud_model.sigmoid(np.asarray(_logit(scores) + FAULT_SHIFT, dtype=np.float32))
    threshold = float((await stage.call(lambda: stage.client.get(f"/v1/releases/{good}")))["decision_threshold"])
    started = time.monotonic()
    await apply_rollout(stage, _rollout_yaml("faulty", bad, canary=True))
    timeline, rollout = await _follow(stage, "faulty", bad, ("stopped",), 60)
    stopped = time.monotonic() - started
    await _all_run(stage, good)
    undone = time.monotonic() - started
    found = await stage.snapshot()
    timeline.append(
        {"seconds": round(undone, 2), "devices": dict(Counter(d.version or "none" for d in stage.fleet(found)))}
    )
    outcomes = [one for one in await _outcomes(stage, bad) if one["event"] in ("adopted", "rolled_back", "withdrawn")]
    ever = {one["device_id"] for one in outcomes}
    active = [one["seconds_active"] for one in outcomes if one["event"] in ("rolled_back", "withdrawn")]
    stop = next((event for event in reversed(rollout.history) if event.event == "stopped"), None)
    figures.update(
        average_precision_good=average_precision(scores, fraud),
        average_precision_bad=average_precision(shifted, fraud),
        false_positive_rate_good=at_threshold(scores, fraud, threshold).false_positive_rate,
        false_positive_rate_bad=at_threshold(shifted, fraud, threshold).false_positive_rate,
        devices_ever=len(ever),
        devices_names=sorted(ever),
        seconds_active=round(max(active, default=0.0), 2),
        seconds_until_stopped=round(stopped, 2),
        seconds_until_undone=round(undone, 2),
        guardrail=stop.reason if stop else "",
        plot_timeline=timeline,
    )
    if len(ever) != 1:
        raise ActFailed(f"expected the bad version on the canary alone, found it on {len(ever)} devices")


def _logit(scores: Float32) -> Float32:
    safe = np.clip(scores.astype(np.float64), 1e-7, 1 - 1e-7)
    return np.asarray(np.log(safe / (1 - safe)), dtype=np.float32)


# --- act 6 ------------------------------------------------------------------------------------------------------------


async def region_loss(stage: Stage, figures: Figures) -> None:
    """A gateway is killed; whoever asks that region is answered by the next, and nothing is lost."""
    await stage.note("act 6: a region dies")
    dead = next(iter(stage.endpoints.gateways))
    name = gateway_name(dead)
    before = await _region_metrics(stage)
    terminal = AskingTerminal(stage, dead)
    async with terminal:
        await asyncio.sleep(2.0)
        killed = time.monotonic()
        await stage.supervisor.kill(name)
        while time.monotonic() - killed < REGION_DOWN_S:
            stage.tell(f"{dead} is dead, {time.monotonic() - killed:.0f} of {REGION_DOWN_S:.0f} s")
            await asyncio.sleep(POLL_S)
        stage.tell(f"starting {dead} again")
        await stage.supervisor.start(stage.programs[name])
        await _answers(stage.endpoints.gateways[dead])
        back = time.monotonic() - killed
        await asyncio.sleep(3.0)
    after = await _region_metrics(stage)
    fleet, restarted = increase(before, after)
    lost = terminal.lost + fleet["requests_lost"]
    figures.update(
        region=dead,
        seconds_dead=round(back, 2),
        requests_of_terminal=terminal.asked,
        requests_of_fleet=fleet["requests"],
        fleet_processes_restarted=restarted,
        answered_by=dict(terminal.answered_by),
        failovers=terminal.failovers + fleet["failovers"],
        requests_lost=lost,
        recovery_ms=round(terminal.recovery_s * 1000, 1),
        slowest_request_ms=round(terminal.slowest_s * 1000, 1),
    )
    if lost:
        raise ActFailed(f"expected no lost request, found {lost}")
    if not terminal.failovers:
        raise ActFailed(f"nobody asked {dead} while it was dead: {terminal.asked} requests")


class AskingTerminal:
    """A terminal that puts every payment to its region, before, while and after that region is dead."""

    def __init__(self, stage: Stage, home: str) -> None:
        device = stage.world.devices[0]
        self._home, self._device_id = home, device.device_id
        self._payments = stage.world.live(device.index)
        self._client = RegionClient(stage.endpoints.gateways, stage.data.tokens()["tenant"])
        self._task: asyncio.Task[None] | None = None
        self.asked = self.lost = 0
        self.slowest_s = 0.0

    async def __aenter__(self) -> None:
        await self._client.__aenter__()
        self._task = asyncio.create_task(self._pay(), name="asking terminal")

    async def __aexit__(self, *error: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._client.__aexit__(None, None, None)

    async def _pay(self) -> None:
        for sample in self._payments:
            started = time.monotonic()
            self.asked += 1
            try:
                await self._client.ask(sample.features, self._device_id, self._home)
            except Unavailable:
                self.lost += 1
            self.slowest_s = max(self.slowest_s, time.monotonic() - started)
            await asyncio.sleep(1 / TERMINAL_RATE)

    @property
    def answered_by(self) -> Mapping[str, int]:
        """Answers by region."""
        return self._client.answered_by

    @property
    def failovers(self) -> int:
        """How often another region answered for one that had failed."""
        return len(self._client.failovers)

    @property
    def recovery_s(self) -> float:
        """The longest time from a region's first failure to the first answer elsewhere."""
        return max((failover.recovery_s for failover in self._client.failovers), default=0.0)


async def _region_metrics(stage: Stage) -> list[Mapping[str, float]]:
    """The metrics of each of the fleet's processes."""
    return [
        await stage.call(lambda port=port: scrape(f"http://127.0.0.1:{port}/metrics"))  # type: ignore[misc]
        for port in stage.metrics_ports
    ]


def increase(before: Sequence[Mapping[str, float]], after: Sequence[Mapping[str, float]]) -> tuple[dict[str, int], int]:
    """By how much the counts of requests grew over all processes, and how many processes were started anew meanwhile:
    those count from zero again, and what they counted before they died is in nobody's figures."""
    total, restarted = dict.fromkeys(("requests", "requests_lost", "failovers"), 0), 0
    for first, last in zip(before, after, strict=True):
        same = first["process_start_time_seconds"] == last["process_start_time_seconds"]
        restarted += not same
        for key in total:
            name = f"atoll_region_{key}"
            total[key] += int(last[name] - (first[name] if same else 0.0))
    return total, restarted


def scrape(url: str) -> Mapping[str, float]:
    """Unlabelled samples of a Prometheus text page by name. Raises Unavailable."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5) as answer:
            lines = answer.read().decode().splitlines()
    except OSError as error:
        raise Unavailable(f"{url}: {error}") from None
    samples = {}
    for line in lines:
        if line and not line.startswith("#") and "{" not in line:
            name, _, value = line.partition(" ")
            samples[name] = float(value)
    return samples


async def _answers(url: str) -> None:
    """Wait until a gateway is ready to infer."""
    deadline = time.monotonic() + 30
    while True:
        try:
            await asyncio.to_thread(_get_ready, url)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ActFailed(f"{url}: not ready again within 30 s: {error}") from None
            await asyncio.sleep(0.2)


def _get_ready(url: str) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}/v2/health/ready", timeout=2) as answer:
        answer.read()


# --- act 7 ------------------------------------------------------------------------------------------------------------


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
