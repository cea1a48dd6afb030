"""The demo's acts about versions: the first one for everybody, a better one by canary, a bad one undone."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

import numpy as np

from atoll.demo_stage import (
    POLL_S,
    ActFailed,
    Figures,
    Float32,
    Stage,
    apply_rollout,
    master,
    outcomes_of,
    publish_version,
    running,
    scores_of,
)
from atoll.settings import MODEL
from device_sim import fraud_model
from model_delta.graphs.faulty import faulty_variant
from model_delta.graphs.mlp import mlp_model
from monitoring.quality import at_threshold, average_precision
from monitoring.snapshot import RolloutState, Snapshot

FAULT_SHIFT, FAULT_WORK = 8.0, 700
WATCH_S = 11.0
WATCH_DEADLINE_S = 90.0


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
    source = mlp_model(stage.model.weights, stage.model.mean, stage.model.scale)
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


async def bad_version(stage: Stage, figures: Figures) -> None:
    """A version that ranks as well as the good one but is slow and cries wolf: stopped at the canary, then undone."""
    await stage.note("act 5: a bad version")
    good = stage.versions["v2"]
    source = await master(stage, good)
    bad_source = await asyncio.to_thread(faulty_variant, source, FAULT_SHIFT, FAULT_WORK)
    release = await publish_version(stage, bad_source, "faulty")
    bad = release["manifest"]
    features, fraud = stage.world.held_out()
    scores = scores_of(source, features)
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
    outcomes = [one for one in await outcomes_of(stage, bad) if one["event"] in ("adopted", "rolled_back", "withdrawn")]
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
        adopted = [one for one in await outcomes_of(stage, manifest) if one["event"] == "adopted"]
        heard = {one["device_id"] for one in adopted}
        if len(heard) >= stage.devices - 1:
            return adopted
        if time.monotonic() > deadline:
            raise ActFailed(f"{len(heard)} of {stage.devices - 1} devices told how their update ended")
        await asyncio.sleep(POLL_S)


def _logit(scores: Float32) -> Float32:
    safe = np.clip(scores.astype(np.float64), 1e-7, 1 - 1e-7)
    return np.asarray(np.log(safe / (1 - safe)), dtype=np.float32)
