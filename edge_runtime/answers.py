"""From a payment's features to a decision, whatever state the device is in.

1. The running version scores the payment here. Nobody asks a region when the score is clear of the threshold.
2. A score within `margin` of the threshold is unsure: the nearest region is asked, and its answer counts.
3. With no version that may answer (none installed, expired, withdrawn, or it just failed), a region is asked too.
4. If no region answers, the local score stands; without one, the baseline or the fixed rule answers (`safe_mode`).

Only a version with the signature of payments (`model_delta/signature.py`) can score one. Any other is of no use to
whoever decides payments: that counts as its failure, with the cause named, and `inferences` is the way to ask it.

Every decision leaves a record, also the one that fell back; a payment is never left without an answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_runtime.inference import feature_row, score_of
from edge_runtime.outbox import Outbox
from edge_runtime.regions import AskRegion, RegionAnswer
from edge_runtime.running import Running
from edge_runtime.safe_mode import SafeMode
from model_delta.errors import AtollError, Malformed, NotFound, Unavailable
from model_delta.signature import shown
from monitoring.telemetry import Decision, Feedback


class Answers:
    """Answers payments for one device. `observe(latency_ms, failed)` hears of every local answer (for probation)."""

    def __init__(
        self,
        *,
        device_id: str,
        region: str,
        feature_names: Sequence[str],
        running: Running,
        safe_mode: SafeMode,
        outbox: Outbox,
        regions: AskRegion | None,
        clock: Callable[[], float],
        observe: Callable[[float, bool], None],
        margin: float,
    ) -> None:
        self._device_id, self._region, self._names = device_id, region, tuple(feature_names)
        self._running, self._safe_mode, self._outbox, self._regions = running, safe_mode, outbox, regions
        self._clock, self._observe, self._margin = clock, observe, margin

    async def decide(self, features: Mapping[str, float]) -> Decision:
        """Answer one payment and leave the record. Raises only Malformed: for missing or non-finite features."""
        begun = time.perf_counter()
        row = feature_row(features, self._names)
        local, fallback, error = self._score_here(row)
        version = self._running.digest
        if local is not None and abs(local - self._threshold()) >= self._margin:
            return self._keep(begun, version, "device", local, local < self._threshold())
        answer = await self._ask_region(features)
        if answer is not None:
            return self._keep(
                begun,
                version if error else answer.manifest,
                "region",
                answer.score,
                answer.decision == "approve",
                fallback=fallback or "unsure",
                region=answer.region,
                error=error,
            )
        if local is not None:
            return self._keep(begun, version, "device", local, local < self._threshold())
        safe = self._safe_mode.answer(features, row)
        named = version if error else safe.digest  # a failure is told of the version that failed
        return self._keep(begun, named, "baseline", safe.score, safe.approved, fallback=fallback, error=error)

    def feedback(self, decision_id: str, fraud: bool) -> Feedback:
        """Record what a decision turned out to be. Raises NotFound (too long ago, or another device's), Malformed."""
        epoch, _, number = decision_id.partition("-")
        if epoch != f"{self._outbox.marks.epoch:x}" or not number.isdigit():
            raise Malformed(f"feedback: decision {decision_id[:40]!r} is not one of device {self._device_id}'s outbox")
        decision = self._outbox.decision(int(number))
        feedback = Feedback(decision_id, decision.manifest, not decision.approved, fraud)
        self._outbox.append(feedback)
        return feedback

    def _threshold(self) -> float:
        return self._running.manifest.decision_threshold if self._running.manifest is not None else 0.5

    def _score_here(self, row: NDArray[np.float32]) -> tuple[float | None, str, str]:
        """The local score, or None with the reason and, if the model failed, its error."""
        blocked = self._running.blocked(self._clock())
        if blocked or self._running.model is None:
            return None, blocked, ""
        problem = self._problem()
        if problem:
            self._observe(0.0, True)
            return None, "model failed", problem
        begun = time.perf_counter()
        try:
            score = score_of(self._running.model, row)
        except AtollError as error:
            self._observe(0.0, True)
            return None, "model failed", str(error)[:200]
        self._observe((time.perf_counter() - begun) * 1e3, False)
        return score, "", ""

    def _problem(self) -> str:
        """Why the running version cannot score payments of these features; "" when it can."""
        manifest, width = self._running.manifest, self._running.payment_width
        if manifest is None or width in (-1, len(self._names)):
            return ""
        return (
            f"model {manifest.model} {self._running.digest[:12]}: expected the one input 'features' "
            f"float32[batch, {len(self._names)}] and an output 'score', found {shown(manifest.inputs)} and "
            f"{shown(manifest.outputs)}; ask it with infer()"
        )[:300]

    async def _ask_region(self, features: Mapping[str, float]) -> RegionAnswer | None:
        if self._regions is None:
            return None
        named = {name: float(features[name]) for name in self._names}
        try:
            return await self._regions.ask(named, self._device_id, self._region)
        except NotFound:  # nothing was promised yet, so nothing was lost
            pass
        except Unavailable:
            self._outbox.count_lost_request()
        except AtollError:  # refused: the region works, it will not answer this device
            pass
        return None

    def _keep(
        self,
        begun: float,
        manifest: str,
        where: str,
        score: float,
        approved: bool,
        *,
        fallback: str = "",
        region: str = "",
        error: str = "",
    ) -> Decision:
        decision = Decision(
            decision_id=self._outbox.next_id,
            manifest=manifest,
            where="device" if where == "device" else "region" if where == "region" else "baseline",
            score=score,
            approved=approved,
            latency_us=(time.perf_counter() - begun) * 1e6,
            fallback=fallback,
            region=region,
            error=error,
            time=self._clock(),
        )
        self._outbox.append(decision)
        return decision
