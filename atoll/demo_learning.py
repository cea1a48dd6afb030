"""The demo's act about federated rounds with hostile devices, beside what a plain average would have made of them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from atoll.demo_stage import (
    POLL_S,
    ActFailed,
    Figures,
    Stage,
    get_json,
    master,
    precision_of,
)
from atoll.settings import MODEL
from device_sim import fraud_model
from device_sim.faults import ObservedUpdates, plain_average
from device_sim.population import VirtualDevice
from fl_coordinator.masters import apply_mean
from monitoring.quality import average_precision

ROUND = {"steps": 60, "learning_rate": 0.01, "momentum": 0.9, "clip_norm_l2": 2.0}
ROUND_DEADLINE_S = 40.0
AGGREGATION_S = 45.0


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
        before = await master(stage, base)
        observed = ObservedUpdates(stage.data.child("observed")).read(found["round_id"])
        updates = [update for device, update, _ in observed if device in found["admitted"]]
        fedavg = apply_mean(before, plain_average(updates))
        candidate = await master(stage, found["candidate"])
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
        "quorum": max(8 + max(1, hostile), 2 * hostile + 3, len(able) // 2),
        "contributions_max": len(able),
        "deadline_s": ROUND_DEADLINE_S,
        "aggregation_s": AGGREGATION_S,
        "hostile_max": max(1, hostile),
        "policy": "krum",  # the attacks of act 3 are loud ones
        "positive_weight": fraud_model.POSITIVE_WEIGHT,
        **ROUND,
    }
    reason = ""
    for attempt in (1, 2):
        named = {**spec, "name": f"demo-{number}-{attempt}"}
        opened = await stage.call(lambda named=named: stage.client.post("/v1/rounds", named))  # type: ignore[misc]
        deadline = time.monotonic() + ROUND_DEADLINE_S + 4 * AGGREGATION_S
        while True:
            found = await get_json(stage, f"/v1/rounds/{opened['round_id']}")
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
