"""From named tensors to named tensors, by the running version, whatever its signature is.

1. The inputs are held against the manifest: names, dtypes, ranks, fixed sizes. What does not fit is the caller's
   mistake: it is refused by name, and no version is blamed for it.
2. The version runs in a thread, one inference at a time: a model that takes a second must not keep the line to the
   broker waiting, and versions must not slow each other while one of them is judged.
3. What came of it is left in the outbox, and probation hears of it, exactly as of a payment's answer: a version that
   fails or is too slow goes back by itself, and a rollout's guardrails see it. That holds also where the caller did not
   wait for the answer.

Nothing stands in for a version here. A payment can fall back to a baseline or a rule, since what it asks is known; of a
model of any signature nobody knows what a safe answer would be. And no region is asked: the error says so at once, and
the caller knows better than we whether to wait, to ask a region itself, or to do without. An inference approves and
declines nothing, so it is counted apart from decisions.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime.inference import Arrays, InputsDisagree, LoadedModel, ModelFailed, NoVersion
from edge_runtime.outbox import Outbox
from edge_runtime.running import Running
from model_delta.errors import AtollError
from model_delta.signature import require_tensors
from monitoring.telemetry import Inference

Outputs = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Inferred:
    """The outputs by name, and the record that was left (version, latency)."""

    outputs: Outputs
    record: Inference


class Inferences:
    """Answers named tensors for one device. `observe(latency_ms, failed)` hears of every run of the version that is
    still the running one when it ends (for probation)."""

    def __init__(
        self,
        *,
        model: str,
        running: Running,
        outbox: Outbox,
        clock: Callable[[], float],
        observe: Callable[[float, bool], None],
    ) -> None:
        self._model, self._running, self._outbox = model, running, outbox
        self._clock, self._observe = clock, observe
        self._turn = asyncio.Lock()

    async def infer(self, inputs: Mapping[str, NDArray[np.generic]]) -> Inferred:
        """Run the version that answers now and leave the record.

        Raises NoVersion when none may answer, Malformed for inputs that do not fit its signature (nothing is counted in
        either case), and ModelFailed when the version itself fails, which counts against it.
        """
        await self._turn.acquire()
        try:
            model, version, tensors, begun = self._accepted(inputs)
        except BaseException:
            self._turn.release()
            raise
        # A thread cannot be called back: a caller who gives up leaves it running, and the turn with it.
        return await asyncio.shield(asyncio.create_task(self._answered(model, version, tensors, begun)))

    def _accepted(self, inputs: Mapping[str, NDArray[np.generic]]) -> tuple[LoadedModel, str, Arrays, float]:
        running = self._running
        blocked = running.blocked(self._clock())
        model, manifest, version = running.model, running.manifest, running.digest
        if blocked or model is None or manifest is None:
            raise NoVersion(
                f"model {self._model}: expected a version that may answer, found none ({blocked or 'no model'}); "
                "nothing stands in for one: wait until a rollout brings a version here"
            )
        begun = time.perf_counter()
        tensors = {name: _native(np.asarray(value)) for name, value in inputs.items()}
        require_tensors(tensors, manifest.inputs, f"model {self._model} {version[:12]}")
        return model, version, tensors, begun

    async def _answered(self, model: LoadedModel, version: str, tensors: Arrays, begun: float) -> Inferred:
        """Run the version, tell of it, and pass the turn on."""
        try:
            outputs, latency_ms = await asyncio.to_thread(_timed, model, tensors)
        except InputsDisagree:
            raise
        except AtollError as error:
            self._tell(version, 0.0, failed=True)
            self._keep(version, begun, error=str(error)[:200])
            raise ModelFailed(str(error)) from None
        finally:
            self._turn.release()
        self._tell(version, latency_ms, failed=False)
        return Inferred(outputs, self._keep(version, begun))

    def _tell(self, version: str, latency_ms: float, *, failed: bool) -> None:
        if self._running.digest == version:  # it may have been replaced while it ran
            self._observe(latency_ms, failed)

    def _keep(self, version: str, begun: float, *, error: str = "") -> Inference:
        record = Inference(
            inference_id=self._outbox.next_id,
            manifest=version,
            latency_us=(time.perf_counter() - begun) * 1e6,
            error=error,
            time=self._clock(),
        )
        self._outbox.append(record)
        return record


def _timed(model: LoadedModel, tensors: Arrays) -> tuple[Outputs, float]:
    """The outputs, and the milliseconds that the model alone took."""
    begun = time.perf_counter()
    outputs = model.run(tensors)
    return outputs, (time.perf_counter() - begun) * 1e3


def _native(array: NDArray[np.generic]) -> NDArray[np.generic]:
    """The array in this machine's byte order, which a runtime takes for granted."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
