"""Everything at one moment, for the live page and the command line: a snapshot made of what the ledger knows."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping

from fl_coordinator import rollout as rollouts
from fl_coordinator.ledger import Ledger
from fl_coordinator.recorded_rounds import every_round
from fl_coordinator.rollout import SUPERSEDED, Rollout
from fl_coordinator.rounds import Round
from model_delta.encoding import unpack
from model_delta.plan import DeviceTraits, assign, matches
from model_delta.version import show
from monitoring.collector import LiveWindow
from monitoring.health import CohortHealth
from monitoring.metrics import Gauge
from monitoring.snapshot import (
    DeviceState,
    Note,
    RejectedDevice,
    ReleaseState,
    RolloutEvent,
    RolloutState,
    RoundState,
    Snapshot,
)
from monitoring.telemetry import latency_quantile_us

SNAPSHOT_KEPT_S = 0.25


class Overview:
    """Makes snapshots, and keeps the last one for a quarter of a second, so that viewers cost nothing."""

    def __init__(
        self,
        *,
        tenant: str,
        model: str,
        ledger: Ledger,
        window: LiveWindow,
        decided: Mapping[str, int],
        health: Callable[[Rollout, float], CohortHealth],
        connected: Callable[[], bool],
        devices: Gauge,
        clock: Callable[[], float],
    ) -> None:
        self.act = ""
        self._tenant = tenant
        self._model = model
        self._ledger = ledger
        self._window = window
        self._decided = decided
        self._health = health
        self._connected = connected
        self._gauge_devices = devices
        self._clock = clock
        self._snapshot: tuple[float, Snapshot] | None = None

    def changed(self) -> None:
        """Something happened that the next viewer should see."""
        self._snapshot = None

    def snapshot(self) -> Snapshot:
        """Everything at this moment. Blocking; cached for a quarter of a second, so that viewers cost nothing."""
        made = time.monotonic()
        if self._snapshot is not None and made - self._snapshot[0] < SNAPSHOT_KEPT_S:
            return self._snapshot[1]
        now = self._clock()
        live = self._window.rate(now)
        releases = self._ledger.releases()
        labels = {record.manifest: show(record.version) for record in releases}
        devices = self._ledger.followers()
        decided = Counter(self._decided)
        withdrawn = {digest for model in {r.model for r in releases} for digest in self._ledger.withdrawn(model)}
        running = Counter(record.running for record in devices)
        self._gauge_devices.set(len(devices))
        found = Snapshot(
            time=now,
            tenant=self._tenant,
            model=self._model,
            act=self.act,
            decisions=sum(decided.values()),
            decisions_per_second=live.decisions_per_second,
            latency_p50_us=live.latency_p50_us,
            latency_p95_us=live.latency_p95_us,
            latency_p99_us=live.latency_p99_us,
            latency=live.latency,
            devices=tuple(
                DeviceState(
                    device_id=record.device_id,
                    device_class=record.device_class,
                    region=record.region,
                    running=record.running,
                    version=labels.get(record.running, ""),
                    state=record.state,
                    safe_mode=record.safe_mode,
                    plan_serial=record.plan_serial,
                    last_seen=record.last_seen,
                    decisions=decided[record.device_id],
                    lost_requests=record.lost_requests,
                    dropped=record.dropped,
                    reported=record.device_id in decided,
                )
                for record in devices
            ),
            releases=tuple(
                ReleaseState(
                    manifest=record.manifest,
                    version=labels[record.manifest],
                    release=record.release,
                    created=record.created,
                    file_bytes=record.file_bytes,
                    whole_bytes=record.bytes_whole,
                    patch_bytes=record.bytes_patch,
                    devices=running[record.manifest],
                    withdrawn=record.manifest in withdrawn,
                    round_id=record.round_id,
                    model=record.model,
                )
                for record in releases
            ),
            rollouts=tuple(self._rollout_state(unpack(packed, Rollout), now) for packed in self._ledger.rollouts()),
            rounds=tuple(self._round_state(found) for found in every_round(self._ledger)),
            notes=tuple(Note(time=event.time, text=event.text, kind=event.kind) for event in self._ledger.events()),
            broker_connected=self._connected(),
        )
        self._snapshot = (made, found)
        return found

    def _rollout_state(self, found: Rollout, now: float) -> RolloutState:
        plan = rollouts.plan_of(found, self._ledger.withdrawn(found.model), now)
        records = self._ledger.followers(found.model)
        traits: list[DeviceTraits] = [record.traits for record in records]
        eligible = [one for one in traits if any(matches(cohort, one) for cohort in plan.cohorts)]
        in_stage = {one.device_id for one in eligible if assign(plan, one).arm == "target"}
        history = self._ledger.stage_history(found.name)
        health: dict[str, dict[str, float]] = {}
        if found.live:
            counted = self._health(found, now)
            for arm, figures in (("target", counted.target), ("control", counted.control)):
                decided = figures.decided
                health[arm] = {
                    "devices": figures.devices,
                    "silent": figures.silent,
                    "adopted": figures.adopted,
                    "decisions": decided.answers,
                    "errors": decided.errors,
                    "latency_p95_ms": latency_quantile_us(decided.latency, 0.95) / 1000,
                    "false_positive_rate": decided.false_positives / max(1, decided.labelled_legitimate),
                    "rolled_back": figures.rolled_back,
                }
        return RolloutState(
            name=found.name,
            state=found.state,
            model=found.model,
            stage=found.stage,
            stages=tuple(
                f"{stage.devices} devices" if stage.devices is not None else f"{stage.share or 0.0:.0%}"
                for stage in found.spec.stages
            ),
            target=found.target,
            stable=found.stable,
            serial=found.serial,
            eligible=len(eligible),
            in_stage=len(in_stage),
            adopted=sum(record.running == found.target and record.device_id in in_stage for record in records),
            health=health,
            history=tuple(
                RolloutEvent(time=entry.time, event=entry.event, stage=entry.stage, reason=entry.text)
                for entry in history
            ),
            standing=rollouts.standing(found, len(in_stage), any(entry.event == SUPERSEDED for entry in history)),
            reason=found.reason,
        )

    def _round_state(self, found: Round) -> RoundState:
        return RoundState(
            round_id=found.round_id,
            state=found.state,
            base=found.task.base,
            candidate=found.candidate,
            quorum=found.spec.quorum,
            admitted=len(self._ledger.contributions(found.round_id)),
            refused=self._ledger.refusals(found.round_id),
            sat_out=self._ledger.sat_out(found.round_id),
            chosen=found.chosen,
            rejected=tuple(
                RejectedDevice(device_id=device_id, reason=reason) for device_id, reason in found.rejected.items()
            ),
            attempt=found.attempt,
            reason=found.reason,
            reveal=found.task.reveal,
            opened=found.opened,
            figures={**found.figures, "seconds": found.seconds},
        )
