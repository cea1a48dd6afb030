"""What a round opened becomes a candidate: its base moved by the mean, judged against that base, then released."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

import msgspec
import numpy as np

from fl_coordinator import masters
from fl_coordinator.ledger import Ledger
from fl_coordinator.ports import Clock, Note
from fl_coordinator.promotion import Evaluate, Limits, failed, judge
from fl_coordinator.publishing import Publisher
from fl_coordinator.rollout_driver import RolloutDriver
from fl_coordinator.rounds import Event, Round
from fl_coordinator.tables.records import ReleaseRecord
from model_delta.errors import Malformed, NotFound
from model_delta.manifest import Lineage


class Publish(Protocol):
    """How a round's candidate becomes a release; see `Publisher.publish`."""

    async def __call__(self, source: bytes, **options: Any) -> ReleaseRecord:
        """The release. Idempotent. Raises what `Publisher.publish` raises."""


class Candidates:
    """Judges and releases what rounds opened."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        publisher: Publisher,
        publish: Publish,
        evaluate: Evaluate | None,
        limits: Limits,
        rollouts: RolloutDriver,
        clock: Clock,
        note: Note,
    ) -> None:
        """Without `evaluate` every candidate passes; `limits` are the gates of rounds that bring none."""
        self._ledger = ledger
        self._publisher = publisher
        self._publish = publish
        self._evaluate = evaluate
        self._limits = limits
        self._rollouts = rollouts
        self._clock = clock
        self._note = note

    async def judge(self, found: Round) -> tuple[Round, Event]:
        """Compare the candidate with its base; the figures and verdicts are in the round."""
        return await asyncio.to_thread(self._judge_now, found)

    def _judge_now(self, found: Round) -> tuple[Round, Event]:
        source = self._source(found)
        candidate = self._publisher.prepare(source, model=found.task.model, now=self._clock(), parent=found.task.base)
        if self._evaluate is None:
            return found, Event.PASSED
        base = self._publisher.manifest(found.task.base)
        before = self._evaluate(base, self._publisher.file(found.task.base))
        after = self._evaluate(candidate.draft, candidate.file)
        gates = judge(after, before, found.spec.gates or self._limits)
        figures = {
            **found.figures,
            "average_precision_base": before.average_precision,
            "average_precision_candidate": after.average_precision,
            "gates": {gate.name: gate.reason for gate in gates},
        }
        found = msgspec.structs.replace(found, figures=figures)
        refused = failed(gates)
        if refused:
            return msgspec.structs.replace(found, reason=refused), Event.GATE_CLOSED
        return found, Event.PASSED

    async def release(self, found: Round) -> tuple[Round, Event]:
        """Publish the candidate, and begin its canary where the round is on autopilot."""
        source = await asyncio.to_thread(self._source, found)
        record = await self._publish(
            source,
            model=found.task.model,
            name=found.round_id,
            parent=found.task.base,
            lineage=Lineage(round_id=found.round_id, contributions_root=found.root),
        )
        found = msgspec.structs.replace(found, candidate=record.manifest)
        if found.spec.autopilot:
            told = await self._begin_canary(found)
            found = msgspec.structs.replace(found, figures={**found.figures, "autopilot": told})
        return found, Event.RELEASED

    async def _begin_canary(self, found: Round) -> str:
        """Roll the candidate out by itself, under the round's name; what came of it. That it cannot begin now (another
        rollout decides) is for an operator to see, and no failure of the round."""
        text = found.spec.rollout or await asyncio.to_thread(self._rollouts.last_yaml, found.task.model)
        try:
            begun = await self._rollouts.start(text, found.candidate, "rollout", found.round_id)
        except Malformed as error:
            await asyncio.to_thread(self._note, "alert", f"round {found.round_id}: its canary did not begin: {error}")
            return f"did not begin: {error}"
        return f"rollout {begun.name} began"

    def _source(self, found: Round) -> bytes:
        result = self._ledger.round_result(found.round_id)
        if result is None:
            raise NotFound(f"round {found.round_id}: its result is not in the ledger")
        mean = np.frombuffer(result[0], dtype="<f4")
        trained = [parameter.tensor for parameter in found.task.parameters]
        return masters.apply_mean(self._publisher.source(found.task.base), mean, trained)
