"""What `atoll device run` prints: a line for every answer, and for every change of what answers."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import typer

from atoll.output import plain
from atoll.settings import ConfigurationError
from atoll.tensor_rows import listed, shown_short
from device_sim.scenario import Sample
from edge_runtime.device import Device
from edge_runtime.inferences import Inferred
from edge_runtime.link import MqttLink
from model_delta.errors import Unavailable
from monitoring.telemetry import Decision, UpdateOutcome

WATCH_S = 0.1


class Teller:
    """Says what the device does, one line each, and knows when enough was answered.

    With `as_json` each line is an object whose `event` is decision, inference, inputs, waiting, state, outcome,
    connection or safe_mode.
    """

    def __init__(self, count: int, *, as_json: bool, write: Callable[[str], None] = typer.echo) -> None:
        self._count, self._as_json, self._write = count, as_json, write
        self._decisions = self._declined = self._inferences = self._failures = 0
        self._reached = self._said_safe = False
        self._waits_for = ""
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
        self._count_answer(self._decisions)

    def waits(self, reason: str) -> None:
        """No version may answer tensors; said once for each reason."""
        if reason != self._waits_for:
            self._waits_for = reason
            self._say(f"waits: {reason}", event="waiting", reason=reason)

    def asks(self, version: str, inputs: str, *, made_up: bool) -> None:
        """What a version is asked from now on."""
        self._waits_for = ""
        how = "made up, like those that the version is known to answer" if made_up else "from the file"
        self._say(f"inputs of {version[:12]}, {how}: {inputs}", event="inputs", version=version, made_up=made_up)

    def inferred(self, device_id: str, found: Inferred) -> None:
        """One answer to tensors."""
        record = found.record
        self._inference(device_id, record.manifest, shown_short(found.outputs), record.latency_us, found)

    def failed(self, device_id: str, version: str, reason: str) -> None:
        """One run that gave no answer."""
        self._failures += 1
        self._inference(device_id, version, f"failed: {reason}", 0.0, None, error=reason)

    def _inference(
        self, device_id: str, version: str, text: str, latency_us: float, found: Inferred | None, error: str = ""
    ) -> None:
        if self.done.done():
            return
        now = found.record.time if found is not None else time.time()
        took = f"{latency_us:.0f} us" if found is not None else "-"
        self._say(
            f"{time.strftime('%H:%M:%S', time.localtime(now))}  {version[:12]}  device  {took}  {text}",
            event="inference",
            time=now,
            device_id=device_id,
            inference_id=found.record.inference_id if found is not None else "",
            version=version,
            where="device",
            latency_us=latency_us,
            outputs=listed(found.outputs) if found is not None and self._as_json else {},
            error=error,
        )
        self._inferences += 1
        self._count_answer(self._inferences)

    def _count_answer(self, answers: int) -> None:
        if self._count and answers >= self._count:
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
        if not self._as_json and self._inferences:
            typer.echo(f"{self._inferences} inferences, {self._failures} failed", err=True)

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
            self._write(json.dumps(fields) if self._as_json else plain(text))  # a model names its own outputs
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
