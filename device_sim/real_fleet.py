"""Many real devices in one process: each gets its payments at a pace, answers them, and hears later what was fraud.

The devices are the real program, in one event loop; only time and payments are made up. A device that crashes is opened
again after a pause that doubles, and the crash is logged and counted. Cancelling `run_fleet` closes every device.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from device_sim.scenario import Sample
from model_delta.errors import AtollError, Unavailable
from monitoring.telemetry import Decision

HISTORY_ROWS_MAX = 4_096
FEEDBACK_WAITING_MAX = 2_000
RESTART_PAUSE_MAX_S = 15.0
BEHIND_MAX_S = 1.0
SOUND_AFTER_DECISIONS = 100

Float32 = npt.NDArray[np.float32]
_log = logging.getLogger(__name__)


class PaymentDevice(Protocol):
    """What this fleet asks of a device: to live, to decide, and to hear how a decision turned out."""

    async def run(self) -> None: ...

    async def decide(self, features: Mapping[str, float]) -> Decision: ...

    def feedback(self, decision_id: str, fraud: bool) -> object: ...


class LabelledHistory:
    """The last `rows_max` labelled payments of one device: what it trains on. Older rows are overwritten."""

    def __init__(self, names: Sequence[str], rows_max: int = HISTORY_ROWS_MAX) -> None:
        self._names = tuple(names)
        self._features = np.zeros((rows_max, len(self._names)), dtype=np.float32)
        self._fraud = np.zeros(rows_max, dtype=np.float32)
        self._added = 0

    def __len__(self) -> int:
        return min(self._added, len(self._fraud))

    def add(self, features: Mapping[str, float], fraud: bool) -> None:
        """Keep one payment. Raises KeyError when a feature is missing."""
        self._put(np.array([features[name] for name in self._names], dtype=np.float32), fraud)

    def add_rows(self, features: Float32, fraud: npt.NDArray[np.bool_]) -> None:
        """Keep many, float32[n, F] and bool[n], the newest last."""
        room = len(self._fraud)
        for row, label in zip(features[-room:], fraud[-room:], strict=True):
            self._put(row, bool(label))

    def arrays(self) -> tuple[Float32, Float32]:
        """Copies of features float32[n, F] and labels float32[n] (1 is fraud), in order of arrival."""
        rows_max = len(self._fraud)
        order = np.arange(max(0, self._added - rows_max), self._added) % rows_max
        return self._features[order], self._fraud[order]

    def _put(self, row: Float32, fraud: bool) -> None:
        place = self._added % len(self._fraud)
        self._features[place], self._fraud[place] = row, float(fraud)
        self._added += 1


@dataclass(frozen=True)
class Member:
    """One device of the fleet: how to open it (and, on leaving, close it), its payments, and its labelled history."""

    device_id: str
    open_device: Callable[[], AbstractAsyncContextManager[PaymentDevice]]
    payments: Iterator[Sample]
    history: LabelledHistory


@dataclass
class FleetCounts:
    """What the fleet did so far; the fleet writes, anybody may read."""

    decisions: int = 0
    declined: int = 0
    frauds: int = 0
    refused: int = 0
    skipped: int = 0
    feedback: int = 0
    feedback_lost: int = 0
    restarts: dict[str, int] = field(default_factory=dict)
    last_crash: str = ""


@dataclass(frozen=True)
class Pace:
    """How fast the made-up world runs: payments a second at each device (the gaps jitter by half), how long until it is
    known what a payment was, over how many seconds the devices start, and the first pause before a restart."""

    payments_per_second: float = 5.0
    feedback_delay_s: float = 2.0
    start_spread_s: float = 2.0
    restart_pause_s: float = 0.5


async def run_fleet(
    members: Sequence[Member],
    pace: Pace,
    seed: int,
    counts: FleetCounts | None = None,
    note: Callable[[str, Decision, Sample], None] | None = None,
) -> None:
    """Run every member until cancelled. `note` is told each decision with the payment it was about.

    Raises nothing of a single device: its crashes are logged, counted and followed by a restart.
    """
    counted = FleetCounts() if counts is None else counts
    async with asyncio.TaskGroup() as group:
        for number, member in enumerate(members):
            runner = _Runner(member, pace, random.Random(f"{seed}:{member.device_id}"), counted, note)
            delay = pace.start_spread_s * number / max(len(members), 1)
            group.create_task(runner.run(delay), name=f"fleet {member.device_id}")


class _Runner:
    """One member's life: open, serve, and after a crash the same again. Waiting feedback outlives a crash."""

    def __init__(
        self,
        member: Member,
        pace: Pace,
        rng: random.Random,
        counts: FleetCounts,
        note: Callable[[str, Decision, Sample], None] | None,
    ) -> None:
        self._member, self._pace, self._rng, self._counts, self._note = member, pace, rng, counts, note
        self._waiting: deque[tuple[float, str, Sample]] = deque(maxlen=FEEDBACK_WAITING_MAX)
        self._answered = 0

    async def run(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        pause = self._pace.restart_pause_s
        while True:
            answered = self._answered
            try:
                async with self._member.open_device() as device:
                    await self._serve(device)
            except Exception as error:
                name, reason = self._member.device_id, _root(error)
                if self._answered - answered > SOUND_AFTER_DECISIONS:
                    pause = self._pace.restart_pause_s
                self._counts.restarts[name] = self._counts.restarts.get(name, 0) + 1
                self._counts.last_crash = f"{name}: {type(reason).__name__}: {reason}"[:300]
                _log.warning("%s crashed (%s: %s); restart in %.1f s", name, type(reason).__name__, reason, pause)
            await asyncio.sleep(pause * (0.75 + self._rng.random() / 2))
            pause = min(2 * pause, RESTART_PAUSE_MAX_S)

    async def _serve(self, device: PaymentDevice) -> None:
        async with asyncio.TaskGroup() as group:
            life = group.create_task(device.run(), name=f"{self._member.device_id} device")
            group.create_task(self._pay(device), name=f"{self._member.device_id} payments")
            await life
            raise Unavailable("the device stopped by itself")

    async def _pay(self, device: PaymentDevice) -> None:
        """Bring payments at the pace; when answers take longer than that, skip waiting instead of queueing."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        for sample in self._member.payments:
            due += (0.5 + self._rng.random()) / self._pace.payments_per_second
            now = loop.time()
            if now - due > BEHIND_MAX_S:
                self._counts.skipped += 1
                due = now
            await asyncio.sleep(max(0.0, due - now))
            await self._answer(device, sample, loop.time())
            self._tell_what_it_was(device, loop.time())

    async def _answer(self, device: PaymentDevice, sample: Sample, now: float) -> None:
        try:
            decision = await device.decide(sample.features)
        except AtollError as error:
            self._counts.refused += 1
            _log.warning("%s: a payment was not answered: %s", self._member.device_id, error)
            return
        self._answered += 1
        self._counts.decisions += 1
        self._counts.declined += not decision.approved
        self._counts.frauds += sample.fraud
        self._waiting.append((now + self._pace.feedback_delay_s, decision.decision_id, sample))
        if self._note is not None:
            self._note(self._member.device_id, decision, sample)

    def _tell_what_it_was(self, device: PaymentDevice, now: float) -> None:
        while self._waiting and self._waiting[0][0] <= now:
            _, decision_id, sample = self._waiting.popleft()
            self._member.history.add(sample.features, sample.fraud)
            try:
                device.feedback(decision_id, sample.fraud)
                self._counts.feedback += 1
            except AtollError as error:  # the decision is no longer in the device's outbox, or its disk is full
                self._counts.feedback_lost += 1
                _log.info("%s: feedback was not taken: %s", self._member.device_id, error)


def _root(error: BaseException) -> BaseException:
    """The first error inside nested groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
