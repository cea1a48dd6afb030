"""The part of `atoll device run` for models that know nothing of payments: tensors in at a pace, answers told.

Which kind a model is, only the manifest of the version that the device installed says. Until there is one the device
waits, and says so once: no rule or baseline stands in for a model of a signature that nobody knows yet.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence
from typing import NoReturn, Protocol

import numpy as np

from atoll.tensor_rows import Row, Tensors, made_up_like_golden, tensors_of
from edge_runtime.device import Device
from edge_runtime.inference import ModelFailed, NoVersion
from edge_runtime.inferences import Inferred
from edge_runtime.update import State
from model_delta.errors import Malformed, Unavailable
from model_delta.manifest import Manifest
from model_delta.signature import payment_width, shown

WATCH_S = 0.05
QUIET_S = 1.0


class TensorSource:
    """What is put to the model next: rows of a file, over and over, or tensors made up from the signature."""

    def __init__(self, rows: Sequence[Row], what: str, seed: int) -> None:
        """Without `rows` tensors are made up from `seed`; `what` names the file in messages."""
        self.made_up = not rows
        self._rows = itertools.cycle(rows)
        self._what = what
        self._rng = np.random.default_rng(seed)

    def next_for(self, manifest: Manifest) -> Tensors:
        """The next tensors, as this version takes them. Raises Malformed."""
        if self.made_up:
            return made_up_like_golden(manifest, self._rng)
        return tensors_of(next(self._rows), manifest.inputs, self._what)


class Tells(Protocol):
    """Who hears of it: an answer, a failure of a version, that none may answer, and what is put to a new one."""

    def inferred(self, device_id: str, found: Inferred) -> None: ...

    def failed(self, device_id: str, version: str, reason: str) -> None: ...

    def waits(self, reason: str) -> None: ...

    def asks(self, version: str, inputs: str, *, made_up: bool) -> None: ...


async def first_version(device: Device, to: Tells) -> Manifest:
    """The manifest of the version that runs here, once there is one; `device` is running."""
    waited = 0.0
    while True:
        if device.running.manifest is not None:
            return device.running.manifest
        await asyncio.sleep(WATCH_S)
        waited += WATCH_S
        if waited >= QUIET_S:  # one that is installed already takes a moment to be checked and opened
            to.waits(_missing(device))


def _missing(device: Device) -> str:
    if device.state == State.SAFE:
        return f"the version of {device.model} did not stay, and there is none before it; publish a better one"
    return f"no version of {device.model} is here yet; publish one and roll it out"


async def serve_tensors(
    device: Device, source: TensorSource, rate: float, rng: random.Random, to: Tells, *, unless_payments_of: int | None
) -> bool:
    """Run a device and have it answer tensors until cancelled. With `unless_payments_of` a first version that scores
    payments of so many features ends that at once: False.

    Raises Malformed for tensors that do not fit, Unavailable when the device stops by itself."""

    async def ask() -> bool:
        manifest = await first_version(device, to)
        width = payment_width(manifest.inputs, manifest.outputs)
        if unless_payments_of is not None and width in (-1, unless_payments_of):
            return False
        return await infer_forever(device, source, rate, rng, to)

    life = asyncio.create_task(device.run(), name=f"{device.device_id} device")
    asking = asyncio.create_task(ask(), name=f"{device.device_id} tensors")
    try:
        await asyncio.wait({life, asking}, return_when=asyncio.FIRST_COMPLETED)
        if life.done():
            life.result()
            raise Unavailable(f"device {device.device_id}: it stopped by itself")
        return asking.result()
    finally:
        for task in (asking, life):
            task.cancel()
        await asyncio.gather(asking, life, return_exceptions=True)


async def infer_forever(device: Device, source: TensorSource, rate: float, rng: random.Random, to: Tells) -> NoReturn:
    """Put tensors to the model, `rate` a second (the gaps jitter by half), until cancelled.

    Raises Malformed for tensors that do not fit the version that answers: they are the user's to put right."""
    name, seen = device.device_id, ""
    while True:
        manifest, version = device.running.manifest, device.running.digest
        if manifest is None:
            await first_version(device, to)
            continue
        tensors = source.next_for(manifest)
        if version != seen:
            seen = version
            to.asks(version, shown(manifest.inputs), made_up=source.made_up)
        try:
            to.inferred(name, await device.infer(tensors))
        except NoVersion as error:
            to.waits(str(error))
        except ModelFailed as error:
            to.failed(name, version, str(error))
        except Malformed:
            if device.running.digest == version:
                raise
        await asyncio.sleep((0.5 + rng.random()) / rate)
